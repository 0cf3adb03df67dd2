"""What attention heads look at, from their patterns alone. A pattern is (..., T, T), rows are queries and sum to one.

    previous token   mean over t > 0 of  a[t, t-1]
    first token      mean over t > 0 of  a[t, 0]: the attention sink (Xiao et al. 2023)
    induction        on a random sequence read twice, mean over the second reading of  a[t, t - P + 1], P its length: the
                     token that followed the last time (Olsson et al. 2022, "In-context Learning and Induction Heads")
    entropy          mean over t of  -sum_s a log a, nats: 0 looks at one token, log(t+1) at all alike
    distance         mean over t of  sum_s a[t, s] (t - s), tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..errors import RequestError
from ..hook_points import points
from ..hooks import run_with_cache
from .inputs import Ids, one_sequence, whole


@dataclass(frozen=True)
class HeadSummary:
    """(L, N) each: layers with softmax attention, heads; fp32 on the CPU."""

    previous: Tensor
    first: Tensor
    induction: Tensor  # measured on random tokens, not on the given text
    entropy: Tensor
    distance: Tensor


def summary(model: Any, ids: Ids, *, period: int = 32, seed: int = 0) -> HeadSummary:
    """Every head's scores on a text of at least 2 tokens; the induction score on `period` random tokens read twice."""
    pattern = patterns(model, one_sequence(model, ids, at_least=2))
    repeated = patterns(model, repeated_tokens(model.config.vocab_size, period, seed=seed))
    return HeadSummary(previous_token(pattern), first_token(pattern), induction(repeated, period), entropy(pattern),
                       distance(pattern))  # fmt: skip


@torch.no_grad()
def patterns(model: Any, ids: Ids) -> Tensor:
    """The attention pattern of every head on one sequence: (L, N, T, T) fp32 on the CPU.

    Of a hybrid, L are its layers with softmax attention; what the others amount to is no average, see `hooks`.
    """
    with backend.use({"attention": "eager"}):  # the fused kernels never hold a pattern
        _, acts = run_with_cache(model, one_sequence(model, ids), pattern_names(model), device="cpu")
    return acts.stack("pattern")[:, 0].float()


def pattern_names(model: Any) -> list[str]:
    """The points at which softmax attention shows its pattern."""
    return [name for name, point in points(model).items() if point.place == "attention" and point.short == "pattern"]


def repeated_tokens(vocab: int, period: int = 32, *, seed: int = 0) -> Tensor:
    """`period` random ids, twice: (2 * period,) int64. Nothing but the repetition predicts the second half."""
    period = whole(period, "period")
    if vocab < 1 or period < 2:
        raise RequestError(f"a repetition needs a vocabulary and at least 2 tokens; got vocab={vocab}, period={period}")
    once = torch.randint(vocab, (period,), generator=torch.Generator().manual_seed(seed))
    return once.repeat(2)


def previous_token(pattern: Tensor) -> Tensor:
    """(..., T, T) -> (...): the mean attention to the token before, from the second token on."""
    return _square(pattern).diagonal(-1, dim1=-2, dim2=-1).mean(-1)


def first_token(pattern: Tensor) -> Tensor:
    """(..., T, T) -> (...): the mean attention to the first token, from the second token on."""
    return _square(pattern)[..., 1:, 0].mean(-1)


def induction(pattern: Tensor, period: int) -> Tensor:
    """(..., 2P, 2P) -> (...): mean attention, in the second reading, to what followed the same token in the first."""
    if _square(pattern).shape[-1] != 2 * period:
        raise RequestError(f"the pattern has {pattern.shape[-1]} tokens; a sequence of {period} read twice has {2 * period}")
    return pattern.diagonal(1 - period, dim1=-2, dim2=-1)[..., 1:].mean(-1)  # entry j is a[j + P - 1, j]


def entropy(pattern: Tensor) -> Tensor:
    """(..., T, S) -> (...): mean entropy of a query's attention, nats."""
    return torch.special.entr(pattern).sum(-1).mean(-1)


def distance(pattern: Tensor) -> Tensor:
    """(..., T, T) -> (...): how far back a query looks on average, tokens."""
    place = torch.arange(_square(pattern).shape[-1], dtype=pattern.dtype, device=pattern.device)
    return (pattern * (place[:, None] - place)).sum(-1).mean(-1)


def _square(pattern: Tensor) -> Tensor:
    if pattern.dim() < 2 or pattern.shape[-1] != pattern.shape[-2] or pattern.shape[-1] < 2:
        raise RequestError(f"a pattern is (..., T, T) of at least 2 tokens, not {list(pattern.shape)}")
    return pattern
