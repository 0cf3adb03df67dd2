"""Files' matrices of few bits in the layouts of `quant.packed`, by library.cpp: at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory import empty
from .library import call, why_not


def supports(words: Tensor) -> bool:
    """Whether a (rows, columns) matrix of words can be repacked here."""
    return words.dtype == torch.int32 and _readable(words)


def _readable(matrix: Tensor) -> bool:
    return matrix.is_cpu and matrix.dim() == 2 and matrix.is_contiguous() and matrix.numel() > 0 and why_not() is None


def awq(words: Tensor) -> Tensor:
    """(K, N / 8) words of AWQ -> (N, ceil(K / 2)) uint8, the even input in the low four bits."""
    inputs, columns = words.shape
    out = empty((8 * columns, -(-inputs // 2)), torch.uint8, words.device)
    call("repack_awq", words, inputs, columns, out)
    return out


def gptq(words: Tensor, flipped: int = 0) -> Tensor:
    """(K / 8, N) words of GPTQ -> (N, K / 2) uint8; of 8 bits, (K / 4, N) -> (N, K). `flipped`: bits changed in every byte."""
    rows, columns = words.shape
    out = empty((columns, 4 * rows), torch.uint8, words.device)
    call("repack_gptq", words, rows, columns, flipped * 0x01010101, out)
    return out


def transposed(matrix: Tensor) -> Tensor:
    """`matrix.T.contiguous()`, faster for numbers of 16 bits."""
    rows, columns = matrix.shape
    if matrix.element_size() != 2 or columns % 2 or not _readable(matrix):
        return matrix.T.contiguous()
    out = empty((columns, rows), matrix.dtype, matrix.device)
    call("repack_halves", matrix, rows, columns // 2, out)
    return out


def reordered(codes: Tensor, order: Tensor, bits: int) -> Tensor | None:
    """The columns of (N, K * bits / 8) uint8 in another order, (K,) int64; None if that cannot be done here."""
    rows, columns = codes.shape[0], order.shape[0]
    if not _readable(codes) or codes.dtype != torch.uint8 or codes.shape[1] != -(-columns * bits // 8) or not order.is_cpu:
        return None
    out = empty(codes.shape, torch.uint8, codes.device)
    return None if call("reorder", codes, bits, rows, columns, order.contiguous(), out) else out
