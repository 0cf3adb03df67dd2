"""stream_mix in Triton: what a sub-layer reads of n residual streams, one read of the streams and of their weights.

Algorithm: hyper-connections, Zhu et al. 2024 (arXiv 2409.19606), in Qwen4-Exp's form. A program holds a piece of the hidden
axis and goes over the streams of its token; sigmoid and product are rounded where `ops.stream_mix` rounds them, the mean is
fp32.

Bytes: (2 n + 1) M H elements. FLOPs: about 7 n M H: memory bound.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref import ops

from .launch import ANY, on, require, row_offset, rows, same, supports, tuned

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.stream_mix
TOLERANCE = 2.0
TUNED = {(ANY, "rows"): {"BLOCK": 512, "num_warps": 4}}


def run(normed: Tensor, logits: Tensor) -> Tensor:
    """normed, logits (..., n, H), equal shapes, any strides. Returns (..., H)."""
    require("stream_mix", normed, logits)
    same("stream_mix", normed, logits)
    streams, width = normed.shape[-2:]
    out = torch.empty(*normed.shape[:-2], width, dtype=normed.dtype, device=normed.device)
    if out.numel() == 0:
        return out
    (size0, size1, size2), (xs, ms, os) = rows(normed[..., 0, :], logits[..., 0, :], out)
    launch = tuned(TUNED, normed.device, "rows")
    with on(normed.device):
        _stream_mix[(size0 * size1 * size2, triton.cdiv(width, launch["BLOCK"]))](
            normed, logits, out, streams, width, size1, size2,
            *xs, *normed.stride()[-2:], *ms, *logits.stride()[-2:], *os, out.stride(-1),
            **launch,
        )  # fmt: skip
    return out


@triton.jit
def _stream_mix(
    normed, logits, out, streams, width, size1, size2,
    x0, x1, x2, x_stream, x3, m0, m1, m2, m_stream, m3, o0, o1, o2, o3,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = column < width
    x = normed + row_offset(row, size1, size2, x0, x1, x2) + column * x3
    m = logits + row_offset(row, size1, size2, m0, m1, m2) + column * m3
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(streams):
        weight = tl.sigmoid(tl.load(m + s * m_stream, mask=inside, other=0.0).to(tl.float32))
        weight = weight.to(out.dtype.element_ty).to(tl.float32)
        value = tl.load(x + s * x_stream, mask=inside, other=0.0).to(tl.float32)
        total += (weight * value).to(out.dtype.element_ty).to(tl.float32)
    mean = total / streams
    tl.store(out + row_offset(row, size1, size2, o0, o1, o2) + column * o3, mean.to(out.dtype.element_ty), mask=inside)
