"""Every formula of the models as a pure function of tensors.

These are the reference: any dtype, any device, no state, no in-place work on an argument. Each rounds where the
official model rounds, and the comment beside the cast says so. Faster implementations are registered in
`backend` under the same name and are checked against these.

Letters: B batch, T query tokens, S key tokens, H hidden, N query heads, K kv heads, D head dim, I intermediate,
M tokens flattened (B*T), E experts, k experts per token, V vocabulary.
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: (..., K), (N, K), (N,) -> (..., N) in x's dtype, summed in at least fp32 and rounded once."""
    return F.linear(x, weight, bias)


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


def norm_rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """All that stands between the projections and the attention: norm q and k per head, rotate them, store k and v.

    The only operation that writes to an argument: the caches are where its results belong.

    Args:
        q (M, N, D); k, v (M, K, D): the projections' rows. q_weight, k_weight (D,): `rms_norm` of every head; None
            where the generation has none.
        cos, sin (M, D): `rope_tables` of each token's position.
        k_cache, v_cache (P, K, S, D): P sequences of S tokens, or P pages of S tokens of a paged cache.
        slots (M,) int64: token m is stored as entry slots[m] % S of cache row slots[m] // S; negative = not at all.
    Returns the rotated q, (M, N, D).
    """
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps)
    if k_weight is not None:
        k = rms_norm(k, k_weight, eps)
    q, k = (rope(x[:, :, None], cos[:, None], sin[:, None])[:, :, 0] for x in (q, k))  # every token a batch of one
    kept = torch.where(slots >= 0)[0]
    row, entry = slots[kept] // k_cache.shape[2], slots[kept] % k_cache.shape[2]
    k_cache[row, :, entry] = k[kept]
    v_cache[row, :, entry] = v[kept]
    return q


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


def attention_prefill(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, window: int | None = None
) -> Tensor:
    """Causal attention of sequences of different lengths packed one after the other, without padding.

    Args:
        q (M, N, D): the queries of all sequences. k, v (L, K, D): their keys and values.
        q_starts, k_starts (B + 1,) int32: sequence b has the queries q_starts[b]:q_starts[b + 1], and likewise the
            keys. Its queries are the last of its keys' positions, so that a chunk of a prompt can follow cached keys.
        window: a query sees itself and the window - 1 keys before it; None = all.
    Returns (M, N, D) in q's dtype.
    """
    out = torch.empty_like(q)
    for b in range(q_starts.numel() - 1):
        queries, keys = slice(*q_starts[b : b + 2].tolist()), slice(*k_starts[b : b + 2].tolist())
        count, held = queries.stop - queries.start, keys.stop - keys.start
        positions = torch.arange(held, device=q.device)[None]
        mask = visible(positions[:, held - count :], positions, window)
        qb, kb, vb = (x.transpose(0, 1)[None] for x in (q[queries], k[keys], v[keys]))  # (1, N or K, T or S, D)
        out[queries] = attention(qb, kb, vb, mask)[0].transpose(0, 1)
    return out


def attention_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int | None = None) -> Tensor:
    """Attention of one new token per sequence over a cache whose rows are filled to different lengths.

    Args:
        q (B, N, D). k, v (B, K, S, D): room for S tokens. lengths (B,) int32: tokens held, the new one (the query's
            own) last; what lies behind them is not read. A sequence of length 0 gives zeros.
        window: only the last `window` tokens are seen; None = all.
    Returns (B, N, D) in q's dtype.
    """
    place = torch.arange(k.shape[2], device=q.device)
    seen = place < lengths[:, None]  # (B, S)
    if window is not None:
        seen &= place >= lengths[:, None] - window
    # What is not seen may be anything, NaN too, and 0 * NaN is NaN.
    k, v = (x.masked_fill(~seen[:, None, :, None], 0) for x in (k, v))
    out = attention(q[:, :, None], k, v, seen[:, None, None])[:, :, 0]  # (B, N, D)
    return out.masked_fill((lengths == 0)[:, None, None], 0)


def attention_paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, window: int | None = None
) -> Tensor:
    """`attention_decode` over a cache in pages: tokens i*S .. i*S + S - 1 of sequence b lie in page table[b, i].

    Args: q (B, N, D); k_pages, v_pages (P, K, S, D), S tokens a page; table (B, L) int32, read up to ceil(length / S);
    lengths (B,) int32 up to L S. Returns (B, N, D) in q's dtype.
    """
    used = torch.arange(table.shape[1], device=table.device) * k_pages.shape[2] < lengths[:, None]
    table = table.masked_fill(~used, 0).long()
    k, v = (x[table].transpose(1, 2).flatten(2, 3) for x in (k_pages, v_pages))  # (B, K, L * S, D)
    return attention_decode(q, k, v, lengths, window)


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


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """The next token of every sequence, from one uniform number each: temperature, then top-k, then top-p.

    Of the probabilities softmax(logits / temperature), the top_k largest stay; of these, the smallest set whose share of
    what stayed is at least top_p (Holtzman et al. 2020). Tokens as likely as the least likely one that stays also
    stay. The choice is the first token, in the order of the vocabulary, at which the running sum of what is left passes
    uniform * its total.

    Args:
        logits (B, V), -inf for tokens that must not come. temperature, top_p, uniform (B,) fp32: temperature 0 = the
        most likely token, the first of equals; top_p in (0, 1]; uniform in [0, 1). top_k (B,) int32, 0 = all.
    Returns (B,) int64.
    """
    greedy = temperature == 0
    wide = logits.to(_at_least_fp32(logits.dtype)) / temperature.masked_fill(greedy, 1)[:, None]
    ordered = wide.softmax(-1).sort(-1, descending=True).values  # (B, V)
    rank = torch.arange(logits.shape[1], device=logits.device)
    ordered = ordered.masked_fill((top_k[:, None] > 0) & (rank >= top_k[:, None]), 0)
    before = ordered.cumsum(-1) - ordered  # the probability of everything more likely
    kept = (before < top_p[:, None] * ordered.sum(-1, keepdim=True)) & (ordered > 0)
    least = ordered.masked_fill(~kept, math.inf).amin(-1, keepdim=True)
    p = wide.softmax(-1)
    p = p.masked_fill(p < least, 0)
    total = p.cumsum(-1)  # (B, V)
    passed = (total > uniform[:, None] * total[:, -1:]) & (p > 0)
    return torch.where(greedy, wide.argmax(-1), passed.int().argmax(-1))  # argmax of equals: the first


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of every row: (M, V), (M,) int64 -> (M,), at least fp32.

    A negative target has nothing to predict: 0.
    """
    wide = logits.to(_at_least_fp32(logits.dtype))
    chosen = wide.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return (wide.logsumexp(-1) - chosen).masked_fill(targets < 0, 0)


def last_token(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The hidden state of each sequence's last token, right padding dropped: (B, T, H), (B,) -> (B, H)."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), lengths - 1]


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    # fp64 runs are the oracle of the half-precision ones and must not be rounded to fp32 on the way.
    return torch.promote_types(dtype, torch.float32)
