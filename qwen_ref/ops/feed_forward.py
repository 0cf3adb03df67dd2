"""Matrix products, gates, and mixtures of experts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import at_least_fp32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: (..., K), (N, K), (N,) -> (..., N) in x's dtype, summed in at least fp32 and rounded once."""
    return F.linear(x, weight, bias)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020). Any equal shapes; silu rounds to the activation dtype before the product."""
    return F.silu(gate) * up


def take_columns(x: Tensor, order: Tensor) -> Tensor:
    """x[..., order]: the columns of a projection whose rows do not lie as what reads them wants them.

    Args: x (..., K); order (M,) int64, each 0 <= i < K. Returns (..., M) in x's dtype. A column that is not there is an
    IndexError or RuntimeError.
    """
    return x.index_select(-1, order)


def sigmoid_gate(x: Tensor, gate: Tensor, residual: Tensor | None = None) -> Tensor:
    """x * sigmoid(gate), + residual if there is one: the output gate of attention (Qiu et al. 2025, arXiv 2505.06708), and
    the gate of an expert that every token passes, beside what the chosen ones give.

    Args: x, residual (..., D); gate (..., D), or (..., 1) for one gate a row. Returns x's shape and dtype, to which the
    sigmoid, the product and the sum are rounded.
    """
    gated = x * torch.sigmoid(gate)
    return gated if residual is None else residual + gated


def router_topk(logits: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Choose k experts per token: softmax over all experts first, then the k largest, then (optionally) renormalise.

    Args: logits (M, E). Returns weights (M, k) in the logits' dtype, descending, and expert indices (M, k) int64.
    Probabilities and their normalisation are fp32 (fp64 for fp64 logits); one rounding at the end.
    """
    probabilities = F.softmax(logits, dim=-1, dtype=at_least_fp32(logits.dtype))
    weights, experts = probabilities.topk(k, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), experts


def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """sum over a token's chosen experts e of weight_e * down_e(swiglu(gate_e(x), up_e(x))).

    Args: x (M, H); gate_up (E, 2I, H), the gate's rows first; down (E, H, I); weights, experts (M, k).
    Returns (M, H) in x's dtype. Experts add up in ascending order into a buffer of x's dtype: the order and the
    rounding of transformers' `experts_implementation="eager"`.
    """
    out = torch.zeros_like(x)
    for e in experts.unique().tolist():
        token, slot = torch.where(experts == e)
        gate, up = F.linear(x[token], gate_up[e]).chunk(2, dim=-1)  # (m, I) each
        y = F.linear(swiglu(gate, up), down[e]) * weights[token, slot, None]  # (m, H)
        out = out.index_add(0, token, y.to(out.dtype))
    return out
