"""The block types of ggml: how many elements a block has, how many bytes, and what they stand for.

A row of K elements is K / elements blocks, one after the other; blocks know nothing of each other. A scale is an fp16
number `d`; the K types share it among sub-blocks, each with a small integer scale of its own. The layouts are those of
ggml-common.h and ggml-quants.c in github.com/ggml-org/llama.cpp; values are made in fp32, as there.

In the formulas b is (..., bytes) uint8, the bytes of blocks, and the result (..., elements) fp32. Numbers of few bits are
packed so that a processor unpacks many bytes with one shift: the fields of one byte lie 16, 32 or 64 elements apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..safetensors_file import SafetensorsFile

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
    "IQ3_S": (256, 110),
    "IQ3_XXS": (256, 98),
    "IQ2_S": (256, 82),
    "IQ2_XS": (256, 74),
    "IQ2_XXS": (256, 66),
    "IQ1_M": (256, 56),
    "IQ1_S": (256, 50),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
}
GRIDS = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")  # the kinds whose elements are points of a grid
HALVES: dict[str, tuple[int, ...]] = {  # the bytes at which a kind has its fp16 scales; of IQ1_M the bits lie apart
    **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS", *GRIDS), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "IQ1_M": (48,),
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


# ------------------------------------------------------------------------------------------------- 256 elements of a grid

# Eight elements, of IQ3 four, are one entry of a grid: those points that were found to serve best. IQ2 and IQ3 have their signs
# beside it, of the XS and XXS kinds seven of eight: their number is even. Every product is exact in fp32.


@cache
def grid(kind: str) -> Tensor:
    """(entries, elements) int8, the grid of a kind that has one."""
    with SafetensorsFile(Path(__file__).parents[1] / "assets" / "ggml_grids.safetensors") as file:
        return file.read({"IQ1_M": "IQ1_S"}.get(kind, kind))


def _iq2_xxs(b: Tensor) -> Tensor:
    """d; of sub-blocks of 32, 4 bytes of entries e and 32 bits of 4 x 7 signs and a scale s: d (s + 1/2) / 4 (+-) grid[e]."""
    entries, word = b[..., 2:].unflatten(-1, (8, 2, 4)).unbind(-2)  # (..., 8, 4) each
    signs, scales = _signs_and_scale(word)
    return _of_grid("IQ2_XXS", half(b, 0) * (scales + 0.5) / 4, entries.flatten(-2), signs)


def _iq2_xs(b: Tensor) -> Tensor:
    """d, 32 times 9 bits of an entry and 7 signs, 8 bytes of scales; sub-blocks of 16, as IQ2_XXS."""
    word = _pairs(b[..., 2:66])
    return _of_grid("IQ2_XS", half(b, 0) * (fields(b[..., 66:], 1, 4) + 0.5) / 4, word & 511, _eighth_sign(word >> 9))


def _iq2_s(b: Tensor) -> Tensor:
    """d, 32 bytes of entries, 32 of signs, 8 of the entries' upper two bits, 8 of scales; sub-blocks of 16, as IQ2_XXS."""
    entries = b[..., 2:34] | fields(b[..., 66:74], 1, 2).int() << 8
    return _of_grid("IQ2_S", half(b, 0) * (fields(b[..., 74:], 1, 4) + 0.5) / 4, entries, b[..., 34:66])


def _iq3_xxs(b: Tensor) -> Tensor:
    """d, 64 bytes of entries, 8 times 4 x 7 signs and a scale s; sub-blocks of 32: d (s + 1/2) / 2 (+-) grid[e]."""
    signs, scales = _signs_and_scale(b[..., 66:].unflatten(-1, (8, 4)))
    return _of_grid("IQ3_XXS", half(b, 0) * (scales + 0.5) / 2, b[..., 2:66], signs)


def _iq3_s(b: Tensor) -> Tensor:
    """d, 64 bytes of entries, 64 ninth bits, 32 bytes of signs, 4 of scales s; sub-blocks of 32: d (2 s + 1) (+-) grid[e]."""
    entries = b[..., 2:66] | fields(b[..., 66:74], 1, 1).int() << 8
    return _of_grid("IQ3_S", half(b, 0) * (2 * fields(b[..., 106:], 1, 4).float() + 1), entries, b[..., 74:106])


def _iq1_s(b: Tensor) -> Tensor:
    """d, 32 bytes of entries e, 8 times 4 x 3 upper bits, a scale s, a sign; sub-blocks of 32: d (2 s + 1) (grid[e] +- 1/8)."""
    word = _pairs(b[..., 34:])  # (..., 8)
    entries = b[..., 2:34] | (word[..., None] >> torch.arange(0, 12, 3, device=b.device) & 7).flatten(-2) << 8
    shift = 0.125 - 0.25 * (word >> 15)
    return _of_grid("IQ1_S", half(b, 0) * (2 * (word >> 12 & 7) + 1), entries, shift=shift)


def _iq1_m(b: Tensor) -> Tensor:
    """32 bytes of entries, 32 times 3 upper bits and a sign, 4 times 4 x 3 bits of a scale s and 4 of d: as IQ1_S, but
    sub-blocks of 16, and every entry has a sign of its own."""
    high = fields(b[..., 32:48], 1, 4).int()  # (..., 32)
    scales = (_pairs(b[..., 48:])[..., None] >> torch.arange(0, 12, 3, device=b.device) & 7).flatten(-2)  # (..., 16)
    entries = b[..., :32] | (high & 7) << 8
    return _of_grid("IQ1_M", _iq1_m_scale(b) * (2 * scales + 1), entries, shift=0.125 - 0.25 * (high >> 3))


def _of_grid(kind: str, scales: Tensor, entries: Tensor, signs: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """scales (..., n), entries (..., m), signs (..., 32) of eight elements each, shift (..., k) -> (..., 256)."""
    values = grid(kind).to(entries.device).float()[entries.long()].flatten(-2)  # (..., 256)
    if signs is not None:
        values = values * (1 - 2 * fields(signs, 1, 1).float())
    if shift is not None:
        values = (values.unflatten(-1, (shift.shape[-1], -1)) + shift[..., None]).flatten(-2)
    return (scales[..., None] * values.unflatten(-1, (scales.shape[-1], -1))).flatten(-2)


def _signs_and_scale(word: Tensor) -> tuple[Tensor, Tensor]:
    """32 bits of 4 x 7 signs and a scale, (..., 8, 4) -> (..., 32) and (..., 8)."""
    low, high = _pairs(word).unbind(-1)  # (..., 8) each, of sixteen bits
    word = low | high << 16
    seven = word[..., None] >> torch.arange(0, 28, 7, device=word.device) & 127
    return _eighth_sign(seven.flatten(-2)), high >> 12


def _eighth_sign(seven: Tensor) -> Tensor:
    """Seven bits and an eighth that makes the number of ones even."""
    odd = seven ^ seven >> 4
    odd = odd ^ odd >> 2
    odd = odd ^ odd >> 1
    return (seven | (odd & 1) << 7).to(torch.uint8)


def _pairs(b: Tensor) -> Tensor:
    """(..., 2 n) bytes -> (..., n) int32 below 2^16."""
    low, high = b.unflatten(-1, (-1, 2)).int().unbind(-1)
    return low | high << 8


def _scaled(b: Tensor, scales: Tensor, minima: Tensor, q: Tensor) -> Tensor:
    d, dmin = half(b, 0), half(b, 2)
    return ((d * scales)[..., None] * q.unflatten(-1, (8, 32)) - (dmin * minima)[..., None]).flatten(-2)


# ------------------------------------------------------------------------------------------------- pieces


def half(b: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at`: (..., bytes) -> (..., 1) fp32."""
    return b[..., at : at + 2].clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def scales_of(kind: str, b: Tensor) -> list[Tensor]:
    """The fp16 scales of blocks, (..., 1) fp32 each."""
    return [_iq1_m_scale(b) if kind == "IQ1_M" else half(b, at) for at in HALVES[kind]]


def _iq1_m_scale(b: Tensor) -> Tensor:
    """d of IQ1_M, (..., 56) -> (..., 1): the top four bits of four times sixteen, the lowest first."""
    low, high = (b[..., 49::2] >> 4).unflatten(-1, (2, 2)).unbind(-1)  # nibbles 0 and 2, 1 and 3
    return (low | high << 4).view(torch.float16).float()


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
    "IQ3_S": _iq3_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ2_S": _iq2_s,
    "IQ2_XS": _iq2_xs,
    "IQ2_XXS": _iq2_xxs,
    "IQ1_M": _iq1_m,
    "IQ1_S": _iq1_s,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}


def _of_rows(kind: str, formula: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    size = BLOCK[kind][1]
    return lambda rows: formula(rows.unflatten(-1, (-1, size))).flatten(-2)


# kind -> function from (..., n * bytes) uint8, whole blocks, to (..., n * elements) fp32
DEQUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {kind: _of_rows(kind, f) for kind, f in _FORMULAS.items()}
