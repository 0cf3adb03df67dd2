"""block_scores in Triton: how much every query wants every block, the indexer's heads summed where they are made.

Algorithm: a tile of queries by blocks; for each head one product of its queries with the tile's keys, relu, and a sum in
registers, so that the scores of single heads (h times as many) never exist. Products of 16-bit numbers are exact in fp32, in
which they are summed; fp32 ones are multiplied as they are (no TF32).

Bytes: B T h d + B P d read, 4 B T P written. FLOPs: 2 B T h d P: bound by the tensor cores for a
prompt, by memory at one token.
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

ORACLE = ops.block_scores
TOLERANCE = 2.0
TUNED = {
    (ANY, "some queries"): {"QUERIES": 16, "KEYS": 64, "num_warps": 4, "num_stages": 2},
    (ANY, "many queries"): {"QUERIES": 64, "KEYS": 64, "num_warps": 4, "num_stages": 2},
}


def run(q: Tensor, keys: Tensor) -> Tensor:
    """q (B, T, h, d), keys (B, P, d), any strides, one dtype. Returns (B, T, P) fp32."""
    require("block_scores", q, keys)
    batch, queries, heads, dim = q.shape
    if keys.shape[::2] != (batch, dim) or keys.dtype != q.dtype or dim > 256:
        raise RequestError(
            f"the triton block_scores needs q (B, T, h, d) and keys (B, P, d) of one dtype and d up to 256, got "
            f"{tuple(q.shape)} {q.dtype} and {tuple(keys.shape)} {keys.dtype}"
        )
    out = torch.empty(batch, queries, keys.shape[1], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out
    launch = tuned(TUNED, q.device, "many queries" if queries > 16 else "some queries")
    with on(q.device):
        _block_scores[(triton.cdiv(keys.shape[1], launch["KEYS"]), triton.cdiv(queries, launch["QUERIES"]), batch)](
            q, keys, out, queries, keys.shape[1], heads, dim, dim**-0.5, *q.stride(), *keys.stride(),
            DIM=max(16, triton.next_power_of_2(dim)), **launch,
        )  # fmt: skip
    return out


@triton.jit
def _block_scores(
    q, keys, out, queries, blocks, heads, dim, scale, q0, q1, q2, q3, k0, k1, k2,
    DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)  # (QUERIES,)
    block = tl.program_id(0) * KEYS + tl.arange(0, KEYS)  # (KEYS,)
    column = tl.arange(0, DIM)
    wanted = (query < queries)[:, None] & (column < dim)[None, :]
    k = tl.load(keys + batch * k0 + block.to(tl.int64)[None, :] * k1 + column[:, None] * k2,
                mask=(block < blocks)[None, :] & (column < dim)[:, None], other=0.0)  # (DIM, KEYS)
    total = tl.zeros((QUERIES, KEYS), tl.float32)
    for h in range(heads):
        rows = q + batch * q0 + query.to(tl.int64)[:, None] * q1 + h * q2 + column[None, :] * q3
        product = tl.dot(tl.load(rows, mask=wanted, other=0.0), k, input_precision="ieee")
        total += tl.maximum(product, 0.0)
    target = out + (batch * queries + query.to(tl.int64))[:, None] * blocks + block[None, :]
    tl.store(target, total * scale, mask=(query < queries)[:, None] & (block < blocks)[None, :])
