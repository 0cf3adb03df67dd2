"""Writing GGUF files that llama.cpp and transformers open: which type each tensor gets, and the file, tensor by tensor."""

from __future__ import annotations

import math
import os
import re
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..safetensors_file import exists
from ..strict_json import quote
from .gguf import ALIGNMENT, ARRAY, FLOATS, MAGIC, SCALARS, STRING, TENSOR_TYPES, VERSION, ggml_name
from .gguf_blocks import BLOCK
from .gguf_hybrid import CONV, QKV, QKVZ, Heads, Z, to_file
from .gguf_meta import write_config, write_tokenizer
from .gguf_quantize import QUANTIZE, quantize

PRESETS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_k": "Q4_K"}
_FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # where K is no multiple of the block; then F16. As in llama.cpp
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q4_K": 15, "Q6_K": 18, "BF16": 32}
_QUANTIZATION_VERSION = 2
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
_ROUTERS = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")
_GATES = tuple(f"linear_attn.{name}.weight" for name in ("in_proj_ba", "in_proj_a", "in_proj_b", "conv1d"))  # `making.KEPT`
_TYPE_OF = {kind: code for code, kind in TENSOR_TYPES.items()}
_CODE_OF = {code: kind for kind, code in SCALARS.items()}


class Planned(NamedTuple):
    """A tensor of the file to be: what it is called, its type, and the official tensors that are stacked in it."""

    name: str  # official; of a stack of experts `model.layers.N.mlp.experts.gate_proj.weight`
    shape: tuple[int, ...]
    kind: str
    parts: tuple[str, ...]


class Source(NamedTuple):
    """A tensor to write. `make` is called once, when its turn comes, and gives floats of this shape on any device."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], Tensor]


def plan(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], preset: str) -> list[Planned]:
    """What to write of a checkpoint's tensors (official name -> shape) under a preset, a key of `PRESETS`.

    A head that config.json calls tied is left out, and the matrices of experts are stacked.
    """
    if preset not in PRESETS:
        raise CheckpointError(f"gguf:{preset} is not one of {', '.join(f'gguf:{name}' for name in PRESETS)}")
    tied = bool(config.get("tie_word_embeddings", False))
    layers, heads = int(config["num_hidden_layers"]), Heads.from_config(config)
    stacks: dict[str, dict[int, str]] = {}
    for name in shapes:
        if not (tied and name == "lm_head.weight"):
            match = re.fullmatch(r"(.+\.experts)\.(\d+)(\..+)", name)
            stacks.setdefault(f"{match[1]}{match[3]}" if match else name, {})[int(match[2]) if match else -1] = name
    planned = []
    for name, members in stacks.items():
        parts = tuple(members[i] for i in sorted(members))
        shape = shapes[parts[0]] if -1 in members else (len(parts), *shapes[parts[0]])
        if any(shapes[part] != shapes[parts[0]] for part in parts) or sorted(members) not in ([-1], [*range(len(parts))]):
            raise CheckpointError(f"the experts of {quote(name)} are not numbered from 0 or differ in shape")
        for own, size in _as_stored(name, shape, heads):
            planned.append(Planned(own, size, kind_for(own, size, preset, layers), parts))
    return planned


def _as_stored(name: str, shape: tuple[int, ...], heads: Heads | None) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors that the file has for this one, and their shapes."""
    if heads is not None and name.endswith(QKVZ):
        return [(name.replace(QKVZ, part), (rows, shape[1])) for part, rows in zip((QKV, Z), heads.parts, strict=True)]
    return [(name, (shape[0], *shape[2:]) if name.endswith(CONV) else shape)]


def stored(planned: Planned, parts: Sequence[Tensor], config: Mapping[str, Any]) -> Tensor:
    """What the file has for a planned tensor, out of its official parts."""
    if planned.name not in planned.parts and len(planned.shape) == 3:
        return torch.stack([*parts])
    heads = Heads.from_config(config)
    return parts[0] if heads is None else to_file(planned.name, parts[0], heads)


def kind_for(name: str, shape: Sequence[int], preset: str, layers: int) -> str:
    """The type of a tensor, as llama.cpp's presets have it; `q4_k` is its Q4_K_M.

    Norms, biases, routers and what makes the gates of a Gated DeltaNet stay F32. The 4-bit presets keep the embedding and
    the head in Q6_K, and `q4_k` also v_proj and down_proj of the layers that lose the most: the first and last eighth, and
    every third between.
    """
    if len(shape) == 1 or name.endswith(_ROUTERS + _GATES):
        return "F32"
    kind = PRESETS[preset]
    if preset in ("q4_0", "q4_k") and name in _EMBEDDINGS:
        kind = "Q6_K"
    if preset == "q4_k" and name.endswith(("v_proj.weight", "down_proj.weight")):
        layer = int(name.split(".")[2])
        if layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2:
            kind = "Q6_K"
    while kind in BLOCK and shape[-1] % BLOCK[kind][0]:
        kind = _FALLBACK.get(kind, "F16")
    return kind


def write_gguf(
    path: Path, config: Mapping[str, Any], tokenizer_files: Mapping[str, bytes], tensors: Iterable[Source], *, name: str = ""
) -> None:
    """Write one GGUF file, with one tensor at a time in memory. All or nothing, and no file is overwritten.

    Args:
        config: config.json. tokenizer_files: name -> content of the folder's tokenizer and generation files.
        tensors: in the order of the file, under official names, experts stacked: see `plan`.
        name: what the model is called in the file (general.name).
    Raises: CheckpointError, ConfigError or TokenizerError for what cannot be written.
    """
    tensors = list(tensors)
    if exists(path):
        raise CheckpointError(f"{path} exists; nothing is overwritten")
    metadata = _metadata(config, tokenizer_files, tensors, name)
    header = b"".join(_encode_header(metadata, tensors, hybrid=Heads.from_config(config) is not None))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(header)
            _pad(file)
            for source in tensors:
                _write_tensor(file, source)
                _pad(file)
        _publish(temporary, path)
    except OSError as problem:
        raise CheckpointError(f"could not write {path}: {problem.strerror or problem}") from problem
    finally:
        with suppress(OSError):  # of a folder that is none, or a name too long
            temporary.unlink()


def _publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, which nobody must have taken meanwhile: `link` fails then, where `rename` would not."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise CheckpointError(f"{path} was made meanwhile; nothing is overwritten") from None
    except OSError:  # a file system without links
        if path.exists():
            raise CheckpointError(f"{path} was made meanwhile; nothing is overwritten") from None
        temporary.rename(path)


def _metadata(
    config: Mapping[str, Any], tokenizer_files: Mapping[str, bytes], tensors: Sequence[Source], name: str
) -> dict[str, Any]:
    elements: dict[str, int] = {}
    for source in tensors:
        elements[source.kind] = elements.get(source.kind, 0) + math.prod(source.shape)
    most = max(elements, key=elements.__getitem__, default="F32")
    own = write_config(config)
    return {
        "general.architecture": own.pop("general.architecture"),
        "general.type": "model",
        **({"general.name": name} if name else {}),
        "general.file_type": _FILE_TYPES.get(most, 0),
        "general.quantization_version": _QUANTIZATION_VERSION,
        **own,
        **write_tokenizer(tokenizer_files, int(config["vocab_size"])),
    }


def _encode_header(metadata: Mapping[str, Any], tensors: Sequence[Source], *, hybrid: bool) -> Iterator[bytes]:
    yield MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata))
    for key, value in metadata.items():
        yield _string(key) + _value(value)
    offset, seen = 0, set()
    for source in tensors:
        name = ggml_name(source.name, hybrid=hybrid)
        if name is None or name in seen:
            raise CheckpointError(f"{quote(source.name)} " + ("has no name in GGUF" if name is None else "stands twice"))
        seen.add(name)
        shape = _disk_shape(source)
        yield _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), _TYPE_OF[source.kind], offset)
        offset += _size(source) + -_size(source) % ALIGNMENT


def _disk_shape(source: Source) -> tuple[int, ...]:
    # llama.cpp has the gate of the shared expert as a vector.
    return source.shape[1:] if source.name.endswith("mlp.shared_expert_gate.weight") else source.shape


def _size(source: Source) -> int:
    count = math.prod(source.shape)
    if source.kind in FLOATS:
        return count * FLOATS[source.kind].itemsize
    elements, size = BLOCK[source.kind]
    if source.kind not in QUANTIZE or source.shape[-1] % elements:
        raise CheckpointError(f"{quote(source.name)} of shape {list(source.shape)} cannot be written as {source.kind}")
    return count // elements * size


def _write_tensor(file: BinaryIO, source: Source) -> None:
    tensor = source.make()
    if tuple(tensor.shape) != source.shape or not tensor.is_floating_point():
        what = f"{tensor.dtype} {list(tensor.shape)}, not floats of {list(source.shape)}"
        raise CheckpointError(f"{quote(source.name)} is {what}".replace("torch.", ""))
    try:
        raw = _floats(tensor, source.kind) if source.kind in FLOATS else quantize(source.kind, tensor)
    except CheckpointError as problem:
        raise CheckpointError(f"{quote(source.name)}: {problem}") from problem
    file.write(raw.contiguous().view(-1).view(torch.uint8).numpy().data)


def _floats(tensor: Tensor, kind: str) -> Tensor:
    converted = tensor.detach().to("cpu", FLOATS[kind])
    if not converted.isfinite().all():
        raise CheckpointError(f"a weight is NaN, infinite or beyond {kind}")
    return converted


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A metadata value with its type: bool, u32, f32, text, or a list of i32 or of texts."""
    if isinstance(value, list):
        if value and isinstance(value[0], int):
            return struct.pack(f"<IIQ{len(value)}i", ARRAY, _CODE_OF["i"], len(value), *value)
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    code = "?" if isinstance(value, bool) else "I" if isinstance(value, int) else "f"
    return struct.pack(f"<I{code}", _CODE_OF[code], value)
