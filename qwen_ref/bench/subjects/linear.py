"""Linear projections."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from torch import Tensor

from ... import ops
from ..shapes import VOCABULARY, Sizes
from .common import Case, Draw, Subject


def _case(name: str, draw: Draw, shape: tuple[int, ...], columns: int, *, bias: bool = False, scale: float = 1.0) -> Case:
    weight = draw.normal(columns, shape[-1], scale=shape[-1] ** -0.5)
    return Case(name, (draw.normal(*shape, scale=scale), weight, draw.normal(columns) if bias else None))


def _cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    wide = s.kv_heads * s.head_dim
    for count in (1, 2, 3, 5, 16, 17, 0):
        yield _case(f"{count} rows", draw, (count, s.hidden), wide)
    yield _case("many rows and columns", draw, (197, 131), 300)
    yield _case("one vector", draw, (s.hidden,), wide)
    yield _case("leading axes", draw, (2, 1, 3, s.hidden), wide, bias=True)
    for count in (1, 4, 7, 0):
        yield _case(f"{count} rows, bias", draw, (count, s.hidden), wide, bias=True)
    for count in (1, 6):
        yield _case(f"{count} rows, odd sizes", draw, (count, 1031), 37, bias=True)
        yield _case(f"{count} rows, small", draw, (count, 3), 5, bias=True)
        yield _case(f"{count} rows, one column", draw, (count, 130), 1)
        yield _case(f"{count} rows, long sums", draw, (count, 4104), 20)
        yield _case(f"{count} rows, large", draw, (count, s.hidden), wide, scale=draw.large)
        _, (x, weight, bias) = _case("", draw, (count, s.hidden), wide, bias=True)
        hidden = draw.normal(count, 3, s.hidden)
        yield Case(f"{count} rows, last of a sequence", (hidden[:, -1], weight, bias))
        yield Case(f"{count} rows, every second number", (draw.normal(count, 2 * s.hidden)[:, ::2], weight, bias))
        yield Case(f"{count} rows, one row repeated", (x[:1].expand(count, -1), weight, bias))
        padded = draw.normal(wide, s.hidden + 5, scale=s.hidden**-0.5)
        yield Case(f"{count} rows, padded weight", (x, padded[:, 2:-3], draw.normal(2 * wide)[::2]))
        yield Case(f"{count} rows, transposed weight", (x, draw.normal(s.hidden, wide, scale=s.hidden**-0.5).t(), None))


def _real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    """q, k and v, o, gate and up, down, each shape once; the head, whose rows are one per sequence."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    shapes = [(q, s.hidden), (kv, s.hidden), (s.hidden, q)]
    if not s.experts:
        shapes += [(s.intermediate, s.hidden), (s.hidden, s.intermediate)]
    for columns, inner in dict.fromkeys([*shapes, (VOCABULARY, s.hidden)]):
        yield _case(f"{tokens} x ({columns}, {inner})", draw, (tokens, inner), columns)


def _flops(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    return 2 * prod(x.shape[:-1]) * weight.numel()


LINEAR = Subject(ops.linear, _cases, _real, _flops)
