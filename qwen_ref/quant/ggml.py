"""The matrices of a GGUF file: every one in blocks of its own kind, embeddings and stacks of experts included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .format import FLOATS, Format, Matrix, Scheme, Slot, groups
from .gguf import repack
from .gguf_blocks import BLOCK, DEQUANTIZE


@dataclass(frozen=True)
class Blocks(Scheme):
    """(N, K) as rows of blocks, or (E, N, K)."""

    marker = "weight"
    kind: str
    order: Tensor | None = field(default=None, compare=False)  # (K,) official column of each that is stored; None = as stored

    def slots(self, rows: int, columns: int, found: Mapping[str, Any]) -> dict[str, Slot]:
        elements, size = BLOCK[self.kind]
        return {"weight": Slot((rows, groups(columns, elements) * size), (torch.uint8,))}

    def check(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> None:
        repack(self.kind, tensors["weight"])  # which finds what is wrong on its way

    def dequantize(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        weight = DEQUANTIZE[self.kind](tensors["weight"])
        return weight if self.order is None else torch.empty_like(weight).index_copy(-1, self.order, weight)

    def pack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Matrix:
        return Matrix(repack(self.kind, tensors["weight"]), self.order)


@dataclass(frozen=True)
class Plain(Scheme):
    """Full precision: for stacks of experts, whose tensors in a GGUF file are not those of other checkpoints."""

    marker = "weight"

    def slots(self, rows: int, columns: int, found: Mapping[str, Any]) -> dict[str, Slot]:
        return {"weight": Slot((rows, columns), FLOATS)}

    def check(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> None:
        pass

    def dequantize(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        return tensors["weight"].float()


@dataclass(frozen=True)
class Ggml(Format):
    """`kinds`: official name of a tensor -> its kind of block; what is not named is in full precision. `orders`: `Blocks`."""

    scheme: Scheme = Plain()
    kinds: Mapping[str, str] = field(default_factory=dict)
    orders: Mapping[str, Tensor] = field(default_factory=dict)

    def scheme_of(self, name: str) -> Scheme | None:
        kind = self.kinds.get(f"{name}.weight")
        return Blocks(kind, self.orders.get(f"{name}.weight")) if kind is not None else None

    def embedding_scheme_of(self, name: str) -> Scheme | None:
        return self.scheme_of(name)
