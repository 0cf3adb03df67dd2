"""Blocks of ggml in registers: a chunk is 16 columns, the most that share a scale in every kind.

The layouts and the formulas are those of `qwen_ref.quant.gguf_blocks`, which gives each kind's in a line. There the fields of
a byte are taken apart for a whole block; here a chunk picks the bytes and the shift that hold its own columns. Bytes whose
fields lie in several chunks are loaded by each of them, from the L1 cache after the first.

A decoder gets the row, where its first block begins; the table of `looked_up`; the chunks c of the row, the words w of a chunk
and the bytes j of a word, for column 4 w + j; and `inside`, what may be loaded. It gives the numbers before they are scaled,
and a chunk's scale.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref.quant.gguf_blocks import GRIDS, IQ4_VALUES, grid

from .bits import TWO_22, fetch, half, less

SPAN = 16  # columns of a chunk


@cache
def looked_up(kind: str, device: torch.device) -> Tensor | None:
    """What codes of a kind stand for: sixteen fp32 numbers, or the points of a grid, four int8 to an int32; or None."""
    if kind == "IQ4_XS":
        return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=device)
    return grid(kind).view(torch.int32).flatten().to(device) if kind in GRIDS else None


@triton.jit
def ggml(
    codes, scale, extra, n, c, w, j, width, c1, s1, e1,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr,
    BYTES: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """`KIND` is one of those below."""
    return KIND(codes + n * c1, extra, c, w, j, c * SPAN < width, WORDS, EVEN)


# ------------------------------------------------------------------------------------------------- 32 elements


@triton.jit
def q4_1(row, table, c, w, j, inside, WORDS: tl.constexpr, EVEN: tl.constexpr):
    b = row + c // 2 * 20
    q = _run(b + 4, w, c % 2 * 4, inside, WORDS, EVEN) & 0x0F0F0F0F
    return _with_minimum(less(_each(q, j), 0.0), _half(b, inside, EVEN), _half(b + 2, inside, EVEN))


@triton.jit
def q5_1(row, table, c, w, j, inside, WORDS: tl.constexpr, EVEN: tl.constexpr):
    b, side = row + c // 2 * 24, c % 2
    fifth = _short(b + 4 + 2 * side, inside, EVEN) >> (w * 4 + j) & 1
    q = _each(_run(b + 8, w, side * 4, inside, WORDS, EVEN) & 0x0F0F0F0F, j) | fifth << 4
    return _with_minimum(less(q, 0.0), _half(b, inside, EVEN), _half(b + 2, inside, EVEN))


# ------------------------------------------------------------------------------------------------- 256 elements
# sub: which sixteenth of a block, or which eighth where 32 columns have a scale.


@triton.jit
def q2_k(row, table, c, w, j, inside, WORDS: tl.constexpr, EVEN: tl.constexpr):
    b, sub = row + c // 16 * 84, c % 16
    q = _run(b + 16 + sub // 8 * 32 + sub % 2 * 16, w, sub % 8 // 2 * 2, inside, WORDS, EVEN) & 0x03030303
    # A byte of a word: neighbouring bytes would be loaded by other threads than those of the columns that they scale.
    both = _run(b + sub // 4 * 4, 0, sub % 4 * 8, inside, WORDS, EVEN)
    d, least = _half(b + 80, inside, EVEN), _half(b + 82, inside, EVEN)
    return _with_minimum(less(_each(q, j), 0.0), d * (both & 15).to(tl.float32), -least * (both >> 4 & 15).to(tl.float32))


@triton.jit
def q3_k(row, table, c, w, j, inside, WORDS: tl.constexpr, EVEN: tl.constexpr):
    b, sub = row + c // 16 * 110, c % 16
    third = _run(b + sub % 2 * 16, w, sub // 2, inside, WORDS, EVEN) & 0x01010101
    q = _run(b + 32 + sub // 8 * 32 + sub % 2 * 16, w, sub % 8 // 2 * 2, inside, WORDS, EVEN) & 0x03030303 | third << 2
    low = _byte(b + 96 + sub % 8, inside, EVEN) >> sub // 8 * 4 & 15
    high = _byte(b + 104 + sub % 4, inside, EVEN) >> sub // 4 * 2 & 3
    value = less(_each(q, j), 4.0)
    return value, value, ((low | high << 4).to(tl.float32) - 32.0) * _half(b + 108, inside, EVEN) * TWO_22


@triton.jit
def q4_k(row, table, c, w, j, inside, WORDS: tl.constexpr, EVEN: tl.constexpr):
    b, sub = row + c // 16 * 144, c % 16 // 2
    q = _run(b + 16 + sub // 2 * 32 + c % 2 * 16, w, sub % 2 * 4, inside, WORDS, EVEN) & 0x0F0F0F0F
    s, m = _scale_and_minimum(b, sub, inside, EVEN)
    return _with_minimum(less(_each(q, j), 0.0), s, m)


@triton.jit
def q5_k(row, table, c, w, j, inside, WORDS: tl.constexpr, EVEN: tl.constexpr):
    b, sub = row + c // 16 * 176, c % 16 // 2
    fifth = _run(b + 16 + c % 2 * 16, w, sub, inside, WORDS, EVEN) & 0x01010101
    q = _run(b + 48 + sub // 2 * 32 + c % 2 * 16, w, sub % 2 * 4, inside, WORDS, EVEN) & 0x0F0F0F0F | fifth << 4
    s, m = _scale_and_minimum(b, sub, inside, EVEN)
    return _with_minimum(less(_each(q, j), 0.0), s, m)


@triton.jit
def q6_k(row, table, c, w, j, inside, WORDS: tl.constexpr, EVEN: tl.constexpr):
    b, sub = row + c // 16 * 210, c % 16
    low = _run(b + sub // 8 * 64 + sub % 4 * 16, w, sub % 8 // 4 * 4, inside, WORDS, EVEN) & 0x0F0F0F0F
    high = _run(b + 128 + sub // 8 * 32 + sub % 2 * 16, w, sub % 8 // 2 * 2, inside, WORDS, EVEN) & 0x03030303
    s = fetch(b + 192 + sub, inside, EVEN).to(tl.int8, bitcast=True).to(tl.float32)
    value = less(_each(low | high << 4, j), 32.0)
    return value, value, s * TWO_22 * _half(b + 208, inside, EVEN)


@triton.jit
def iq4_xs(row, table, c, w, j, inside, WORDS: tl.constexpr, EVEN: tl.constexpr):
    b, sub = row + c // 16 * 136, c % 16 // 2
    q = _run(b + 8 + sub * 16, w, c % 2 * 4, inside, WORDS, EVEN) & 0x0F0F0F0F
    low = _byte(b + 4 + sub // 2, inside, EVEN) >> sub % 2 * 4 & 15
    high = _byte(b + 2 + sub // 4, inside, EVEN) >> sub % 4 * 2 & 3
    value = tl.load(table + _each(q, j))  # 64 bytes that stay in the L1 cache
    return value, value, ((low | high << 4).to(tl.float32) - 32.0) * _half(b, inside, EVEN)


@triton.jit
def _scale_and_minimum(b, sub, inside, EVEN: tl.constexpr):
    """d s and -dmin m of Q4_K and Q5_K: bytes 4 on are 4 of scales, 4 of minima, 4 of the low four bits of both for sub 4..7,
    whose high two bits are in the first eight."""
    low, middle = _byte(b + 4 + sub % 4, inside, EVEN), _byte(b + 8 + sub % 4, inside, EVEN)
    both = _byte(b + 12 + sub % 4, inside, EVEN)
    s = tl.where(sub < 4, low & 63, both & 15 | low >> 6 << 4)
    m = tl.where(sub < 4, middle & 63, both >> 4 | middle >> 6 << 4)
    return _half(b, inside, EVEN) * s.to(tl.float32), -_half(b + 2, inside, EVEN) * m.to(tl.float32)


# ------------------------------------------------------------------------------------------------- of a grid
# An entry is eight columns, the `eighth` of them in a block, and a word is half of one; of IQ3 an entry is four, a word.


@triton.jit
def iq3_s(row, table, c, w, j, inside, WORDS: tl.constexpr, EVEN: tl.constexpr):
    b, k = row + c // 16 * 110, c % 16 * 4 + w
    number = _byte(b + 2 + k, inside, EVEN) | (_byte(b + 66 + k // 8, inside, EVEN) >> k % 8 & 1) << 8
    value = _signed(_point(table, number, j, 0.0), _byte(b + 74 + _eighth(c, w), inside, EVEN), w, j)
    s = 2 * _nibble(b + 106, c % 16 // 2, inside, EVEN) + 1
    return value, value, s.to(tl.float32) * TWO_22 * _half(b, inside, EVEN)


@triton.jit
def iq3_xxs(row, table, c, w, j, inside, WORDS: tl.constexpr, EVEN: tl.constexpr):
    b = row + c // 16 * 98
    number = _byte(b + 2 + c % 16 * 4 + w, inside, EVEN)
    word = b + 66 + c % 16 // 2 * 4
    value = _signed(_point(table, number, j, 0.0), _even_signs(word, c, w, inside, EVEN), w, j)
    return value, value, _top_scale(word, inside, EVEN) * (0.5 * TWO_22) * _half(b, inside, EVEN)


@triton.jit
def iq2_s(row, table, c, w, j, inside, WORDS: tl.constexpr, EVEN: tl.constexpr):
    b, i = row + c // 16 * 82, _eighth(c, w)
    number = _byte(b + 2 + i, inside, EVEN) | (_byte(b + 66 + i // 4, inside, EVEN) >> i % 4 * 2 & 3) << 8
    value = _signed(_point(table, number * 2 + w % 2, j, 0.0), _byte(b + 34 + i, inside, EVEN), w, j)
    s = _nibble(b + 74, c % 16, inside, EVEN).to(tl.float32) + 0.5
    return value, value, s * (0.25 * TWO_22) * _half(b, inside, EVEN)


@triton.jit
def iq2_xs(row, table, c, w, j, inside, WORDS: tl.constexpr, EVEN: tl.constexpr):
    b = row + c // 16 * 74
    word = _short(b + 2 + _eighth(c, w) * 2, inside, EVEN)
    value = _signed(_point(table, (word & 511) * 2 + w % 2, j, 0.0), _eighth_sign(word >> 9), w, j)
    s = _nibble(b + 66, c % 16, inside, EVEN).to(tl.float32) + 0.5
    return value, value, s * (0.25 * TWO_22) * _half(b, inside, EVEN)


@triton.jit
def iq2_xxs(row, table, c, w, j, inside, WORDS: tl.constexpr, EVEN: tl.constexpr):
    b, i = row + c // 16 * 66, _eighth(c, w)
    number = _byte(b + 2 + i // 4 * 8 + i % 4, inside, EVEN)
    word = b + 2 + c % 16 // 2 * 8 + 4
    value = _signed(_point(table, number * 2 + w % 2, j, 0.0), _even_signs(word, c, w, inside, EVEN), w, j)
    return value, value, _top_scale(word, inside, EVEN) * (0.25 * TWO_22) * _half(b, inside, EVEN)


@triton.jit
def iq1_m(row, table, c, w, j, inside, WORDS: tl.constexpr, EVEN: tl.constexpr):
    b, i = row + c // 16 * 56, _eighth(c, w)
    high = _nibble(b + 32, i, inside, EVEN)
    number = _byte(b + i, inside, EVEN) | (high & 7) << 8
    value = _point(table, number * 2 + w % 2, j, _eighth_off(high & 8))
    first, second = _short(b + 48, inside, EVEN) >> 12, _short(b + 50, inside, EVEN) >> 12
    third, fourth = _short(b + 52, inside, EVEN) >> 12, _short(b + 54, inside, EVEN) >> 12
    d = (first | second << 4 | third << 8 | fourth << 12).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    sub = c % 16
    s = 2 * (_short(b + 48 + sub // 4 * 2, inside, EVEN) >> sub % 4 * 3 & 7) + 1
    return value, value, s.to(tl.float32) * TWO_22 * d


@triton.jit
def iq1_s(row, table, c, w, j, inside, WORDS: tl.constexpr, EVEN: tl.constexpr):
    b, i = row + c // 16 * 50, _eighth(c, w)
    word = _short(b + 34 + c % 16 // 2 * 2, inside, EVEN)
    number = _byte(b + 2 + i, inside, EVEN) | (word >> i % 4 * 3 & 7) << 8
    value = _point(table, number * 2 + w % 2, j, _eighth_off(word >> 15))
    s = 2 * (word >> 12 & 7) + 1
    return value, value, s.to(tl.float32) * TWO_22 * _half(b, inside, EVEN)


@triton.jit
def _eighth(c, w):
    return c % 16 * 2 + w // 2


@triton.jit
def _point(points, word, j, shift):
    """2^-22 (point + shift) of the j-th of four points."""
    point = (tl.load(points + word) >> j * 8 & 255).to(tl.uint32) ^ 128  # the sign bit flipped: point + 128
    return less(point, 128.0 - shift)


@triton.jit
def _eighth_off(minus):
    return tl.where(minus != 0, -0.125, 0.125)


@triton.jit
def _signed(value, signs, w, j):
    """The numbers of a word with their signs, one bit for each of eight columns."""
    return tl.where(signs >> (w % 2 * 4 + j) & 1 != 0, -value, value)


@triton.jit
def _even_signs(word, c, w, inside, EVEN: tl.constexpr):
    """The eight signs of a word's columns, from 32 bits of 4 x 7 signs and a scale."""
    seven = (_short(word, inside, EVEN) | _short(word + 2, inside, EVEN) << 16) >> _eighth(c, w) % 4 * 7 & 127
    return _eighth_sign(seven)


@triton.jit
def _eighth_sign(seven):
    """Seven bits and an eighth that makes the number of ones even."""
    odd = seven ^ seven >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    return seven | (odd & 1) << 7


@triton.jit
def _top_scale(word, inside, EVEN: tl.constexpr):
    return (_short(word + 2, inside, EVEN) >> 12).to(tl.float32) + 0.5


# ------------------------------------------------------------------------------------------------- pieces


@triton.jit
def _with_minimum(value, scale, least):
    """(value 2^22) scale + least, as numbers that are scaled already."""
    value = value * (scale * TWO_22) + least
    return value, value, tl.full(scale.shape, 1.0, tl.float32)


@triton.jit
def _run(run, w, shift, inside, WORDS: tl.constexpr, EVEN: tl.constexpr):
    """Word w of a run of bytes, uint32, shifted to the right: fields are taken out of four bytes at once."""
    if WORDS:
        word = fetch(run.to(tl.pointer_type(tl.uint32), bitcast=True) + w, inside, EVEN)
    else:
        pair = run.to(tl.pointer_type(tl.uint16), bitcast=True) + w * 2
        word = fetch(pair, inside, EVEN).to(tl.uint32) | fetch(pair + 1, inside, EVEN).to(tl.uint32) << 16
    return word >> shift.to(tl.uint32)


@triton.jit
def _each(word, j):
    """Byte j of a word."""
    return word >> (j * 8).to(tl.uint32) & 255


@triton.jit
def _byte(pointer, inside, EVEN: tl.constexpr):
    return fetch(pointer, inside, EVEN).to(tl.int32)


@triton.jit
def _nibble(pointer, i, inside, EVEN: tl.constexpr):
    return _byte(pointer + i // 2, inside, EVEN) >> i % 2 * 4 & 15


@triton.jit
def _short(pointer, inside, EVEN: tl.constexpr):
    """Sixteen bits, at an even place."""
    return fetch(pointer.to(tl.pointer_type(tl.int16), bitcast=True), inside, EVEN).to(tl.int32) & 0xFFFF


@triton.jit
def _half(pointer, inside, EVEN: tl.constexpr):
    return fetch(half(pointer), inside, EVEN).to(tl.float32)


DECODERS = {  # of the kinds that are computed with as they are in the file
    "Q4_1": q4_1,
    "Q5_1": q5_1,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_XS": iq4_xs,
    "IQ3_S": iq3_s,
    "IQ3_XXS": iq3_xxs,
    "IQ2_S": iq2_s,
    "IQ2_XS": iq2_xs,
    "IQ2_XXS": iq2_xxs,
    "IQ1_M": iq1_m,
    "IQ1_S": iq1_s,
}
