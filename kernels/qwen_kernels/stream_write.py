"""stream_write in Triton: a sub-layer's output into n residual streams, read once and added to each by its own gain.

Algorithm: hyper-connections, Zhu et al. 2024 (arXiv 2409.19606), in Qwen4-Exp's form. A program holds a piece of the hidden
axis of one token's output and goes over its streams; every step is rounded where `ops.stream_write` rounds it.

Bytes: (2 n + 1) M H elements. FLOPs: 2 n M H: memory bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref import ops
from qwen_ref.errors import RequestError

from .launch import ANY, on, require, row_offset, rows, supports, tuned

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.stream_write
TOLERANCE = 2.0
TUNED = {(ANY, "rows"): {"BLOCK": 512, "num_warps": 4}}


def run(x: Tensor, out: Tensor, logits: Tensor) -> Tensor:
    """x (..., n, H), out (..., H), logits (..., n), any strides. Returns x's shape and dtype."""
    require("stream_write", x, out, logits)
    if out.shape != (*x.shape[:-2], x.shape[-1]) or logits.shape != x.shape[:-1] or {out.dtype, logits.dtype} != {x.dtype}:
        raise RequestError(
            f"the triton stream_write needs x (..., n, H), out (..., H) and logits (..., n) of one dtype, got "
            f"{tuple(x.shape)}, {tuple(out.shape)} and {tuple(logits.shape)}"
        )
    streams, width = x.shape[-2:]
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if result.numel() == 0:
        return result
    (size0, size1, size2), (xs, os, ls, rs) = rows(x[..., 0, :], out, logits, result[..., 0, :])
    launch = tuned(TUNED, x.device, "rows")
    with on(x.device):
        _stream_write[(size0 * size1 * size2, triton.cdiv(width, launch["BLOCK"]))](
            x, out, logits, result, streams, width, size1, size2,
            *xs, *x.stride()[-2:], *os, out.stride(-1), *ls, logits.stride(-1), *rs, *result.stride()[-2:],
            **launch,
        )  # fmt: skip
    return result


@triton.jit
def _stream_write(
    x, out, logits, result, streams, width, size1, size2,
    x0, x1, x2, x_stream, x3, o0, o1, o2, o3, l0, l1, l2, l_stream, r0, r1, r2, r_stream, r3,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = column < width
    dtype: tl.constexpr = result.dtype.element_ty
    source = x + row_offset(row, size1, size2, x0, x1, x2) + column * x3
    target = result + row_offset(row, size1, size2, r0, r1, r2) + column * r3
    gates = logits + row_offset(row, size1, size2, l0, l1, l2)
    added = tl.load(out + row_offset(row, size1, size2, o0, o1, o2) + column * o3, mask=inside, other=0.0).to(tl.float32)
    for s in range(streams):
        gain = (tl.load(gates + s * l_stream).to(tl.float32) / streams).to(dtype).to(tl.float32)
        gain = 2 * tl.sigmoid(gain).to(dtype).to(tl.float32)
        change = (gain * added).to(dtype).to(tl.float32)
        value = tl.load(source + s * x_stream, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + s * r_stream, (value + change).to(dtype), mask=inside)
