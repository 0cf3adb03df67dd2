"""zero_centred_rms_norm in Triton: `rms_norm` with 1 + weight, in fp32 throughout and rounded once.

Algorithm: Zhang & Sennrich 2019; each program holds a few whole rows in registers. Rows of n groups take turns at the n
rows of a weight (n, H).

Bytes: 2 M H elements, and n H for the weight. FLOPs: about 5 M H, so it is memory bound everywhere.
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

ORACLE = ops.zero_centred_rms_norm
TOLERANCE = 2.0
# (device, width rounded up to a power of two, at least 128) -> rows per program and warps
TUNED = {
    (ANY, width): {"ROWS": max(1, 1024 // width), "num_warps": min(16, max(4, width // 512))}
    for width in (2**i for i in range(7, 15))
}


def run(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., H), any strides; weight (H,), or (n, H) for x (..., n, H). Returns x's shape and dtype."""
    require("zero_centred_rms_norm", x, weight)
    width = x.shape[-1]
    if weight.shape not in ((width,), x.shape[-2:]) or width > 16384:
        raise RequestError(
            f"the triton zero_centred_rms_norm needs rows of at most 16384 numbers and a weight of one row, or of one for each "
            f"group; got x {tuple(x.shape)} and a weight {tuple(weight.shape)}"
        )
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    groups, w0 = (weight.shape[0], weight.stride(0)) if weight.ndim == 2 else (1, 0)
    (size0, size1, size2), (xs, os) = rows(x, out)
    count, block = size0 * size1 * size2, max(128, triton.next_power_of_2(width))
    launch = tuned(TUNED, x.device, block)
    with on(x.device):
        _zero_centred_rms_norm[(triton.cdiv(count, launch["ROWS"]),)](
            x, weight, out, eps, count, width, size1, size2, groups,
            *xs, x.stride(-1), *os, out.stride(-1), w0, weight.stride(-1),
            WIDTH=block, **launch,
        )  # fmt: skip
    return out


@triton.jit
def _zero_centred_rms_norm(
    x, weight, out, eps, count, width, size1, size2, groups,
    x0, x1, x2, x3, o0, o1, o2, o3, w0, w1,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    column = tl.arange(0, WIDTH)  # (WIDTH,)
    inside = (row < count)[:, None] & (column < width)[None, :]
    source = x + row_offset(row, size1, size2, x0, x1, x2)[:, None] + column[None, :] * x3
    target = out + row_offset(row, size1, size2, o0, o1, o2)[:, None] + column[None, :] * o3
    scale = tl.load(weight + (row % groups)[:, None] * w0 + column[None, :] * w1, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(source, mask=inside, other=0.0).to(tl.float32)  # (ROWS, WIDTH)
    tl.store(target, centred_norm(values, scale, width, eps).to(out.dtype.element_ty), mask=inside)


@triton.jit
def centred_norm(values, weight, width, eps):
    """Rows of fp32 values (zero where padded), normed and scaled by 1 + weight."""
    mean = tl.sum(values * values, axis=1) / width
    return values * tl.rsqrt(mean + eps)[:, None] * (1.0 + weight)
