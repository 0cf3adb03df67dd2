"""linear_gguf in Triton: rows of ggml blocks as in the file, Q4_K and Q6_K; other kinds are left to the formula.

The ways to multiply are in `packed_linear`; the layouts are `q4_k` and `q6_k` of `unpack`. A chunk is what shares a scale:
32 columns of Q4_K, 16 of Q6_K. The two halves of a byte belong to different chunks, so that each byte is loaded twice, the
second time from the L1 cache. Blocks of 144 bytes are aligned to 16; those of 210 bytes to 2, which is how they are loaded.

Bytes: N K 144 / 256, or 210 / 256. FLOPs: 2 M N K: memory bound up to some hundred rows.
"""

from __future__ import annotations

from torch import Tensor

from qwen_ref.quant import packed
from qwen_ref.quant.packed import Gguf

from . import packed_linear
from .launch import supports

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = packed.linear_gguf
TOLERANCE = 3.0  # fp32 sums in another order: twice is a matter of luck where they are of few numbers
# Half the columns in a step of many rows: with more, unpacking Q6_K leaves an A100 too few registers.
TUNED = {key: {**entry, "BLOCK_K": 64} if key[1][0] in (32, 64) else entry for key, entry in packed_linear.TUNED.items()}


def run(x: Tensor, weight: Gguf, bias: Tensor | None = None) -> Tensor:
    """x (..., K), any strides; weight (N, K); bias (N,) or None. Returns (..., N), contiguous."""
    return packed_linear.linear("linear_gguf", TUNED, x, weight, bias)
