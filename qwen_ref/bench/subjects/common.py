"""The parts of a subject: cases drawn from a seed, and what a call must cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..shapes import Sizes


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
        self._where = device if device.type == "cuda" else torch.device("cpu")  # billions of numbers are drawn on the GPU
        self._generator = torch.Generator(self._where).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        values = torch.randn(shape, generator=self._generator, device=self._where) * scale + mean
        return values.to(self.device, self.dtype)

    def distinct(self, rows: int, columns: int, step: float = 0.125) -> Tensor:
        """Rows of different numbers, multiples of `step` around zero in random order: no ties, in any dtype."""
        if self.device.type == "meta":
            return torch.empty(rows, columns, dtype=self.dtype, device="meta")
        order = torch.rand(rows, columns, generator=self._generator, device=self._where).argsort(-1)
        return ((order - columns // 2) * step).to(self.device, self.dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Whole numbers, low <= n < high."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randint(low, high, shape, generator=self._generator, device=self._where).to(self.device, dtype)

    def uniform(self, low: float, high: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        return (torch.rand(shape, generator=self._generator, device=self._where) * (high - low) + low).to(self.device, dtype)

    def choices(self, rows: int, of: int, k: int) -> Tensor:
        """(rows, k) int64: k different numbers below `of` in each row."""
        if self.device.type == "meta":
            return torch.empty(rows, k, dtype=torch.int64, device="meta")
        return torch.rand(rows, of, generator=self._generator, device=self._where).argsort(-1)[:, :k].to(self.device)

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
    bytes: Callable[..., int] | None = None  # of a call's arguments, where not all of every argument is touched
    needs: str = ""  # what not every model has: see `shapes.sizes`
    tokens: tuple[int, ...] = (1, 16, 4096)  # how many a call has where it is timed on a GPU
    loops: bool = False  # over the tokens in Python, which torch.compile would unroll
    others: tuple[Sizes, ...] = ()  # of no model here: with them a kernel launches every entry of its tuned table
    writes: tuple[int, ...] = ()  # the arguments that it fills; all others must stay as they are
    observe: Callable[[tuple[Any, ...], tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None  # what to compare instead

    def call(self, run: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Everything an implementation gives: what it returns, then the arguments that it fills."""
        return (*as_tuple(run(*args)), *(args[i] for i in self.writes))

    def cost(self, *args: Any) -> Cost:
        """Bytes and FLOPs of a call. Runs the formula on tensors without storage to know its outputs."""
        if self.bytes is not None:
            return Cost(self.bytes(*args), self.flops(*args))
        shapes = tree_map(lambda a: torch.empty_like(a, device="meta") if isinstance(a, Tensor) else a, args)
        return Cost(bytes_of(*args, *as_tuple(self.formula(*shapes))), self.flops(*args))


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def bytes_of(*values: Any) -> int:
    """Bytes of all tensors among these, or inside NamedTuples among them."""
    return sum(v.numel() * v.element_size() for v in tree_leaves(values) if isinstance(v, Tensor))
