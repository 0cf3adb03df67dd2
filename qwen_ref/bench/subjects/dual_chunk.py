"""Dual chunk attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..shapes import Sizes
from .common import Case, Draw, Subject


def _case(name: str, draw: Draw, s: Sizes, held: int, count: int, span: int, *, batch: int = 1, kv_heads: int | None = None,
          padding: tuple[int, ...] = (), scale: float = 1.0, size: float = 1.0) -> Case:  # fmt: skip
    """The last `count` of `held` tokens, in chunks of `span`. padding: on the left of each row. size: of the scores."""
    kv_heads = kv_heads or s.kv_heads
    q = draw.normal(batch, s.heads, 3, count, s.head_dim, scale=size)
    k, v = draw.normal(batch, kv_heads, held, s.head_dim, scale=size), draw.normal(batch, kv_heads, held, s.head_dim)
    positions = torch.arange(held, device=draw.device)[None]
    if padding:
        positions = (positions - torch.tensor(padding, device=draw.device)[:, None]).clamp_min(-1)
    lengths = torch.full((len(positions),), scale, dtype=torch.float32, device=draw.device)
    return Case(name, (q, k, v, positions[:, held - count :], positions, span, lengths))


def _cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    yield _case("one chunk", draw, s, 37, 37, 40, batch=2)
    yield _case("two chunks", draw, s, 37, 37, 20)
    yield _case("many chunks", draw, s, 70, 70, 9, batch=2)
    yield _case("chunks of one token", draw, s, 9, 9, 1)
    yield _case("scaled", draw, s, 37, 37, 10, scale=1.25)
    yield _case("part of a prompt after a past", draw, s, 139, 70, 33)
    yield _case("decode", draw, s, 67, 1, 16, batch=2)
    yield _case("decode at the first token of a chunk", draw, s, 65, 1, 16)
    yield _case("left padding", draw, s, 40, 21, 12, batch=2, padding=(0, 7))
    yield _case("one head per kv head", draw, s, 21, 21, 6, kv_heads=s.heads)
    yield _case("one kv head", draw, s, 21, 21, 6, kv_heads=1)
    yield _case("large scores", draw, s, 21, 21, 6, size=4.0)
    yield _case("no queries", draw, s, 5, 0, 3)


def _real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    """In four chunks, as a million tokens have with the official sizes."""
    if tokens > 1:
        yield _case(f"prefill {tokens}", draw, s, tokens, tokens, max(tokens // 4, 1))
    else:
        yield _case("decode after 4096", draw, s, 4096, 1, 1024)


def _flops(q: Tensor, k: Tensor, *args: Any) -> int:
    queries, keys = q.shape[3], k.shape[2]
    pairs = queries * (2 * keys - queries + 1) // 2  # what the causal mask leaves, each with one of the three queries
    return 4 * q.shape[0] * q.shape[1] * q.shape[4] * pairs


DUAL_CHUNK_ATTENTION = Subject(ops.dual_chunk_attention, _cases, _real, _flops)
