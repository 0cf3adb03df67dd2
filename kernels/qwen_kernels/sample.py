"""sample in Triton: top-k and top-p without sorting, one program per row.

Algorithm: the set that stays is {logit >= threshold}, and both thresholds are of one kind: the smallest number above
which there lies less than a bound, counted in tokens (top-k: k) or in probability (top-p: the share p of what top-k
left). Such a number is found by bisection, as in the sorting-free samplers of FlashInfer (Ye et al. 2025), but on the
logits' bits read as integers in the same order, so that it ends, exactly, after a bounded number of passes.

A pass streams the row, which stays in the L2 cache, and weighs it above 8 pivots at once, in registers: the bracket
shrinks 9-fold. More pivots would cost more arithmetic than the passes they save (8 pivots: 2.5 comparisons and sums
per bit, 16: 3.9), fewer would read and exponentiate more often. The 32 bits of fp32 take at most 11 passes, the 16 of
bfloat16 6, the 19 that float16 uses 7. The brackets start narrow: as many tokens as there are lanes reach the smallest
of the lanes' maxima, and tokens less likely than (1 - p) / V cannot matter to top-p. (Normally distributed logits: 2 to
5 passes for bfloat16, 7 to 10 for fp32, for each of the two.) A row without top-k and top-p skips all of it.

The choice is a running sum in the order of the vocabulary: of whole blocks, until one passes uniform * total, and then
within that block. All sums have a fixed order: the same row gives the same token, in any batch.

Bytes: B V elements once from memory, then once per pass from the L2 cache. FLOPs: per pass and logit about 20
and one exponential. Bound by one multiprocessor's arithmetic: a few rows take as long as a GPU full of them, and a
single row gains little over sorting. Ties in the threshold's bits are ties of logits, also where probabilities round
to the same number or to zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref import ops
from qwen_ref.errors import RequestError

from .launch import ANY, on, require, supports, tuned

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.sample
TOLERANCE = 2.0
# Logits per step and warps: 4 logits a thread, each against 8 pivots; more do not fit the registers
TUNED = {(ANY, "rows"): {"BLOCK": 2048, "num_warps": 16}}
UNUSED = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}  # low bits of the fp32 image that are all alike


def run(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """logits (B, V), any strides; temperature, top_p, uniform (B,) fp32; top_k (B,) int32. Returns (B,) int64."""
    require("sample", logits, temperature, top_k, top_p, uniform)
    count, width = logits.shape
    for name, tensor, dtype in (
        ("temperature", temperature, torch.float32), ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32), ("uniform", uniform, torch.float32),
    ):  # fmt: skip
        if tensor.shape != (count,) or tensor.dtype != dtype:
            raise RequestError(
                f"the triton sample needs {name} ({count},) in {dtype}, got {tuple(tensor.shape)} in {tensor.dtype}"
            )
    if width == 0:
        raise RequestError("the triton sample needs a vocabulary")
    out = torch.empty(count, dtype=torch.int64, device=logits.device)
    if count == 0:
        return out
    launch = tuned(TUNED, logits.device, "rows")
    with on(logits.device):
        _sample[(count,)](
            logits, temperature, top_k, top_p, uniform, out, width, *logits.stride(),
            temperature.stride(0), top_k.stride(0), top_p.stride(0), uniform.stride(0),
            UNUSED=UNUSED[logits.dtype], PIVOTS=8, **launch,
        )  # fmt: skip
    return out


@triton.jit
def _sample(
    logits, temperature, top_k, top_p, uniform, out, width, stride0, stride1, temperature0, top_k0, top_p0, uniform0,
    UNUSED: tl.constexpr, PIVOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row = logits + b * stride0
    heat = tl.load(temperature + b * temperature0)
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)  # every lane's largest logit, and where it first is
    place = lane
    for start in range(0, width, BLOCK):
        x = read(row, start, width, stride1, BLOCK)
        place = tl.where(x > best, start + lane, place)
        best = tl.maximum(best, x)
    peak = tl.max(best, axis=0)
    token = tl.min(tl.where(best == peak, place, width), axis=0)
    if heat != 0:
        token = drawn(
            row, width, stride1, peak, tl.min(best, axis=0), tl.maximum(heat, 1e-37), tl.load(top_k + b * top_k0),
            tl.load(top_p + b * top_p0), tl.load(uniform + b * uniform0), UNUSED, PIVOTS, BLOCK,
        )  # fmt: skip
    tl.store(out + b, token.to(tl.int64))


@triton.jit
def drawn(
    row, width, stride, peak, smallest, heat, top_k, top_p, uniform,
    UNUSED: tl.constexpr, PIVOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The chosen token. `smallest` is a number that at least BLOCK logits reach, or -inf."""
    highest = key_of(peak, UNUSED).to(tl.int64)
    threshold = tl.full((), -0x7F800001 >> UNUSED, tl.int64)  # the key of -inf: all stay
    _, kept, _ = tally(row, width, stride, peak, heat, threshold, UNUSED, BLOCK)
    if (top_k > 0) & (top_k < width):
        below = tl.where(top_k <= BLOCK, key_of(smallest, UNUSED).to(tl.int64), threshold) - 1
        threshold = lowest(row, width, stride, peak, heat, below, highest, top_k, False, UNUSED, PIVOTS, BLOCK)
        more, kept, _ = tally(row, width, stride, peak, heat, threshold + 1, UNUSED, BLOCK)
        kept += (top_k - more) * weight_of(logit_of(threshold, UNUSED), peak, heat)  # of the ties, what makes k
    if top_p < 1:
        # All tokens below `floor` together weigh less than (1 - top_p) of the sum, which is at least 1; e to spare.
        floor = peak + heat * (tl.log((1 - top_p) / width) - 1)
        below = tl.maximum(key_of(floor, UNUSED).to(tl.int64), threshold) - 1
        threshold = lowest(row, width, stride, peak, heat, below, highest, top_p * kept, True, UNUSED, PIVOTS, BLOCK)
    _, kept, last = tally(row, width, stride, peak, heat, threshold, UNUSED, BLOCK)
    return first_past(row, width, last, stride, peak, heat, threshold, uniform * kept, UNUSED, BLOCK)


@triton.jit
def read(row, start, width, stride, BLOCK: tl.constexpr):
    """The next BLOCK logits, fp32; -inf past the end. No -0: it equals 0 and must have its bits."""
    lane = tl.arange(0, BLOCK)
    source = row + tl.cast(start, tl.int64) * stride + lane * stride
    x = tl.load(source, mask=start + lane < width, other=float("-inf")).to(tl.float32)
    return tl.where(x == 0, 0.0, x)


@triton.jit
def key_of(x, UNUSED: tl.constexpr):
    """An int32 in the order of the logits: the bits of an fp32, those of the magnitude inverted where it is negative."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> UNUSED


@triton.jit
def logit_of(key, UNUSED: tl.constexpr):
    """The logit of a key."""
    key = key.to(tl.int32)
    bits = key << UNUSED
    bits = tl.where(key < 0, (bits | ((1 << UNUSED) - 1)) ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def weight_of(x, peak, heat):
    """The probability, but for the sum of all: exactly 1 at the peak. The difference first, for it is nearly exact."""
    return tl.exp((x - peak) / heat)


@triton.jit
def kept_weights(row, start, width, stride, peak, heat, threshold, UNUSED: tl.constexpr, BLOCK: tl.constexpr):
    """The weights of the next BLOCK tokens, 0 below the threshold."""
    x = read(row, start, width, stride, BLOCK)
    return tl.where(key_of(x, UNUSED) >= threshold, weight_of(x, peak, heat), 0.0)


@triton.jit
def tally(row, width, stride, peak, heat, threshold, UNUSED: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens reach the threshold (those of weight 0 aside), what they weigh, and where their last block starts."""
    count, weight, last = 0, 0.0, 0
    for start in range(0, width, BLOCK):
        weights = kept_weights(row, start, width, stride, peak, heat, threshold, UNUSED, BLOCK)
        found = tl.sum((weights > 0).to(tl.int32), axis=0)
        count += found
        weight += tl.sum(weights, axis=0)
        last = tl.where(found > 0, start, last)
    return count, weight, last


@triton.jit
def lowest(
    row, width, stride, peak, heat, below, high, bound,
    WEIGH: tl.constexpr, UNUSED: tl.constexpr, PIVOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The lowest key in below + 1 .. high above which there is less than `bound`: the tokens' weight, or their number."""
    while high - below > 1:
        pivots = below + (high - below) * (tl.arange(0, PIVOTS) + 1) // (PIVOTS + 1)  # (PIVOTS,) in below .. high - 1
        above = tl.zeros((PIVOTS, BLOCK), tl.float32 if WEIGH else tl.int32)
        for start in range(0, width, BLOCK):
            x = read(row, start, width, stride, BLOCK)
            over = key_of(x, UNUSED)[None, :] > pivots.to(tl.int32)[:, None]
            if WEIGH:
                above += tl.where(over, weight_of(x, peak, heat)[None, :], 0.0)
            else:
                above += over.to(tl.int32)
        fits = tl.sum(above, axis=1) < bound
        high = tl.min(tl.where(fits, pivots, high), axis=0)
        below = tl.max(tl.where(fits, below, pivots), axis=0)
    return high


@triton.jit
def first_past(row, width, last, stride, peak, heat, threshold, target, UNUSED: tl.constexpr, BLOCK: tl.constexpr):
    """The first token at which the running sum of the kept weights passes the target; `last` is their last block."""
    start, before = 0, 0.0
    weights = kept_weights(row, start, width, stride, peak, heat, threshold, UNUSED, BLOCK)
    while (before + tl.sum(weights, axis=0) <= target) & (start < last):
        before += tl.sum(weights, axis=0)
        start += BLOCK
        weights = kept_weights(row, start, width, stride, peak, heat, threshold, UNUSED, BLOCK)
    lane = tl.arange(0, BLOCK)
    passed = before + tl.cumsum(weights, axis=0) > target
    final = tl.max(tl.where(weights > 0, lane, 0), axis=0)  # where the scan rounds below the block's sum
    return start + tl.min(tl.where(passed & (weights > 0), lane, final), axis=0)
