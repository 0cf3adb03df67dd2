"""A GPU in NumPy: the machine code (PTX) of a Triton kernel, run instruction by instruction on a CPU.

Triton's own interpreter runs a kernel's Python, and computes bfloat16 wrongly. This runs what the compiler made of it for
sm_80 or sm_90: its layouts, shuffles, tensor cores (mma, wgmma), copies in flight and barriers. It sees what a GPU would not
say: an access outside every tensor, a misaligned one, a race between warps in shared memory or between blocks, a result read
before it is there. Warps of one block that race in global memory it does not see.

It does not see what the assembler makes of PTX (registers, spills, scheduling), nor time; and tensor cores add up in an order
of their own, of FP8 on a Hopper with 14 bits, where this adds in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from ... import backend
from ...errors import RequestError
from .machine import run
from .memory import Fault
from .ptx import Program, parse

__all__ = ["ARCHITECTURES", "Fault", "emulate"]

ARCHITECTURES = {"sm_80": 80, "sm_90": 90}
GPUS = {"sm_80": "NVIDIA A100-SXM4-80GB", "sm_90": "NVIDIA H200"}  # whose launch parameters are taken


@contextmanager
def emulate(target: str = "sm_90") -> Iterator[None]:
    """While active, Triton kernels compile for `target` and run here, on CPU tensors; `use("triton")` chooses them.

    Raises RequestError without Triton, under its interpreter, or for a target that is not in ARCHITECTURES.
    """
    if target not in ARCHITECTURES:
        raise RequestError(f"no emulator of {target!r}; there are {list(ARCHITECTURES)}")
    try:
        import triton
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction
    except ImportError as error:
        raise RequestError(f"emulating needs Triton: pip install 'qwen-ref[triton]' ({error})") from error
    if triton.knobs.runtime.interpret:
        raise RequestError("TRITON_INTERPRET=1 replaces the compiler; unset it to run what it makes")
    compile, before = JITFunction.run, driver._active
    driver.set_active(_Driver(target))
    JITFunction.run = lambda self, *args, **kwargs: _launch(self, compile, *args, **kwargs)
    try:
        with backend.emulating(GPUS[target]):
            yield
    finally:
        JITFunction.run = compile
        driver._active = before


class _Driver:
    """What Triton asks about the GPU before it compiles."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return self.target  # kernels are cached by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURES[self.target], 32)


def _launch(kernel: Any, compile: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
    """In place of JITFunction.run: compile as for a GPU, then run the PTX."""
    made = compile(kernel, *args, grid=grid, warmup=True, **kwargs)
    if warmup:
        return made
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **{k: v for k, v in kwargs.items() if k in kernel.arg_names}}
    for parameter in kernel.params:
        values.setdefault(parameter.name, parameter.default)
    if callable(grid):
        grid = grid(values)
    passed = [values[name] for name, kind in made.src.signature.items() if kind != "constexpr"]
    text = made.asm["ptx"]
    x, y, z = (int(n) for n in (*grid, 1, 1)[:3])
    run(_parsed(text), (x, y, z), made.metadata.num_warps * 32, made.metadata.shared, passed)
    return made


@lru_cache(maxsize=256)
def _parsed(text: str) -> Program:
    return parse(text)
