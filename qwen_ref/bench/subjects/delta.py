"""Gated DeltaNet: the convolution, the rule over many tokens, and all of it for one token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..shapes import TINY, Sizes
from .common import Case, Draw, Subject, bytes_of


def _conv_case(name: str, draw: Draw, s: Sizes, batch: int, tokens: int, *, width: int = 0, state: bool = True) -> Case:
    channels = 2 * s.key_heads * s.key_dim + s.value_heads * s.value_dim
    x, weight = draw.normal(batch, tokens, channels), draw.normal(channels, width or s.conv, scale=0.5)
    return Case(name, (x, weight, draw.normal(batch, channels, width or s.conv) if state else None))


def _conv_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    yield _conv_case("from nothing", draw, s, 2, 7, state=False)
    yield _conv_case("from a state", draw, s, 2, 7)
    yield _conv_case("one token", draw, s, 3, 1)
    yield _conv_case("fewer tokens than taps", draw, s, 2, 2, width=5)
    yield _conv_case("no tokens", draw, s, 2, 0)
    yield _conv_case("no sequences", draw, s, 0, 3)
    yield _conv_case("one tap", draw, s, 1, 5, width=1)
    yield _conv_case("four taps, many tokens", draw, replace(s, value_heads=1), 1, 150, width=4)
    x, weight, state = _conv_case("", draw, s, 2, 9).args
    yield Case("time varies fastest", (x.transpose(1, 2).contiguous().transpose(1, 2), weight, state))
    yield Case("slices of wider tensors", (x[:, ::2, 3:-5], weight[3:-5], state[:, 3:-5]))
    yield Case("large", (x * 50, weight, state * 50))


def _conv_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    args = _conv_case("", draw, s, 1, tokens).args
    yield Case(f"{tuple(args[0].shape)}", args)


def _rule_case(
    name: str,
    draw: Draw,
    s: Sizes,
    batch: int,
    tokens: int,
    *,
    decay: float = 0.3,  # g is uniform from minus this to zero
    alike: float = 0.3,  # the mean of the numbers of q and k: after silu they are positive more often than not
    scale: float = 1.0,
    held: float | None = 1.0,  # the size of the state; None: begins at zero
) -> Case:
    q, k = (draw.normal(batch, tokens, s.key_heads, s.key_dim, mean=alike) for _ in range(2))
    v = draw.normal(batch, tokens, s.value_heads, s.value_dim, scale=scale)
    g = draw.uniform(-decay, 0, batch, tokens, s.value_heads)
    beta = draw.uniform(0, 1, batch, tokens, s.value_heads, dtype=torch.float32).to(draw.dtype)
    shape = (batch, s.value_heads, s.key_dim, s.value_dim)
    return Case(name, (q, k, v, g, beta, None if held is None else draw.normal(*shape).float() * held))


def _rule_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    few = replace(s, key_heads=1, value_heads=2)
    yield _rule_case("one token", draw, s, 2, 1)
    yield _rule_case("one token from nothing", draw, s, 2, 1, held=None)
    yield _rule_case("three tokens", draw, s, 1, 3)
    yield _rule_case("no tokens", draw, s, 1, 0)
    yield _rule_case("no sequences", draw, s, 0, 70)
    yield _rule_case("half a chunk", draw, s, 1, 33, held=None)
    yield _rule_case("whole chunks", draw, few, 2, 128)
    yield _rule_case("a chunk and a token", draw, few, 1, 65)
    yield _rule_case("heads of 32 and 40", draw, replace(few, key_dim=32, value_dim=40), 1, 70)
    yield _rule_case("three value heads a key head", draw, replace(s, key_heads=1, value_heads=3), 1, 40)
    yield _rule_case("nothing forgotten", draw, few, 1, 100, decay=0.0)
    yield _rule_case("alike keys", draw, few, 1, 100, alike=1.0)
    yield _rule_case("a large state", draw, few, 1, 70, held=1e3)
    yield _rule_case("large values", draw, few, 1, 70, scale=1e3)
    q, k, v, g, beta, state = _rule_case("", draw, few, 1, 100).args
    yield Case("forgetting all, some forgetting all", (q, k, v, torch.where(g < -0.2, g * 300, g), beta, state))
    yield Case("writing nothing or all", (q, k, v, g, (beta > 0.5).to(beta.dtype), state))
    yield Case("large keys", (q * draw.large, k * draw.large, v, g, beta, state))
    yield Case("keys of zeros", (q[:, :20] * 0, k[:, :20] * 0, v[:, :20], g[:, :20], beta[:, :20], state))
    time = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, g, beta)]
    yield Case("heads before tokens", (*time, state.mT.contiguous().mT))
    packed = draw.normal(1, 80, 1, 4 * few.key_dim + 2 * few.value_dim).split([few.key_dim] * 4 + [few.value_dim] * 2, -1)
    values = torch.cat(packed[4:], dim=2)
    yield Case("slices of a wider tensor", (packed[1], packed[3], values, g[:, :80], beta[:, :80], None))


def _rule_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    yield _rule_case(f"{tokens} tokens, {s.key_heads}/{s.value_heads} heads", draw, s, 1, tokens)


def _rule_flops(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    return 7 * v.numel() * q.shape[-1]  # decay 1; read, write and output 2 each


def _step_case(
    name: str,
    draw: Draw,
    s: Sizes,
    batch: int,
    *,
    activation: str = "silu",
    bias: float = 0.0,  # the mean of a
    scale: float = 1.0,  # of the projection's numbers
    held: float = 1.0,  # the size of the state
) -> Case:
    keys, values = 2 * s.key_heads * s.key_dim, s.value_heads * s.value_dim
    mixed, window = draw.normal(batch, keys + values, scale=scale), draw.normal(batch, keys + values, s.conv, scale=scale)
    a, b = draw.normal(batch, s.value_heads, mean=bias), draw.normal(batch, s.value_heads, scale=2.0)
    z, state = draw.normal(batch, s.value_heads, s.value_dim), draw.normal(batch, s.value_heads, s.key_dim, s.value_dim)
    a_log, dt_bias = draw.normal(s.value_heads), draw.normal(s.value_heads)
    return Case(name, (
        mixed, window, draw.normal(keys + values, s.conv, scale=0.5), a, b, a_log, dt_bias,
        z, draw.normal(s.value_dim, scale=0.3, mean=1.0), s.eps, state.float() * held, activation,
    ))  # fmt: skip


def _step_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    yield _step_case("three sequences", draw, s, 3)
    yield _step_case("one sequence", draw, s, 1)
    yield _step_case("no sequences", draw, s, 0)
    yield _step_case("sigmoid", draw, s, 2, activation="sigmoid")
    yield _step_case("one key head, one tap", draw, replace(s, key_heads=1, value_heads=3, conv=1), 2)
    yield _step_case("four taps, heads of 32 and 40", draw, replace(s, key_dim=32, value_dim=40, conv=4), 1)
    few = replace(s, key_heads=1, value_heads=2)
    yield _step_case("heads too large for registers", draw, replace(few, key_dim=130, value_dim=72), 1)
    yield _step_case("forgetting all", draw, s, 2, bias=100.0)
    yield _step_case("forgetting nothing", draw, s, 2, bias=-30.0)
    yield _step_case("a large state", draw, s, 2, held=1e3)
    yield _step_case("large", draw, s, 2, scale=100.0)
    name, args = _step_case("slices of wider tensors", draw, s, 4)
    both = torch.stack((args[3], args[4]), dim=-1)
    state = torch.stack((args[10], args[10]), dim=1)[:, 0]
    a, b = both[::2].unbind(-1)
    yield Case(name, (args[0][::2], args[1][::2], args[2], a, b, *args[5:7], args[7][::2], *args[8:10], state[::2]))


def _step_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    yield _step_case(f"{tokens} sequences, {s.key_heads}/{s.value_heads} heads", draw, s, tokens)


def _step_flops(mixed: Tensor, window: Tensor, *rest: Any) -> int:
    return 7 * rest[8].numel() + 2 * window.numel()


def _step_bytes(mixed: Tensor, window: Tensor, *rest: Any) -> int:
    z, state = rest[5], rest[8]
    return bytes_of(mixed, *rest) + bytes_of(z, state) + 2 * bytes_of(window)  # the output has z's size


CAUSAL_CONV1D = Subject(
    ops.causal_conv1d, _conv_cases, _conv_real, lambda x, weight, _: 2 * x.numel() * weight.shape[1], needs="value_heads"
)
GATED_DELTA_RULE = Subject(
    ops.gated_delta_rule, _rule_cases, _rule_real, _rule_flops, needs="value_heads",
    others=(replace(TINY, key_dim=256),), tokens=(1, 1024, 16384), loops=True,
)  # fmt: skip
GATED_DELTA_STEP = Subject(
    ops.gated_delta_step, _step_cases, _step_real, _step_flops, bytes=_step_bytes, needs="value_heads", writes=(1, 10),
    others=tuple(replace(TINY, key_dim=k, value_dim=v) for k, v in ((32, 32), (32, 64), (64, 64), (64, 128))),
    tokens=(1, 8, 64),
)  # fmt: skip
