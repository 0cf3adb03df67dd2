"""Rotary embedding, alone and between the projections and the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..shapes import TINY, Sizes
from .common import Case, Draw, Subject, bytes_of


def _rope_case(name: str, draw: Draw, x: Tensor, batch: int, first: int = 0, turned: int = 0) -> Case:
    positions = torch.arange(batch * x.shape[2], device=x.device).view(batch, -1) + first  # rows of a batch differ
    tables = ops.rope_tables(positions, ops.rope_frequencies(turned or x.shape[-1], 1e6).to(x.device), 1.0, draw.dtype)
    return Case(name, (x, *tables))


def _rope_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    yield _rope_case("queries as the model has them", draw, draw.normal(2, 3, s.heads, s.head_dim).transpose(1, 2), 2)
    yield _rope_case("one table for the batch", draw, draw.normal(2, 3, s.kv_heads, s.head_dim).transpose(1, 2), 1)
    yield _rope_case("one token", draw, draw.normal(1, s.heads, 1, s.head_dim), 1, first=30_000)
    yield _rope_case("one head", draw, draw.normal(2, 1, 5, s.head_dim), 2)
    yield _rope_case("heads no power of two", draw, draw.normal(1, 37, 3, s.head_dim), 1)
    yield _rope_case("odd half", draw, draw.normal(2, 3, 5, 22), 2)
    yield _rope_case("one pair", draw, draw.normal(2, 3, 5, 2), 2)
    yield _rope_case("a quarter of a head", draw, draw.normal(2, 3, s.heads, 40).transpose(1, 2), 2, turned=10)
    yield _rope_case("all but two numbers", draw, draw.normal(2, 3, 5, s.head_dim), 2, turned=s.head_dim - 2)
    yield _rope_case("no tokens", draw, draw.normal(2, s.heads, 0, s.head_dim), 2)
    yield _rope_case("every second number", draw, draw.normal(2, 3, 5, 2 * s.head_dim)[..., ::2], 2)
    yield _rope_case("large", draw, draw.normal(1, s.heads, 3, s.head_dim, scale=draw.large), 1)


def _rope_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    for heads in (s.heads, s.kv_heads):
        x = draw.normal(1, tokens, heads, s.head_dim).transpose(1, 2)
        yield _rope_case(f"{tuple(x.shape)}", draw, x, 1)


def _write_case(
    name: str,
    draw: Draw,
    s: Sizes,
    tokens: int,
    *,
    dim: int = 0,
    cache: tuple[int, int] = (3, 16),  # rows and entries
    norms: str = "qk",
    slots: Tensor | None = None,
    fused: bool = True,
    gated: bool = False,  # as hybrids have it: a gate beside every query, partial rotation, centred norms
    scale: float = 1.0,
) -> Case:
    dim = dim or s.head_dim
    if fused:
        beside = 2 if gated else 1
        heads = (beside * s.heads, s.kv_heads, s.kv_heads)
        q, k, v = draw.normal(tokens, sum(heads), dim, scale=scale).split(heads, 1)
        q = q[:, ::beside]
    else:
        q, k, v = (draw.normal(n, tokens, dim, scale=scale).transpose(0, 1) for n in (s.heads, s.kv_heads, s.kv_heads))
    q_weight, k_weight = (draw.normal(dim, scale=0.3, mean=1.0) if which in norms else None for which in "qk")
    positions, turned = torch.arange(tokens, device=draw.device)[None] + 1000, dim // 8 * 2 if gated else dim
    cos, sin = ops.rope_tables(positions, ops.rope_frequencies(turned, 1e6).to(draw.device), 1.0, draw.dtype)
    rows, entries = cache
    k_cache, v_cache = (draw.normal(rows, entries, s.kv_heads, dim).transpose(1, 2) for _ in range(2))
    if slots is None:
        slots = draw.choices(1, rows * entries, tokens)[0]  # pages in no order
    return Case(name, (q, k, v, q_weight, k_weight, s.eps, cos[0], sin[0], k_cache, v_cache, slots, *([True] if gated else [])))


def _write_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    yield _write_case("into shuffled pages", draw, s, 7)
    yield _write_case("without norms", draw, s, 7, norms="")
    yield _write_case("norm of the queries only", draw, s, 3, norms="q")
    yield _write_case("norm of the keys only", draw, s, 3, norms="k")
    some = draw.choices(1, 48, 7)[0]
    yield _write_case("every third token not stored", draw, s, 7, slots=some.masked_fill(some.argsort() % 3 == 0, -1))
    yield _write_case("nothing stored", draw, s, 3, slots=torch.full((3,), -7, device=draw.device))
    yield _write_case("one token", draw, s, 1)
    yield _write_case("no tokens", draw, s, 0)
    yield _write_case("odd half", draw, s, 3, dim=22)
    yield _write_case("one pair", draw, s, 3, dim=2)
    yield _write_case("transposed heads", draw, s, 3, fused=False)
    yield _write_case("a full cache", draw, s, 6, cache=(3, 2))
    yield _write_case("one entry a page", draw, s, 3, cache=(7, 1))
    yield _write_case("large", draw, s, 3, scale=draw.large)
    yield _write_case("of a hybrid", draw, s, 7, gated=True)
    yield _write_case("of a hybrid, heads of 40, large", draw, s, 3, dim=40, gated=True, scale=draw.large)
    yield _write_case("of a hybrid, without norms", draw, s, 3, gated=True, norms="")
    name, args = _write_case("slices of wider caches", draw, s, 3, cache=(4, 16))
    k_cache, v_cache = (args[i][::2, :, 1:9] for i in (8, 9))
    yield Case(name, (*args[:8], k_cache, v_cache, draw.choices(1, 16, 3)[0]))


def _write_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    slots, name = torch.arange(tokens, device=draw.device), f"{tokens} tokens, {s.heads} + 2 x {s.kv_heads} heads"
    yield _write_case(name, draw, s, tokens, cache=(1, tokens), slots=slots, gated=s.value_heads > 0)


def _write_bytes(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    q_weight, k_weight, _, cos, sin, _, _, slots = rest[:8]
    return 2 * bytes_of(q, k, v) + bytes_of(q_weight, k_weight, cos, sin, slots)


def _write_flops(q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *_: Any) -> int:
    return sum(x.numel() * (3 if weight is None else 7) for x, weight in ((q, q_weight), (k, k_weight)))


ROPE = Subject(
    ops.rope, _rope_cases, _rope_real, lambda x, *_: 3 * x.numel(), others=(replace(TINY, kv_heads=1),)
)
NORM_ROPE_WRITE = Subject(
    ops.norm_rope_write, _write_cases, _write_real, _write_flops, bytes=_write_bytes, writes=(8, 9),
    others=tuple(replace(TINY, head_dim=dim, value_heads=0) for dim in (256, 512, 1024, 2048)),
)  # fmt: skip
