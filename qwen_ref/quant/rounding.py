"""A matrix of floats to fewer bits by rounding each weight to the nearest number its layout has.

Every function takes (N, K) floats and gives the layout of `packed` that stands for about the same. Scales are rounded
first, then the codes are chosen for the scale as it is stored, so that a scale in 16 bits costs no accuracy. What better
than rounding can be done with the same layouts, given text, is in `calibrated`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError
from .fp4 import E2M1
from .packed import FP8_MAX, NIBBLE_ZERO, Code4, Fp8, Int4, Int8, Packed, pack4

GROUP = 128  # columns of an `Int4` that share a scale
NF4_BLOCK = 64
FP8_BLOCK = (128, 128)
SHRINK = (1.0, 0.92, 0.84)  # shares of the scale that reaches the largest weight, tried for each group of int4
INT4_REACH = 7.5  # steps from zero to the end of -8 .. 7, were it symmetric: halves round into it on both sides

# The 16 levels of NormalFloat (Dettmers et al. 2023, arXiv 2305.14314, appendix E), as bitsandbytes has them in fp32.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def int8(weight: Tensor) -> Int8:
    """Integers from -127 to 127, one scale for every row: amax / 127. An error is at most half a scale."""
    wide = finite(weight)
    scale = scale_of(wide.abs().amax(-1, keepdim=True), 127, weight.dtype)
    codes = (wide / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return Int8(codes, scale, None, weight.shape[-1])


def int4(weight: Tensor, group: int = GROUP, shrink: tuple[float, ...] = SHRINK) -> Int4:
    """Integers from -8 to 7, one scale for every `group` columns: that share of amax / 7.5 which errs least.

    With `shrink=(1.0,)` an error is at most half a scale; a smaller one cuts the largest weights off and rounds all
    others more finely.
    """
    parts = grouped(finite(weight), group)  # (N, G, group)
    scale = best_scale(weight.float(), group, weight.dtype, shrink)
    return Int4(pack4(nibbles(parts, scale[..., None]).flatten(-2)[..., : weight.shape[-1]]), scale, None, group)


def best_scale(weight: Tensor, group: int, dtype: torch.dtype, shrink: tuple[float, ...],
               importance: Tensor | None = None) -> Tensor:  # fmt: skip
    """(N, G): of several shares of amax / 7.5, the one with the least sum of importance (K,) * error^2 in its group."""
    parts = grouped(weight, group)  # (N, G, group)
    weights = grouped(importance[None], group) if importance is not None else 1.0  # (1, G, group)
    amax = parts.abs().amax(-1)
    best = scale_of(amax * shrink[0], INT4_REACH, dtype)
    if len(shrink) == 1:
        return best
    least = torch.full_like(amax, torch.inf)
    for share in shrink:
        scale = scale_of(amax * share, INT4_REACH, dtype)
        step = scale.float()[..., None]
        error = ((nibbles(parts, step).float() - NIBBLE_ZERO) * step - parts).square_().mul_(weights).sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def nibbles(weight: Tensor, scale: Tensor) -> Tensor:
    """The codes of `Int4` nearest to weight / scale, uint8."""
    steps = (weight / scale.float()).round().clamp(-NIBBLE_ZERO, NIBBLE_ZERO - 1)
    return (steps + NIBBLE_ZERO).to(torch.uint8)


def nf4(weight: Tensor) -> Code4:
    """NormalFloat: the nearest of 16 levels times the largest magnitude of 64 weights, code for code as bitsandbytes.

    Its blocks run on over the ends of rows, so where 64 does not divide K a group of the layout is a part of a block.
    """
    rows, columns = weight.shape
    flat = finite(weight).flatten()
    blocks = F.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    absmax = blocks.abs().amax(-1)
    table = torch.tensor(NF4, device=weight.device)
    scaled = blocks * (1 / absmax.masked_fill(absmax == 0, 1.0))[:, None]
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    codes = codes.flatten()[: len(flat)].view(rows, columns)
    group = math.gcd(NF4_BLOCK, columns)
    scale = absmax.repeat_interleave(NF4_BLOCK // group)[: len(flat) // group]
    return Code4(pack4(codes), scale.view(rows, columns // group), table, group)


def fp8(weight: Tensor, block: tuple[int, int] = FP8_BLOCK) -> Fp8:
    """float8_e4m3fn under one scale for every block, amax / 448: DeepSeek-V3's weights, and those Qwen publishes."""
    rows, columns = weight.shape
    high, wide = block
    tiles = F.pad(finite(weight), (0, -columns % wide, 0, -rows % high))
    tiles = tiles.view(tiles.shape[0] // high, high, tiles.shape[1] // wide, wide)
    scale = scale_of(tiles.abs().amax((1, 3)), FP8_MAX, torch.float32)
    codes = (tiles / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    whole = codes.flatten(0, 1).flatten(1)
    return Fp8(whole[:rows, :columns].contiguous(), scale, block)


def mxfp4(weight: Tensor) -> Code4:
    """E2M1 under a power of two for 32 columns: 2^(floor(log2 amax) - 2) (OCP Microscaling Formats 1.0, section 6.3)."""
    parts = grouped(finite(weight), 32)
    amax = parts.abs().amax(-1)
    exponent = torch.frexp(amax.masked_fill(amax == 0, 1.0))[1] - 1 - 2  # frexp's mantissa is below 1
    scale = torch.ldexp(torch.ones_like(amax), exponent.clamp(-127, 127))
    codes = _e2m1(parts / scale[..., None]).flatten(-2)[..., : weight.shape[-1]]
    return Code4(pack4(codes), scale.to(torch.float8_e8m0fnu), torch.tensor(E2M1, device=weight.device), 32)


def nvfp4(weight: Tensor) -> Code4:
    """E2M1 under a float8_e4m3fn for 16 columns, and one fp32 number for the matrix that puts those in reach."""
    parts = grouped(finite(weight), 16)
    amax = parts.abs().amax(-1)
    whole = amax.amax() / (FP8_MAX * E2M1[7])
    whole = torch.where(whole > 0, whole, 1.0)
    scale = (amax / E2M1[7] / whole).clamp(max=FP8_MAX).to(torch.float8_e4m3fn)
    steps = scale.float() * whole
    codes = _e2m1(parts / steps.masked_fill(steps == 0, 1.0)[..., None]).flatten(-2)[..., : weight.shape[-1]]
    return Code4(pack4(codes), scale, torch.tensor(E2M1, device=weight.device) * whole, 16)


# "int4:plain" is the baseline of the others: one scale, amax / 7.5, is tried.
ROUND: dict[str, Callable[..., Packed]] = {
    "int8": int8, "int4": int4, "int4:plain": partial(int4, shrink=(1.0,)),
    "nf4": nf4, "fp8": fp8, "mxfp4": mxfp4, "nvfp4": nvfp4,
}  # fmt: skip


def finite(weight: Tensor) -> Tensor:
    """In fp32. CheckpointError on NaN and infinity, which no scale can reach."""
    wide = weight.float()
    if not bool(torch.isfinite(wide).all()):
        raise CheckpointError("holds NaN or infinity, which cannot be quantised")
    return wide


def grouped(weight: Tensor, group: int) -> Tensor:
    """(N, K) -> (N, G, group), the last group filled up with zeros."""
    return F.pad(weight, (0, -weight.shape[-1] % group)).unflatten(-1, (-1, group))


def scale_of(amax: Tensor, steps: float, dtype: torch.dtype) -> Tensor:
    """amax / steps, rounded up where the dtype cannot hold it, so that amax stays in reach; 1 where all is zero."""
    scale = (amax / steps).to(dtype)
    short = scale.float() * steps < amax
    scale = torch.where(short, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    return scale.masked_fill(amax == 0, 1.0)


def _e2m1(scaled: Tensor) -> Tensor:
    """The codes of the nearest E2M1, ties to the even code, what is beyond 6 to 6."""
    levels = torch.tensor(E2M1[:8], device=scaled.device)
    middle = (levels[1:] + levels[:-1]) / 2
    middle[1::2] = middle[1::2].nextafter(middle.new_zeros(()))  # between an odd code and the next: up, to the even one
    return (torch.bucketize(scaled.abs(), middle) | torch.signbit(scaled) * 8).to(torch.uint8)


__all__ = ["FP8_BLOCK", "GROUP", "NF4", "NF4_BLOCK", "ROUND", "best_scale", "finite", "fp8", "int4", "int8", "mxfp4", "nf4",
           "nibbles", "nvfp4"]  # fmt: skip
