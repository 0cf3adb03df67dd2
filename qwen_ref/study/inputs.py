"""What every study takes: one sequence of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError

Ids = Tensor | Sequence[int]


def one_sequence(model: Any, ids: Ids, at_least: int = 1) -> Tensor:
    """Ids as (1, T) int64 on the model's device. RequestError: not one sequence, too short, too long, not in the vocabulary."""
    try:  # text, None, rows of different length and numbers beyond 64 bits each fail in their own way
        row = torch.as_tensor(ids, device=model.device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise RequestError("a study reads one sequence of token ids, as tokenizer.encode(text) gives; this "
                           f"{type(ids).__name__} is none: {error}") from error
    if row.dim() == 2 and row.shape[0] == 1:
        row = row[0]
    if row.numel() < at_least:
        raise RequestError(f"this study needs at least {at_least} tokens; it got {row.numel()}")
    if row.dim() != 1 or row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
        raise RequestError(f"a study reads one sequence of token ids, not {row.dtype} of shape {list(row.shape)}")
    if len(row) > model.config.max_position_embeddings:
        raise RequestError(f"{len(row)} tokens are more than the model's context of {model.config.max_position_embeddings}")
    low, high, last = int(row.min()), int(row.max()), model.config.vocab_size - 1
    if low < 0 or high > last:
        raise RequestError(f"ids must be within 0..{last}; these go from {low} to {high}")
    return row.long()[None]


def whole(number: Any, name: str) -> int:
    """An int, or what stands for one: of numpy, or a tensor of one element. RequestError if it is none."""
    try:
        return index(number)
    except TypeError as error:
        raise RequestError(f"{name} is {number!r}; it must be a whole number") from error


def several(numbers: Any, name: str) -> list[int]:
    """Whole numbers, from a list or another sequence. RequestError if it is none."""
    try:
        chosen = list(numbers)
    except TypeError as error:
        raise RequestError(f"{name} is {numbers!r}; it must be a list, as [{numbers!r}]") from error
    return [whole(number, f"one of {name}") for number in chosen]


def one_position(length: int, position: int, name: str = "position") -> int:
    """A position of T tokens, counted from the end if negative, as 0..T-1. RequestError if there is none."""
    position = whole(position, name)
    if not -length <= position < length:
        raise RequestError(f"{name} is {position}; there are {length} tokens")
    return position % length


def one_token(model: Any, token: int, name: str = "token") -> int:
    """An id of the vocabulary. RequestError if it is not one."""
    token = whole(token, name)
    if not 0 <= token < model.config.vocab_size:
        raise RequestError(f"{name} is {token}; the vocabulary is 0..{model.config.vocab_size - 1}")
    return token


def head_of(model: Any) -> Any:
    """The output head. RequestError for an embedding model, which has none and so no logits."""
    if model.lm_head is None:
        raise RequestError("this is an embedding model without an output head: it has no logits to study")
    return model.lm_head
