"""Residual streams, and attention over chosen blocks: what Qwen4-Exp alone has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..shapes import TINY, Sizes
from .common import Case, Draw, Subject


def _mix_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    def case(name: str, *shape: int, scale: float = 1.0) -> Case:
        return Case(name, (draw.normal(*shape, scale=scale), draw.normal(*shape, scale=3.0)))

    n, hidden = s.streams, s.hidden
    yield case("tokens", 2, 3, n, hidden)
    yield case("one token", 1, 1, n, hidden)
    yield case("no leading axes", n, hidden)
    yield case("odd width", 7, n, 33)
    yield case("one stream", 5, 1, hidden)
    yield case("no tokens", 0, n, hidden)
    yield case("large", 3, n, hidden, scale=draw.large)
    wide = draw.normal(3, n, 2 * hidden)
    yield Case("halves of a wider tensor", (wide[..., :hidden], wide[..., hidden:]))
    yield Case("streams first", (draw.normal(n, 5, hidden).transpose(0, 1), draw.normal(5, n, hidden)))


def _mix_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    shape = (1, tokens, s.streams, s.hidden)
    yield Case(str(shape), (draw.normal(*shape), draw.normal(*shape)))


def _write_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    for name, (x, _) in _mix_cases(s, draw):
        out = draw.normal(*x.shape[:-2], x.shape[-1], scale=2.0)
        yield Case(name, (x, out, draw.normal(*x.shape[:-1], scale=6.0)))


def _write_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    x = draw.normal(1, tokens, s.streams, s.hidden)
    yield Case(str(tuple(x.shape)), (x, draw.normal(1, tokens, s.hidden), draw.normal(1, tokens, s.streams)))


def _score_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    for name, batch, queries, blocks in (
        ("prompt", 2, 7, 5), ("decode", 3, 1, 9), ("one block", 1, 4, 1), ("no blocks", 1, 3, 0), ("no queries", 2, 0, 4),
    ):  # fmt: skip
        yield Case(name, (draw.normal(batch, queries, s.index_heads, s.index_dim), draw.normal(batch, blocks, s.index_dim)))


def _score_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    held = max(tokens, 16384)
    q = draw.normal(1, tokens, s.index_heads, s.index_dim)
    yield Case(f"{tokens} of {held} tokens", (q, draw.normal(1, held // s.ratio, s.index_dim)))


def _sparse_case(name: str, draw: Draw, s: Sizes, held: int, queries: int, top: int, *, batch: int = 1,
                 padding: tuple[int, ...] = (), ratio: int | None = None) -> Case:  # fmt: skip
    """The last `queries` of `held` tokens, each reading `top` blocks that it has; padding on the left of each row."""
    ratio = ratio or s.ratio
    q = draw.normal(batch, s.heads, queries, s.head_dim)
    k, v = draw.normal(batch, s.kv_heads, held, s.head_dim), draw.normal(batch, s.kv_heads, held, s.head_dim)
    starts = torch.tensor(padding, device=draw.device) if padding else None
    complete = ops.complete_blocks(queries, held, ratio, starts, q.device).expand(batch, -1)  # (B, T)
    blocks = draw.choices(batch * queries, max(held // ratio, 1), top).view(batch, queries, top)  # (B, T, k)
    blocks = torch.where(blocks < complete[..., None], blocks, -1)
    none = (blocks < 0).all(-1) & (complete > 0)  # who has a complete block chooses one
    blocks = torch.cat((blocks[..., :1].masked_fill(none[..., None], 0), blocks[..., 1:]), dim=-1)
    return Case(name, (q, k, v, blocks, starts, ratio))


def _sparse_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    yield _sparse_case("prompt", draw, s, 23, 23, 3, batch=2)
    yield _sparse_case("decode", draw, s, 31, 1, 4, batch=2)
    yield _sparse_case("chunk after a past", draw, s, 40, 9, 5)
    yield _sparse_case("no block chosen", draw, s, 2, 2, 1)
    yield _sparse_case("blocks of one token", draw, s, 11, 11, 4, ratio=1)
    yield _sparse_case("left padding", draw, s, 29, 6, 3, batch=2, padding=(0, 11))
    yield _sparse_case("no queries", draw, s, 9, 0, 2)


def _sparse_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    held = max(tokens, 16384)
    yield _sparse_case(f"{tokens} of {held} tokens", draw, s, held, tokens, s.budget // s.ratio)


def _sparse_flops(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, starts: Any, ratio: int) -> int:
    return 4 * q.shape[0] * q.shape[1] * q.shape[2] * q.shape[3] * (blocks.shape[2] * ratio + ratio // 2)


def _score_flops(q: Tensor, keys: Tensor) -> int:
    return 2 * q.numel() * keys.shape[1]


STREAM_MIX = Subject(ops.stream_mix, _mix_cases, _mix_real, lambda x, logits: 7 * x.numel(), needs="streams")
STREAM_WRITE = Subject(ops.stream_write, _write_cases, _write_real, lambda x, out, logits: 2 * x.numel(), needs="streams")
BLOCK_SCORES = Subject(ops.block_scores, _score_cases, _score_real, _score_flops, needs="streams", tokens=(1, 16, 1024))
SPARSE_BLOCK_ATTENTION = Subject(
    ops.sparse_block_attention, _sparse_cases, _sparse_real, _sparse_flops, needs="streams",
    others=tuple(replace(TINY, head_dim=dim) for dim in (64, 128)), tokens=(1, 16, 1024),
)  # fmt: skip
