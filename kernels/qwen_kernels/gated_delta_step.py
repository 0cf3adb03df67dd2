"""gated_delta_step in Triton: one decoding token of a Gated DeltaNet, its state read once and written once, where it was.

Algorithm: `ops.gated_delta_step`, fused. A program has one value head: the whole state (Dk, Dv) is in its registers, so
that the norm over the head's output needs no second pass. First it convolves the 2 Dk + Dv channels that it reads; those of
q and k are convolved again by the other value heads of the key head, out of the cache. The first of these keeps the window,
elsewhere, for the others may not have read it yet: a copy puts it in its place. (To read the state meanwhile takes more
registers than there are.) The output S_new^T q is taken from the decayed S as S^T q + (k.q) u, one pass for both reductions
over S. Rounds where the formulas round: the convolution, its silu, beta, the output, the normed number and its product with
the weight.

Bytes per sequence and head of 128: 128 KiB of state against 1.5 KiB of everything else. FLOPs: 7 Dk Dv: memory bound. Of a
single sequence, 48 heads are 6.3 MB, 1.5 us of an H200: there a launch costs more than the work, which is why the
convolution and the norm are in it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref import ops
from qwen_ref.errors import RequestError

from .gated_delta_rule import step
from .gated_rms_norm import gated_norm
from .launch import ANY, INSTINCT, on, require, supports, tuned

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.gated_delta_step
TOLERANCE = 2.0
MOST_NUMBERS = 128 * 128  # of a head's state, which stays in registers; the formula serves larger ones
# (device, numbers of the state, each side rounded up to a power of two, at least 1024) -> warps. 128 x 128 on 16 warps are
# 32 registers of a thread for the state, 128 with all else: one program to a multiprocessor, 64 KiB on their way. An Instinct's
# 16 warps are twice the threads, with half the registers each, and spill; its 8 are as many threads again.
TUNED: dict[tuple[str, Any], dict[str, int]] = {
    **{(ANY, 2**i): {"num_warps": 2**i // 1024} for i in range(10, 15)},
    (INSTINCT, 2**14): {"num_warps": 8},
}


def run(
    mixed: Tensor, window: Tensor, conv_weight: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor,
    z: Tensor, norm_weight: Tensor, eps: float, state: Tensor, activation: str = "silu",
) -> Tensor:  # fmt: skip
    """The signature of `ops.gated_delta_step`, every tensor of any strides; window, its weight and z of mixed's dtype, the
    state fp32. Writes window and state, and returns the output (B, P Dv)."""
    require("gated_delta_step", mixed, window, conv_weight, a, b, a_log, dt_bias, z, norm_weight, state)
    (batch, heads, width), dim, (channels, taps) = z.shape, state.shape[2], conv_weight.shape
    keys = channels - heads * width  # 2 G Dk
    wanted = {
        "mixed": (mixed, (batch, channels)), "window": (window, (batch, channels, taps)), "a": (a, (batch, heads)),
        "b": (b, (batch, heads)), "A_log": (a_log, (heads,)), "dt_bias": (dt_bias, (heads,)),
        "a norm weight": (norm_weight, (width,)), "a state": (state, (batch, heads, dim, width)),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise RequestError(f"the triton gated_delta_step needs {name} of shape {shape}, got {tuple(tensor.shape)}")
    if any(x.dtype != mixed.dtype for x in (window, conv_weight, z)):
        raise RequestError(
            f"the triton gated_delta_step needs window, convolution weight and z in mixed's {mixed.dtype}, got "
            f"{window.dtype}, {conv_weight.dtype} and {z.dtype}"
        )
    if state.dtype != torch.float32:
        raise RequestError(f"the triton gated_delta_step writes to the state, which must be float32; it is {state.dtype}")
    if dim == 0 or keys <= 0 or keys % (2 * dim) or heads % (keys // (2 * dim)):
        raise RequestError(
            f"the triton gated_delta_step needs channels 2 G {dim} + {heads} x {width}, G a divisor of {heads}; got {channels}"
        )
    if activation not in ("silu", "sigmoid"):
        raise RequestError(f"the triton gated_delta_step has no activation {activation!r}; it has silu and sigmoid")
    block_k, block_v = triton.next_power_of_2(dim), triton.next_power_of_2(width)
    if block_k * block_v > MOST_NUMBERS:
        return ORACLE(mixed, window, conv_weight, a, b, a_log, dt_bias, z, norm_weight, eps, state, activation)
    out, kept = mixed.new_empty(batch, heads * width), window.new_empty(window.shape)
    if state.numel() == 0:
        return out
    launch = tuned(TUNED, mixed.device, max(1024, block_k * block_v))
    with on(mixed.device):
        _step[(batch * heads,)](
            mixed, window, conv_weight, a, b, a_log, dt_bias, z, norm_weight, state, out, kept,
            eps, heads, heads * 2 * dim // keys, keys // 2, dim**-0.5,
            *mixed.stride(), *window.stride(), *conv_weight.stride(), *a.stride(), *b.stride(), a_log.stride(0),
            dt_bias.stride(0), *z.stride(), norm_weight.stride(0), *state.stride(),
            DK=dim, DV=width, TAPS=taps, BLOCK_K=block_k, BLOCK_V=block_v,
            SIGMOID=activation == "sigmoid", **launch,
        )  # fmt: skip
        window.copy_(kept)
    return out


@triton.jit
def _step(
    mixed, window, conv_weight, a, b, a_log, dt_bias, z, norm_weight, state, out, kept,
    eps, heads, ratio, keys, scale,
    m0, m1, w0, w1, w2, c0, c1, a0, a1, b0, b1, al0, dt0, z0, z1, z2, n0, s0, s1, s2, s3,
    DK: tl.constexpr, DV: tl.constexpr, TAPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SIGMOID: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    d, e = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    channels = 2 * keys + heads * DV
    mixed, window, kept = mixed + batch * m0, window + batch * w0, kept + batch * channels * TAPS
    first = head % ratio == 0  # of the value heads of its key head
    channel = head // ratio * DK + d  # of q; those of k and v follow
    query = convolve(mixed, window, conv_weight, kept, channel, d < DK, first, m1, w1, w2, c0, c1, TAPS)
    key = convolve(mixed, window, conv_weight, kept, keys + channel, d < DK, first, m1, w1, w2, c0, c1, TAPS)
    value = convolve(mixed, window, conv_weight, kept, 2 * keys + head * DV + e, e < DV, True, m1, w1, w2, c0, c1, TAPS)
    rate = tl.exp(tl.load(a_log + head * al0).to(tl.float32))
    step_size = softplus(tl.load(a + batch * a0 + head * a1).to(tl.float32) + tl.load(dt_bias + head * dt0).to(tl.float32))
    share = tl.sigmoid(tl.load(b + batch * b0 + head * b1).to(tl.float32)).to(b.dtype.element_ty).to(tl.float32)

    held = (d < DK)[:, None] & (e < DV)[None, :]
    state = state + batch * s0 + head * s1 + (d[:, None] * s2 + e[None, :] * s3)
    memory = tl.load(state, mask=held, other=0.0)  # (BLOCK_K, BLOCK_V)
    memory, result = step(memory, query, key, value, tl.exp(-rate * step_size), share, scale)
    tl.store(state, memory, mask=held)

    weight = tl.load(norm_weight + e * n0, mask=e < DV, other=0.0)  # (BLOCK_V,)
    gate = tl.load(z + batch * z0 + head * z1 + e * z2, mask=e < DV, other=0.0).to(tl.float32)
    result = result.to(out.dtype.element_ty).to(tl.float32)[None, :]  # (1, BLOCK_V)
    result = gated_norm(result, gate[None, :], weight, DV, eps, SIGMOID, out.dtype.element_ty)
    tl.store(out + tl.program_id(0).to(tl.int64) * DV + e[None, :], result.to(out.dtype.element_ty), mask=(e < DV)[None, :])


@triton.jit
def convolve(mixed, window, weight, kept, channel, inside, keep, m1, w1, w2, c0, c1, TAPS: tl.constexpr):
    """silu of the convolution of these channels, fp32 as rounded; the window after it goes to `kept` if they are to keep."""
    total = tl.zeros(channel.shape, tl.float32)
    for tap in tl.static_range(TAPS):  # a tile of channels and taps would give the state its own layout, and move it
        source = mixed + channel * m1 if tap == TAPS - 1 else window + channel * w1 + (tap + 1) * w2
        taken = tl.load(source, mask=inside, other=0.0)
        tl.store(kept + channel * TAPS + tap, taken, mask=inside & keep)
        total += taken.to(tl.float32) * tl.load(weight + channel * c0 + tap * c1, mask=inside, other=0.0).to(tl.float32)
    return silu(total, mixed.dtype.element_ty)


@triton.jit
def silu(values, dtype: tl.constexpr):
    """silu of fp32 values, rounded to dtype before and after it. fp32."""
    values = values.to(dtype).to(tl.float32)
    return (values * tl.sigmoid(values)).to(dtype).to(tl.float32)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), fp32: max(x, 0) + log1p(exp(-|x|)), where log1p(e) = 2 artanh(e / (2 + e)), whose series is all of fp32
    for e <= 1 after eight terms. A logarithm of 1 + e has lost small e already."""
    e = tl.exp(-tl.abs(x))
    y = e / (2.0 + e)
    s = y * y
    series = 1.0 / 15.0
    for n in tl.static_range(13, 0, -2):
        series = series * s + 1.0 / n
    return tl.maximum(x, 0.0) + 2.0 * y * series
