"""add_rms_norm in Triton: the residual sum and its norm in one pass, so that the sum is not read back.

Algorithm: `rms_norm`, or `zero_centred_rms_norm`, with the addition in front. The sum is rounded to its dtype before it is
squared, as in `ops.add_rms_norm`, so both outputs are those of the two separate operations.

Bytes: 4 M H elements (two reads, two writes) against 5 M H unfused. FLOPs: about 5 M H: memory bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref import ops

from .launch import ANY, on, require, row_offset, rows, same, supports, tuned
from .rms_norm import check_width, norm
from .zero_centred_rms_norm import centred_norm

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.add_rms_norm
TOLERANCE = 2.0
# (device, width rounded up to a power of two, at least 128) -> rows per program and warps
TUNED = {
    (ANY, width): {"ROWS": max(1, 1024 // width), "num_warps": min(16, max(4, width // 512))}
    for width in (2**i for i in range(7, 15))
}


def run(x: Tensor, residual: Tensor, weight: Tensor, eps: float, centred: bool = False) -> tuple[Tensor, Tensor]:
    """x, residual (..., H), any strides; weight (H,). Returns (x + residual, its norm), 2 x (..., H)."""
    require("add_rms_norm", x, residual, weight)
    same("add_rms_norm", x, residual)
    width = check_width("add_rms_norm", x, weight)
    total = torch.empty_like(x)
    out = torch.empty_like(x, dtype=x.dtype if centred else torch.promote_types(x.dtype, weight.dtype))
    if x.numel() == 0:
        return total, out
    (size0, size1, size2), (xs, rs, ts, os) = rows(x, residual, total, out)
    count, block = size0 * size1 * size2, max(128, triton.next_power_of_2(width))
    launch = tuned(TUNED, x.device, block)
    with on(x.device):
        _add_rms_norm[(triton.cdiv(count, launch["ROWS"]),)](
            x, residual, weight, total, out, eps, count, width, size1, size2,
            *xs, x.stride(-1), *rs, residual.stride(-1), *ts, total.stride(-1), *os, out.stride(-1), weight.stride(0),
            WIDTH=block, CENTRED=centred, **launch,
        )  # fmt: skip
    return total, out


@triton.jit
def _add_rms_norm(
    x, residual, weight, total, out, eps, count, width, size1, size2,
    x0, x1, x2, x3, r0, r1, r2, r3, t0, t1, t2, t3, o0, o1, o2, o3, w0,
    WIDTH: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    column = tl.arange(0, WIDTH)  # (WIDTH,)
    inside = (row < count)[:, None] & (column < width)[None, :]
    first = x + row_offset(row, size1, size2, x0, x1, x2)[:, None] + column[None, :] * x3
    second = residual + row_offset(row, size1, size2, r0, r1, r2)[:, None] + column[None, :] * r3
    sums = total + row_offset(row, size1, size2, t0, t1, t2)[:, None] + column[None, :] * t3
    target = out + row_offset(row, size1, size2, o0, o1, o2)[:, None] + column[None, :] * o3
    scale = tl.load(weight + column * w0, mask=column < width, other=0.0).to(tl.float32)
    values = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(second, mask=inside, other=0.0).to(tl.float32)
    rounded = values.to(x.dtype.element_ty)  # the sum as the next layer will read it
    tl.store(sums, rounded, mask=inside)
    if CENTRED:
        normed = centred_norm(rounded.to(tl.float32), scale[None, :], width, eps)
    else:
        normed = norm(rounded.to(tl.float32), scale, width, eps, x.dtype.element_ty)
    tl.store(target, normed.to(out.dtype.element_ty), mask=inside)
