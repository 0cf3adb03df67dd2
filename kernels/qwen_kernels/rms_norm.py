"""rms_norm in Triton: each program holds a few whole rows in registers, so x is read once and written once.

Algorithm: Zhang & Sennrich 2019, x / sqrt(mean(x^2) + eps) * weight. The sum of squares is fp32; the normed row is
rounded to x's dtype before the weight, as in `ops.rms_norm`.

Bytes: 2 M H elements, and H for the weight. FLOPs: about 4 M H, so it is memory bound everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref import ops
from qwen_ref.errors import RequestError

from .launch import ANY, on, require, row_offset, rows, supports, tuned

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.rms_norm
TOLERANCE = 2.0
# (device, width rounded up to a power of two, at least 128) -> rows per program and warps. 128 is a head: many short rows.
TUNED = {
    (ANY, width): {"ROWS": max(1, 1024 // width), "num_warps": min(16, max(4, width // 512))}
    for width in (2**i for i in range(7, 15))
}


def run(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., H), any strides; weight (H,). Returns (..., H) with x's strides where they are dense."""
    require("rms_norm", x, weight)
    width = check_width("rms_norm", x, weight)
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    if x.numel() == 0:
        return out
    (size0, size1, size2), (xs, os) = rows(x, out)
    count, block = size0 * size1 * size2, max(128, triton.next_power_of_2(width))
    launch = tuned(TUNED, x.device, block)
    with on(x.device):
        _rms_norm[(triton.cdiv(count, launch["ROWS"]),)](
            x, weight, out, eps, count, width, size1, size2,
            *xs, x.stride(-1), *os, out.stride(-1), weight.stride(0),
            WIDTH=block, **launch,
        )  # fmt: skip
    return out


def check_width(operation: str, x: Tensor, weight: Tensor) -> int:
    width = x.shape[-1]
    if weight.shape != (width,):
        raise RequestError(f"the triton {operation} needs a weight of {width} numbers, got shape {tuple(weight.shape)}")
    if width > 16384:
        raise RequestError(f"the triton {operation} holds a row in registers: {width} is more than 16384")
    return width


@triton.jit
def _rms_norm(
    x, weight, out, eps, count, width, size1, size2,
    x0, x1, x2, x3, o0, o1, o2, o3, w0,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    column = tl.arange(0, WIDTH)  # (WIDTH,)
    inside = (row < count)[:, None] & (column < width)[None, :]
    source = x + row_offset(row, size1, size2, x0, x1, x2)[:, None] + column[None, :] * x3
    target = out + row_offset(row, size1, size2, o0, o1, o2)[:, None] + column[None, :] * o3
    scale = tl.load(weight + column * w0, mask=column < width, other=0.0).to(tl.float32)
    values = tl.load(source, mask=inside, other=0.0).to(tl.float32)  # (ROWS, WIDTH)
    normed = norm(values, scale, width, eps, x.dtype.element_ty)
    tl.store(target, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm(values, scale, width, eps, dtype: tl.constexpr):
    """Rows of fp32 values (zero where padded), normed, rounded to dtype, scaled in fp32."""
    mean = tl.sum(values * values, axis=1) / width
    normed = values * tl.rsqrt(mean + eps)[:, None]
    return normed.to(dtype).to(tl.float32) * scale[None, :]
