"""GGUF files (llama.cpp): the container, its tensors under their official names, and their blocks as packed matrices.

A file is "GGUF", a version, the numbers of tensors and of metadata pairs, the pairs (key, type, value), the tensors' names,
dimensions (fastest first), types and offsets, and after padding the tensors' bytes, all little-endian (docs/gguf.md in
github.com/ggml-org/ggml). Counts, lengths and offsets are checked against the file before they are followed. Blocks stay
as they are: `GgufFile` shows a quantised (N, K) matrix as uint8 (N, bytes of a row), and `repack` makes it a `Packed`.
"""

from __future__ import annotations

import io
import math
import re
import struct
import sys
from array import array
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..limits import LIMITS
from ..safetensors_file import SafetensorsFile, TensorInfo
from ..strict_json import quote
from .gguf_blocks import BLOCK, E2M1_VALUES, IQ4_VALUES, five_bits, scales_of
from .gguf_hybrid import Heads, OfficialTensors
from .gguf_meta import draft_layers, read_config, read_tokenizer
from .packed import Code4, Gguf, Int4, Int8, Packed

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # as in `struct`
STRING, ARRAY = 8, 9  # the other types of a metadata value
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 29: "IQ1_M", 30: "BF16", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 34: "TQ1_0", 35: "TQ2_0",
}  # fmt: skip
_MOST_KEYS, _MOST_TENSORS = 1 << 16, 1 << 17
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",  # (E, N, K), all experts in one tensor
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_HYBRID_NAMES = {  # of Qwen3-Next and Qwen3.5; how the tensors differ: `gguf_hybrid`
    "post_attention_norm": "post_attention_layernorm",  # where the others have ffn_norm
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
    "nextn.eh_proj": "mtp.fc",
    "nextn.enorm": "mtp.pre_fc_norm_embedding",
    "nextn.hnorm": "mtp.pre_fc_norm_hidden",
    "nextn.shared_head_norm": "mtp.norm",
    "nextn.embed_tokens": "mtp.embed_tokens",
    "nextn.shared_head_head": "mtp.lm_head",
}
_WHOLE_NAMES = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}  # neither a weight nor a bias
_OFFICIAL_NAMES = _OUTER_NAMES | _LAYER_NAMES | _HYBRID_NAMES | _WHOLE_NAMES
_GGML_NAMES = {official: name for name, official in _OFFICIAL_NAMES.items()}  # the norm before the feed-forward: hybrids'


def official_name(name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None if no Qwen model has such a tensor."""
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,3})\.)?([\w.]+?)(\.weight|\.bias)?", name, re.ASCII)
    if match is None:
        return None
    layer, module, kind = match.groups("")
    if layer and f"{module}{kind}" in _WHOLE_NAMES:
        return f"model.layers.{layer}.{_WHOLE_NAMES[f'{module}{kind}']}"
    official = (_LAYER_NAMES | _HYBRID_NAMES if layer else _OUTER_NAMES).get(module) if kind else None
    prefix = f"model.layers.{layer}." if layer else ""
    return None if official is None else f"{prefix}{official}{kind}"


def ggml_name(name: str, *, hybrid: bool = False) -> str | None:
    """The inverse of `official_name`. `hybrid`: of Qwen3-Next or Qwen3.5, which call one norm otherwise."""
    match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+?)(\.weight|\.bias)?", name)
    if match is None or match[2] not in _GGML_NAMES:
        return None
    own = _GGML_NAMES[match[2]]
    if own == "post_attention_norm" and not hybrid:
        own = "ffn_norm"
    candidate = ("" if match[1] is None else f"blk.{match[1]}.") + own + (match[3] or "")
    return candidate if official_name(candidate) == name else None


# ------------------------------------------------------------------------------------------------- one file


class GgufFile(SafetensorsFile):
    """An open GGUF file whose header has been checked completely: read as `SafetensorsFile`, only the header differs.

    `tensors` maps official names to `TensorInfo` in the order of the data, `kinds` those of quantised ones, which show as
    uint8 (..., bytes of a row), to their block type; `metadata` holds the pairs as they are. CheckpointError on any damage.
    """

    kinds: dict[str, str]
    metadata: dict[str, Any]

    def __enter__(self) -> GgufFile:
        return self

    def _header(self) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
        self._file.seek(0, io.SEEK_END)
        self._size = self._file.tell()
        self._file.seek(0)
        buffered = io.BufferedReader(self._file, 1 << 20)
        try:
            return self._parse(_Header(buffered, self._size, self._damage))
        except OSError as problem:
            raise CheckpointError(f"{self.path}: {problem.strerror or problem}") from problem
        finally:
            buffered.detach()

    def _parse(self, header: _Header) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
        magic = header.take(4)
        if magic != MAGIC:
            self._recognise(magic)
            raise self._damage(f"it begins with {quote(magic)}, not {quote(MAGIC)}")
        version = header.number("I")
        if version and not version & 0xFFFF:
            raise self._damage("it is big-endian; convert it on a machine of that kind, or download the usual one")
        if version not in (2, 3):
            raise self._damage(f"its version is {version}; implemented: 2, 3")
        tensors = header.count("Q", _MOST_TENSORS, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(header.count("Q", _MOST_KEYS, "metadata pairs")):
            key = header.string()
            if key in metadata:
                raise self._damage(f"the key {quote(key)} stands twice")
            metadata[key] = header.value(header.number("I"))
        entries = [self._entry(header) for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._damage(f"general.alignment is {quote(alignment)}, not a power of two from 8 to 1,048,576")
        return self._place(entries, -(-header.at // alignment) * alignment, alignment), metadata

    def _entry(self, header: _Header) -> tuple[str, tuple[int, ...], str, int]:
        """Official name, shape, type and offset of a tensor."""
        raw = header.string()
        name = official_name(raw)
        if name is None:
            raise self._damage(f"tensor {quote(raw)} has no place in a Qwen model that is implemented")
        rank = header.number("I")
        if not 1 <= rank <= 4:
            raise self._damage(f"tensor {quote(raw)} has {rank} dimensions, not 1 to 4")
        shape = tuple(reversed([header.number("Q") for _ in range(rank)]))
        if not all(1 <= n <= LIMITS.width for n in shape):
            raise self._damage(f"tensor {quote(raw)} has the shape {list(shape)}; sizes are from 1 to {LIMITS.width:,}")
        code = header.number("I")
        if code not in TENSOR_TYPES:
            known = ", ".join(TENSOR_TYPES.values())
            raise self._damage(f"tensor {quote(raw)} is of type {_OTHER_TYPES.get(code, code)}; implemented: {known}")
        if name.endswith("mlp.shared_expert_gate.weight") and rank == 1:
            shape = (1, *shape)  # a matrix of one row, which converters squeeze
        return name, shape, TENSOR_TYPES[code], header.number("Q")

    def _place(
        self, entries: list[tuple[str, tuple[int, ...], str, int]], base: int, alignment: int
    ) -> dict[str, TensorInfo]:
        """Check that the tensors lie one after the other in the file, and note the kinds of the quantised ones."""
        tensors: dict[str, TensorInfo] = {}
        self.kinds = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self._damage(f"tensor {quote(name)} stands twice")
            if offset % alignment:
                raise self._damage(f"tensor {quote(name)} begins at offset {offset:,}, no multiple of {alignment}")
            dtype = FLOATS.get(kind, torch.uint8)
            if kind in BLOCK:
                elements, size = BLOCK[kind]
                if shape[-1] % elements:
                    raise self._damage(f"tensor {quote(name)} has rows of {shape[-1]}, not whole blocks of {elements} ({kind})")
                shape = (*shape[:-1], shape[-1] // elements * size)
                self.kinds[name] = kind
            start = base + offset
            tensors[name] = TensorInfo(dtype, shape, start, start + math.prod(shape) * dtype.itemsize)
        ordered = dict(sorted(tensors.items(), key=lambda item: item[1].start))
        for (_, before), (name, info) in pairwise([("", TensorInfo(torch.uint8, (), base, base)), *ordered.items()]):
            if not 0 <= info.start - before.end < alignment:
                kind = "overlaps the tensor before it" if info.start < before.end else "leaves a hole before it"
                raise self._damage(f"tensor {quote(name)} {kind}")
            if info.end > self._size:
                raise self._damage(f"tensor {quote(name)} ends at byte {info.end:,} of {self._size:,}: truncated")
        return ordered

    def _damage(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a usable GGUF file: {problem}")


class _Header:
    """Reads numbers, strings and values in order, and never more than the file or the limit allows."""

    def __init__(self, file: BinaryIO, size: int, damage: Any) -> None:
        self.at = 0
        self._file, self._damage = file, damage
        self._end = min(size, LIMITS.gguf_header_bytes)
        whole = size == self._end
        self._problem = "it ends inside its header: truncated?" if whole else f"its header exceeds {self._end:,} bytes"

    def take(self, count: int) -> bytes:
        if count > self._end - self.at:
            raise self._damage(self._problem)
        raw = self._file.read(count)
        if len(raw) < count:
            raise self._damage("it ends inside its header: has it shrunk?")
        self.at += count
        return raw

    def number(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        (value,) = struct.unpack(f"<{code}", self.take(size))
        return value

    def count(self, code: str, most: int, what: str) -> int:
        value = self.number(code)
        if value > most:
            raise self._damage(f"it claims {value:,} {what}, over {most:,}")
        return value

    def string(self) -> str:
        raw = self.take(int.from_bytes(self.take(8), "little"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as problem:
            raise self._damage(f"the text {quote(raw[:80])} is not UTF-8 (byte {problem.start})") from problem

    def value(self, kind: int) -> Any:
        """A number, a truth value, a string, or a list or `array` of them."""
        if kind == ARRAY:
            return self._array(self.number("I"), self.number("Q"))
        if kind == STRING:
            return self.string()
        if kind not in SCALARS:
            raise self._damage(f"a metadata value is of the unknown type {kind}")
        if SCALARS[kind] == "?":
            return bool(self._truths(self.take(1))[0])
        return self.number(SCALARS[kind])

    def _array(self, kind: int, count: int) -> list[str] | array[Any]:
        if kind == STRING:
            return [self.string() for _ in range(count)]
        if kind not in SCALARS:
            raise self._damage("a metadata array holds arrays" if kind == ARRAY else f"an array is of the unknown type {kind}")
        if SCALARS[kind] == "?":
            return array("B", self._truths(self.take(count)))
        numbers = array(SCALARS[kind], self.take(count * struct.calcsize(f"<{SCALARS[kind]}")))
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers

    def _truths(self, raw: bytes) -> bytes:
        if raw.strip(b"\0\1"):
            raise self._damage("a truth value is neither 0 nor 1")
        return raw


# ------------------------------------------------------------------------------------------------- a model


class GgufCheckpoint:
    """All files of one model, opened and checked. A context manager; views of mapped tensors outlive it.

    Attributes:
        files: the parts, in order; of a hybrid model, one `gguf_hybrid.OfficialTensors`, with its `orders` and `notes`.
        kinds: official name -> block type of every quantised tensor in any of them.
        config: what config.json would hold, in the official spelling. `torch_dtype` is that of the matrices where they
            are unquantised and of one dtype, otherwise bfloat16.
        tokenizer_files: name -> content of vocab.json, merges.txt, tokenizer_config.json and generation_config.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with ExitStack() as opened:
            first = opened.enter_context(GgufFile(path))
            paths = _parts(path, first.metadata)
            self.files: list[Any] = [first if part == path else opened.enter_context(GgufFile(part)) for part in paths]
            self._check_parts()
            self.orders: dict[str, Tensor] = {}
            self.notes: list[str] = []
            metadata, where = self.files[0].metadata, str(self.files[0].path)  # the other parts have next to none
            if (heads := Heads.from_metadata(metadata, where)) is not None:
                official = OfficialTensors(self.files, heads, draft_layers(metadata, where))
                self.files, self.orders, self.notes = [official], official.orders, official.notes
            self._opened = opened.pop_all()

    def __enter__(self) -> GgufCheckpoint:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.close()

    @property
    def kinds(self) -> dict[str, str]:
        return {name: kind for file in self.files for name, kind in file.kinds.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Official name -> shape in elements."""
        return {name: _elements(info.shape, file.kinds.get(name))
                for file in self.files for name, info in file.tensors.items()}  # fmt: skip

    @cached_property
    def config(self) -> dict[str, Any]:
        config = read_config(self.files[0].metadata, self.shapes, str(self.files[0].path))
        dtypes = {info.dtype for file in self.files for info in file.tensors.values() if len(info.shape) > 1}
        # Of a quantised file nothing says what the activations had; every Qwen was trained in bfloat16.
        whole = dtypes.pop() if len(dtypes) == 1 and not self.kinds else torch.bfloat16
        config["torch_dtype"] = str(whole).removeprefix("torch.")
        return config

    @cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        return read_tokenizer(self.files[0].metadata, str(self.files[0].path))

    def _check_parts(self) -> None:
        seen: set[str] = set()
        for number, file in enumerate(self.files):
            own, count = file.metadata.get("split.no", 0), file.metadata.get("split.count", 1)
            if len(self.files) > 1 and (own, count) != (number, len(self.files)):
                what = f"is part {quote(own)} of {quote(count)} by its metadata, not {number} of {len(self.files)}"
                raise CheckpointError(f"{file.path}: {what} (counted from 0)")
            for name in file.tensors:
                if name in seen:
                    raise CheckpointError(f"{file.path}: tensor {quote(name)} is also in a part before it")
                seen.add(name)
        total = self.files[0].metadata.get("split.tensors.count", len(seen))
        if total != len(seen):
            raise CheckpointError(f"{self.path}: the parts hold {len(seen)} tensors, not {quote(total)} as the first says")


def open_gguf(path: str | Path) -> GgufCheckpoint:
    """Open a GGUF file, and if it is part of a split model (name-00001-of-00003.gguf) all parts of it.

    Raises: CheckpointError for damage or a missing part. `config` and `tokenizer_files` are made when first asked for,
    and raise ConfigError or TokenizerError for what they cannot express.
    """
    return GgufCheckpoint(Path(path))


def _parts(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    count = metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= 0xFFFF:
        raise CheckpointError(f"{path}: split.count is {quote(count)}")
    if count < 2:
        return [path]
    match = _SPLIT.fullmatch(path.name)
    if match is None or int(match["count"]) != count or not 1 <= int(match["number"]) <= count:
        raise CheckpointError(f"{path} is one of {count} parts, which are found by name: keep NAME-00001-of-{count:05}.gguf")
    parts = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.exists()]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(f"{path}: of its {count} parts {', '.join(missing[:5])}{more} missing; download the rest")
    return parts


def _elements(shape: tuple[int, ...], kind: str | None) -> tuple[int, ...]:
    if kind is None:
        return shape
    elements, size = BLOCK[kind]
    return (*shape[:-1], shape[-1] // size * elements)


# ------------------------------------------------------------------------------------------------- blocks in memory

_CHUNK_BYTES = 1 << 18  # of blocks at a time: what is made of them stays in the processor's cache


def repack(kind: str, blocks: Tensor) -> Packed:
    """Blocks of a file, (..., N, bytes of a row) uint8, in the layout that computes with them, without loss.

    Q8_0 and Q5_0 become Int8, Q4_0 Int4, IQ4_NL, MXFP4 and NVFP4 Code4; the rest stays as it is. Raises: CheckpointError
    for a scale that is NaN or infinite.
    """
    elements, size = BLOCK[kind]
    b = blocks.unflatten(-1, (-1, size))  # (..., N, G, bytes)
    if kind not in _CODES_AND_SCALE:
        _check_finite(kind, *scales_of(kind, b))
        return Gguf(blocks, kind)
    codes, scale = _by_rows(_CODES_AND_SCALE[kind], b)
    _check_finite(kind, scale)
    if kind in ("Q8_0", "Q5_0"):
        return Int8(codes, scale, None, elements)
    if kind == "Q4_0":
        return Int4(codes, scale, None, elements)
    table = torch.tensor(IQ4_VALUES if kind == "IQ4_NL" else E2M1_VALUES, dtype=torch.float32, device=b.device)
    return Code4(codes, scale, table, 16 if kind == "NVFP4" else elements)


def _by_rows(unpack: Callable[[Tensor], tuple[Tensor, Tensor]], b: Tensor) -> list[Tensor]:
    """`unpack` of (rows, G, bytes) to two (rows, ...), a chunk of rows at a time: (..., N, G, bytes) -> (..., N, *) each."""
    rows = b.flatten(0, -3)
    step = max(1, _CHUNK_BYTES // rows[0].numel()) if b.device.type == "cpu" else len(rows)
    outs: list[Tensor] = []
    for first in range(0, len(rows), step):
        parts = unpack(rows[first : first + step])
        outs = outs or [part.new_empty(len(rows), part.shape[-1]) for part in parts]
        for out, part in zip(outs, parts, strict=True):
            out[first : first + step] = part
    return [out.view(*b.shape[:-2], -1) for out in outs]


def _of_q8_0(b: Tensor) -> tuple[Tensor, Tensor]:
    return b[..., 2:].view(torch.int8).flatten(-2), _half_scale(b)


def _of_q5_0(b: Tensor) -> tuple[Tensor, Tensor]:
    return (five_bits(b[..., 2:6], b[..., 6:]).view(torch.int8) - 16).flatten(-2), _half_scale(b)


def _of_nibbles(b: Tensor) -> tuple[Tensor, Tensor]:  # Q4_0, IQ4_NL
    return _neighbours(b[..., 2:]), _half_scale(b)


def _of_mxfp4(b: Tensor) -> tuple[Tensor, Tensor]:
    return _neighbours(b[..., 1:]), b[..., 0].contiguous().view(torch.float8_e8m0fnu)


def _of_nvfp4(b: Tensor) -> tuple[Tensor, Tensor]:
    codes = _neighbours(b[..., 4:].unflatten(-1, (4, 8)).flatten(-3, -2))
    return codes, (b[..., :4] & 127).view(torch.float8_e4m3fn).flatten(-2)


_CODES_AND_SCALE = {"Q8_0": _of_q8_0, "Q5_0": _of_q5_0, "Q4_0": _of_nibbles, "IQ4_NL": _of_nibbles,
                    "MXFP4": _of_mxfp4, "NVFP4": _of_nvfp4}  # fmt: skip


def _neighbours(q: Tensor) -> Tensor:
    """`pack4(nibbles(q))`, (..., G, n) -> (..., G * n), on pairs of bytes, whose codes lie eight bits apart."""
    pairs = q.clone(memory_format=torch.contiguous_format).view(torch.int16)  # (..., G, n / 2); of one block q is contiguous
    lanes = [(lane | lane >> 4).to(torch.uint8) for lane in (pairs & 0x0F0F, pairs >> 4 & 0x0F0F)]
    word = torch.int64 if q.shape[-1] == 16 else torch.int32  # a lane of n / 2 bytes is put in its place at once
    return torch.cat([lane.view(word) for lane in lanes], dim=-1).view(torch.uint8).flatten(-2)


def _half_scale(b: Tensor) -> Tensor:
    return b[..., :2].clone(memory_format=torch.contiguous_format).view(torch.float16)[..., 0]


def _check_finite(kind: str, *scales: Tensor) -> None:
    if not all(scale.float().isfinite().all() for scale in scales):
        raise CheckpointError(f"a {kind} block has a scale that is NaN or infinite")
