"""attention in Triton: what the models call, by the kernels of `attention_prefill` and, for one query, `attention_decode`.

Algorithm: FlashAttention-2 and Flash-Decoding, see there. A mask is read in tiles and nothing is skipped under it: a
query that sees no key at all gets the mean of all values, as in `ops.attention`, which hides with a finite number.

Bytes: q, k, v and the mask once, and the output. FLOPs: 4 N D per visible pair, or with a mask per pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_ref import ops
from qwen_ref.errors import RequestError

from . import attention_decode, attention_prefill
from .attention_decode import _merge, _split
from .attention_prefill import _attention
from .launch import require, supports

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.attention
TOLERANCE = 2.0
TUNED = attention_prefill.TUNED  # the table itself, not a copy; one query goes by that of attention_decode


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (B, N, T, D), k, v (B, K, S, D), any strides; mask (B or 1, 1, T, S) bool. Returns (B, N, T, D)."""
    require("attention", q, k, v, *(() if mask is None else (mask,)))
    (batch, _, queries, _), keys = q.shape, k.shape[2]
    if k.shape[0] != batch or (queries > keys if mask is None else keys == 0):
        raise RequestError(f"the triton attention got q {tuple(q.shape)} for k {tuple(k.shape)}: batches, or too few keys")
    if mask is not None:
        shape = (batch, 1, queries, keys)
        if mask.dtype != torch.bool or mask.shape not in (shape, (1, *shape[1:])):
            got = f"{tuple(mask.shape)} {mask.dtype}"
            raise RequestError(f"the triton attention needs a bool mask {shape}, or one for all sequences, got {got}")
        mask = mask.expand(shape).view(torch.uint8)
    if queries == 1:
        seen = None if mask is None else mask[:, 0, 0]
        return attention_decode.launch("attention", (_split, _merge), q[:, :, 0], k, v, mask=seen)[:, :, None]
    out = torch.empty_like(q)
    attention_prefill.launch("attention", _attention, q, k, v, out, mask=mask)
    return out
