"""One safetensors file: read, mapped, written.

It is eight bytes of header length N (u64, little-endian), N bytes of JSON that map each tensor's name to {"dtype", "shape",
"data_offsets": [begin, end)}, and the tensors' bytes, row-major and little-endian, without gaps
(github.com/huggingface/safetensors, README "Format"). Everything that can be wrong with it is found in the header.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import re
import stat
import struct
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import CheckpointError
from .limits import LIMITS
from .strict_json import parse_json, quote

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_BLOCK_BYTES = 1 << 22  # read at a time where a tensor is converted or moved: stays in the processor's cache
_MAX_RANK = 8  # no weight has more dimensions
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14, which Python's mmap does not name
_SURROGATE = re.compile("[\ud800-\udfff]")


class TensorInfo(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte offsets in the file
    end: int


class SafetensorsFile:
    """An open safetensors file whose header has been checked completely. CheckpointError on any damage.

    `tensors` maps names to `TensorInfo` in file order, `metadata` is the header's `__metadata__`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO would block on open
                raise CheckpointError(f"{path}: not a regular file")
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as problem:
            raise CheckpointError(f"{path}: {problem.strerror or problem}") from problem
        try:
            self.tensors, self.metadata = self._header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """One tensor, in CPU memory of its own."""
        info = self.tensors[name]
        out = torch.empty(info.shape, dtype=info.dtype)
        self._fill(name, info.start, out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        """Read a tensor into `out`, which has its shape: in place where dtype and layout agree, else block by block."""
        info = self.tensors[name]
        if tuple(out.shape) != info.shape or not converts(info.dtype, out.dtype):
            wanted = f"{out.dtype} {list(out.shape)}"
            raise CheckpointError(f"{self.path}: {quote(name)} is {info.dtype} {list(info.shape)}, not {wanted}")
        if out.device.type == "cpu" and out.dtype == info.dtype and out.is_contiguous():
            self._fill(name, info.start, out)
            return
        if not info.shape or not out.numel():
            out.copy_(self.read(name))
            return
        row = (info.end - info.start) // info.shape[0]  # bytes
        step = min(max(1, _BLOCK_BYTES // row), info.shape[0])
        block = torch.empty((step, *info.shape[1:]), dtype=info.dtype)
        for first in range(0, info.shape[0], step):
            part = out[first : first + step]
            self._fill(name, info.start + first * row, block[: len(part)])
            part.copy_(block[: len(part)])

    def view(self, name: str) -> Tensor | None:
        """A tensor that lies in the mapped file, private to this process once written to. None where it cannot be mapped.

        Valid after the file is closed; the mapping ends with its last view.
        """
        info = self.tensors[name]
        if info.start == info.end or info.start % info.dtype.itemsize or self._mapping is None:
            return None
        flat = torch.frombuffer(self._mapping, dtype=info.dtype, count=math.prod(info.shape), offset=info.start)
        return flat.view(info.shape)

    def prefault(self, name: str) -> None:
        """Bring a mapped tensor into memory where the system can (Linux): a file that has shrunk is an error here."""
        if sys.platform != "linux" or self._mapping is None:
            return
        info = self.tensors[name]
        start = info.start - info.start % mmap.PAGESIZE
        try:
            self._mapping.madvise(_POPULATE_READ, start, info.end - start)
        except OSError as problem:  # an older kernel has EINVAL
            if problem.errno == errno.EFAULT:  # touching it would be a SIGBUS
                raise CheckpointError(f"{self.path}: ends inside tensor {quote(name)}: has it shrunk?") from problem

    def read_by_rows(self, name: str) -> None:
        """Tell the system that a mapped tensor is read here and there: no page is worth reading before it is asked for."""
        if self._mapping is None or not hasattr(mmap, "MADV_RANDOM"):
            return
        info = self.tensors[name]
        start = info.start - info.start % mmap.PAGESIZE
        self._mapping.madvise(mmap.MADV_RANDOM, start, info.end - start)

    def release(self, name: str) -> None:
        """Let go of a mapped tensor's memory; it is read from the file again if it is touched. Changes to it are lost."""
        if self._mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        info = self.tensors[name]
        first, last = -(-info.start // mmap.PAGESIZE), info.end // mmap.PAGESIZE  # whole pages: others are of neighbours
        if last > first:
            self._mapping.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)

    @cached_property
    def _mapping(self) -> mmap.mmap | None:
        size = os.fstat(self._file.fileno()).st_size
        if size != self._size:
            raise CheckpointError(f"{self.path}: has {size:,} bytes, {self._size:,} a moment ago: is it being written?")
        try:
            return mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY)
        except OSError:  # some network shares cannot, and under strict overcommit a copy on write counts as memory
            return None

    def _fill(self, name: str, start: int, out: Tensor) -> None:
        memory = out.view(-1).view(torch.uint8).numpy().data if out.numel() else memoryview(b"")
        self._file.seek(start)
        done = 0
        while done < len(memory):
            try:
                count = self._file.readinto(memory[done:])  # one call may return less than asked: Linux stops at 2 GiB
            except OSError as problem:
                raise CheckpointError(f"{self.path}: {problem.strerror or problem}") from problem
            if not count:
                raise CheckpointError(f"{self.path}: ends inside tensor {quote(name)}: has it shrunk?")
            done += count

    def _header(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        self._size = size = os.fstat(self._file.fileno()).st_size
        start = self._file.read(8) or b""
        if len(start) < 8:
            raise self._damage(f"it has only {size} bytes" if size else "it is empty")
        (length,) = struct.unpack("<Q", start)
        # Only a length that cannot be: "\x80\x02", which begins pickles, also begins a header of 640 bytes.
        if 8 + length > size or length > LIMITS.safetensors_header_bytes:
            self._recognise(start)
        if length > LIMITS.safetensors_header_bytes:
            raise self._damage(f"its header claims {length:,} bytes, over {LIMITS.safetensors_header_bytes:,}")
        if 8 + length > size:
            raise self._damage(f"its header claims {length:,} bytes, but the file has {size:,}: truncated?")
        raw = self._file.read(length) or b""
        if len(raw) < length:
            raise self._damage("it ends inside its header")
        header = parse_json(raw, f"{self.path} (header)", CheckpointError)
        if not isinstance(header, dict):
            raise self._damage("its header is not a JSON object")
        if not raw.startswith(b"{"):
            raise self._damage("its header does not begin with {, as the format wants")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._damage("__metadata__ does not map strings to strings")
        tensors = {name: self._tensor(quote(name), entry, 8 + length) for name, entry in header.items()}
        if any(_SURROGATE.search(text) for text in (*header, *metadata, *metadata.values())):
            raise self._damage("a name holds half a surrogate pair, which is no character")
        ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
        at = 8 + length
        for name, info in ordered.items():
            if info.start != at:
                kind = "overlaps the tensor before it" if info.start < at else "leaves a hole before it"
                raise self._damage(f"tensor {quote(name)} {kind}")
            at = info.end
        if at != size:
            raise self._damage(f"its tensors end at byte {at:,} of {size:,}" + (": truncated" if at > size else ""))
        return ordered, metadata

    def _tensor(self, name: str, entry: Any, base: int) -> TensorInfo:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._damage(f"tensor {name} lacks dtype, shape or data_offsets, or has more")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
            raise self._damage(f"tensor {name} has the unknown dtype {quote(entry['dtype'])}")
        if not isinstance(shape, list) or any(type(n) is not int or not 0 <= n < 1 << 63 for n in shape):
            raise self._damage(f"tensor {name} has the shape {quote(shape)}, not a list of sizes")
        if len(shape) > _MAX_RANK:  # first: the product of a million sizes takes hours
            raise self._damage(f"tensor {name} has {len(shape):,} dimensions, over {_MAX_RANK}")
        if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int or n < 0 for n in offsets):
            raise self._damage(f"tensor {name} has the data_offsets {quote(offsets)}")
        dtype, (begin, end) = DTYPES[entry["dtype"]], offsets
        if end - begin != math.prod(shape) * dtype.itemsize or math.prod(n or 1 for n in shape) >= 1 << 63:
            what = f"{entry['dtype']} {shape}"
            raise self._damage(f"tensor {name} of {what} does not fit its data_offsets {quote(offsets)}")
        return TensorInfo(dtype, tuple(shape), base + begin, base + end)

    def _recognise(self, start: bytes) -> None:
        for magic, what in (
            (b"version ", "a Git LFS pointer, not the file itself: run `git lfs pull`, or download from the hub"),
            (b"<!doctyp", "an HTML page: the download went wrong"),
            (b"<html", "an HTML page: the download went wrong"),
            (b"PK\x03\x04", "a zip or PyTorch pickle file; only safetensors are read, never pickles"),
            (b"\x80\x02", "a pickle file; only safetensors are read, never pickles"),
            (b"GGUF", "a GGUF file, not safetensors"),
        ):
            if start.lower().startswith(magic.lower()):
                raise self._damage(f"it is {what}")

    def _damage(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a usable safetensors file: {problem}")


def exists(path: Path) -> bool:
    """Whether something has this name. CheckpointError for a name that nothing can have."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as problem:  # too long, or with a zero byte
        raise CheckpointError(f"cannot write {quote(str(path))}: {problem}") from problem
    return True


def converts(disk: torch.dtype, memory: torch.dtype) -> bool:
    """Floats convert into each other; integers and float8 are codes that mean nothing without their scales."""
    return disk == memory or (disk in _WEIGHT_DTYPES and memory in _WEIGHT_DTYPES)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to one file, one at a time; `metadata` is added to the header's `__metadata__`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    # Wide dtypes first: each tensor is then aligned to its own item size, which readers that map the file rely on.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise CheckpointError(f"{quote(name)} is {tensor.dtype}, which safetensors cannot hold")
        end = at + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % 64)  # so that the data begins at a cache line, also where the file is mapped
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for tensor in tensors.values():
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
