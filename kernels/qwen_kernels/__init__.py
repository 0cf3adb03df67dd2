"""Triton kernels for the operations of `qwen_ref.backend`. One file per operation, named after it.

Every file has the same parts, which `qwen_ref.bench` and `qwen_ref.backend` read by name:

    run(...)                   the launcher, with the signature of the formula
    supports(device, dtype)    None, or the reason it cannot run
    ORACLE                     the formula in `qwen_ref.ops`
    TOLERANCE                  its error against fp64 may be this many times the formula's own in the same dtype; in fp32,
                               TOLERANCE_FP32 where there is one
    TUNED                      launch parameters by (device, shape class); nothing is tuned at run time

The kernels are plain-pointer Triton, 3.6 to 3.9. Loads are widened to fp32 at once, and all arithmetic is fp32; only the
operands of `tl.dot` stay as they are, for the tensor cores, and add up in fp32. Where a kernel that streams rounds, it is
where the formula rounds, by an explicit `.to(...)`: that is the official model's order. Products of matrices keep fp32
where the formula rounds in between.

Triton's CPU interpreter computes on bf16 wrongly, and even its fp32 to bf16 truncates where a GPU rounds to nearest: it
runs these kernels in fp32 and fp16. (That of Triton 3.6 fails on loops with NumPy 2.4; it wants an older one.) In bf16 the
emulator runs what is compiled of them: `qwen-ref kernels check OP --impl triton --dtype bfloat16 --emulate sm_90`.
"""
