"""GPTQ (Frantar et al. 2022, arXiv 2210.17323; github.com/ModelCloud/GPTQModel): 4 or 8 bits, stored transposed.

w[k, n] = scale[g, n] * (q[k, n] - zero[g, n]) with g = g_idx[k]. An int32 of `qweight` holds 32 / bits neighbouring
inputs, one of `qzeros` as many neighbouring outputs, the first in the lowest bits. The first version of the format
stores zero - 1, modulo 2^bits; the second ("gptq_v2") the zero itself. With `desc_act` the groups are of inputs that
were quantised together, wherever they stand; the rows of the file are in the order of the inputs all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..config import Fields
from ..cpp import repack
from ..errors import CheckpointError
from .format import FLOATS, Format, Matrix, Scheme, Slot, check_scales, group_size, groups, ordered, patterns, trusted
from .packed import Int4, Int8, pack4, unpack4

MIDDLE = 128  # what a symmetric 8-bit code calls zero


@dataclass(frozen=True)
class GPTQ(Scheme):
    marker = "qweight"
    bits: int
    group: int | None
    zero_offset: int  # what is added to a stored zero: 1 in the first version

    def slots(self, rows: int, columns: int, found: Mapping[str, Any]) -> dict[str, Slot]:
        per_word = 32 // self.bits
        count = groups(columns, self.group or columns, partial=True)
        slots = {
            "qweight": Slot((groups(columns, per_word), rows), (torch.int32,)),
            "qzeros": Slot((count, groups(rows, per_word)), (torch.int32,)),
            "scales": Slot((count, rows), FLOATS),
        }
        return slots | ({"g_idx": Slot((columns,), (torch.int32,))} if "g_idx" in found else {})

    def check(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> None:
        check_scales(tensors["scales"], "GPTQ's scales")
        if not self._as_they_stand(tensors, columns):
            self._group_of(tensors, columns)

    def dequantize(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        shifts = self.bits * torch.arange(32 // self.bits, dtype=torch.int32)
        most = (1 << self.bits) - 1
        codes = (tensors["qweight"][:, None, :] >> shifts[:, None] & most).flatten(0, 1)  # (K, N)
        stored = (tensors["qzeros"][:, :, None] >> shifts & most).flatten(1)  # (G, N)
        zeros = stored + self.zero_offset & most
        group = self._group_of(tensors, columns)  # (K,)
        return (tensors["scales"].float()[group] * (codes - zeros[group])).T

    def pack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Matrix:
        self.check(tensors, rows, columns)
        group, order, regular = self.group or columns, None, True
        if not self._as_they_stand(tensors, columns):
            group_of = self._group_of(tensors, columns)
            order, regular = ordered(group_of, group)
        zeros = self._zeros(tensors["qzeros"])
        scale = repack.transposed(tensors["scales"])
        if not regular:  # no order makes groups of one size: every input has its own
            order, group, scale, zeros = None, 1, scale[:, group_of], None if zeros is None else zeros[:, group_of]
        codes = _transposed(tensors["qweight"], self.bits, order)
        if self.bits == 4:
            return Matrix(Int4(codes, scale, zeros, group), order)
        return Matrix(Int8(codes.view(torch.int8), scale, None if zeros is None else _signed(zeros), group), order)

    def _zeros(self, words: Tensor) -> Tensor | None:
        """(N, G) uint8; None if all are the middle of the codes."""
        if repack.supports(words):
            zeros, in_the_middle = repack.zeros(words, self.bits, self.zero_offset)
            return None if in_the_middle else zeros
        middle = 1 << self.bits - 1
        stored = words.contiguous().view(torch.uint8)
        plain = middle - self.zero_offset
        if bool((stored == (plain * 0x11 if self.bits == 4 else plain)).all()):
            return None
        zeros = (unpack4(stored) if self.bits == 4 else stored).T.contiguous() + self.zero_offset  # wraps at 256
        return zeros & 15 if self.bits == 4 else zeros

    def _as_they_stand(self, tensors: Mapping[str, Tensor], columns: int) -> bool:
        """Whether groups follow each other, as in most files."""
        return "g_idx" not in tensors or torch.equal(tensors["g_idx"], _regular(columns, self.group or columns))

    def _group_of(self, tensors: Mapping[str, Tensor], columns: int) -> Tensor:
        """(K,) int64: the group of every input."""
        if "g_idx" not in tensors:
            return torch.arange(columns) // (self.group or columns)
        group_of, count = tensors["g_idx"].long(), tensors["scales"].shape[0]
        if group_of.numel() and not 0 <= int(group_of.min()) <= int(group_of.max()) < count:
            raise CheckpointError(f"g_idx names a group outside the {count} there are")
        return group_of


@lru_cache(maxsize=16)
def _regular(columns: int, group: int) -> Tensor:
    """`g_idx` where groups follow each other."""
    return torch.arange(columns, dtype=torch.int32) // group


def _transposed(words: Tensor, bits: int, order: Tensor | None = None) -> Tensor:
    """`qweight` as the layout has it: (N, K / 2) uint8 of 4 bits, (N, K) of 8, those around 0; its inputs in `order`, (K,).

    The inputs of a word lie in its bytes as the layout wants them, the first in the lowest.
    """
    if repack.supports(words):
        return repack.gptq(words, bits, MIDDLE if bits == 8 else 0, order)
    codes = words.T.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return (codes if order is None else codes[:, order]) ^ MIDDLE
    return codes if order is None else pack4(unpack4(codes)[:, order])


def _signed(codes: Tensor) -> Tensor:
    """uint8 around 128 -> int8 around 0."""
    return (codes ^ MIDDLE).view(torch.int8)


def from_json(fields: Fields) -> Format:
    """The format of a config's `quantization_config`. ConfigError on bits and versions that are not implemented."""
    bits = fields.integer("bits")
    if bits not in (4, 8):
        raise fields.error("bits", f"is {bits}; GPTQ is implemented for 4 and 8")
    fields.flag("desc_act", False)
    version = fields.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    skipped = ("lm_head",) if not fields.flag("lm_head", False) else ()
    scheme = GPTQ(bits, group_size(fields, "group_size", 128), zero_offset=1 if version == "gptq" else 0)
    return Format(scheme, (*skipped, *patterns(fields, "modules_to_not_convert"), *_excluded(fields)))


def _excluded(fields: Fields) -> tuple[str, ...]:
    """What `dynamic` leaves in full precision: "-:EXPRESSION". Under the other names it has settings of their own, or none."""
    dynamic = fields.object("dynamic").data
    for name, settings in dynamic.items():
        if settings and not name.startswith("-:"):
            raise fields.error("dynamic", f"has other settings for {name!r:.80}, which is not implemented")
    return trusted(fields, "dynamic", [f"re:{name.removeprefix('-:')}" for name in dynamic if name.startswith("-:")])
