"""Memory of its own for what is large: cheap to touch for the first time, and given back whole when it is freed."""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_LARGE = 1 << 18  # bytes from which it pays
_FEW = 1 << 19  # bytes that may stay: a token's logits
_HUGE = 1 << 21  # of a huge page
_SHARED = 1 << 27  # of a mapping that several tensors share


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`; on Linux a large CPU tensor lies outside the C library's heap and in huge pages.

    Out of small pages the first touch of a GB costs 250,000 page faults, and seven times as long. In the heap, a model's
    weights and what a long prompt needs for a moment leave holes that fit nothing else: of Qwen3-0.6B in int4 they were a
    tenth of all memory.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = _arena.take(size) if _maps(size, device) else None
    if memory is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same for what is needed for a moment: memory that was given back lately, if it is large enough and not twice that. To
    touch new memory takes a prompt longer than to compute what is written there, and all layers write results of some sizes.
    No more is kept than is lent, so that next to nothing stays when a pass is over."""
    size = math.prod(shape) * dtype.itemsize
    memory = _taken(size) or (_mapped(size) if _maps(size, device) else None)
    if memory is None:
        return torch.empty(shape, dtype=dtype, device=device)
    _lent[id(memory)] = len(memory)
    bytes_of = (ctypes.c_char * size).from_buffer(memory)  # lives as long as the tensor and its views
    weakref.finalize(bytes_of, _give_back, memory).atexit = False
    return torch.frombuffer(bytes_of, dtype=dtype).view(shape)


# Threads take turns between any two steps of what follows, each of which is one of a list or a dict.
_spare: list[mmap.mmap] = []  # what was given back, the latest last
_lent: dict[int, int] = {}  # its bytes


def _taken(size: int) -> mmap.mmap | None:
    for memory in sorted(_spare, key=len):
        if size <= len(memory) < 2 * size:
            with suppress(ValueError):  # another thread took it
                _spare.remove(memory)
                return memory
    return None


def _give_back(memory: mmap.mmap) -> None:
    del _lent[id(memory)]
    _spare.append(memory)
    while sum(map(len, [*_spare])) > max(sum([*_lent.values()]), _FEW):
        with suppress(IndexError):
            _spare.pop(0)


class _Arena:
    """Tensors one after the other in mappings that they share: most end within a huge page, where the next one begins."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapping: mmap.mmap | None = None
        self._used = 0

    def take(self, size: int) -> ctypes.Array[ctypes.c_char] | None:
        """So many bytes, whose pages are given back when what was made of them is gone; None where they cannot be had."""
        with self._lock:
            memory, start = self._mapping, self._used
            if memory is None or start + size > len(memory):
                memory, start = _mapped(max(size, _SHARED)), 0
            if memory is None:
                return None
            end = start + _up(size, mmap.PAGESIZE)
            if self._mapping is None or len(memory) - end >= len(self._mapping) - self._used or memory is self._mapping:
                self._mapping, self._used = memory, end
        piece = (ctypes.c_char * size).from_buffer(memory, start)
        weakref.finalize(piece, memory.madvise, mmap.MADV_DONTNEED, start, end - start).atexit = False
        return piece


_arena = _Arena()


def _maps(size: int, device: torch.device) -> bool:
    return device.type == "cpu" and size >= _LARGE and hasattr(mmap, "MADV_HUGEPAGE")


def _mapped(size: int) -> mmap.mmap | None:
    """So many bytes in huge pages, or some more: Linux aligns only what is whole pages. None where they cannot be had."""
    with suppress(OSError):  # no more mappings to be had, or a kernel without huge pages
        whole = _up(size, _HUGE) if size > _HUGE // 2 else size
        memory = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return memory
    return None


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat` into such memory."""
    first = tensors[0]
    shape = [*first.shape]
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return torch.cat([*tensors], dim=dim, out=empty(shape, first.dtype, first.device))


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack` into such memory."""
    first = tensors[0]
    return torch.stack([*tensors], out=empty((len(tensors), *first.shape), first.dtype, first.device))
