"""AWQ, "gemm" packing (Lin et al. 2023, arXiv 2306.00978; github.com/casper-hansen/AutoAWQ): 4 bits with zeros.

The matrix is stored transposed, w[k, n] = (q[k, n] - zero[k / group, n]) * scale[k / group, n]. An int32 holds eight
neighbouring outputs, not in order: nibble i (bits 4i to 4i + 3) belongs to output (0, 2, 4, 6, 1, 3, 5, 7)[i].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Fields
from .format import FLOATS, Format, Matrix, Scheme, Slot, check_scales, group_size, groups, patterns
from .packed import Int4, pack4

NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)  # the inverse of (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class AWQ(Scheme):
    marker = "qweight"
    group: int | None

    def slots(self, rows: int, columns: int, found: Mapping[str, Any]) -> dict[str, Slot]:
        words, count = groups(rows, 8), groups(columns, self.group or columns)
        return {
            "qweight": Slot((columns, words), (torch.int32,)),
            "qzeros": Slot((count, words), (torch.int32,)),
            "scales": Slot((count, rows), FLOATS),
        }

    def dequantize(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        codes, zeros = unpack(tensors["qweight"]), unpack(tensors["qzeros"])  # (K, N), (G, N)
        group = self.group or columns
        scales = tensors["scales"].float()
        return ((codes - zeros.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)).T

    def pack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Matrix:
        check_scales(tensors["scales"], "AWQ's scales")
        codes, zeros = (_nibbles(tensors[name]).T.contiguous() for name in ("qweight", "qzeros"))  # (N, K), (N, G)
        return Matrix(Int4(pack4(codes), tensors["scales"].T.contiguous(), zeros, self.group or columns))


def unpack(words: Tensor) -> Tensor:
    """(R, N / 8) int32 -> (R, N) int32 below 16."""
    shifts = 4 * torch.tensor(NIBBLE_OF_OUTPUT, dtype=torch.int32)
    return (words[..., None] >> shifts & 15).flatten(-2)


def _nibbles(words: Tensor) -> Tensor:
    """`unpack` byte by byte, in a quarter of its memory: (R, N / 8) int32 -> (R, N) uint8."""
    four = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))  # the low nibbles of an int32's bytes: 0, 4, 1, 5
    low, high = (four & 15)[..., [0, 2, 1, 3]], (four >> 4)[..., [0, 2, 1, 3]]  # outputs 0, 1, 4, 5 and 2, 3, 6, 7
    pairs = torch.stack((low.unflatten(-1, (2, 2)), high.unflatten(-1, (2, 2))), dim=-2)  # (R, N / 8, 2, 2, 2)
    return pairs.flatten(-4)


def from_json(fields: Fields) -> Format:
    """The format of a config's `quantization_config`. ConfigError on packings that are not implemented."""
    fields.choice("version", ("gemm",), "gemm")
    if (bits := fields.integer("bits", 4)) != 4:
        raise fields.error("bits", f"is {bits}; AWQ is implemented for 4")
    if not fields.flag("zero_point", True):
        raise fields.error("zero_point", "is false, which is not implemented")
    skipped = patterns(fields, "modules_to_not_convert")
    return Format(AWQ(group_size(fields, "group_size", 128)), ("lm_head", *skipped))
