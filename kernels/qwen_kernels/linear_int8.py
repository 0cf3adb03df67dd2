"""linear_int8 in Triton: 8-bit codes, a scale and perhaps a zero for every row or group (GPTQ, bitsandbytes, Q8_0).

The ways to multiply are in `packed_linear`; the layout, (code - zero) * scale, is `int8` of `unpack`. A thread of a
product of vectors loads 16 bytes, 16 columns, and one scale.

Bytes: N K for codes, N K / group for each of scales and zeros. FLOPs: 2 M N K: memory bound up to some hundred rows.
"""

from __future__ import annotations

from torch import Tensor

from qwen_ref.quant import packed
from qwen_ref.quant.packed import Int8

from . import packed_linear
from .launch import supports

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = packed.linear_int8
TOLERANCE = 2.0
TOLERANCE_FP32 = 3.0  # sums in another order: twice is a matter of luck where they are of few numbers
TUNED = {**packed_linear.TUNED}


def run(x: Tensor, weight: Int8, bias: Tensor | None = None) -> Tensor:
    """x (..., K), any strides; weight (N, K); bias (N,) or None. Returns (..., N), contiguous."""
    return packed_linear.linear("linear_int8", TUNED, x, weight, bias)
