"""linear_gguf in Triton: rows of ggml blocks, of every kind that stays as in the file: Q2_K to Q6_K, IQ1 to IQ4, Q4_1, Q5_1.

The ways to multiply are in `packed_linear`, the layouts in `unpack_ggml`. Blocks of 144 bytes (Q4_K) are aligned to 16, those
of 210 (Q6_K) to 2, which is how they are loaded.

Bytes: N K / 256 times a block's, 50 (IQ1_S) to 210 (Q6_K). FLOPs: 2 M N K: memory bound up to some hundred rows.
"""

from __future__ import annotations

from torch import Tensor

from qwen_ref.quant import packed
from qwen_ref.quant.packed import Gguf

from . import packed_linear
from .launch import supports

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = packed.linear_gguf
TOLERANCE = 2.0
TOLERANCE_FP32 = 3.0  # sums in another order: twice is a matter of luck where they are of few numbers
# Half the rows of the weight at once for one row of x, half the columns in a step for many: with more, unpacking Q6_K leaves
# an A100 too few registers.
TUNED = {key: {**entry, "BLOCK_K": 64} if key[1][0] in (32, 64) else entry for key, entry in packed_linear.TUNED.items()}
TUNED[packed_linear.ANY, (1, "wide")] = {"BLOCK_N": 4, "CHUNKS": 128}


def run(x: Tensor, weight: Gguf, bias: Tensor | None = None) -> Tensor:
    """x (..., K), any strides; weight (N, K); bias (N,) or None. Returns (..., N), contiguous."""
    return packed_linear.linear("linear_gguf", TUNED, x, weight, bias)
