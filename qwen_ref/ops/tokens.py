"""From final hidden states and logits to tokens and losses."""

import math

import torch
from torch import Tensor

from .dtypes import at_least_fp32


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
    wide = logits.to(at_least_fp32(logits.dtype)) / temperature.masked_fill(greedy, 1)[:, None]
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
    wide = logits.to(at_least_fp32(logits.dtype))
    chosen = wide.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    return (wide.logsumexp(-1) - chosen).masked_fill(targets < 0, 0)


def last_token(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The hidden state of each sequence's last token, right padding dropped: (B, T, H), (B,) -> (B, H)."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), lengths - 1]
