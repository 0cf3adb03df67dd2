"""causal_conv1d in Triton: a short convolution over time with its silu, and the window after it, in one pass.

Algorithm: the definition, with a program for a block of tokens and channels. It reads its tile once per tap, each time one
token further on, all but the first time from the L1 cache; what lies before the first token comes from the state. The
programs of the last tokens also write the window. The sum is fp32, and rounded before silu and after it.

Bytes: 2 B T C elements, 2 B C W for the windows. FLOPs: 2 W + 4 per number: memory bound.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qwen_ref import ops
from qwen_ref.errors import RequestError

from .launch import ANY, on, require, supports, tuned

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.causal_conv1d
TOLERANCE = 2.0
# (device, many tokens) -> tokens and channels of a program, warps
TUNED = {
    (ANY, True): {"BLOCK_T": 16, "BLOCK_C": 128, "num_warps": 8},
    (ANY, False): {"BLOCK_T": 1, "BLOCK_C": 256, "num_warps": 4},
}


def run(x: Tensor, weight: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (B, T, C), weight (C, W), state (B, C, W) or None, all of one dtype and any strides. Returns (B, T, C), (B, C, W)."""
    require("causal_conv1d", x, weight, *(() if state is None else (state,)))
    (batch, length, channels), taps = x.shape, weight.shape[1]
    shapes = weight.shape == (channels, taps) and (state is None or state.shape == (batch, channels, taps))
    if not shapes or taps == 0 or weight.dtype != x.dtype or (state is not None and state.dtype != x.dtype):
        raise RequestError(
            f"the triton causal_conv1d needs a weight (C, W) and a state (B, C, W) for x (B, T, C), all of one dtype; got "
            f"{tuple(weight.shape)} {weight.dtype}, {None if state is None else (tuple(state.shape), state.dtype)}, "
            f"{tuple(x.shape)} {x.dtype}"
        )
    out, after = x.new_empty(x.shape), x.new_empty(batch, channels, taps)
    if after.numel() == 0:
        return out, after
    launch = tuned(TUNED, x.device, length > 8)
    blocks = max(1, triton.cdiv(length, launch["BLOCK_T"]))  # without tokens the window is still to be written
    with on(x.device):
        _causal_conv1d[(batch * blocks, triton.cdiv(channels, launch["BLOCK_C"]))](
            x, weight, state, out, after, length, channels, blocks,
            *x.stride(), *weight.stride(), *((0, 0, 0) if state is None else state.stride()), *out.stride(), *after.stride(),
            TAPS=taps, **launch,
        )  # fmt: skip
    return out, after


@triton.jit
def _causal_conv1d(
    x, weight, state, out, after, length, channels, blocks,
    x0, x1, x2, w0, w1, s0, s1, s2, o0, o1, o2, a0, a1, a2,
    TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    time = block * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)  # (BLOCK_T,)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)  # (BLOCK_C,)
    real = channel < channels
    x += batch * x0
    if state is not None:
        state += batch * s0
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for tap in tl.static_range(TAPS):
        taken = inputs(x, state, time + (tap + 1 - TAPS), channel, real, time < length, x1, x2, s1, s2, TAPS)
        total += taken.to(tl.float32) * tl.load(weight + channel * w0 + tap * w1, mask=real, other=0.0).to(tl.float32)[None, :]
    total = total.to(x.dtype.element_ty).to(tl.float32)
    target = out + batch * o0 + time[:, None] * o1 + channel[None, :] * o2
    tl.store(target, (total * tl.sigmoid(total)).to(x.dtype.element_ty), mask=(time < length)[:, None] & real[None, :])
    if block == blocks - 1:
        one = tl.zeros((1,), tl.int64)
        for tap in tl.static_range(TAPS):
            kept = inputs(x, state, one + length + (tap - TAPS), channel, real, one == 0, x1, x2, s1, s2, TAPS)
            tl.store(after + batch * a0 + channel[None, :] * a1 + tap * a2, kept, mask=real[None, :])


@triton.jit
def inputs(x, state, time, channel, real, wanted, x1, x2, s1, s2, TAPS: tl.constexpr):
    """The tokens `time` of x, those before its first out of the state: (times, channels)."""
    now = (wanted & (time >= 0))[:, None] & real[None, :]
    taken = tl.load(x + time[:, None] * x1 + channel[None, :] * x2, mask=now, other=0.0)
    if state is not None:
        before = (wanted & (time < 0))[:, None] & real[None, :]
        taken += tl.load(state + channel[None, :] * s1 + (TAPS + time)[:, None] * s2, mask=before, other=0.0)
    return taken
