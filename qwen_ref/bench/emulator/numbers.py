"""Types of PTX as numpy arrays: how a register's bits are read as one, and how a result becomes bits again.

Arithmetic of 16 bits is done in fp32 or fp64 and rounded once. Of fused products the sum is rounded from fp64, which holds
the product exactly: in fp32 that rounds twice in about one of 2^29 cases.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


@cache
def width(kind: str) -> int:
    """Bits of a type."""
    return 1 if kind == "pred" else int(kind.strip("bsufx")[:2].rstrip("x"))


def read(bits: Array, kind: str) -> Array:
    """A register's bits as numbers: integers in their own type, f16 and bf16 as fp32."""
    if kind == "pred":
        return bits
    wide = width(kind)
    bits = bits if bits.dtype.itemsize * 8 == wide else bits.astype(UNSIGNED[wide])
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind[0] == "f":
        return bits.view(np.float32 if wide == 32 else np.float64)
    return bits.view(SIGNED[wide]) if kind[0] == "s" else bits


def write(values: Array, kind: str, register: int) -> Array:
    """Numbers as the bits of a register of that width: integers are extended by their sign, or cut."""
    if kind == "pred":
        return values
    if kind == "bf16":
        bits = to_bf16(values)
    elif kind == "f16":
        bits = values.astype(np.float16).view(np.uint16)
    elif kind[0] == "f":
        bits = values.astype(np.float32 if kind == "f32" else np.float64).view(UNSIGNED[width(kind)])
    elif kind[0] == "s":
        return values.astype(SIGNED[width(kind)]).astype(SIGNED[register]).view(UNSIGNED[register])
    else:
        bits = values.astype(UNSIGNED[width(kind)])
    return bits if bits.dtype.itemsize * 8 == register else bits.astype(UNSIGNED[register])


def to_bf16(values: Array) -> Array:
    """fp32 or fp64 to the nearest bfloat16, ties to even, in one rounding; NaN to 0x7FFF, as the hardware has it."""
    bits = (to_odd(values) if values.dtype == np.float64 else values.astype(np.float32)).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where((bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000), 0x7FFF, rounded).astype(np.uint16)


def to_odd(values: Array) -> Array:
    """fp64 to fp32 such that a second rounding is as if it were the only one: what is inexact gets an odd last bit."""
    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    inexact = np.isfinite(values) & (near.astype(np.float64) != values)
    down = bits - (np.abs(near.astype(np.float64)) > np.abs(values)).astype(np.uint32)
    return np.where(inexact, down | np.uint32(1), bits).view(np.float32)


def to_e4m3(values: Array) -> Array:
    """fp32 to the nearest FP8 (E4M3), what is too large to the largest: bytes."""
    clamped = torch.from_numpy(np.clip(np.ascontiguousarray(values, np.float32), -448, 448))
    return clamped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def from_e4m3(values: Array) -> Array:
    return torch.from_numpy(np.ascontiguousarray(values, np.uint8)).view(torch.float8_e4m3fn).float().numpy()


def to_tf32(bits: Array) -> Array:
    """What a tensor core reads of an fp32 number: its upper 19 bits."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def halves(bits: Array) -> tuple[Array, Array]:
    """The lower and the upper half of registers."""
    narrow = UNSIGNED[bits.dtype.itemsize * 4]
    return bits.astype(narrow), (bits >> bits.dtype.type(bits.dtype.itemsize * 4)).astype(narrow)


def joined(low: Array, high: Array) -> Array:
    wide = UNSIGNED[low.dtype.itemsize * 16]
    return low.astype(wide) | (high.astype(wide) << wide(low.dtype.itemsize * 8))
