"""swiglu in Triton: silu(gate) * up, one read of each and one write.

Algorithm: Shazeer 2020. silu is fp32 and rounded to the activation dtype before the product, as in `ops.swiglu`.
gate and up may be the two halves of one fused projection: strides are taken as they come.

Bytes: 3 M I elements. FLOPs: about 5 M I: memory bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref import ops

from .launch import ANY, on, require, row_offset, rows, same, supports, tuned

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.swiglu
TOLERANCE = 2.0
TUNED = {(ANY, "rows"): {"BLOCK": 1024, "num_warps": 4}}


def run(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (..., I), equal shapes, any strides. Returns (..., I)."""
    require("swiglu", gate, up)
    same("swiglu", gate, up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel() == 0:
        return out
    (size0, size1, size2), (gs, us, os) = rows(gate, up, out)
    width, launch = gate.shape[-1], tuned(TUNED, gate.device, "rows")
    with on(gate.device):
        _swiglu[(size0 * size1 * size2, triton.cdiv(width, launch["BLOCK"]))](
            gate, up, out, width, size1, size2,
            *gs, gate.stride(-1), *us, up.stride(-1), *os, out.stride(-1),
            **launch,
        )  # fmt: skip
    return out


@triton.jit
def _swiglu(
    gate, up, out, width, size1, size2,
    g0, g1, g2, g3, u0, u1, u2, u3, o0, o1, o2, o3,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row_offset(row, size1, size2, g0, g1, g2) + column * g3, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row_offset(row, size1, size2, u0, u1, u2) + column * u3, mask=inside, other=0.0).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(gate.dtype.element_ty)
    product = silu.to(tl.float32) * u
    tl.store(out + row_offset(row, size1, size2, o0, o1, o2) + column * o3, product.to(out.dtype.element_ty), mask=inside)
