"""attention_paged in Triton: the kernels of `attention_decode`, which look up the page of every key they load.

Algorithm: PagedAttention (Kwon et al. 2023) in the split form of `attention_decode`. A tile may span several pages: each
of its keys has a page of its own, so any page size is right. Table entries behind a sequence's length are not read.

Bytes and FLOPs: those of `attention_decode` and 4 bytes a page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_ref import ops
from qwen_ref.errors import RequestError

from . import attention_decode
from .attention_decode import _merge, _split
from .launch import require, supports

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = ops.attention_paged
TOLERANCE = 2.0
TUNED = attention_decode.TUNED


def run(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, window: int | None = None
) -> Tensor:
    """q (B, N, D); k_pages, v_pages (P, K, S, D), any strides; table (B, L), lengths (B,) int32. Returns (B, N, D)."""
    require("attention_paged", q, k_pages, v_pages, table, lengths)
    if table.ndim != 2 or table.shape[0] != q.shape[0] or table.dtype != torch.int32:
        got = f"{tuple(table.shape)} {table.dtype}"
        raise RequestError(f"the triton attention_paged needs a table ({q.shape[0]}, L) int32, got {got}")
    return attention_decode.launch(
        "attention_paged", (_split, _merge), q, k_pages, v_pages, table=table, lengths=lengths, window=window
    )
