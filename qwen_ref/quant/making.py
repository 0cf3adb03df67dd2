"""A model's plain matrices exchanged for packed ones, made on the spot.

What stays as it is: norms, biases, the routers of a mixture of experts (small, and a wrong expert costs more than a
rounded weight), of a Gated DeltaNet the convolution and what makes its gates (a row or two per head, and an error in how
fast a head forgets is multiplied by itself at every token), the draft layer (MTP, which other readers of these formats leave
out), and an embedding with a head of its own, of which a token reads one row. A head, and an embedding that is the head, take
8 bits whatever the rest takes: they are the widest matrices, and what is lost in them no later layer makes good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, RequestError
from ..layers import Experts, Linear
from ..memory import empty
from . import rounding
from .format import Matrix, matches
from .layers import PackedEmbedding, PackedExperts, PackedLinear, QuantLinear, joined
from .packed import Packed

Round = Callable[[str, Tensor], Packed]  # a matrix's official name and its weights (N, K)
Lend = Callable[[str], AbstractContextManager[Tensor]]  # a tensor by its official name, for a while

GGUF = "gguf:"
KINDS = (*rounding.ROUND, *(f"{GGUF}{preset}" for preset in ("q8_0", "q4_0", "q4_k")))
# Routers, the gates of a Gated DeltaNet, and the draft layer.
KEPT = ("mlp.gate", "shared_expert_gate", "in_proj_ba", "in_proj_a", "in_proj_b", "mtp")
LEAST_GROUP = 16
CHUNK, CHUNK_ROWS = 1 << 18, 128  # elements rounded at a time, in multiples of so many rows: whole blocks of every kind


def quantize_model(model: Any, kind: str, *, group: int = rounding.GROUP, lend: Lend | None = None,
                   device: torch.device | None = None, done: Callable[[int], Any] = lambda count: None) -> Any:  # fmt: skip
    """Exchange the matrices of a model for packed ones, one after the other, and return the model.

    Args:
        kind: one of `KINDS`: those of `rounding`, and the blocks of ggml as "gguf:q8_0", "gguf:q4_0", "gguf:q4_k".
        group: of int4, columns that share a scale; the largest common divisor with all rows is taken.
        lend: where the weights are, if the model has no memory yet (meta device).
        device: where the packed matrices go; default where the weights are. done: called with the weights dealt with.
    Raises: RequestError for an unknown kind, a group that no matrix has, and a model that is quantised; CheckpointError,
        which names the matrix, for NaN and infinity.
    """
    check(model)
    if kind not in KINDS:
        raise RequestError(f"cannot quantise to {kind!r}; there are {', '.join(KINDS)}")
    to_bits = rounder(kind, fitting(model, kind, group))
    source = lend or own(model)
    quantize_module(model.model, "model", to_bits, source, device, done)
    pack_head(model, source, to_bits if kind.startswith(GGUF) else rounder("int8"), device)
    return model


def pack_head(model: Any, lend: Lend, to_bits: Round, device: torch.device | None = None) -> None:
    """The head, and an embedding that is the head with it, as one matrix."""
    if model.lm_head is None:
        return
    old = model.lm_head
    tied = old.weight is model.model.embed_tokens.weight
    matrix = Matrix(rounded(to_bits, "model.embed_tokens.weight" if tied else "lm_head.weight", lend, device))
    if tied:
        model.model.embed_tokens = PackedEmbedding(matrix.weight, old.weight.shape, old.weight.dtype)
    model.lm_head = PackedLinear(matrix, old.weight.shape, old.bias)


def check(model: nn.Module) -> None:
    """RequestError if a model is quantised already: rounding twice adds the errors, and expands nothing back."""
    for name, module in model.named_modules():
        if isinstance(module, (PackedLinear, PackedExperts, PackedEmbedding, QuantLinear)):
            raise RequestError(f"the model is quantised already ({name} is a {type(module).__name__}); "
                               "quantise the one it was made from")


def rounder(kind: str, size: Any = None) -> Round:
    """Round to nearest. `size`: what `fitting` gives. RequestError on an unknown kind."""
    if kind.startswith(GGUF):
        return _ggml(kind.removeprefix(GGUF), size)
    if kind not in rounding.ROUND:
        raise RequestError(f"cannot quantise to {kind!r}; there are {', '.join(KINDS)}")
    function: Any = rounding.ROUND[kind]
    arguments = () if size is None else (size,)
    if kind == "nvfp4":  # one of its scales is the whole matrix's
        return lambda name, weight: function(weight, *arguments)
    return lambda name, weight: _by_rows(lambda part: function(part, *arguments), weight)


def _by_rows(function: Callable[[Tensor], Packed], weight: Tensor) -> Packed:
    """Some rows at a time, so that what is held in fp32 meanwhile stays small and in the processor's cache."""
    step = CHUNK_ROWS * max(1, CHUNK // (CHUNK_ROWS * weight.shape[1]))
    first, count = function(weight[:step]), weight.shape[0]
    if count <= step:
        return first
    parts = _tensors(first)
    whole = {name: empty((-(-count * len(value) // step), *value.shape[1:]), value.dtype, value.device)
             for name, value in parts.items()}  # fmt: skip
    for start in range(0, count, step):
        for name, value in (_tensors(function(weight[start : start + step])) if start else parts).items():
            at = start * len(parts[name]) // step  # Fp8 has a row of scales for many of codes
            whole[name][at : at + len(value)].view(torch.uint8).copy_(value.view(torch.uint8))
    return first._replace(**whole)  # type: ignore[arg-type]


def _tensors(layout: Packed) -> dict[str, Tensor]:
    return {name: value for name, value in layout._asdict().items() if isinstance(value, Tensor) and name != "table"}


def _ggml(preset: str, layers: int) -> Round:
    """Blocks of the kinds that llama.cpp's preset of this name gives to each matrix."""
    from .gguf import repack
    from .gguf_quantize import QUANTIZE, quantize
    from .gguf_write import kind_for

    if f"{GGUF}{preset}" not in KINDS:
        raise RequestError(f"cannot quantise to {f'{GGUF}{preset}'!r}; there are {', '.join(KINDS)}")

    def to_bits(name: str, weight: Tensor) -> Packed:
        kind = kind_for(name, weight.shape, preset, layers)
        if kind not in QUANTIZE:
            raise CheckpointError(f"rows of {weight.shape[1]} columns are not whole blocks of ggml, which have 32 at least")
        return repack(kind, quantize(kind, weight).to(weight.device))

    return to_bits


def fitting(model: nn.Module, kind: str, group: int = rounding.GROUP) -> Any:
    """The group of int4 or the block of fp8 that all matrices of a model can have; of GGUF, the number of layers.

    One size for all, because readers fuse q, k and v, and gate and up, and a file's config then has one scheme; 128
    divides all official sizes. Otherwise the largest divisor of it that divides them all. RequestError where that is
    below 16, and the scales would weigh as much as the codes.
    """
    four = kind in ("int4", "int4:plain")
    if type(group) is not int:
        raise RequestError(f"the group size is {group!r}; it must be an integer")
    if four and group < LEAST_GROUP:
        raise RequestError(f"the group size is {group}; it must be at least {LEAST_GROUP}")
    shapes = matrices(model)
    if kind == "fp8":  # blocks may be partial, though some readers take that amiss
        high, wide = (math.gcd(size, *sizes) for size, sizes in zip(rounding.FP8_BLOCK, zip(*shapes.values(), strict=True),
                                                                    strict=True))  # fmt: skip
        return (high, wide) if min(high, wide) >= LEAST_GROUP else rounding.FP8_BLOCK
    if kind.startswith(GGUF):
        return len(model.model.layers)  # type: ignore[union-attr, arg-type]
    if not four:
        return None
    common = math.gcd(group, *(columns for _, columns in shapes.values()))
    if common < LEAST_GROUP:
        worst = min(shapes, key=lambda name: math.gcd(group, shapes[name][1]))
        raise RequestError(f"no group size from {LEAST_GROUP} to {group} divides the rows of all matrices; "
                           f"{worst} has {shapes[worst][1]} columns: take another group size, or int8")
    return common


def matrices(model: nn.Module, prefix: str = "") -> dict[str, tuple[int, int]]:
    """Official name -> (N, K) of every matrix that is quantised, an expert's included; the head and embedding are not."""
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules(prefix=prefix):
        if matches(name, KEPT):
            continue
        if isinstance(module, Experts):
            found |= {f"{name}.{part}": (view.shape[0], view.shape[1]) for part, view in module.named_parts()}
        elif isinstance(module, Linear) and name != "lm_head":
            found[f"{name}.weight"] = (module.out_features, module.in_features)
    return found


def quantize_module(module: nn.Module, path: str, to_bits: Round, lend: Lend, device: torch.device | None = None,
                    done: Callable[[int], Any] = lambda count: None) -> None:  # fmt: skip
    """Exchange every matrix below a module with this official path."""
    for name in [name for name, part in module.named_modules() if isinstance(part, (Linear, Experts))]:
        part, full = module.get_submodule(name), f"{path}.{name}"  # one by one: a list would keep what is exchanged alive
        if isinstance(part, Experts):
            count = part.gate_up_proj.numel() + part.down_proj.numel()
            new: nn.Module = _experts(part, full, to_bits, lend, device)
        elif isinstance(part, Linear) and not matches(full, KEPT):
            count = part.weight.numel()
            matrix = Matrix(rounded(to_bits, f"{full}.weight", lend, device))
            new = PackedLinear(matrix, (part.out_features, part.in_features), part.bias)
        else:
            continue
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, new)
        done(count)


def _experts(module: Experts, path: str, to_bits: Round, lend: Lend, device: torch.device | None) -> PackedExperts:
    def matrix(e: int, projection: str) -> Packed:
        return rounded(to_bits, f"{path}.{e}.{projection}.weight", lend, device)

    def both() -> Iterator[tuple[Packed, Packed]]:
        for e in range(count):
            upper = joined(matrix(e, "gate_proj"), matrix(e, "up_proj"))
            if upper is None:
                raise RequestError(f"{path}: the experts' gate and up cannot be joined in this layout; take another one")
            yield upper, matrix(e, "down_proj")

    count = module.gate_up_proj.shape[0]
    stacks: tuple[Any, Any] | None = None
    tables: list[tuple[Any, Any]] = []  # of NVFP4 every matrix has its own
    for e, pair in enumerate(both()):
        tables.append((getattr(pair[0], "table", None), getattr(pair[1], "table", None)))
        stacks = stacks or (_stack(pair[0], count), _stack(pair[1], count))
        for stack, single in zip(stacks, pair, strict=True):
            for slot, tensor in zip(stack, single, strict=True):
                if isinstance(tensor, Tensor) and slot is not tensor and slot.dim() > tensor.dim():
                    slot[e].view(torch.uint8).copy_(tensor.contiguous().view(torch.uint8))
    if stacks is None:
        raise CheckpointError(f"{path} has no experts")
    double, hidden = module.gate_up_proj.shape[1:]
    gate_up, down = (_with_tables(stack, list(own)) for stack, own in zip(stacks, zip(*tables, strict=True), strict=True))
    return PackedExperts(gate_up, down, (count, hidden, double // 2))


def _with_tables(stack: Any, tables: list[Any]) -> Packed:
    """A stack with the tables of its matrices, if they differ."""
    if tables[0] is None or all(torch.equal(table, tables[0]) for table in tables):
        return stack
    return stack._replace(table=torch.stack(tables))


def _stack(single: Packed, count: int) -> Packed:
    """Memory for `count` matrices of the same form; a table is the first one's."""
    made = {name: empty((count, *value.shape), value.dtype, value.device) for name, value in _tensors(single).items()}
    return single._replace(**made)  # type: ignore[arg-type]


def rounded(to_bits: Round, name: str, lend: Lend, device: torch.device | None = None) -> Packed:
    with lend(name) as weight:
        try:
            return to_bits(name, weight.to(device) if device is not None else weight)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error


def own(model: nn.Module) -> Lend:
    """A model's own tensors, looked up when they are asked for, so that none is kept alive."""

    def lend(name: str) -> AbstractContextManager[Tensor]:
        path, *part = name.rsplit(".", 3)
        module = model.get_submodule(path) if part[0].isdigit() else None
        if isinstance(module, Experts):
            return nullcontext(dict(module.named_parts())[".".join(part)].data)
        return nullcontext(model.get_parameter(name).data)

    return lend


__all__ = ["KEPT", "KINDS", "Lend", "Round", "check", "fitting", "matrices", "own", "pack_head", "quantize_model",
           "quantize_module", "rounded", "rounder"]  # fmt: skip
