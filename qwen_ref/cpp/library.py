"""The compiled operations: `library.cpp` as a shared library, its calls, and lists of them that are made again at once.

It is compiled when it is first asked for, if there is a C++ compiler and the CPU has AVX2, and kept in the user's cache
folder, or a temporary one where there is none: loading it again takes no time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..torch_ops import has

SOURCE = Path(__file__).with_name("library.cpp")
FLAGS = ("-O3", "-ffp-contract=off", "-std=c++17", "-mavx2", "-mfma", "-mf16c", "-fopenmp", "-fPIC", "-shared")
BEYOND = {  # what a CPU may have besides, by PyTorch's names, and what lets a compiler use it
    "avx512_vnni": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
    "avx_vnni": ("-mavxvnni",),
    "amx_bf16": ("-mamx-tile", "-mamx-bf16"),
}
COMPILE_SECONDS = 120

Argument = Tensor | int | float | None


def why_not() -> str | None:
    """Why the library cannot be had; None if it can."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "needs AVX2"
    found = library()
    return found if isinstance(found, str) else None


def call(operation: str, *arguments: Argument) -> int:
    """Call an operation of library.cpp, for callers whom `why_not` has let through: tensors by their address, None for no
    tensor. Returns what it returns, 0 if nothing. What its tensors are and hold is for the caller to know."""
    numbers = [_address(a) if isinstance(a, Tensor) else _bits(a) if isinstance(a, float) else a or 0 for a in arguments]
    cells = struct.pack(f"{len(numbers) + 2}q", _number(operation), len(numbers), *numbers)
    if (tape := _recording.get()) is not None:
        tape.add(cells, arguments)
    return _run(cells, len(cells) // 8)


@cache
def has_tiles() -> bool:
    """Whether the CPU has a matrix unit that this process may use. Asked for here, and by no call: tapes hold those."""
    found = library()
    return not isinstance(found, str) and bool(found.has_tiles())


def _address(x: Tensor) -> int:
    if not x.is_cpu:
        raise RuntimeError(f"expected all tensors to be on the CPU, but one is on {x.device}")
    return x.data_ptr()


def _bits(number: float) -> int:
    return struct.unpack("q", struct.pack("d", number))[0]


def _run(cells: bytes | int, count: int) -> int:
    """Make the calls in so many cells, here or at an address."""
    found: Any = library()
    return found.run(cells, count)


@cache
def _number(operation: str) -> int:
    found: Any = library()
    number = found.find(operation.encode())
    if number < 0:
        raise AttributeError(f"library.cpp has no operation {operation!r}")
    return number


# ------------------------------------------------------------------------------------------------- recording


class Tape:
    """What a function computes of tensors, as the calls that it made when it was run once: they can all be made again by one,
    with the same memory, whatever is in it by then. Only `movable` tensors may be in other memory the next time.

    `whole`: whether the calls are all that it computed. Only then `replay` computes the same of other numbers.
    """

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor, movable: Sequence[Tensor] = ()) -> None:
        self.whole = True
        self._inputs = [x.clone() for x in inputs]
        self._bytes = b""
        self._held: list[torch.UntypedStorage] = []  # so that nobody else gets this memory, whatever the tensors go on to hold
        self._movable = {x.data_ptr(): i for i, x in enumerate(movable)}
        self._places: list[int] = []  # of cells that are addresses of movable tensors
        self._which: list[int] = []  # of these tensors each of them is
        token = _recording.set(self)
        try:
            with _Watch(self):
                self._output = function(*self._inputs)
        finally:
            _recording.reset(token)
        if not self.whole:  # and so never replayed
            self._inputs, self._bytes, self._held = [], b"", []
        self._cells = np.frombuffer(bytearray(self._bytes), np.int64)

    def add(self, cells: bytes, arguments: tuple[Argument, ...]) -> None:
        first = len(self._bytes) // 8 + 2  # behind the operation's number and how many arguments it has
        self._bytes += cells
        for i, argument in enumerate(arguments):
            if isinstance(argument, Tensor) and (moves := self._movable.get(argument.data_ptr())) is not None:
                self._places.append(first + i)
                self._which.append(moves)
            elif isinstance(argument, Tensor):
                self._held.append(argument.untyped_storage())

    def output(self) -> Tensor:
        """Of the last run, the first one included."""
        return self._output.clone()

    def replay(self, *inputs: Tensor, movable: Sequence[Tensor] = ()) -> Tensor:
        """What the function gives for these inputs and movable tensors, which must be as the first were. RuntimeError if a call
        fails."""
        with torch.inference_mode():  # in which these may have been made
            for mine, x in zip(self._inputs, inputs, strict=True):
                mine.copy_(x)
        self._cells[self._places] = np.array([_address(x) for x in movable], np.int64)[self._which]
        if failed := _run(self._cells.ctypes.data, self._cells.size):
            raise RuntimeError(f"a recorded call of {SOURCE.name} failed ({failed})")
        return self.output()


_recording: ContextVar[Tape | None] = ContextVar("recording", default=None)


def recording() -> bool:
    """Whether a tape is holding what is computed now."""
    return _recording.get() is not None


class _Watch(TorchDispatchMode):
    """Sees what PyTorch computes meanwhile, which no tape holds: views and new memory are not computed, and a plain copy
    becomes a call."""

    MEMORY = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.empty_strided)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch asks; to skip its compiler, it would first import it, which takes 140 MB

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and _same_bytes(*args[:2]):
            call("copy", *args[:2], args[0].nbytes)
            return args[0]
        if not func.is_view and func.overloadpacket not in self.MEMORY:
            self.tape.whole = False
        return func(*args, **(kwargs or {}))


def _same_bytes(to: Tensor, source: Tensor) -> bool:
    """Whether copying the one to the other is copying its memory."""
    return (to.dtype, to.shape, to.device.type) == (source.dtype, source.shape, "cpu") and source.is_cpu and (
        to.is_contiguous() and source.is_contiguous())


# ------------------------------------------------------------------------------------------------- compiling


@cache
def library() -> ctypes.CDLL | str:
    """library.cpp compiled, or the reason why it cannot be."""
    compiler = _compiler()
    if not compiler:
        return "needs a C++ compiler: install g++ or clang++, or name one in the environment variable CXX"
    for flags in (_beyond(), ()):  # a compiler may be older than the CPU
        try:
            found = ctypes.CDLL(str(_compile(compiler, (*FLAGS, *flags))))
            break
        except subprocess.CalledProcessError as error:
            reason = f"{compiler[0]} failed: {error.stderr.strip().splitlines()[0] if error.stderr.strip() else error}"
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"compiling failed: {error}"
    else:
        return reason
    found.find.argtypes, found.find.restype = (ctypes.c_char_p,), ctypes.c_int64
    found.run.argtypes, found.run.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_int
    return found


def _compiler() -> list[str]:
    """The command that CXX names, or the first compiler found; empty if there is none."""
    named = os.environ.get("CXX", "").split()
    return named or [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))][:1]


def _beyond() -> tuple[str, ...]:
    return tuple(flag for name, flags in BEYOND.items() if has(name) for flag in flags)


def _compile(compiler: list[str], flags: tuple[str, ...]) -> Path:
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=COMPILE_SECONDS).stdout
    sources = [path.read_bytes() for path in sorted((*SOURCE.parent.glob("*.h"), SOURCE))]
    key = hashlib.sha256(b"\0".join((*sources, " ".join((*compiler, *flags)).encode(), version))).hexdigest()
    path = _folder() / f"cpu-{key[:24]}.so"
    if not path.exists():
        if sys.stderr is not None and sys.stderr.isatty():
            print("qwen_ref: compiling the CPU operations, once (some 15 s)", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # complete before it has its name
            made = Path(folder) / path.name
            command = [*compiler, *flags, str(SOURCE), "-o", str(made)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_SECONDS)
            made.replace(path)
    return path


def _folder() -> Path:
    """The user's folder for what was compiled: in the cache, or where that cannot be written, among temporary files."""
    kept = Path(tempfile.gettempdir()) / f"qwen-ref-{os.getuid()}"
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen-ref"
        if _is_ours(cache):
            return cache
    with suppress(OSError):
        if _is_ours(kept):
            return kept
    return Path(tempfile.mkdtemp(prefix="qwen-ref-"))


def _is_ours(folder: Path) -> bool:
    """Whether only this user can write to it. A link is not trusted: who made it may turn it to another folder."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.lstat()
    is_own = stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o022
    return is_own and os.access(folder, os.W_OK)
