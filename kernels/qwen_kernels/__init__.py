"""Triton kernels for the operations of `qwen_ref.backend`. One file per operation, named after it.

Every file has the same parts, which `qwen_ref.bench` and `qwen_ref.backend` read by name:

    run(...)                   the launcher, with the signature of the formula
    supports(device, dtype)    None, or the reason it cannot run
    ORACLE                     the formula in `qwen_ref.ops`
    TOLERANCE                  its error against fp64 may be this many times the formula's own in the same dtype
    TUNED                      launch parameters by (device, shape class); nothing is tuned at run time

The kernels are plain-pointer Triton, 3.6 to 3.9. Loads are widened to fp32 at once, all arithmetic is fp32 and every
rounding the formula makes is an explicit `.to(...)`: that is the official model's order, and Triton's CPU interpreter
computes on bf16 wrongly otherwise. (Even so its last step, fp32 to bf16, truncates where a GPU rounds to nearest; it
runs these kernels in fp32 and fp16.)
"""
