"""bitsandbytes: int8 with a scale for every output (Dettmers et al. 2022, arXiv 2208.07339), and 4 bits by a table.

int8: w = weight * SCB / 127. (The library also runs columns of large inputs in fp16; here all inputs are as they are.)

NF4 and FP4 (Dettmers et al. 2023, arXiv 2305.14314): the matrix row after row in blocks of 64, two codes a byte, the
first in the high four bits; w = quant_map[code] * absmax[block]. Under double quantisation absmax is itself a byte:
absmax = nested_quant_map[byte] * nested_absmax[block of 256] + nested_offset. What is not a tensor stands as JSON in
the bytes of `weight.quant_state.bitsandbytes__nf4`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Fields
from ..errors import CheckpointError
from .format import Format, Matrix, Scheme, Slot, check_scales, patterns
from .packed import Code4, Int8, pack4

STATE = "weight.quant_state.bitsandbytes__"
MOST_STATE = 4096  # bytes of JSON
_TO_127TH = 7.874015718698502e-3  # 1 / 127, as the library writes it


@dataclass(frozen=True)
class BnbInt8(Scheme):
    marker = "SCB"

    def slots(self, rows: int, columns: int, found: Mapping[str, Any]) -> dict[str, Slot]:
        slots = {"weight": Slot((rows, columns), (torch.int8,)), "SCB": Slot((rows,), (torch.float32,))}
        return slots | ({"weight_format": Slot((), (torch.uint8,))} if "weight_format" in found else {})

    def check(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> None:
        if int(tensors.get("weight_format", torch.tensor(0))) != 0:
            raise CheckpointError("weight_format is not 0 (row by row), the only one that is saved today")
        check_scales(tensors["SCB"], "SCB")

    def dequantize(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        return tensors["weight"] * tensors["SCB"][:, None] * _TO_127TH

    def pack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Matrix:
        self.check(tensors, rows, columns)
        return Matrix(Int8(tensors["weight"], tensors["SCB"][:, None] * _TO_127TH, None, columns))


@dataclass(frozen=True)
class Bnb4(Scheme):
    kind: str  # "nf4" or "fp4"

    @property
    def marker(self) -> str:  # type: ignore[override]
        return STATE + self.kind

    def slots(self, rows: int, columns: int, found: Mapping[str, Any]) -> dict[str, Slot]:
        # How long these are depends on numbers inside them, which `_state` compares.
        slots = {
            "weight": Slot((-(-rows * columns // 2), 1), (torch.uint8,)),
            "weight.quant_map": Slot((16,), (torch.float32,)),
            self.marker: Slot(_length(found, self.marker), (torch.uint8,)),
            "weight.absmax": Slot(_length(found, "weight.absmax"), (torch.float32, torch.uint8)),
        }
        if "weight.nested_absmax" in found or _dtype(found, "weight.absmax") == torch.uint8:
            slots["weight.nested_absmax"] = Slot(_length(found, "weight.nested_absmax"), (torch.float32,))
            slots["weight.nested_quant_map"] = Slot((256,), (torch.float32,))
        return slots

    def check(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> None:
        self._absmax(tensors, rows, columns)

    def dequantize(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        block, absmax = self._absmax(tensors, rows, columns)
        both = tensors["weight"].flatten()
        codes = torch.stack((both >> 4, both & 15), dim=-1).flatten()[: rows * columns]
        values = tensors["weight.quant_map"][codes.long()] * absmax.repeat_interleave(block)[: rows * columns]
        return values.view(rows, columns)

    def pack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Matrix:
        block, absmax = self._absmax(tensors, rows, columns)
        codes = tensors["weight"].flatten()
        if columns % 2:  # rows begin in the middle of a byte
            codes = pack4(torch.stack((codes >> 4, codes & 15), dim=-1).flatten()[: rows * columns].view(rows, columns))
        else:
            codes = (codes >> 4 | codes << 4).view(rows, columns // 2)
        group = math.gcd(block, columns)  # a block may go on into the next row: as many equal scales
        scale = absmax.repeat_interleave(block // group)[: rows * columns // group]
        return Matrix(Code4(codes, scale.view(rows, columns // group), tensors["weight.quant_map"], group))

    def _absmax(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[int, Tensor]:
        """Elements in a block, and the largest magnitude of every block, fp32."""
        state = _state(tensors[self.marker])
        block, absmax = state.integer("blocksize", low=2, high=4096), tensors["weight.absmax"]
        if state.array("shape", []) != [rows, columns]:
            raise state.error("shape", f"is {state.data.get('shape')!r}, the config wants {[rows, columns]}")
        if absmax.numel() != -(-rows * columns // block):
            raise CheckpointError(f"weight.absmax has {absmax.numel()} elements, not one for each {block} weights")
        if absmax.dtype != torch.float32:
            absmax = self._nested(state, tensors)
        check_scales(absmax, "weight.absmax")
        return block, absmax

    def _nested(self, state: Fields, tensors: Mapping[str, Tensor]) -> Tensor:
        absmax = tensors["weight.absmax"]
        wide, nested = state.integer("nested_blocksize", high=4096), tensors["weight.nested_absmax"]
        if nested.numel() != -(-absmax.numel() // wide):
            raise CheckpointError(f"weight.nested_absmax has {nested.numel()} elements, not one for each {wide} of absmax")
        offset: Any = state.data.get("nested_offset")
        if type(offset) not in (int, float) or not abs(offset) < 3e38:
            raise state.error("nested_offset", f"is {offset!r:.80}, not a number of fp32")
        values = tensors["weight.nested_quant_map"][absmax.long()]
        return values * nested.repeat_interleave(wide)[: absmax.numel()] + offset


def from_json(fields: Fields) -> Format:
    """The format of a config's `quantization_config`."""
    four, eight = fields.flag("load_in_4bit", False), fields.flag("load_in_8bit", False)
    if four == eight:
        raise fields.error("load_in_4bit", "and load_in_8bit are both true or both false")
    skipped = ("lm_head", *patterns(fields, "llm_int8_skip_modules"))
    if eight:
        return Format(BnbInt8(), skipped)
    return Format(Bnb4(fields.choice("bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")), skipped)


def _state(raw: Tensor) -> Fields:
    where = "quant_state of bitsandbytes"
    try:
        data = json.loads(bytes(raw.tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{where}: not valid JSON: {str(problem)[:100]}") from problem
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: not a JSON object")
    return Fields(data, where)


def _length(found: Mapping[str, Any], name: str) -> tuple[int, ...]:
    shape = tuple(found[name].shape) if name in found else (0,)
    if len(shape) != 1 or (name.startswith(STATE) and shape[0] > MOST_STATE):
        raise CheckpointError(f"{name} has the shape {list(shape)}, which bitsandbytes does not write")
    return shape


def _dtype(found: Mapping[str, Any], name: str) -> torch.dtype | None:
    return found[name].dtype if name in found else None
