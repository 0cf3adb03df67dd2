"""The block types of ggml: how many elements a block has, how many bytes, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = {"Q4_K": (256, 144), "Q6_K": (256, 210)}  # kind -> (elements, bytes) of a block


def q4_k(blocks: Tensor) -> Tensor:
    """d fp16, dmin fp16, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles: d sc q - dmin m. -> (..., K) fp32."""
    parts = blocks.unflatten(-1, (-1, 144))  # (..., B, 144)
    d, least = (_half(parts[..., i : i + 2]) for i in (0, 2))  # (..., B, 1)
    packed = parts[..., 4:16]
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = torch.cat((low & 63, high & 15 | low >> 6 << 4), dim=-1).float()  # (..., B, 8)
    minimum = torch.cat((middle & 63, high >> 4 | middle >> 6 << 4), dim=-1).float()
    nibbles = parts[..., 16:].unflatten(-1, (4, 32))  # (..., B, 4, 32): low for the even sub-block, high for the odd
    codes = torch.stack((nibbles & 15, nibbles >> 4), dim=-2).flatten(-3, -2).float()  # (..., B, 8, 32)
    return ((d * scale)[..., None] * codes - (least * minimum)[..., None]).flatten(-3)


def q6_k(blocks: Tensor) -> Tensor:
    """128 bytes of low nibbles, 64 of high two bits, 16 int8 scales, d fp16: d sc (q - 32). -> (..., K) fp32."""
    parts = blocks.unflatten(-1, (-1, 210))  # (..., B, 210)
    low, high = parts[..., :128].unflatten(-1, (2, 1, 64)), parts[..., 128:192].unflatten(-1, (2, 1, 32))
    low = torch.cat((low & 15, low >> 4), dim=-2).flatten(-2)  # (..., B, 2, 128)
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2).flatten(-2)
    codes = (low | high << 4).flatten(-2).unflatten(-1, (16, 16)).float() - 32  # (..., B, 16, 16)
    scale = _half(parts[..., 208:]) * parts[..., 192:208].view(torch.int8).float()  # (..., B, 16)
    return (scale[..., None] * codes).flatten(-3)


def _half(two: Tensor) -> Tensor:
    return two.contiguous().view(torch.float16).float()


DEQUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {"Q4_K": q4_k, "Q6_K": q6_k}
