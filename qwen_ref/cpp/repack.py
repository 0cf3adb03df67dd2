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


def gptq(words: Tensor, bits: int = 4, flipped: int = 0, order: Tensor | None = None) -> Tensor:
    """(K * bits / 32, N) words of GPTQ -> (N, K * bits / 8) uint8. `flipped`: bits changed in every byte. `order`: which input
    comes where, (K,) int64; IndexError if it names one that there is not."""
    rows, columns = words.shape
    if order is not None and (order.shape != (rows * 32 // bits,) or order.dtype != torch.int64):
        raise IndexError(f"the order of {rows * 32 // bits} inputs has shape {tuple(order.shape)}")
    out = empty((columns, 4 * rows), torch.uint8, words.device)
    order = None if order is None else order.contiguous()
    if call("repack_gptq", words, rows, columns, flipped * 0x01010101, bits, order, out):
        raise IndexError(f"the order names an input beyond the {rows * 32 // bits} there are")
    return out


def zeros(words: Tensor, bits: int = 4, more: int = 0, awq: bool = False) -> tuple[Tensor, bool]:
    """(G, N * bits / 32) words of GPTQ, or of AWQ, -> (N, G) uint8, `more` added to each modulo 2^bits; and whether all of them
    are in the middle of the codes."""
    groups, columns = words.shape
    out = words.new_empty(columns * (32 // bits), groups, dtype=torch.uint8)
    return out, bool(call("repack_zeros", words, groups, columns, bits, awq, more, out))


def transposed(matrix: Tensor) -> Tensor:
    """`matrix.T.contiguous()`, faster for numbers of 16 bits."""
    rows, columns = matrix.shape
    if matrix.element_size() != 2 or columns % 2 or not _readable(matrix):
        return matrix.T.contiguous()
    out = empty((columns, rows), matrix.dtype, matrix.device)
    call("repack_halves", matrix, rows, columns // 2, out)
    return out

