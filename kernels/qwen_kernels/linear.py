"""linear in Triton, for the few rows of decoding: the weights stream through once, as fast as the memory gives them.

Up to 4 rows, a product of vectors: a program holds BLOCK_N rows of the weight times BLOCK_K columns, and multiplies them
in fp32 with every row of x. BLOCK_N is small, so that even N = 1024 makes more programs than a GPU has multiprocessors,
and K is what the warps of a program share: their sums meet in its shared memory, and no second kernel is needed.

5 to 16 rows, tensor cores: 16 multiplications for each weight are more than the fp32 units have time for. x is padded to
16 rows. Now a tile is 64 rows of the weight, so where N alone makes too few programs K is split among several: each
writes fp32 sums, and a second kernel adds them in order (split-K, without its usual atomics: the same bits every time).

More than 16 rows: `torch.nn.functional.linear`. cuBLAS is close to the limit there, and Triton would not be closer.

Bytes: N K elements; x and the result are small. FLOPs: 2 M N K: memory bound up to some hundred rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref import ops
from qwen_ref.errors import RequestError

from .launch import ANY, on, require, row_offset, rows, supports, tuned

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.linear
TOLERANCE = 2.0
MOST_ROWS = 16
# (device, (rows padded, "narrow" = N at most 2048 or "wide")) -> the tile. BLOCK_K is in 16-bit numbers, fp32 has half.
# Products of vectors: 4 or 8 KiB of weights at a time per program, and several programs on a multiprocessor.
# Tensor cores: about PROGRAMS programs, two for each multiprocessor of an H100 or H200.
TUNED = {
    (ANY, (1, "narrow")): {"BLOCK_N": 2, "BLOCK_K": 2048, "num_warps": 4},
    (ANY, (1, "wide")): {"BLOCK_N": 4, "BLOCK_K": 1024, "num_warps": 4},
    (ANY, (2, "narrow")): {"BLOCK_N": 2, "BLOCK_K": 2048, "num_warps": 4},
    (ANY, (2, "wide")): {"BLOCK_N": 4, "BLOCK_K": 1024, "num_warps": 4},
    (ANY, (4, "narrow")): {"BLOCK_N": 2, "BLOCK_K": 1024, "num_warps": 4},
    (ANY, (4, "wide")): {"BLOCK_N": 4, "BLOCK_K": 1024, "num_warps": 4},
    (ANY, (16, "narrow")): {"BLOCK_N": 32, "BLOCK_K": 128, "PROGRAMS": 264, "num_warps": 4, "num_stages": 4},
    (ANY, (16, "wide")): {"BLOCK_N": 64, "BLOCK_K": 128, "PROGRAMS": 264, "num_warps": 4, "num_stages": 4},
}


def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), any strides; weight (N, K), any strides; bias (N,) or None. Returns (..., N), contiguous."""
    given = (x, weight) if bias is None else (x, weight, bias)
    require("linear", *given)
    count, (columns, inner) = math.prod(x.shape[:-1]), weight.shape
    if x.shape[-1] != inner or (bias is not None and bias.shape != (columns,)) or len({t.dtype for t in given}) > 1:
        raise RequestError(
            "the triton linear needs x (..., K), a weight (N, K) and a bias (N,) or None of one dtype, got "
            + ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in given)
        )
    if not 0 < count <= MOST_ROWS or weight.numel() == 0:
        return F.linear(x, weight, bias)
    padded = MOST_ROWS if count > 4 else triton.next_power_of_2(count)
    launch = {**tuned(TUNED, x.device, (padded, "narrow" if columns <= 2048 else "wide"))}
    block = launch["BLOCK_K"] = launch["BLOCK_K"] * 2 // x.element_size()
    tiles = triton.cdiv(columns, launch["BLOCK_N"])
    (_, size1, size2), (xs,) = rows(x)
    out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    shared = (count, columns, inner, size1, size2, *xs, x.stride(-1), *weight.stride(), 0 if bias is None else bias.stride(0))
    with on(x.device):
        if padded < MOST_ROWS:
            _few_rows[(tiles,)](x, weight, bias, out, *shared, ROWS=padded, VECTOR=16 // x.element_size(), **launch)
            return out
        # A split of fewer than four steps is not worth a second kernel.
        splits = max(1, min(launch.pop("PROGRAMS") // tiles, inner // (4 * block)))
        sums = out if splits == 1 else torch.empty(splits, count, columns, dtype=torch.float32, device=x.device)
        steps = triton.cdiv(inner, splits * block)
        first_bias = bias if splits == 1 else None
        _some_rows[(tiles, splits)](x, weight, first_bias, sums, *shared, steps, ROWS=padded, **launch)
        if splits > 1:
            grid = (triton.cdiv(count * columns, 512),)
            _add_splits[grid](sums, bias, out, count * columns, columns, shared[-1], SPLITS=splits, BLOCK=512, num_warps=4)
    return out


@triton.jit
def _few_rows(
    x, weight, bias, out, count, columns, inner, size1, size2,
    x0, x1, x2, x3, w0, w1, b0,
    ROWS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Four axes, (ROWS, BLOCK_N, BLOCK_K / VECTOR, VECTOR), from the pointers on: the last one lies in one thread, which
    # loads its 16 bytes at once and adds them up at once, and no operand changes its layout on the way to the product.
    k = (tl.arange(0, BLOCK_K // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])[None, None, :, :]
    x += row_offset(tl.minimum(row, count - 1), size1, size2, x0, x1, x2)[:, None, None, None] + k.to(tl.int64) * x3
    weight += tl.minimum(n, columns - 1).to(tl.int64)[None, :, None, None] * w0 + k.to(tl.int64) * w1
    total = tl.zeros((ROWS, BLOCK_N, BLOCK_K // VECTOR), tl.float32)
    for start in range(0, inner, BLOCK_K):
        inside = start + k < inner
        w = tl.load(weight, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        values = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(values * w, axis=3)
        x += BLOCK_K * x3
        weight += BLOCK_K * w1
    result = tl.sum(total, axis=2)  # (ROWS, BLOCK_N)
    if bias is not None:
        result += tl.load(bias + n * b0, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    inside = (row < count)[:, None] & (n < columns)[None, :]
    tl.store(out + row[:, None] * columns + n[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _some_rows(
    x, weight, bias, out, count, columns, inner, size1, size2,
    x0, x1, x2, x3, w0, w1, b0, steps,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    k = split * steps * BLOCK_K + tl.arange(0, BLOCK_K)
    x += row_offset(tl.minimum(row, count - 1), size1, size2, x0, x1, x2)[:, None] + k.to(tl.int64)[None, :] * x3
    weight += tl.minimum(n, columns - 1).to(tl.int64)[None, :] * w0 + k.to(tl.int64)[:, None] * w1  # (BLOCK_K, BLOCK_N)
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for step in range(steps):
        inside = step * BLOCK_K + k < inner
        values = tl.load(x, mask=inside[None, :], other=0.0)
        w = tl.load(weight, mask=inside[:, None], other=0.0)
        total = tl.dot(values, w, total, input_precision="ieee")
        x += BLOCK_K * x3
        weight += BLOCK_K * w1
    if bias is not None:
        total += tl.load(bias + n * b0, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    inside = (row < count)[:, None] & (n < columns)[None, :]
    target = out + (split * count + row)[:, None] * columns + n[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_splits(sums, bias, out, size, columns, b0, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + split * size + place, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + place % columns * b0, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)
