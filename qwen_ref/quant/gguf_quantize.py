"""Weights into ggml blocks: the inverse of `gguf_blocks`, as near as so few bits come.

Q8_0, Q4_0 and Q5_0 round to a scale that the largest element fixes, byte for byte as ggml does. The K types have scales
to choose: a grid of candidates is tried on each sub-block, each made the best one for its codes by least squares (the
idea of ggml's make_qkx2_quants), and the candidate with the least squared error is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import CheckpointError
from .gguf_blocks import BLOCK

_CHUNK = 1 << 17  # elements at a time: what a search touches stays in the processor's cache
_NORMAL = torch.finfo(torch.float32).tiny


def quantize(kind: str, weight: Tensor) -> Tensor:
    """(..., K) floats, K a multiple of the kind's block -> (..., K / elements * bytes) uint8, in memory of the CPU.

    Besides the result it takes memory for one chunk of rows. Raises: CheckpointError if the kind cannot be written, K
    does not divide, or a weight is NaN, infinite or too large for an fp16 scale.
    """
    if kind not in QUANTIZE:
        raise CheckpointError(f"{kind} cannot be written; implemented: {', '.join(QUANTIZE)}")
    elements, size = BLOCK[kind]
    if weight.shape[-1] % elements:
        raise CheckpointError(f"rows of {weight.shape[-1]} columns are not whole blocks of {elements}, as {kind} wants")
    blocks = weight.reshape(-1, elements)
    out = torch.empty(len(blocks), size, dtype=torch.uint8)
    for part, into in zip(blocks.split(_CHUNK // elements), out.split(_CHUNK // elements), strict=True):
        x = part.to("cpu", torch.float32)
        if not x.abs().amax() <= torch.finfo(torch.float16).max:  # NaN is not, either
            raise CheckpointError("a weight is NaN, infinite or beyond fp16, which no block of ggml can scale")
        into.copy_(QUANTIZE[kind](x))
    return out.view(*weight.shape[:-1], -1)


# ------------------------------------------------------------------------------------------------- 32 elements


def _q8_0(x: Tensor) -> Tensor:  # (n, 32) fp32 -> (n, 34)
    d = x.abs().amax(-1, keepdim=True) / 127
    scaled = (x * _inverse(d)).abs()
    whole = scaled.floor()
    q = x.sign() * (whole + (2 * (scaled - whole)).floor())  # halves away from zero, as C's roundf
    return torch.cat((_half(d), q.to(torch.int8).view(torch.uint8)), dim=-1)


def _q4_0(x: Tensor) -> Tensor:  # (n, 32) fp32 -> (n, 18)
    d, q = _signed_codes(x, 8)
    return torch.cat((_half(d), q[:, :16] | q[:, 16:] << 4), dim=-1)


def _q5_0(x: Tensor) -> Tensor:  # (n, 32) fp32 -> (n, 22)
    d, q = _signed_codes(x, 16)
    return torch.cat((_half(d), _pack(q >> 4, 1, 1), q[:, :16] & 15 | q[:, 16:] << 4), dim=-1)


def _signed_codes(x: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """Codes 0 to 2 zero - 1 under the scale that gives the element of largest magnitude, whatever its sign, code 0."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    d = largest / -zero
    return d, (x * _inverse(d) + (zero + 0.5)).trunc().clamp(0, 2 * zero - 1).to(torch.uint8)


# ------------------------------------------------------------------------------------------------- 256 elements


def _q4_k(x: Tensor) -> Tensor:  # (n, 256) fp32 -> (n, 144)
    x = x.unflatten(-1, (8, 32))
    scale, minimum = _affine_fit(x, levels=15)  # (n, 8) each
    d, s = _six_bits(scale)
    dmin, m = _six_bits(minimum)
    step, low = (d * s)[..., None], (dmin * m)[..., None]
    q = ((x + low) * _inverse(step)).round().clamp(0, 15).to(torch.uint8)
    return torch.cat((_half(d), _half(dmin), _pack_six_bit_pairs(s, m), _pack(q.flatten(-2), 32, 4)), dim=-1)


def _q6_k(x: Tensor) -> Tensor:  # (n, 256) fp32 -> (n, 210)
    x = x.unflatten(-1, (16, 16))
    scale = _symmetric_fit(x, 32)  # (n, 16)
    d = _as_half(scale.gather(-1, scale.abs().argmax(-1, keepdim=True)) / -128)
    s = (scale * _inverse(d)).round().clamp(-128, 127)
    q = ((x * _inverse(d * s)[..., None]).round().clamp(-32, 31) + 32).to(torch.uint8).flatten(-2)
    scales = s.to(torch.int8).view(torch.uint8)
    return torch.cat((_pack(q & 15, 64, 4), _pack(q >> 4, 32, 2), scales, _half(d)), dim=-1)


def _affine_fit(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """x (..., n) ~ scale q - minimum with q in 0..levels, scale and minimum >= 0 -> (...) each."""
    count = x.shape[-1]
    low, high = x.amin(-1).clamp(max=0), x.amax(-1)
    sum_x, sum_xx = x.sum(-1), (x * x).sum(-1)
    best = [torch.full_like(low, torch.inf), torch.zeros_like(low), torch.zeros_like(low)]
    for stretch in torch.arange(-1.0, 2.01, 0.2).tolist():  # from cut tails to a little room above the largest code
        inverse = (levels + stretch) * _inverse(high - low)
        q = ((x - low[..., None]) * inverse[..., None]).round_().clamp_(0, levels)
        sum_q, sum_qq, sum_qx = q.sum(-1), (q * q).sum(-1), (q * x).sum(-1)
        # The least squares of x = scale q + offset; where the offset would be positive, of x = scale q.
        inverse = _inverse(count * sum_qq - sum_q * sum_q)
        scale = (count * sum_qx - sum_q * sum_x) * inverse
        offset = (sum_qq * sum_x - sum_q * sum_qx) * inverse
        through_zero = offset > 0
        scale = torch.where(through_zero, sum_qx * _inverse(sum_qq), scale)
        offset = offset.masked_fill(through_zero, 0.0)
        error = sum_xx + scale * (scale * sum_qq + 2 * offset * sum_q - 2 * sum_qx) + offset * (count * offset - 2 * sum_x)
        better = (error < best[0]) & (scale > 0)
        best = [torch.where(better, new, old) for new, old in zip((error, scale, -offset), best, strict=True)]
    # All elements equal: there is no spread to fit.
    flat = best[0].isinf()
    return torch.where(flat, high.clamp(min=0) / levels, best[1]), torch.where(flat, -low, best[2])


def _symmetric_fit(x: Tensor, zero: int) -> Tensor:
    """x (..., n) ~ scale q with q in -zero..zero - 1, scale of either sign -> (...)."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best, gain = torch.zeros_like(largest[..., 0]), torch.zeros_like(largest[..., 0])
    for stretch in torch.arange(-1.0, 1.01, 0.1).tolist():
        q = (x * ((zero + stretch) * _inverse(-largest))).round_().clamp_(-zero, zero - 1)
        sum_qq, sum_qx = (q * q).sum(-1), (q * x).sum(-1)
        scale = sum_qx * _inverse(sum_qq)  # least squares; it leaves an error of sum x^2 - scale sum q x
        better = scale * sum_qx > gain
        best, gain = torch.where(better, scale, best), torch.where(better, scale * sum_qx, gain)
    return best


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 8) >= 0 -> d (n, 1), which fp16 holds, and codes (n, 8) below 64: values ~ d codes."""
    d = _as_half(values.amax(-1, keepdim=True) / 63)
    return d, (values * _inverse(d)).round().clamp(0, 63)


# ------------------------------------------------------------------------------------------------- pieces


def _inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where d has no finite inverse to speak of."""
    return torch.where(d.abs() < _NORMAL, 0.0, 1.0 / d)


def _as_half(d: Tensor) -> Tensor:
    return d.half().float()


def _half(d: Tensor) -> Tensor:
    """(n, 1) -> the two bytes of each as fp16 (n, 2)."""
    return d.half().view(torch.uint8)


def _pack(q: Tensor, run: int, bits: int) -> Tensor:
    """The inverse of `gguf_blocks.fields`: (n, m) uint8 of so many bits -> (n, m * bits / 8)."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    q = q.unflatten(-1, (-1, 8 // bits, run)) << shifts  # (n, runs, 8 / bits, run)
    return q.sum(-2, dtype=torch.uint8).flatten(-2)


def _pack_six_bit_pairs(scales: Tensor, minima: Tensor) -> Tensor:
    """The inverse of `gguf_blocks.six_bit_pairs`: (n, 8) each -> (n, 12)."""
    (s, high_s), (m, high_m) = (codes.to(torch.uint8).split(4, dim=-1) for codes in (scales, minima))
    return torch.cat((s | high_s >> 4 << 6, m | high_m >> 4 << 6, high_s & 15 | (high_m & 15) << 4), dim=-1)


# kind -> function from (n, elements) fp32, finite, to (n, bytes) uint8
QUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}
