"""Packed matrices in registers: what a tile of each layout of `qwen_ref.quant.packed` stands for, in fp32.

A row is cut into chunks of SPAN columns that share a scale. A decoder gets the rows n, the chunks c, the words w of a
chunk and the bytes j of a word as tensors that broadcast against each other, with whatever axes its kernel likes, loads
the codes, and gives (first, second, scale): the numbers before they are scaled, and the scale of each chunk. A byte of two
nibbles has an even column, `first`, and an odd one, `second`, which is to be multiplied by SECOND; in the other layouts
the two are the same. A kernel calls its decoder through the constant DECODE, and is compiled once for each.

Where rows are aligned (WORDS) four bytes are loaded as one integer and taken apart by shifts: a GPU has no registers of
one byte, and the compiler, left with bytes, spends more instructions on them than on the arithmetic.

No number goes through a conversion, of which a GPU makes a half or a quarter as many as multiplications: the bits of a
small integer q, read as fp32, are the denormal number 2^-149 q. One multiply-add takes it to 2^-22 (q - zero), exactly, and
the scale gives the 2^22 back. In the same way an e4m3 number becomes 2^-120 times its value by moving its bits.
A NaN among float8_e4m3fn codes is read as 480: a checkpoint with one is refused where it is loaded.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref.quant.packed import Code4, Fp8, Gguf, Int4, Int8, Packed

TWO_127, TWO_22 = tl.constexpr(2.0**127), tl.constexpr(2.0**22)
KINDS = ("Q4_K", "Q6_K")  # of ggml, those with a decoder


class Operands(NamedTuple):
    """A packed matrix, or a stack of them, as the kernels take it. Every tensor is contiguous along its last axis."""

    codes: Tensor  # (..., N, bytes) uint8
    scale: Tensor | None  # (..., N or blocks of rows, G) float, or uint8 where Triton has no such float
    extra: Tensor | None  # zeros (..., N, G), or the table (..., 16)
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
            "GROUP": self.group, "HIGH": self.high, "KIND": self.kind,
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
        places = (*self.codes.stride()[:-1], self.codes.shape[-1], self.codes.storage_offset())
        return self.kind != "Q6_K" and all(place % 4 == 0 for place in places)

    def strides(self) -> tuple[int, int, int]:
        """From row to row: of codes, scales, extras."""
        return (_row(self.codes), _row(self.scale), 0 if self.decode is code4 else _row(self.extra))

    def expert_strides(self) -> tuple[int, int, int]:
        table = self.decode is code4 and self.extra is not None and self.extra.dim() == 1
        return (self.codes.stride(0), _first(self.scale), 0 if table else _first(self.extra))


def operands(weight: Packed, inner: int) -> Operands | None:
    """A matrix of `inner` columns for the kernels; None where they have no decoder for it, which is rare."""
    if isinstance(weight, Gguf):
        if weight.kind not in KINDS:
            return None
        decode = q4_k if weight.kind == "Q4_K" else q6_k
        return Operands(_lines(weight.blocks), None, None, decode, False, 0, 1, 16, weight.kind)
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


@triton.jit
def q4_k(
    codes, scale, extra, n, c, w, j, width, c1, s1, e1,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr,
    BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Blocks of 256 columns, 144 bytes: d, dmin, 12 bytes of eight 6-bit scales and minima, 128 bytes of nibbles."""
    inside, sub, start = c * SPAN < width, c % 16 // 2, c // 16 * 144
    block = codes + n * c1 + start
    at = start + 16 + sub // 2 * 32 + c % 2 * 16
    byte = bytes_at(codes + n * c1, at, w, j, start + tl.where(inside, 144, 0), BYTES, WORDS, EVEN)
    # Bytes: 0..3 scales, 4..7 minima, 8..11 the low four bits of both for sub 4..7, whose high two are in 0..7.
    low = fetch(block + 4 + sub % 4, inside, EVEN).to(tl.int32)
    middle = fetch(block + 8 + sub % 4, inside, EVEN).to(tl.int32)
    both = fetch(block + 12 + sub % 4, inside, EVEN).to(tl.int32)
    s = tl.where(sub < 4, low & 63, both & 15 | low >> 6 << 4)
    m = tl.where(sub < 4, middle & 63, both >> 4 | middle >> 6 << 4)
    d = fetch(half(block), inside, EVEN).to(tl.float32)
    least = fetch(half(block + 2), inside, EVEN).to(tl.float32)
    value = less(byte >> sub % 2 * 4 & 15, 0.0) * (d * s.to(tl.float32) * TWO_22) - least * m.to(tl.float32)
    return value, value, tl.full(d.shape, 1.0, tl.float32)


@triton.jit
def q6_k(
    codes, scale, extra, n, c, w, j, width, c1, s1, e1,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr,
    BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Blocks of 256 columns, 210 bytes: 128 of low nibbles, 64 of high two bits, 16 int8 scales, d."""
    inside, sub = c * SPAN < width, c % 16
    block = codes + n * c1 + c // 16 * 210
    part = sub % 8 // 2  # of a half of 128 columns, which quarter
    place = sub % 2 * 16 + w * BYTES + j
    low = fetch(block + sub // 8 * 64 + part % 2 * 32 + place, inside, EVEN).to(tl.uint32)
    high = fetch(block + 128 + sub // 8 * 32 + place, inside, EVEN).to(tl.uint32)
    code = low >> part // 2 * 4 & 15 | (high >> part * 2 & 3) << 4
    value = less(code, 32.0)
    s = fetch(block + 192 + sub, inside, EVEN).to(tl.int8, bitcast=True).to(tl.float32)
    return value, value, s * TWO_22 * fetch(half(block + 208), inside, EVEN).to(tl.float32)


# ------------------------------------------------------------------------------------------------- their parts


@triton.jit
def bytes_at(row, start, w, j, width, BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr):
    """Bytes of a row from `start` on, in the low eight bits of a uint32; the bits above them are not zero."""
    if WORDS:
        word = row.to(tl.pointer_type(tl.uint32), bitcast=True) + (start // 4 + w)
        return fetch(word, start + w * 4 < width, EVEN) >> (j * 8).to(tl.uint32)
    else:
        at = start + w * BYTES + j
        return fetch(row + at, at < width, EVEN).to(tl.uint32)



@triton.jit
def fetch(pointer, inside, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=inside, other=0.0 if pointer.dtype.element_ty.is_floating() else 0)


@triton.jit
def less(small, zero):
    """2^-22 (small - zero) of an integer below 2^22: its bits are a denormal fp32 number. Exact."""
    return small.to(tl.float32, bitcast=True) * TWO_127 - zero * (1.0 / TWO_22)


@triton.jit
def e4m3(byte):
    """The value of a float8_e4m3fn code: sign, exponent and mantissa moved to where fp32 has them, which is 2^-120 of it."""
    top = (byte.to(tl.uint32) << 24).to(tl.int32, bitcast=True)
    bits = (top >> 4).to(tl.uint32, bitcast=True) & 0x87F00000
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def scale_at(pointer, inside, KIND: tl.constexpr, EVEN: tl.constexpr):
    s = fetch(pointer, inside, EVEN)
    if KIND == "e4m3":
        return e4m3(s)
    elif KIND == "e8m0":
        bits = s.to(tl.int32) << 23
        bits = tl.where(s == 0, 0x400000, tl.where(s == 255, 0x7FC00000, bits))  # 2^-127, and NaN
        return bits.to(tl.float32, bitcast=True)
    else:
        return s.to(tl.float32)


@triton.jit
def group_of(c, GROUP: tl.constexpr, SPAN: tl.constexpr):
    if GROUP == 0:
        return c * 0
    else:
        return c * SPAN // GROUP


@triton.jit
def half(pointer):
    return pointer.to(tl.pointer_type(tl.float16), bitcast=True)


@triton.jit
def pairs(pointer):
    """A pointer to neighbouring numbers as one integer: both are loaded at once, and `halves` takes them apart."""
    if pointer.dtype.element_ty.primitive_bitwidth == 16:
        return pointer.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        return pointer.to(tl.pointer_type(tl.int64), bitcast=True)


@triton.jit
def halves(pair, T: tl.constexpr):
    """The even and the odd number of a pair, of type T."""
    if T.primitive_bitwidth == 16:
        return (pair & 0xFFFF).to(tl.int16).to(T, bitcast=True), (pair >> 16).to(tl.int16).to(T, bitcast=True)
    else:
        return (pair & 0xFFFFFFFF).to(tl.int32).to(T, bitcast=True), (pair >> 32).to(tl.int32).to(T, bitcast=True)
