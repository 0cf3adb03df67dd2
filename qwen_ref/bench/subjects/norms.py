"""Norms and the gated product: operations on rows of numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ... import ops
from ..shapes import TINY, Sizes
from .common import Case, Draw, Subject


def _rms_norm_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    def case(name: str, x: Tensor) -> Case:
        return Case(name, (x, draw.normal(x.shape[-1], scale=0.3, mean=1.0), s.eps))

    yield case("hidden", draw.normal(1, 3, s.hidden))
    yield case("one token", draw.normal(1, 1, s.hidden))
    yield case("one row", draw.normal(s.hidden))
    yield case("heads", draw.normal(2, 3, s.heads, s.head_dim))
    yield case("odd width", draw.normal(7, 33))
    yield case("several blocks", draw.normal(2, 1501))  # an overrun to the next power of two stays within the guard
    yield case("many rows", draw.normal(300, 24))
    yield case("width 1", draw.normal(5, 1))
    yield case("no rows", draw.normal(0, s.hidden))
    yield case("right half of a wider tensor", draw.normal(5, 2 * s.hidden)[:, s.hidden :])
    yield case("transposed heads", draw.normal(2, 3, s.heads, s.head_dim).transpose(1, 2))
    yield case("every second number", draw.normal(4, 66)[:, ::2])
    yield case("as small as eps", draw.normal(3, s.hidden, scale=s.eps**0.5))
    yield case("large", draw.normal(3, s.hidden, scale=draw.large))
    yield case("zeros", draw.normal(3, s.hidden, scale=0.0))


def _rms_norm_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    yield Case(f"(1, {tokens}, {s.hidden})", (draw.normal(1, tokens, s.hidden), draw.normal(s.hidden, mean=1.0), s.eps))
    heads = draw.normal(1, tokens, s.heads, s.head_dim)
    yield Case(f"(1, {tokens}, {s.heads}, {s.head_dim})", (heads, draw.normal(s.head_dim, mean=1.0), s.eps))


def _add_rms_norm_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    for name, (x, weight, eps) in _rms_norm_cases(s, draw):
        residual = draw.normal(*x.shape, scale=draw.large if name == "large" else 1.0)
        args = (x, torch.zeros_like(x) if name in ("as small as eps", "zeros") else residual, weight, eps)
        yield Case(name, args)
        if name in ("hidden", "odd width", "transposed heads", "large"):
            yield Case(f"{name}, centred", (*args, True))


def _add_rms_norm_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    x, residual = draw.normal(1, tokens, s.hidden), draw.normal(1, tokens, s.hidden)
    weight = draw.normal(s.hidden, mean=1.0)
    yield Case(f"(1, {tokens}, {s.hidden})", (x, residual, weight, s.eps, *([True] if s.value_heads else [])))  # of a hybrid


def _zero_centred_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    yield from _rms_norm_cases(s, draw)
    for name, x in (
        ("a weight for each stream", draw.normal(2, 3, 4, s.head_dim)),
        ("streams of one token", draw.normal(5, s.head_dim)),
        ("streams, transposed", draw.normal(2, 4, 3, s.head_dim).transpose(1, 2)),
        ("one stream", draw.normal(3, 1, s.head_dim)),
        ("no tokens of streams", draw.normal(0, 4, s.head_dim)),
    ):
        yield Case(name, (x, draw.normal(*x.shape[-2:], scale=0.3), s.eps))


def _gated_rms_norm_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    for i, (name, (x, weight, eps)) in enumerate(_rms_norm_cases(s, draw)):
        yield Case(name, (x, draw.normal(*x.shape, scale=3.0), weight, eps, "sigmoid" if i % 2 else "silu"))
    x = draw.normal(2, 3, s.value_heads, s.value_dim)
    gate = draw.normal(2, 3, s.value_heads, 2 * s.value_dim)[..., s.value_dim :]
    yield Case("a gate out of the projection", (x, gate, draw.normal(s.value_dim), s.eps))
    yield Case("a wide gate", (x, gate * 40, draw.normal(s.value_dim), s.eps, "sigmoid"))


def _gated_rms_norm_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    x, gate = draw.normal(1, tokens, s.value_heads, s.value_dim), draw.normal(1, tokens, s.value_heads, s.value_dim)
    yield Case(f"(1, {tokens}, {s.value_heads}, {s.value_dim})", (x, gate, draw.normal(s.value_dim, mean=1.0), s.eps))


def _swiglu_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    yield Case("intermediate", (draw.normal(1, 3, s.intermediate), draw.normal(1, 3, s.intermediate)))
    yield Case("one token", (draw.normal(1, 1, s.intermediate), draw.normal(1, 1, s.intermediate)))
    yield Case("one row", (draw.normal(s.intermediate), draw.normal(s.intermediate)))
    yield Case("odd width", (draw.normal(5, 1031), draw.normal(5, 1031)))
    yield Case("width 1", (draw.normal(5, 1), draw.normal(5, 1)))
    yield Case("no rows", (draw.normal(0, s.intermediate), draw.normal(0, s.intermediate)))
    gate, up = draw.normal(3, 2 * s.intermediate).chunk(2, dim=-1)
    yield Case("halves of one projection", (gate, up))
    yield Case("different strides", (draw.normal(2, 5, 3).transpose(0, 1), draw.normal(5, 2, 6)[..., ::2]))
    yield Case("large", (draw.normal(3, s.intermediate, scale=200), draw.normal(3, s.intermediate, scale=10)))


def _swiglu_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    shape = (1, tokens, s.intermediate)
    yield Case(f"{shape}", (draw.normal(*shape), draw.normal(*shape)))


def _sigmoid_gate_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    heads, gates = draw.normal(2, 3, s.heads, s.head_dim), draw.normal(2, 3, s.heads, 2 * s.head_dim)[..., s.head_dim :]
    yield Case("the output of attention, a gate out of the projection", (heads, gates))
    yield Case("heads before tokens", (heads.transpose(1, 2).contiguous().transpose(1, 2), gates, heads))
    one, x = draw.normal(5, 1, scale=3.0), draw.normal(5, s.hidden)
    yield Case("one gate a row", (x, one))
    yield Case("beside the chosen experts", (x, one, draw.normal(5, s.hidden)))
    yield Case("one token", (x[:1], one[:1], x[1:2]))
    yield Case("one row", (x[0], draw.normal(s.hidden), x[1]))
    yield Case("odd width", (draw.normal(5, 1031), draw.normal(5, 1031), draw.normal(5, 1031)))
    yield Case("width 1", (draw.normal(5, 1), one))
    yield Case("no rows", (x[:0], one[:0], x[:0]))
    yield Case("slices", (draw.normal(4, 66)[:, ::2], draw.normal(4, 66)[:, 33:], draw.normal(33, 4).t()))
    yield Case("gates open and shut", (x, one * 60, x * 2))
    yield Case("large", (x * draw.large, one, x))


def _sigmoid_gate_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    heads, gates = draw.normal(1, tokens, s.heads, s.head_dim), draw.normal(1, tokens, s.heads, 2 * s.head_dim)
    yield Case(f"(1, {tokens}, {s.heads}, {s.head_dim})", (heads, gates[..., s.head_dim :]))
    x = draw.normal(tokens, s.hidden)
    yield Case(f"({tokens}, {s.hidden}) beside experts", (x, draw.normal(tokens, 1), draw.normal(tokens, s.hidden)))


def _take_columns_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    x = draw.normal(2, 3, 4 * s.hidden)
    yield Case("all in another order", (x, draw.choices(1, 4 * s.hidden, 4 * s.hidden)[0]))
    yield Case("one token", (x[:1, :1], draw.choices(1, 4 * s.hidden, 4 * s.hidden)[0]))
    yield Case("one row", (x[0, 0], draw.choices(1, 4 * s.hidden, 7)[0]))
    yield Case("some, and some twice", (x, draw.integers(0, 4 * s.hidden, 33, dtype=torch.int64)))
    yield Case("width 1", (draw.normal(5, 1), draw.integers(0, 1, 3, dtype=torch.int64)))
    yield Case("none", (x, draw.integers(0, 1, 0, dtype=torch.int64)))
    yield Case("no rows", (x[:0], draw.choices(1, 4 * s.hidden, 9)[0]))
    yield Case("slices", (draw.normal(4, 66)[:, ::2], draw.choices(1, 33, 33)[0]))
    yield Case("large", (x * draw.large, draw.choices(1, 4 * s.hidden, 20)[0]))


def _take_columns_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    width = 2 * s.key_heads * s.key_dim + 2 * s.value_heads * s.value_dim
    yield Case(f"(1, {tokens}, {width})", (draw.normal(1, tokens, width), draw.choices(1, width, width)[0]))


_WIDE = tuple(replace(TINY, hidden=2**i, value_dim=2**i) for i in range(7, 15))  # of a hidden state, or of a value head
RMS_NORM = Subject(ops.rms_norm, _rms_norm_cases, _rms_norm_real, lambda x, *_: 4 * x.numel(), others=_WIDE)
ADD_RMS_NORM = Subject(ops.add_rms_norm, _add_rms_norm_cases, _add_rms_norm_real, lambda x, *_: 5 * x.numel(), others=_WIDE)
ZERO_CENTRED_RMS_NORM = Subject(
    ops.zero_centred_rms_norm, _zero_centred_cases, _rms_norm_real, lambda x, *_: 5 * x.numel(), others=_WIDE
)
GATED_RMS_NORM = Subject(
    ops.gated_rms_norm, _gated_rms_norm_cases, _gated_rms_norm_real, lambda x, *_: 8 * x.numel(), needs="value_heads",
    others=_WIDE,
)  # fmt: skip
SIGMOID_GATE = Subject(
    ops.sigmoid_gate, _sigmoid_gate_cases, _sigmoid_gate_real, lambda x, gate, residual=None: 5 * x.numel(), needs="value_heads"
)
TAKE_COLUMNS = Subject(ops.take_columns, _take_columns_cases, _take_columns_real, lambda *_: 0, needs="value_heads")
SWIGLU = Subject(ops.swiglu, _swiglu_cases, _swiglu_real, lambda gate, _: 5 * gate.numel())
