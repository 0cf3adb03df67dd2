"""From logits to the next token: penalties, temperature, truncation, choice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .errors import RequestError

LIMITS = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Sampling:
    """How one request picks its tokens. `temperature` 0 takes the most likely token and ignores the truncations.

    The steps run in the order of the fields, which is transformers' order. RequestError on values out of range.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit; -inf forbids it
    repetition_penalty: float = 1.0  # Keskar et al. 2019: logits of tokens seen (prompt too) move towards unlikely
    presence_penalty: float = 0.0  # subtracted once from every token generated before
    frequency_penalty: float = 0.0  # subtracted once per time it was generated
    temperature: float = 0.0  # divides the logits
    top_k: int = 0  # keep the k most likely; 0 = all
    top_p: float = 1.0  # Holtzman et al. 2020: keep the smallest set that holds this probability
    min_p: float = 0.0  # Nguyen et al. 2024: keep tokens at least this fraction as likely as the best

    def __post_init__(self) -> None:
        def check(name: str, low: float, high: float, *, open_low: bool = False) -> None:
            value = getattr(self, name)
            if not _is_real(value) or not low <= value <= high or (open_low and value == low):
                bracket = "(" if open_low else "["
                raise RequestError(f"{name} is {value!r}; it must be a number in {bracket}{low}, {high}]")
            object.__setattr__(self, name, _plain(value))

        check("repetition_penalty", 0.0, 1e4, open_low=True)
        check("presence_penalty", -100.0, 100.0)
        check("frequency_penalty", -100.0, 100.0)
        check("temperature", 0.0, 1e4)
        check("top_k", 0, 1 << 31)
        check("top_p", 0.0, 1.0, open_low=True)
        check("min_p", 0.0, 1.0)
        if not isinstance(self.top_k, Integral):
            raise RequestError(f"top_k is {self.top_k!r}; it must be an integer")
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias is {self.logit_bias!r}; it must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            number = _is_real(bias) and bias < math.inf  # NaN is not either
            if not isinstance(token, Integral) or isinstance(token, bool) or not number:
                raise RequestError(f"logit_bias must map token ids to numbers or -inf; it holds {token!r}: {bias!r}")
        object.__setattr__(self, "logit_bias", {int(token): _plain(bias) for token, bias in self.logit_bias.items()})


def _is_real(value: object) -> bool:
    """A number of Python or of NumPy, whose operators would take a tensor for an array; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _plain(value: Any) -> int | float:
    return int(value) if isinstance(value, Integral) else float(value)


def penalize(logits: Tensor, s: Sampling, prompt: set[int], generated: Counter[int]) -> Tensor:
    """Bias and penalties of one sequence: (V,) fp32 -> (V,) fp32, none above its range. The argument is not changed.

    RequestError if logit_bias leaves no token.
    """
    if s.logit_bias:
        ids, values = _columns(s.logit_bias, logits)
        logits = logits.index_add(0, ids, values)
    if s.repetition_penalty != 1.0 and (prompt or generated):
        seen = torch.tensor(sorted(prompt | generated.keys()), device=logits.device)
        x = logits[seen].double()  # a penalty may be a number that fp32 does not have
        moved = torch.where(x > 0, x / s.repetition_penalty, x * s.repetition_penalty).to(logits.dtype)
        logits = logits.index_copy(0, seen, moved)
    if generated and (s.presence_penalty or s.frequency_penalty):
        ids, counts = _columns(generated, logits)
        logits = logits.index_add(0, ids, -(s.presence_penalty + s.frequency_penalty * counts))
    if s.logit_bias and bool((logits == -math.inf).all()):
        raise RequestError("logit_bias forbids every token (-inf); leave at least one that may come")
    return logits.clamp(max=LIMITS.max)


def candidates(logits: Tensor, s: Sampling) -> tuple[Tensor, Tensor]:
    """What temperature, top-k, top-p and min-p, each on what the one before left, leave of (V,) fp32 logits.

    Returns the token ids (n,), ascending, and their probabilities (n,) as multiples of the best one's. Each filter looks only
    at what it must: a vocabulary of 150,000 takes forty times as long to sort as to search for its best thousand.
    """
    ids = torch.arange(logits.numel(), device=logits.device)
    if 0 < s.top_k < logits.numel():  # first, since dividing by the temperature keeps the order
        ids = (logits >= logits.topk(s.top_k).values[-1]).nonzero()[:, 0]  # equals of the last one stay
        logits = logits[ids]
    scaled = (logits - logits.max()) / max(s.temperature, LIMITS.tiny)
    if s.top_p < 1.0:
        kept = _nucleus(scaled, s.top_p)
        ids, scaled = ids[kept], scaled[kept]
    weights = scaled.exp()
    if s.min_p > 0.0:
        kept = (weights >= s.min_p).nonzero()[:, 0]
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def distribution(logits: Tensor, s: Sampling) -> Tensor:
    """The probabilities that `choose` draws by: (V,) fp32 -> (V,)."""
    ids, weights = candidates(logits, s)
    return torch.zeros_like(logits).index_copy(0, ids, weights / weights.sum())


def choose(logits: Tensor, s: Sampling, generator: torch.Generator) -> int:
    """The next token of one sequence from its penalised logits (V,) fp32: the first, in the order of the vocabulary, at which
    the running sum of what is left passes its share, one uniform number of the generator, as in `ops.sample`.

    RequestError for logits that hold NaN.
    """
    if s.temperature == 0.0:
        return int(logits.argmax())
    if bool(logits.isnan().any()):
        raise RequestError("the model's logits hold NaN, of which no token can be drawn; load it in bfloat16 or float32")
    ids, weights = candidates(logits, s)
    total = weights.cumsum(-1, dtype=torch.float64)  # in which a rare token too has numbers that hit it
    uniform = torch.rand((), dtype=torch.float64, generator=generator, device=logits.device)  # in [0, 1)
    return int(ids[torch.searchsorted(total, uniform * total[-1], right=True)])


def _nucleus(scaled: Tensor, top_p: float) -> Tensor:
    """The smallest set of most likely tokens that holds top_p of the probability, of equals the first ones.

    Args: scaled (n,) logits of which the largest is 0. Returns their indices, ascending.
    """
    enough = top_p * scaled.exp().sum(dtype=torch.float64)
    best, total = _most_likely(scaled, enough)
    count = int((total - best.exp() < enough).sum())  # the probability before the token does not suffice yet
    least = best[count - 1]
    equals = (scaled == least).nonzero()[:, 0]
    above = (scaled > least).nonzero()[:, 0]
    return torch.cat((above, equals[: count - len(above)])).sort().values


def _most_likely(scaled: Tensor, enough: Tensor) -> tuple[Tensor, Tensor]:
    """The best logits in descending order, at least as many as have `enough` weight, and the running sum of the weights."""
    size = 1024  # holds almost every model's nucleus
    while True:
        best = scaled.topk(min(size, scaled.numel())).values
        total = best.exp().cumsum(-1, dtype=torch.float64)
        if size >= scaled.numel() or total[-1] >= enough:
            return best, total
        size *= 16


def _columns(table: Mapping[int, float], like: Tensor) -> tuple[Tensor, Tensor]:
    if min(table) < 0 or max(table) >= like.numel():
        raise RequestError(f"logit_bias names a token id outside 0..{like.numel() - 1}")
    values = [value if value == -math.inf else min(max(value, LIMITS.min), LIMITS.max) for value in table.values()]
    return torch.tensor(list(table), device=like.device), torch.tensor(values, dtype=like.dtype, device=like.device)
