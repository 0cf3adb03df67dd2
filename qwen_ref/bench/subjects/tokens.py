"""From logits to tokens: sampling, and the loss of training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...errors import RequestError
from ..shapes import VOCABULARY, Sizes
from .common import Case, Draw, Subject

SLACK = 1e-5  # what fp32 may misjudge of a probability or of a running sum, as a share


def _sample_case(
    name: str, draw: Draw, logits: Tensor, temperature: Any, top_k: Any = 0, top_p: Any = 1.0, uniform: Any = None
) -> Case:
    """Options are one number for all rows, or a list of as many as there are rows."""

    def column(value: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        values = value if isinstance(value, list) else [value] * logits.shape[0]
        return torch.tensor(values, dtype=dtype, device=draw.device)

    drawn = column(uniform or 0.0)
    if uniform is None:
        drawn = torch.special.ndtr(draw.normal(logits.shape[0]).float()).clamp(max=0.999999)
    return Case(name, (logits, column(temperature), column(top_k, torch.int32), column(top_p), drawn))


def _sample_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    def logits(rows: int = 2, columns: int = 301, **options: float) -> Tensor:
        return draw.normal(rows, columns, **options)

    yield _sample_case("everything stays", draw, logits(), 1.0)
    yield _sample_case("greedy", draw, logits(8), 0.0, 5, 0.5)
    yield _sample_case("top-k", draw, logits(3), 0.7, [1, 20, 300])
    yield _sample_case("top-k of all and more", draw, logits(), 1.3, [301, 1 << 30])
    yield _sample_case("top-p", draw, logits(3), 0.7, 0, [0.01, 0.8, 0.9999])
    yield _sample_case("top-k, then top-p", draw, logits(), 0.7, [20, 300], [0.4, 0.8])
    yield _sample_case("each row its own", draw, logits(5), [0.0, 0.3, 1.0, 0.0, 5.0], [0, 9, 0, 3, 40], [1, 1, 0.4, 0.1, 0.95])
    yield _sample_case("several blocks", draw, logits(2, 5001), [1.0, 0.8], [0, 50], [1.0, 0.95])
    yield _sample_case("the ends of the draw", draw, logits(), 1.0, 7, 1.0, [0.0, 0.999999])
    yield _sample_case("peaked", draw, logits(scale=20.0), 1.0, [0, 20], 0.95)
    yield _sample_case("flat", draw, logits(scale=1e-3), 1.0, [0, 20], 0.9)
    yield _sample_case("all equal", draw, logits(3, scale=0.0), [1.0, 1.0, 0.0], [0, 20, 0], 0.93)
    # Every number three times: the threshold's too.
    yield _sample_case("ties", draw, draw.distinct(3, 100).repeat(1, 3), [1.0, 1.0, 0.0], [4, 0, 0], [1, 0.55, 1])
    # Zero and minus zero are the same number.
    signs = torch.tensor([0.0, -0.0, -1.0], device=draw.device, dtype=draw.dtype).repeat(2, 50)
    yield _sample_case("ties of two zeros", draw, signs, 1.0, [1, 0], [1, 0.2])
    barred = logits(3, 300).masked_fill(torch.arange(300, device=draw.device) % 3 != 1, -math.inf)
    yield _sample_case("two thirds barred", draw, barred, [1.0, 1.0, 0.0], [0, 200, 0], [0.9, 1, 1])
    late = logits(3, 9001).masked_fill(torch.arange(9001, device=draw.device) < 8200, -math.inf)
    yield _sample_case("whole blocks barred", draw, late, [1.0, 1.0, 0.0], [0, 20, 0], [0.9, 1, 1])
    alone = logits().masked_fill(torch.arange(301, device=draw.device) != 200, -math.inf)
    yield _sample_case("one token left", draw, alone, 1.0, [0, 20], [1, 0.9])
    yield _sample_case("one token in all", draw, logits(2, 1), 1.0, [0, 1], [0.9, 1])
    yield _sample_case("one row", draw, logits(1), 1.0, 20)
    yield _sample_case("no rows", draw, logits(0), 1.0)
    yield _sample_case("right half of wider rows", draw, logits(2, 602)[:, 301:], 1.0, 20)
    yield _sample_case("transposed", draw, logits(301, 2).t(), 1.0, 0, 0.9)
    yield _sample_case("large", draw, logits(scale=draw.large), 1.0, [0, 20], 0.9)
    yield _sample_case("far below zero", draw, draw.distinct(2, 301, step=2.0) - 1000, 20.0, [0, 20], [0.9, 1])


def _sample_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    """As many sequences as tokens, at most 64, with the settings that the model cards recommend, and with none."""
    rows = min(tokens, 64)
    for name, k, p in (("top-k 20, top-p 0.95", 20, 0.95), ("top-p 0.95", 0, 0.95), ("no cut", 0, 1.0)):
        yield _sample_case(f"({rows}, {VOCABULARY}) {name}", draw, draw.normal(rows, VOCABULARY, scale=3.0), 0.6, k, p)


def _observe_sample(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Whether fp64 agrees: 1 per row where the draw lies in the chosen token's part of the sum, and more where not.

    The order of the sums is the implementation's own, so the set that top-p leaves may be that of a slightly smaller
    or larger p, and the draw may miss the token's part by SLACK of the total. One SLACK further reads 2.
    """
    logits, temperature, top_k, top_p, uniform = args
    (tokens,) = outputs
    if tokens.numel() and (tokens.min() < 0 or tokens.max() >= logits.shape[1]):
        raise RequestError("a token is outside the vocabulary")
    greedy = temperature == 0
    if (tokens != logits.argmax(-1))[greedy].any():
        raise RequestError("temperature 0 does not give the first of the most likely tokens")
    p = (logits.double() / temperature.double().masked_fill(greedy, 1)[:, None]).softmax(-1)  # (B, V)
    ordered = p.sort(-1, descending=True).values
    rank = torch.arange(p.shape[1], device=p.device)
    ordered = ordered.masked_fill((top_k[:, None] > 0) & (rank >= top_k[:, None]), 0)
    before = ordered.cumsum(-1) - ordered
    chosen = p.gather(-1, tokens[:, None])  # (B, 1)
    misses, allowed = [], greedy.clone()
    for share in (top_p.double() * (1 + sign * SLACK) for sign in (-1, 0, 1)):
        stays = (before < share[:, None] * ordered.sum(-1, keepdim=True)) & (ordered > 0)
        least = ordered.masked_fill(~stays, math.inf).amin(-1, keepdim=True) * (1 - SLACK)
        sums = p.masked_fill(p < least, 0).cumsum(-1)
        after, draw = sums.gather(-1, tokens[:, None]), uniform.double()[:, None] * sums[:, -1:]
        miss = torch.maximum(after - chosen - draw, draw - after).clamp(min=0) / sums[:, -1:]
        inside = (chosen >= least) & (chosen > 0)
        allowed |= inside[:, 0]
        misses.append(miss.masked_fill(~inside, math.inf)[:, 0])
    if not allowed.all():
        raise RequestError("a token was chosen that temperature, top-k and top-p leave out")
    nearest = torch.stack(misses).amin(0).masked_fill(greedy, 0)
    return (1 + (nearest - SLACK).clamp(min=0) / SLACK,)


def _entropy_case(name: str, draw: Draw, logits: Tensor, targets: Tensor | None = None) -> Case:
    rows, columns = logits.shape
    if targets is None:
        targets = draw.choices(1, columns, min(rows, columns))[0].repeat(-(-rows // columns))[:rows]
    return Case(name, (logits, targets))


def _entropy_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    yield _entropy_case("odd vocabulary", draw, draw.normal(7, 301))
    yield _entropy_case("several blocks", draw, draw.normal(3, 9001))
    yield _entropy_case("one row", draw, draw.normal(1, 300))
    yield _entropy_case("no rows", draw, draw.normal(0, 300))
    yield _entropy_case("one class", draw, draw.normal(5, 1))
    targets = torch.tensor([-100, 0, -1, 300, 5], device=draw.device)
    yield _entropy_case("nothing to predict, first and last class", draw, draw.normal(5, 301), targets)
    yield _entropy_case("nothing to predict anywhere", draw, draw.normal(5, 301), targets * 0 - 1)
    yield _entropy_case("nearly certain", draw, draw.normal(5, 301, scale=30.0))
    yield _entropy_case("far from zero", draw, draw.normal(5, 301, mean=1000.0))
    yield _entropy_case("large", draw, draw.normal(5, 301, scale=draw.large))
    place = torch.arange(300, device=draw.device)
    targets = torch.tensor([1, 4, 298, 151], device=draw.device)
    yield _entropy_case("two thirds barred", draw, draw.normal(4, 300).masked_fill(place % 3 != 1, -math.inf), targets)
    late = draw.normal(3, 20001).masked_fill(torch.arange(20001, device=draw.device) < 8200, -math.inf)
    yield _entropy_case("whole blocks barred", draw, late, torch.tensor([8200, 20000, 9000], device=draw.device))
    yield _entropy_case("right half of wider rows", draw, draw.normal(5, 602)[:, 301:])
    yield _entropy_case("transposed", draw, draw.normal(301, 5).t())
    yield _entropy_case("every second target", draw, draw.normal(5, 301), draw.choices(1, 301, 10)[0][::2])


def _entropy_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    rows = min(tokens, 1024)  # logits of more are computed in pieces
    yield _entropy_case(f"({rows}, {VOCABULARY})", draw, draw.normal(rows, VOCABULARY, scale=3.0))


SAMPLE = Subject(
    ops.sample, _sample_cases, _sample_real, lambda logits, *_: 5 * logits.numel(), observe=_observe_sample
)
CROSS_ENTROPY = Subject(ops.cross_entropy, _entropy_cases, _entropy_real, lambda logits, _: 6 * logits.numel())
