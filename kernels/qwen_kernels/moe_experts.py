"""moe_experts in Triton: no copy of a token, no question to the device, no atomic addition.

Many tokens. The M k pairs (token, slot) are ordered by expert with a stable counting sort in three small kernels: count
per block of pairs, running sums, places. Every expert's rows are cut into tiles of BLOCK_M, and two grouped matrix
products follow. The first gathers rows of x by index as it loads them, has the gate's and the up projection's tile in one
program, and writes h = silu(gate) * up, (M k, I), in sorted order. The second multiplies h with down and the router's
weight and scatters its rows back to their pairs; the last kernel adds up a token's k rows. The number of tiles is known
to the device alone: the grid is as large as it can get, and surplus programs end at once, so that the whole can be
captured in a CUDA graph. (MegaBlocks, Gale et al. 2022, for the grouping; SonicMoE, Guo et al. 2025, for the gathering.)

Up to 4 tokens, products of vectors: every pair reads its own expert's weights with as many programs as fill a GPU, and
the second kernel holds all k slots of a token at once, so that nothing is left to add up.

gate, up, silu and the sum over slots are fp32; h and a slot's row are rounded to x's dtype.

Bytes: in elements, the weights of the experts chosen once (3 H I each), M H (1 + 1) for x and out, and M k (2 I + 2 H) between
the kernels. FLOPs: 6 M k H I. Memory bound up to some 100 tokens per expert, tensor cores above.
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

ORACLE = ops.moe_experts
TOLERANCE = 2.0
MOST_VECTORS = 4  # tokens up to which each pair is a product of vectors
SORTED = {"BLOCK": 512, "CHUNK": 64}  # pairs per block of the counting sort, and at a time
# (device, (class, bits of a number)) -> tiles. Otherwise than "gate_up" and "down" by vectors, whose ROWS are those of the
# weights in one program, the class is BLOCK_M, the rows of a tile: 16 while reading the experts' weights is what takes the
# time, 128 where the tensor cores do. fp32 has no tensor cores that are exact: its tiles are what registers can hold.
TUNED = {
    (ANY, ("gate_up", 16)): {"ROWS": 2, "BLOCK_K": 1024, "num_warps": 4},
    (ANY, ("gate_up", 32)): {"ROWS": 2, "BLOCK_K": 512, "num_warps": 4},
    (ANY, ("down", 16)): {"ROWS": 16, "BLOCK_K": 256, "num_warps": 1},
    (ANY, ("down", 32)): {"ROWS": 16, "BLOCK_K": 128, "num_warps": 1},
    (ANY, (16, 16)): {"BLOCK_I": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    (ANY, (64, 16)): {"BLOCK_I": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    (ANY, (128, 16)): {"BLOCK_I": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    (ANY, (16, 32)): {"BLOCK_I": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    (ANY, (64, 32)): {"BLOCK_I": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    (ANY, (128, 32)): {"BLOCK_I": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
}


def run(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """x (M, H), gate_up (E, 2I, H), down (E, H, I), any strides; weights, experts (M, k). Returns (M, H)."""
    require("moe_experts", x, gate_up, down, weights, experts)
    (tokens, hidden), (count, _, inner), k = x.shape, down.shape, experts.shape[-1]
    fits = gate_up.shape == (count, 2 * inner, hidden) and down.shape[1] == hidden
    if not fits or experts.shape != (tokens, k) or weights.shape != (tokens, k) or k == 0:
        raise RequestError(
            "the triton moe_experts needs x (M, H), gate_up (E, 2I, H), down (E, H, I), weights and experts (M, k), got "
            + ", ".join(str(tuple(t.shape)) for t in (x, gate_up, down, weights, experts))
        )
    if {gate_up.dtype, down.dtype, weights.dtype} != {x.dtype} or experts.is_floating_point():
        raise RequestError("the triton moe_experts needs x and all weights of one dtype, and integers for the experts")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    weights, experts = weights.contiguous(), experts.contiguous()
    with on(x.device):
        few = tokens <= MOST_VECTORS
        (_by_vectors if few else _by_tiles)(x, gate_up, down, weights, experts, out)
    return out


def _by_vectors(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, out: Tensor) -> None:
    (tokens, hidden), inner, k = x.shape, down.shape[2], experts.shape[1]
    bits, vector, h = 8 * x.element_size(), 16 // x.element_size(), x.new_empty(tokens * k, inner)
    launch = {**tuned(TUNED, x.device, ("gate_up", bits))}
    block = launch.pop("ROWS")
    _gate_up_vectors[(triton.cdiv(inner, block), tokens * k)](
        x, gate_up, experts, h, hidden, inner, k, *x.stride(), *gate_up.stride(),
        VECTOR=vector, BLOCK_I=block, **launch,
    )  # fmt: skip
    launch, slots = {**tuned(TUNED, x.device, ("down", bits))}, triton.next_power_of_2(k)
    block = max(1, launch.pop("ROWS") // slots)
    _down_vectors[(triton.cdiv(hidden, block), tokens)](
        h, down, weights, experts, out, hidden, inner, k, *down.stride(),
        SLOTS=slots, VECTOR=vector, BLOCK_N=block, **launch,
    )  # fmt: skip


def _by_tiles(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, out: Tensor) -> None:
    (tokens, hidden), (count, _, inner), k = x.shape, down.shape, experts.shape[1]
    pairs = tokens * k
    each = pairs / count  # an expert's rows on average
    block_m = 16 if each <= 16 else 64 if each <= 96 else 128
    launch = {**tuned(TUNED, x.device, (block_m, 8 * x.element_size())), "BLOCK_M": block_m}
    block_i, block_n = launch.pop("BLOCK_I"), launch.pop("BLOCK_N")
    launch["EXPERTS"] = triton.next_power_of_2(count)
    order, ends = _sorted(experts, count, launch["EXPERTS"], block_m)
    h, y = x.new_empty(pairs, inner), x.new_empty(pairs, hidden)
    tiles = min(pairs // block_m + min(count, pairs), pairs)  # the most that can be: each used expert's last one is short
    _gate_up_tiles[(tiles * triton.cdiv(inner, block_i),)](
        x, gate_up, order, ends, h, hidden, inner, k, *x.stride(), *gate_up.stride(),
        BLOCK_N=block_i, EVEN=hidden % launch["BLOCK_K"] == 0, **launch,
    )  # fmt: skip
    _down_tiles[(tiles * triton.cdiv(hidden, block_n),)](
        h, down, weights, order, ends, y, hidden, inner, *down.stride(),
        BLOCK_N=block_n, EVEN=inner % launch["BLOCK_K"] == 0, **launch,
    )  # fmt: skip
    _add_slots[(tokens, triton.cdiv(hidden, 1024))](
        y, out, hidden, k, SLOTS=triton.next_power_of_2(k), BLOCK=1024, num_warps=4
    )


def _sorted(experts: Tensor, count: int, padded: int, block_m: int) -> tuple[Tensor, Tensor]:
    """The pairs ordered by expert, (M k,), and where each expert's rows and tiles end, (2, padded). All int32."""
    pairs = experts.numel()
    blocks = triton.cdiv(pairs, SORTED["BLOCK"])
    counts, places = experts.new_empty(2, blocks, padded, dtype=torch.int32)
    ends = experts.new_empty(2, padded, dtype=torch.int32)
    order = experts.new_empty(pairs, dtype=torch.int32)
    _count[(blocks,)](experts, counts, pairs, EXPERTS=padded, **SORTED, num_warps=4)
    _sum_counts[(1,)](counts, places, ends, blocks, EXPERTS=padded, BLOCKS=32, BLOCK_M=block_m, num_warps=8)
    _place[(triton.cdiv(pairs, SORTED["CHUNK"]),)](experts, places, order, pairs, count, EXPERTS=padded, **SORTED, num_warps=4)
    return order, ends


# Products of vectors


@triton.jit
def _gate_up_vectors(
    x, gate_up, experts, h, hidden, inner, slots,
    x0, x1, g0, g1, g2,
    VECTOR: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    expert = tl.load(experts + pair).to(tl.int64)
    # Three axes, (BLOCK_I, BLOCK_K / VECTOR, VECTOR): the last one lies in one thread, as in `linear`.
    k = (tl.arange(0, BLOCK_K // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])[None, :, :]
    x += pair // slots * x0 + k * x1
    gate = gate_up + expert * g0 + tl.minimum(i, inner - 1)[:, None, None] * g1 + k * g2
    up = gate + inner * g1
    gate_sum = tl.zeros((BLOCK_I, BLOCK_K // VECTOR), tl.float32)
    up_sum = tl.zeros((BLOCK_I, BLOCK_K // VECTOR), tl.float32)
    for start in range(0, hidden, BLOCK_K):
        inside = start + k < hidden
        values = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        u = tl.load(up, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        gate_sum += tl.sum(values * g, axis=2)
        up_sum += tl.sum(values * u, axis=2)
        x += BLOCK_K * x1
        gate += BLOCK_K * g2
        up += BLOCK_K * g2
    product = swiglu(tl.sum(gate_sum, axis=1), tl.sum(up_sum, axis=1))
    tl.store(h + pair * inner + i, product.to(h.dtype.element_ty), mask=i < inner)


@triton.jit
def _down_vectors(
    h, down, weights, experts, out, hidden, inner, slots,
    d0, d1, d2,
    SLOTS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    chosen = slot < slots
    expert = tl.load(experts + token * slots + slot, mask=chosen, other=0).to(tl.int64)
    weight = tl.load(weights + token * slots + slot, mask=chosen, other=0.0).to(tl.float32)
    # Four axes, (SLOTS, BLOCK_N, BLOCK_K / VECTOR, VECTOR): weights of all slots are on their way at once.
    k = (tl.arange(0, BLOCK_K // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])[None, None, :, :]
    h += (token * slots + slot)[:, None, None, None] * inner + k
    down += expert[:, None, None, None] * d0 + tl.minimum(n, hidden - 1)[None, :, None, None] * d1 + k * d2
    total = tl.zeros((SLOTS, BLOCK_N, BLOCK_K // VECTOR), tl.float32)
    for start in range(0, inner, BLOCK_K):
        inside = chosen[:, None, None, None] & (start + k < inner)
        values = tl.load(h, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(down, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        total += tl.sum(values * d, axis=3)
        h += BLOCK_K
        down += BLOCK_K * d2
    result = tl.sum(tl.sum(total, axis=2) * weight[:, None], axis=0)  # (BLOCK_N,)
    tl.store(out + token * hidden + n, result.to(out.dtype.element_ty), mask=n < hidden)


@triton.jit
def swiglu(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


# The counting sort: pairs in blocks of BLOCK, read CHUNK at a time


@triton.jit
def _count(experts, counts, pairs, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """counts[b, e]: how many pairs of block b have expert e."""
    first = tl.program_id(0) * BLOCK
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    for start in range(first, tl.minimum(first + BLOCK, pairs), CHUNK):
        pair = start + tl.arange(0, CHUNK)
        chosen = tl.load(experts + pair, mask=pair < pairs, other=-1).to(tl.int32)
        total += tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(counts + tl.program_id(0) * EXPERTS + expert, total)


@triton.jit
def _sum_counts(
    counts, places, ends, blocks,
    EXPERTS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """places[b, e]: the place of block b's first pair with expert e. ends[0], ends[1]: past each expert's rows, tiles."""
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        held = tl.load(counts + block[:, None] * EXPERTS + expert[None, :], mask=(block < blocks)[:, None], other=0)
        total += tl.sum(held, axis=0)
    end = tl.cumsum(total, axis=0)
    tl.store(ends + expert, end)
    tl.store(ends + EXPERTS + expert, tl.cumsum((total + BLOCK_M - 1) // BLOCK_M, axis=0))
    place = end - total
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        offset = block[:, None] * EXPERTS + expert[None, :]
        held = tl.load(counts + offset, mask=(block < blocks)[:, None], other=0)
        tl.store(places + offset, place[None, :] + tl.cumsum(held, axis=0) - held, mask=(block < blocks)[:, None])
        place += tl.sum(held, axis=0)


@triton.jit
def _place(experts, places, order, pairs, count, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """order[place] = pair: the block's first place for the expert, and how many pairs of the block come before."""
    start = tl.program_id(0) * CHUNK
    first = start // BLOCK * BLOCK
    pair = start + tl.arange(0, CHUNK)
    chosen = tl.load(experts + pair, mask=pair < pairs, other=-1).to(tl.int32)
    real = (chosen >= 0) & (chosen < count)  # no other expert may write anywhere
    place = tl.load(places + first // BLOCK * EXPERTS + chosen, mask=real, other=0)
    for before in range(first, start + CHUNK, CHUNK):
        other = before + tl.arange(0, CHUNK)
        held = tl.load(experts + other, mask=other < pairs, other=-1).to(tl.int32)
        earlier = (held[None, :] == chosen[:, None]) & (other[None, :] < pair[:, None])
        place += tl.sum(earlier.to(tl.int32), axis=1)
    tl.store(order + place, pair, mask=real)


# The grouped matrix products. Programs of one tile of rows are neighbours: together they read its rows once from memory,
# and all tiles of an expert, which follow each other, its weights; both stay in the L2 cache meanwhile.


@triton.jit
def find(tile, ends, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The tile's expert (EXPERTS if there is no such tile), its first row, and the end of the expert's rows."""
    expert = tl.arange(0, EXPERTS)
    end = tl.load(ends + expert)
    tile_end = tl.load(ends + EXPERTS + expert)
    before = tile_end <= tile
    found = tl.sum(before.to(tl.int32), axis=0)
    first_row = tl.max(tl.where(before, end, 0), axis=0)
    first_tile = tl.max(tl.where(before, tile_end, 0), axis=0)
    last = tl.sum(tl.where(expert == found, end, 0), axis=0)
    return found, first_row + (tile - first_tile) * BLOCK_M, last


@triton.jit
def _gate_up_tiles(
    x, gate_up, order, ends, h, hidden, inner, slots,
    x0, x1, g0, g1, g2,
    EXPERTS: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(inner, BLOCK_N)
    tile, column = tl.program_id(0) // across, tl.program_id(0) % across
    expert, first, last = find(tile, ends, EXPERTS, BLOCK_M)
    if expert >= EXPERTS:
        return
    row = first + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end repeat one inside: no mask in the loop, and nobody stores them.
    token = (tl.load(order + tl.minimum(row, last - 1)) // slots).to(tl.int64)
    a = x + token[:, None] * x0 + k[None, :] * x1
    gate = gate_up + expert.to(tl.int64) * g0 + tl.minimum(n, inner - 1)[None, :] * g1 + k[:, None] * g2
    up = gate + inner * g1
    gate_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, hidden, BLOCK_K):
        if EVEN:
            values, g, u = tl.load(a), tl.load(gate), tl.load(up)
        else:
            inside = start + k < hidden
            values = tl.load(a, mask=inside[None, :], other=0.0)
            g = tl.load(gate, mask=inside[:, None], other=0.0)
            u = tl.load(up, mask=inside[:, None], other=0.0)
        gate_sum = tl.dot(values, g, gate_sum, input_precision="ieee")
        up_sum = tl.dot(values, u, up_sum, input_precision="ieee")
        a += BLOCK_K * x1
        gate += BLOCK_K * g2
        up += BLOCK_K * g2
    inside = (row < last)[:, None] & (n < inner)[None, :]
    target = h + row.to(tl.int64)[:, None] * inner + n[None, :]
    tl.store(target, swiglu(gate_sum, up_sum).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _down_tiles(
    h, down, weights, order, ends, y, hidden, inner,
    d0, d1, d2,
    EXPERTS: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(hidden, BLOCK_N)
    tile, column = tl.program_id(0) // across, tl.program_id(0) % across
    expert, first, last = find(tile, ends, EXPERTS, BLOCK_M)
    if expert >= EXPERTS:
        return
    row = tl.minimum(first + tl.arange(0, BLOCK_M), last - 1).to(tl.int64)
    live = first + tl.arange(0, BLOCK_M) < last
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a = h + row[:, None] * inner + k[None, :]
    b = down + expert.to(tl.int64) * d0 + tl.minimum(n, hidden - 1)[None, :] * d1 + k[:, None] * d2
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        if EVEN:
            values, d = tl.load(a), tl.load(b)
        else:
            inside = start + k < inner
            values = tl.load(a, mask=inside[None, :], other=0.0)
            d = tl.load(b, mask=inside[:, None], other=0.0)
        total = tl.dot(values, d, total, input_precision="ieee")
        a += BLOCK_K
        b += BLOCK_K * d2
    pair = tl.load(order + row).to(tl.int64)
    weight = tl.load(weights + pair).to(tl.float32)
    target = y + pair[:, None] * hidden + n[None, :]
    tl.store(target, (total * weight[:, None]).to(y.dtype.element_ty), mask=live[:, None] & (n < hidden)[None, :])


@triton.jit
def _add_slots(y, out, hidden, slots, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)  # the first axis of a grid: the others end at 65535
    slot = tl.arange(0, SLOTS)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (slot < slots)[:, None] & (n < hidden)[None, :]
    held = tl.load(y + (token * slots + slot)[:, None] * hidden + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + n, tl.sum(held, axis=0).to(out.dtype.element_ty), mask=n < hidden)
