"""sparse_block_attention in Triton: each query reads the tokens of its chosen blocks and the tail, and no others.

Algorithm: online softmax (Milakov & Gimelshein 2018; FlashAttention-2, Dao 2023) over a list of tokens that is computed as it
is read: slot j is token j % c of the query's chosen block j // c, and behind these the tokens since the last complete block.
A program serves one query and one kv head, with the N/K query heads of the group as the rows of its products (padded to the
16 that tensor cores need), so a key is read once for all of them. Scores and probabilities stay in fp32.

Bytes: of every query, 2 K D (k c + c/2) of keys and values, and its own 2 N D. FLOPs: 4 N D (k c + c/2). Neighbouring queries
choose alike, so L2 serves many of the reads; otherwise bound by memory.
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

ORACLE = ops.sparse_block_attention
TOLERANCE = 2.0
# (device, (bytes of a number, head size rounded up to a power of two, at least 64)); fp32 has no tensor cores and spills with
# more
TUNED = {
    (ANY, (size, dim)): {"SLOTS": 16 if size == 4 else 64 if dim < 256 else 32, "num_warps": 4, "num_stages": 2}
    for size in (2, 4)
    for dim in (64, 128, 256)
}


def run(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, starts: Tensor | None, ratio: int) -> Tensor:
    """q (B, N, T, D); k, v (B, K, S, D); blocks (B, T, k) int64, -1 = none; starts (B,) int64 or None. Any strides.

    Returns (B, N, T, D); zeros for a padding query.
    """
    require("sparse_block_attention", q, k, v, blocks, *(() if starts is None else (starts,)))
    batch, heads, queries, dim = q.shape
    kv_heads, length = k.shape[1:3]
    if k.shape != v.shape or heads % kv_heads or {k.dtype, v.dtype} != {q.dtype} or dim > 256:
        raise RequestError(
            f"the triton sparse_block_attention needs q (B, N, T, D), k and v (B, K, S, D) of one dtype, K dividing N and D up "
            f"to 256, got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    out = torch.empty_like(q)
    if out.numel() == 0:
        return out
    width = max(64, triton.next_power_of_2(dim))
    group = heads // kv_heads
    with on(q.device):
        _chosen_blocks[(batch * queries, kv_heads)](
            q, k, v, blocks, blocks if starts is None else starts, out, queries, length, blocks.shape[2], ratio, dim, dim**-0.5,
            *q.stride(), *k.stride(), *v.stride(), *blocks.stride(), *out.stride(), 0 if starts is None else starts.stride(0),
            GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), DIM=width, PADDED=starts is not None,
            **tuned(TUNED, q.device, (q.element_size(), width)),
        )  # fmt: skip
    return out


@triton.jit
def _chosen_blocks(
    q, k, v, blocks, starts, out, queries, length, top, ratio, dim, scale,
    q0, q1, q2, q3, k0, k1, k2, k3, v0, v1, v2, v3, b0, b1, b2, o0, o1, o2, o3, t0,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    batch, query = (tl.program_id(0) // queries).to(tl.int64), tl.program_id(0) % queries
    line, kv_head = query.to(tl.int64), tl.program_id(1)
    row, column = tl.arange(0, ROWS), tl.arange(0, DIM)
    head = kv_head * GROUP + row
    inside = (row < GROUP)[:, None] & (column < dim)[None, :]
    queried = tl.load(q + batch * q0 + head[:, None] * q1 + line * q2 + column[None, :] * q3, mask=inside, other=0.0)
    start = 0
    if PADDED:
        start = tl.load(starts + batch * t0).to(tl.int32)
    seen = length - queries + query + 1 - start  # tokens up to the query, its own included; not above 0: padding
    complete = tl.maximum(seen, 0) // ratio
    listed = top * ratio  # slots of chosen blocks; the tail's follow
    slots = listed + tl.maximum(seen, 0) - complete * ratio
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, DIM), tl.float32)
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        block = tl.load(blocks + batch * b0 + line * b1 + (slot // ratio) * b2, mask=slot < listed, other=-1)
        token = tl.where(slot < listed, block.to(tl.int32) * ratio + slot % ratio, complete * ratio + slot - listed)
        read = (slot < slots) & (token >= 0)
        token = (start + token).to(tl.int64)
        there = read[:, None] & (column < dim)[None, :]
        keys = tl.load(k + batch * k0 + kv_head * k1 + token[:, None] * k2 + column[None, :] * k3, mask=there, other=0.0)
        scores = tl.dot(queried, tl.trans(keys), input_precision="ieee") * scale  # (ROWS, SLOTS)
        scores = tl.where(read[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)  # nothing was read yet: -inf - -inf is NaN
        weights = tl.exp(scores - anchor[:, None])
        kept = tl.exp(peak - anchor)
        values = tl.load(v + batch * v0 + kv_head * v1 + token[:, None] * v2 + column[None, :] * v3, mask=there, other=0.0)
        total = total * kept + tl.sum(weights, 1)
        mixed = mixed * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        peak = higher
    result = mixed / tl.where(total == 0, 1.0, total)[:, None]
    target = out + batch * o0 + head[:, None] * o1 + line * o2 + column[None, :] * o3
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)
