"""sigmoid_gate in Triton: x * sigmoid(gate), and a residual sum with it, in one pass.

Algorithm: Qiu et al. 2025 (arXiv 2505.06708). The sigmoid, the product and the sum are each rounded, as in
`ops.sigmoid_gate`. The gate may lie between the queries of one projection, or be one number a row: strides are taken as
they come.

Bytes: 3 M D elements, 4 with a residual (one D less where the gate is one number a row). FLOPs: about 5 M D:
memory bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref import ops
from qwen_ref.errors import RequestError

from .launch import ANY, on, require, row_offset, rows, same, supports, tuned

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.sigmoid_gate
TOLERANCE = 2.0
TUNED = {(ANY, "rows"): {"BLOCK": 1024, "num_warps": 4}}


def run(x: Tensor, gate: Tensor, residual: Tensor | None = None) -> Tensor:
    """x, residual (..., D), gate (..., D) or (..., 1), any strides. Returns (..., D)."""
    added = x if residual is None else residual  # x itself is then never read as one
    require("sigmoid_gate", x, gate, added)
    same("sigmoid_gate", x, added)
    if gate.shape not in (x.shape, (*x.shape[:-1], 1)) or gate.dtype != x.dtype:
        raise RequestError(
            f"the triton sigmoid_gate needs a gate of x's shape, or of one number a row, and of its dtype; got x "
            f"{tuple(x.shape)} in {x.dtype} and a gate {tuple(gate.shape)} in {gate.dtype}"
        )
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    gate = gate.expand(x.shape)
    (size0, size1, size2), (xs, gs, rs, os) = rows(x, gate, added, out)
    width, launch = x.shape[-1], tuned(TUNED, x.device, "rows")
    with on(x.device):
        _sigmoid_gate[(size0 * size1 * size2, triton.cdiv(width, launch["BLOCK"]))](
            x, gate, added, out, width, size1, size2,
            *xs, x.stride(-1), *gs, gate.stride(-1), *rs, added.stride(-1), *os, out.stride(-1),
            ADD=residual is not None, **launch,
        )  # fmt: skip
    return out


@triton.jit
def _sigmoid_gate(
    x, gate, residual, out, width, size1, size2,
    x0, x1, x2, x3, g0, g1, g2, g3, r0, r1, r2, r3, o0, o1, o2, o3,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row_offset(row, size1, size2, x0, x1, x2) + column * x3, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row_offset(row, size1, size2, g0, g1, g2) + column * g3, mask=inside, other=0.0).to(tl.float32)
    values = (values * tl.sigmoid(g).to(dtype).to(tl.float32)).to(dtype)
    if ADD:
        other = tl.load(residual + row_offset(row, size1, size2, r0, r1, r2) + column * r3, mask=inside, other=0.0)
        values = (values.to(tl.float32) + other.to(tl.float32)).to(dtype)
    tl.store(out + row_offset(row, size1, size2, o0, o1, o2) + column * o3, values, mask=inside)
