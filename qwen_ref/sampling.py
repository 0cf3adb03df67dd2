"""From logits to the next token: penalties, temperature, truncation, choice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import RequestError


@dataclass(frozen=True)
class Sampling:
    """How one request picks its tokens. `temperature` 0 takes the most likely token and ignores the truncations.

    The steps run in the order of the fields, which is transformers' order. RequestError on values out of range.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit
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
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or (
                open_low and value == low
            ):
                bracket = "(" if open_low else "["
                raise RequestError(f"{name} is {value!r}; it must be a number in {bracket}{low}, {high}]")

        check("repetition_penalty", 0.0, 1e4, open_low=True)
        check("presence_penalty", -100.0, 100.0)
        check("frequency_penalty", -100.0, 100.0)
        check("temperature", 0.0, 1e4)
        check("top_k", 0, 1 << 31)
        check("top_p", 0.0, 1.0, open_low=True)
        check("min_p", 0.0, 1.0)
        if not isinstance(self.top_k, int):
            raise RequestError(f"top_k is {self.top_k!r}; it must be an integer")
        for token, bias in self.logit_bias.items():
            if type(token) is not int or isinstance(bias, bool) or not isinstance(bias, int | float) or math.isnan(bias):
                raise RequestError(f"logit_bias must map token ids to numbers; it holds {token!r}: {bias!r}")


def penalize(logits: Tensor, s: Sampling, prompt: set[int], generated: Counter[int]) -> Tensor:
    """Bias and penalties of one sequence: (V,) fp32 -> (V,) fp32. The argument is not changed."""
    if s.logit_bias:
        ids, values = _columns(s.logit_bias, logits)
        logits = logits.index_add(0, ids, values)
    if s.repetition_penalty != 1.0 and (prompt or generated):
        seen = torch.tensor(sorted(prompt | generated.keys()), device=logits.device)
        x = logits[seen]
        moved = torch.where(x > 0, x / s.repetition_penalty, x * s.repetition_penalty)
        logits = logits.index_copy(0, seen, moved)
    if generated and (s.presence_penalty or s.frequency_penalty):
        ids, counts = _columns(generated, logits)
        logits = logits.index_add(0, ids, -(s.presence_penalty + s.frequency_penalty * counts))
    return logits


def distribution(logits: Tensor, s: Sampling) -> Tensor:
    """Temperature, then top-k, top-p and min-p, each on what the one before left: (V,) fp32 -> probabilities (V,)."""
    logits = logits / s.temperature
    if 0 < s.top_k < logits.numel():
        kth = logits.topk(s.top_k).values[-1]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if s.top_p < 1.0:
        ordered, ids = logits.sort(descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= s.top_p  # the probability before this token already suffices
        logits = logits.index_fill(0, ids[beyond], -math.inf)
    p = logits.softmax(-1)
    if s.min_p > 0.0:
        p = p.masked_fill(p < s.min_p * p.max(), 0.0)
        p = p / p.sum()
    return p


def choose(logits: Tensor, s: Sampling, generator: torch.Generator) -> int:
    """Draw the next token of one sequence from its penalised logits (V,) fp32."""
    if s.temperature == 0.0:
        return int(logits.argmax())
    return int(torch.multinomial(distribution(logits, s), 1, generator=generator))


def _columns(table: Mapping[int, float], like: Tensor) -> tuple[Tensor, Tensor]:
    ids = torch.tensor(list(table), device=like.device)
    if int(ids.min()) < 0 or int(ids.max()) >= like.numel():
        raise RequestError(f"logit_bias names a token id outside 0..{like.numel() - 1}")
    return ids, torch.tensor(list(table.values()), dtype=like.dtype, device=like.device)
