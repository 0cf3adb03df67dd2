"""Is an implementation right? Every awkward input, five seeds, memory poisoned around all that it may touch.

The judge is the formula in fp64 on the same (already rounded) inputs; the measure is the formula's own error in the
dtype under test. What is looked for is in `_faults`: an exception, wrong shape or dtype, NaN, too large an error, a
changed input, a write outside an output, and two runs that differ.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .. import backend
from ..errors import EmulatorError, RequestError
from .emulator.memory import INSIDE
from .shapes import DEFAULTS, sizes
from .subjects import Draw, Subject, subject

SEEDS = 5
SECOND_LOOK = 8  # times the seeds before an error is held against a kernel: the worst of a few numbers is chance
LOUD = 3e4  # poison besides NaN, which a GPU's maximum passes over; fp16 has it
GUARD = 1024  # numbers of poison before and after every tensor; a multiple of any alignment a kernel asks for


class Error(NamedTuple):
    """Distance from the fp64 result: |y - o| / |o| in the L2 norm, and the largest one over the largest |o|."""

    l2: float
    max: float


@dataclass(frozen=True)
class Row:
    case: str
    error: Error | None  # the worst of all outputs and seeds; None where there was nothing to compare
    allowed: Error | None
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    operation: str
    implementation: str
    dtype: str
    device: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return not any(row.faults for row in self.rows)

    @property
    def faults(self) -> list[str]:
        return [f"{row.case}: {fault}" for row in self.rows for fault in row.faults]

    @property
    def verdict(self) -> str:
        who = f"{self.operation} by {self.implementation} in {self.dtype} on {self.device}"
        bad = sum(bool(row.faults) for row in self.rows)
        return f"{who}: right on all {len(self.rows)} inputs" if self.ok else f"{who}: {bad} of {len(self.rows)} inputs fail"

    def table(self) -> str:
        width = max(len(row.case) for row in self.rows)
        lines = [f"{'input':{width}}  relative L2   allowed       max  allowed"]
        for row in self.rows:
            numbers = " " * 41
            if row.error is not None and row.allowed is not None:
                e, a = row.error, row.allowed
                numbers = f"{e.l2:11.1e} {a.l2:9.1e} {e.max:9.1e} {a.max:8.1e}"
            lines.append(f"{row.case:{width}}  {numbers}  {'; '.join(row.faults) or 'ok'}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        rows = [
            {"case": r.case, "error": r.error and r.error._asdict(), "allowed": r.allowed and r.allowed._asdict(),
             "faults": list(r.faults)}
            for r in self.rows
        ]  # fmt: skip
        return {"operation": self.operation, "implementation": self.implementation, "dtype": self.dtype,
                "device": self.device, "ok": self.ok, "rows": rows}  # fmt: skip


def check(
    operation: str,
    implementation: str,
    *,
    file: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    model: str | None = None,
    seeds: int = SEEDS,
    deterministic: bool = True,
) -> Report:
    """Try a registered implementation on every awkward input of its operation.

    Args:
        file: Python code to run first, which registers the implementation.
        device: the GPU if there is one. model: whose sizes; "tiny" on a CPU, otherwise Qwen3-8B or -30B-A3B.
        deterministic: whether two runs must agree to the last bit.
    Raises RequestError if there is no such implementation, or if it refuses this device or dtype.
    """
    if file is not None:
        load(file)
    device, what = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), subject(operation)
    run = find(operation, implementation, device, dtype)
    model = model or ("tiny" if device.type == "cpu" else DEFAULTS[what.needs])
    found: dict[str, list[Finding]] = {}

    def look(seeds: range, at: Callable[[str], bool]) -> None:
        for seed in seeds:
            for i, (name, args) in enumerate(what.cases(sizes(model, what.needs), Draw(seed, dtype, device))):
                if at(name):
                    poison = LOUD if (seed + i) % 2 else math.nan
                    found.setdefault(name, []).append(examine(what, run, args, deterministic, shift=seed % 2, poison=poison))

    with torch.no_grad():
        look(range(seeds), lambda name: True)
        rows = [judge(name, findings, dtype, tolerance(run, dtype)) for name, findings in found.items()]
        unlucky = {row.case for row in rows if row.faults and row.error is not None}
        look(range(seeds, SECOND_LOOK * seeds), unlucky.__contains__)
    rows = [judge(row.case, found[row.case], dtype, tolerance(run, dtype)) if row.case in unlucky else row for row in rows]
    where = f"{device}, emulating {gpu}" if (gpu := backend.emulated()) else str(device)
    return Report(operation, implementation, str(dtype).removeprefix("torch."), where, tuple(rows))


def load(file: str | Path) -> None:
    """Run a user's file as a module, so that its `backend.register` lines take effect. Raises RequestError."""
    path = Path(file)
    spec = importlib.util.spec_from_file_location(f"user_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise RequestError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RequestError(f"{path} could not be run: {type(error).__name__}: {error}") from error


def find(operation: str, name: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """The function registered under a name. Raises RequestError with the reason if it cannot run here."""
    offered = backend.OPERATIONS[operation].implementations
    if name not in offered:
        raise RequestError(f"operation {operation} has no implementation {name!r}; it has {list(offered)}")
    reason = offered[name].supports(device, dtype)
    if reason is not None:
        raise RequestError(f"{operation} by {name} cannot run on {device} in {dtype}: {reason}")
    return offered[name].run


def tolerance(run: Callable[..., Any], dtype: torch.dtype) -> float:
    """How many times the formula's own error is allowed: TOLERANCE of the module that defines the implementation, or 2; in
    fp32, where nothing but sums is rounded, its TOLERANCE_FP32, if it has one."""
    module = sys.modules.get(getattr(run, "__module__", ""))
    usual = getattr(module, "TOLERANCE", 2.0)
    return getattr(module, "TOLERANCE_FP32", usual) if dtype == torch.float32 else usual


@dataclass(frozen=True)
class Finding:
    """One call: what is wrong with it, or how far each output is from the truth, and how far the formula's is."""

    faults: tuple[str, ...] = ()
    errors: tuple[tuple[Error, Error], ...] = ()


def examine(
    what: Subject, run: Callable[..., Any], args: tuple[Any, ...], deterministic: bool = True, poisoned: bool = True,
    shift: int = 0, poison: float = math.nan,
) -> Finding:  # fmt: skip
    """Call an implementation on inputs inside poison, twice if it shall be deterministic, and look at all it gave and touched.

    poisoned: also the memory that it allocates. shift: of all inputs from an aligned address, in numbers. poison: NaN or LOUD.
    """
    # Arguments may be NamedTuples of tensors, such as a packed matrix: the maps go down to their tensors.
    wide = tree_map(lambda a: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a, args)
    eager, truth = (what.call(what.formula, _fresh(what, values)) for values in (args, wide))
    housed = [tree_map(lambda a: House.of(a, shift, poison) if isinstance(a, Tensor) else a, arg) for arg in args]
    inputs = tuple(tree_map(lambda h: h.tensor if isinstance(h, House) else h, arg) for arg in housed)
    try:
        made = Poisoned(poison)
        with made if poisoned else nullcontext():
            ours = again = _fresh_results(what, what.call(run, inputs))
            if deterministic:
                _restore(what, housed)
                again = what.call(run, inputs)
            _wait(inputs)
    except EmulatorError:
        raise
    except (Exception, SystemExit) as error:
        return Finding((f"raises {type(error).__name__}: {_first_line(error)}",))
    faults = _form_faults(ours, eager)
    houses = [(i in what.writes, h) for i, arg in enumerate(housed) for h in tree_leaves(arg) if isinstance(h, House)]
    if any(h.changed(outside=filled) for filled, h in houses):
        faults.append("changes an input, or memory beside it")
    given = [a for arg in args for a in tree_leaves(arg)]
    own = [(y, z) for y, z, e in zip(ours, again, eager, strict=False) if not any(_shares(e, a) for a in given)]
    if any(_shares(y, h.buffer) for y, _ in own for filled, h in houses if not filled):
        faults.append("returns the memory of an input, which the formula does not")
    elif deterministic and any(_shares(y, z) for y, z in own):
        faults.append("returns the same memory again: the first result is lost")
    if any(h.spilled() for h in made.houses):
        faults.append("writes outside its output")
    if deterministic and not faults and not all(_same_bits(a, b) for a, b in zip(ours, again, strict=True)):
        faults.append("differs between two runs on the same input")
    if faults:
        return Finding(tuple(faults))
    try:
        seen, usual, true = (what.observe(wide, outputs) if what.observe else outputs for outputs in (ours, eager, truth))
    except RequestError as error:
        return Finding((str(error),))
    if any(o.isfinite().all() and not y.isfinite().all() for y, o in zip(seen, true, strict=True)):
        return Finding(("gives NaN or infinity: it reads outside its input, leaves output unwritten, or overflows",))
    errors = [(distance(y, o), distance(e, o)) for y, e, o in zip(seen, usual, true, strict=True) if y.numel()]
    return Finding((), tuple(errors))


def _fresh(what: Subject, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with copies of those that the operation fills."""
    return tuple(a.clone() if i in what.writes else a for i, a in enumerate(args))


def _fresh_results(what: Subject, results: tuple[Any, ...]) -> tuple[Any, ...]:
    """The results, with copies of the filled arguments at their end, which a second call fills again."""
    first = len(results) - len(what.writes)
    return (*results[:first], *(r.clone() for r in results[first:]))


def _restore(what: Subject, housed: list[Any]) -> None:
    for i in what.writes:
        inside = housed[i].before.as_strided(housed[i].shape, housed[i].stride, housed[i].start)
        housed[i].tensor.copy_(inside)


def judge(case: str, findings: list[Finding], dtype: torch.dtype, times: float) -> Row:
    """The seeds of one case together: the worst error may be `times` the formula's worst, and two roundings at least.

    (Where the formula happens to be exact, such as on zeros, twice nothing would be nothing.)
    """
    faults = tuple(dict.fromkeys(fault for finding in findings for fault in finding.faults))
    if faults or not findings[0].errors:
        return Row(case, None, None, faults)
    rows, rounding = [], torch.finfo(dtype).eps
    for output in zip(*(finding.errors for finding in findings), strict=True):  # its (ours, formula's) of every seed
        (l2, peak), (own_l2, own_peak) = (
            [max(pair[who][norm] for pair in output) for norm in (0, 1)] for who in (0, 1)
        )
        allowed = Error(max(times * own_l2, rounding), max(times * own_peak, rounding))
        rows.append((max(l2 / allowed.l2, peak / allowed.max), Error(l2, peak), allowed))
    excess, error, allowed = max(rows)
    if not excess <= 1:
        faults = (f"is off by {error.l2:.1e} (max {error.max:.1e}), allowed {allowed.l2:.1e} (max {allowed.max:.1e})",)
    return Row(case, error, allowed, faults)


def distance(y: Tensor, truth: Tensor) -> Error:
    gap, truth = y.double() - truth, truth.double()
    tiny = torch.finfo(torch.float64).tiny
    return Error(
        float(gap.norm() / truth.norm().clamp(min=tiny)),
        float(gap.abs().max() / truth.abs().max().clamp(min=tiny)),
    )


@dataclass
class House:
    """A tensor rebuilt, strides and all, inside a larger buffer of poison.

    Around an input that is NaN, or the lowest integer. An output's poison has all bits set: NaN too, or -1, but not the
    NaN that arithmetic gives, so that NaN read beside an input and written beside an output is seen.
    """

    tensor: Tensor
    buffer: Tensor
    shape: tuple[int, ...]  # as built: whoever gets the tensor may point it elsewhere
    stride: tuple[int, ...]
    before: Tensor  # the buffer as it was handed out
    start: int  # where in it the tensor begins

    def __post_init__(self) -> None:
        """Tell the emulator, for which all of the buffer would be the tensor."""
        at, first = self.buffer.untyped_storage().data_ptr(), self.tensor.data_ptr()
        INSIDE[at] = first, first + _span(self.tensor) * self.tensor.element_size()
        weakref.finalize(self, INSIDE.pop, at, None)

    @classmethod
    def of(cls, values: Tensor, shift: int = 0, poison: Any = math.nan) -> House:
        """An input's, so many numbers behind an address that is a multiple of any alignment a kernel asks for; of bytes, pairs:
        blocks of ggml begin with a number of 16 bits."""
        shift *= 2 if values.element_size() == 1 else 1
        if values.element_size() == 1 and values.is_floating_point():
            poison = math.nan  # they have no number so large
        if not values.is_floating_point():
            poison = True if values.dtype == torch.bool else torch.iinfo(values.dtype).min
        buffer = torch.full((_reach(values) + shift,), poison, dtype=values.dtype, device=values.device)
        house = cls._around(values, buffer, GUARD + shift)
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in values.stride())
        house.tensor[once].copy_(values[once])
        house.before = house.buffer.clone()
        return house

    @classmethod
    def like(cls, empty: Tensor, poison: float = math.nan) -> House:
        """An output's, in the form of `empty`; in it is poison, or another number."""
        buffer = torch.full((_reach(empty) * empty.element_size(),), 255, dtype=torch.uint8, device=empty.device)
        house = cls._around(empty, buffer.view(empty.dtype), GUARD)
        if math.isfinite(poison) and empty.is_floating_point() and empty.element_size() > 1:
            house.tensor.fill_(poison)
        return house

    @classmethod
    def _around(cls, form: Tensor, buffer: Tensor, start: int) -> House:
        inside = buffer.as_strided(form.shape, form.stride(), start)
        return cls(inside, buffer, tuple(inside.shape), inside.stride(), buffer, start)

    def changed(self, outside: bool = False) -> bool:
        """Whether anything is not as it was handed out; `outside`: anything but the tensor itself."""
        there = self._outside if outside else slice(None)
        return not _same_bits(self.buffer[there], self.before[there])

    def spilled(self) -> bool:
        """Whether memory outside the output has lost its poison."""
        if self.before is not self.buffer:  # what was allocated with values may be read like an input, and has its poison
            return self.changed(outside=True)
        raw = self.buffer.view(torch.uint8).view(len(self.buffer), -1)  # bytes: a bool read as a bool is 0 or 1
        return bool((raw[self._outside] != 255).any())

    @property
    def _outside(self) -> Tensor:
        outside = torch.ones_like(self.buffer, dtype=torch.bool)
        outside.as_strided(self.shape, self.stride, self.start).fill_(False)
        return outside


def _reach(form: Tensor) -> int:
    """How many numbers a buffer needs for a tensor of this form and a guard on both sides."""
    return _span(form) + 2 * GUARD


def _span(form: Tensor) -> int:
    """Numbers from a tensor's first to its last."""
    span = sum((n - 1) * stride for n, stride in zip(form.shape, form.stride(), strict=True)) + 1
    return span if form.numel() else 0


def _shares(a: Any, b: Any) -> bool:
    """Whether two tensors lie in one allocation."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.numel() and b.numel()):
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Poisoned(TorchDispatchMode):
    """While active, memory that is allocated without values (empty, empty_like ...) is poison inside more poison, and what is
    allocated with them (zeros, clone ...) lies inside poison."""

    FILLED = (
        torch.ops.aten.zeros.default,
        torch.ops.aten.zeros_like.default,
        torch.ops.aten.new_zeros.default,
        torch.ops.aten.ones.default,
        torch.ops.aten.ones_like.default,
        torch.ops.aten.new_ones.default,
        torch.ops.aten.full.default,
        torch.ops.aten.full_like.default,
        torch.ops.aten.new_full.default,
        torch.ops.aten.clone.default,
    )
    EMPTY = (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    )

    def __init__(self, poison: float = math.nan) -> None:
        super().__init__()
        self.poison = poison  # of what has no values
        self.houses: list[House] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function not in (*self.EMPTY, *self.FILLED) or result.dtype.is_complex or result.is_sparse:
            return result
        house = House.like(result, self.poison) if function in self.EMPTY else House.of(result, poison=self.poison)
        self.houses.append(house)
        return self.houses[-1].tensor


def _form_faults(ours: tuple[Any, ...], eager: tuple[Tensor, ...]) -> list[str]:
    if len(ours) != len(eager):
        return [f"returns {len(ours)} results instead of {len(eager)}"]
    faults = []
    for y, e in zip(ours, eager, strict=True):
        if not isinstance(y, Tensor):
            faults.append(f"returns {type(y).__name__} instead of a tensor")
        elif y.shape != e.shape:
            faults.append(f"returns shape {tuple(y.shape)} instead of {tuple(e.shape)}")
        elif y.dtype != e.dtype or y.device != e.device:
            faults.append(f"returns {y.dtype} on {y.device} instead of {e.dtype} on {e.device}")
    return faults


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def _wait(tensors: tuple[Any, ...]) -> None:
    if any(isinstance(t, Tensor) and t.is_cuda for t in tree_leaves(tensors)):
        torch.cuda.synchronize()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
