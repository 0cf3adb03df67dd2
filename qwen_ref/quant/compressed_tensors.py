"""compressed-tensors, the format of llm-compressor and vLLM (github.com/vllm-project/compressed-tensors).

A config has groups of modules with a scheme each, and names to ignore. Of weights, these encodings:

    pack-quantized    4 or 8 bits in int32 words along the inputs, the first in the lowest bits, stored + 2^(bits - 1)
    int-quantized     int8
    float-quantized   float8_e4m3fn
    nvfp4-pack-quantized, mxfp4-pack-quantized   see `fp4`

each with scales per matrix, per output, per group of inputs or per block. w = (q - zero) * scale. Schemes that also
quantise activations are run with the activations as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..config import Fields
from ..errors import CheckpointError
from .format import (
    FLOATS,
    Format,
    Matrix,
    Scheme,
    Slot,
    check_scales,
    group_size,
    groups,
    matches,
    ordered,
    patterns,
    spellings,
)
from .fp4 import MXFP4, NVFP4
from .fp8 import FP8, block_size
from .packed import NIBBLE_ZERO, Int4, Int8, pack4, unpack4


@dataclass(frozen=True)
class Integers(Scheme):
    """Integers of 4 or 8 bits, packed into words or (8 bits only) as they are."""

    bits: int
    strategy: str  # "tensor", "channel" or "group"
    group: int | None
    packed: bool

    @property
    def marker(self) -> str:  # type: ignore[override]
        return "weight_packed" if self.packed else "weight"

    def stores(self, found: Mapping[str, Any]) -> bool:
        if self.packed:
            return super().stores(found)
        return "weight" not in found or found["weight"].dtype == torch.int8

    def slots(self, rows: int, columns: int, found: Mapping[str, Any]) -> dict[str, Slot]:
        count = groups(columns, self.group) if self.group else 1
        scale = {"tensor": (1,), "channel": (rows, 1), "group": (rows, count)}[self.strategy]
        if self.packed:
            slots = {
                "weight_packed": Slot((rows, _words(columns, self.bits)), (torch.int32,)),
                "weight_shape": Slot((2,), (torch.int64, torch.int32)),
                "weight_scale": Slot(scale, FLOATS),
            }
            packed_zero = Slot((_words(rows, self.bits), scale[-1]), (torch.int32,))
            zero = packed_zero if self._packs_zeros else Slot(scale, (torch.int8,))
        else:
            slots = {"weight": Slot((rows, columns), (torch.int8,)), "weight_scale": Slot(scale, FLOATS)}
            zero = Slot(scale, (torch.int8,))
        optional = {"weight_zero_point": zero, "weight_g_idx": Slot((columns,), (torch.int32, torch.int64))}
        return slots | {name: slot for name, slot in optional.items() if name in found} | _of_inputs(found)

    def check(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> None:
        if "weight_shape" in tensors and tensors["weight_shape"].tolist() != [rows, columns]:
            raise CheckpointError(f"weight_shape is {tensors['weight_shape'].tolist()}, the config wants {[rows, columns]}")
        check_scales(tensors["weight_scale"], "weight_scale")
        zero = tensors.get("weight_zero_point")
        if zero is not None and self.bits == 4 and not self._packs_zeros and not -8 <= int(zero.min()) <= int(zero.max()) <= 7:
            raise CheckpointError("weight_zero_point holds what 4 bits do not")
        self._group_of(tensors, columns)

    def dequantize(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        scale = tensors["weight_scale"].float().view(-1, tensors["weight_scale"].shape[-1])  # (N or 1, G)
        zero = tensors.get("weight_zero_point")
        if self.packed:
            codes = _integers(tensors["weight_packed"], self.bits, columns)
            if zero is not None and self._packs_zeros:  # along the outputs
                zero = _integers(zero.T, self.bits, rows).T
        else:
            codes = tensors["weight"].int()
        group = self._group_of(tensors, columns)  # (K,)
        zeros = zero.int()[..., group] if zero is not None else 0
        return (codes - zeros) * scale[:, group]

    def pack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Matrix:
        self.check(tensors, rows, columns)
        group = self.group or columns
        scale = tensors["weight_scale"].view(-1, tensors["weight_scale"].shape[-1]).expand(rows, -1).contiguous()
        order, regular = ordered(self._group_of(tensors, columns), group)
        if not regular:
            raise CheckpointError("weight_g_idx makes groups of different sizes")
        zeros = self._zeros(tensors.get("weight_zero_point"), rows)
        if not self.packed:
            return Matrix(Int8(tensors["weight"] if order is None else tensors["weight"][:, order], scale, zeros, group), order)
        bytes_ = tensors["weight_packed"].contiguous().view(torch.uint8)
        if self.bits == 4:
            codes = bytes_[:, : -(-columns // 2)] if order is None else pack4(unpack4(bytes_)[:, :columns][:, order])
            return Matrix(Int4(codes, scale, zeros, group), order)
        codes = (bytes_[:, :columns] ^ 128).view(torch.int8)
        return Matrix(Int8(codes if order is None else codes[:, order], scale, zeros, group), order)

    @property
    def _packs_zeros(self) -> bool:
        return self.packed and self.strategy != "tensor"  # the library leaves the one zero of a matrix as it is

    def _zeros(self, zero: Tensor | None, rows: int) -> Tensor | None:
        """(N, G) int8 around 0, or of 4 bits uint8 around their middle; None if all are the middle."""
        if zero is None:
            return None
        if not self._packs_zeros:
            zeros = zero.expand(rows, -1).contiguous()
            zeros = (zeros + NIBBLE_ZERO).view(torch.uint8) if self.bits == 4 else zeros
        else:
            bytes_ = zero.T.contiguous().view(torch.uint8)  # (G, bytes of N)
            zeros = (unpack4(bytes_) if self.bits == 4 else bytes_)[:, :rows].T.contiguous()
            zeros = zeros if self.bits == 4 else (zeros ^ 128).view(torch.int8)
        return None if bool((zeros == (NIBBLE_ZERO if self.bits == 4 else 0)).all()) else zeros

    def _group_of(self, tensors: Mapping[str, Tensor], columns: int) -> Tensor:
        """(K,) int64: the group of every input."""
        if "weight_g_idx" not in tensors:
            return torch.arange(columns) // (self.group or columns)
        group_of, count = tensors["weight_g_idx"].long(), tensors["weight_scale"].shape[-1]
        if group_of.numel() and not 0 <= int(group_of.min()) <= int(group_of.max()) < count:
            raise CheckpointError(f"weight_g_idx names a group outside the {count} there are")
        return group_of


@dataclass(frozen=True)
class Groups(Format):
    """Modules by the target that means them, the most specific first: a name, an expression (by the alphabet), the class."""

    targets: Mapping[str, Scheme] = field(default_factory=dict)

    @property
    def patterns(self) -> tuple[str, ...]:
        return (*self.skipped, *self.targets)

    def scheme_of(self, name: str) -> Scheme | None:
        if matches(name, self.skipped):
            return None
        expressions = (target for target in self.targets if target.startswith("re:") and matches(name, (target,)))
        named = (spelling for spelling in spellings(name) if spelling in self.targets)
        return self.targets.get(next(chain(named, expressions, ("Linear",))))


def from_json(fields: Fields) -> Format:
    """The format of a config's `quantization_config`. ConfigError on encodings that are not implemented."""
    if fields.data.get("sparsity_config"):
        sparsity = fields.object("sparsity_config")
        sparsity.choice("format", ("dense",), "dense")
    targets: dict[str, Scheme] = {}
    config_groups = fields.object("config_groups")
    for name in config_groups.data:
        group = config_groups.object(name)
        if group.data.get("weights") is None:
            raise group.error("weights", "is missing: only weights can be loaded quantised")
        encoding = group.data.get("format") or fields.data.get("format")
        targets |= dict.fromkeys(patterns(group, "targets"), _scheme(group.object("weights"), encoding, fields))
    if not config_groups.data:
        raise fields.error("config_groups", "is empty")
    if not targets:
        raise fields.error("config_groups", "has no targets")
    return Groups(next(iter(targets.values())), patterns(fields, "ignore"), dict(sorted(targets.items())))


def _scheme(weights: Fields, encoding: Any, fields: Fields) -> Scheme:
    known = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
             "mxfp4-pack-quantized")  # fmt: skip
    if encoding not in known:
        raise fields.error("format", f"is {encoding!r}; implemented: {', '.join(known)}")
    if encoding == "nvfp4-pack-quantized":
        return NVFP4()
    if encoding == "mxfp4-pack-quantized":
        return MXFP4()
    bits = weights.integer("num_bits", 8)
    strategy = weights.choice("strategy", ("tensor", "channel", "group", "block"), "group" if _grouped(weights) else "tensor")
    if weights.choice("type", ("int", "float"), "int") == "float":
        if bits != 8 or strategy == "group":
            raise weights.error("num_bits", f"is {bits} in {strategy} strategy; floats of 8 bits are implemented, not grouped")
        block = block_size(weights, "block_structure") if strategy == "block" else None
        if strategy == "block" and block is None:
            raise weights.error("block_structure", "is missing")
        return FP8(block, "weight_scale")
    if bits not in (4, 8) or (bits == 4 and encoding != "pack-quantized"):
        raise weights.error("num_bits", f"is {bits} in {encoding}; 4 and 8 packed, and 8 unpacked, are implemented")
    if strategy == "block":
        raise weights.error("strategy", "is 'block', which is implemented for floats only")
    group = group_size(weights, "group_size", 128) if strategy == "group" else None
    return Integers(bits, strategy if group or strategy != "group" else "channel", group, encoding == "pack-quantized")


def _grouped(weights: Fields) -> bool:
    size = weights.data.get("group_size")
    return type(size) is int and size > 0


def _of_inputs(found: Mapping[str, Any]) -> dict[str, Slot]:
    """Scales of activations: read, not used."""
    return {name: Slot(tuple(found[name].shape)[:1], (*FLOATS, torch.int8)) for name in ("input_scale", "input_zero_point")
            if name in found}  # fmt: skip


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _integers(words: Tensor, bits: int, columns: int) -> Tensor:
    """(R, W) int32 -> (R, columns) int32, signed."""
    shifts = bits * torch.arange(32 // bits, dtype=torch.int32)
    return (words[..., None] >> shifts & (1 << bits) - 1).flatten(-2)[:, :columns] - (1 << bits - 1)
