"""moe_code4 in Triton: stacks of experts, 4-bit codes into a table of 16 numbers, a scale for every group (NF4, MXFP4,
NVFP4).

The algorithm is in `packed_moe`, the layout is that of `linear_code4`. Bytes: H I / 2 bytes of codes a matrix, for
the experts chosen. FLOPs: 6 M k H I.
"""

from __future__ import annotations

from torch import Tensor

from qwen_ref.quant import packed
from qwen_ref.quant.packed import Code4

from . import packed_moe
from .launch import ANY, INSTINCT, supports

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = packed.moe_code4
TOLERANCE = 2.0
TOLERANCE_FP32 = 3.0  # sums in another order: twice is a matter of luck where they are of few numbers
# The 64 KiB of shared memory of an Instinct hold half the columns of gate and up.
TUNED = {**packed_moe.TUNED, (INSTINCT, (16, 16)): {**packed_moe.TUNED[ANY, (16, 16)], "BLOCK_K": 64}}


def run(x: Tensor, gate_up: Code4, down: Code4, weights: Tensor, experts: Tensor) -> Tensor:
    """x (M, H), any strides; gate_up E x (2I, H), down E x (H, I); weights, experts (M, k). Returns (M, H)."""
    return packed_moe.experts(ORACLE, TUNED, x, gate_up, down, weights, experts)
