"""The operations through PyTorch's own fused kernels: the same signatures as `ops`, for speed. `backend` registers them."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import ops

GATHER_BYTES = 1 << 27  # of keys and values copied, or of a mask made, at a time by `sparse_block_attention`
GATHER_FROM = 12  # times the keys a query reads: about where a CPU copies them as fast as it multiplies all (one timing)

BLOCK_BYTES = 2 << 20  # of a matrix in fp32: they stay in the second- or third-level cache until they are multiplied
MANY = 16  # tokens from which that pays


@cache
def native(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies this type as fast as fp32 or faster."""
    bf16 = any(has(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return dtype.itemsize >= 4 or (dtype is torch.bfloat16 and bf16)


def has(capability: str) -> bool:
    """Whether the CPU has it, by PyTorch's names; PyTorch 2.9 knows of none."""
    return hasattr(torch.cpu, "get_capabilities") and bool(torch.cpu.get_capabilities().get(capability))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`ops.linear`. Where a CPU has no products of 16-bit numbers, many tokens' are made in fp32, some rows of the matrix at a
    time: several times as fast, the numbers the same but for the order of their sums."""
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if x.device.type != "cpu" or native(x.dtype) or x.shape[:-1].numel() < MANY or x.dtype != weight.dtype or learns:
        return ops.linear(x, weight, bias)
    wide, rows = x.float(), max(BLOCK_BYTES // (4 * max(x.shape[-1], 1)), 1)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    for first in range(0, weight.shape[0], rows):
        some = slice(first, first + rows)
        y[..., some] = F.linear(wide, weight[some].float(), None if bias is None else bias[some].float())
    return y


def causal_conv1d(x: Tensor, weight: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`ops.causal_conv1d`. Where a CPU has no products of 16-bit numbers, tap by tap in fp32, some tokens at a time: PyTorch's
    convolution takes 50 ms for a single token of 6144 channels there."""
    if x.device.type != "cpu" or native(x.dtype) or not x.numel():
        return ops.causal_conv1d(x, weight, state)
    (_, count, channels), (_, width) = x.shape, weight.shape
    before = x.new_zeros(x.shape[0], width, channels) if state is None else state.transpose(1, 2)
    inputs, taps = torch.cat((before, x), dim=1), weight.float()  # (B, W + T, C), (C, W)
    parts, most = [], max(BLOCK_BYTES // (4 * channels), 1)
    for first in range(0, count, most):
        many = min(most, count - first)
        rows = inputs[:, first + 1 : first + many + width].float()  # the first is the last token before
        total = sum(rows[:, tap : tap + many] * taps[:, tap] for tap in range(width))
        parts.append(F.silu(total.to(x.dtype)))  # type: ignore[union-attr]
    return torch.cat(parts, dim=1), inputs[:, count:].transpose(1, 2).clone(memory_format=torch.contiguous_format)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`ops.attention`: the T x S scores never exist in memory."""
    queries, keys = q.shape[2], k.shape[2]
    if mask is None and 1 < queries < keys:
        mask = ops.causal_mask(queries, keys, q.device)
    causal = mask is None and queries > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


def attention_cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attention` by cuDNN alone, the fastest of PyTorch's kernels on Hopper, which PyTorch does not choose by itself."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attention(q, k, v, mask)


def attention_prefill(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, window: int | None = None
) -> Tensor:
    """`ops.attention_prefill`, one sequence after the other; asks the device for the lengths."""
    out = torch.empty_like(q)
    ends = zip(q_starts.tolist()[:-1], q_starts.tolist()[1:], k_starts.tolist()[:-1], k_starts.tolist()[1:], strict=True)
    for q_start, q_end, k_start, k_end in ends:
        count, held = q_end - q_start, k_end - k_start
        mask = None
        if window is not None and held > window:
            positions = torch.arange(held, device=q.device)[None]
            mask = ops.visible(positions[:, held - count :], positions, window)
        qb, kb, vb = (x.transpose(0, 1)[None] for x in (q[q_start:q_end], k[k_start:k_end], v[k_start:k_end]))
        out[q_start:q_end] = attention(qb, kb, vb, mask)[0].transpose(0, 1)
    return out


def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """`ops.moe_experts` as two grouped matrix products over the (token, slot) pairs sorted by expert."""
    if x.shape[0] == 0:
        return torch.zeros_like(x)
    if x.dtype == torch.float64 or (gate_up.stride(-2) | down.stride(-2)) * x.element_size() % 16:
        return ops.moe_experts(x, gate_up, down, weights, experts)  # grouped_mm has no fp64, and wants rows of whole 16 bytes
    chosen, order = experts.flatten().sort(stable=True)  # (M k,)
    ends = torch.bincount(chosen, minlength=gate_up.shape[0]).cumsum(0).int()  # (E,)
    gate, up = F.grouped_mm(x[order // experts.shape[1]], gate_up.mT, offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(ops.swiglu(gate, up), down.mT, offs=ends) * weights.flatten()[order, None]  # (M k, H)
    return torch.empty_like(y).index_copy(0, order, y).view(*experts.shape, -1).sum(1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """`ops.cross_entropy`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets.masked_fill(targets < 0, -100), ignore_index=-100, reduction="none")


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ops.gated_delta_rule` in chunks, except for the few tokens of a decoding step."""
    run = ops.gated_delta_rule if v.shape[1] <= 4 else ops.gated_delta_chunked
    return run(q, k, v, g, beta, state)


def sparse_block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, starts: Tensor | None, ratio: int
) -> Tensor:
    """`ops.sparse_block_attention`, a piece of the queries at a time: over few keys with a mask, over many, and for one
    query, by gathering each query's own. No piece's mask or copied keys take more than `GATHER_BYTES`."""
    queries, length = q.shape[2], k.shape[2]
    reads = (blocks.shape[2] + 1) * ratio  # tokens: the chosen blocks and the tail
    if queries > 1 and length <= GATHER_FROM * reads:
        step = max(1, GATHER_BYTES // (4 * q.shape[0] * length))
        pieces = [(t, length - queries + t + step) for t in range(0, queries, step)]  # first query, keys up to the last
        return torch.cat([attention(q[:, :, t : t + step], k[:, :, :end], v[:, :, :end],
                                    ops.block_mask(blocks[:, t : t + step], min(end, length), starts, ratio))
                          for t, end in pieces], dim=2)  # fmt: skip
    step = max(1, GATHER_BYTES // (2 * reads * k.shape[1] * k.shape[3] * k.element_size()))
    complete = ops.complete_blocks(queries, length, ratio, starts, q.device).expand(q.shape[0], -1)
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        first = 0 if starts is None else starts[b]
        for t in (slice(i, min(i + step, queries)) for i in range(0, queries, step)):
            read = torch.cat((blocks[b, t], complete[b, t, None]), dim=1)  # (T', k + 1): the tail is the block after
            own = torch.arange(length - queries, length, device=q.device)[t, None]  # (T', 1), the queries' tokens
            tokens = (first + read[..., None] * ratio + torch.arange(ratio, device=q.device)).flatten(1)  # (T', L)
            seen = (read >= 0).repeat_interleave(ratio, dim=1) & (tokens <= own)
            seen = seen | ~seen.any(-1, keepdim=True)  # padding
            tokens = tokens.clamp(0, length - 1)
            keys, values = (x[b][:, tokens].transpose(0, 1) for x in (k, v))  # (T', K, L, D)
            wanted = q[b, :, t].transpose(0, 1)[:, :, None]  # (T', N, 1, D): every query a batch of one
            out[b, :, t] = attention(wanted, keys, values, seen[:, None, None])[:, :, 0].transpose(0, 1)
    return out
