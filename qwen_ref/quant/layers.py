"""Quantised weights as modules: as a file stores them, and packed to run.

`QuantLinear` carries the official names, so that loading stays a loop over them; `packed` then exchanges it for
`PackedLinear`, which a kernel can read. Both stand for the same matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .. import backend, memory, ops
from .format import Matrix, Scheme, Slot
from .packed import Code4, Fp8, Gguf, Int4, Int8, Packed, moe_packed

LINEAR: dict[type, backend.Operation] = {
    Int4: backend.linear_int4,
    Int8: backend.linear_int8,
    Fp8: backend.linear_fp8,
    Code4: backend.linear_code4,
    Gguf: backend.linear_gguf,
}
MOE: dict[type, backend.Operation] = {
    Int4: backend.moe_int4,
    Int8: backend.moe_int8,
    Fp8: backend.moe_fp8,
    Code4: backend.moe_code4,
    Gguf: backend.moe_gguf,
}


class QuantLinear(nn.Module):
    """x W^T + bias with W as its file stores it: the reference of its format."""

    bias: nn.Parameter | None
    must_be_zero = False  # the bias: the file has one which the model has not

    def __init__(self, scheme: Scheme, out_features: int, in_features: int, slots: Mapping[str, Slot],
                 dtypes: Mapping[str, torch.dtype], bias: nn.Parameter | None) -> None:  # fmt: skip
        super().__init__()
        self.scheme, self.out_features, self.in_features, self.stored = scheme, out_features, in_features, tuple(slots)
        for name, slot in slots.items():
            tensor = torch.empty(slot.shape, dtype=dtypes[name], device="meta")
            # Not register_parameter: some names of bitsandbytes have a dot.
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: self._parameters[name].data for name in self.stored}  # type: ignore[union-attr]

    def dequantize(self) -> Tensor:  # (N, K) fp32
        return self.scheme.dequantize(self.tensors, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)

    def check(self) -> None:
        self.scheme.check(self.tensors, self.out_features, self.in_features)

    def pack(self) -> Matrix:
        return self.scheme.pack(self.tensors, self.out_features, self.in_features)


class QuantEmbedding(QuantLinear):
    """Rows of a (V, H) matrix that its file stores in blocks."""

    dtype: torch.dtype = torch.float32  # of what it returns

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, H)
        return F.embedding(ids, self.dequantize().to(self.dtype))


class TiedHead(nn.Module):
    """The embedding again, as the head, until both are packed."""

    def __init__(self, embedding: QuantEmbedding) -> None:
        super().__init__()
        self.of = (embedding,)  # in a tuple: not a module of its own

    def forward(self, x: Tensor) -> Tensor:  # (..., H) -> (..., V)
        return F.linear(x, self.of[0].dequantize().to(x.dtype))


class QuantStacks(nn.Module):
    """E experts as a GGUF file stores them: every projection one tensor (E, N, bytes of a row)."""

    gate_proj: QuantLinear
    up_proj: QuantLinear
    down_proj: QuantLinear

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:  # (M, H), (M, k), (M, k) -> (M, H)
        (_, gate_up), (_, down) = self.plain(x.dtype)
        return ops.moe_experts(x, gate_up, down, weights, experts)

    def plain(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The two stacks of `layers.Experts`."""
        yield "gate_up_proj", torch.cat((self.gate_proj.dequantize().to(dtype), self.up_proj.dequantize().to(dtype)), 1)
        yield "down_proj", self.down_proj.dequantize().to(dtype)


class Holder:
    """What the model asks of a module that holds matrices of few bits."""

    def plain(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The weights of the module that this one stands for, by their names in it."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """Weights it holds."""
        raise NotImplementedError

    @property
    def identity(self) -> set[int]:
        """The same for modules that share their tensors."""
        return {t.data_ptr() for t in self.packed_tensors if t.numel()}

    @property
    def packed_tensors(self) -> list[Tensor]:
        raise NotImplementedError


class PackedModule(Holder, nn.Module):
    """Moves packed tensors between devices, and leaves their dtypes alone: `model.to(bfloat16)` must not round a scale."""

    held: tuple[str, ...]  # attributes that are tensors or layouts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def moved(tensor: Tensor) -> Tensor:
            raw = tensor.view(torch.uint8) if tensor.dim() else tensor[None].view(torch.uint8)  # not a float to any rule
            return fn(raw).view(tensor.dtype).view(tensor.shape)

        for name in self.held:
            setattr(self, name, tree_map_only(Tensor, moved, getattr(self, name)))
        return super()._apply(fn, recurse)

    @property
    def packed_tensors(self) -> list[Tensor]:
        layouts = [getattr(self, name) for name in self.held]
        return [t for layout in layouts if layout is not None
                for t in (layout if isinstance(layout, tuple) else (layout,)) if isinstance(t, Tensor)]  # fmt: skip


class PackedLinear(PackedModule):
    """x W^T + bias with W in a packed layout: `backend.linear_int4` and its like."""

    bias: nn.Parameter | None
    held = ("packed", "order")
    dynamic = False  # FP8 only: round x too, as FP8 tensor cores need it; see `convert.round_activations`

    def __init__(self, matrix: Matrix, shape: tuple[int, int], bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.packed, self.order = matrix
        self.out_features, self.in_features = shape
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        if self.order is not None:
            x = x[..., self.order]
        operation = backend.linear_fp8_dynamic if self.dynamic else LINEAR[type(self.packed)]
        return operation(x, self.packed, self.bias)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # (N, K)
        weight = self.packed.dequantize(dtype, self.in_features)
        return weight if self.order is None else torch.empty_like(weight).index_copy(1, self.order, weight)

    @property
    def weight(self) -> Tensor:
        """The dequantised matrix in fp32, (N, K), made anew each time: for the study tools, which read weights."""
        return self.dequantize()

    def plain(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        yield "weight", self.dequantize(dtype)

    @property
    def count(self) -> int:
        return self.out_features * self.in_features

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {type(self.packed).__name__}"


class QuantExpert(nn.Module):
    """The three matrices of one expert."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module


class QuantExperts(nn.ModuleList):
    """E experts with every matrix by itself, as their files store them."""

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:  # (M, H), (M, k), (M, k) -> (M, H)
        out = torch.zeros_like(x)
        for e in experts.unique().tolist():  # in the order and with the rounding of `ops.moe_experts`
            token, slot = torch.where(experts == e)
            expert: Any = self[e]
            hidden = ops.swiglu(expert.gate_proj(x[token]), expert.up_proj(x[token]))
            out = out.index_add(0, token, (expert.down_proj(hidden) * weights[token, slot, None]).to(out.dtype))
        return out

    def matrices(self, index: int) -> list[Any]:
        expert: Any = self[index]
        return [expert.gate_proj, expert.up_proj, expert.down_proj]

    def plain(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The two stacks of `layers.Experts`."""
        parts = [[matrix.dequantize().to(dtype) for matrix in self.matrices(e)] for e in range(len(self))]
        yield "gate_up_proj", torch.stack([torch.cat((gate, up)) for gate, up, _ in parts])
        yield "down_proj", torch.stack([down for _, _, down in parts])


class PackedSeparately(QuantExperts, Holder):
    """E experts whose matrices are `PackedLinear` each, where no stack can hold them all."""

    @property
    def count(self) -> int:
        return sum(m.out_features * m.in_features for e in range(len(self)) for m in self.matrices(e))

    @property
    def packed_tensors(self) -> list[Tensor]:
        return [t for e in range(len(self)) for m in self.matrices(e) for t in m.packed_tensors]


class PackedExperts(PackedModule):
    """E SwiGLU feed-forwards in packed stacks: `backend.moe_int4` and its like."""

    held = ("gate_up", "down")

    def __init__(self, gate_up: Packed, down: Packed, shape: tuple[int, int, int]) -> None:  # E x (2I, H), E x (H, I)
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.experts, self.hidden, self.intermediate = shape

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:  # (M, H), (M, k), (M, k) -> (M, H)
        if type(self.gate_up) is not type(self.down):  # a GGUF file may fall back to other blocks for narrow matrices
            return moe_packed(x, self.gate_up, self.down, weights, experts)
        return MOE[type(self.gate_up)](x, self.gate_up, self.down, weights, experts)

    def plain(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        yield "gate_up_proj", self.gate_up.dequantize(dtype, self.hidden)
        yield "down_proj", self.down.dequantize(dtype, self.intermediate)

    @property
    def count(self) -> int:
        return 3 * self.experts * self.hidden * self.intermediate


class PackedEmbedding(PackedModule):
    """Rows of a packed (V, H) matrix. With a tied head, that head is a `PackedLinear` of the same tensors."""

    like: Tensor
    held = ("packed",)

    def __init__(self, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = packed
        self.num_embeddings, self.embedding_dim = shape
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)  # follows model.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, H)
        if ids.numel() == 1:
            return gather(self.packed, ids.flatten()).dequantize(self.like.dtype, self.embedding_dim).view(*ids.shape, -1)
        chosen, places = ids.unique(return_inverse=True)
        return gather(self.packed, chosen).dequantize(self.like.dtype, self.embedding_dim)[places]

    @property
    def weight(self) -> Tensor:
        """The dequantised matrix in fp32, (V, H), made anew each time: for the study tools, which read weights."""
        return self.packed.dequantize(torch.float32, self.embedding_dim)

    def plain(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        yield "weight", self.packed.dequantize(dtype, self.embedding_dim)

    @property
    def count(self) -> int:
        return self.num_embeddings * self.embedding_dim


def gather(weight: Packed, index: Tensor) -> Packed:
    """The rows of a matrix with these numbers, (n,). Layouts with scales of their own for every row only. IndexError for a
    number that no row has, as `torch.nn.functional.embedding`."""

    def picked(values: Tensor, index: Tensor) -> Tensor:  # `values[index]` would take negative ones from the end
        raw = values.view(torch.uint8) if values.dtype.itemsize == 1 else values
        return raw.index_select(0, index).view(values.dtype)

    if isinstance(weight, Fp8) and weight.block[0] > 1:
        codes, scale = picked(weight.codes, index), picked(weight.scale, index // weight.block[0])
        return weight._replace(codes=codes, scale=scale, block=(1, weight.block[1]))
    parts = {name: picked(value, index) for name, value in weight._asdict().items()
             if isinstance(value, Tensor) and name != "table"}  # fmt: skip
    return weight._replace(**parts)  # type: ignore[arg-type]


def stacked(matrices: list[Packed]) -> Packed | None:
    """Matrices of one layout, one for each expert, as one stack; None if they differ in form."""
    first = matrices[0]
    fields: dict[str, list[Any]] = {name: [m._asdict().get(name) for m in matrices] for name in first._fields}
    if any(type(m) is not type(first) for m in matrices):
        return None
    result: dict[str, Any] = {}
    for name, values in fields.items():
        if name == "zero" and any(v is None for v in values) and not all(v is None for v in values):
            middle = 8 if isinstance(first, Int4) else 0
            like = next(v for v in values if v is not None)
            values = [torch.full_like(like, middle) if v is None else v for v in values]
        if not isinstance(values[0], Tensor):
            if any(v != values[0] for v in values):
                return None
            result[name] = values[0]
        elif len({(v.shape, v.dtype) for v in values}) > 1:
            return None
        elif name == "table" and all(torch.equal(v, values[0]) for v in values):
            result[name] = values[0]
        else:
            result[name] = memory.stack(values)
    return type(first)(**result)


def joined(upper: Packed, lower: Packed) -> Packed | None:
    """Two matrices of as many columns, one on top of the other; None if their layouts do not go together."""
    if type(upper) is not type(lower):
        return None
    if isinstance(upper, Fp8) and isinstance(lower, Fp8):
        high = math.gcd(upper.codes.shape[-2], upper.block[0], lower.block[0])
        upper, lower = _finer(upper, high), _finer(lower, high)
    if isinstance(upper, Code4) and isinstance(lower, Code4) and not torch.equal(upper.table, lower.table):
        factor = _factor(upper.table, lower.table)
        if factor is None:
            return None
        # As the whole matrices' scales of NVFP4 do: it goes into the scales, which then are fp32.
        lower = lower._replace(scale=lower.scale.float() * factor, table=upper.table)
        upper = upper._replace(scale=upper.scale.float())
    if any(a != getattr(lower, name) for name, a in upper._asdict().items() if isinstance(a, int | str | tuple)):
        return None  # groups of another size, or blocks of another kind
    result: dict[str, Any] = {}
    for name, a in upper._asdict().items():
        b = getattr(lower, name)
        if name == "zero" and (a is None) != (b is None):
            like = a if a is not None else b
            middle = torch.full_like(like, 8 if isinstance(upper, Int4) else 0)
            a, b = (middle if v is None else v for v in (a, b))
        if name == "table":
            result[name] = a
        elif isinstance(a, Tensor):
            if a.dtype != b.dtype:
                return None
            result[name] = memory.cat((a.view(torch.uint8), b.view(torch.uint8)), dim=-2).view(a.dtype)
        else:
            result[name] = a
    return type(upper)(**result)


def _finer(weight: Fp8, high: int) -> Fp8:
    """The same with blocks of fewer rows, so that another matrix may follow below."""
    scale = weight.scale.repeat_interleave(weight.block[0] // high, dim=-2)[..., : -(-weight.codes.shape[-2] // high), :]
    return weight._replace(scale=scale, block=(high, weight.block[1]))


def _factor(first: Tensor, second: Tensor) -> Tensor | None:
    """What the second table is the first times; None if it is no multiple of it."""
    peak = first.abs().argmax()
    factor = second[peak] / first[peak]
    return factor if torch.allclose(first * factor, second, rtol=1e-6, atol=0) else None


__all__ = [
    "LINEAR", "MOE", "Holder", "PackedEmbedding", "PackedExperts", "PackedLinear", "PackedModule", "PackedSeparately",
    "QuantEmbedding", "QuantExpert", "QuantExperts", "QuantLinear", "QuantStacks", "TiedHead", "joined", "stacked",
]  # fmt: skip
