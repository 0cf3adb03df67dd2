"""Experts whose matrices are packed: `moe_experts` with the decoders of `unpack`. The layouts come in through them.

Many tokens. The counting sort, the tiles of every expert's rows and the sum over slots are those of `moe_experts`; a tile
of weights is decoded, scaled in fp32, rounded once to x's dtype and multiplied on the tensor cores, as in `packed_linear`.
An expert has too few rows for dequantising it once to pay.

Up to 4 tokens, products of vectors: every pair of a token and a slot reads its own expert's codes, with as many programs
as fill a GPU, and the second kernel goes through all slots of a token, so that nothing is left to add up.

gate, up, silu and the sum over slots are fp32; h and a slot's row are rounded to x's dtype.

Bytes: the codes and scales of the experts chosen once, M H (1 + 1) for x and out, and M k (2 I + 2 H) between the kernels.
FLOPs: 6 M k H I. Memory bound up to some 100 tokens per expert, tensor cores above.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref.errors import RequestError
from qwen_ref.quant.packed import Packed

from .launch import ANY, INSTINCT, on, require, tuned
from .moe_experts import MOST_VECTORS, _add_slots, _sorted, find, swiglu
from .packed_linear import Table, add_chunks, check, even, few_chunks, multiply
from .unpack import Operands, operands

# (device, (class, bits of a number)) -> tiles. Otherwise than "gate_up" and "down" by vectors, whose ROWS are those of the
# weights in one program, the class is BLOCK_M, the rows of a tile, as in `moe_experts`.
TUNED: Table = {
    (ANY, ("gate_up", 16)): {"ROWS": 4, "CHUNKS": 64},
    (ANY, ("gate_up", 32)): {"ROWS": 2, "CHUNKS": 64},
    (ANY, ("down", 16)): {"ROWS": 8, "CHUNKS": 32},
    (ANY, ("down", 32)): {"ROWS": 4, "CHUNKS": 32},
    (ANY, (16, 16)): {"BLOCK_I": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
    (ANY, (64, 16)): {"BLOCK_I": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    (ANY, (128, 16)): {"BLOCK_I": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    (ANY, (16, 32)): {"BLOCK_I": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
    (ANY, (64, 32)): {"BLOCK_I": 16, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
    (ANY, (128, 32)): {"BLOCK_I": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2},
    (INSTINCT, (128, 32)): {"BLOCK_I": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},  # 8 spill
}


def experts(
    formula: Any, table: Table, x: Tensor, gate_up: Packed, down: Packed, weights: Tensor, chosen: Tensor
) -> Tensor:
    """x (M, H), any strides; gate_up E x (2I, H), down E x (H, I); weights, chosen (M, k). Returns (M, H)."""
    name = formula.__name__
    (tokens, hidden), (count, double, _), k = x.shape, gate_up[0].shape, chosen.shape[-1]
    inner = double // 2
    check(name, x, gate_up, hidden)
    check(name, x, down, inner)
    require(name, x, weights, chosen)
    if down[0].shape[:2] != (count, hidden) or chosen.shape != (tokens, k) or weights.shape != (tokens, k) or k == 0:
        raise RequestError(
            f"the triton {name} needs x (M, H), gate_up E x (2I, H), down E x (H, I), weights and experts (M, k), got "
            + ", ".join(str(tuple(t.shape)) for t in (x, gate_up[0], down[0], weights, chosen))
        )
    if weights.dtype != x.dtype or chosen.is_floating_point():
        raise RequestError(f"the triton {name} needs x and the router's weights of one dtype, and integers for the experts")
    first, second = operands(gate_up, hidden), operands(down, inner)
    if first is None or second is None or x.numel() == 0:
        return formula(x, gate_up, down, weights, chosen)
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    with on(x.device):
        run = _by_vectors if tokens <= MOST_VECTORS else _by_tiles
        run(table, even(x), first, second, weights.contiguous(), chosen.contiguous(), out, inner)
    return out


def _hidden(pairs_: int, inner: int, like: Tensor) -> Tensor:
    """Room for h, (pairs, I) with a zero after an odd I, so that `halves` finds even rows."""
    return (like.new_zeros if inner % 2 else like.new_empty)(pairs_, inner + inner % 2)


def _matrix(w: Operands) -> tuple[Any, ...]:
    return w.codes, w.scale, w.extra


def _vector_launch(table: Table, name: str, w: Operands, width: int, x: Tensor) -> dict[str, Any]:
    launch: dict[str, Any] = {**tuned(table, x.device, (name, 8 * x.element_size()))}
    launch.update(w.constants(w.vector(x.element_size())))
    wide = launch["WIDE"]
    launch["CHUNKS"] = chunks = few_chunks(launch["CHUNKS"], width, wide)
    return {**launch, "EVEN": width % (chunks * wide) == 0, "num_warps": max(1, min(4, chunks // 32))}


def _by_vectors(
    table: Table, x: Tensor, first: Operands, second: Operands, weights: Tensor, chosen: Tensor, out: Tensor, inner: int
) -> None:
    (tokens, hidden), k = out.shape, chosen.shape[1]
    h = _hidden(tokens * k, inner, x)
    launch = _vector_launch(table, "gate_up", first, width := first.width(hidden), x)
    block = launch.pop("ROWS")
    _gate_up_vectors[(triton.cdiv(inner, block), tokens * k)](
        x, *_matrix(first), chosen, h, inner, k, width, x.stride(0), h.stride(0), *first.expert_strides(), *first.strides(),
        BLOCK_N=block, **launch,
    )  # fmt: skip
    launch = _vector_launch(table, "down", second, width := second.width(inner), x)
    block = launch.pop("ROWS")
    _down_vectors[(triton.cdiv(hidden, block), tokens)](
        h, *_matrix(second), weights, chosen, out, hidden, k, width, h.stride(0), *second.expert_strides(), *second.strides(),
        BLOCK_N=block, **launch,
    )  # fmt: skip


def _tile_launch(launch: dict[str, int], across: str, w: Operands, width: int) -> dict[str, Any]:
    constants = w.constants(launch["BLOCK_K"])
    chunks = max(1, launch["BLOCK_K"] // constants["SPAN"])
    return {
        **constants, "CHUNKS": chunks, "EVEN": width % (chunks * constants["WIDE"]) == 0, "BLOCK_N": launch[across],
        "num_warps": launch["num_warps"], "num_stages": launch["num_stages"],
    }  # fmt: skip


def _by_tiles(
    table: Table, x: Tensor, first: Operands, second: Operands, weights: Tensor, chosen: Tensor, out: Tensor, inner: int
) -> None:
    (tokens, hidden), k, count = out.shape, chosen.shape[1], first.codes.shape[0]
    total = tokens * k
    each = total / count  # an expert's rows on average
    block_m = 16 if each <= 16 else 64 if each <= 96 else 128
    launch = tuned(table, x.device, (block_m, 8 * x.element_size()))
    padded = triton.next_power_of_2(count)
    order, ends = _sorted(chosen, count, padded, block_m)
    h, y = _hidden(total, inner, x), x.new_empty(total, hidden)
    tiles = min(total // block_m + min(count, total), total)  # the most that can be: each used expert's last one is short
    _gate_up_tiles[(tiles * triton.cdiv(inner, launch["BLOCK_I"]),)](
        x, *_matrix(first), order, ends, h, inner, k, width := first.width(hidden), x.stride(0), h.stride(0),
        *first.expert_strides(), *first.strides(), EXPERTS=padded, BLOCK_M=block_m,
        **_tile_launch(launch, "BLOCK_I", first, width),
    )  # fmt: skip
    _down_tiles[(tiles * triton.cdiv(hidden, launch["BLOCK_N"]),)](
        h, *_matrix(second), weights, order, ends, y, hidden, width := second.width(inner), h.stride(0),
        *second.expert_strides(), *second.strides(), EXPERTS=padded, BLOCK_M=block_m,
        **_tile_launch(launch, "BLOCK_N", second, width),
    )  # fmt: skip
    _add_slots[(tokens, triton.cdiv(hidden, 1024))](
        y, out, hidden, k, SLOTS=triton.next_power_of_2(k), BLOCK=1024, num_warps=4
    )


# Products of vectors


@triton.jit
def _gate_up_vectors(
    x, codes, scale, extra, experts, h, inner, slots, width,
    x0, h0, c0, s0, e0, c1, s1, e1,
    DECODE: tl.constexpr, NIBBLES: tl.constexpr, SECOND: tl.constexpr,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    SPAN: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(experts + pair).to(tl.int64)
    codes, scale, extra = of_expert(codes, scale, extra, expert, c0, s0, e0)
    x += pair // slots * x0
    gate = tl.minimum(i, inner - 1).to(tl.int64)[None, :, None, None, None]
    up = gate + inner
    gate_sum = tl.zeros((1, BLOCK_N, CHUNKS), tl.float32)
    up_sum = tl.zeros((1, BLOCK_N, CHUNKS), tl.float32)
    for first in range(0, tl.cdiv(width, WIDE), CHUNKS):
        gate_sum = add_chunks(
            gate_sum, x, codes, scale, extra, gate, first, width, c1, s1, e1,
            DECODE, NIBBLES, SECOND, GROUP, HIGH, KIND, SPAN, WIDE, BYTES, WORDS, EVEN,
        )  # fmt: skip
        up_sum = add_chunks(
            up_sum, x, codes, scale, extra, up, first, width, c1, s1, e1,
            DECODE, NIBBLES, SECOND, GROUP, HIGH, KIND, SPAN, WIDE, BYTES, WORDS, EVEN,
        )  # fmt: skip
    product = swiglu(tl.sum(tl.sum(gate_sum, axis=2), axis=0), tl.sum(tl.sum(up_sum, axis=2), axis=0))
    tl.store(h + pair * h0 + i, product.to(h.dtype.element_ty), mask=i < inner)


@triton.jit
def _down_vectors(
    h, codes, scale, extra, weights, experts, out, hidden, slots, width,
    h0, c0, s0, e0, c1, s1, e1,
    DECODE: tl.constexpr, NIBBLES: tl.constexpr, SECOND: tl.constexpr,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    SPAN: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = tl.minimum(n, hidden - 1).to(tl.int64)[None, :, None, None, None]
    total = tl.zeros((1, BLOCK_N, CHUNKS), tl.float32)
    for pair in range(token * slots, token * slots + slots):
        expert = tl.load(experts + pair).to(tl.int64)
        weight = tl.load(weights + pair).to(tl.float32)
        own_codes, own_scale, own_extra = of_expert(codes, scale, extra, expert, c0, s0, e0)
        one = tl.zeros((1, BLOCK_N, CHUNKS), tl.float32)
        for first in range(0, tl.cdiv(width, WIDE), CHUNKS):
            one = add_chunks(
                one, h + pair * h0, own_codes, own_scale, own_extra, line, first, width, c1, s1, e1,
                DECODE, NIBBLES, SECOND, GROUP, HIGH, KIND, SPAN, WIDE, BYTES, WORDS, EVEN,
            )  # fmt: skip
        total += one * weight
    result = tl.sum(tl.sum(total, axis=2), axis=0)  # (BLOCK_N,)
    tl.store(out + token * hidden + n, result.to(out.dtype.element_ty), mask=n < hidden)


@triton.jit
def of_expert(codes, scale, extra, expert, c0, s0, e0):
    if scale is not None:
        scale += expert * s0
    if extra is not None:
        extra += expert * e0
    return codes + expert * c0, scale, extra


# The grouped matrix products


@triton.jit
def _gate_up_tiles(
    x, codes, scale, extra, order, ends, h, inner, slots, width,
    x0, h0, c0, s0, e0, c1, s1, e1,
    DECODE: tl.constexpr, NIBBLES: tl.constexpr, SECOND: tl.constexpr,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    SPAN: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(inner, BLOCK_N)
    tile, column = tl.program_id(0) // across, tl.program_id(0) % across
    expert, start, last = find(tile, ends, EXPERTS, BLOCK_M)
    if expert >= EXPERTS:
        return
    row = start + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns past the end repeat one inside: nobody stores them.
    token = (tl.load(order + tl.minimum(row, last - 1)) // slots).to(tl.int64)
    x += token[None, :] * x0
    codes, scale, extra = of_expert(codes, scale, extra, expert.to(tl.int64), c0, s0, e0)
    gate = tl.minimum(n, inner - 1).to(tl.int64)
    gate_sum = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up_sum = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(0, tl.cdiv(width, WIDE), CHUNKS):
        gate_sum = multiply(
            gate_sum, x, codes, scale, extra, gate, first, width, c1, s1, e1,
            DECODE, NIBBLES, SECOND, GROUP, HIGH, KIND, SPAN, WIDE, BYTES, WORDS, EVEN, CHUNKS,
        )  # fmt: skip
        up_sum = multiply(
            up_sum, x, codes, scale, extra, gate + inner, first, width, c1, s1, e1,
            DECODE, NIBBLES, SECOND, GROUP, HIGH, KIND, SPAN, WIDE, BYTES, WORDS, EVEN, CHUNKS,
        )  # fmt: skip
    inside = (row < last)[None, :] & (n < inner)[:, None]
    target = h + row.to(tl.int64)[None, :] * h0 + n[:, None]
    tl.store(target, swiglu(gate_sum, up_sum).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _down_tiles(
    h, codes, scale, extra, weights, order, ends, y, hidden, width,
    h0, c0, s0, e0, c1, s1, e1,
    DECODE: tl.constexpr, NIBBLES: tl.constexpr, SECOND: tl.constexpr,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    SPAN: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(hidden, BLOCK_N)
    tile, column = tl.program_id(0) // across, tl.program_id(0) % across
    expert, start, last = find(tile, ends, EXPERTS, BLOCK_M)
    if expert >= EXPERTS:
        return
    row = tl.minimum(start + tl.arange(0, BLOCK_M), last - 1).to(tl.int64)
    live = start + tl.arange(0, BLOCK_M) < last
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    codes, scale, extra = of_expert(codes, scale, extra, expert.to(tl.int64), c0, s0, e0)
    h += row[None, :] * h0
    line = tl.minimum(n, hidden - 1).to(tl.int64)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(0, tl.cdiv(width, WIDE), CHUNKS):
        total = multiply(
            total, h, codes, scale, extra, line, first, width, c1, s1, e1,
            DECODE, NIBBLES, SECOND, GROUP, HIGH, KIND, SPAN, WIDE, BYTES, WORDS, EVEN, CHUNKS,
        )  # fmt: skip
    pair = tl.load(order + row).to(tl.int64)
    weight = tl.load(weights + pair).to(tl.float32)
    target = y + pair[None, :] * hidden + n[:, None]
    tl.store(target, (total * weight[None, :]).to(y.dtype.element_ty), mask=live[None, :] & (n < hidden)[:, None])
