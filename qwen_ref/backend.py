"""Operations you can swap: a name, its formula in `ops`, and faster implementations beside it.

    backend.use({"attention": "eager"})            # from now on
    with backend.use({"attention": "mine"}): ...   # for a while
    backend.report()                               # what runs where, and why something else does not

An implementation is a function with the signature of the formula. It is chosen once per device and dtype, not per
call, so a choice costs one dictionary look-up and stays visible to torch.compile.

The Triton kernels are reached by name: neither `qwen_kernels` nor Triton is imported before one of them is asked for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import ops, torch_ops
from .cpp import operations as cpp
from .errors import RequestError
from .quant import blocked, packed

Supports = Callable[[torch.device, torch.dtype], "str | None"]  # None = yes, otherwise the reason it cannot run


def _always(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    name: str
    load: Callable[[], Callable[..., Any]]  # called once per choice: a Triton kernel's module is imported here
    supports: Supports = _always

    @property
    def run(self) -> Callable[..., Any]:
        return self.load()


@dataclass
class Operation:
    """A callable with the signature of its formula. The first argument's device and dtype choose the implementation."""

    name: str
    implementations: dict[str, Implementation]  # preferred first
    forced: str | None = None
    strict: bool = False
    wrappers: list[Callable[..., Any]] = field(default_factory=list)  # see `intercept`
    _resolved: dict[tuple[torch.device, torch.dtype], Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        resolved = self._resolved  # of this choice: should another thread choose meanwhile, it has a table of its own
        run = resolved.get((x.device, x.dtype))
        if run is None:
            run = self.resolve(x.device, x.dtype).run
            for wrapper in self.wrappers:
                run = partial(wrapper, run)
            resolved[x.device, x.dtype] = run
        return run(x, *args, **kwargs)

    def resolve(self, device: torch.device, dtype: torch.dtype) -> Implementation:
        """The implementation that runs for this device and dtype. Raises RequestError if a strict choice cannot."""
        refusals = []
        for implementation in self._candidates():
            reason = implementation.supports(device, dtype)
            if reason is None:
                return implementation
            refusals.append(f"{implementation.name}: {reason}")
            if self.strict:
                break
        raise RequestError(f"operation {self.name} cannot run on {device} in {dtype}: {'; '.join(refusals)}")

    def check(self, implementation: str | None) -> None:
        """RequestError for an implementation it does not have."""
        if implementation is not None and implementation not in self.implementations:
            raise RequestError(
                f"operation {self.name} has no implementation {implementation!r}; it has {list(self.implementations)}"
            )

    def choose(self, implementation: str | None, strict: bool) -> None:
        self.check(implementation)
        self.forced, self.strict = implementation, strict
        self._resolved = {}

    def wrap(self, wrappers: list[Callable[..., Any]]) -> None:
        self.wrappers = wrappers
        self._resolved = {}

    def _candidates(self) -> Iterator[Implementation]:
        if self.forced is not None:
            yield self.implementations[self.forced]
        yield from (i for i in self.implementations.values() if i.name != self.forced)


def register(operation: str, name: str, supports: Supports = _always) -> Callable[[Callable], Callable]:
    """Decorator: add an implementation called `name`. It runs once chosen with `use`; the default stays as it was."""

    def add(run: Callable) -> Callable:
        op = _operation(operation)
        op.implementations = {**op.implementations, name: Implementation(name, _given(run), supports)}
        op.choose(op.forced, op.strict)
        return run

    return add


class use:
    """Choose implementations: {"attention": "torch"}, or one name for every operation that has it.

    Takes effect at once; as a context manager it restores the previous choice. Where the choice cannot run, the default
    does, and `report` says why; with `strict=True` a RequestError is raised instead.
    """

    def __init__(self, choice: Mapping[str, str] | str, *, strict: bool = False) -> None:
        if isinstance(choice, str):
            choice = {op.name: choice for op in OPERATIONS.values() if choice in op.implementations}
            if not choice:
                raise RequestError("no operation has that implementation; see backend.report()")
        for name, implementation in choice.items():  # all of them before any takes effect
            _operation(name).check(implementation)
        self._before = {name: (OPERATIONS[name].forced, OPERATIONS[name].strict) for name in choice}
        for name, implementation in choice.items():
            OPERATIONS[name].choose(implementation, strict)

    def __enter__(self) -> use:
        return self

    def __exit__(self, *exception: object) -> None:
        for name, (forced, strict) in self._before.items():
            OPERATIONS[name].choose(forced, strict)


_emulated: str | None = None


@contextmanager
def emulating(gpu: str) -> Iterator[None]:
    """For a while, Triton kernels may run on the CPU: `bench.emulator` runs there what is compiled for the GPU of this name."""
    global _emulated
    before, _emulated = _emulated, gpu
    _forget()
    try:
        yield
    finally:
        _emulated = before
        _forget()


def emulated() -> str | None:
    """The name of the GPU that is emulated on the CPU, if one is."""
    return _emulated


def _forget() -> None:
    for op in OPERATIONS.values():
        op.choose(op.forced, op.strict)


_wrapping = threading.Lock()


@contextmanager
def intercept(operation: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """For a while, call `wrapper(run, *args)` in place of `run(*args)`, whichever implementation `run` is.

    It is put in where implementations are resolved, so an operation nobody intercepts pays nothing.
    """
    op = _operation(operation)
    with _wrapping:
        op.wrap([*op.wrappers, wrapper])
    try:
        yield
    finally:
        with _wrapping:
            op.wrap([w for w in op.wrappers if w is not wrapper])


def choices() -> tuple[Any, ...] | None:
    """What is equal as long as the same implementations run; None while one of them is intercepted."""
    if any(op.wrappers for op in OPERATIONS.values()):
        return None
    return tuple([(op.forced, op.implementations) for op in OPERATIONS.values()])


def report(device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16) -> str:
    """One line per operation: what runs on this device (default the GPU if there is one) and dtype, and the others with the
    reason against them. "nothing" runs where a strict choice cannot."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wide, lines = max(map(len, OPERATIONS)), []
    for op in OPERATIONS.values():
        refusals = {i.name: i.supports(device, dtype) for i in op.implementations.values()}
        impossible = op.strict and op.forced is not None and refusals[op.forced] is not None
        chosen = "nothing" if impossible else op.resolve(device, dtype).name
        others = [f"{name} ({reason or 'not chosen'})" for name, reason in refusals.items() if name != chosen]
        lines.append(f"{op.name:{wide}} {chosen:8} " + (f"also: {', '.join(others)}" if others else ""))
    return "\n".join(line.rstrip() for line in lines)


def _operation(name: str) -> Operation:
    if name not in OPERATIONS:
        raise RequestError(f"there is no operation {name!r}; there are {sorted(OPERATIONS)}")
    return OPERATIONS[name]


def _operation_of(
    formula: Callable[..., Any], *, preferred: Callable[..., Any] | None = None, also: Callable[..., Any] | None = None,
    compiled: Callable[..., Any] | None = None, kernel: bool = True,
) -> Operation:  # fmt: skip
    """A formula and what competes with it: one made of PyTorch's fused kernels, chosen by default or not, the Triton kernel, if
    there is one, and one compiled for the CPU."""
    runs = {"torch": preferred, "eager": formula} if preferred else {"eager": formula, "torch": also}
    operation = Operation(formula.__name__, {name: Implementation(name, _given(run)) for name, run in runs.items() if run})
    if kernel:
        _with_kernel(operation)
    if compiled:
        operation.implementations["cpp"] = Implementation("cpp", _given(compiled), cpp.supports)
    return operation


def _operation_of_packed(
    formula: Callable[..., Any], in_blocks: Callable[..., Any], compiled: Callable[..., Any], supports: Supports = cpp.supports
) -> Operation:
    """A formula over packed matrices and what a CPU prefers to it: a compiled kernel, then one block at a time."""
    operation = _operation_of(formula)
    mine = [Implementation("cpp", _given(compiled), supports), Implementation("torch", _given(in_blocks), blocked.supports)]
    operation.implementations = {i.name: i for i in (*mine, *operation.implementations.values())}
    return operation


def _given(run: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    return lambda: run


def _with_kernel(operation: Operation) -> Operation:
    """Add the Triton kernel in `qwen_kernels/<operation>.py` under the name "triton", last: it runs when it is chosen."""

    def module() -> Any:
        return import_module(f"qwen_kernels.{operation.name}")

    def supports(device: torch.device, dtype: torch.dtype) -> str | None:
        return _why_no_triton(device) or module().supports(device, dtype)

    operation.implementations["triton"] = Implementation("triton", lambda: module().run, supports)
    return operation


def _why_no_triton(device: torch.device) -> str | None:
    if not _installed("triton"):
        return "triton is not installed"
    if not _installed("qwen_kernels"):
        return "the qwen_kernels package is not installed"
    if device.type == "cpu" and (_emulated or os.environ.get("TRITON_INTERPRET") == "1"):
        return None  # the emulator, or Triton's interpreter: right, and thousands of times slower
    if not torch.cuda.is_available():
        return "no GPU"
    return None if device.type == "cuda" else f"the tensors are on {device.type}, not on the GPU"


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


def _on_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cuda" and dtype.itemsize == 2 else "cuDNN needs an NVIDIA GPU and 16-bit numbers"


linear = _operation_of(ops.linear, preferred=torch_ops.linear, compiled=cpp.linear)
rms_norm = _operation_of(ops.rms_norm, compiled=cpp.rms_norm)
add_rms_norm = _operation_of(ops.add_rms_norm, compiled=cpp.add_rms_norm)
zero_centred_rms_norm = _operation_of(ops.zero_centred_rms_norm, compiled=cpp.zero_centred_rms_norm)
gated_rms_norm = _operation_of(ops.gated_rms_norm, compiled=cpp.gated_rms_norm)
causal_conv1d = _operation_of(ops.causal_conv1d, preferred=torch_ops.causal_conv1d, compiled=cpp.causal_conv1d)
gated_delta_rule = _operation_of(ops.gated_delta_rule, preferred=torch_ops.gated_delta_rule, compiled=cpp.gated_delta_rule)
gated_delta_step = _operation_of(ops.gated_delta_step, compiled=cpp.gated_delta_step)
rope = _operation_of(ops.rope, compiled=cpp.rope)
norm_rope_write = _operation_of(ops.norm_rope_write, compiled=cpp.norm_rope_write)
attention = _operation_of(ops.attention, preferred=torch_ops.attention, compiled=cpp.attention)
attention_prefill = _operation_of(ops.attention_prefill, also=torch_ops.attention_prefill)
attention_decode = _operation_of(ops.attention_decode, compiled=cpp.attention_decode)
attention_paged = _operation_of(ops.attention_paged)
dual_chunk_attention = _operation_of(ops.dual_chunk_attention, preferred=ops.dual_chunk_blocked, kernel=False)
block_scores = _operation_of(ops.block_scores)
sparse_block_attention = _operation_of(ops.sparse_block_attention, preferred=torch_ops.sparse_block_attention)
stream_mix = _operation_of(ops.stream_mix)
stream_write = _operation_of(ops.stream_write)
swiglu = _operation_of(ops.swiglu, compiled=cpp.swiglu)
sigmoid_gate = _operation_of(ops.sigmoid_gate, compiled=cpp.sigmoid_gate)
take_columns = _operation_of(ops.take_columns, compiled=cpp.take_columns)
router_topk = _operation_of(ops.router_topk, compiled=cpp.router_topk)
moe_experts = _operation_of(ops.moe_experts, also=torch_ops.moe_experts, compiled=cpp.moe_experts)
sample = _operation_of(ops.sample)
cross_entropy = _operation_of(ops.cross_entropy, also=torch_ops.cross_entropy)
linear_int4 = _operation_of_packed(packed.linear_int4, blocked.linear_blocked, cpp.linear_int4, cpp.supports_rounding)
linear_int8 = _operation_of_packed(packed.linear_int8, blocked.linear_blocked, cpp.linear_int8, cpp.supports_rounding)
linear_fp8 = _operation_of_packed(packed.linear_fp8, blocked.linear_blocked, cpp.linear_stored)
linear_fp8_dynamic = _operation_of(packed.linear_fp8_dynamic)
linear_code4 = _operation_of_packed(packed.linear_code4, blocked.linear_blocked, cpp.linear_stored)
linear_gguf = _operation_of_packed(packed.linear_gguf, blocked.linear_blocked, cpp.linear_stored)
moe_int4 = _operation_of_packed(packed.moe_int4, blocked.moe_blocked, cpp.moe, cpp.supports_rounding)
moe_int8 = _operation_of_packed(packed.moe_int8, blocked.moe_blocked, cpp.moe, cpp.supports_rounding)
moe_fp8 = _operation_of_packed(packed.moe_fp8, blocked.moe_blocked, cpp.moe_stored)
moe_code4 = _operation_of_packed(packed.moe_code4, blocked.moe_blocked, cpp.moe_stored)
moe_gguf = _operation_of_packed(packed.moe_gguf, blocked.moe_blocked, cpp.moe_stored)

OPERATIONS: dict[str, Operation] = {value.name: value for value in list(globals().values()) if isinstance(value, Operation)}
register("attention", "cudnn", supports=_on_cuda)(torch_ops.attention_cudnn)
