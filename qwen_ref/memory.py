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
_FEW = 1 << 19  # bytes that may stay: a token's logits


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
    """The same for what is needed for a moment: memory that was given back lately, if it is large enough and not twice that. To
    touch new memory takes a prompt longer than to compute what is written there, and all layers write results of some sizes.
    No more is kept than is lent, so that next to nothing stays when a pass is over."""
    size = math.prod(shape) * dtype.itemsize
    memory = _taken(size) or _mapped(size, device)
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
