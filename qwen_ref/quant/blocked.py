"""Products with packed matrices on a CPU, a few dequantised rows at a time, in place of the formulas in `packed`, which
dequantise the whole matrix first. They need nothing and take every layout; `cpp` is faster with those it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_ops import native
from . import packed
from .packed import Packed

BLOCK_BYTES = 2 << 20  # of dequantised rows: they stay in the second- or third-level cache until they are multiplied


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cpu" else "made for CPUs"


def _dequantized(weight: Packed, first: int, last: int, columns: int, dtype: torch.dtype) -> Tensor:
    return packed.rows(weight, first, last).dequantize(dtype, columns)


def linear_blocked(
    x: Tensor, weight: Packed, bias: Tensor | None = None, dequantize: Callable[..., Tensor] = _dequantized
) -> Tensor:
    """x weight^T + bias of any layout, holding BLOCK_BYTES of dequantised rows instead of a whole matrix.

    x (..., K), weight (N, K), bias (N,) -> (..., N) in x's dtype. Products are summed in at least fp32; without native
    bf16 the factors are not rounded below fp32 either.
    """
    rows, columns = weight[0].shape[-2], x.shape[-1]
    high = weight.block[0] if isinstance(weight, packed.Fp8) else 1
    dtype = x.dtype if native(x.dtype) else torch.promote_types(x.dtype, torch.float32)
    most = max(BLOCK_BYTES // (columns * dtype.itemsize), 1)
    wide, bias = x.to(dtype), None if bias is None else bias.to(dtype).expand(rows)  # RuntimeError if it has another length
    blocks = []
    for some in _spans(rows, high, most):
        block = dequantize(weight, some.start, some.stop, columns, dtype)  # (n, K)
        blocks.append(F.linear(wide, block, None if bias is None else bias[some]).to(x.dtype))
    return torch.cat(blocks, dim=-1)  # (..., N)


def _spans(rows: int, high: int, most: int) -> Iterator[slice]:
    """All rows, at most so many at a time: whole blocks of `high`, or parts of one where that is higher."""
    whole, step = (rows, most // high * high) if high <= most else (high, most)
    for start in range(0, rows, whole):
        end = min(start + whole, rows)
        yield from (slice(first, min(first + step, end)) for first in range(start, end, step))


def moe_blocked(x: Tensor, gate_up: Packed, down: Packed, weights: Tensor, experts: Tensor) -> Tensor:
    """`packed.moe_packed`, every matrix through `linear_blocked`."""
    return packed.moe_packed(x, gate_up, down, weights, experts, linear_blocked)
