"""router_topk in Triton: softmax, the k largest and their renormalisation without leaving registers.

Algorithm: softmax over all experts first (`ops.router_topk`), then k rounds of "largest of what is left". Equal
probabilities go to the lower expert index, every time; torch.topk promises no order. The index is int64, as torch's.

Bytes: M E elements in, M k (element size + 8) out. FLOPs: about M E (5 + 2 k): latency bound at any real size.
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

ORACLE = ops.router_topk
TOLERANCE = 2.0
# (device, experts rounded up to a power of two, at least 32) -> rows per program and warps
TUNED = {(ANY, experts): {"ROWS": max(1, 256 // experts), "num_warps": 1 if experts <= 256 else 4}
         for experts in (2**i for i in range(5, 13))}  # fmt: skip


def run(logits: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """logits (M, E), any strides. Returns weights (M, k) in logits' dtype, descending, and experts (M, k) int64."""
    require("router_topk", logits)
    count, experts = logits.shape
    if not 0 < k <= experts <= 4096:
        raise RequestError(f"the triton router_topk needs 0 < k <= experts <= 4096, got k {k} of {experts}")
    weights = torch.empty(count, k, dtype=logits.dtype, device=logits.device)
    chosen = torch.empty(count, k, dtype=torch.int64, device=logits.device)
    if count == 0:
        return weights, chosen
    block = max(32, triton.next_power_of_2(experts))
    launch = tuned(TUNED, logits.device, block)
    with on(logits.device):
        _router_topk[(triton.cdiv(count, launch["ROWS"]),)](
            logits, weights, chosen, count, experts, logits.stride(0), logits.stride(1),
            K=k, NORMALIZE=normalize, EXPERTS=block, SLOTS=triton.next_power_of_2(k), **launch,
        )  # fmt: skip
    return weights, chosen


@triton.jit
def _router_topk(
    logits, weights, chosen, count, experts, stride0, stride1,
    K: tl.constexpr, NORMALIZE: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    expert = tl.arange(0, EXPERTS)  # (EXPERTS,)
    slot = tl.arange(0, SLOTS)  # (SLOTS,)
    real = (expert < experts)[None, :]
    inside = (row < count)[:, None] & real
    source = logits + row[:, None] * stride0 + expert[None, :] * stride1
    scores = tl.load(source, mask=inside, other=0.0).to(tl.float32)  # rows past the end are zeros, not NaN
    scores = tl.where(real, scores, float("-inf"))
    powers = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    left = powers / tl.sum(powers, axis=1)[:, None]
    left = tl.where(real, left, -1.0)  # below every probability, also one that is zero
    best = tl.zeros((ROWS, SLOTS), tl.float32)
    index = tl.zeros((ROWS, SLOTS), tl.int64)
    for i in range(K):
        largest = tl.max(left, axis=1)  # (ROWS,)
        # The first of equals; of logits with NaN, which equal nothing, the last: an expert that is there.
        where = tl.min(tl.where(left == largest[:, None], expert[None, :], experts - 1), axis=1)
        best = tl.where(slot[None, :] == i, largest[:, None], best)
        index = tl.where(slot[None, :] == i, where[:, None].to(tl.int64), index)
        left = tl.where(expert[None, :] == where[:, None], -1.0, left)
    if NORMALIZE:
        best = best / tl.sum(best, axis=1)[:, None]
    target = row[:, None] * K + slot[None, :]
    stored = (row < count)[:, None] & (slot < K)[None, :]
    tl.store(weights + target, best.to(weights.dtype.element_ty), mask=stored)
    tl.store(chosen + target, index, mask=stored)
