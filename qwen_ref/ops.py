"""Every formula of the models as a pure function of tensors.

These are the reference: any dtype, any device, no state, no in-place work on an argument. Each rounds where the
official model rounds, and the comment beside the cast says so. Faster implementations are registered in
`backend` under the same name and are checked against these.

Letters: B batch, T query tokens, S key tokens, H hidden, N query heads, K kv heads, D head dim, I intermediate,
M tokens flattened (B*T), E experts, k experts per token.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis: x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019).

    Args: x (..., H) any float dtype; weight (H,). Returns (..., H) in x's dtype.
    """
    wide = x.to(_at_least_fp32(x.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)  # the official order: round to x's dtype first, then scale


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual sum and its norm, which a kernel can make in one pass: (x + residual, rms_norm(x + residual)).

    Args: x, residual (..., H); weight (H,). The sum is rounded to its dtype before it is normed. Returns 2 x (..., H).
    """
    total = x + residual
    return total, rms_norm(total, weight, eps)


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """Rotary angular frequencies theta^(-2j/D), j < D/2, radians per position (Su et al. 2021). (D/2,) fp32."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim)


def yarn_frequencies(
    head_dim: int,
    theta: float,
    factor: float,
    original_context: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """YaRN's frequencies (Peng et al. 2023, section 3.2, "NTK by parts"). (D/2,) fp32.

    Frequencies that turn more than `beta_fast` times within the original context stay as they are, those that turn
    less than `beta_slow` times are divided by `factor` (position interpolation), a linear ramp joins the two.
    """

    def index_of(turns: float) -> float:  # the j whose frequency makes this many turns in the original context
        return head_dim * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index_of(beta_fast), index_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the official guard against a ramp of zero width
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    # The interpolated frequency is 1/(factor * theta^..), not (1/theta^..)/factor: one fp32 rounding differs.
    period = theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    return (1.0 / (factor * period)) * ramp + (1.0 / period) * (1 - ramp)


def rope_tables(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, each frequency twice: (B, T, D) in `dtype`.

    `positions` (B, T) integers, `frequencies` (D/2,) fp32. Angles and the attention `scale` of YaRN are fp32;
    the tables are rounded to the activation dtype, where the rotation itself then runs.
    """
    angles = positions[..., None].float() * frequencies  # (B, T, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, T, D)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_j, x_{j+D/2}) of every head by the position's angles ("half-split" convention).

    x (B, N, T, D); cos, sin (B, T, D). Returns (B, N, T, D). Runs in x's dtype, as the official model does.
    """
    cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, D)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def visible(query_positions: Tensor, key_positions: Tensor, window: int | None = None) -> Tensor:
    """Which keys each query may attend to: the causal mask, the sliding window and the padding, from positions alone.

    Key j is visible to query i iff 0 <= pos_j <= pos_i, and pos_i - window < pos_j under a sliding window. A negative
    position marks padding. A padding query has nothing to see and nobody reads it; it may see everything, so that its
    softmax stays finite.

    Args: (B, T) and (B, S) integers. Returns (B, 1, T, S) bool, True = visible.
    """
    q, k = query_positions[:, :, None], key_positions[:, None, :]  # (B, T, 1), (B, 1, S)
    seen = (k >= 0) & (k <= q)
    if window is not None:
        seen &= k > q - window
    return (seen | (q < 0))[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with grouped kv heads: query head n reads kv head n // (N/K).

    Args:
        q: (B, N, T, D); k, v: (B, K, S, D) with K dividing N.
        mask: (B or 1, 1, T, S) bool, True = visible; None = causal, the queries being the last T of the S positions.
    Returns: (B, N, T, D) in q's dtype.
    """
    probabilities = attention_pattern(q, k, mask)  # (B, N, T, S)
    return probabilities @ repeat_kv(v, q.shape[1])


def attention_pattern(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """The attention probabilities of `attention`: (B, N, T, S), rows sum to one, in q's dtype."""
    return attention_softmax(attention_scores(q, k, mask))


def attention_scores(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """q k^T / sqrt(D), hidden keys at the dtype's lowest number: (B, N, T, S) in q's dtype."""
    if mask is None:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    scores = (q @ repeat_kv(k, q.shape[1]).transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


def attention_softmax(scores: Tensor) -> Tensor:
    """Softmax over the keys, at least in fp32, rounded to the scores' dtype."""
    return F.softmax(scores, dim=-1, dtype=_at_least_fp32(scores.dtype)).to(scores.dtype)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(1, 1, T, S) bool: query i of the last T positions sees keys up to S - T + i."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """(B, K, S, D) -> (B, N, S, D): every kv head serves N/K consecutive query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020). Any equal shapes; silu rounds to the activation dtype before the product."""
    return F.silu(gate) * up


def router_topk(logits: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Choose k experts per token: softmax over all experts first, then the k largest, then (optionally) renormalise.

    Args: logits (M, E). Returns weights (M, k) in the logits' dtype, descending, and expert indices (M, k) int64.
    Probabilities and their normalisation are fp32 (fp64 for fp64 logits); one rounding at the end.
    """
    probabilities = F.softmax(logits, dim=-1, dtype=_at_least_fp32(logits.dtype))
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


def last_token(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The hidden state of each sequence's last token, right padding dropped: (B, T, H), (B,) -> (B, H)."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), lengths - 1]


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    # fp64 runs are the oracle of the half-precision ones and must not be rounded to fp32 on the way.
    return torch.promote_types(dtype, torch.float32)
