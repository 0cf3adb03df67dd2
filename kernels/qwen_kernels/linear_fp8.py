"""linear_fp8 in Triton: float8_e4m3fn, a scale for every block of rows and columns, or every row, or the matrix.

The ways to multiply are in `packed_linear`; the layout, code * scale, is `fp8` of `unpack`. The codes are decoded from
their bits, so that a GPU without fp8 of its own (sm_80) runs the same kernels; x stays as it is.

Bytes: N K for codes; scales are few. FLOPs: 2 M N K: memory bound up to some hundred rows.
"""

from __future__ import annotations

from torch import Tensor

from qwen_ref.quant import packed
from qwen_ref.quant.packed import Fp8

from . import packed_linear
from .launch import supports

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = packed.linear_fp8
TOLERANCE = 2.0
TOLERANCE_FP32 = 3.0  # sums in another order: twice is a matter of luck where they are of few numbers
TUNED = {**packed_linear.TUNED}


def run(x: Tensor, weight: Fp8, bias: Tensor | None = None) -> Tensor:
    """x (..., K), any strides; weight (N, K); bias (N,) or None. Returns (..., N), contiguous."""
    return packed_linear.linear("linear_fp8", TUNED, x, weight, bias)
