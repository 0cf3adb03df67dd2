"""Memory of its own for what is large: cheap to touch for the first time, and given back whole when it is freed."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_LARGE = 1 << 18  # bytes from which it pays
_HUGE = 1 << 21  # of a huge page
_SHARED = 1 << 27  # of a mapping that several tensors share
_STAYS = 1 << 23  # of scratch memory, when nothing is lent: what a short prompt needs


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`; on Linux a large CPU tensor lies outside the C library's heap and in huge pages.

    Out of small pages the first touch of a GB costs 250,000 page faults, and up to seven times as long. In the heap, a model's
    weights and what a long prompt needs for a moment leave holes that fit nothing else: of Qwen3-0.6B in int4 they were a
    tenth of all memory.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = _arena.take(size) if _maps(size, device) else None
    if memory is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same for what is needed for a moment: memory that was given back lately. To touch new memory takes a prompt as long
    as to compute what is written there. The system gets back what is free when a pass is over: when no more is lent than before
    it, or less than a 32nd of the most that was. Larger results keep the rest while they are kept themselves."""
    size = math.prod(shape) * dtype.itemsize
    memory = _pool.lend(size) if _maps(size, device) else None
    if memory is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class _Sheet:
    """A mapping that is lent in parts, the lowest that is free first."""

    def __init__(self, memory: mmap.mmap, lent: int) -> None:
        self.memory = memory
        self.free = [(lent, len(memory))] if lent < len(memory) else []  # in order, none beside another

    @property
    def lent(self) -> int:
        return len(self.memory) - sum(end - start for start, end in self.free)

    def take(self, size: int) -> int | None:
        """Where so many bytes begin, which are no longer free."""
        for i, (start, end) in enumerate(self.free):
            if size <= end - start:
                self.free[i : i + 1] = [(start + size, end)] if size < end - start else []
                return start
        return None

    def put(self, start: int, end: int) -> None:
        self.free = sorted([*self.free, (start, end)])
        for i in range(len(self.free) - 2, -1, -1):
            if self.free[i][1] == self.free[i + 1][0]:
                self.free[i : i + 2] = [(self.free[i][0], self.free[i + 1][1])]

    def trim(self) -> None:
        """Give back what is free, from _STAYS on: whole huge pages, for a part of one leaves small ones."""
        for start, end in self.free:
            start, end = max(_up(start, _HUGE), _STAYS), end // _HUGE * _HUGE
            if start < end:
                self.memory.madvise(mmap.MADV_DONTNEED, start, end - start)


class _Pool:
    """What `scratch` lends."""

    _LITTLE = 32  # of the most: a pass has a tenth of it all the time, the residual stream

    def __init__(self) -> None:
        self.sheets: list[_Sheet] = []
        self._before = self._most = 0  # bytes lent when memory was last given back, and the most since
        self._lock = threading.Lock()
        self._returned: list[tuple[_Sheet, int, int]] = []  # by finalizers, which may run in the middle of what has the lock

    def lend(self, size: int) -> ctypes.Array[ctypes.c_char] | None:
        whole = _up(size, mmap.PAGESIZE)
        with self._lock:
            self._settle()
            found = next(((sheet, start) for sheet in self.sheets if (start := sheet.take(whole)) is not None), None)
            if found is None:
                memory = _mapped(max(whole, _SHARED))
                if memory is None:
                    return None
                self.sheets.append(_Sheet(memory, whole))
                found = self.sheets[-1], 0
            self._most = max(self._most, self._lent())
        sheet, start = found
        piece = (ctypes.c_char * size).from_buffer(sheet.memory, start)  # lives as long as the tensor and its views
        weakref.finalize(piece, self._give_back, sheet, start, start + whole).atexit = False
        return piece

    def _lent(self) -> int:
        return sum(sheet.lent for sheet in self.sheets)

    def _give_back(self, sheet: _Sheet, start: int, end: int) -> None:
        self._returned.append((sheet, start, end))
        while self._returned and self._lock.acquire(blocking=False):  # else who has it is about to lend, and looks first
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        if not self._returned:
            return
        while self._returned:
            sheet, start, end = self._returned.pop()
            sheet.put(start, end)
        lent = self._lent()
        if lent <= self._before or self._LITTLE * lent < self._most:
            self._before = self._most = lent
            self.sheets = [sheet for i, sheet in enumerate(self.sheets) if sheet.lent or not i]
            for sheet in self.sheets:
                sheet.trim()


class _Arena:
    """Tensors one after the other in mappings that they share: most end within a huge page, where the next one begins."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapping: mmap.mmap | None = None
        self._used = 0

    def take(self, size: int) -> ctypes.Array[ctypes.c_char] | None:
        """So many bytes; None where they cannot be had. When what was made of them is gone, their pages leave the process; of a
        huge page that others share, the memory is free when they are gone too, or the system is short of it."""
        with self._lock:
            memory, start = self._mapping, self._used
            if memory is None or start + size > len(memory):
                memory, start = _mapped(max(size, _SHARED)), 0
            if memory is None:
                return None
            end = start + _up(size, mmap.PAGESIZE)
            left = 0 if self._mapping is None else len(self._mapping) - self._used
            if memory is self._mapping or len(memory) - end >= left:  # what has more left is taken from next
                self._mapping, self._used = memory, end
        piece = (ctypes.c_char * size).from_buffer(memory, start)
        weakref.finalize(piece, memory.madvise, mmap.MADV_DONTNEED, start, end - start).atexit = False
        return piece


_arena = _Arena()
_pool = _Pool()


def _forget() -> None:
    """A forked process begins anew: a thread that had a lock is not in it."""
    global _arena, _pool
    _arena, _pool = _Arena(), _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _maps(size: int, device: torch.device) -> bool:
    return device.type == "cpu" and size >= _LARGE and hasattr(mmap, "MADV_HUGEPAGE")


def _mapped(size: int) -> mmap.mmap | None:
    """So many bytes or some more, in huge pages: Linux (6.7) aligns what is whole ones. None where they cannot be had."""
    with suppress(OSError, OverflowError):  # no more mappings to be had, or a kernel without huge pages
        memory = mmap.mmap(-1, _up(size, _HUGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
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
