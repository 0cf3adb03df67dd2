# %% [markdown]
# # Write a kernel
#
# Every formula of the models is a function in `qwen_ref.ops`, and every one can be replaced by a kernel of yours. This
# notebook takes one from its formula to a Triton kernel that is registered, checked, run inside a model and compiled for
# GPUs that are not here; then it does the same for a first attention kernel.
#
# Without a GPU, Triton's interpreter runs the kernels on the CPU: thousands of times slower, but with the same numbers.
# With one, the same cells also print times.

# %%
import inspect
import os
import subprocess
import sys
import warnings

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

import qwen_ref as qr  # noqa: E402
from qwen_ref import backend, ops  # noqa: E402
from qwen_ref.bench import bench, check  # noqa: E402
from qwen_ref.bench.shapes import sizes  # noqa: E402
from qwen_ref.bench.subjects import Draw, subject  # noqa: E402

MODEL = "tiny"
DEVICE = "cuda" if GPU else "cpu"

warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, about places that a mask throws away
torch.set_grad_enabled(False)
torch.manual_seed(0)
model, tokenizer = qr.load(MODEL, device=DEVICE, dtype=torch.float32)

# %% [markdown]
# ## The formula
#
# `rms_norm` divides a row by its root mean square and scales it by a learned weight:
#
# $$y_i = \frac{x_i}{\sqrt{\frac{1}{H}\sum_j x_j^2 + \varepsilon}}\, w_i$$
#
# The comment in the source says where the official model rounds: the normed row becomes 16-bit before the weight comes in.

# %%
print(inspect.getsource(ops.rms_norm))

# %% [markdown]
# What is the least it can cost? Every number is read once and written once. On an H200, which reads and writes about 4.3 TB
# per second and multiplies at about 770 TFLOP/s, the arithmetic is free and the traffic is all:

# %%
shapes = Draw(0, torch.bfloat16, torch.device("meta"))  # tensors without storage
_, (x, weight, eps) = next(subject("rms_norm").real(sizes("Qwen/Qwen3-8B"), 4096, shapes))
cost = subject("rms_norm").cost(x, weight, eps)
print(f"x {tuple(x.shape)} in bf16: {cost.bytes / 1e6:.1f} MB, {cost.flops / 1e6:.1f} MFLOP")
print(f"memory {cost.bytes / 4.3e12 * 1e6:.1f} us, arithmetic {cost.flops / 770e12 * 1e6:.2f} us")

# %% [markdown]
# The formula as PyTorch runs it, operation by operation, writes the squares, the mean, the normed row and the product to
# memory in between. A kernel that keeps a row in registers reads it once.
#
# ## The kernel
#
# One program takes one row. `tl.arange` needs a power of two, so a row of 96 numbers is held in 128 places, and a mask keeps
# the other 32 away from memory. All arithmetic is in 32 bits.


# %%
@triton.jit
def norm_kernel(x, weight, out, eps, width, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < width
    values = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values * values) / width
    normed = (values * tl.rsqrt(mean + eps)).to(out.dtype.element_ty)  # the official rounding
    tl.store(out + row * width + column, normed.to(tl.float32) * scale, mask=inside)


@backend.register("rms_norm", "mine")
def my_rms_norm(x, weight, eps):
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    if x.numel():
        norm_kernel[(x.numel() // width,)](x, weight, out, eps, width, WIDTH=triton.next_power_of_2(width))
    return out


x, weight = torch.randn(3, 96, device=DEVICE), torch.randn(96, device=DEVICE)
gap = (my_rms_norm(x, weight, 1e-6) - ops.rms_norm(x, weight, 1e-6)).abs().max()
print(f"largest difference from the formula: {float(gap):.1e}")

# %% [markdown]
# ## The check
#
# Three rows of one width prove little. `check` knows what breaks kernels: no rows, one row, odd widths, views with strides,
# numbers so small that epsilon matters or so large that a square overflows 16 bits. The judge is the formula in 64-bit; the
# error allowed is twice what the formula itself loses in the same dtype. Every tensor lies inside memory filled with NaN, so
# a read or a write that goes astray shows.

# %%
report = check("rms_norm", "mine", device=DEVICE, model="tiny", seeds=2)
print(report.table(), "\n\n" + report.verdict)
assert report.ok

# %% [markdown]
# A check that cannot fail is worth nothing, so here is the same kernel with its masks forgotten. It agrees with the formula
# whenever the width is a power of two, and the surplus it writes into the next row is overwritten by the next program, so it
# may pass many a test.


# %%
@triton.jit
def careless_kernel(x, weight, out, eps, width, WIDTH: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    values = tl.load(x + row * width + column).to(tl.float32)
    scale = tl.load(weight + column).to(tl.float32)
    tl.store(out + row * width + column, values * tl.rsqrt(tl.sum(values * values) / width + eps) * scale)


@backend.register("rms_norm", "careless")
def careless(x, weight, eps):
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    if x.numel():
        careless_kernel[(x.numel() // width,)](x, weight, out, eps, width, WIDTH=triton.next_power_of_2(width))
    return out


report = check("rms_norm", "careless", device=DEVICE, model="tiny", seeds=1)
print(*report.faults[:4], sep="\n")
assert not report.ok

# %% [markdown]
# ## In the model
#
# `use` puts it in place of the formula, for a while or from now on. With `strict=True` nothing falls back in silence.

# %%
ids = torch.tensor([tokenizer.encode("Once upon a time")], device=DEVICE)
plain = model(ids)
with backend.use({"rms_norm": "mine"}, strict=True):
    ours = model(ids)
    print(backend.report(DEVICE, torch.float32).splitlines()[1])
print(f"logits differ by {float((ours - plain).abs().max() / plain.abs().max()):.1e} of their scale")
assert torch.equal(ours.argmax(-1), plain.argmax(-1))

# %% [markdown]
# `qwen-ref verify MODEL --backend mine` runs the whole layer-by-layer comparison with transformers on it.
#
# ## What the compiler makes of it
#
# A kernel can be compiled for a GPU that is not here: registers, spills to memory, shared memory, and whether tensor cores
# are used are known without one. The package's own `rms_norm` handles strides and several short rows per program; the command
# line compiles it for two generations of NVIDIA's.

# %%
environment = {**os.environ, "TRITON_INTERPRET": "0"}
arguments = "-m qwen_ref.cli kernels compile rms_norm --target sm_80 --target sm_90 --model Qwen/Qwen3-8B"
command = [sys.executable, *arguments.split()]
lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
print(*[line for line in lines if "launch" in line or "bf16" in line], sep="\n")

# %% [markdown]
# What was compiled can also be run here: an emulator in NumPy takes the machine code instruction by instruction, with warps,
# shared memory, tensor cores and copies in flight. It is right in bfloat16, which Triton's interpreter computes wrongly, and an
# access outside every tensor, a race between warps or a result that is read before it is there is an error with its name.

# %%
arguments = "-m qwen_ref.cli kernels check rms_norm --impl triton --dtype bfloat16 --emulate sm_90"
command = [sys.executable, *arguments.split()]
print(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

# %% [markdown]
# ## How fast
#
# The bench measures what the machine can do (the best rate of reading a large buffer and the best matrix product), then every
# implementation as a share of it, on inputs that are not in the cache, and only after its outputs have passed the check. The
# interpreter's time says nothing about the kernel's, so without a GPU there is no time to show.

# %%
if GPU:
    print(bench("rms_norm", model="Qwen/Qwen3-8B").table())
else:
    print("no GPU here: run `qwen-ref kernels bench rms_norm --model Qwen/Qwen3-8B` on one")

# %% [markdown]
# ## A first attention kernel
#
# The scores of T queries and S keys are T times S numbers, of which only one weighted sum per query is wanted. Softmax seems
# to need all scores before the first weight is known. It does not: keep the largest score m so far, the sum of
# exp(score - m), and the weighted sum o; when a larger score comes, both sums are multiplied by exp(old m - new m) and go on
# (Milakov & Gimelshein 2018; Dao et al. 2022). One program takes a block of queries of one head and walks over the keys.
#
# With grouped heads, query head n reads key head n // (N / K); that is one line. The mask comes as it is.


# %%
@triton.jit
def attention_kernel(
    q, k, v, mask, out, heads, groups, T, S, D, mask_batch, scale,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # (BLOCK_T,) queries
    d = tl.arange(0, WIDTH)  # (WIDTH,)
    rows = (t < T)[:, None] & (d < D)[None, :]
    at = (batch * heads + head) * T * D + t[:, None] * D + d[None, :]
    queries = tl.load(q + at, mask=rows, other=0.0)  # (BLOCK_T, WIDTH)
    keys = ((batch * heads + head) // groups) * S * D  # heads = groups * K, so this is batch * K + head // groups
    m = tl.full((BLOCK_T,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    o = tl.zeros((BLOCK_T, WIDTH), tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)  # (BLOCK_S,) keys
        columns = (s < S)[:, None] & (d < D)[None, :]
        key = tl.load(k + keys + s[:, None] * D + d[None, :], mask=columns, other=0.0)  # (BLOCK_S, WIDTH)
        value = tl.load(v + keys + s[:, None] * D + d[None, :], mask=columns, other=0.0)
        seen = (t < T)[:, None] & (s < S)[None, :]
        seen = tl.load(mask + batch * mask_batch + t[:, None] * S + s[None, :], mask=seen, other=0) != 0
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale  # (BLOCK_T, BLOCK_S) fp32
        scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(m, tl.max(scores, 1))
        shrink, weights = tl.exp(m - larger), tl.exp(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, 1)
        o = o * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        m = larger
    tl.store(out + at, (o / total[:, None]).to(out.dtype.element_ty), mask=rows)


@backend.register("attention", "mine")
def my_attention(q, k, v, mask=None):
    (B, N, T, D), (K, S) = q.shape, k.shape[1:3]
    mask = ops.causal_mask(T, S, q.device) if mask is None else mask
    q, k, v, mask = (x.contiguous() for x in (q, k, v, mask))
    out = torch.empty_like(q)
    if q.numel():
        attention_kernel[(triton.cdiv(T, 64), N, B)](
            q, k, v, mask.view(torch.uint8), out, N, N // K, T, S, D, mask.stride(0) if mask.shape[0] > 1 else 0, D**-0.5,
            BLOCK_T=64, BLOCK_S=32, WIDTH=max(16, triton.next_power_of_2(D)),
        )  # fmt: skip
    return out


report = check("attention", "mine", device=DEVICE, model="tiny", dtype=torch.float16, seeds=1)
print(report.table(), "\n\n" + report.verdict)
assert report.ok

# %% [markdown]
# The running maximum starts at -1e30, not at minus infinity: a query whose first block of keys is all hidden would otherwise
# compute exp(-inf + inf), which is NaN. The sliding-window row of the table is the case that finds this out.
#
# The model on both kernels of this notebook:

# %%
with backend.use({"attention": "mine", "rms_norm": "mine"}, strict=True):
    ours = model(ids)
print(f"logits differ by {float((ours - plain).abs().max() / plain.abs().max()):.1e} of their scale")
print("Once upon a time" + tokenizer.decode(ours[0, -1:].argmax(-1).tolist()))
assert torch.equal(ours.argmax(-1), plain.argmax(-1))

# %% [markdown]
# ## Where it goes from here
#
# This kernel reads every block of keys, also those that the causal mask hides entirely; copies its inputs when they are views;
# and gives a single query of a long context to one program, while the rest of the GPU waits. The package's own
# `kernels/qwen_kernels/attention_prefill.py` and `attention_decode.py` skip, stride and split. Beat them:
#
#     qwen-ref kernels check attention --impl yours --file yours.py --dtype bfloat16
#     qwen-ref kernels bench attention --model Qwen/Qwen3-8B --file yours.py
#
# ## The same on a real model
#
# Set `MODEL = "Qwen/Qwen3-0.6B"` in the first cell, on a machine with a GPU, and run all cells again.
