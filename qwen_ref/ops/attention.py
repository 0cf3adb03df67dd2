"""Softmax attention, its masks, and its forms for a packed prefill and for decoding."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import at_least_fp32


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
    return F.softmax(scores, dim=-1, dtype=at_least_fp32(scores.dtype)).to(scores.dtype)


def logn_scale(positions: Tensor, trained: int, dtype: torch.dtype) -> Tensor:
    """log_trained(p + 1) where that is above 1, else 1: what queries beyond the `trained` length are multiplied by, so that
    the entropy of attention does not grow with the number of keys (Su 2021, Chiang & Cholak 2022).

    Args: positions (B, T) integers, -1 = padding. Returns (B, 1, T, 1), rounded to `dtype` as Qwen 1 rounds its table.
    """
    wide = torch.log((positions + 1).clamp_min(1).double()) / math.log(trained)
    return wide.clamp_min(1).to(dtype)[:, None, :, None]


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
