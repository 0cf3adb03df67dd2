"""Launch parameters for the GPU at hand: a local search from what the tuned table has, every step checked before it is timed.

From the entry in force, each parameter in turn is doubled and halved (num_stages: one more, one less). A step is kept if
the outputs stay right and the time, added up over all shapes that use the entry, falls by more than the noise. The search
ends when no step helps. It is for development: what it prints goes into the kernel's TUNED, and nothing is tuned at run time.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .. import backend
from ..errors import RequestError
from .check import examine, judge, tolerance
from .compile import ANY, INSTINCT, kernel_module
from .measure import copies_of, drawn, repeat
from .shapes import DEFAULTS, sizes
from .subjects import Subject, subject

GAIN = 0.98  # a step must take less than this share of the time
Entry = dict[str, int]


@dataclass(frozen=True)
class Tuned:
    """The entry found for one shape class of an operation's table."""

    device: str
    shape_class: Any
    entry: Entry
    before: float  # seconds over all shapes of the class, with the entry that was in force
    after: float
    tried: int
    refused: int  # of those tried: wrong outputs, or more registers or shared memory than there is

    @property
    def line(self) -> str:
        """As it goes into TUNED."""
        note = f"{self.after * 1e6:.1f} us, was {self.before * 1e6:.1f}; {self.tried} tried, {self.refused} refused"
        return f"    ({self.device!r}, {self.shape_class!r}): {self.entry},  # {note}"


def tune(
    operation: str,
    *,
    model: str | None = None,
    tokens: Sequence[int] = (1, 16, 4096),
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    seconds: float = 0.1,
) -> list[Tuned]:
    """Search the entries that a model's shapes use. Raises RequestError without a GPU or a Triton kernel."""
    where, what = torch.device(device), subject(operation)
    implementation = backend.OPERATIONS[operation].implementations.get("triton")
    reason = "it has no Triton kernel" if implementation is None else implementation.supports(where, dtype)
    if reason is not None:
        raise RequestError(f"{operation} cannot be tuned on {where} in {dtype}: {reason}")
    module, name = kernel_module(operation), _device_name(where)
    shapes = sizes(model or DEFAULTS[what.needs], what.needs)
    users: dict[Any, list[tuple[Any, ...]]] = {}  # shape class -> the calls that look it up
    with torch.no_grad():
        for count in tokens:
            for _, draws in drawn(what, shapes, count, dtype, where):
                with watched(module.TUNED) as seen:
                    module.run(*draws[0])
                for shape_class in seen:
                    users.setdefault(shape_class, []).append(draws[0])
        if not users:
            counts = ", ".join(map(str, tokens))
            raise RequestError(f"no call of {operation} with {counts} tokens looks up an entry of its table")
        return [_search(what, module, name, shape_class, calls, dtype, seconds) for shape_class, calls in users.items()]


def _search(
    what: Subject, module: Any, device: str, shape_class: Any, calls: list[tuple[Any, ...]], dtype: torch.dtype, seconds: float
) -> Tuned:
    table, key = module.TUNED, (device, shape_class)
    before = table.get(key)
    family = INSTINCT if device.startswith(INSTINCT) else ANY
    entry = dict(before or table.get((family, shape_class)) or table[ANY, shape_class])
    tried, refused = 0, 0
    try:
        first = _time(what, module.run, calls, dtype, seconds)
        if first is None:
            raise RequestError(f"the entry in force for {shape_class!r} is wrong or does not launch: {entry}")
        best, improved = first, True
        while improved:
            improved = False
            for candidate in neighbours(entry):
                tried += 1
                table[key] = candidate
                found = _time(what, module.run, calls, dtype, seconds)
                refused += found is None
                if found is not None and found < GAIN * best:
                    entry, best, improved = candidate, found, True
                    break
    finally:
        table.pop(key, None)
        if before is not None:
            table[key] = before
    return Tuned(device, shape_class, entry, first, best, tried, refused)


def neighbours(entry: Entry) -> Iterator[Entry]:
    """Every entry one step away."""
    for name, value in entry.items():
        for other in (value + 1, value - 1) if name == "num_stages" else (value * 2, value // 2):
            if other >= 1:
                yield {**entry, name: other}


def _time(
    what: Subject, run: Callable[..., Any], calls: list[tuple[Any, ...]], dtype: torch.dtype, seconds: float
) -> float | None:
    """Seconds of all calls, or None if one of them is wrong or cannot be launched."""
    total = 0.0
    for args in calls:
        if judge("", [examine(what, run, args)], dtype, tolerance(run, dtype)).faults:
            return None
        total += statistics.median(repeat(run, copies_of(args)[0], seconds))
    return total


@contextmanager
def watched(table: dict[Any, Entry]) -> Iterator[list[Any]]:
    """A list that fills with the shape classes that are looked up in the table, wherever the table is known by name."""

    class Watched(dict[Any, Entry]):
        def get(self, key: Any, default: Any = None) -> Any:
            if key[1] not in seen:
                seen.append(key[1])
            return super().get(key, default)

    seen: list[Any] = []
    kernels: list[Any] = [module for name, module in sys.modules.items() if name.startswith("qwen_kernels.")]
    owners = [module for module in kernels if getattr(module, "TUNED", None) is table]
    try:
        for owner in owners:
            owner.TUNED = Watched(table)
        yield seen
    finally:
        for owner in owners:
            owner.TUNED = table


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
