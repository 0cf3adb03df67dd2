"""The block types of ggml: how many elements a block has, how many bytes, and what they stand for.

A row of K elements is K / elements blocks, one after the other; blocks know nothing of each other. A scale is an fp16
number `d`; the K types share it among sub-blocks, each with a small integer scale of its own. The layouts are those of
ggml-common.h and ggml-quants.c in github.com/ggml-org/llama.cpp; values are made in fp32, as there.

In the formulas b is (..., bytes) uint8, the bytes of blocks, and the result (..., elements) fp32. Numbers of few bits are
packed so that a processor unpacks many bytes with one shift: the fields of one byte lie 16, 32 or 64 elements apart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK: dict[str, tuple[int, int]] = {  # kind -> elements and bytes of a block
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
}
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


# ------------------------------------------------------------------------------------------------- 32 elements


def _q8_0(b: Tensor) -> Tensor:
    """d, 32 q: d q."""
    return half(b, 0) * b[..., 2:].view(torch.int8)


def _q4_0(b: Tensor) -> Tensor:
    """d, 16 bytes of q: d (q - 8)."""
    return half(b, 0) * (nibbles(b[..., 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    """d, m, 16 bytes of q: d q + m."""
    return half(b, 0) * nibbles(b[..., 4:]) + half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    """d, 32 fifth bits, 16 bytes of the lower four: d (q - 16)."""
    return half(b, 0) * (five_bits(b[..., 2:6], b[..., 6:]).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    """d, m, 32 fifth bits, 16 bytes of the lower four: d q + m."""
    return half(b, 0) * five_bits(b[..., 4:8], b[..., 8:]) + half(b, 2)


def _iq4_nl(b: Tensor) -> Tensor:
    """d, 16 bytes of q: d table[q]."""
    return half(b, 0) * _lookup(IQ4_VALUES, nibbles(b[..., 2:]))


def _mxfp4(b: Tensor) -> Tensor:
    """e, 16 bytes of q: 2^(e - 127) E2M1[q]. (OCP Microscaling Formats 1.0, whose NaN, e = 255, is a power of two here.)"""
    # Half the power times twice the values, as in ggml, since 2^128 is no fp32 number; below e = 2 it is subnormal.
    e = b[..., :1].int()
    power = torch.where(e < 2, 1 << 21 + e, e - 1 << 23).view(torch.float32)  # 2^(e - 128), written as its bits
    return power * (2 * _lookup(E2M1_VALUES, nibbles(b[..., 1:])))


def _nvfp4(b: Tensor) -> Tensor:
    """4 s, 4 x 8 bytes of q; sub-blocks of 16: s E2M1[q], s in E4M3 without a sign, 0 for its NaN."""
    scales = (b[..., :4, None] & 127).view(torch.float8_e4m3fn).float().nan_to_num(0.0)  # (..., 4, 1)
    return (scales * _lookup(E2M1_VALUES, nibbles(b[..., 4:].unflatten(-1, (4, 8))))).flatten(-2)


# ------------------------------------------------------------------------------------------------- 256 elements


def _q2_k(b: Tensor) -> Tensor:
    """16 bytes of scale s and minimum m, 64 of q, d, dmin; sub-blocks of 16: d s q - dmin m."""
    scales = b[..., :16, None]  # (..., 16, 1)
    q = fields(b[..., 16:80], 32, 2).unflatten(-1, (16, 16))  # (..., 16, 16)
    d, dmin = half(b, 80)[..., None], half(b, 82)[..., None]
    return (d * (scales & 15) * q - dmin * (scales >> 4)).flatten(-2)


def _q3_k(b: Tensor) -> Tensor:
    """256 third bits, 64 bytes of the lower two, 12 of scales s, d; sub-blocks of 16: d (s - 32) (q - 4)."""
    q = fields(b[..., 32:96], 32, 2) | fields(b[..., :32], 32, 1) << 2
    low = torch.cat((b[..., 96:104] & 15, b[..., 96:104] >> 4), dim=-1)
    scales = (low | fields(b[..., 104:108], 4, 2) << 4)[..., None].float() - 32  # (..., 16, 1)
    return (half(b, 108)[..., None] * scales * (q.unflatten(-1, (16, 16)).float() - 4)).flatten(-2)


def _q4_k(b: Tensor) -> Tensor:
    """d, dmin, 12 bytes of scales s and minima m, 128 of q; sub-blocks of 32: d s q - dmin m."""
    scales, minima = six_bit_pairs(b[..., 4:16])
    return _scaled(b, scales, minima, fields(b[..., 16:], 32, 4))


def _q5_k(b: Tensor) -> Tensor:
    """As Q4_K, with 256 fifth bits before the lower four."""
    scales, minima = six_bit_pairs(b[..., 4:16])
    return _scaled(b, scales, minima, fields(b[..., 48:], 32, 4) | fields(b[..., 16:48], 32, 1) << 4)


def _q6_k(b: Tensor) -> Tensor:
    """128 bytes of the lower four bits, 64 of the upper two, 16 scales s, d; sub-blocks of 16: d s (q - 32)."""
    q = (fields(b[..., :128], 64, 4) | fields(b[..., 128:192], 32, 2) << 4).unflatten(-1, (16, 16))
    scales = b[..., 192:208, None].view(torch.int8)  # (..., 16, 1)
    return (half(b, 208)[..., None] * scales * (q.float() - 32)).flatten(-2)


def _iq4_xs(b: Tensor) -> Tensor:
    """d, 16 bits and 4 bytes of scales s, 128 bytes of q; sub-blocks of 32: d (s - 32) table[q]."""
    high = fields(b[..., 2:4], 1, 2)
    scales = (fields(b[..., 4:8], 1, 4) | high << 4)[..., None].float() - 32  # (..., 8, 1)
    values = _lookup(IQ4_VALUES, nibbles(b[..., 8:].unflatten(-1, (8, 16))))  # (..., 8, 32)
    return (half(b, 0)[..., None] * scales * values).flatten(-2)


def _scaled(b: Tensor, scales: Tensor, minima: Tensor, q: Tensor) -> Tensor:
    d, dmin = half(b, 0), half(b, 2)
    return ((d * scales)[..., None] * q.unflatten(-1, (8, 32)) - (dmin * minima)[..., None]).flatten(-2)


# ------------------------------------------------------------------------------------------------- pieces


def half(b: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at`: (..., bytes) -> (..., 1) fp32."""
    return b[..., at : at + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def nibbles(q: Tensor) -> Tensor:
    """(..., n) -> (..., 2 n) below 16: all low nibbles, then all high ones."""
    return torch.cat((q & 15, q >> 4), dim=-1)


def five_bits(high: Tensor, low: Tensor) -> Tensor:
    """32 bits and 16 bytes -> (..., 32) below 32. The bits lie in order, the nibbles half a block apart."""
    return nibbles(low) | fields(high, 1, 1) << 4


def fields(q: Tensor, run: int, bits: int) -> Tensor:
    """(..., n) -> (..., n * 8 / bits): of every `run` bytes first all lowest fields of so many bits, then all next ones."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=q.device)[:, None]
    return (q.unflatten(-1, (-1, 1, run)) >> shifts & (1 << bits) - 1).flatten(-3)  # (..., n / run, 8 / bits, run)


def six_bit_pairs(b: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 12) -> 8 scales and 8 minima below 64: four whole in bytes 0-3 and 4-7, four cut into 8-11 and the top bits."""
    first, second, low = b.unflatten(-1, (3, 4)).unbind(-2)  # (..., 4) each
    scales = torch.cat((first & 63, low & 15 | first >> 6 << 4), dim=-1)
    minima = torch.cat((second & 63, low >> 4 | second >> 6 << 4), dim=-1)
    return scales, minima


def _lookup(table: tuple[float, ...], index: Tensor) -> Tensor:
    return torch.tensor(table, dtype=torch.float32, device=index.device)[index.long()]


# ------------------------------------------------------------------------------------------------- by kind

_FORMULAS = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}


def _of_rows(kind: str, formula: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    size = BLOCK[kind][1]
    return lambda rows: formula(rows.unflatten(-1, (-1, size))).flatten(-2)


# kind -> function from (..., n * bytes) uint8, whole blocks, to (..., n * elements) fp32
DEQUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {kind: _of_rows(kind, f) for kind, f in _FORMULAS.items()}
