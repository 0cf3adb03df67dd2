"""linear_code4 in Triton: 4-bit codes into a table of 16 numbers, a scale for every group (NF4, MXFP4, NVFP4, IQ4_NL).

The ways to multiply are in `packed_linear`; the layout, table[code] * scale, is `code4` of `unpack`. The table is loaded
for every code, 64 bytes which stay in the L1 cache; what a scale can be, fp16, fp32, e4m3 or e8m0, is part of the kernel.

Bytes: N K / 2 for codes, N K / group for scales. FLOPs: 2 M N K: memory bound up to some hundred rows, but at one row
the L1 cache, with one number a thread and cycle, takes about as long as the memory of an H200.
"""

from __future__ import annotations

from torch import Tensor

from qwen_ref.quant import packed
from qwen_ref.quant.packed import Code4

from . import packed_linear
from .launch import supports

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = packed.linear_code4
TOLERANCE = 2.0
TOLERANCE_FP32 = 3.0  # sums in another order: twice is a matter of luck where they are of few numbers
# Half the columns in a step: the addresses of what is looked up take registers.
TUNED = {key: {**entry, "BLOCK_K": 64} if "PROGRAMS" in entry else entry for key, entry in packed_linear.TUNED.items()}


def run(x: Tensor, weight: Code4, bias: Tensor | None = None) -> Tensor:
    """x (..., K), any strides; weight (N, K); bias (N,) or None. Returns (..., N), contiguous."""
    return packed_linear.linear("linear_code4", TUNED, x, weight, bias)
