"""Normalisation of vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import at_least_fp32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis: x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019).

    Args: x (..., H) any float dtype; weight (H,). Returns (..., H) in x's dtype.
    """
    wide = x.to(at_least_fp32(x.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)  # the official order: round to x's dtype first, then scale


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, centred: bool = False
) -> tuple[Tensor, Tensor]:
    """The residual sum and its norm, which a kernel can make in one pass: (x + residual, rms_norm(x + residual)).

    Args: x, residual (..., H); weight (H,). The sum is rounded to its dtype before it is normed. `centred`: the norm is
    `zero_centred_rms_norm`. Returns 2 x (..., H).
    """
    total = x + residual
    return total, (zero_centred_rms_norm if centred else rms_norm)(total, weight, eps)


def zero_centred_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm whose stored weight is the distance from one: x / sqrt(mean(x^2) + eps) * (1 + weight).

    Args: x (..., H); weight (H,), or (n, H) for x (..., n, H) with a weight of its own for each of n groups. Returns x's
    shape and dtype. Unlike `rms_norm`, everything is at least fp32 and rounded once, at the end: 1 + weight in bf16
    would lose the weight's last bits.
    """
    wide = x.to(at_least_fp32(x.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1 + weight.to(wide.dtype))).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str = "silu") -> Tensor:
    """rms_norm(x) * silu(gate), or * sigmoid(gate): the output norm of a Gated DeltaNet, over each head.

    Args: x, gate (..., D); weight (D,). Returns x's shape and dtype. `rms_norm` rounds as it does; the gate's activation
    and its product are at least fp32.
    """
    gate = gate.to(at_least_fp32(gate.dtype))
    gate = torch.sigmoid(gate) if activation == "sigmoid" else F.silu(gate)
    return (rms_norm(x, weight, eps) * gate).to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last axis, in x's dtype."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)
