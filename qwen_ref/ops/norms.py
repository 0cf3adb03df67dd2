"""Normalisation of vectors."""

import torch
from torch import Tensor

from .dtypes import at_least_fp32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis: x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019).

    Args: x (..., H) any float dtype; weight (H,). Returns (..., H) in x's dtype.
    """
    wide = x.to(at_least_fp32(x.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)  # the official order: round to x's dtype first, then scale


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual sum and its norm, which a kernel can make in one pass: (x + residual, rms_norm(x + residual)).

    Args: x, residual (..., H); weight (H,). The sum is rounded to its dtype before it is normed. Returns 2 x (..., H).
    """
    total = x + residual
    return total, rms_norm(total, weight, eps)
