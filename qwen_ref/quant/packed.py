"""Matrices of few bits: how each layout is kept in memory, what it stands for, and the products with it.

Files come in many formats, memory in these five layouts. A format (`awq.py`, `gptq.py`, ...) repacks its tensors into
one of them once, without loss; a kernel knows a layout, not a format. All are (..., N, K) matrices as `ops.linear` takes
them, leading axes being experts; rows are packed independently and contiguous along K, in the order of K.

Letters: N rows (outputs), K columns (inputs), G = ceil(K / group) groups of a row, M tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .gguf_blocks import DEQUANTIZE

NIBBLE_ZERO = 8  # what a symmetric 4-bit code calls zero
FP8_MAX = 448.0  # the largest number of float8_e4m3fn


class Int4(NamedTuple):
    """w = (code - zero) * scale, one scale and one zero for every `group` columns of a row."""

    codes: Tensor  # (..., N, ceil(K / 2)) uint8: the even column in the low four bits
    scale: Tensor  # (..., N, G) float
    zero: Tensor | None  # (..., N, G) uint8; None = 8 everywhere
    group: int

    def dequantize(self, dtype: torch.dtype = torch.float32, columns: int | None = None) -> Tensor:  # -> (..., N, K)
        columns = columns or 2 * self.codes.shape[-1]
        codes = unpack4(self.codes)[..., :columns].to(_wide(dtype))
        zero = NIBBLE_ZERO if self.zero is None else spread(self.zero, self.group, columns).to(codes.dtype)
        return ((codes - zero) * spread(self.scale, self.group, columns).to(codes.dtype)).to(dtype)


class Int8(NamedTuple):
    """w = (code - zero) * scale, one scale and one zero for every `group` columns of a row (group = K: per row)."""

    codes: Tensor  # (..., N, K) int8
    scale: Tensor  # (..., N, G) float
    zero: Tensor | None  # (..., N, G) int8; None = 0 everywhere
    group: int

    def dequantize(self, dtype: torch.dtype = torch.float32, columns: int | None = None) -> Tensor:  # -> (..., N, K)
        columns = self.codes.shape[-1]
        codes = self.codes.to(_wide(dtype))
        if self.zero is not None:
            codes = codes - spread(self.zero, self.group, columns).to(codes.dtype)
        return (codes * spread(self.scale, self.group, columns).to(codes.dtype)).to(dtype)


class Fp8(NamedTuple):
    """w = code * scale, one scale for every block of so many rows and columns; the last blocks may be partial."""

    codes: Tensor  # (..., N, K) float8_e4m3fn
    scale: Tensor  # (..., ceil(N / block[0]), ceil(K / block[1])) float
    block: tuple[int, int]

    def dequantize(self, dtype: torch.dtype = torch.float32, columns: int | None = None) -> Tensor:  # -> (..., N, K)
        rows, columns = self.codes.shape[-2:]
        scale = spread(self.scale.to(_wide(dtype)), self.block[1], columns)
        scale = spread(scale.mT, self.block[0], rows).mT
        return (self.codes.to(scale.dtype) * scale).to(dtype)


class Code4(NamedTuple):
    """w = table[code] * scale: NF4, MXFP4, NVFP4, IQ4_NL differ by the table, the group and what a scale can be."""

    codes: Tensor  # (..., N, ceil(K / 2)) uint8: the even column in the low four bits
    scale: Tensor  # (..., N, G) float, float8_e4m3fn or float8_e8m0fnu
    table: Tensor  # (16,) fp32, or (..., 16) where every expert has its own
    group: int

    def dequantize(self, dtype: torch.dtype = torch.float32, columns: int | None = None) -> Tensor:  # -> (..., N, K)
        columns = columns or 2 * self.codes.shape[-1]
        index = unpack4(self.codes)[..., :columns].long()
        table = self.table.to(_wide(dtype))
        own = table.dim() > 1
        values = table.gather(-1, index.flatten(-2)).view(index.shape) if own else table[index]
        return (values * spread(self.scale.to(values.dtype), self.group, columns)).to(dtype)


class Gguf(NamedTuple):
    """Rows of ggml blocks, byte for byte as in the file: the kinds with scales of scales, such as Q4_K."""

    blocks: Tensor  # (..., N, K / block size * bytes of a block) uint8
    kind: str  # a key of `gguf_blocks.DEQUANTIZE`

    def dequantize(self, dtype: torch.dtype = torch.float32, columns: int | None = None) -> Tensor:  # -> (..., N, K)
        return DEQUANTIZE[self.kind](self.blocks).to(dtype)


Packed: TypeAlias = Int4 | Int8 | Fp8 | Code4 | Gguf


def rows(weight: Packed, first: int, last: int) -> Packed:
    """Rows first:last of a matrix; of Fp8, `first` must be where a block begins, or all of them in one block."""
    if isinstance(weight, Fp8):
        high = weight.block[0]
        scale = weight.scale[..., first // high : -(-last // high), :]
        return weight._replace(codes=weight.codes[..., first:last, :], scale=scale)
    whole = ("table",)
    parts = {name: value[..., first:last, :] for name, value in weight._asdict().items()
             if isinstance(value, Tensor) and name not in whole}  # fmt: skip
    return weight._replace(**parts)  # type: ignore[arg-type]


def expert(weight: Packed, index: int) -> Packed:
    """One matrix of a stack of them."""
    parts = {name: value[index] for name, value in weight._asdict().items()
             if isinstance(value, Tensor) and (name != "table" or value.dim() > 1)}  # fmt: skip
    return weight._replace(**parts)  # type: ignore[arg-type]


def pack4(codes: Tensor) -> Tensor:
    """(..., K) uint8 below 16 -> (..., ceil(K / 2)) uint8, the even column in the low four bits."""
    if codes.shape[-1] % 2:
        codes = F.pad(codes, (0, 1))
    pairs = codes.contiguous().view(torch.int16)  # the odd column in the high byte
    return (pairs | pairs >> 4).to(torch.uint8)  # which is dropped


def unpack4(codes: Tensor) -> Tensor:
    """(..., K / 2) uint8 -> (..., K) uint8 below 16: the inverse of `pack4` for even K."""
    pairs = codes.contiguous().to(torch.int16)
    return ((pairs | pairs << 4) & 0x0F0F).view(torch.uint8)  # the high four bits in the high byte, that of the odd column


def spread(values: Tensor, times: int, length: int) -> Tensor:
    """(..., G) -> (..., length): each value `times` times, cut to length."""
    if values.shape[-1] == 1:
        return values.expand(*values.shape[:-1], length)
    return values.repeat_interleave(times, dim=-1)[..., :length]


def _wide(dtype: torch.dtype) -> torch.dtype:
    # Codes times scales are made in fp32, rounded once to the weight's dtype; fp64 for the fp64 oracle.
    return torch.promote_types(dtype, torch.float32)


# ------------------------------------------------------------------------------------------------- products
# x (..., K), weight (N, K), bias (N,) -> (..., N) in x's dtype. The weight is rounded to x's dtype, as a dequantised
# model's weights are, and multiplied as in `ops.linear`.


def linear_int4(x: Tensor, weight: Int4, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias with 4-bit groups: AWQ, GPTQ, compressed-tensors, Q4_0."""
    return F.linear(x, weight.dequantize(x.dtype, x.shape[-1]), bias)


def linear_int8(x: Tensor, weight: Int8, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias with 8-bit groups or rows: GPTQ, compressed-tensors, bitsandbytes, Q8_0."""
    return F.linear(x, weight.dequantize(x.dtype), bias)


def linear_fp8(x: Tensor, weight: Fp8, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias with fp8 blocks, x as it is."""
    return F.linear(x, weight.dequantize(x.dtype), bias)


def linear_fp8_dynamic(x: Tensor, weight: Fp8, bias: Tensor | None = None) -> Tensor:
    """`linear_fp8` with x rounded to fp8 on the way: what an FP8 tensor core multiplies (DeepSeek-V3, section 3.3).

    Every token's x has one scale for `weight.block[1]` columns, amax / 448; products are summed in at least fp32.
    """
    codes, scale = quantize_fp8(x, weight.block[1])
    wide = _wide(x.dtype)
    rounded = codes.to(wide) * spread(scale.to(wide), weight.block[1], x.shape[-1])
    y = F.linear(rounded, weight.dequantize(wide), bias.to(wide) if bias is not None else None)
    return y.to(x.dtype)


def linear_code4(x: Tensor, weight: Code4, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias with 4-bit codes of a table: NF4, MXFP4, NVFP4, IQ4_NL."""
    return F.linear(x, weight.dequantize(x.dtype, x.shape[-1]), bias)


def linear_gguf(x: Tensor, weight: Gguf, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias with ggml blocks."""
    return F.linear(x, weight.dequantize(x.dtype), bias)


def quantize_fp8(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round every `group` columns to float8_e4m3fn under one scale: (..., K) -> codes (..., K), scale (..., G) fp32."""
    columns = x.shape[-1]
    wide = F.pad(x.float(), (0, -columns % group)).unflatten(-1, (-1, group))  # (..., G, group)
    largest = wide.abs().amax(-1)
    scale = largest / torch.full_like(largest, FP8_MAX)  # by a Python number a GPU would multiply by 1/448
    scale = scale.masked_fill(scale == 0, 1.0)
    codes = (wide / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.flatten(-2)[..., :columns], scale


# ------------------------------------------------------------------------------------------------- experts
# As `ops.moe_experts`: x (M, H), gate_up E x (2I, H), down E x (H, I), weights and experts (M, k) -> (M, H).


def moe_int4(x: Tensor, gate_up: Int4, down: Int4, weights: Tensor, experts: Tensor) -> Tensor:
    """`ops.moe_experts` over `Int4` stacks."""
    return moe_packed(x, gate_up, down, weights, experts)


def moe_int8(x: Tensor, gate_up: Int8, down: Int8, weights: Tensor, experts: Tensor) -> Tensor:
    """`ops.moe_experts` over `Int8` stacks."""
    return moe_packed(x, gate_up, down, weights, experts)


def moe_fp8(x: Tensor, gate_up: Fp8, down: Fp8, weights: Tensor, experts: Tensor) -> Tensor:
    """`ops.moe_experts` over `Fp8` stacks."""
    return moe_packed(x, gate_up, down, weights, experts)


def moe_code4(x: Tensor, gate_up: Code4, down: Code4, weights: Tensor, experts: Tensor) -> Tensor:
    """`ops.moe_experts` over `Code4` stacks."""
    return moe_packed(x, gate_up, down, weights, experts)


def moe_gguf(x: Tensor, gate_up: Gguf, down: Gguf, weights: Tensor, experts: Tensor) -> Tensor:
    """`ops.moe_experts` over `Gguf` stacks."""
    return moe_packed(x, gate_up, down, weights, experts)


def moe_packed(
    x: Tensor, gate_up: Packed, down: Packed, weights: Tensor, experts: Tensor,
    linear: Callable[[Tensor, Any], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """`ops.moe_experts`, one expert at a time; the two stacks may be of different layouts.

    `linear`: how x (m, K) and one packed matrix (N, K) are multiplied; default dequantised, as the formulas do.
    """
    linear = linear or _dequantised
    out = torch.zeros_like(x)
    for e in experts.unique().tolist():
        token, slot = torch.where(experts == e)
        gate, up = linear(x[token], expert(gate_up, e)).chunk(2, dim=-1)  # (m, I) each
        y = linear(ops.swiglu(gate, up), expert(down, e)) * weights[token, slot, None]  # (m, H)
        out = out.index_add(0, token, y.to(out.dtype))
    return out


def _dequantised(x: Tensor, weight: Packed) -> Tensor:
    return F.linear(x, weight.dequantize(x.dtype, x.shape[-1]))
