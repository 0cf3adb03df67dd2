"""moe_int4 in Triton: stacks of experts, 4-bit codes, a scale and perhaps a zero for every group of columns (AWQ, GPTQ,
Q4_0).

The algorithm is in `packed_moe`, the layout is that of `linear_int4`. Bytes: H I / 2 bytes of codes a matrix, for the
experts chosen. FLOPs: 6 M k H I.
"""

from __future__ import annotations

from torch import Tensor

from qwen_ref.quant import packed
from qwen_ref.quant.packed import Int4

from . import packed_moe
from .launch import ANY, supports

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = packed.moe_int4
TOLERANCE = 2.0
TOLERANCE_FP32 = 3.0  # sums in another order: twice is a matter of luck where they are of few numbers
TUNED = {**packed_moe.TUNED, (ANY, ("down", 16)): {"ROWS": 4, "CHUNKS": 32}}  # eight rows spill on an A100


def run(x: Tensor, gate_up: Int4, down: Int4, weights: Tensor, experts: Tensor) -> Tensor:
    """x (M, H), any strides; gate_up E x (2I, H), down E x (H, I); weights, experts (M, k). Returns (M, H)."""
    return packed_moe.experts(ORACLE, TUNED, x, gate_up, down, weights, experts)
