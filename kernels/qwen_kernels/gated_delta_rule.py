"""gated_delta_rule in Triton: in chunks of 64 tokens with the state in registers, and token by token where there are few.

Algorithm: the chunk-wise form of `ops.gated_delta_chunked` (Yang et al. 2024, arXiv 2406.06484 and 2412.06464), in two
kernels. `_prepare` makes what needs no state, for all chunks at the same time: with s the running sum of g in a chunk,

    L = strict tril(beta K K^T D)    X = (I + L)^-1 diag(beta)    A = tril(Q K^T D)    D_ij = exp(s_i - s_j)

`_carry` takes a head and a block of its value numbers through all chunks, the state S never leaving the registers:

    U = X (V - exp(s) K S)    O = exp(s) Q S + A U    S <- exp(s_last) S + K^T (exp(s_last - s) U)

The lengths of q and k are factors of rows, exact in fp32; so K and Q enter the products as they are in memory.

The inverse is that of a block triangular matrix, blocks of 1, 2, 4 ... 32 joined two by two (Borodin & Munro 1975):
B^-1 and A^-1 known, the corner is -B^-1 C A^-1, two products for all pairs of blocks at once. |beta| <= 1 and g <= 0 bound
every entry on the way by one, for it is a product of contractions between two unit keys. So fp16 holds them, and errs by
2^-12; one step of Newton's iteration with a residual of 22 bits squares that, which leaves the error of a solve in fp32.
(Powers of L, the series for the inverse, would grow like binomials and cancel.) With fp32 inputs all products are fp32.

Bytes per chunk and head with 16-bit numbers: X and A, 16 KiB, are written and read; q, k, v and o pass once (q and k of a
key head also feed the other value heads, from the cache). FLOPs of D = 128: 5.2 M in `_carry`, 2.1 M in `_prepare` and
7.3 M for the inverse. 16k tokens of 48 heads: 1.1 GB, 0.18 TFLOP. What bounds it is the chain of T / 64 steps of `_carry`,
of three products each waiting for the last; hence blocks of values so small that a step has all multiprocessors.

No result of a product is transposed: that is what Triton 3.4 to 3.7 was seen to miscompile on Hopper in other people's
kernels of this rule. In fp16 the products read a state rounded to fp16, whose range it must keep to.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref import ops
from qwen_ref.errors import RequestError

from .launch import ANY, on, require, supports, tuned

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.gated_delta_rule
TOLERANCE = 2.0
TOLERANCE_FP32 = 3.0  # 2.6 in Triton's interpreter, whose exp is NumPy's: the state is a product of many
FEW = 16  # tokens that go one by one: a chunk costs as much however few it holds
CHUNK = 64
HOPPER, AMPERE = ("NVIDIA H100 80GB HBM3", "NVIDIA H200"), "NVIDIA A100-SXM4-80GB"
EPS = tl.constexpr(1e-6)  # of `ops.l2_norm`
# (device, kernel, and where a tile holds whole keys Dk rounded up to 128 or 256) -> warps, stages; of `_carry` the most value
# numbers in a block and how many programs to aim for, one for each multiprocessor. K, Q, X, A and V are 56 KiB, more than
# once of which is more than an MI300 has.
TUNED: dict[tuple[str, Any], dict[str, int]] = {
    **{(device, "prepare"): {"num_warps": warps, "num_stages": 1}
       for device, warps in ((ANY, 8), *((name, 4) for name in HOPPER))},
    **{(device, ("carry", 128)): {"MOST": most, "PROGRAMS": programs, "num_warps": 4, "num_stages": stages}
       for device, most, programs, stages in (
           (ANY, 32, 132, 1), (AMPERE, 32, 216, 2), *((name, 64, 132, 3) for name in HOPPER))},
    (ANY, ("carry", 256)): {"MOST": 16, "PROGRAMS": 132, "num_warps": 8, "num_stages": 1},
    **{(ANY, ("steps", dim)): {"BLOCK_V": 32, "num_warps": 4} for dim in (128, 256)},
}  # fmt: skip


def run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q, k (B, T, G, Dk); v (B, T, P, Dv); g, beta (B, T, P), g <= 0, 0 <= beta <= 1; state (B, P, Dk, Dv) or None. Any
    strides. Returns o (B, T, P, Dv) in v's dtype and the state after it, fp32."""
    require("gated_delta_rule", q, k, v, g, beta, *(() if state is None else (state,)))
    check(q, k, v, g, beta, state)
    (batch, length, heads, width), (groups, dim) = v.shape, k.shape[2:]
    out = v.new_empty(v.shape)
    after = torch.empty(batch, heads, dim, width, dtype=torch.float32, device=v.device)
    if after.numel() == 0:
        return out, after
    block_k = max(128, triton.next_power_of_2(dim))
    before = (0, 0, 0, 0) if state is None else state.stride()
    with on(v.device):
        if length <= FEW or v.dtype == torch.float32:
            launch = tuned(TUNED, v.device, ("steps", block_k))
            _steps[(batch * heads, triton.cdiv(width, launch["BLOCK_V"]))](
                q, k, v, g, beta, state, out, after, length, heads, heads // groups, dim**-0.5,
                *q.stride(), *k.stride(), *v.stride(), *g.stride(), *beta.stride(), *before, *out.stride(), *after.stride(),
                DK=dim, DV=width, BLOCK_K=block_k, **launch,
            )  # fmt: skip
            return out, after
        chunks = triton.cdiv(length, CHUNK)
        solved, pattern = (v.new_empty(batch * heads, chunks, CHUNK, CHUNK) for _ in range(2))
        scales = torch.empty(batch * heads, chunks, 4, CHUNK, dtype=torch.float32, device=v.device)
        launch = tuned(TUNED, v.device, "prepare")
        _prepare[(batch * chunks * heads,)](
            q, k, g, beta, solved, pattern, scales, length, chunks, heads, heads // groups, dim**-0.5,
            *q.stride(), *k.stride(), *g.stride(), *beta.stride(),
            DK=dim, BLOCK_K=64, CHUNK=CHUNK, **launch,
        )  # fmt: skip
        launch = dict(tuned(TUNED, v.device, ("carry", block_k)))
        block_v = block_of(width, batch * heads, launch.pop("MOST"), launch.pop("PROGRAMS"))
        _carry[(batch * heads * triton.cdiv(width, block_v),)](
            q, k, v, solved, pattern, scales, state, out, after, length, chunks, heads, heads // groups,
            *q.stride(), *k.stride(), *v.stride(), *before, *out.stride(), *after.stride(),
            DK=dim, DV=width, BLOCK_K=block_k, BLOCK_V=block_v, CHUNK=CHUNK, **launch,
        )  # fmt: skip
    return out, after


def check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> None:
    """Raises RequestError unless the arguments belong together."""
    (batch, length, heads, width), (groups, dim) = v.shape, k.shape[2:]
    keys, gates = (batch, length, groups, dim), (batch, length, heads)
    if q.shape != keys or k.shape != keys or g.shape != gates or beta.shape != gates or {q.dtype, k.dtype} != {v.dtype}:
        raise RequestError(
            f"the triton gated_delta_rule needs q and k (B, T, G, Dk), g and beta (B, T, P) for v (B, T, P, Dv), q, k and v of "
            f"one dtype; got {', '.join(f'{tuple(x.shape)} {x.dtype}' for x in (q, k, g, beta, v))}"
        )
    if groups == 0 or heads % groups or not 0 < dim <= 256:
        raise RequestError(
            f"the triton gated_delta_rule needs key heads of at most 256 numbers that divide the value heads, got "
            f"{groups} of {dim} for {heads}"
        )
    if state is not None and state.shape != (batch, heads, dim, width):
        raise RequestError(f"the triton gated_delta_rule needs a state {(batch, heads, dim, width)}, got {tuple(state.shape)}")


def block_of(width: int, heads: int, most: int, programs: int) -> int:
    """The fewest value numbers per program with which there are no more than `programs` programs, 16 to `most`."""
    block = 16
    while block < min(most, width) and heads * triton.cdiv(width, block) > programs:
        block *= 2
    return block


@triton.jit
def _prepare(
    q, k, g, beta, solved, pattern, scales, length, chunks, heads, ratio, scale,
    q0, q1, q2, q3, k0, k1, k2, k3, g0, g1, g2, b0, b1, b2,
    DK: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # heads vary fastest: those of a key head share its tiles in the cache
    head, chunk, batch = program % heads, program // heads % chunks, program // heads // chunks
    i = tl.arange(0, CHUNK)
    time = chunk * CHUNK + i  # (CHUNK,)
    real = time < length  # what is behind the end does not decay (g 0) and writes nothing (beta 0)
    q += batch * q0 + chunk * CHUNK * q1 + head // ratio * q2
    k += batch * k0 + chunk * CHUNK * k1 + head // ratio * k2
    key_square, query_square = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    alike, seen = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
    for start in range(0, DK, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        inside = real[:, None] & (d < DK)[None, :]
        key = tl.load(k + i[:, None] * k1 + d[None, :] * k3, mask=inside, other=0.0)  # (CHUNK, BLOCK_K)
        query = tl.load(q + i[:, None] * q1 + d[None, :] * q3, mask=inside, other=0.0)
        key_square, query_square = key_square + squares(key), query_square + squares(query)
        alike, seen = tl.dot(key, tl.trans(key), alike), tl.dot(query, tl.trans(key), seen)
    key_scale = tl.where(key_square > 0, tl.rsqrt(key_square + EPS), 0.0)  # (CHUNK,)
    query_scale = tl.rsqrt(query_square + EPS) * scale
    decay = tl.load(g + batch * g0 + time * g1 + head * g2, mask=real, other=0.0).to(tl.float32)
    share = tl.load(beta + batch * b0 + time * b1 + head * b2, mask=real, other=0.0).to(tl.float32)
    # The sum in two parts, multiples of 1/256 and the rest, so that a difference of sums is as exact as the terms between:
    # a token that forgets all (-128 is exp's end) must not cost the others their last bits.
    decay = tl.maximum(decay, -128.0)
    coarse = tl.floor(decay * 256.0) / 256.0
    coarse, fine = tl.cumsum(coarse, axis=0), tl.cumsum(decay - coarse, axis=0)
    between = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])  # (CHUNK, CHUNK)
    between = tl.exp(tl.where(i[:, None] >= i[None, :], between, float("-inf")))
    between *= key_scale[None, :]

    tile = (batch * heads + head) * chunks + chunk
    solved, pattern = solved + tile * CHUNK * CHUNK, pattern + tile * CHUNK * CHUNK
    square = i[:, None] * CHUNK + i[None, :]
    tl.store(pattern + square, (seen * between * query_scale[:, None]).to(k.dtype.element_ty))
    lower = tl.where(i[:, None] > i[None, :], alike * between * (share * key_scale)[:, None], 0.0)
    tl.store(solved + square, (inverse(lower, 6) * share[None, :]).to(k.dtype.element_ty))
    total = coarse + fine
    last_coarse, last_fine = tl.sum(tl.where(i == CHUNK - 1, coarse, 0.0), 0), tl.sum(tl.where(i == CHUNK - 1, fine, 0.0), 0)
    left = tl.exp((last_coarse - coarse) + (last_fine - fine))  # of a write, at the end of the chunk
    size = tl.max(key_scale, axis=0)  # keys far from unit length must not take what they write out of fp16's range
    size = tl.where(size > 0, tl.exp2(tl.floor(tl.log2(size))), 1.0)
    scales += tile * 4 * CHUNK + i
    tl.store(scales, tl.exp(total) * key_scale)
    tl.store(scales + CHUNK, tl.exp(total) * query_scale)
    tl.store(scales + 2 * CHUNK, left * (key_scale / size))
    tl.store(scales + 3 * CHUNK, tl.where(i == 0, tl.exp(last_coarse + last_fine) / size, size))


@triton.jit
def squares(rows):
    """The square of every row's length, fp32."""
    wide = rows.to(tl.float32)
    return tl.sum(wide * wide, axis=1)


@triton.jit
def inverse(lower, LEVELS: tl.constexpr):
    """(I + lower)^-1, fp32, of a strictly lower triangular matrix of 2^LEVELS rows."""
    i, j = tl.arange(0, 2**LEVELS)[:, None], tl.arange(0, 2**LEVELS)[None, :]
    identity = (i == j).to(tl.float32)
    found = identity - tl.where(i // 2 == j // 2, lower, 0.0)  # blocks of two
    for level in range(1, LEVELS):  # from blocks of 2^level to blocks of twice as many
        corner = (i >> (level + 1) == j >> (level + 1)) & (i >> level != j >> level)
        corners = tl.where(corner, lower, 0.0).to(tl.float16)
        half = tl.dot(found.to(tl.float16), corners).to(tl.float16)
        found -= tl.dot(half, found.to(tl.float16))
    high, lower_high = found.to(tl.float16), lower.to(tl.float16)
    low, lower_low = (found - high.to(tl.float32)).to(tl.float16), (lower - lower_high.to(tl.float32)).to(tl.float16)
    product = tl.dot(lower_high, high, tl.dot(lower_high, low, tl.dot(lower_low, high)))  # the small terms first
    error = identity - found - product  # I - (I + lower) found
    return found + tl.dot(high, error.to(tl.float16))


@triton.jit
def _carry(
    q, k, v, solved, pattern, scales, state, out, after, length, chunks, heads, ratio,
    q0, q1, q2, q3, k0, k1, k2, k3, v0, v1, v2, v3, s0, s1, s2, s3, o0, o1, o2, o3, a0, a1, a2, a3,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    row = (tl.program_id(0) // blocks).to(tl.int64)  # a head's blocks run together and share its tiles in the cache
    batch, head = row // heads, row % heads
    i, d = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    e = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    held = (d < DK)[:, None] & (e < DV)[None, :]
    memory = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if state is not None:
        memory = tl.load(state + batch * s0 + head * s1 + d[:, None] * s2 + e[None, :] * s3, mask=held, other=0.0)
        memory = memory.to(tl.float32)
    q, k = q + batch * q0 + head // ratio * q2, k + batch * k0 + head // ratio * k2
    v, out = v + batch * v0 + head * v2, out + batch * o0 + head * o2
    solved, pattern = solved + row * chunks * CHUNK * CHUNK, pattern + row * chunks * CHUNK * CHUNK
    scales += row * chunks * 4 * CHUNK
    # Within a chunk 32 bits address everything; as 64-bit pointers the tiles would take the registers of the state.
    query_tile, key_tile = i[:, None] * q1 + d[None, :] * q3, i[:, None] * k1 + d[None, :] * k3  # (CHUNK, BLOCK_K)
    value_tile, out_tile = i[:, None] * v1 + e[None, :] * v3, i[:, None] * o1 + e[None, :] * o3  # (CHUNK, BLOCK_V)
    square = i[:, None] * CHUNK + i[None, :]  # (CHUNK, CHUNK)
    for chunk in range(0, chunks):
        real = (i < length - chunk * CHUNK)[:, None]
        key = tl.load(k + key_tile, mask=real & (d < DK)[None, :], other=0.0)  # (CHUNK, BLOCK_K)
        query = tl.load(q + query_tile, mask=real & (d < DK)[None, :], other=0.0)
        value = tl.load(v + value_tile, mask=real & (e < DV)[None, :], other=0.0)  # (CHUNK, BLOCK_V)
        narrow = memory.to(key.dtype)
        error = value.to(tl.float32) - tl.dot(key, narrow) * tl.load(scales + i)[:, None]
        written = tl.dot(tl.load(solved + square), error.to(key.dtype))  # (CHUNK, BLOCK_V)
        result = tl.dot(query, narrow) * tl.load(scales + CHUNK + i)[:, None]
        result = tl.dot(tl.load(pattern + square), written.to(key.dtype), result)
        tl.store(out + out_tile, result.to(out.dtype.element_ty), mask=real & (e < DV)[None, :])
        left = tl.load(scales + 2 * CHUNK + i)[:, None]
        last, size = tl.load(scales + 3 * CHUNK), tl.load(scales + 3 * CHUNK + 1)
        memory = tl.dot(tl.trans(key), (written * left).to(key.dtype), memory * last) * size
        q, k, v, out = q + CHUNK * q1, k + CHUNK * k1, v + CHUNK * v1, out + CHUNK * o1
        solved, pattern, scales = solved + CHUNK * CHUNK, pattern + CHUNK * CHUNK, scales + 4 * CHUNK
    tl.store(after + batch * a0 + head * a1 + d[:, None] * a2 + e[None, :] * a3, memory, mask=held)


@triton.jit
def _steps(
    q, k, v, g, beta, state, out, after, length, heads, ratio, scale,
    q0, q1, q2, q3, k0, k1, k2, k3, v0, v1, v2, v3, g0, g1, g2, b0, b1, b2,
    s0, s1, s2, s3, o0, o1, o2, o3, a0, a1, a2, a3,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    d = tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    e = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    held = (d < DK)[:, None] & (e < DV)[None, :]
    memory = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if state is not None:
        memory = tl.load(state + batch * s0 + head * s1 + d[:, None] * s2 + e[None, :] * s3, mask=held, other=0.0)
        memory = memory.to(tl.float32)
    q, k = q + batch * q0 + head // ratio * q2, k + batch * k0 + head // ratio * k2
    v, out = v + batch * v0 + head * v2, out + batch * o0 + head * o2
    g, beta = g + batch * g0 + head * g2, beta + batch * b0 + head * b2
    for token in range(0, length):
        time = tl.cast(token, tl.int64)
        query = tl.load(q + time * q1 + d * q3, mask=d < DK, other=0.0).to(tl.float32)
        key = tl.load(k + time * k1 + d * k3, mask=d < DK, other=0.0).to(tl.float32)
        value = tl.load(v + time * v1 + e * v3, mask=e < DV, other=0.0).to(tl.float32)
        decay, share = tl.exp(tl.load(g + time * g1).to(tl.float32)), tl.load(beta + time * b1).to(tl.float32)
        memory, result = step(memory, query, key, value, decay, share, scale)
        tl.store(out + time * o1 + e * o3, result.to(out.dtype.element_ty), mask=e < DV)
    tl.store(after + batch * a0 + head * a1 + d[:, None] * a2 + e[None, :] * a3, memory, mask=held)


@triton.jit
def step(memory, query, key, value, decay, share, scale):
    """One token of the rule, fp32. Returns the memory (BLOCK_K, BLOCK_V) after it and the output (BLOCK_V,).

    The output, S_new^T q, is taken from the decayed S: S^T q + (k.q) u, so that both reductions over S are in one pass.
    """
    key = key * tl.rsqrt(tl.sum(key * key, axis=0) + EPS)
    query = query * (tl.rsqrt(tl.sum(query * query, axis=0) + EPS) * scale)
    memory = memory * decay
    written = share * (value - tl.sum(memory * key[:, None], axis=0))  # (BLOCK_V,)
    result = tl.sum(memory * query[:, None], axis=0) + tl.sum(key * query, axis=0) * written
    return memory + key[:, None] * written[None, :], result
