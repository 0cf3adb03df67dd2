"""Memory of its own for what is large: cheap to touch for the first time, and given back whole when it is freed."""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_LARGE = 1 << 18  # bytes from which it pays
_SPARE = 1 << 26  # bytes kept of what was given back


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`; on Linux a large CPU tensor lies outside the C library's heap and in huge pages.

    Out of small pages the first touch of a GB costs 250,000 page faults. In the heap, a model's weights and what a long
    prompt needs for a moment leave holes that fit nothing else: of Qwen3-0.6B in int4 they were a tenth of all memory.
    """
    memory = _mapped(math.prod(shape) * dtype.itemsize, device)
    if memory is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same for what is needed for a moment: memory that was given back lately, if there is some of this size. To touch new
    memory takes a prompt longer than to compute what is written there, and every layer writes results of the same sizes."""
    size = math.prod(shape) * dtype.itemsize
    try:
        memory: mmap.mmap | None = _spare[size].pop()
    except (KeyError, IndexError):
        memory = _mapped(size, device)
    if memory is None:
        return torch.empty(shape, dtype=dtype, device=device)
    lent = (ctypes.c_char * size).from_buffer(memory)  # lives as long as the tensor and its views
    weakref.finalize(lent, _give_back, memory).atexit = False
    return torch.frombuffer(lent, dtype=dtype).view(shape)


_spare: dict[int, list[mmap.mmap]] = {}  # what was given back, by its size; every step is one that threads cannot divide


def _give_back(memory: mmap.mmap) -> None:
    if len(memory) > _SPARE:
        return
    if sum(size * len(of_size) for size, of_size in [*_spare.items()]) + len(memory) > _SPARE:
        _spare.clear()
    _spare.setdefault(len(memory), []).append(memory)


def _mapped(size: int, device: torch.device) -> mmap.mmap | None:
    """So many bytes in huge pages; None where it does not pay or cannot be had."""
    if device.type == "cpu" and size >= _LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # no more mappings to be had, or a kernel without huge pages
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            return memory
    return None


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
