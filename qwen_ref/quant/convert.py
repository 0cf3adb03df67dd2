"""From a model's plain modules to quantised ones: before its files are read, and once they have been."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..config import Fields
from ..errors import CheckpointError, ConfigError, QwenRefError
from ..layers import Experts, Linear
from . import awq, bitsandbytes, compressed_tensors, fp4, fp8, gptq
from .format import Format, Scheme, steps
from .ggml import Plain
from .layers import (
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    PackedSeparately,
    QuantEmbedding,
    QuantExpert,
    QuantExperts,
    QuantLinear,
    QuantStacks,
    TiedHead,
    joined,
    stacked,
)
from .packed import Fp8

METHODS = {  # quant_method -> how its config is read
    "awq": awq.from_json,
    "gptq": gptq.from_json,
    "fp8": fp8.from_json,
    "compressed-tensors": compressed_tensors.from_json,
    "bitsandbytes": bitsandbytes.from_json,
    "modelopt": fp4.from_modelopt,
}
MOST_STEPS = 5 * 10**9  # of matching names: a quarter of a minute. Qwen3.5-397B-A17B-NVFP4 needs a tenth of them
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def read_format(raw: Mapping[str, Any]) -> Format | None:
    """The format that a config.json's `quantization_config` names; None without one. ConfigError on unknown methods."""
    given = raw.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ConfigError(f"config.json: quantization_config is {given!r:.80}, not an object")
    fields = Fields(given, "config.json, quantization_config")
    method = given.get("quant_method")
    if method is None and (given.get("load_in_4bit") or given.get("load_in_8bit")):
        method = "bitsandbytes"  # older files leave it out
    if method is None and isinstance(producer := given.get("producer"), dict) and producer.get("name") == "modelopt":
        method = "modelopt"  # so do ModelOpt's: Qwen3-32B-FP8-Static-PerTensor
    if not isinstance(method, str) or method not in METHODS:
        raise fields.error("quant_method", f"is {method!r:.80}, which is not implemented; there are {', '.join(METHODS)}")
    return METHODS[method](fields)


def install(model: nn.Module, format: Format, disk: Mapping[str, Any]) -> list[str]:
    """Exchange, on the meta device, each matrix that is quantised for a `QuantLinear` with the tensors it is stored in.

    `disk`: what the files hold, by official name, as `safetensors_file.TensorInfo`. A matrix that the format quantises and
    the files have in full precision stays plain; those are returned by name. CheckpointError, ConfigError.
    """
    wanted = _matrices(model)
    if (most := len(wanted) * steps(format.patterns)) > MOST_STEPS:
        against = f"{len(wanted):,} matrices with {len(format.patterns):,} names"
        raise ConfigError(f"config.json, quantization_config: to compare {against} may take {most:.0e} steps, "
                          f"over {MOST_STEPS:.0e}; name modules with fewer wildcards")
    stacks = [f"{name}.{p}" for name, m in model.named_modules() if isinstance(m, Experts) for p in PROJECTIONS]
    found: dict[str, dict[str, Any]] = {name: {} for name in (*wanted, *stacks)}
    for tensor, info in disk.items():
        owner = tensor
        while owner and owner not in found:
            owner = owner.rpartition(".")[0]
        if owner:
            found[owner][tensor[len(owner) + 1 :]] = info
    plain = []
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and name in wanted and (scheme := format.scheme_of(name)):
            if scheme.stores(found[name]):
                _replace(model, name, _quantised(name, scheme, wanted[name], found[name], module.bias))
            else:
                plain.append(name)
        elif isinstance(module, nn.Embedding) and (scheme := format.embedding_scheme_of(name)):
            _replace_embedding(model, name, module, _quantised(name, scheme, wanted[name], found[name], kind=QuantEmbedding))
        elif isinstance(module, Experts) and any(found[f"{name}.{projection}"] for projection in PROJECTIONS):
            _replace(model, name, _stacks(name, module, format, found))
        elif isinstance(module, Experts):
            experts = _experts(name, module, format, found)
            if experts is None:
                plain.append(name)
            else:
                _replace(model, name, experts)
    return plain


def pack(model: nn.Module, dtype: torch.dtype) -> None:
    """Exchange every `QuantLinear` for what runs: `PackedLinear`, `PackedExperts`. Each file's tensors are let go at once.

    `dtype`: of the activations.
    """
    for name in [name for name, _ in model.named_modules()]:  # by name: a list of modules would keep all of them
        module = _at(model, name)
        if isinstance(module, QuantExperts):
            _replace(model, name, _packed_experts(name, module))
        elif isinstance(module, QuantStacks):
            _replace(model, name, _packed_stacks(name, module, dtype))
        elif isinstance(module, QuantEmbedding):
            shape = module.out_features, module.in_features
            with _named(name):
                matrix = module.pack()
            heads = _tied(model, module)
            _replace(model, name, PackedEmbedding(matrix.weight, shape, dtype))
            for head in heads:
                _replace(model, head, PackedLinear(matrix, shape))
        elif isinstance(module, QuantLinear):
            _replace(model, name, _packed(name, module))


def round_activations(model: nn.Module, on: bool = True) -> int:
    """Whether linear layers in FP8 round their inputs to FP8 too, with a scale for every token and block of columns.

    FP8 checkpoints are made for it (`activation_scheme: dynamic`), and tensor cores are twice as fast with it; the results
    then differ from those of the dequantised model. Experts keep their inputs as they are. Returns how many layers do.
    """
    layers = [m for m in model.modules() if isinstance(m, PackedLinear) and isinstance(m.packed, Fp8)]
    for layer in layers:
        layer.dynamic = on
    return len(layers)


def expand(model: nn.Module, dtype: torch.dtype) -> None:
    """Exchange every `QuantLinear` for a plain layer with the matrix it stands for, by the format's definition."""
    for name in [name for name, _ in model.named_modules()]:
        module = _at(model, name)
        if isinstance(module, QuantExperts | QuantStacks | QuantLinear):
            _check(name, module)
        if isinstance(module, QuantExperts | QuantStacks):
            _replace(model, name, _expanded(module, dtype))
        elif isinstance(module, QuantEmbedding):
            weight, heads = _fixed(module.dequantize().to(dtype)), _tied(model, module)
            embedding = nn.Embedding(0, 0, device="meta")
            embedding.num_embeddings, embedding.embedding_dim, embedding.weight = *weight.shape, weight
            _replace(model, name, embedding)
            for head in heads:
                _replace(model, head, _linear(weight, None))
        elif isinstance(module, QuantLinear):
            _replace(model, name, _linear(_fixed(module.dequantize().to(dtype)), _bias(name, module)))


def _check(name: str, module: nn.Module) -> None:
    """What packing would find wrong, by the name of the matrix."""
    for part, matrix in module.named_modules(prefix=name):
        if isinstance(matrix, QuantLinear):
            _bias(part, matrix)
            with _named(part):
                matrix.check()


def _bias(name: str, module: QuantLinear) -> nn.Parameter | None:
    """None where the model has none and the file one of zeros."""
    if not module.must_be_zero or module.bias is None:
        return module.bias
    if bool(module.bias.any()):
        raise CheckpointError(f"{name}.bias is not zero, but the config says that there is no bias")
    return None


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> Linear:
    plain = Linear(0, 0, bias=False, device="meta")
    plain.out_features, plain.in_features = weight.shape
    plain.weight = weight
    plain.register_parameter("bias", bias)
    return plain


def _expanded(module: QuantExperts | QuantStacks, dtype: torch.dtype) -> Experts:
    experts = Experts(0, 0, 0)
    for part, stack in module.plain(dtype):
        setattr(experts, part, _fixed(stack))
    return experts


def _fixed(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _matrices(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (N, K) of every matrix, an expert's included. A head that is the embedding is none of its own."""
    embedding = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            shapes[name] = (module.num_embeddings, module.embedding_dim)
        elif isinstance(module, Linear) and id(module.weight) not in embedding:
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Experts):
            for part, view in module.named_parts():
                shapes[f"{name}.{part.removesuffix('.weight')}"] = (view.shape[0], view.shape[1])
    return shapes


def _experts(name: str, module: Experts, format: Format, found: Mapping[str, Mapping[str, Any]]) -> QuantExperts | None:
    """The experts as they are stored; None if all are in full precision."""
    stored = {part.removesuffix(".weight"): (view.shape[0], view.shape[1]) for part, view in module.named_parts()}
    schemes = {part: format.scheme_of(f"{name}.{part}") for part in stored}
    kept = [part for part, scheme in schemes.items() if scheme is None or not scheme.stores(found[f"{name}.{part}"])]
    if len(kept) == len(stored):
        return None
    if kept:
        raise CheckpointError(f"{name}: some experts are quantised and others, such as {kept[0]}, are not")
    experts = QuantExperts()
    for e in range(module.gate_up_proj.shape[0]):
        expert = QuantExpert()
        for projection in PROJECTIONS:
            part = f"{e}.{projection}"
            scheme: Any = schemes[part]
            setattr(expert, projection, _quantised(f"{name}.{part}", scheme, stored[part], found[f"{name}.{part}"]))
        experts.append(expert)
    return experts


def _stacks(name: str, module: Experts, format: Format, found: Mapping[str, Mapping[str, Any]]) -> QuantStacks:
    """The experts of a GGUF file."""
    experts, double, hidden = module.gate_up_proj.shape
    stacks = QuantStacks()
    for projection in PROJECTIONS:
        part = f"{name}.{projection}"
        shape = (hidden, double // 2) if projection == "down_proj" else (double // 2, hidden)
        scheme = format.scheme_of(part) or Plain()
        setattr(stacks, projection, _quantised(part, scheme, shape, found[part], lead=(experts,)))
    return stacks


def _packed_stacks(name: str, module: QuantStacks, dtype: torch.dtype) -> nn.Module:
    matrices = [getattr(module, projection) for projection in PROJECTIONS]
    plain = [isinstance(m.scheme, Plain) for m in matrices]
    if all(plain):
        return _expanded(module, dtype)
    if any(plain):
        raise CheckpointError(f"{name}: one projection of the experts is quantised and another is not")
    gate, up, down = (_packed(f"{name}.{projection}", m).packed for projection, m in zip(PROJECTIONS, matrices, strict=True))
    both = joined(gate, up)
    if both is None:
        raise CheckpointError(f"{name}: gate and up are of different kinds, which is not implemented")
    first = matrices[0]
    return PackedExperts(both, down, (first.tensors["weight"].shape[0], first.in_features, first.out_features))


def _quantised(
    name: str, scheme: Scheme, shape: tuple[int, int], found: Mapping[str, Any], bias: nn.Parameter | None = None,
    *, lead: tuple[int, ...] = (), kind: type[QuantLinear] = QuantLinear,
) -> Any:  # fmt: skip
    with _named(name):
        slots = {key: slot._replace(shape=lead + slot.shape) for key, slot in scheme.slots(*shape, found).items()}
    dtypes = {key: found[key].dtype if key in found and found[key].dtype in slot.dtypes else slot.dtypes[0]
              for key, slot in slots.items()}  # fmt: skip
    extra = bias is None and "bias" in found  # GPTQ's first writers gave every matrix one, of zeros
    if extra:
        bias = nn.Parameter(torch.empty(shape[0], dtype=found["bias"].dtype, device="meta"), requires_grad=False)
    module = kind(scheme, *shape, slots, dtypes, bias)
    module.must_be_zero = extra
    return module


def _packed(name: str, module: QuantLinear) -> PackedLinear:
    bias = _bias(name, module)
    with _named(name):
        matrix = module.pack()
    return PackedLinear(matrix, (module.out_features, module.in_features), bias)


def _packed_experts(name: str, module: QuantExperts) -> nn.Module:
    """One stack for all experts; where inputs are reordered, or matrices differ in form, each is packed by itself."""
    separate = PackedSeparately(module)
    for e, expert in enumerate(module):
        for projection in PROJECTIONS:
            setattr(expert, projection, _packed(f"{name}.{e}.{projection}", getattr(expert, projection)))
    matrices = [module.matrices(e) for e in range(len(module))]
    if any(m.order is not None for three in matrices for m in three):
        return separate
    gate_up = [joined(gate.packed, up.packed) for gate, up, _ in matrices]
    if any(both is None for both in gate_up):
        return separate
    upper, down = stacked([both for both in gate_up if both is not None]), stacked([last.packed for *_, last in matrices])
    if upper is None or down is None or type(upper) is not type(down):
        return separate
    gate = matrices[0][0]
    return PackedExperts(upper, down, (len(module), gate.in_features, gate.out_features))


class _named:
    """Puts the matrix's name before an error that a scheme raises: a CheckpointError, for the file is at fault."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, QwenRefError):
            raise CheckpointError(f"{self.name}: {error}") from error


def _at(model: nn.Module, name: str) -> nn.Module | None:
    """The module of this name; None once it is gone, as experts go when all of them are exchanged for one stack."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _replace_embedding(model: nn.Module, name: str, old: nn.Embedding, new: QuantEmbedding) -> None:
    """Also a head that is the same matrix."""
    heads = [name for name, m in model.named_modules() if isinstance(m, Linear) and m.weight is old.weight]
    new.dtype = old.weight.dtype
    _replace(model, name, new)
    for head in heads:
        _replace(model, head, TiedHead(new))


def _tied(model: nn.Module, embedding: QuantEmbedding) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, TiedHead) and m.of[0] is embedding]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


__all__ = ["METHODS", "expand", "install", "pack", "read_format", "round_activations"]
