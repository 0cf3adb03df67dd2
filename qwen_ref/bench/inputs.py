"""What every operation is tried on: awkward inputs for the check, a model's own for the bench, and what a call must cost.

All tensors of a case are drawn from a seed. Which values are read and written only once is counted in `Cost`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..errors import RequestError
from .shapes import Sizes


class Case(NamedTuple):
    name: str
    args: tuple[Any, ...]


class Cost(NamedTuple):
    """The least a call can do: every input read once and every output written once, and the formula's arithmetic."""

    bytes: int
    flops: int


class Draw:
    """Random tensors of one dtype on one device, the same for the same seed. On "meta" they have no values."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        values = torch.randn(shape, generator=self._generator) * scale + mean
        return values.to(self.device, self.dtype)

    def distinct(self, rows: int, columns: int, step: float = 0.125) -> Tensor:
        """Rows of different numbers, multiples of `step` around zero in random order: no ties, in any dtype."""
        if self.device.type == "meta":
            return torch.empty(rows, columns, dtype=self.dtype, device="meta")
        order = torch.rand(rows, columns, generator=self._generator).argsort(-1)
        return ((order - columns // 2) * step).to(self.device, self.dtype)

    def choices(self, rows: int, of: int, k: int) -> Tensor:
        """(rows, k) int64: k different numbers below `of` in each row."""
        if self.device.type == "meta":
            return torch.empty(rows, k, dtype=torch.int64, device="meta")
        return torch.rand(rows, of, generator=self._generator).argsort(-1)[:, :k].to(self.device)

    @property
    def large(self) -> float:
        """A size whose square fp32 can still sum, and which the dtype can hold several times."""
        return 5e3 if self.dtype == torch.float16 else 1e15


@dataclass(frozen=True)
class Subject:
    """One operation under test."""

    formula: Callable[..., Any]
    cases: Callable[[Sizes, Draw], Iterator[Case]]  # awkward ones
    real: Callable[[Sizes, int, Draw], Iterator[Case]]  # a model's own, for so many tokens
    flops: Callable[..., int]  # of a call's arguments
    moe: bool = False
    observe: Callable[[tuple[Any, ...], tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None

    def cost(self, *args: Any) -> Cost:
        """Bytes and FLOPs of a call. Runs the formula on tensors without storage to know its outputs."""
        shapes = [torch.empty_like(a, device="meta") if isinstance(a, Tensor) else a for a in args]
        touched = [a for a in args if isinstance(a, Tensor)]
        if self.formula is ops.moe_experts:  # its outputs depend on values, and only the chosen experts are read
            x, gate_up, down, weights, experts = args
            used = min(gate_up.shape[0], experts.numel())
            return Cost(2 * _bytes(x) + _bytes(weights, experts) + used * _bytes(gate_up[0], down[0]), self.flops(*args))
        return Cost(_bytes(*touched, *as_tuple(self.formula(*shapes))), self.flops(*args))


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _rms_norm_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    def case(name: str, x: Tensor) -> Case:
        return Case(name, (x, draw.normal(x.shape[-1], scale=0.3, mean=1.0), s.eps))

    yield case("hidden", draw.normal(1, 3, s.hidden))
    yield case("one token", draw.normal(1, 1, s.hidden))
    yield case("one row", draw.normal(s.hidden))
    yield case("heads", draw.normal(2, 3, s.heads, s.head_dim))
    yield case("odd width", draw.normal(7, 33))
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
        yield Case(name, (x, torch.zeros_like(x) if name in ("as small as eps", "zeros") else residual, weight, eps))


def _add_rms_norm_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    x, residual = draw.normal(1, tokens, s.hidden), draw.normal(1, tokens, s.hidden)
    yield Case(f"(1, {tokens}, {s.hidden})", (x, residual, draw.normal(s.hidden, mean=1.0), s.eps))


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


def _rope_case(name: str, draw: Draw, x: Tensor, batch: int, first: int = 0) -> Case:
    positions = torch.arange(batch * x.shape[2], device=x.device).view(batch, -1) + first  # rows of a batch differ
    tables = ops.rope_tables(positions, ops.rope_frequencies(x.shape[-1], 1e6).to(x.device), 1.0, draw.dtype)
    return Case(name, (x, *tables))


def _rope_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    yield _rope_case("queries as the model has them", draw, draw.normal(2, 3, s.heads, s.head_dim).transpose(1, 2), 2)
    yield _rope_case("one table for the batch", draw, draw.normal(2, 3, s.kv_heads, s.head_dim).transpose(1, 2), 1)
    yield _rope_case("one token", draw, draw.normal(1, s.heads, 1, s.head_dim), 1, first=30_000)
    yield _rope_case("one head", draw, draw.normal(2, 1, 5, s.head_dim), 2)
    yield _rope_case("heads no power of two", draw, draw.normal(1, 37, 3, s.head_dim), 1)
    yield _rope_case("odd half", draw, draw.normal(2, 3, 5, 22), 2)
    yield _rope_case("one pair", draw, draw.normal(2, 3, 5, 2), 2)
    yield _rope_case("no tokens", draw, draw.normal(2, s.heads, 0, s.head_dim), 2)
    yield _rope_case("every second number", draw, draw.normal(2, 3, 5, 2 * s.head_dim)[..., ::2], 2)
    yield _rope_case("large", draw, draw.normal(1, s.heads, 3, s.head_dim, scale=draw.large), 1)


def _rope_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    for heads in (s.heads, s.kv_heads):
        x = draw.normal(1, tokens, heads, s.head_dim).transpose(1, 2)
        yield _rope_case(f"{tuple(x.shape)}", draw, x, 1)


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
    yield _attention_case("decode", draw, s, (2, 1, 67))
    yield _attention_case("first token", draw, s, (1, 1, 1))
    yield _attention_case("no queries", draw, s, (2, 0, 5))
    positions = torch.arange(21, device=draw.device)[None]
    yield _attention_case("sliding window", draw, s, (2, 21, 21), mask=ops.visible(positions, positions, window=4))
    padded = torch.stack([positions[0], (positions[0] - 3).clamp(min=-1)])
    yield _attention_case("left padding", draw, s, (2, 21, 21), mask=ops.visible(padded, padded))
    yield _attention_case("large scores", draw, s, (1, 21, 21), scale=6.0)


def _attention_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    if tokens > 1:
        yield _attention_case(f"prefill {tokens}", draw, s, (1, tokens, tokens))
    else:
        yield _attention_case("decode after 4096", draw, s, (1, 1, 4096))


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> int:
    queries, keys = q.shape[2], k.shape[2]
    pairs = queries * (2 * keys - queries + 1) // 2  # what the causal mask leaves
    return 4 * q.shape[0] * q.shape[1] * q.shape[3] * pairs


def _moe_case(name: str, draw: Draw, s: Sizes, tokens: int, experts: Tensor | None = None) -> Case:
    x = draw.normal(tokens, s.hidden)
    gate_up = draw.normal(s.experts, 2 * s.intermediate, s.hidden, scale=s.hidden**-0.5)
    down = draw.normal(s.experts, s.hidden, s.intermediate, scale=s.intermediate**-0.5)
    chosen = draw.choices(tokens, s.experts, s.top_k) if experts is None else experts
    weights = draw.normal(*chosen.shape, scale=0.03, mean=1 / s.top_k)
    return Case(name, (x, gate_up, down, weights, chosen))


def _moe_cases(s: Sizes, draw: Draw) -> Iterator[Case]:
    yield _moe_case("some tokens", draw, s, 29)
    yield _moe_case("one token", draw, s, 1)
    yield _moe_case("no tokens", draw, s, 0)
    same = torch.arange(s.top_k, device=draw.device).expand(7, s.top_k).contiguous()
    yield _moe_case("all tokens to the same experts", draw, s, 7, same)


def _moe_real(s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    yield _moe_case(f"{tokens} tokens, {s.top_k} of {s.experts}", draw, s, tokens)


SUBJECTS = {
    "rms_norm": Subject(ops.rms_norm, _rms_norm_cases, _rms_norm_real, lambda x, *_: 4 * x.numel()),
    "add_rms_norm": Subject(ops.add_rms_norm, _add_rms_norm_cases, _add_rms_norm_real, lambda x, *_: 5 * x.numel()),
    "swiglu": Subject(ops.swiglu, _swiglu_cases, _swiglu_real, lambda gate, _: 5 * gate.numel()),
    "rope": Subject(ops.rope, _rope_cases, _rope_real, lambda x, *_: 3 * x.numel()),
    "router_topk": Subject(
        ops.router_topk, _router_cases, _router_real, lambda logits, k, _: (5 + 2 * k) * logits.numel(), True, _observe_router
    ),
    "attention": Subject(ops.attention, _attention_cases, _attention_real, _attention_flops),
    "moe_experts": Subject(
        ops.moe_experts, _moe_cases, _moe_real, lambda x, gate_up, down, weights, _: 6 * weights.numel() * down[0].numel(), True
    ),
}


def subject(operation: str) -> Subject:
    if operation not in SUBJECTS:
        raise RequestError(f"the bench has no inputs for {operation!r}; it has {list(SUBJECTS)}")
    return SUBJECTS[operation]
