"""Mixture of experts: the router and the experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...errors import RequestError
from ..shapes import TINY, Sizes
from .common import Case, Draw, Subject, bytes_of


def _router_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    experts, k = s.experts or 128, s.top_k or 8
    for normalize in (True, False):
        yield Case(f"normalize={normalize}", (draw.distinct(13, experts), k, normalize))
    yield Case("one token", (draw.distinct(1, experts), k, True))
    yield Case("no tokens", (draw.distinct(0, experts), k, True))
    yield Case("top 1", (draw.distinct(5, experts), 1, False))
    yield Case("all experts", (draw.distinct(5, 9), 9, True))
    yield Case("odd number of experts", (draw.distinct(5, 37), 5, True))
    yield Case("right half of a wider tensor", (draw.distinct(5, 2 * experts)[:, experts:], k, True))
    yield Case("transposed", (draw.distinct(experts, 5).t().contiguous().t().t(), min(k, 5), True))
    yield Case("ties", (draw.normal(5, experts, scale=0.0), k, True))
    yield Case("large", (draw.distinct(5, experts, step=64.0), k, True))


def _router_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    yield Case(f"({tokens}, {s.experts}) top {s.top_k}", (draw.distinct(tokens, s.experts), s.top_k, True))


def _observe_router(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Which of equal experts was chosen is nobody's fault: compare the probabilities of the chosen, not their numbers."""
    weights, experts = outputs
    logits, ordered = args[0], experts.sort(-1).values
    if experts.numel() and (ordered[:, 0].min() < 0 or ordered[:, -1].max() >= logits.shape[1]):
        raise RequestError("an expert's index is outside the experts there are")
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise RequestError("a token has the same expert twice")
    return weights, torch.softmax(logits.double(), -1).gather(-1, experts)


def _moe_case(name: str, draw: Draw, s: Sizes, tokens: int, experts: Tensor | None = None, scale: float = 1.0) -> Case:
    x = draw.normal(tokens, s.hidden)
    gate_up = draw.normal(s.experts, 2 * s.intermediate, s.hidden, scale=s.hidden**-0.5)
    down = draw.normal(s.experts, s.hidden, s.intermediate, scale=s.intermediate**-0.5)
    chosen = draw.choices(tokens, s.experts, s.top_k) if experts is None else experts
    weights = draw.normal(*chosen.shape, scale=0.03 * scale, mean=scale / s.top_k)
    return Case(name, (x, gate_up, down, weights, chosen))


def _moe_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    s = replace(s, experts=min(s.experts, 16))  # as awkward as all, and drawn in a tenth of the time
    for tokens in (13, 0):  # times k: no multiple of any tile
        yield _moe_case(f"{tokens} tokens", draw, s, tokens)
    yield _moe_case("one token", draw, replace(s, top_k=1), 1)
    yield _moe_case("30 rows an expert", draw, replace(s, experts=2, top_k=2), 30)
    yield _moe_case("many rows an expert", draw, replace(s, experts=2, top_k=1), 197)
    same = torch.arange(s.top_k, device=draw.device).expand(7, s.top_k).contiguous()
    yield _moe_case("all tokens to the same experts", draw, s, 7, same)
    small = replace(s, hidden=40, intermediate=8, experts=5, top_k=2)
    yield _moe_case("5 tokens", draw, small, 5)
    yield _moe_case("one expert", draw, replace(small, experts=1, top_k=1), 7)
    yield _moe_case("more experts than a tile", draw, replace(small, experts=150), 90)
    yield _moe_case("every expert", draw, replace(small, top_k=5), 9)
    yield _moe_case("odd sizes", draw, replace(small, hidden=37, intermediate=19), 6)
    for tokens in (3, 61):
        # Empty experts before, between and after those in use, whose two slots come in either order.
        yield _moe_case(f"{tokens} tokens to two of five", draw, small, tokens, 1 + 2 * draw.choices(tokens, 2, 2))
        one = torch.full((tokens, 1), 2, device=draw.device)
        yield _moe_case(f"{tokens} tokens to one of five", draw, replace(small, top_k=1), tokens, one)
    for tokens in (2, 11):
        yield _moe_case(f"{tokens} tokens, three slots", draw, replace(small, top_k=3), tokens)
        yield _moe_case(f"{tokens} tokens, large router weights", draw, small, tokens, scale=1e3)
        _, (_, gate_up, down, weights, experts) = _moe_case("", draw, small, tokens)
        apart = draw.normal(tokens, 2 * small.hidden)[:, ::2], gate_up.mT.contiguous().mT, down.mT.contiguous().mT
        yield Case(f"{tokens} tokens, strided", (*apart, weights.t().contiguous().t(), experts.t().contiguous().t()))


def _moe_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    yield _moe_case(f"{tokens} tokens, {s.top_k} of {s.experts}", draw, s, tokens)



def _moe_bytes(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> int:
    """Only the chosen experts are read: all of them once the tokens are many, else as many as there are choices."""
    used = min(gate_up.shape[0], experts.numel())
    return 2 * bytes_of(x) + bytes_of(weights, experts) + used * bytes_of(gate_up[0], down[0])


ROUTER_TOPK = Subject(
    ops.router_topk,
    _router_cases,
    _router_real,
    lambda logits, k, _: (5 + 2 * k) * logits.numel(),
    needs="experts",
    others=tuple(replace(TINY, experts=2**i) for i in range(5, 13)),
    observe=_observe_router,
)
MOE_EXPERTS = Subject(
    ops.moe_experts,
    _moe_cases,
    _moe_real,
    lambda x, gate_up, down, weights, _: 6 * weights.numel() * down[0].numel(),
    bytes=_moe_bytes,
    needs="experts",
)
