"""Hub or folder -> config, and safetensors straight into a model's memory.

A safetensors file is eight bytes of header length N (u64, little-endian), N bytes of JSON that map each tensor's name
to {"dtype", "shape", "data_offsets": [begin, end)}, and the tensors' bytes, row-major and little-endian, without gaps
(github.com/huggingface/safetensors, README "Format"). Everything that can be wrong is found in the headers, before the
first weight is read; a file is read, not mapped, so that one which shrinks is an error and not a crash.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
import struct
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import CheckpointError, QwenRefError
from .limits import LIMITS

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_BLOCK_BYTES = 1 << 22  # read at a time where a tensor is converted or moved: stays in the processor's cache
_MAX_RANK = 8  # no weight has more dimensions
_SURROGATE = re.compile("[\ud800-\udfff]")
INDEX = "model.safetensors.index.json"


# ------------------------------------------------------------------------------------------------- JSON files


def read_json(
    path: Path, error: type[QwenRefError] = CheckpointError, limit: int = LIMITS.config_bytes
) -> dict[str, Any]:
    """A JSON object from a file: UTF-8 without BOM, no duplicate keys, finite numbers, bounded size and depth."""
    if not os.path.isfile(path):  # False, where Path.is_file raises, for a name the system cannot hold
        raise error(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
    except OSError as problem:
        raise error(f"{path}: {problem.strerror or problem}") from problem
    if len(raw) > limit:
        raise error(f"{path}: a file of this kind has at most {limit:,} bytes")
    value = parse_json(raw, str(path), error)
    if not isinstance(value, dict):
        raise error(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def parse_json(raw: bytes, where: str, error: type[QwenRefError]) -> Any:
    """Strict JSON. `where` names the source in messages."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise error(f"{where}: the key {_quote(twice)} stands twice")
        return result

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise error(f"{where}: the number {text:.80} is not finite")
        return value

    def integer(text: str) -> int | float:
        return -0.0 if text == "-0" else int(text)  # to JSON -0 is a float, which is no size; int() would give 0

    if raw.startswith(b"\xef\xbb\xbf"):
        raise error(f"{where}: begins with a byte order mark; save it as UTF-8 without BOM")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique,
            parse_float=finite,
            parse_constant=finite,
            parse_int=integer,
        )
    except UnicodeDecodeError as problem:
        raise error(f"{where}: not UTF-8 (byte {problem.start})") from problem
    except QwenRefError:  # some of them are ValueErrors
        raise
    except RecursionError as problem:
        raise error(f"{where}: nested deeper than {LIMITS.config_depth}") from problem
    except ValueError as problem:  # JSONDecodeError, and integers of more digits than Python converts
        raise error(f"{where}: not valid JSON: {str(problem)[:200]}") from problem
    if _depth(value) > LIMITS.config_depth:
        raise error(f"{where}: nested deeper than {LIMITS.config_depth}")
    return value


def _quote(value: object, limit: int = 120) -> str:
    """Something from an untrusted file, short enough and safe to print."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        depth += 1
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        level = below
        if depth > LIMITS.config_depth:
            break
    return depth


# ------------------------------------------------------------------------------------------------- one safetensors file


class TensorInfo(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte offsets in the file
    end: int


class SafetensorsFile:
    """An open safetensors file whose header has been checked completely. CheckpointError on any damage.

    `tensors` maps names to `TensorInfo` in file order, `metadata` is the header's `__metadata__`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO would block on open
                raise CheckpointError(f"{path}: not a regular file")
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as problem:
            raise CheckpointError(f"{path}: {problem.strerror or problem}") from problem
        try:
            self.tensors, self.metadata = self._header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """One tensor, in CPU memory of its own."""
        info = self.tensors[name]
        out = torch.empty(info.shape, dtype=info.dtype)
        self._fill(name, info.start, out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        """Read a tensor into `out`, which has its shape: in place where dtype and layout agree, else block by block."""
        info = self.tensors[name]
        if tuple(out.shape) != info.shape or not _converts(info.dtype, out.dtype):
            wanted = f"{out.dtype} {list(out.shape)}"
            raise CheckpointError(f"{self.path}: {_quote(name)} is {info.dtype} {list(info.shape)}, not {wanted}")
        if out.device.type == "cpu" and out.dtype == info.dtype and out.is_contiguous():
            self._fill(name, info.start, out)
            return
        if not info.shape or not out.numel():
            out.copy_(self.read(name))
            return
        row = (info.end - info.start) // info.shape[0]  # bytes
        step = min(max(1, _BLOCK_BYTES // row), info.shape[0])
        block = torch.empty((step, *info.shape[1:]), dtype=info.dtype)
        for first in range(0, info.shape[0], step):
            part = out[first : first + step]
            self._fill(name, info.start + first * row, block[: len(part)])
            part.copy_(block[: len(part)])

    def _fill(self, name: str, start: int, out: Tensor) -> None:
        memory = out.view(-1).view(torch.uint8).numpy().data if out.numel() else memoryview(b"")
        self._file.seek(start)
        done = 0
        while done < len(memory):
            try:
                count = self._file.readinto(memory[done:])  # one call may return less than asked: Linux stops at 2 GiB
            except OSError as problem:
                raise CheckpointError(f"{self.path}: {problem.strerror or problem}") from problem
            if not count:
                raise CheckpointError(f"{self.path}: ends inside tensor {_quote(name)}: has it shrunk?")
            done += count

    def _header(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        size = os.fstat(self._file.fileno()).st_size
        start = self._file.read(8) or b""
        if len(start) < 8:
            raise self._damage(f"it has only {size} bytes" if size else "it is empty")
        (length,) = struct.unpack("<Q", start)
        # Only a length that cannot be: "\x80\x02", which begins pickles, also begins a header of 640 bytes.
        if 8 + length > size or length > LIMITS.safetensors_header_bytes:
            self._recognise(start)
        if length > LIMITS.safetensors_header_bytes:
            raise self._damage(f"its header claims {length:,} bytes, over {LIMITS.safetensors_header_bytes:,}")
        if 8 + length > size:
            raise self._damage(f"its header claims {length:,} bytes, but the file has {size:,}: truncated?")
        raw = self._file.read(length) or b""
        if len(raw) < length:
            raise self._damage("it ends inside its header")
        header = parse_json(raw, f"{self.path} (header)", CheckpointError)
        if not isinstance(header, dict):
            raise self._damage("its header is not a JSON object")
        if not raw.startswith(b"{"):
            raise self._damage("its header does not begin with {, as the format wants")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._damage("__metadata__ does not map strings to strings")
        tensors = {name: self._tensor(_quote(name), entry, 8 + length) for name, entry in header.items()}
        if any(_SURROGATE.search(text) for text in (*header, *metadata, *metadata.values())):
            raise self._damage("a name holds half a surrogate pair, which is no character")
        ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
        at = 8 + length
        for name, info in ordered.items():
            if info.start != at:
                kind = "overlaps the tensor before it" if info.start < at else "leaves a hole before it"
                raise self._damage(f"tensor {_quote(name)} {kind}")
            at = info.end
        if at != size:
            raise self._damage(f"its tensors end at byte {at:,} of {size:,}" + (": truncated" if at > size else ""))
        return ordered, metadata

    def _tensor(self, name: str, entry: Any, base: int) -> TensorInfo:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._damage(f"tensor {name} lacks dtype, shape or data_offsets, or has more")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
            raise self._damage(f"tensor {name} has the unknown dtype {_quote(entry['dtype'])}")
        if not isinstance(shape, list) or any(type(n) is not int or not 0 <= n < 1 << 63 for n in shape):
            raise self._damage(f"tensor {name} has the shape {_quote(shape)}, not a list of sizes")
        if len(shape) > _MAX_RANK:  # first: the product of a million sizes takes hours
            raise self._damage(f"tensor {name} has {len(shape):,} dimensions, over {_MAX_RANK}")
        if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int or n < 0 for n in offsets):
            raise self._damage(f"tensor {name} has the data_offsets {_quote(offsets)}")
        dtype, (begin, end) = DTYPES[entry["dtype"]], offsets
        if end - begin != math.prod(shape) * dtype.itemsize or math.prod(n or 1 for n in shape) >= 1 << 63:
            what = f"{entry['dtype']} {shape}"
            raise self._damage(f"tensor {name} of {what} does not fit its data_offsets {_quote(offsets)}")
        return TensorInfo(dtype, tuple(shape), base + begin, base + end)

    def _recognise(self, start: bytes) -> None:
        for magic, what in (
            (b"version ", "a Git LFS pointer, not the file itself: run `git lfs pull`, or download from the hub"),
            (b"<!doctyp", "an HTML page: the download went wrong"),
            (b"<html", "an HTML page: the download went wrong"),
            (b"PK\x03\x04", "a zip or PyTorch pickle file; only safetensors are read, never pickles"),
            (b"\x80\x02", "a pickle file; only safetensors are read, never pickles"),
            (b"GGUF", "a GGUF file, not safetensors"),
        ):
            if start.lower().startswith(magic.lower()):
                raise self._damage(f"it is {what}")

    def _damage(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a usable safetensors file: {problem}")


def _converts(disk: torch.dtype, memory: torch.dtype) -> bool:
    """Floats convert into each other; integers and float8 are codes that mean nothing without their scales."""
    return disk == memory or (disk in _WEIGHT_DTYPES and memory in _WEIGHT_DTYPES)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or the only one. CheckpointError if unclear."""
    if (folder / INDEX).is_file():
        return [folder / shard for shard in sorted(set(read_index(folder / INDEX).values()))]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise CheckpointError(f"{folder}: several safetensors files and no {INDEX} that says which belong to the model")
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)]
    hint = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
    raise CheckpointError(f"{folder}: no model.safetensors and no {INDEX}{hint}")


def read_index(path: Path) -> dict[str, str]:
    """weight_map of a model.safetensors.index.json: tensor name -> shard, a plain file name in the same folder."""
    weight_map = read_json(path, limit=LIMITS.index_bytes).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map")
    if len(weight_map) > LIMITS.index_entries:
        raise CheckpointError(f"{path}: names {len(weight_map):,} tensors, over {LIMITS.index_entries:,}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard) or shard.startswith("."):
            what = "which is not the name of a safetensors file beside it"
            raise CheckpointError(f"{path}: puts {_quote(name)} in {_quote(shard)}, {what}")
    return weight_map


# ------------------------------------------------------------------------------------------------- a whole checkpoint


class CheckpointModule(Protocol):
    """What loading and saving ask of a model; see `models.common.LanguageModel`."""

    @property
    def tied(self) -> dict[str, str]: ...
    @property
    def ignored(self) -> tuple[str, ...]: ...
    def checkpoint_tensors(self) -> dict[str, Tensor]: ...
    def canonical_name(self, name: str) -> str: ...
    def named_parameters(self) -> Iterable[tuple[str, Any]]: ...


@dataclass
class LoadReport:
    """What a load found, by name. The first group are problems, each of which refuses the checkpoint."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[str] = field(default_factory=list)
    wrong_dtype: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)
    wrong_file: list[str] = field(default_factory=list)  # the index and the shards contradict each other

    ignored: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)  # present although tied, and equal to their source
    notes: list[str] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0

    def problems(self) -> str:
        """All problems as text, ten of each kind; empty if there are none."""
        kinds = ("missing", "unexpected", "wrong_shape", "wrong_dtype", "duplicate", "wrong_file")
        lines = []
        for kind in kinds:
            if names := getattr(self, kind):
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                lines.append(f"  {kind.replace('_', ' ')} ({len(names)}): " + "; ".join(sorted(names)[:10]) + more)
        return "\n".join(lines)


class _Read(NamedTuple):
    """One tensor of one file and where it goes; `out` None = compare it with its tied source instead."""

    file: SafetensorsFile
    name: str
    out: Tensor | None
    source: Tensor | None = None


def load_weights(
    model: CheckpointModule, folder: Path, *, progress: bool = True, check_finite: bool = False
) -> LoadReport:
    """Fill the model from the folder's safetensors, one tensor at a time, converted to the model's dtype and device.

    Peak memory is the model and one block of 4 MiB; where the file holds a copy of a tied tensor, that copy instead.
    Raises CheckpointError, before any weight is read, that names every missing, unexpected, wrongly shaped or typed, or
    duplicate tensor. `check_finite` also refuses NaN and infinity.
    """
    from tqdm import tqdm

    started = time.perf_counter()
    report = LoadReport()
    files = [SafetensorsFile(path) for path in weight_files(folder)]
    try:
        plan = _plan(model, files, report)
        _check_index(folder, files, report)
        if problems := report.problems():
            raise CheckpointError(f"{folder} does not fit its config.json:\n{problems}{_hint(report)}")
        report.bytes = sum(read.file.tensors[read.name].end - read.file.tensors[read.name].start for read in plan)
        with tqdm(total=report.bytes, unit="B", unit_scale=True, desc="loading", delay=1, disable=not progress) as bar:
            for read in plan:
                _carry_out(read, check_finite)
                bar.update(read.file.tensors[read.name].end - read.file.tensors[read.name].start)
    finally:
        for file in files:
            file.__exit__(None, None, None)
    report.seconds = time.perf_counter() - started
    return report


def has_language_head(folder: Path) -> bool:
    """False for a base model's files (an embedding checkpoint), whose names lack the `model.` prefix and a head."""
    names: set[str] = set()
    for path in weight_files(folder):
        with SafetensorsFile(path) as file:
            names.update(file.tensors)
    return "lm_head.weight" in names or not any(name.startswith("embed_tokens.") for name in names)


def _plan(model: CheckpointModule, files: list[SafetensorsFile], report: LoadReport) -> list[_Read]:
    """Decide for every tensor on disk where it goes, and note in the report what does not fit."""
    slots, tied = model.checkpoint_tensors(), model.tied
    whole = {name: parameter.data for name, parameter in model.named_parameters() if name not in slots}
    parts: dict[str, list[str]] = {name: [] for name in whole}  # a stacked parameter and the names of its parts
    for slot, view in slots.items():
        for name in parts:
            if slot.startswith(name.rpartition(".")[0] + ".") and _inside(view, whole[name]):
                parts[name].append(slot)
    _check_coverage(model, slots)
    filled: dict[str, str] = {}
    plan = []
    for file in files:
        for disk_name, info in file.tensors.items():
            name = model.canonical_name(disk_name)
            if any(re.search(pattern, name) for pattern in model.ignored):
                report.ignored.append(disk_name)
                continue
            out, source = slots.get(name, whole.get(name)), None
            if name in tied and name not in slots:
                out, source = None, slots[tied[name]]
            target = out if out is not None else source
            if target is None:
                report.unexpected.append(f"{disk_name} {info.dtype} {list(info.shape)}".replace("torch.", ""))
                continue
            if info.shape != tuple(target.shape):
                report.wrong_shape.append(f"{disk_name} is {list(info.shape)}, the config wants {list(target.shape)}")
            elif not _converts(info.dtype, target.dtype):
                report.wrong_dtype.append(f"{disk_name} is {info.dtype}, not {target.dtype}".replace("torch.", ""))
            for part in parts.get(name) or [name]:
                if part in filled:
                    report.duplicate.append(f"{part} ({filled[part]} and {file.path.name}:{disk_name})")
                filled[part] = f"{file.path.name}:{disk_name}"
            if source is not None:
                report.tied.append(disk_name)
            plan.append(_Read(file, disk_name, out, source))
    report.missing.extend(name for name in slots if name not in filled)
    plan.sort(key=lambda read: read.out is None)  # a tied copy is compared once its source is read
    return plan


def _check_coverage(model: CheckpointModule, slots: Mapping[str, Tensor]) -> None:
    """Each parameter's elements are as many as its storage's slots: memory nobody names would stay uninitialised."""
    named: Counter[int] = Counter()
    for view in slots.values():
        named[view.untyped_storage().data_ptr()] += view.numel()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CheckpointError(f"the model's {name} has no memory (meta device): allocate it before loading")
        if parameter.numel() > named[parameter.untyped_storage().data_ptr()]:
            raise CheckpointError(f"checkpoint_tensors() leaves part of {name} out: a fault of the model, not the file")


def _inside(view: Tensor, whole: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def _check_index(folder: Path, files: list[SafetensorsFile], report: LoadReport) -> None:
    if not (folder / INDEX).is_file():
        return
    weight_map = read_index(folder / INDEX)
    actual = {(name, file.path.name) for file in files for name in file.tensors}
    claimed = set(weight_map.items())
    report.wrong_file += [f"{name} is not in {shard}, where the index puts it" for name, shard in claimed - actual]
    report.wrong_file += [f"{name} in {shard} is not in the index" for name, shard in actual - claimed
                          if weight_map.get(name) in (None, shard)]
    size = sum(info.end - info.start for file in files for info in file.tensors.values())
    metadata = read_json(folder / INDEX, limit=LIMITS.index_bytes).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and total != size:  # official repositories have had wrong ones
        report.notes.append(f"{INDEX} says total_size {total}; the tensors have {size} bytes")


def _carry_out(read: _Read, check_finite: bool) -> None:
    if read.out is not None:
        read.file.read_into(read.name, read.out)
        if check_finite and not bool(torch.isfinite(read.out).all()):
            raise CheckpointError(f"{read.file.path}: tensor {read.name!r} holds NaN or infinity")
        return
    source = read.source
    if source is not None and not torch.equal(read.file.read(read.name).to(source.dtype), source.cpu()):
        raise CheckpointError(
            f"{read.file.path}: {read.name!r} differs from the embedding, but config.json says tie_word_embeddings"
        )


def _hint(report: LoadReport) -> str:
    if "lm_head.weight" in report.missing:
        return "\n  (lm_head.weight may only be absent if config.json says tie_word_embeddings)"
    if report.wrong_dtype:
        return "\n  (a quantised checkpoint needs its quantization_config in config.json)"
    return ""


# ------------------------------------------------------------------------------------------------- saving


def save_model(
    model: CheckpointModule,
    config: Mapping[str, Any],
    folder: Path,
    *,
    extra: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json, weights under their official names, and `extra` files to a new folder, all or nothing."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; nothing is overwritten")
    for name in extra or {}:
        if Path(name).name != name or name.endswith(".safetensors") or name in ("config.json", INDEX):
            raise CheckpointError(f"{_quote(name)} is not the name of an extra file")
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.mkdir(parents=True)
        shards = _shards(model.checkpoint_tensors(), max_shard_bytes)
        names = ["model.safetensors"] if len(shards) == 1 else [
            f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        for name, tensors in zip(names, shards, strict=True):
            write_safetensors(temporary / name, tensors)
        if len(shards) > 1:
            weight_map = {t: name for name, tensors in zip(names, shards, strict=True) for t in tensors}
            total = sum(t.nbytes for tensors in shards for t in tensors.values())
            _write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(temporary / "config.json", config)
        for name, content in (extra or {}).items():
            (temporary / name).write_bytes(content)
        if folder.exists():
            folder.rmdir()  # Windows does not rename onto a folder, not even an empty one
        temporary.rename(folder)
    except OSError as problem:
        raise CheckpointError(f"could not write {folder}: {problem.strerror or problem}") from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to one file, one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    # Wide dtypes first: each tensor is then aligned to its own item size, which readers that map the file rely on.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise CheckpointError(f"{_quote(name)} is {tensor.dtype}, which safetensors cannot hold")
        end = at + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the data begins at a multiple of eight
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for tensor in tensors.values():
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise CheckpointError(f"{path.name} cannot be written as JSON: {problem}") from problem
    path.write_text(text + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------- the hub

_METADATA = ["*.json", "merges.txt", "*.tiktoken", "*.jinja"]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def find(
    model: str | Path, *, revision: str | None = None, offline: bool | None = None, metadata_only: bool = False
) -> Path:
    """The folder of a checkpoint: an existing folder itself, or a hub id such as "Qwen/Qwen3-0.6B", downloaded.

    Only JSON, tokenizer and template files and the safetensors files of the index are fetched, never code or pickles.

    Args:
        revision: a branch, tag or commit of the hub.
        offline: True uses only what was downloaded before; None follows the environment's HF_HUB_OFFLINE.
        metadata_only: leave the weights out.
    Raises: CheckpointError that says what to do.
    """
    folder = Path(model).expanduser()
    if os.path.isdir(folder):  # False, where Path.is_dir raises, for a name the system cannot hold
        if revision is not None:
            raise CheckpointError(f"{model} is a folder, which has no revision {revision!r}; leave the revision out")
        return folder
    if not _HUB_ID.fullmatch(str(model)):
        raise CheckpointError(f"{_quote(str(model))} is neither a folder nor a hub id of the form organisation/name")
    return _download(str(model), revision, bool(offline), metadata_only)


def _download(repo: str, revision: str | None, offline: bool, metadata_only: bool) -> Path:
    folder = _snapshot(repo, revision, offline, _METADATA)
    if metadata_only:
        return folder
    index = folder / INDEX
    names = sorted(set(read_index(index).values())) if index.is_file() else ["model.safetensors"]
    # A snapshot's folder is named by its commit. Asking for that keeps both halves of one version, whatever is pushed
    # to the branch in the meantime.
    folder = _snapshot(repo, folder.name, offline, names)
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{repo}: {_quote(absent)} could not be found (offline, or the repository holds no safetensors weights; "
            "pickled .bin and .pt files are never read)"
        )
    return folder


def _snapshot(repo: str, revision: str | None, offline: bool, patterns: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # "*" of a pattern crosses folders, so everything inside folders (original/, onnx/) is left out by name.
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                local_files_only=offline,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
            )
        )
    except Exception as cause:  # also those of its HTTP client, which are a different package's from version to version
        raise _hub_error(repo, revision, cause) from cause


def _hub_error(repo: str, revision: str | None, cause: Exception) -> CheckpointError:
    from huggingface_hub import errors

    where = repo if revision is None else f"{repo} (revision {revision})"
    number = cause.errno if isinstance(cause, OSError) else None
    if isinstance(cause, errors.HFValidationError):
        advice = "is not a valid hub id"
    elif isinstance(cause, errors.GatedRepoError):
        advice = "is gated: accept its terms on the hub, then set HF_TOKEN or run `hf auth login`"
    elif isinstance(cause, errors.RepositoryNotFoundError):
        advice = "is not on the hub, or is private: check the spelling, or set HF_TOKEN or run `hf auth login`"
    elif isinstance(cause, errors.RevisionNotFoundError):
        advice = "has no such revision on the hub"
    elif isinstance(cause, errors.LocalEntryNotFoundError):
        advice = "is not (completely) in the local cache, and the hub was not reached: connect, or give a local folder"
    elif number in (errno.ENOSPC, errno.EDQUOT):
        advice = "does not fit on the disk: free some space, or point HF_HOME to a larger disk"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "cannot be written to the cache: point HF_HOME to a folder you may write to"
    else:
        advice = "could not be downloaded: try again, or give a local folder"
    detail = " ".join(str(cause).split())
    return CheckpointError(f"{where} {advice} [{type(cause).__name__}: {detail[:500]}]")
