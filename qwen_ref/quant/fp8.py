"""FP8 (float8_e4m3fn), one scale for every block of 128 x 128 weights, or one for the whole matrix.

DeepSeek-V3 Technical Report, section 3.3 (arXiv 2412.19437); what Qwen publishes as -FP8. In spite of its name
`weight_scale_inv` multiplies: w = weight * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Fields
from ..errors import CheckpointError
from ..limits import LIMITS
from .format import FLOATS, Format, Matrix, Scheme, Slot, check_scales, groups, patterns
from .packed import Fp8

E8M0 = torch.float8_e8m0fnu


@dataclass(frozen=True)
class FP8(Scheme):
    marker = "weight"
    block: tuple[int, int] | None  # None = one scale for the matrix
    scale_name: str = "weight_scale_inv"

    def stores(self, found: Mapping[str, Any]) -> bool:
        return "weight" not in found or found["weight"].dtype == torch.float8_e4m3fn

    def slots(self, rows: int, columns: int, found: Mapping[str, Any]) -> dict[str, Slot]:
        scale: tuple[int, ...] = ()
        name = self._scale_name(found)
        if self.block is not None:
            scale = groups(rows, self.block[0], partial=True), groups(columns, self.block[1], partial=True)
        elif name in found and found[name].shape in ((1,), (rows, 1), (rows,)):
            scale = tuple(found[name].shape)  # the same in one element, or one for every output
        slots = {
            "weight": Slot((rows, columns), (torch.float8_e4m3fn,)),
            name: Slot(scale, (*FLOATS, E8M0) if self.block else FLOATS),
        }
        for name in ("activation_scale", "input_scale"):  # of static activation quantisation: read, not used
            if name in found:
                slots[name] = Slot((1,) if tuple(found[name].shape) == (1,) else (), FLOATS)
        return slots

    def check(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> None:
        name = self._scale_name(tensors)
        check_scales(tensors[name], name)
        if int((tensors["weight"].view(torch.uint8) & 127).max()) == 127:  # the two NaNs of e4m3fn
            raise CheckpointError("weight holds NaN")

    def dequantize(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        weight, scale = tensors["weight"].float(), tensors[self._scale_name(tensors)].float()
        if self.block is None:
            return weight * (scale.view(-1, 1) if scale.dim() else scale)
        high, wide = self.block
        high, wide = min(high, rows), min(wide, columns)
        return weight * scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]

    def pack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Matrix:
        scale, block = tensors[self._scale_name(tensors)], self.block
        self.check(tensors, rows, columns)
        if block is None:
            scale = scale.reshape(-1, 1)
            block = (rows if scale.shape[0] == 1 else 1, columns)
        return Matrix(Fp8(tensors["weight"], scale, block))

    def _scale_name(self, held: Mapping[str, Any]) -> str:
        """A whole matrix's scale is called `weight_scale_inv` by transformers, `weight_scale` by AutoFP8 and vLLM."""
        return "weight_scale" if self.block is None and "weight_scale" in held else self.scale_name


def from_json(fields: Fields) -> Format:
    """The format of a config's `quantization_config`. ConfigError on what is not implemented."""
    fields.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    fields.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    skipped = patterns(fields, "modules_to_not_convert") + patterns(fields, "ignored_layers")
    return Format(FP8(block_size(fields, "weight_block_size")), ("lm_head", *skipped))


def block_size(fields: Fields, key: str) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None = all of them, where the config has no such field."""
    block = fields.array(key, []) or None
    if block is not None and (len(block) != 2 or any(type(n) is not int or not 1 <= n <= LIMITS.width for n in block)):
        raise fields.error(key, f"is {block!r:.80}, not two integers from 1 to {LIMITS.width}")
    return (block[0], block[1]) if block else None
