"""take_columns in Triton: the columns of a projection in another order.

Algorithm: a gather along the last axis, as in `ops.take_columns`; a program takes one row's columns in the order of the
result, so that it is written in whole lines. Indices are trusted, as the formula's are on a GPU: 0 <= order < K.

Bytes: 2 M N elements, and 8 N of the order. FLOPs: none.
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

ORACLE = ops.take_columns
TOLERANCE = 2.0
TUNED = {(ANY, "rows"): {"BLOCK": 1024, "num_warps": 4}}


def run(x: Tensor, order: Tensor) -> Tensor:
    """x (..., K), any strides, order (N,) int64. Returns (..., N)."""
    require("take_columns", x)
    if order.dim() != 1 or order.dtype != torch.int64 or order.device != x.device:
        raise RequestError(f"the triton take_columns needs an order (N,) of int64 on {x.device}; got {tuple(order.shape)} of "
                           f"{order.dtype} on {order.device}")
    count = order.numel()
    out = torch.empty(*x.shape[:-1], count, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    flat, launch = x.reshape(-1, x.shape[-1]), tuned(TUNED, x.device, "rows")
    with on(x.device):
        _take_columns[(flat.shape[0], triton.cdiv(count, launch["BLOCK"]))](
            flat, order.contiguous(), out, count, *flat.stride(), **launch)  # fmt: skip
    return out


@triton.jit
def _take_columns(x, order, out, count, x0, x1, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < count
    taken = tl.load(order + column, mask=inside, other=0)
    tl.store(out + row * count + column, tl.load(x + row * x0 + taken * x1, mask=inside, other=0.0), mask=inside)
