"""attention_prefill in Triton: scores exist only as tiles in registers, so memory is read and written once per tensor.

Algorithm: FlashAttention-2 (Dao 2023): each program holds a block of queries and walks over the keys they see, with the
online softmax of Milakov & Gimelshein 2018 in base 2. Keys that every query of the block sees need no mask; a second
loop does the diagonal, and under a sliding window one before it does the window's edge. What nobody sees is never read.

The sequences' lengths stay on the device. The grid is their upper bound, one block more per sequence than the tokens
fill, and each program looks up whose block it is: sequence b's blocks begin at q_starts[b] // BLOCK_M + b (the block
table of vLLM's unified attention). The program of a block that does not exist ends at once.

Bytes: q and the output once, keys and values once (again from the cache for every block of queries). FLOPs: 4 N D per
visible pair, so it is compute bound from some hundred tokens on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref import ops
from qwen_ref.errors import RequestError

from .launch import ANY, on, require, supports, tuned

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.attention_prefill
TOLERANCE = 2.0
FEW = 32  # queries per sequence for which a block of 128 would be mostly empty
HOPPER = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
# (device, (bytes per number, head size rounded up to a power of two, at least 64, few queries)) -> a block of queries, a
# block of keys, warps, stages. The Hopper entry is the one FlexAttention settles on, two warpgroups of 64 queries; its tiles
# of 64 keys spill on Ampere and overflow an MI300's shared memory. fp32 has no tensor cores ("ieee"): tiles that do not spill.
TUNED = {
    (device, (size, dim, few)): dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), values, strict=True))
    for device, size, dims, few, values in (
        *((name, 2, (128,), False, (128, 64, 8, 3)) for name in HOPPER),
        (ANY, 2, (64,), False, (128, 64, 8, 3)),
        (ANY, 2, (128,), False, (128, 32, 8, 3)),
        (ANY, 2, (256,), False, (64, 32, 8, 2)),
        (ANY, 2, (64, 128), True, (16, 64, 4, 3)),
        (ANY, 2, (256,), True, (16, 32, 4, 3)),
        (ANY, 4, (64, 128), False, (32, 16, 8, 2)),
        (ANY, 4, (256,), False, (16, 16, 8, 2)),
        (ANY, 4, (64, 128, 256), True, (16, 16, 8, 2)),
    )
    for dim in dims
}
HIDDEN = tl.constexpr(-1e38)  # finite: a row that sees nothing yet stays free of NaN, and the first key seen erases it


def run(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, window: int | None = None) -> Tensor:
    """q (M, N, D); k, v (L, K, D), any strides; q_starts, k_starts (B + 1,) int32. Returns (M, N, D)."""
    require("attention_prefill", q, k, v, q_starts, k_starts)
    starts = (q_starts, k_starts)
    if any(s.dtype != torch.int32 or s.ndim != 1 or not s.is_contiguous() or s.shape != q_starts.shape for s in starts):
        raise RequestError("the triton attention_prefill needs q_starts and k_starts (B + 1,) int32, contiguous")
    out = torch.empty_like(q)
    whole = [x.transpose(0, 1)[None] for x in (q, k, v, out)]  # (1, N or K, M or L, D): one batch of all sequences
    launch("attention_prefill", _attention, *whole, q_starts=q_starts, k_starts=k_starts, window=window)
    return out


def launch(
    operation: str, kernel: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, mask: Tensor | None = None,
    q_starts: Tensor | None = None, k_starts: Tensor | None = None, window: int | None = None,
) -> None:  # fmt: skip
    """Launch `_attention` (the caller's name of it, where the bench records launches) on (B, N or K, T or S, D)."""
    check_heads(operation, q, k, v, window)
    batch, heads, queries, dim = q.shape
    sequences = batch if q_starts is None else q_starts.numel() - 1
    if out.numel() == 0 or sequences == 0:
        return
    width = max(64, triton.next_power_of_2(dim))
    parameters = tuned(TUNED, q.device, (q.element_size(), width, queries * batch <= FEW * sequences))
    tile = parameters["BLOCK_M"]
    blocks = triton.cdiv(queries, tile) if q_starts is None else queries // tile + sequences
    with on(q.device):
        kernel[(batch * heads, blocks)](
            q, k, v, mask, out, q_starts, k_starts,
            sequences, heads, k.shape[1], queries, k.shape[2], window, dim**-0.5 * math.log2(math.e),
            *q.stride(), *k.stride(), *v.stride(), *out.stride(), *(mask.stride() if mask is not None else (0,) * 4),
            D=dim, BLOCK_D=width, **parameters,
        )  # fmt: skip


def check_heads(operation: str, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    """q (B, N, ..., D), k and v (..., K, S, D). Raises RequestError unless they belong together."""
    if k.shape != v.shape or k.dtype != q.dtype or v.dtype != q.dtype or k.shape[-1] != q.shape[-1]:
        raise RequestError(
            f"the triton {operation} needs k and v of one shape and q's dtype and head size, got q {tuple(q.shape)} "
            f"{q.dtype}, k {tuple(k.shape)} {k.dtype}, v {tuple(v.shape)} {v.dtype}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise RequestError(f"the triton {operation} needs kv heads that divide the heads, got {k.shape[1]} and {q.shape[1]}")
    if not 0 < q.shape[-1] <= 256:
        raise RequestError(f"the triton {operation} has tiles for head sizes up to 256, not {q.shape[-1]}")
    if window is not None and window < 1:
        raise RequestError(f"a sliding window holds at least the query's own token, got {window}")


@triton.jit
def _attention(
    q, k, v, mask, out, q_starts, k_starts, sequences, heads, kv_heads, queries, keys, window, scale,
    q0, q1, q2, q3, k0, k1, k2, k3, v0, v1, v2, v3, o0, o1, o2, o3, m0, m1, m2, m3,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Heads vary fastest, so that programs of the same kv head run together and share its tiles in the cache. The last
    # blocks of queries see the most keys under a causal mask and start first, so that the short ones fill the gaps.
    head = (tl.program_id(0) % heads).to(tl.int64)
    kv_head = head * kv_heads // heads
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    q, out, k, v = q + head * q1, out + head * o1, k + kv_head * k1, v + kv_head * v1
    if q_starts is None:
        batch = (tl.program_id(0) // heads).to(tl.int64)
        q, out, k, v = q + batch * q0, out + batch * o0, k + batch * k0, v + batch * v0
        if mask is not None:
            mask += batch * m0
    else:
        sequence = owner(q_starts, sequences, block, BLOCK_M)
        q_start, k_start = tl.load(q_starts + sequence), tl.load(k_starts + sequence)
        queries, keys = tl.load(q_starts + sequence + 1) - q_start, tl.load(k_starts + sequence + 1) - k_start
        block -= q_start // BLOCK_M + sequence
        q, out = q + q_start.to(tl.int64) * q2, out + q_start.to(tl.int64) * o2
        k, v = k + k_start.to(tl.int64) * k2, v + k_start.to(tl.int64) * v2
    if block * BLOCK_M >= queries:
        return
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    dim = tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    inside = (row < queries)[:, None] & (dim < D)[None, :]
    q_tile = row[:, None].to(tl.int64) * q2 + dim[None, :] * q3
    query = tl.load(q + q_tile, mask=inside, other=0.0)  # (BLOCK_M, BLOCK_D)
    if mask is not None:
        mask += row[:, None].to(tl.int64) * m2  # (BLOCK_M, 1)

    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    position = keys - queries + row  # the queries are the last of the keys' positions
    first = keys - queries + block * BLOCK_M
    end = tl.minimum(first + BLOCK_M, keys)
    full, edge = 0, (first + 1) // BLOCK_N * BLOCK_N  # from `full` to `edge` every query of the block sees every key
    if mask is not None:
        end, edge = keys, 0  # a mask may show anything, and a row that it hides whole is the mean of all values
    if window is not None:
        start = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        full = tl.minimum(tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N, edge)
        acc, total, best = attend(acc, total, best, query, k, v, k2, k3, v2, v3, mask, m3, position, row < queries,
                                  start, full, keys, window, scale, D, BLOCK_D, BLOCK_N, True)  # fmt: skip
    if mask is None:
        acc, total, best = attend(acc, total, best, query, k, v, k2, k3, v2, v3, mask, m3, position, row < queries,
                                  full, edge, keys, window, scale, D, BLOCK_D, BLOCK_N, False)  # fmt: skip
    acc, total, best = attend(acc, total, best, query, k, v, k2, k3, v2, v3, mask, m3, position, row < queries,
                              edge, end, keys, window, scale, D, BLOCK_D, BLOCK_N, True)  # fmt: skip
    o_tile = row[:, None].to(tl.int64) * o2 + dim[None, :] * o3
    tl.store(out + o_tile, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def owner(q_starts, sequences, block, BLOCK_M: tl.constexpr):
    """Which sequence a block of queries belongs to: the last one whose first block is not behind it."""
    count = 0
    for i in range(0, sequences, 128):
        b = i + tl.arange(0, 128)  # (128,)
        begins = tl.load(q_starts + b, mask=b < sequences, other=0) // BLOCK_M + b
        count += tl.sum(((begins <= block) & (b < sequences)).to(tl.int32), axis=0)
    return count - 1


@triton.jit
def attend(
    acc, total, best, query, k, v, k2, k3, v2, v3, mask, m3, position, real, start, end, keys, window, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys start:end of the online softmax. Not MASKED: every query sees all of them, and the tiles are whole."""
    dim = tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    column = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    k_tile = column[:, None] * k2 + dim[None, :] * k3  # (BLOCK_N, BLOCK_D)
    v_tile = column[:, None] * v2 + dim[None, :] * v3
    for n in range(start, end, BLOCK_N):
        key = n + column  # (BLOCK_N,)
        if MASKED:
            inside, other = (key < keys)[:, None] & (dim < D)[None, :], 0.0
        elif BLOCK_D != D:
            inside, other = (dim < D)[None, :], 0.0
        else:
            inside, other = None, None
        key_tile = tl.load(k + tl.cast(n, tl.int64) * k2 + k_tile, mask=inside, other=other)  # (BLOCK_N, BLOCK_D)
        scores = tl.dot(query, tl.trans(key_tile), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if MASKED:
            if mask is None:
                seen = key[None, :] <= position[:, None]
                if window is not None:
                    seen = seen & (key[None, :] > position[:, None] - window)
            else:
                seen = tl.load(mask + key[None, :] * m3, mask=real[:, None] & (key < keys)[None, :], other=0) != 0
            scores = tl.where(seen, scores * scale, HIDDEN)
            scores = tl.where((key < keys)[None, :], scores, float("-inf"))
            larger = tl.maximum(best, tl.max(scores, axis=1))
            powers = tl.math.exp2(scores - larger[:, None])
        else:
            larger = tl.maximum(best, tl.max(scores, axis=1) * scale)
            powers = tl.math.exp2(scores * scale - larger[:, None])  # one fused multiply-add for each
        shrink = tl.math.exp2(best - larger)
        best, total = larger, total * shrink + tl.sum(powers, axis=1)
        acc = acc * shrink[:, None]
        value_tile = tl.load(v + tl.cast(n, tl.int64) * v2 + v_tile, mask=inside, other=other)
        acc = tl.dot(powers.to(value_tile.dtype), value_tile, acc, input_precision="ieee")
    return acc, total, best
