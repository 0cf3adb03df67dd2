"""cross_entropy in Triton: the logits are read once, and neither widened nor normalised copies of them exist.

Algorithm: the online logsumexp of Milakov & Gimelshein 2018. Every lane keeps the maximum and the sum of what it has
seen, relative to that maximum, in fp32; one of the two exponentials of an update is always exp(0), so one is computed.
One program per row: fewer rows than multiprocessors leave the rest of the GPU idle.

Bytes: M V elements, 12 M for targets and losses. FLOPs: 6 M V and M V exponentials: memory bound. A negative
target's row is not read. A target that is no token, which the formula refuses, gives NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref import ops
from qwen_ref.errors import RequestError

from .launch import ANY, on, require, supports, tuned

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.cross_entropy
TOLERANCE = 2.0
# Logits per step and warps, 16 logits a thread
TUNED = {(ANY, "rows"): {"BLOCK": 4096, "num_warps": 8}}


def run(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (M, V), any strides; targets (M,) int64, negative = nothing to predict. Returns (M,) fp32."""
    require("cross_entropy", logits, targets)
    count, width = logits.shape
    if targets.shape != (count,) or targets.dtype != torch.int64 or width == 0:
        raise RequestError(
            f"the triton cross_entropy needs int64 targets ({count},) and a vocabulary, got {tuple(targets.shape)} "
            f"{targets.dtype} beside logits {tuple(logits.shape)}"
        )
    out = torch.empty(count, dtype=torch.float32, device=logits.device)
    if count == 0:
        return out
    launch = tuned(TUNED, logits.device, "rows")
    with on(logits.device):
        _cross_entropy[(count,)](
            logits, targets, out, width, *logits.stride(), targets.stride(0), **launch,
        )  # fmt: skip
    return out


@triton.jit
def _cross_entropy(logits, targets, out, width, stride0, stride1, targets0, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    row = logits + place * stride0
    target = tl.load(targets + place * targets0)
    lane = tl.arange(0, BLOCK)
    loss = 0.0
    if target >= 0:
        largest = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)  # finite: nothing minus it is NaN
        total = tl.zeros((BLOCK,), tl.float32)  # sum of exp(x - largest), each lane its own
        for start in range(0, width, BLOCK):
            source = row + tl.cast(start, tl.int64) * stride1 + lane * stride1
            x = tl.load(source, mask=start + lane < width, other=float("-inf")).to(tl.float32)
            power = tl.exp(-tl.abs(x - largest))
            total = tl.where(x > largest, total * power + 1.0, total + power)
            largest = tl.maximum(largest, x)
        peak = tl.max(largest, axis=0)
        total = tl.sum(total * tl.exp(largest - peak), axis=0)
        chosen = tl.load(row + target * stride1, mask=target < width, other=float("nan")).to(tl.float32)
        loss = (peak - chosen) + tl.log(total)
    tl.store(out + place, loss)
