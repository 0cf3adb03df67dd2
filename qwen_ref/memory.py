"""Memory of its own for what is large: cheap to touch for the first time, and given back whole when it is freed."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_LARGE = 1 << 18  # bytes from which it pays


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`; on Linux a large CPU tensor lies outside the C library's heap and in huge pages.

    Out of small pages the first touch of a GB costs 250,000 page faults. In the heap, a model's weights and what a long
    prompt needs for a moment leave holes that fit nothing else: of Qwen3-0.6B in int4 they were a tenth of all memory.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and size >= _LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # no more mappings to be had, or a kernel without huge pages
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(memory, dtype=dtype).view(shape)
    return torch.empty(shape, dtype=dtype, device=device)


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
