"""AWQ, "gemm" packing (Lin et al. 2023, arXiv 2306.00978; github.com/casper-hansen/AutoAWQ): 4 bits with zeros.

The matrix is stored transposed, w[k, n] = (q[k, n] - zero[k / group, n]) * scale[k / group, n]. An int32 holds eight
neighbouring outputs, not in order: nibble i (bits 4i to 4i + 3) belongs to output (0, 2, 4, 6, 1, 3, 5, 7)[i].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Fields
from ..cpp import repack
from .format import FLOATS, Format, Matrix, Scheme, Slot, check_scales, group_size, groups, patterns
from .packed import Int4

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

    def check(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> None:
        check_scales(tensors["scales"], "AWQ's scales")

    def dequantize(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        codes, zeros = unpack(tensors["qweight"]), unpack(tensors["qzeros"])  # (K, N), (G, N)
        group = self.group or columns
        scales = tensors["scales"].float()
        return ((codes - zeros.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)).T

    def pack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Matrix:
        self.check(tensors, rows, columns)
        scale = repack.transposed(tensors["scales"])
        return Matrix(Int4(_transposed(tensors["qweight"]), scale, _zeros(tensors["qzeros"]), self.group or columns))


def unpack(words: Tensor) -> Tensor:
    """(R, N / 8) int32 -> (R, N) int32 below 16."""
    shifts = 4 * torch.tensor(NIBBLE_OF_OUTPUT, dtype=torch.int32)
    return (words[..., None] >> shifts & 15).flatten(-2)


def _zeros(words: Tensor) -> Tensor:
    """(G, N / 8) int32 -> (N, G) uint8."""
    if repack.supports(words):
        return repack.zeros(words, awq=True)[0]
    return unpack(words).T.to(torch.uint8).contiguous()


def _transposed(words: Tensor) -> Tensor:
    """pack4(unpack(words).T) without unpacking: (K, N / 8) int32 -> (N, ceil(K / 2)) uint8.

    Eight neighbouring inputs of a word are 8 x 8 nibbles; they are transposed by exchanging halves of the words, then
    quarters, then nibbles (Warren, Hacker's Delight, section 7-3).
    """
    if repack.supports(words):
        return repack.awq(words)
    columns, count = words.shape
    whole = words if columns % 8 == 0 else F.pad(words, (0, 0, 0, -columns % 8))
    planes = whole.unflatten(0, (-1, 8)).permute(1, 2, 0).contiguous()  # (8, N / 8, K / 8)
    for half, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        first, second = planes.unflatten(0, (-1, 2, half)).unbind(1)  # what stands `half` words apart
        exchanged = (first >> 4 * half ^ second) & mask
        second ^= exchanged
        first ^= exchanged << 4 * half
    ordered = planes[list(NIBBLE_OF_OUTPUT)].transpose(0, 1)  # (N / 8, 8, K / 8)
    return ordered.reshape(8 * count, -1).view(torch.uint8)[:, : -(-columns // 2)]


def from_json(fields: Fields) -> Format:
    """The format of a config's `quantization_config`. ConfigError on packings that are not implemented."""
    fields.choice("version", ("gemm",), "gemm")
    if (bits := fields.integer("bits", 4)) != 4:
        raise fields.error("bits", f"is {bits}; AWQ is implemented for 4")
    if not fields.flag("zero_point", True):
        raise fields.error("zero_point", "is false, which is not implemented")
    skipped = patterns(fields, "modules_to_not_convert")
    return Format(AWQ(group_size(fields, "group_size", 128)), ("lm_head", *skipped))
