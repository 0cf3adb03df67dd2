"""linear_int4 in Triton: 4-bit codes, a scale and perhaps a zero for every group of columns (AWQ, GPTQ, Q4_0).

The ways to multiply are in `packed_linear`; the layout, (code - zero) * scale, is `int4` of `unpack`. A thread of a
product of vectors loads 16 bytes, 32 columns, and one scale. Groups of an odd number of columns, which no format has, are
left to the formula.

Bytes: N K / 2 for codes, N K / group for each of scales and zeros. FLOPs: 2 M N K: memory bound up to some hundred rows,
but at one row the fp32 units are busy too: a nibble takes about 4 instructions, and an H200 has time for 3.5.
"""

from __future__ import annotations

from torch import Tensor

from qwen_ref.quant import packed
from qwen_ref.quant.packed import Int4

from . import packed_linear
from .launch import supports

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = packed.linear_int4
TOLERANCE = 2.0
TOLERANCE_FP32 = 3.0  # sums in another order: twice is a matter of luck where they are of few numbers
TUNED = {**packed_linear.TUNED}


def run(x: Tensor, weight: Int4, bias: Tensor | None = None) -> Tensor:
    """x (..., K), any strides; weight (N, K); bias (N,) or None. Returns (..., N), contiguous."""
    return packed_linear.linear("linear_int4", TUNED, x, weight, bias)
