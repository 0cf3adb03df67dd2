"""Attention: what the models call, packed prefill, and decode over a cache, in one piece or in pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..shapes import Sizes
from .common import Case, Draw, Subject, bytes_of


def _attention_case(name: str, draw: Draw, s: Sizes, shape: tuple[int, int, int], **options: Any) -> Case:
    batch, queries, keys = shape
    scale, mask = options.get("scale", 1.0), options.get("mask")
    q = draw.normal(batch, queries, s.heads, s.head_dim, scale=scale).transpose(1, 2)
    k = draw.normal(batch, keys, s.kv_heads, s.head_dim, scale=scale).transpose(1, 2)
    v = draw.normal(batch, keys, s.kv_heads, s.head_dim).transpose(1, 2)
    return Case(name, (q, k, v, mask))


def _attention_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    yield _attention_case("prefill", draw, s, (2, 37, 37))
    yield _attention_case("chunk after a past", draw, s, (1, 5, 38))
    yield _attention_case("long chunk after a past", draw, s, (1, 70, 139))
    yield _attention_case("decode", draw, s, (2, 1, 67))
    yield _attention_case("first token", draw, s, (1, 1, 1))
    yield _attention_case("no queries", draw, s, (2, 0, 5))
    positions = torch.arange(21, device=draw.device)[None]
    yield _attention_case("sliding window", draw, s, (1, 21, 21), mask=ops.visible(positions, positions, window=4))
    padded = torch.stack([positions[0], (positions[0] - 3).clamp(min=-1)])
    yield _attention_case("left padding", draw, s, (2, 21, 21), mask=ops.visible(padded, padded))
    longer = torch.arange(150, device=draw.device) - torch.tensor([[0], [70]], device=draw.device)
    longer = longer.clamp(min=-1)
    yield _attention_case("decode after left padding", draw, s, (2, 1, 150), mask=ops.visible(longer[:, -1:], longer))
    yield _attention_case("large scores", draw, s, (1, 21, 21), scale=6.0)
    yield _attention_case("one head per kv head", draw, s, (1, 3, 21))._replace(args=_every_head(draw, s))
    cache = draw.normal(2, 2, s.kv_heads, 48, s.head_dim)  # the filled part of a longer cache
    q = draw.normal(2, 3, s.heads, s.head_dim).transpose(1, 2)
    yield Case("part of a cache", (q, cache[0, :, :, 3:24], cache[1, :, :, 3:24], None))


def _every_head(draw: Draw, s: Sizes) -> tuple[Any, ...]:
    return (*(draw.normal(1, s.heads, t, s.head_dim) for t in (3, 21, 21)), None)


def _attention_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    if tokens > 1:
        yield _attention_case(f"prefill {tokens}", draw, s, (1, tokens, tokens))
    else:
        yield _attention_case("decode after 4096", draw, s, (1, 1, 4096))


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> int:
    queries, keys = q.shape[2], k.shape[2]
    pairs = queries * (2 * keys - queries + 1) // 2  # what the causal mask leaves
    return 4 * q.shape[0] * q.shape[1] * q.shape[3] * pairs


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(B + 1,) int32: where each sequence begins, and the end of the last."""
    return torch.tensor([sum(lengths[:b]) for b in range(len(lengths) + 1)], dtype=torch.int32, device=device)


def _prefill_case(
    name: str, draw: Draw, s: Sizes, lengths: Sequence[int], held: Sequence[int] | None = None, *,
    window: int | None = None, kv_heads: int | None = None, scale: float = 1.0,
) -> Case:  # fmt: skip
    """Sequences of so many queries each, and so many keys (as many, unless told)."""
    held, kv_heads = lengths if held is None else held, kv_heads or s.kv_heads
    q = draw.normal(sum(lengths), s.heads, s.head_dim, scale=scale)
    k = draw.normal(sum(held), kv_heads, s.head_dim, scale=scale)
    v = draw.normal(sum(held), kv_heads, s.head_dim)
    return Case(name, (q, k, v, _starts(lengths, draw.device), _starts(held, draw.device), window))


def _prefill_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    yield _prefill_case("mixed lengths", draw, s, (1, 19, 0, 5))
    yield _prefill_case("chunks after a past", draw, s, (3, 18), (50, 19))
    yield _prefill_case("long chunk after a past", draw, s, (70,), (139,))
    yield _prefill_case("window", draw, s, (19, 5), window=4)
    yield _prefill_case("window of one", draw, s, (7, 2), window=1)
    yield _prefill_case("window longer than the sequences", draw, s, (5, 2), (40, 2), window=100)
    yield _prefill_case("window after a past", draw, s, (3, 70), (90, 139), window=70)
    yield _prefill_case("one head per kv head", draw, s, (9,), kv_heads=s.heads)
    yield _prefill_case("one kv head", draw, s, (9,), kv_heads=1)
    yield _prefill_case("one token", draw, s, (1,))
    yield _prefill_case("no tokens", draw, s, (0, 0))
    yield _prefill_case("no sequences", draw, s, ())
    yield _prefill_case("large scores", draw, s, (21,), scale=6.0)
    joint = draw.normal(19, s.heads + 2 * s.kv_heads, s.head_dim)  # what one projection gives
    starts = _starts((17, 2), draw.device)
    yield Case("parts of one projection", (*joint.split((s.heads, s.kv_heads, s.kv_heads), dim=1), starts, starts, None))


def _prefill_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    yield _prefill_case(f"one sequence of {tokens}", draw, s, (tokens,))
    if tokens >= 16:
        parts = tokens // 2, tokens // 4, tokens // 16
        lengths = (*parts, tokens - sum(parts))
        yield _prefill_case(f"sequences of {', '.join(map(str, lengths))}", draw, s, lengths)


def _pairs(queries: int, keys: int, window: int | None) -> int:
    """How many keys the last `queries` of `keys` positions see together."""

    def first(n: int) -> int:  # what the first n positions see: 1 + 2 + ..., from the window's size on always that
        w = n if window is None else min(n, window)
        return w * (w + 1) // 2 + (n - w) * w

    return first(keys) - first(keys - queries)


def _prefill_sequences(args: tuple[Any, ...]) -> list[tuple[int, int]]:
    """(queries, keys) of every sequence."""
    queries, keys = (starts.diff().tolist() for starts in args[3:5])
    return list(zip(queries, keys, strict=True))


def _prefill_flops(*args: Any) -> int:
    q, window = args[0], args[5]
    return 4 * q.shape[1] * q.shape[2] * sum(_pairs(*sequence, window) for sequence in _prefill_sequences(args))


def _prefill_bytes(*args: Any) -> int:
    """Keys that no query sees are not read."""
    q, k, _, q_starts, k_starts, window = args
    seen = sum(t and (s if window is None else min(s, t + window - 1)) for t, s in _prefill_sequences(args))
    return 2 * bytes_of(q) + bytes_of(q_starts, k_starts) + 2 * seen * k.shape[1] * k.shape[2] * k.element_size()


def _decode_case(
    name: str, draw: Draw, s: Sizes, lengths: Sequence[int], room: int, *,
    window: int | None = None, kv_heads: int | None = None, scale: float = 1.0, rest: float | None = None,
) -> Case:  # fmt: skip
    """Sequences of so many tokens each in a cache with more room. rest: what is behind the tokens."""
    kv_heads = kv_heads or s.kv_heads
    q = draw.normal(len(lengths), s.heads, s.head_dim, scale=scale)
    k = draw.normal(len(lengths), kv_heads, room, s.head_dim, scale=scale)
    v = draw.normal(len(lengths), kv_heads, room, s.head_dim)
    held = torch.tensor(lengths, dtype=torch.int32, device=draw.device)
    if rest is not None:
        behind = (torch.arange(room, device=draw.device) >= held[:, None])[:, None, :, None]
        k, v = k.masked_fill(behind, rest), v.masked_fill(behind, rest)
    return Case(name, (q, k, v, held, window))


def _decode_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    yield _decode_case("ragged", draw, s, (1, 150, 0, 37), 150)
    yield _decode_case("many tokens", draw, s, (1100, 3), 1100)
    yield _decode_case("NaN behind the tokens", draw, s, (1, 150, 0, 63), 200, rest=float("nan"))
    yield _decode_case("window", draw, s, (1, 150, 0, 37), 150, window=5)
    yield _decode_case("window longer than the sequences", draw, s, (3, 20), 21, window=100)
    yield _decode_case("window and NaN", draw, s, (2, 150, 0), 160, window=70, rest=float("nan"))
    yield _decode_case("one token", draw, s, (1,), 1)
    yield _decode_case("nothing held", draw, s, (0, 0), 70)
    yield _decode_case("no sequences", draw, s, (), 5)
    yield _decode_case("one head per kv head", draw, s, (9, 70), 70, kv_heads=s.heads)
    yield _decode_case("one kv head", draw, s, (9, 70), 70, kv_heads=1)
    yield _decode_case("large scores", draw, s, (130, 3), 130, scale=6.0)
    q, k, v, lengths, _ = _decode_case("", draw, s, (9, 70), 70).args
    cache = torch.stack((k, v)).transpose(2, 3).contiguous().transpose(2, 3)  # (2, B, K, S, D) stored as (2, B, S, K, D)
    yield Case("tokens before heads", (q.transpose(0, 1).contiguous().transpose(0, 1), cache[0], cache[1], lengths, None))


def _decode_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    """`tokens` sequences of one new token each, at most as many as a GPU's memory has room for."""
    batch, room = min(tokens, 16), 8192 if tokens == 1 else 4096
    yield _decode_case(f"{batch} of {room}", draw, s, (room,) * batch, room)


def _decode_seen(lengths: Tensor, window: int | None) -> list[int]:
    return [length if window is None else min(length, window) for length in lengths.tolist()]


def _decode_flops(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int | None) -> int:
    return 4 * q.shape[1] * q.shape[2] * sum(_decode_seen(lengths, window))


def _decode_bytes(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int | None) -> int:
    """What lies behind the lengths or before the window is not read."""
    seen = sum(_decode_seen(lengths, window))
    return 2 * bytes_of(q) + bytes_of(lengths) + 2 * seen * k.shape[1] * k.shape[3] * k.element_size()


def _paged_case(
    name: str, draw: Draw, s: Sizes, lengths: Sequence[int], page: int, columns: int, *,
    window: int | None = None, unused: int | None = None, rest: float | None = None,
) -> Case:  # fmt: skip
    """`_decode_case` with its cache cut into pages in random order. unused: the table's entries behind the lengths."""
    q, k, v, held, _ = _decode_case("", draw, s, lengths, columns * page, rest=rest).args
    count = len(lengths) * columns
    table = draw.choices(1, count, count).view(len(lengths), columns)  # sequence b's i-th page is page table[b, i]
    pages = []
    for x in (k, v):
        cut = x.unflatten(2, (columns, page)).transpose(1, 2).flatten(0, 1)  # (B * L, K, page, D)
        pages.append(cut if x.is_meta else torch.empty_like(cut).index_copy_(0, table.flatten(), cut))
    if unused is not None:
        table = table.masked_fill(torch.arange(columns, device=draw.device) * page >= held[:, None], unused)
    return Case(name, (q, *pages, table.int(), held, window))


def _paged_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    nan, far = float("nan"), torch.iinfo(torch.int32).max
    yield _paged_case("pages of 16", draw, s, (1, 150, 0, 37), 16, 10)
    yield _paged_case("pages of 64", draw, s, (1, 150, 0, 64), 64, 3)
    yield _paged_case("pages of 256", draw, s, (1, 300), 256, 2)
    yield _paged_case("unused entries -1, NaN behind the tokens", draw, s, (1, 150, 0, 32), 16, 12, unused=-1, rest=nan)
    yield _paged_case("unused entries far outside", draw, s, (5, 65), 64, 4, unused=far, rest=nan)
    yield _paged_case("window", draw, s, (1, 150, 0, 37), 16, 10, window=20)
    yield _paged_case("window longer than the sequences", draw, s, (3, 20), 16, 2, window=100)
    yield _paged_case("one token", draw, s, (1,), 16, 1)
    yield _paged_case("nothing held", draw, s, (0, 0), 16, 5, unused=-1)
    q, k, v, table, lengths, _ = _paged_case("", draw, s, (9, 70), 16, 5).args
    k, v = torch.stack((k, v), dim=1).unbind(1)  # keys and values of a page side by side
    shared = table[:1].expand(2, -1)  # and both sequences read the same pages
    yield Case("shared pages, keys beside values", (q, k, v, shared, lengths, None))


def _paged_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    batch, room = min(tokens, 16), 8192 if tokens == 1 else 4096
    for page in (16, 256):
        yield _paged_case(f"{batch} of {room}, pages of {page}", draw, s, (room,) * batch, page, room // page)


def _paged_flops(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, window: int | None) -> int:
    return _decode_flops(q, k, v, lengths, window)


def _paged_bytes(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, window: int | None) -> int:
    """`_decode_bytes`, and the entries of the table."""
    page, held, seen = k.shape[2], lengths.tolist(), _decode_seen(lengths, window)
    entries = sum(-(-n // page) - (n - m) // page for n, m in zip(held, seen, strict=True))
    return _decode_bytes(q, k, v, lengths, window) + table.element_size() * entries


ATTENTION = Subject(ops.attention, _attention_cases, _attention_real, _attention_flops)
ATTENTION_PREFILL = Subject(ops.attention_prefill, _prefill_cases, _prefill_real, _prefill_flops, bytes=_prefill_bytes)
ATTENTION_DECODE = Subject(ops.attention_decode, _decode_cases, _decode_real, _decode_flops, bytes=_decode_bytes)
ATTENTION_PAGED = Subject(ops.attention_paged, _paged_cases, _paged_real, _paged_flops, bytes=_paged_bytes)
