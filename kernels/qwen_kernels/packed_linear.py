"""Linear projections with packed matrices: the three ways to multiply, and which is taken. The layouts are in `unpack`.

Up to 4 rows, a product of vectors, as in `linear`: a program holds BLOCK_N rows of the weight times CHUNKS chunks, of
which each thread has one, 16 bytes where the format allows it. It multiplies codes with x in fp32, adds up its chunk, and
only then multiplies with the scale. Nothing is shared between the warps of a program before the end.

5 to 64 rows, tensor cores: a tile of BLOCK_N rows of the weight is decoded, scaled in fp32, rounded once to x's dtype, as
the formula does, and multiplied from registers with the rows of x, padded to 16, 32 or 64. The weight is the left operand:
it is what a warpgroup of a Hopper takes from registers, and the rows of x are few on the right. Bytes of two nibbles make
two products, of the even columns and of the odd: no number changes its place. Where N alone makes too few programs K is
split among several, and their fp32 sums are added in order.

More rows: the weight is dequantised once, some rows at a time, and cuBLAS multiplies (`torch.nn.functional.linear`).

Bytes: those of the packed weight once; from 65 rows on, those of the dequantised weight twice besides. FLOPs: 2 M N K.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref.errors import RequestError
from qwen_ref.quant.gguf_blocks import BLOCK
from qwen_ref.quant.packed import Fp8, Gguf, Int8, Packed, rows

from .bits import fetch, halves, pairs
from .launch import ANY, on, require, tuned
from .linear import _add_splits
from .unpack import Operands, operands

Table = dict[tuple[str, Any], dict[str, int]]
MOST_VECTORS, MOST_ROWS = 4, 64
MOST_BYTES = 256 << 20  # of dequantised weight at a time
# (device, class) -> the tile. A class is (rows padded, "narrow" = N at most 2048, or "wide"), and "dense" to dequantise.
# Products of vectors: 64 or 128 bytes on their way to every thread. Tensor cores: BLOCK_K columns in 16 bits, fp32 has
# a quarter; about PROGRAMS programs, two for each multiprocessor of an H100 or H200.
TUNED: Table = {
    **{(ANY, (count, "narrow")): {"BLOCK_N": 4, "CHUNKS": 128} for count in (1, 2, 4)},
    **{(ANY, (count, "wide")): {"BLOCK_N": 8 // count, "CHUNKS": 128} for count in (1, 2)},
    (ANY, (4, "wide")): {"BLOCK_N": 4, "CHUNKS": 128},
    (ANY, (16, "narrow")): {"BLOCK_N": 64, "BLOCK_K": 128, "PROGRAMS": 264, "num_warps": 4, "num_stages": 4},
    (ANY, (16, "wide")): {"BLOCK_N": 64, "BLOCK_K": 128, "PROGRAMS": 264, "num_warps": 4, "num_stages": 4},
    (ANY, (32, "narrow")): {"BLOCK_N": 64, "BLOCK_K": 128, "PROGRAMS": 264, "num_warps": 4, "num_stages": 3},
    (ANY, (32, "wide")): {"BLOCK_N": 64, "BLOCK_K": 128, "PROGRAMS": 264, "num_warps": 4, "num_stages": 3},
    (ANY, (64, "narrow")): {"BLOCK_N": 64, "BLOCK_K": 128, "PROGRAMS": 264, "num_warps": 4, "num_stages": 3},
    (ANY, (64, "wide")): {"BLOCK_N": 128, "BLOCK_K": 128, "PROGRAMS": 264, "num_warps": 8, "num_stages": 3},
    (ANY, "dense"): {"BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 4},
}


def linear(operation: str, table: Table, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x (..., K), any strides; weight (N, K), rows any distance apart; bias (N,) or None. Returns (..., N), contiguous."""
    columns, inner = weight[0].shape[-2], x.shape[-1]
    check(operation, x, weight, inner, bias)
    count, found = math.prod(x.shape[:-1]), operands(weight, inner)
    if count == 0 or columns == 0 or found is None:
        return F.linear(x, weight.dequantize(x.dtype, inner), bias)
    with on(x.device):
        if count > MOST_ROWS:
            return _by_dense(table, x, weight, bias)
        flat = even(x.reshape(count, inner))
        out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
        (_by_vectors if count <= MOST_VECTORS else _by_tiles)(table, flat, found, bias, out, columns, inner)
    return out


def check(operation: str, x: Tensor, weight: Packed, inner: int, bias: Tensor | None = None) -> None:
    """Refuse what the kernels would compute wrongly in silence. Raises RequestError."""
    require(operation, x, *(t for t in (*weight, bias) if isinstance(t, Tensor)))
    codes, bytes_of_row = weight[0], {Int8: inner, Fp8: inner, Gguf: -1}.get(type(weight), -(-inner // 2))
    if isinstance(weight, Gguf):
        elements, size = BLOCK.get(weight.kind, (1, 1))
        bytes_of_row = inner // elements * size if weight.kind in BLOCK and inner % elements == 0 else codes.shape[-1]
    if codes.shape[-1] != bytes_of_row:
        raise RequestError(f"the triton {operation} got x with {inner} columns and codes of {tuple(codes.shape)}")
    if bias is not None and (bias.shape != codes.shape[-2:-1] or bias.dtype != x.dtype):
        got = f"{tuple(bias.shape)} {bias.dtype}"
        raise RequestError(f"the triton {operation} needs a bias ({codes.shape[-2]},) {x.dtype}, got {got}")


def even(x: Tensor) -> Tensor:
    """Rows of an even number of columns, contiguous, in pairs that can be loaded as one number; mostly x itself."""
    if x.shape[-1] % 2:
        return F.pad(x, (0, 1))
    x = x.contiguous()
    return x.clone() if x.storage_offset() % 2 else x


def _by_vectors(table: Table, x: Tensor, w: Operands, bias: Tensor | None, out: Tensor, columns: int, inner: int) -> None:
    count = x.shape[0]
    padded, constants = triton.next_power_of_2(count), w.constants(w.vector(x.element_size()))
    launch = {**tuned(table, x.device, (padded, "narrow" if columns <= 2048 else "wide"))}
    launch["BLOCK_N"] = max(1, launch["BLOCK_N"] * 2 // x.element_size())  # as many bytes of x in fp32
    width, wide = w.width(inner), constants["WIDE"]
    launch["CHUNKS"] = chunks = few_chunks(launch["CHUNKS"], width, wide)
    _few_rows[(triton.cdiv(columns, launch["BLOCK_N"]),)](
        x, w.codes, w.scale, w.extra, bias, out, count, columns, width, x.stride(0), *w.strides(), _step(bias),
        **constants, EVEN=width % (chunks * wide) == 0, ROWS=padded, **launch, num_warps=max(1, min(4, chunks // 32)),
    )  # fmt: skip


def _by_tiles(table: Table, x: Tensor, w: Operands, bias: Tensor | None, out: Tensor, columns: int, inner: int) -> None:
    count = x.shape[0]
    padded = max(16, triton.next_power_of_2(count))
    launch = {**tuned(table, x.device, (padded, "narrow" if columns <= 2048 else "wide"))}
    block = launch.pop("BLOCK_K")
    block = block if x.element_size() == 2 else max(32, block // 4)  # tl.dot wants 16, and nibbles make two products
    constants, width = w.constants(block), w.width(inner)
    launch["CHUNKS"] = max(1, block // constants["SPAN"])
    step = launch["CHUNKS"] * constants["WIDE"]  # bytes of a row
    tiles = triton.cdiv(columns, launch["BLOCK_N"])
    # A split of fewer than four steps is not worth a second kernel.
    splits = max(1, min(launch.pop("PROGRAMS") // tiles, width // (4 * step)))
    sums = out if splits == 1 else torch.empty(splits, count, columns, dtype=torch.float32, device=x.device)
    steps = triton.cdiv(width, splits * step)
    _some_rows[(tiles, splits)](
        x, w.codes, w.scale, w.extra, bias if splits == 1 else None, sums, count, columns, width, x.stride(0),
        *w.strides(), _step(bias), steps, **constants, EVEN=splits * steps * step == width, ROWS=padded, **launch,
    )  # fmt: skip
    if splits > 1:
        size, grid = count * columns, (triton.cdiv(count * columns, 512),)
        _add_splits[grid](sums, bias, out, size, columns, _step(bias), SPLITS=splits, BLOCK=512, num_warps=4)


def _by_dense(table: Table, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """Dequantised once, at most MOST_BYTES at a time, and multiplied by cuBLAS."""
    columns, inner = weight[0].shape[-2], x.shape[-1]
    block = max(128, MOST_BYTES // (inner * x.element_size()) // 128 * 128)
    if columns <= block:
        return F.linear(x, dense(table, weight, inner, x), bias)
    out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        part = None if bias is None else bias[first:last]
        out[..., first:last] = F.linear(x, dense(table, rows(weight, first, last), inner, x), part)
    return out


def dense(table: Table, weight: Packed, inner: int, like: Tensor) -> Tensor:
    """The whole matrix (N, K) in the dtype of another tensor."""
    w = operands(weight, inner)
    if w is None:
        return weight.dequantize(like.dtype, inner)
    columns, width = w.codes.shape[-2], w.width(inner)
    launch = {**tuned(table, like.device, "dense")}
    block = launch.pop("BLOCK_K")
    constants = w.constants(32)
    launch["CHUNKS"] = chunks = max(1, block // constants["SPAN"])
    out = torch.empty(columns, inner, dtype=like.dtype, device=like.device)
    grid = triton.cdiv(columns, launch["BLOCK_N"]), triton.cdiv(width, chunks * constants["WIDE"])
    whole = width % (chunks * constants["WIDE"]) == 0 and inner % 2 == 0
    _dequantize[grid](out, w.codes, w.scale, w.extra, columns, inner, width, *w.strides(), **constants, EVEN=whole, **launch)
    return out


def few_chunks(most: int, width: int, wide: int) -> int:
    """How many chunks of `wide` bytes a program has at once; a warp's worth at least, though a row may have fewer.

    Were there fewer, words and bytes of a chunk would lie on threads of a warp apart from each other, and Triton 3.7 adds up
    other threads than those where both are reshaped to one axis and summed. As many as make whole steps of a row, if any do:
    masks cost a third more instructions and half more registers.
    """
    while most > 32 and width % (most * wide):
        most //= 2
    return min(most, max(32, triton.next_power_of_2(triton.cdiv(width, wide))))


def _step(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.stride(0)


@triton.jit
def _few_rows(
    x, codes, scale, extra, bias, out, count, columns, width,
    x0, c1, s1, e1, b0,
    DECODE: tl.constexpr, NIBBLES: tl.constexpr, SECOND: tl.constexpr,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    SPAN: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = tl.minimum(n, columns - 1).to(tl.int64)[None, :, None, None, None]
    x += tl.minimum(row, count - 1).to(tl.int64)[:, None, None, None, None] * x0
    total = tl.zeros((ROWS, BLOCK_N, CHUNKS), tl.float32)
    for first in range(0, tl.cdiv(width, WIDE), CHUNKS):
        total = add_chunks(
            total, x, codes, scale, extra, line, first, width, c1, s1, e1,
            DECODE, NIBBLES, SECOND, GROUP, HIGH, KIND, SPAN, WIDE, BYTES, WORDS, EVEN,
        )  # fmt: skip
    result = tl.sum(total, axis=2)  # (ROWS, BLOCK_N)
    if bias is not None:
        result += tl.load(bias + n * b0, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    inside = (row < count)[:, None] & (n < columns)[None, :]
    tl.store(out + row[:, None] * columns + n[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_chunks(
    total, x, codes, scale, extra, line, first, width, c1, s1, e1,
    DECODE: tl.constexpr, NIBBLES: tl.constexpr, SECOND: tl.constexpr,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    SPAN: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """total (M, N, C) plus the products of C chunks, from the chunk `first` on, of rows `line` of the weight and of x.

    Five axes from the pointers on, (M, N, words, bytes, C). With the chunks last neighbouring threads get neighbouring
    chunks, each a whole one, of whatever is loaded: nothing moves between threads until the end.
    """
    shape: tl.constexpr = (total.shape[0], total.shape[1], WIDE, total.shape[2])
    c = first + tl.arange(0, total.shape[2])[None, None, None, None, :]
    w = tl.arange(0, WIDE // BYTES)[None, None, :, None, None]
    j = tl.arange(0, BYTES)[None, None, None, :, None]
    at = c * WIDE + w * BYTES + j
    if NIBBLES:
        even, odd = halves(fetch(pairs(x) + at, at < width, EVEN), x.dtype.element_ty)
    else:
        even = fetch(x + at, at < width, EVEN)
    left, right, s = DECODE(
        codes, scale, extra, line, c, w, j, width, c1, s1, e1, GROUP, HIGH, KIND, SPAN, WIDE, BYTES, WORDS, EVEN
    )
    part = tl.sum(tl.reshape(left * even.to(tl.float32), shape), axis=2)
    if NIBBLES:
        part += tl.sum(tl.reshape(right * (odd.to(tl.float32) * SECOND), shape), axis=2)
    return total + part * tl.sum(tl.sum(s, axis=2), axis=2)


@triton.jit
def _some_rows(
    x, codes, scale, extra, bias, out, count, columns, width,
    x0, c1, s1, e1, b0, steps,
    DECODE: tl.constexpr, NIBBLES: tl.constexpr, SECOND: tl.constexpr,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    SPAN: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    line = tl.minimum(n, columns - 1).to(tl.int64)
    x += tl.minimum(row, count - 1).to(tl.int64)[None, :] * x0
    total = tl.zeros((BLOCK_N, ROWS), tl.float32)
    for step in range(steps):
        first = (split * steps + step) * CHUNKS
        total = multiply(
            total, x, codes, scale, extra, line, first, width, c1, s1, e1,
            DECODE, NIBBLES, SECOND, GROUP, HIGH, KIND, SPAN, WIDE, BYTES, WORDS, EVEN, CHUNKS,
        )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + n * b0, mask=n < columns, other=0.0).to(tl.float32)[:, None]
    inside = (row < count)[None, :] & (n < columns)[:, None]
    target = out + (split * count + row)[None, :] * columns + n[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def multiply(
    total, x, codes, scale, extra, line, first, width, c1, s1, e1,
    DECODE: tl.constexpr, NIBBLES: tl.constexpr, SECOND: tl.constexpr,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    SPAN: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """total (N, M) plus the product of CHUNKS chunks, from the chunk `first` on, with the rows at x (1, M)."""
    T: tl.constexpr = x.dtype.element_ty
    c = first + tl.arange(0, CHUNKS)[None, :, None, None]
    w = tl.arange(0, WIDE // BYTES)[None, None, :, None]
    j = tl.arange(0, BYTES)[None, None, None, :]
    left, right, s = DECODE(
        codes, scale, extra, line[:, None, None, None], c, w, j, width, c1, s1, e1,
        GROUP, HIGH, KIND, SPAN, WIDE, BYTES, WORDS, EVEN,
    )  # fmt: skip
    at = (first * WIDE + tl.arange(0, CHUNKS * WIDE))[:, None]
    a = tl.reshape((left * s).to(T), (line.shape[0], CHUNKS * WIDE))
    if NIBBLES:
        even, odd = halves(fetch(pairs(x) + at, at < width, EVEN), T)
        total = tl.dot(a, even, total, input_precision="ieee")
        a = tl.reshape((right * (s * SECOND)).to(T), (line.shape[0], CHUNKS * WIDE))
        return tl.dot(a, odd, total, input_precision="ieee")
    else:
        return tl.dot(a, fetch(x + at, at < width, EVEN), total, input_precision="ieee")


@triton.jit
def _dequantize(
    out, codes, scale, extra, columns, inner, width,
    c1, s1, e1,
    DECODE: tl.constexpr, NIBBLES: tl.constexpr, SECOND: tl.constexpr,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    SPAN: tl.constexpr, WIDE: tl.constexpr, BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = out.dtype.element_ty
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None, None, None]
    line = tl.minimum(n, columns - 1).to(tl.int64)
    c = (tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS))[None, :, None, None]
    w = tl.arange(0, WIDE // BYTES)[None, None, :, None]
    j = tl.arange(0, BYTES)[None, None, None, :]
    left, right, s = DECODE(
        codes, scale, extra, line, c, w, j, width, c1, s1, e1, GROUP, HIGH, KIND, SPAN, WIDE, BYTES, WORDS, EVEN
    )
    at = c * WIDE + w * BYTES + j
    if NIBBLES:
        both = tl.join((left * s).to(T), (right * (s * SECOND)).to(T))  # (BLOCK_N, CHUNKS, words, bytes, 2)
        k = (at * 2)[:, :, :, :, None] + tl.arange(0, 2)[None, None, None, None, :]
        tl.store(out + line[:, :, :, :, None] * inner + k, both, mask=(n < columns)[:, :, :, :, None] & (k < inner))
    else:
        tl.store(out + line * inner + at, (left * s).to(T), mask=(n < columns) & (at < inner))
