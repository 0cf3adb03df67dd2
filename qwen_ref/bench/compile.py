"""Ahead-of-time compilation: what the compiler makes of a Triton kernel on a GPU that is not here.

The launcher itself runs, on tensors without storage, and its launches are recorded instead of made: what is compiled
is what a model of the table would launch, in every dtype, with the specialisations Triton would choose.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..errors import RequestError
from .shapes import DEFAULTS, MODELS, OTHERS, sizes
from .subjects import Draw, subject

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}  # bytes one block may use
ANY, INSTINCT = "any device", "AMD Instinct"  # of `qwen_kernels.launch`, which cannot be imported without Triton
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A token, a batch of decoding, a chunk, a prompt: kernels choose tiles by it. Then the batches with tiles of their own.
TOKENS = (1, 16, 1024, 4096, 2, 4, 32, 64)
ALL = (*MODELS, OTHERS)
TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|v_mfma)")
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
         torch.uint8: "u8", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv"}  # fmt: skip
GPUS = {"sm_80": ("A100", "A800"), "sm_90": ("H100", "H200", "H800", "H20"), "gfx942": (INSTINCT,)}  # named so


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]  # num_warps, num_stages
    device: str  # as on which it was recorded: one with entries of its own, a family, or ANY

    @property
    def text(self) -> str:
        named = [(name, getattr(value, "__name__", value)) for name, value in (*self.constants, *self.options)]
        shown = [f"{name}={value}" for name, value in named if name.isupper() or "num" in name]
        return " ".join([self.signature[0][1].lstrip("*"), *shown])


Found = dict[tuple[str, str, str], Launch]  # (kernel, text, device): the launch


@dataclass(frozen=True)
class Compiled:
    kernel: str
    launch: str
    target: str
    registers: int | None = None  # per thread; None where the tool that knows is absent
    spills: int | None = None  # bytes per thread that went to memory
    shared: int | None = None  # bytes per block
    tensor_cores: bool = False
    fault: str | None = None


@dataclass(frozen=True)
class Compilation:
    operation: str
    rows: tuple[Compiled, ...]

    @property
    def ok(self) -> bool:
        return not any(row.fault for row in self.rows)

    def table(self) -> str:
        width = max(len(row.launch) for row in self.rows)
        lines = [f"{'kernel':14} {'target':7} {'launch':{width}}  registers  spills  shared  tensor cores"]
        for r in self.rows:
            cores = "yes" if r.tensor_cores else "no"
            said = r.fault or f"{_or(r.registers):>9} {_or(r.spills):>7} {_or(r.shared):>7}  {cores}"
            lines.append(f"{r.kernel:14} {r.target:7} {r.launch:{width}}  {said}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {"operation": self.operation, "ok": self.ok, "rows": [asdict(row) for row in self.rows]}


def compile(
    operation: str, *, targets: Sequence[str] = tuple(TARGETS), models: Sequence[str] = ALL,
    tokens: Sequence[int] = TOKENS, dtypes: Sequence[torch.dtype] = DTYPES,
) -> Compilation:  # fmt: skip
    """Compile the Triton kernels of an operation as the models launch them. Needs Triton, not a GPU.

    models: "others" stands for the sizes of none, with which every entry of the tuned table is launched.
    A row's `fault` says why it did not compile, or that it needs more shared memory than the target has.
    Raises RequestError without Triton, for an unknown target, for an operation that has no kernel, or if these models do
    not launch it.
    """
    unknown = set(targets) - set(TARGETS)
    if unknown:
        raise RequestError(f"unknown target {sorted(unknown)}; there are {list(TARGETS)}")
    found = launches(operation, models, tokens, dtypes)
    if not found:
        raise RequestError(f"{operation} is not launched by {', '.join(models)}; try {DEFAULTS[subject(operation).needs]}")
    return Compilation(operation, tuple(_compile(launch, target) for target in targets for launch in made_on(target, found)))


def launches(
    operation: str, models: Sequence[str] = ALL, tokens: Sequence[int] = TOKENS, dtypes: Sequence[torch.dtype] = DTYPES
) -> list[Launch]:
    """Every configuration that the models launch, from the launcher itself, on each device of its tuned table.

    Of launches that differ only in which strides are 1 or multiples of 16, the first stands for all.
    """
    module, what = kernel_module(operation), subject(operation)
    found: Found = {}
    known = [s for model in models for s in (what.others if model == OTHERS else (sizes(model),))]
    known = [s for s in known if not what.needs or getattr(s, what.needs)]
    combinations = product(tuned_devices(module), known, dtypes, tokens)
    for device, s, dtype, count in combinations:
        for _, args in what.real(s, count, Draw(0, dtype, torch.device("meta"))):
            with _recording(found, device), torch.no_grad():
                module.run(*args)
    return list(found.values())


def made_on(target: str, found: Sequence[Launch]) -> list[Launch]:
    """Those that GPUs of the target's architecture make, each once: the first stands for all.

    What was recorded as on a family includes the entries for any device that it uses; no GPU of it uses the others.
    """
    family = any(launch.device == INSTINCT for launch in found) and runs_on(INSTINCT, target)
    made: dict[tuple[str, str], Launch] = {}
    for launch in found:
        if runs_on(launch.device, target) and not (family and launch.device == ANY):
            made.setdefault((launch.kernel.fn.__name__, launch.text), launch)
    return list(made.values())


def runs_on(device: str, target: str) -> bool:
    """Whether an entry for this device is one for the target's architecture."""
    return device == ANY or any(name in device for name in GPUS[target])


def kernel_module(operation: str) -> Any:
    """The module of an operation's Triton kernel. Raises RequestError with the reason if there is none."""
    if "triton" not in backend.OPERATIONS[operation].implementations:
        raise RequestError(f"operation {operation} has no Triton kernel")
    try:
        module = import_module(f"qwen_kernels.{operation}")
        import triton
    except ImportError as error:
        raise RequestError(f"compiling needs Triton: pip install 'qwen-ref[triton]' ({error})") from error
    if triton.knobs.runtime.interpret:
        raise RequestError("TRITON_INTERPRET=1 replaces the compiler; unset it to compile")
    return module


def tuned_devices(module: Any) -> list[str]:
    """The devices and families that a tuned table has entries for, any device first."""
    return sorted({device for device, _ in module.TUNED}, key=lambda device: device != ANY)


@contextmanager
def _recording(found: Found, device: str) -> Iterator[None]:
    """While active, all kernels note their launches, and tuned tables are read as on `device`."""
    from triton.runtime import JITFunction

    modules = [module for name, module in sys.modules.items() if name.startswith("qwen_kernels.")]  # some share kernels
    kernels = [(module, name, value) for module in modules for name, value in vars(module).items()
               if isinstance(value, JITFunction) and name[0] == "_"]  # fmt: skip
    shared: Any = import_module("qwen_kernels.launch")
    name_of = shared._name
    try:
        shared._name = lambda *_: device
        for module, name, kernel in kernels:
            setattr(module, name, _Recorder(kernel, found, device))
        yield
    finally:
        shared._name = name_of
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


class _Recorder:
    def __init__(self, kernel: Any, found: Found, device: str) -> None:
        self.kernel, self.found, self.device = kernel, found, device

    def __getitem__(self, grid: Any) -> Any:
        return self.note

    def note(self, *args: Any, **kwargs: Any) -> None:
        """Triton's own rules: constants stay constants, an integer 1 becomes one, multiples of 16 are marked."""
        names = self.kernel.arg_names
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        signature, constants, aligned = {}, {}, []
        for i, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, values.pop(parameter.name)
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = _type_of(value)
                if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                    aligned.append(i)  # what PyTorch allocates is aligned
        launch = Launch(
            self.kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), tuple(sorted(values.items())),
            self.device,
        )
        self.found.setdefault((self.kernel.fn.__name__, launch.text, self.device), launch)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _compile(launch: Launch, target: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = launch.kernel.fn.__name__.lstrip("_")
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    try:
        made = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(launch.options))
    except Exception as error:
        return Compiled(kernel, launch.text, target, fault=f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1]}")
    code = made.asm.get("ptx") or made.asm.get("amdgcn") or ""
    registers, spills = _nvidia_use(made.asm["cubin"]) if "cubin" in made.asm else _amd_use(code)
    shared = made.metadata.shared
    fault = None
    if shared > SHARED_LIMIT[target]:
        fault = f"needs {shared} bytes of shared memory, {target} has {SHARED_LIMIT[target]}"
    return Compiled(kernel, launch.text, target, registers, spills, shared, bool(TENSOR_CORES.search(code)), fault)


def _nvidia_use(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and bytes of local memory per thread, from the tool in Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    use = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return use.get("REG"), use["STACK"] + use["LOCAL"] if "LOCAL" in use else None


def _amd_use(code: str) -> tuple[int | None, int | None]:
    """Vector registers, and bytes of scratch memory per thread. What of scalar registers spills goes to vector registers."""
    use = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", code)}
    return use.get("vgpr_count"), use.get("private_segment_fixed_size")


def _or(value: int | None) -> str:
    return "?" if value is None else str(value)
