"""Four-bit floats, E2M1: MXFP4 (OCP Microscaling Formats 1.0, section 5.2) and NVIDIA's NVFP4.

A code has a sign (bit 3), two bits of exponent and one of mantissa; two codes share a byte, the even input in the low
four bits. MXFP4 scales 32 inputs by a power of two (E8M0); NVFP4 16 inputs by a float8_e4m3fn and the whole matrix by an
fp32 number, by which ModelOpt multiplies (`weight_scale_2`) and compressed-tensors divides (`weight_global_scale`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import Fields
from .format import SHELL, Format, Matrix, Scheme, Slot, check_scales, groups, matches, patterns, spellings
from .fp8 import FP8
from .packed import Code4

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


@dataclass(frozen=True)
class MXFP4(Scheme):
    marker = "weight_packed"
    weight_name: str = "weight_packed"

    def slots(self, rows: int, columns: int, found: Mapping[str, Any]) -> dict[str, Slot]:
        return {
            self.weight_name: Slot((rows, groups(columns, 2)), (torch.uint8,)),
            "weight_scale": Slot((rows, groups(columns, 32)), (torch.uint8, E8M0)),
        }

    def check(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> None:
        check_scales(tensors["weight_scale"].view(E8M0), "weight_scale")

    def dequantize(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        exponent = tensors["weight_scale"].view(torch.uint8).int() - 127
        return torch.ldexp(values(tensors[self.weight_name]), exponent.repeat_interleave(32, 1))

    def pack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Matrix:
        self.check(tensors, rows, columns)
        return Matrix(Code4(tensors[self.weight_name], tensors["weight_scale"].view(E8M0), torch.tensor(E2M1), 32))


@dataclass(frozen=True)
class NVFP4(Scheme):
    marker = "weight_packed"
    weight_name: str = "weight_packed"
    global_name: str = "weight_global_scale"
    divides: bool = True

    def stores(self, found: Mapping[str, Any]) -> bool:
        plain = "weight" in found and found["weight"].dtype != torch.uint8
        return not plain or (self.weight_name != "weight" and self.weight_name in found)

    def slots(self, rows: int, columns: int, found: Mapping[str, Any]) -> dict[str, Slot]:
        whole = tuple(found[self.global_name].shape) if self.global_name in found else ()
        slots = {
            self.weight_name: Slot((rows, groups(columns, 2)), (torch.uint8,)),
            "weight_scale": Slot((rows, groups(columns, 16)), (E4M3,)),
            self.global_name: Slot((1,) if whole == (1,) else (), (torch.float32,)),
        }
        for name in ("input_scale", "input_global_scale"):  # of activation quantisation: read, not used
            if name in found:
                slots[name] = Slot((1,) if tuple(found[name].shape) == (1,) else (), (torch.float32,))
        return slots

    def check(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> None:
        check_scales(tensors["weight_scale"], "weight_scale")
        whole = tensors[self.global_name]
        check_scales(whole, self.global_name)  # first: an infinite one has 0 as its inverse, and would make all weights 0
        if self.divides:
            check_scales(1 / whole, self.global_name)

    def dequantize(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        scale, whole = tensors["weight_scale"].float(), tensors[self.global_name].reshape(())
        scale = scale / whole if self.divides else scale * whole
        return values(tensors[self.weight_name]) * scale.repeat_interleave(16, 1)

    def pack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Matrix:
        whole = tensors[self.global_name].reshape(())
        self.check(tensors, rows, columns)
        whole = 1 / whole if self.divides else whole
        # The matrix's own scale goes into the table: 16 products instead of one for every weight.
        return Matrix(Code4(tensors[self.weight_name], tensors["weight_scale"], torch.tensor(E2M1) * whole, 16))


def values(codes: Tensor) -> Tensor:
    """(N, K / 2) uint8 -> (N, K) fp32, the numbers the codes stand for."""
    both = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return torch.tensor(E2M1)[both.long()]


@dataclass(frozen=True)
class Named(Format):
    """Modules by their names in the config, each with what is below it ("mlp.experts"); the rest in full precision."""

    schemes: Mapping[str, Scheme] = field(default_factory=dict)

    def scheme_of(self, name: str) -> Scheme | None:
        if matches(name, self.skipped):
            return None
        for spelling in spellings(name):
            while spelling:
                if spelling in self.schemes:
                    return self.schemes[spelling]
                spelling = spelling.rpartition(".")[0]
        return None


MODELOPT: dict[str, Scheme] = {  # quant_algo -> how a matrix is stored
    **dict.fromkeys(("NVFP4", "W4A16_NVFP4"), NVFP4("weight", "weight_scale_2", divides=False)),
    "FP8": FP8(None, "weight_scale"),
}


def from_modelopt(fields: Fields) -> Format:
    """NVFP4, FP8 or both, as NVIDIA ModelOpt writes them (`quant_method: modelopt`). ConfigError on its other algorithms."""
    algorithm = fields.choice("quant_algo", (*MODELOPT, "MIXED_PRECISION"))
    listed = (*patterns(fields, "ignore"), *patterns(fields, "exclude_modules"))
    skipped = tuple(f"{SHELL}{name}" if set(name) & set("*?[") else name for name in listed)
    if algorithm != "MIXED_PRECISION":
        return Format(MODELOPT[algorithm], ("lm_head", *skipped))
    layers = fields.object("quantized_layers")  # here a head may be among them
    schemes = {name: MODELOPT[layers.object(name).choice("quant_algo", tuple(MODELOPT))] for name in layers.data}
    if not schemes:
        raise fields.error("quantized_layers", "is empty")
    return Named(MODELOPT["NVFP4"], skipped, schemes)
