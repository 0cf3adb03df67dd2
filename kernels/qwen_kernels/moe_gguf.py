"""moe_gguf in Triton: stacks of experts, rows of ggml blocks as in the file.

The algorithm is in `packed_moe`, the layouts are those of `linear_gguf`. Bytes: H I / 256 times a block's a matrix, for the
experts chosen. FLOPs: 6 M k H I.
"""

from __future__ import annotations

from torch import Tensor

from qwen_ref.quant import packed
from qwen_ref.quant.packed import Gguf

from . import packed_moe
from .launch import ANY, supports

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = packed.moe_gguf
TOLERANCE = 2.0
TOLERANCE_FP32 = 3.0  # sums in another order: twice is a matter of luck where they are of few numbers
# In fp32 half the columns at once for 64 rows: with 64, 16 bytes spill on an A100.
TUNED = {**packed_moe.TUNED, (ANY, (64, 32)): {**packed_moe.TUNED[ANY, (64, 32)], "BLOCK_N": 32}}


def run(x: Tensor, gate_up: Gguf, down: Gguf, weights: Tensor, experts: Tensor) -> Tensor:
    """x (M, H), any strides; gate_up E x (2I, H), down E x (H, I); weights, experts (M, k). Returns (M, H)."""
    return packed_moe.experts(ORACLE, TUNED, x, gate_up, down, weights, experts)
