"""gated_rms_norm in Triton: the norm and the gate's activation in one pass over both.

Algorithm: `rms_norm` of rows held in registers (Zhang & Sennrich 2019), rounded as it rounds, times silu or sigmoid of the
gate in fp32, rounded once more.

Bytes: 3 M D elements. FLOPs: about 8 M D, so it is memory bound everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref import ops
from qwen_ref.errors import RequestError

from .launch import ANY, on, require, row_offset, rows, supports, tuned
from .rms_norm import check_width, norm

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.gated_rms_norm
TOLERANCE = 2.0
# (device, width rounded up to a power of two, at least 128) -> rows per program and warps. 128 is a head: many short rows.
TUNED = {
    (ANY, width): {"ROWS": max(1, 1024 // width), "num_warps": min(16, max(4, width // 512))}
    for width in (2**i for i in range(7, 15))
}


def run(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str = "silu") -> Tensor:
    """x, gate (..., D), any strides; weight (D,); activation "silu" or "sigmoid". Returns x's shape and dtype."""
    require("gated_rms_norm", x, gate, weight)
    width = check_width("gated_rms_norm", x, weight)
    if gate.shape != x.shape or activation not in ("silu", "sigmoid"):
        raise RequestError(
            f"the triton gated_rms_norm needs a gate of x's shape and silu or sigmoid, got {tuple(gate.shape)} for "
            f"{tuple(x.shape)} and {activation!r}"
        )
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    (size0, size1, size2), (xs, gs, os) = rows(x, gate, out)
    count, block = size0 * size1 * size2, max(128, triton.next_power_of_2(width))
    launch = tuned(TUNED, x.device, block)
    with on(x.device):
        _gated_rms_norm[(triton.cdiv(count, launch["ROWS"]),)](
            x, gate, weight, out, eps, count, width, size1, size2,
            *xs, x.stride(-1), *gs, gate.stride(-1), *os, out.stride(-1), weight.stride(0),
            WIDTH=block, SIGMOID=activation == "sigmoid", **launch,
        )  # fmt: skip
    return out


@triton.jit
def _gated_rms_norm(
    x, gate, weight, out, eps, count, width, size1, size2,
    x0, x1, x2, x3, g0, g1, g2, g3, o0, o1, o2, o3, w0,
    WIDTH: tl.constexpr, SIGMOID: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    column = tl.arange(0, WIDTH)  # (WIDTH,)
    inside = (row < count)[:, None] & (column < width)[None, :]
    source = x + row_offset(row, size1, size2, x0, x1, x2)[:, None] + column[None, :] * x3
    gates = gate + row_offset(row, size1, size2, g0, g1, g2)[:, None] + column[None, :] * g3
    target = out + row_offset(row, size1, size2, o0, o1, o2)[:, None] + column[None, :] * o3
    scale = tl.load(weight + column * w0, mask=column < width, other=0.0)
    values = tl.load(source, mask=inside, other=0.0).to(tl.float32)  # (ROWS, WIDTH)
    opening = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    normed = gated_norm(values, opening, scale, width, eps, SIGMOID, x.dtype.element_ty)
    tl.store(target, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_norm(values, gate, weight, width, eps, SIGMOID: tl.constexpr, dtype: tl.constexpr):
    """Rows of fp32 values (zero where padded), normed, scaled, rounded where `rms_norm` rounds, times the activated gate."""
    normed = norm(values, weight.to(tl.float32), width, eps, dtype)
    if weight.dtype == dtype:  # otherwise the product is in fp32, the dtype of both
        normed = normed.to(dtype).to(tl.float32)
    activated = tl.sigmoid(gate)
    if not SIGMOID:
        activated *= gate
    return normed * activated
