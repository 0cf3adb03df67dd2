"""How fast is an implementation, as a share of what this device can do?

The roofline is measured in the same run: the best rate at which a large buffer is read (or copied), and the best
matrix product. Inputs rotate through enough copies that a call finds none of them in the cache. A time is reported
only for outputs that passed the check on these very inputs and on the awkward ones.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .. import backend
from ..errors import RequestError
from .check import check, examine, judge, load, tolerance
from .shapes import DEFAULTS, Sizes, sizes
from .subjects import Cost, Draw, Subject, subject

FAILED = "its check failed"
MOST_COPIES = 64
MOST_BYTES = 4 << 30


@dataclass(frozen=True)
class Roofline:
    """What this device was seen to do: bytes per second, and multiplications plus additions per second."""

    bandwidth: float
    compute: float

    def seconds(self, cost: Cost) -> float:
        return max(cost.bytes / self.bandwidth, cost.flops / self.compute)


@dataclass(frozen=True)
class Timing:
    """Seconds of one implementation on one shape, or why there are none."""

    shape: str
    implementation: str
    median: float | None = None
    fast: float | None = None  # the 10th percentile
    slow: float | None = None  # the 90th
    bytes_per_second: float | None = None
    flops_per_second: float | None = None
    share: float | None = None  # of the roofline
    cold: bool = True  # False: the copies were too small or too few to leave the cache
    refused: str | None = None

    @property
    def wrong(self) -> bool:
        """Whether there is no time because the outputs are wrong, not because the implementation cannot run here."""
        return bool(self.refused and self.refused.startswith(FAILED))


@dataclass(frozen=True)
class Bench:
    operation: str
    model: str
    dtype: str
    environment: dict[str, str]
    roofline: Roofline
    rows: tuple[Timing, ...]

    def table(self) -> str:
        device, roof = self.environment["device"], self.roofline
        width = max(len(row.shape) for row in self.rows)
        lines = [
            f"{self.operation}, {self.model}, {self.dtype}, on {device}; measured here: "
            f"{roof.bandwidth / 1e9:.0f} GB/s, {roof.compute / 1e12:.2f} TFLOP/s",
            f"{'shape':{width}}  {'implementation':14}    median us (10 % to 90 %)        GB/s  TFLOP/s  of roofline",
        ]
        for r in self.rows:
            if r.median is None or r.fast is None or r.slow is None or r.share is None:
                lines.append(f"{r.shape:{width}}  {r.implementation:14}  no time: {r.refused}")
                continue
            spread = f"{r.median * 1e6:10.1f} ({r.fast * 1e6:.1f} to {r.slow * 1e6:.1f})"
            rates = f"{(r.bytes_per_second or 0) / 1e9:9.1f} {(r.flops_per_second or 0) / 1e12:8.3f}"
            note = "  (above the roofline as measured)" if r.share > 1.05 else ""
            note = note if r.cold else "  (fits the cache)"
            lines.append(f"{r.shape:{width}}  {r.implementation:14}  {spread:32} {rates} {r.share:11.0%}{note}")
        return "\n".join(lines)

    def figure(self, theme: str = "light") -> Any:
        """Every timed row on the measured roofline: a matplotlib Figure. Raises RequestError without matplotlib."""
        from .. import plot

        kernels = [
            plot.Kernel(f"{r.implementation}, {r.shape}", r.flops_per_second / r.bytes_per_second, r.flops_per_second)
            for r in self.rows
            if r.flops_per_second and r.bytes_per_second
        ]
        title = f"{self.operation}, {self.dtype}, {self.environment['device']}"
        return plot.roofline(kernels, self.roofline.compute, self.roofline.bandwidth, title=title, theme=theme)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    operation: str,
    *,
    model: str | None = None,
    implementations: Sequence[str] | None = None,
    file: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    tokens: Sequence[int] | None = None,
    seconds: float = 0.3,
) -> Bench:
    """Time every implementation of an operation on a model's shapes: the formula, torch.compile of it, all registered.

    Args:
        implementations: only these ("compiled" is torch.compile of the formula). file: registers one first.
        tokens: how many tokens a call has; `Subject.tokens` on a GPU, 1 and 512 on a CPU.
        seconds: how long each is repeated.
    """
    if file is not None:
        load(file)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    what = subject(operation)
    tokens = tokens or ((1, 512) if where.type == "cpu" else what.tokens)
    model = model or DEFAULTS[what.needs]
    with torch.no_grad():
        runs = _contenders(operation, what, implementations, where, dtype)
        roof, rows = roofline(where, dtype), []
        for count in tokens:
            for shape, draws in drawn(what, sizes(model, what.needs), count, dtype, where):
                torch.compiler.reset()  # one shape per compilation: the limit on recompilations is not part of the contest
                for name, (run, refused) in runs.items():
                    try:
                        why = refused or _gate(what, name, run, draws, dtype)
                        timed = None if why else _timing(what, shape, name, run, draws[0], roof, seconds)
                    except torch.OutOfMemoryError:
                        why, timed = "it, or the formula in fp64 that judges it, does not fit the memory", None
                    rows.append(timed or Timing(shape, name, refused=why))
    return Bench(operation, model, str(dtype).removeprefix("torch."), environment(where), roof, tuple(rows))


def _contenders(
    operation: str, what: Subject, only: Sequence[str] | None, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[Callable[..., Any], str | None]]:
    """name -> (function, the reason it gets no time). A refusal here is for every shape."""
    registered = backend.OPERATIONS[operation].implementations
    names = list(only) if only else ["compiled", *sorted(registered, key=lambda name: name != "eager")]
    found: dict[str, tuple[Callable[..., Any], str | None]] = {}
    for name in names:
        if name == "compiled":
            unrolled = "its loop over tokens would be unrolled" if what.loops else None
            found[name] = torch.compile(what.formula, dynamic=False), unrolled
        elif name not in registered:
            raise RequestError(f"operation {operation} has no implementation {name!r}; it has {['compiled', *registered]}")
        else:
            found[name] = _registered(operation, registered[name], device, dtype)
    return found


def _registered(
    operation: str, implementation: backend.Implementation, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[..., Any], str | None]:
    reason = implementation.supports(device, dtype)
    if reason is None and implementation.name == "triton" and device.type == "cpu":
        reason = "the interpreter's time says nothing about the kernel's"
    if reason is not None:
        return _absent, reason
    if implementation.name != "eager":
        report = check(operation, implementation.name, dtype=dtype, device=device, model="tiny")
        # What refuses an awkward input aloud may still be right on the model's, which are examined before they are timed.
        silent = [fault for row in report.rows for fault in row.faults if not fault.startswith("raises")]
        reason = f"{FAILED}: {silent[0]}" if silent else None
    return implementation.run, reason


def _absent(*args: Any) -> Any:
    raise RequestError("this implementation cannot run here")


def drawn(what: Subject, s: Sizes, tokens: int, dtype: torch.dtype, device: torch.device) -> list[tuple[str, list[Any]]]:
    """The model's shapes, each with the inputs to check it on: one draw of many tokens, three of few (see `judge`)."""
    found: dict[str, list[Any]] = {}
    for seed in range(1 if tokens > 64 else 3):
        for shape, args in what.real(s, tokens, Draw(seed, dtype, device)):
            found.setdefault(shape, []).append(args)
    return list(found.items())


def _gate(what: Subject, name: str, run: Callable[..., Any], draws: list[Any], dtype: torch.dtype) -> str | None:
    """Why these inputs give no time: the outputs are wrong."""
    if name == "eager":
        return None
    # torch.compile gives a function up for good that it meets inside a dispatch mode, and the poison is one.
    found = [examine(what, run, args, poisoned=name != "compiled") for args in draws]
    faults = judge("", found, dtype, tolerance(run, dtype)).faults
    who = "torch.compile" if name == "compiled" else FAILED
    return f"{who}: {faults[0]}" if faults else None


def _timing(
    what: Subject, shape: str, name: str, run: Callable[..., Any], args: tuple[Any, ...], roof: Roofline, seconds: float
) -> Timing:
    cost = what.cost(*args)
    copies, cold = copies_of(args)
    times = sorted(repeat(run, copies, seconds))
    middle = statistics.median(times)
    return Timing(
        shape, name, middle, times[len(times) // 10], times[-1 - len(times) // 10],
        cost.bytes / middle, cost.flops / middle, roof.seconds(cost) / middle, cold,
    )  # fmt: skip


def copies_of(args: tuple[Any, ...]) -> tuple[list[tuple[Any, ...]], bool]:
    """The same inputs at several addresses, together at least three caches large if that is affordable."""
    tensors = [a for a in tree_leaves(args) if isinstance(a, Tensor)]
    size = max(1, sum(t.numel() * t.element_size() for t in tensors))
    needed = 3 * cache_bytes(tensors[0].device)
    count = max(1, min(-(-needed // size) + 1, MOST_COPIES, MOST_BYTES // size))
    copies = [tree_map(lambda a: _copy(a) if isinstance(a, Tensor) else a, args) for _ in range(count)]
    return copies, count * size >= needed


def _copy(values: Tensor) -> Tensor:
    return torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=values.device).copy_(values)


def cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or 32 << 20
    except (ValueError, OSError):
        return 32 << 20


def repeat(run: Callable[..., Any], copies: list[tuple[Any, ...]], seconds: float) -> list[float]:
    """Seconds of single calls, the copies taken in turn, after a warm-up on each of the first few."""
    for args in copies[:3]:
        run(*args)
    if _on_gpu(copies[0]):
        return _repeat_on_gpu(run, copies, seconds)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        args = copies[len(times) % len(copies)]
        start = time.perf_counter()
        run(*args)
        times.append(time.perf_counter() - start)
    return times


def _repeat_on_gpu(run: Callable[..., Any], copies: list[tuple[Any, ...]], seconds: float) -> list[float]:
    """One CUDA graph goes through all copies, so that no launch waits for Python; its time is divided among the calls.

    What cannot be captured (it asks the GPU for a value) is timed call by call, launch included.
    """

    def step() -> None:
        for args in copies:
            run(*args)

    calls, graph, replay = len(copies), torch.cuda.CUDAGraph(), step
    if _capturable(run, copies[0]):
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    replay()
    torch.cuda.synchronize()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 11 or time.perf_counter() < until:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return times


def _capturable(run: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call never waits for the GPU. (A capture that fails leaves its stream, allocator and generator behind.)"""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*args)
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """The best a plain read or a copy, and a matrix product in this dtype or fp32, reach here and now."""
    gpu = device.type == "cuda"
    source = torch.ones((2 << 30 if gpu else 128 << 20) // 4, device=device)
    target, n = torch.empty_like(source), 8192 if gpu else 768
    size, best = source.numel() * 4, lambda run, *args: min(repeat(run, [args], 0.3))
    products = [torch.randn(2, n, n, device=device).to(kind) for kind in {dtype, torch.float32}]
    return Roofline(
        bandwidth=max(size / best(torch.sum, source), 2 * size / best(target.copy_, source)),
        compute=max(2 * n**3 / best(torch.matmul, a, b) for a, b in products),
    )


def environment(device: torch.device) -> dict[str, str]:
    """What a figure must be read with."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "absent"
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": version,
        "cuda": str(torch.version.cuda) if gpu else "none",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _on_gpu(args: tuple[Any, ...]) -> bool:
    return any(isinstance(a, Tensor) and a.is_cuda for a in tree_leaves(args))
