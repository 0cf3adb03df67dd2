"""attention_decode in Triton: one new token per sequence, the cache read once by as many programs as keep the GPU busy.

Algorithm: Flash-Decoding (Dao et al. 2023). The keys of a sequence are split among programs, each of which leaves its
sum of weighted values, its sum of weights and its largest score; a second kernel adds these up. All N/K query heads of a
kv head are rows of one program, so that its keys and values are read once for all of them.

The number of splits follows from shapes alone, so that a captured graph is right for every length; how many keys each
takes follows from the length on the device, so that short sequences are divided as evenly as long ones. A program whose
share is empty ends at once and the merge does not read it. There are no atomics: two runs agree to the bit.

Bytes: 2 K D per visible key. FLOPs: 4 N D per visible key, N/K per byte in 16 bits: memory bound everywhere.
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

from .attention_prefill import HIDDEN, check_heads
from .launch import ANY, on, require, supports, tuned

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.attention_decode
TOLERANCE = 2.0
MOST_SPLITS = 128
# (device, (bytes per number, head size rounded up to a power of two, at least 64)) -> a block of keys, warps, stages, and
# how many programs to aim for: two for each of an H100's or H200's 132 multiprocessors. Three stages of 64 keys of 128 are
# 64 KiB on their way per program, several times latency times bandwidth.
TUNED = {
    (ANY, (size, dim)): {"BLOCK_N": n, "num_warps": warps, "num_stages": stages, "PROGRAMS": 264}
    for size, dims, n, warps, stages in (
        (2, (64, 128), 64, 4, 3),
        (2, (256,), 32, 4, 3),
        (4, (64, 128), 32, 8, 2),
        (4, (256,), 16, 8, 2),
    )
    for dim in dims
}


def run(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int | None = None) -> Tensor:
    """q (B, N, D); k, v (B, K, S, D), any strides; lengths (B,) int32. Returns (B, N, D)."""
    require("attention_decode", q, k, v, lengths)
    return launch("attention_decode", (_split, _merge), q, k, v, lengths=lengths, window=window)


def launch(
    operation: str, kernels: tuple[Any, Any], q: Tensor, k: Tensor, v: Tensor, *,
    table: Tensor | None = None, lengths: Tensor | None = None, window: int | None = None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Launch `_split` and `_merge` (the caller's names of them, where the bench records launches).

    k, v (B, K, S, D), or with a table (B, L) pages (P, K, S, D). Without lengths every sequence fills its room.
    mask (B, S) bool, True = visible.
    """
    check_heads(operation, q, k, v, window)
    (batch, heads, dim), (rows, kv_heads, room, _) = q.shape, k.shape
    if lengths is not None and (lengths.shape != (batch,) or lengths.dtype != torch.int32 or not lengths.is_contiguous()):
        raise RequestError(f"the triton {operation} needs lengths ({batch},) int32, contiguous")
    if table is None and rows != batch:
        raise RequestError(f"the triton {operation} got {batch} queries and caches of {rows} sequences")
    page = 1
    if table is not None:
        page, room = room, table.shape[1] * room
    out = torch.empty_like(q)
    if out.numel() == 0:
        return out
    width = max(64, triton.next_power_of_2(dim))
    parameters = dict(tuned(TUNED, q.device, (q.element_size(), width)))
    programs = parameters.pop("PROGRAMS")
    most = max(1, min(triton.cdiv(room, parameters["BLOCK_N"]), MOST_SPLITS))
    splits = min(triton.cdiv(programs, batch * kv_heads), most)
    whole = splits == 1  # nothing to merge: the split is the output
    part = out if whole else torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=q.device)
    sums = out if whole else torch.empty(batch, heads, splits, 2, dtype=torch.float32, device=q.device)
    part_strides = (out.stride(0), out.stride(1), 0, out.stride(2)) if whole else part.stride()
    with on(q.device):
        kernels[0][(batch * kv_heads, splits)](
            q, k, v, table, lengths, mask, part, sums, heads, kv_heads, room, window, dim**-0.5 * math.log2(math.e),
            *q.stride(), *k.stride(), *v.stride(), *part_strides,
            *(table.stride() if table is not None else (0, 0)), *(mask.stride() if mask is not None else (0, 0)),
            D=dim, BLOCK_D=width, ROWS=max(16, triton.next_power_of_2(heads // kv_heads)), PAGE=page, WHOLE=whole,
            **parameters,
        )  # fmt: skip
        if not whole:
            kernels[1][(batch * heads,)](
                part, sums, lengths, out, heads, splits, room, window, *out.stride(),
                D=dim, BLOCK_D=width, BLOCK_N=parameters["BLOCK_N"], SPLITS=triton.next_power_of_2(splits),
                num_warps=4 if splits * width <= 8192 else 8,
            )  # fmt: skip
    return out


@triton.jit
def _split(
    q, k, v, table, lengths, mask, part, sums, heads, kv_heads, room, window, scale,
    q0, q1, q2, k0, k1, k2, k3, v0, v1, v2, v3, p0, p1, p2, p3, t0, t1, m0, m1,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    first, last, share = shares(lengths, batch, room, window, splits, BLOCK_N)
    start = first + split * share
    end = tl.minimum(start + share, last)
    if not WHOLE:  # noqa: SIM102 - one is decided by the compiler, the other by the GPU
        if start >= end:
            return
    group = heads // kv_heads
    row = tl.arange(0, ROWS)  # (ROWS,), the query heads of this kv head
    dim = tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    inside = (row < group)[:, None] & (dim < D)[None, :]
    head = kv_head * group + row
    query = tl.load(q + batch * q0 + head[:, None] * q1 + dim[None, :] * q2, mask=inside, other=0.0)  # (ROWS, BLOCK_D)
    k, v = k + kv_head * k1, v + kv_head * v1

    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for n in range(start, end, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        held = key < end
        if table is None:
            place, entry = batch, key.to(tl.int64)
        else:
            place = tl.load(table + batch * t0 + key // PAGE * t1, mask=held, other=0).to(tl.int64)  # (BLOCK_N,)
            entry = (key % PAGE).to(tl.int64)
        loaded = held[:, None] & (dim < D)[None, :]
        k_tile = (place * k0 + entry * k2)[:, None] + dim[None, :] * k3
        v_tile = (place * v0 + entry * v2)[:, None] + dim[None, :] * v3
        key_tile = tl.load(k + k_tile, mask=loaded, other=0.0)  # (BLOCK_N, BLOCK_D)
        scores = tl.dot(query, tl.trans(key_tile), input_precision="ieee") * scale  # (ROWS, BLOCK_N)
        if mask is not None:
            seen = tl.load(mask + batch * m0 + key * m1, mask=held, other=0) != 0  # (BLOCK_N,)
            scores = tl.where(seen[None, :], scores, HIDDEN)
        scores = tl.where(held[None, :], scores, float("-inf"))  # every tile holds a key, so no row is all -inf
        larger = tl.maximum(best, tl.max(scores, axis=1))
        powers = tl.math.exp2(scores - larger[:, None])
        shrink = tl.math.exp2(best - larger)
        best, total = larger, total * shrink + tl.sum(powers, axis=1)
        value_tile = tl.load(v + v_tile, mask=loaded, other=0.0)  # (BLOCK_N, BLOCK_D)
        acc = tl.dot(powers.to(value_tile.dtype), value_tile, acc * shrink[:, None], input_precision="ieee")

    if WHOLE:
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]  # no key at all: zeros
    else:
        sums += ((batch * heads + head) * splits + split) * 2
        tl.store(sums, best, mask=row < group)
        tl.store(sums + 1, total, mask=row < group)
    target = part + batch * p0 + head[:, None] * p1 + split * p2 + dim[None, :] * p3
    tl.store(target, acc.to(part.dtype.element_ty), mask=inside)


@triton.jit
def shares(lengths, batch, room, window, splits, BLOCK_N: tl.constexpr):
    """What a sequence's query sees, first:last, and how many of these keys each split takes: whole tiles."""
    last = room
    if lengths is not None:
        last = tl.load(lengths + batch)
    first = 0
    if window is not None:
        first = tl.maximum(last - window, 0)
    return first, last, tl.cdiv(tl.cdiv(last - first, splits), BLOCK_N) * BLOCK_N


@triton.jit
def _merge(
    part, sums, lengths, out, heads, splits, room, window, o0, o1, o2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // heads, program % heads
    first, last, share = shares(lengths, batch, room, window, splits, BLOCK_N)
    split = tl.arange(0, SPLITS)  # (SPLITS,)
    dim = tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    used = split * share < last - first  # the others wrote nothing
    best = tl.load(sums + (program * splits + split) * 2, mask=used, other=float("-inf"))
    total = tl.load(sums + (program * splits + split) * 2 + 1, mask=used, other=0.0)
    weight = tl.where(used, tl.math.exp2(best - tl.max(best, axis=0)), 0.0)  # where none is used, -inf - -inf
    total = tl.sum(weight * total, axis=0)
    source = part + (program * splits + split)[:, None] * D + dim[None, :]
    parts = tl.load(source, mask=used[:, None] & (dim < D)[None, :], other=0.0)  # (SPLITS, BLOCK_D)
    result = tl.sum(weight[:, None] * parts, axis=0) / tl.where(total == 0, 1.0, total)
    tl.store(out + batch * o0 + head * o1 + dim * o2, result.to(out.dtype.element_ty), mask=dim < D)
