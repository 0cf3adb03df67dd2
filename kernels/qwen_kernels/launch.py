"""What the launchers share: who may run, how strided tensors become rows, and the table of launch parameters."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref.backend import emulated
from qwen_ref.errors import RequestError

ANY = "any device"  # the key of a launch for every GPU without one of its own; where none was measured, of reasoning
INSTINCT = "AMD Instinct"  # how the names of a family begin, and the key of its launches: its warps have 64 threads
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """The answer of every kernel here: None, or why not. The backend has seen to the device before it asks."""
    if dtype not in DTYPES:
        return f"{dtype} is not one of bfloat16, float16, float32"
    if triton.knobs.runtime.interpret and dtype == torch.bfloat16:
        return "Triton's CPU interpreter truncates to bfloat16 where a GPU rounds; use float16 or float32"
    return None


def require(operation: str, *tensors: Tensor) -> None:
    """Refuse what the kernels would compute wrongly in silence. Raises RequestError."""
    first = tensors[0]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RequestError(
            f"the triton {operation} has no backward pass; use torch.no_grad(), or backend.use({{{operation!r}: 'eager'}})"
        )
    for t in tensors[1:]:
        if t.device != first.device:
            raise RequestError(f"the triton {operation} got tensors on {first.device} and on {t.device}")


def same(operation: str, a: Tensor, b: Tensor) -> None:
    """Raises RequestError unless both have the same shape and dtype."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise RequestError(
            f"the triton {operation} needs equal shapes and dtypes, got {tuple(a.shape)} {a.dtype} and "
            f"{tuple(b.shape)} {b.dtype}"
        )


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, which need not be the one that holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def tuned(table: Mapping[tuple[str, Any], dict[str, int]], device: torch.device, shape_class: Any) -> dict[str, int]:
    """Launch parameters chosen for this device, otherwise the ones for its family, otherwise those for any device."""
    name = _name(device.type, device.index)
    family = INSTINCT if name.startswith(INSTINCT) else ANY
    return table.get((name, shape_class)) or table.get((family, shape_class)) or table[ANY, shape_class]


@torch.compiler.assume_constant_result
def _name(kind: str, index: int | None) -> str:
    return torch.cuda.get_device_name(index) if kind == "cuda" else emulated() or kind


def rows(*tensors: Tensor) -> tuple[list[int], list[list[int]]]:
    """Equally shaped tensors (..., W) as rows of W: three leading sizes, and per tensor the strides of those three.

    Axes that are adjacent in every tensor are joined, so a contiguous tensor, a slice of columns and a transposed
    (B, N, T, D) view all need no copy. Raises RequestError in the rare case that more than three axes remain.
    """
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for axis, size in enumerate(tensors[0].shape[:-1]):
        if size == 1:
            continue
        if sizes and all(held[-1] == t.stride(axis) * size for held, t in zip(strides, tensors, strict=True)):
            sizes[-1] *= size
            for held, t in zip(strides, tensors, strict=True):
                held[-1] = t.stride(axis)
        else:
            sizes.append(size)
            for held, t in zip(strides, tensors, strict=True):
                held.append(t.stride(axis))
    if len(sizes) > 3:
        raise RequestError(f"shape {tuple(tensors[0].shape)} with these strides is not three axes of rows; call .contiguous()")
    missing = 3 - len(sizes)
    return [1] * missing + sizes, [[0] * missing + held for held in strides]


@triton.jit
def row_offset(row, size1, size2, stride0, stride1, stride2):
    """Where a row begins: `row` counts through three axes whose last two have size1 and size2 elements. int64."""
    row = row.to(tl.int64)
    outer = row // size2
    return (outer // size1) * stride0 + (outer % size1) * stride1 + (row % size2) * stride2
