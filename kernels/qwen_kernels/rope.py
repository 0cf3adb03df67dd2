"""rope in Triton: both halves of a head are in registers at once, so x is read once and written once.

Algorithm: Su et al. 2021 in the half-split convention of `ops.rope`. A program takes one position and a block of its
heads; cos and sin are read once for all of them. Each product is rounded to x's dtype before the sum, as eager rounds.
What a partial rotation leaves is copied.

Bytes: 2 B N T D elements for x, 2 B T R for the tables. FLOPs: 3 B N T R: memory bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref import ops
from qwen_ref.errors import RequestError

from .launch import ANY, on, require, supports, tuned

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.rope
TOLERANCE = 2.0
# (device, heads rounded up to a power of two, at most 32) -> heads per program and warps
TUNED = {(ANY, heads): {"HEADS": heads, "num_warps": max(1, heads // 4)} for heads in (1, 2, 4, 8, 16, 32)}


def run(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, N, T, D), any strides (q and k are transposed views); cos, sin (B or 1, T, R <= D) in x's dtype."""
    require("rope", x, cos, sin)
    batch, heads, length, dim = x.shape
    turned = cos.shape[-1]
    table = (batch, length, turned)
    if turned % 2 or turned > dim or any(t.dtype != x.dtype or t.shape not in (table, (1, *table[1:])) for t in (cos, sin)):
        raise RequestError(
            f"the triton rope needs tables {table} of {x.dtype}, no wider than a head and even, got x {tuple(x.shape)}, "
            f"cos {tuple(cos.shape)} {cos.dtype}, sin {tuple(sin.shape)} {sin.dtype}"
        )
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    cos, sin = cos.expand(table), sin.expand(table)  # one row of tables for every sequence: stride 0
    launch = tuned(TUNED, x.device, min(32, triton.next_power_of_2(heads)))
    with on(x.device):
        _rope[(batch * length, triton.cdiv(heads, launch["HEADS"]))](
            x, cos, sin, out, heads, length, turned // 2, dim,
            *x.stride(), *cos.stride(), *sin.stride(), *out.stride(),
            HALF=triton.next_power_of_2(max(1, turned // 2)),
            REST=triton.next_power_of_2(dim - turned) if turned < dim else 0, **launch,
        )  # fmt: skip
    return out


@triton.jit
def _rope(
    x, cos, sin, out, heads, length, half, dim,
    x0, x1, x2, x3, c0, c1, c2, s0, s1, s2, o0, o1, o2, o3,
    HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    dtype = x.dtype.element_ty
    place = tl.program_id(0).to(tl.int64)
    b, t = place // length, place % length
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS).to(tl.int64)  # (HEADS,)
    j = tl.arange(0, HALF)  # (HALF,), the pair (x_j, x_{j + R/2})
    paired = j < half
    inside = (head < heads)[:, None] & paired[None, :]
    cosine, sine = cos + b * c0 + t * c1, sin + b * s0 + t * s1
    c_first = tl.load(cosine + j * c2, mask=paired, other=0.0).to(tl.float32)[None, :]
    c_second = tl.load(cosine + (j + half) * c2, mask=paired, other=0.0).to(tl.float32)[None, :]
    s_first = tl.load(sine + j * s2, mask=paired, other=0.0).to(tl.float32)[None, :]
    s_second = tl.load(sine + (j + half) * s2, mask=paired, other=0.0).to(tl.float32)[None, :]
    source = x + b * x0 + head[:, None] * x1 + t * x2 + j[None, :] * x3
    target = out + b * o0 + head[:, None] * o1 + t * o2 + j[None, :] * o3
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half * x3, mask=inside, other=0.0).to(tl.float32)
    low = (first * c_first).to(dtype).to(tl.float32) - (second * s_first).to(dtype).to(tl.float32)
    high = (second * c_second).to(dtype).to(tl.float32) + (first * s_second).to(dtype).to(tl.float32)
    tl.store(target, low.to(dtype), mask=inside)
    tl.store(target + half * o3, high.to(dtype), mask=inside)
    if REST:
        j = 2 * half + tl.arange(0, REST)[None, :]
        inside = (head < heads)[:, None] & (j < dim)
        rest = tl.load(x + b * x0 + head[:, None] * x1 + t * x2 + j * x3, mask=inside, other=0.0)
        tl.store(out + b * o0 + head[:, None] * o1 + t * o2 + j * o3, rest, mask=inside)
