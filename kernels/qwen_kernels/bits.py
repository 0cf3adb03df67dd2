"""What decoders are made of: masked loads, and numbers taken from the bits of others.

No number goes through a conversion, of which a GPU makes a half or a quarter as many as multiplications: the bits of a
small integer q, read as fp32, are the denormal number 2^-149 q. One multiply-add takes it to 2^-22 (q - zero), exactly, and
the scale gives the 2^22 back. In the same way an e4m3 number becomes 2^-120 times its value by moving its bits.
A NaN among float8_e4m3fn codes is read as 480: a checkpoint with one is refused where it is loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

TWO_127, TWO_22 = tl.constexpr(2.0**127), tl.constexpr(2.0**22)


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
