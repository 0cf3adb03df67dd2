"""norm_rope_write in Triton: q, k and v are read once and written once, to the result and to the caches.

Algorithm: RMSNorm of every head (Zhang & Sennrich 2019), rotation in the half-split convention (Su et al. 2021), and
the store into the cache, which paged caches address by slot (Kwon et al. 2023). A program takes one token and a block
of heads, all of q, of k or of v; both halves of a head are in its registers, and behind them what of it is not turned. It
rounds where the formulas round: the normed number, its product with the weight, and each product of the rotation. Two tokens
with the same slot would race.

Bytes: 2 M (N + 2 K) D elements, 2 M R for the tables, 8 M for the slots. FLOPs: 7 M (N + K) D: memory bound.
The tables are read once per block of heads, from memory the first time and then from the L2 cache.
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

ORACLE = ops.norm_rope_write
TOLERANCE = 2.0
# (device, half of a head as its tiles hold it, a power of two, at least 32) -> heads per program and warps. 8 heads of 128 are
# the k or v of one token of most models, and two 16-byte loads for each of 64 threads.
TUNED = {(ANY, half): {"HEADS": max(1, 512 // half), "num_warps": max(2, half // 64)} for half in (2**i for i in range(5, 11))}


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    centred: bool = False,
) -> Tensor:
    """The signature of `ops.norm_rope_write`, every tensor of any strides and all of q's dtype. Fills both caches."""
    weights = [w for w in (q_weight, k_weight) if w is not None]
    require("norm_rope_write", q, k, v, cos, sin, k_cache, v_cache, slots, *weights)
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    entries, turned = k_cache.shape[2], cos.shape[-1]
    wanted = {
        "k": (k, (tokens, kv_heads, dim)), "v": (v, (tokens, kv_heads, dim)),
        "cos": (cos, (tokens, turned)), "sin": (sin, (tokens, turned)),
        "k_cache": (k_cache, (k_cache.shape[0], kv_heads, entries, dim)), "v_cache": (v_cache, tuple(k_cache.shape)),
        **{f"weight {i}": (w, (dim,)) for i, w in enumerate(weights)},
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape or tensor.dtype != q.dtype:
            raise RequestError(
                f"the triton norm_rope_write needs {name} of shape {shape} in {q.dtype} beside q {tuple(q.shape)}, "
                f"got {tuple(tensor.shape)} in {tensor.dtype}"
            )
    if slots.shape != (tokens,) or slots.dtype != torch.int64:
        raise RequestError(f"the triton norm_rope_write needs {tokens} int64 slots, got {tuple(slots.shape)} {slots.dtype}")
    if turned % 2 or not 0 < turned <= dim <= 2048:
        raise RequestError(
            f"the triton norm_rope_write needs heads of up to 2048 numbers, an even count turned, got {dim} and {turned}"
        )
    out = q.new_empty(q.shape)
    if tokens == 0:
        return out
    half = max(16, triton.next_power_of_2(turned // 2))
    rest = max(16, triton.next_power_of_2(dim - turned)) if turned < dim else 0
    launch = tuned(TUNED, q.device, min(max(32, triton.next_power_of_2(half + rest // 2)), 1024))
    q_blocks, kv_blocks = (triton.cdiv(count, launch["HEADS"]) for count in (heads, kv_heads))
    none = q.new_empty(0)  # in the place of an absent weight: never read
    with on(q.device):
        _norm_rope_write[(tokens * (q_blocks + 2 * kv_blocks),)](
            q, k, v, none if q_weight is None else q_weight, none if k_weight is None else k_weight, eps,
            cos, sin, k_cache, v_cache, slots, out, heads, kv_heads, turned // 2, dim, entries, q_blocks, kv_blocks,
            *q.stride(), *k.stride(), *v.stride(), *cos.stride(), *sin.stride(),
            *k_cache.stride(), *v_cache.stride(), slots.stride(0), *out.stride(),
            0 if q_weight is None else q_weight.stride(0), 0 if k_weight is None else k_weight.stride(0),
            Q_NORM=q_weight is not None, K_NORM=k_weight is not None, CENTRED=centred,
            HALF=half, REST=rest, **launch,
        )  # fmt: skip
    return out


@triton.jit
def _norm_rope_write(
    q, k, v, q_weight, k_weight, eps, cos, sin, k_cache, v_cache, slots, out,
    heads, kv_heads, half, dim, entries, q_blocks, kv_blocks,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, c0, c1, s0, s1,
    kc0, kc1, kc2, kc3, vc0, vc1, vc2, vc3, slots0, o0, o1, o2, qw0, kw0,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, CENTRED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    blocks = q_blocks + 2 * kv_blocks  # one token's programs follow each other, as its numbers do in memory
    token, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    cos, sin = cos + token * c0, sin + token * s0
    if block < q_blocks:
        head = (block * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)  # (HEADS, 1)
        carry(q + token * q0 + head * q1, q2, out + token * o0 + head * o1, o2, head < heads, q_weight, qw0, eps,
              cos, c1, sin, s1, half, dim, Q_NORM, CENTRED, True, HALF, REST)  # fmt: skip
    else:
        slot = tl.load(slots + token * slots0)
        if slot >= 0:
            row, entry = slot // entries, slot % entries
            block -= q_blocks
            if block < kv_blocks:
                head = (block * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)
                carry(k + token * k0 + head * k1, k2, k_cache + row * kc0 + head * kc1 + entry * kc2, kc3, head < kv_heads,
                      k_weight, kw0, eps, cos, c1, sin, s1, half, dim, K_NORM, CENTRED, True, HALF, REST)  # fmt: skip
            else:
                head = ((block - kv_blocks) * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)
                carry(v + token * v0 + head * v1, v2, v_cache + row * vc0 + head * vc1 + entry * vc2, vc3, head < kv_heads,
                      k_weight, kw0, eps, cos, c1, sin, s1, half, dim, False, False, False, HALF, REST)  # fmt: skip


@triton.jit
def carry(source, s3, target, t3, exists, weight, w0, eps, cos, c1, sin, s1, half, dim, NORM: tl.constexpr,
          CENTRED: tl.constexpr, ROTATE: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    """A block of heads, (HEADS, 1) pointers, from source to target: normed and rotated on the way."""
    dtype: tl.constexpr = source.dtype.element_ty
    j = tl.arange(0, HALF)[None, :]  # (1, HALF), the pair (x_j, x_{j + R/2})
    inside = exists & (j < half)
    first, second = load_pair(source + j * s3, half * s3, inside)
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    if REST:  # of a head that is not turned
        r = 2 * half + tl.arange(0, REST)[None, :]
        behind = exists & (r < dim)
        rest = tl.load(source + r * s3, mask=behind, other=0.0).to(tl.float32)  # (HEADS, REST)
        squares += tl.sum(rest * rest, axis=1)
    if NORM:
        scale = tl.rsqrt(squares / dim + eps)[:, None]
        low, high = load_pair(weight + j * w0, half * w0, j < half)
        first, second = weigh(first * scale, low, CENTRED, dtype), weigh(second * scale, high, CENTRED, dtype)
        if REST:
            rest = weigh(rest * scale, tl.load(weight + r * w0, mask=r < dim, other=0.0).to(tl.float32), CENTRED, dtype)
    if ROTATE:
        first, second = rotate_pair(first, second, cos, c1, sin, s1, j, half, dtype)
    tl.store(target + j * t3, first.to(target.dtype.element_ty), mask=inside)
    tl.store(target + (half + j) * t3, second.to(target.dtype.element_ty), mask=inside)
    if REST:
        tl.store(target + r * t3, rest.to(target.dtype.element_ty), mask=behind)


@triton.jit
def load_pair(source, apart, inside):
    """Both halves of every head, fp32: (HEADS, HALF) each."""
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(source + apart, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def weigh(normed, weight, CENTRED: tl.constexpr, dtype: tl.constexpr):
    """The end of `rms_norm`, rounded to dtype before the weight and after it, or of `zero_centred_rms_norm`, only after."""
    normed = normed * (1.0 + weight) if CENTRED else normed.to(dtype).to(tl.float32) * weight
    return normed.to(dtype).to(tl.float32)


@triton.jit
def rotate_pair(first, second, cos, c1, sin, s1, j, half, dtype: tl.constexpr):
    """`rope` of every head: each product rounded to dtype."""
    cos_first, cos_second = load_pair(cos + j * c1, half * c1, j < half)
    sin_first, sin_second = load_pair(sin + j * s1, half * s1, j < half)
    low = (first * cos_first).to(dtype).to(tl.float32) - (second * sin_first).to(dtype).to(tl.float32)
    high = (second * cos_second).to(dtype).to(tl.float32) + (first * sin_second).to(dtype).to(tl.float32)
    return low, high
