"""Attention that reads only chosen blocks of keys (QSA of Qwen4-Exp): a small indexer scores blocks, the best are read.

Token j of a sequence belongs to block j // c, counted from its first token behind the padding. For every query the indexer
compares its own heads with the mean key of each block that is complete at the query, and keeps the best ones:

    score(t, i) = sum_heads relu(q_t . k_i) / sqrt(d)

The query reads the tokens of these blocks, and the tokens of the last block as long as it is not complete (the tail). A
query that has fewer complete blocks than it may choose reads everything: dense attention.

More letters: c the block's tokens ("compress ratio"), P blocks, h heads of the indexer, d their dimension, k chosen blocks.
`starts` (B,) int64 is the index of each sequence's first real key, behind its padding; None = 0. Query t of T is token
S - T + t of S.
"""

import torch
from torch import Tensor

from .attention import attention, attention_scores
from .dtypes import at_least_fp32


def block_starts(length: int, ratio: int, starts: Tensor | None, device: torch.device) -> Tensor:
    """The index of the first token of every block that is complete in `length` tokens: (B or 1, P) int64.

    P is that of the longest sequence; blocks that a padded one does not have are given the index of its last block, or, if it
    has none, that of a token: a sequence may be all padding so far.
    """
    first = torch.zeros(1, dtype=torch.int64, device=device) if starts is None else starts  # (B or 1,)
    complete = (length - first) // ratio  # (B or 1,)
    count = length // ratio if starts is None else int(complete.max())
    blocks = torch.arange(count, device=device).expand(first.shape[0], -1)
    found = first[:, None] + ratio * torch.minimum(blocks, (complete - 1).clamp(min=0)[:, None])
    return found.clamp(max=length - 1)


def block_means(keys: Tensor, first: Tensor, ratio: int) -> Tensor:
    """The mean of each block's keys, before norm and rotation: (B, S, d), `block_starts` (B or 1, P) -> (B, P, d).

    Summed in at least fp32, rounded to the keys' dtype.
    """
    tokens = first[:, :, None] + torch.arange(ratio, device=first.device)  # (B or 1, P, c)
    tokens = tokens.clamp(max=keys.shape[1] - 1).expand(keys.shape[0], -1, -1)
    grouped = keys.gather(1, tokens.flatten(1)[..., None].expand(-1, -1, keys.shape[2])).unflatten(1, tokens.shape[1:])
    return grouped.to(at_least_fp32(keys.dtype)).mean(2).to(keys.dtype)


def complete_blocks(queries: int, length: int, ratio: int, starts: Tensor | None, device: torch.device) -> Tensor:
    """How many blocks are complete at each query, its own token included: (B or 1, T) int64; 0 for padding."""
    seen = torch.arange(length - queries + 1, length + 1, device=device)[None]  # (1, T) tokens up to the query
    if starts is not None:
        seen = (seen - starts[:, None]).clamp(min=0)
    return seen // ratio


def block_scores(q: Tensor, keys: Tensor) -> Tensor:
    """How much each query wants each block: sum over heads of relu(q . k) / sqrt(d).

    Args: q (B, T, h, d), keys (B, P, d), both normed and rotated. Returns (B, T, P), at least fp32, as all of it.
    """
    wide = at_least_fp32(q.dtype)
    return torch.relu(torch.einsum("bthd,bpd->bthp", q.to(wide), keys.to(wide))).sum(2) / q.shape[-1] ** 0.5


def select_blocks(scores: Tensor, complete: Tensor, top: int) -> Tensor:
    """The `top` best of the complete blocks of every query, all of them where there are no more.

    Args: scores (B, T, P); complete (B or 1, T) from `complete_blocks`. Returns (B, T, min(top, P)) int64 indices of
    blocks, -1 where a query has fewer. Equal scores (0 is common) are ordered as torch.topk orders those of the complete
    blocks alone, so that a choice does not depend on the tokens after it.
    """
    batch, count, blocks = scores.shape
    complete = complete.expand(batch, -1)
    chosen = torch.arange(min(top, blocks), device=scores.device).expand(batch, count, -1)
    chosen = torch.where(chosen < complete[..., None], chosen, -1)
    for held in complete[complete > top].unique().tolist():
        rows = complete == held  # (B, T)
        chosen = chosen.masked_scatter(rows[..., None], scores[rows][:, :held].topk(top, dim=-1).indices)
    return chosen


def sparse_block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, starts: Tensor | None, ratio: int
) -> Tensor:
    """`attention` in which each query sees its chosen blocks and the tail, and nothing else.

    Args: q (B, N, T, D); k, v (B, K, S, D); blocks (B, T, k) int64 from `select_blocks`, -1 = none; starts (B,) or None;
    ratio c. Returns (B, N, T, D) in q's dtype; what a padding query gives is finite and means nothing.
    """
    return attention(q, k, v, block_mask(blocks, k.shape[2], starts, ratio))


def sparse_block_scores(q: Tensor, k: Tensor, blocks: Tensor, starts: Tensor | None, ratio: int) -> Tensor:
    """`attention_scores` as `sparse_block_attention` has them, what is not read at the dtype's lowest number: (B, N, T, S)."""
    return attention_scores(q, k, block_mask(blocks, k.shape[2], starts, ratio))


def block_mask(blocks: Tensor, length: int, starts: Tensor | None, ratio: int) -> Tensor:
    """The mask that a choice of blocks amounts to: (B, T, k) -> (B, 1, T, S) bool, True = visible. A padding query, which
    nobody reads, sees everything, so that its softmax stays finite."""
    batch, queries, device = blocks.shape[0], blocks.shape[1], blocks.device
    complete = complete_blocks(queries, length, ratio, starts, device)[..., None]  # (B or 1, T, 1)
    token = torch.arange(length, device=device)[None]
    token = token if starts is None else token - starts[:, None]  # (B or 1, S), in its sequence; padding is negative
    block = torch.div(token, ratio, rounding_mode="floor")[:, None]  # (B or 1, 1, S)
    picked = torch.zeros(batch, queries, length // ratio + 2, dtype=torch.bool, device=device)
    picked = picked.scatter(2, blocks % picked.shape[2], True)  # -1 marks the last one, which no token has
    tail = torch.arange(length - queries, length, device=device)[:, None]  # (T, 1): tokens up to the query's own
    own = (block == complete) & (torch.arange(length, device=device) <= tail)
    seen = picked.gather(2, block.clamp(min=0).expand(batch, queries, -1)) & (block >= 0) & (block < complete)
    return (seen | own | ~(seen | own).any(-1, keepdim=True))[:, None]
