"""Dual chunk attention: positions that never exceed what the model was trained on, over contexts of any length.

An, Huang, Zhang, Gong, Qiu, Zhou and Kong 2024, "Training-Free Long-Context Scaling of Large Language Models"
(arXiv 2402.17463), with the length scaling of the Qwen2.5-1M Technical Report (arXiv 2501.15383).

The sequence is cut into chunks of `span` = chunk - local tokens. A key is rotated at its place inside its chunk, once and
for all. A query is rotated three times, and which of the three meets a key depends on the chunks of the two:

    own chunk         at its own place: distances are the true ones
    the chunk before  one span further on, but at most at `chunk`: true as far as `local` tokens back, then too short
    any before that   at min(2 span - 1, chunk), wherever the query is

One softmax runs over all keys. Up to `span` tokens there is one chunk, and this is plain attention.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .attention import attention_softmax, repeat_kv, visible
from .dtypes import at_least_fp32


def dual_chunk_positions(positions: Tensor, chunk: int, local: int) -> Tensor:
    """Where queries at these positions are rotated for keys of their own chunk, of the one before, and of earlier ones.

    (B, T) integers -> (B, 3, T). Keys are rotated at the first of the three.
    """
    span = chunk - local
    own = positions % span
    return torch.stack((own, (own + span).clamp_max(chunk), torch.full_like(own, min(2 * span - 1, chunk))), dim=1)


def length_scale(lengths: Tensor, trained: int) -> Tensor:
    """max(1, 0.1 ln(length / trained) + 1): what keys and softmax scale are both multiplied by, so that scores carry its
    square. (B,) integers -> (B,) fp32; `trained` 0 = no scaling. The factor of YaRN (Peng et al. 2023, equation 22)."""
    if not trained:
        return torch.ones_like(lengths, dtype=torch.float32)
    return (0.1 * torch.log(lengths.clamp_min(1) / trained) + 1).clamp_min(1).float()


def dual_chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, k_positions: Tensor, span: int, scale: Tensor
) -> Tensor:
    """Attention whose rotated query depends on how many chunks before it a key is.

    Args:
        q: (B, N, 3, T, D), every query rotated for its own chunk, the one before, and earlier ones: `dual_chunk_positions`.
        k, v: (B, K, S, D) with K dividing N; keys rotated at their place inside their chunk, not scaled.
        q_positions (B or 1, T), k_positions (B or 1, S): integers, -1 = padding, which is not seen.
        span: tokens of a chunk.
        scale: (B or 1,) fp32, `length_scale`.
    Returns: (B, N, T, D) in q's dtype.
    """
    scores = dual_chunk_scores(q, k, q_positions, k_positions, span, scale)
    return attention_softmax(scores) @ repeat_kv(v, q.shape[1])


def dual_chunk_scores(
    q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, span: int, scale: Tensor
) -> Tensor:
    """The scores of `dual_chunk_attention`, hidden keys at the dtype's lowest number: (B, N, T, S) in q's dtype.

    Keys are multiplied by the scale and rounded, as engines keep them; the softmax scale takes the other factor.
    """
    k = repeat_kv(_scaled(k, scale), q.shape[1])  # (B, N, S, D)
    products = q @ k[:, :, None].transpose(-1, -2)  # (B, N, 3, T, S)
    kind = _chunks_apart(q_positions, k_positions, span)[:, None, None].expand(q.shape[0], q.shape[1], 1, -1, -1)
    scores = products.gather(2, kind)[:, :, 0]  # (B, N, T, S)
    scores = (scores * _softmax_scale(scale, q)).to(q.dtype)
    return scores.masked_fill(~visible(q_positions, k_positions), torch.finfo(scores.dtype).min)


def dual_chunk_blocked(
    q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, k_positions: Tensor, span: int, scale: Tensor, tile: int = 1 << 18
) -> Tensor:
    """`dual_chunk_attention` without the T x S scores: tiles of at most `tile` of them per head, merged by log-sum-exp.

    Of a tile only those of the three products are taken that some pair in it needs; where all keys are later than all
    queries there is none. Scores, softmax and sums are at least fp32.
    """
    batch, heads, _, count, dim = q.shape
    kv_heads, group, wide = k.shape[1], heads // k.shape[1], at_least_fp32(q.dtype)
    # A processor without units for half precision multiplies fp32 some twenty times as fast.
    product = wide if q.device.type == "cpu" else q.dtype
    rows = max(1, min(count, math.isqrt(tile)))
    key_tiles = list(_tiles(k_positions, max(1, min(tile // rows, span))))
    out = torch.empty(batch, kv_heads, group, count, dim, dtype=q.dtype, device=q.device)
    for some, lowest, highest in _tiles(q_positions, rows):
        # The heads that share keys are rows of one product: (B, 3, K, N/K * t, D).
        queries = q[:, :, :, some].unflatten(1, (kv_heads, group)).permute(0, 3, 1, 2, 4, 5).flatten(3, 4).to(product)
        peak = torch.full((batch, kv_heads, queries.shape[3]), torch.finfo(wide).min, dtype=wide, device=q.device)
        total, mixed = torch.zeros_like(peak), torch.zeros(*peak.shape, dim, dtype=wide, device=q.device)
        for held, first, last in key_tiles:
            if first > highest:
                continue
            keys = _scaled(k[:, :, held], scale).to(product).transpose(-1, -2)  # (B, K, D, s)
            kinds = (min(max(n, 0), 2) for n in (lowest // span - last // span, highest // span - first // span))
            scores = _tile_scores(queries, keys, q_positions[:, some], k_positions[:, held], span, *kinds)
            scores = scores.to(wide) * _softmax_scale(scale, q)  # (B, K, N/K * t, s)
            higher = peak.maximum(scores.amax(-1))
            weights, kept = (scores - higher[..., None]).exp(), (peak - higher).exp()
            total = total * kept + weights.sum(-1)
            mixed = mixed * kept[..., None] + (weights.to(product) @ v[:, :, held].to(product)).to(wide)
            peak = higher
        # A padding query may have seen nothing: zero, for nobody reads it, but it must be finite.
        mixed = mixed / total.clamp_min(torch.finfo(wide).tiny)[..., None]
        out[:, :, :, some] = mixed.unflatten(2, (group, -1)).to(out.dtype)
    return out.flatten(1, 2)


def _tile_scores(
    queries: Tensor, keys: Tensor, q_positions: Tensor, k_positions: Tensor, span: int, nearest: int, furthest: int
) -> Tensor:
    """q k^T of a tile whose pairs are from `nearest` to `furthest` chunks apart, -inf where a key is hidden.

    (B, 3, K, n t, D), (B, K, D, s) -> (B, K, n t, s).
    """
    group = queries.shape[3] // q_positions.shape[1]
    scores = queries[:, nearest] @ keys
    if nearest < furthest:
        apart = _for_every_head(_chunks_apart(q_positions, k_positions, span), group)
        for kind in range(nearest + 1, furthest + 1):
            scores = torch.where(apart >= kind, queries[:, kind] @ keys, scores)
    return scores.masked_fill(~_for_every_head(visible(q_positions, k_positions)[:, 0], group), -math.inf)


def _for_every_head(pairs: Tensor, group: int) -> Tensor:
    """(B or 1, t, s) -> (B or 1, 1, group * t, s)."""
    return pairs[:, None].repeat(1, 1, group, 1)


def _chunks_apart(q_positions: Tensor, k_positions: Tensor, span: int) -> Tensor:
    """(B, T), (B, S) -> (B, T, S): 0 own chunk, 1 the one before, 2 further back. Pairs that are not visible: any."""
    apart = (q_positions // span)[:, :, None] - (k_positions // span)[:, None]
    return apart.clamp(0, 2)


def _scaled(k: Tensor, scale: Tensor) -> Tensor:
    return (k * scale.to(at_least_fp32(k.dtype))[:, None, None, None]).to(k.dtype)


def _softmax_scale(scale: Tensor, q: Tensor) -> Tensor:
    """(B or 1, 1, 1, 1), at least fp32."""
    return (scale.to(at_least_fp32(q.dtype)) * q.shape[-1] ** -0.5)[:, None, None, None]


def _tiles(positions: Tensor, size: int) -> Iterator[tuple[slice, int, int]]:
    """(slice, lowest, highest position) of every `size` columns; the device is asked once."""
    starts = range(0, positions.shape[1], size)
    bounds = [torch.stack(part.aminmax()) for part in positions.split(size, dim=1)] if starts else []
    found = torch.stack(bounds).tolist() if bounds else []
    for start, (lowest, highest) in zip(starts, found, strict=True):
        yield slice(start, min(start + size, positions.shape[1])), lowest, highest
