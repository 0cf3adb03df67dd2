"""Packed matrices in registers: what a tile of each layout of `qwen_ref.quant.packed` stands for, in fp32.

A row is cut into chunks of SPAN columns that share a scale. A decoder gets the rows n, the chunks c, the words w of a
chunk and the bytes j of a word as tensors that broadcast against each other, with whatever axes its kernel likes, loads
the codes, and gives (first, second, scale): the numbers before they are scaled, and the scale of each chunk. A byte of two
nibbles has an even column, `first`, and an odd one, `second`, which is to be multiplied by SECOND; in the other layouts
the two are the same. A kernel calls its decoder through the constant DECODE, and is compiled once for each.

Where rows are aligned (WORDS) four bytes are loaded as one integer and taken apart by shifts: a GPU has no registers of
one byte, and the compiler, left with bytes, spends more instructions on them than on the arithmetic.

The decoder of ggml's kinds is in `unpack_ggml`, what they are made of in `bits`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref.quant.gguf_blocks import BLOCK
from qwen_ref.quant.packed import Code4, Fp8, Gguf, Int4, Int8, Packed

from . import unpack_ggml
from .bits import TWO_22, bytes_at, e4m3, fetch, group_of, less, scale_at


class Operands(NamedTuple):
    """A packed matrix, or a stack of them, as the kernels take it. Every tensor is contiguous along its last axis."""

    codes: Tensor  # (..., N, bytes) uint8
    scale: Tensor | None  # (..., N or blocks of rows, G) float, or uint8 where Triton has no such float
    extra: Tensor | None  # zeros (..., N, G), or what codes stand for: a table (16,), one of each expert, points of a grid
    decode: Any
    nibbles: bool
    group: int  # columns of a scale; 0: the whole row
    high: int  # rows of a scale; 0: all rows
    fixed: int  # columns of a chunk, where the layout says so
    kind: str  # of the scales ("", "e4m3", "e8m0"), or of ggml's blocks

    def constants(self, most: int) -> dict[str, Any]:
        """With chunks of at most so many columns, a power of two."""
        span = self.fixed or math.gcd(self.group or most, most)
        wide = span // 2 if self.nibbles else span
        return {
            "DECODE": self.decode, "NIBBLES": self.nibbles, "SECOND": 1 / 16 if self.decode is int4 else 1.0,
            "GROUP": self.group, "HIGH": self.high, "KIND": unpack_ggml.DECODERS.get(self.kind, self.kind),
            "SPAN": span, "WIDE": wide, "BYTES": min(4, wide), "WORDS": self.aligned and wide % 4 == 0,
        }  # fmt: skip

    def vector(self, element_size: int) -> int:
        """Columns for a thread of a product of vectors: 16 bytes of codes for x in 16 bits, as many of x in fp32."""
        return (64 if self.nibbles else 32) // element_size

    def width(self, inner: int) -> int:
        """Bytes of a row, or its columns where a block has a scale of its own: what the chunks are counted by."""
        return -(-inner // 2) if self.nibbles else inner

    @property
    def aligned(self) -> bool:
        """Whether every row, and what is left of it at its end, is made of whole words."""
        places = (*self.codes.stride()[:-1], self.codes.shape[-1], self.codes.storage_offset(), BLOCK.get(self.kind, (1, 4))[1])
        return all(place % 4 == 0 for place in places)

    @property
    def looks_up(self) -> bool:
        return self.decode in (code4, unpack_ggml.ggml)

    def strides(self) -> tuple[int, int, int]:
        """From row to row: of codes, scales, extras."""
        return (_row(self.codes), _row(self.scale), 0 if self.looks_up else _row(self.extra))

    def expert_strides(self) -> tuple[int, int, int]:
        shared = self.looks_up and self.extra is not None and self.extra.dim() == 1
        return (self.codes.stride(0), _first(self.scale), 0 if shared else _first(self.extra))


def operands(weight: Packed, inner: int) -> Operands | None:
    """A matrix of `inner` columns for the kernels; None where they have no decoder for it, which is rare."""
    if isinstance(weight, Gguf):
        if weight.kind not in unpack_ggml.DECODERS:
            return None
        blocks, table = _lines(weight.blocks), unpack_ggml.looked_up(weight.kind, weight.blocks.device)
        return Operands(blocks, None, table, unpack_ggml.ggml, False, 0, 1, unpack_ggml.SPAN, weight.kind)
    if isinstance(weight, Fp8):
        high, wide = weight.block
        high = 0 if high >= weight.codes.shape[-2] else high
        return Operands(_bytes(weight.codes), *_scale(weight.scale)[:1], None, fp8, False, _group(wide, inner), high, 0,
                        _scale(weight.scale)[1])  # fmt: skip
    group = _group(weight.group, inner)
    nibbles = not isinstance(weight, Int8)
    if nibbles and group % 2:
        return None  # the two columns of a byte would have two scales
    scale, kind = _scale(weight.scale)
    extra = weight.table.contiguous() if isinstance(weight, Code4) else weight.zero
    decode = code4 if isinstance(weight, Code4) else int4 if isinstance(weight, Int4) else int8
    if extra is not None and not isinstance(weight, Code4):
        extra = _lines(extra)
    return Operands(_bytes(weight.codes), scale, extra, decode, nibbles, group, 1, 0, kind)


def _group(group: int, inner: int) -> int:
    return 0 if group >= inner else group


def _scale(scale: Tensor) -> tuple[Tensor, str]:
    kinds = {torch.float8_e4m3fn: "e4m3", torch.float8_e8m0fnu: "e8m0"}
    kind = kinds.get(scale.dtype, "")
    return _lines(scale.view(torch.uint8) if kind else scale), kind


def _bytes(codes: Tensor) -> Tensor:
    return _lines(codes.view(torch.uint8))


def _lines(values: Tensor) -> Tensor:
    return values if values.stride(-1) == 1 or values.shape[-1] == 1 else values.contiguous()


def _row(values: Tensor | None) -> int:
    return 0 if values is None else values.stride(-2)


def _first(values: Tensor | None) -> int:
    return 0 if values is None else values.stride(0)


# ------------------------------------------------------------------------------------------------- decoders
# codes, scale, extra: where the matrix begins; n, c, w, j: rows, chunks, words of a chunk, bytes of a word; width: bytes of
# a row, or its columns where a block has a scale of its own; c1, s1, e1: from row to row. EVEN: no chunk is partial or
# outside.


@triton.jit
def int4(
    codes, scale, extra, n, c, w, j, width, c1, s1, e1,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr,
    BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    byte = bytes_at(codes + n * c1, c * WIDE, w, j, width, BYTES, WORDS, EVEN)
    group, inside = group_of(c, GROUP, SPAN), c * WIDE < width
    zero = 8.0
    if extra is not None:
        zero = fetch(extra + n * e1 + group, inside, EVEN).to(tl.float32)
    first, second = less(byte & 15, zero), less(byte & 240, zero * 16.0)  # the high nibble where it is: 16 times its value
    return first, second, scale_at(scale + n * s1 + group, inside, KIND, EVEN) * TWO_22


@triton.jit
def int8(
    codes, scale, extra, n, c, w, j, width, c1, s1, e1,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr,
    BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    byte = bytes_at(codes + n * c1, c * WIDE, w, j, width, BYTES, WORDS, EVEN)
    group, inside = group_of(c, GROUP, SPAN), c * WIDE < width
    zero = 128.0
    if extra is not None:
        zero = fetch(extra + n * e1 + group, inside, EVEN).to(tl.float32) + 128.0
    value = less(byte & 255 ^ 128, zero)  # the sign bit flipped: code + 128
    return value, value, scale_at(scale + n * s1 + group, inside, KIND, EVEN) * TWO_22


@triton.jit
def fp8(
    codes, scale, extra, n, c, w, j, width, c1, s1, e1,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr,
    BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    value = e4m3(bytes_at(codes + n * c1, c * WIDE, w, j, width, BYTES, WORDS, EVEN))
    line = n // HIGH if HIGH > 0 else n * 0
    return value, value, scale_at(scale + line * s1 + group_of(c, GROUP, SPAN), c * WIDE < width, KIND, EVEN)


@triton.jit
def code4(
    codes, scale, extra, n, c, w, j, width, c1, s1, e1,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr,
    BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    byte = bytes_at(codes + n * c1, c * WIDE, w, j, width, BYTES, WORDS, EVEN)
    first, second = tl.load(extra + (byte & 15)), tl.load(extra + (byte >> 4 & 15))  # 64 bytes that stay in the L1 cache
    return first, second, scale_at(scale + n * s1 + group_of(c, GROUP, SPAN), c * WIDE < width, KIND, EVEN)
