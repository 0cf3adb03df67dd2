"""A folder's config and weight files into a model's memory, and back.

Everything that can be wrong is found in the headers, before the first weight is read. A tensor that a parameter can hold
as it stands is not copied: the parameter is a view of the mapped file, whose pages become the process's own when they are
written to.
"""

from __future__ import annotations

import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import CheckpointError
from .limits import LIMITS
from .safetensors_file import SafetensorsFile, TensorInfo, converts, exists, write_safetensors
from .strict_json import quote, read_json, write_json

# Of a quantised KV cache, as ModelOpt and compressed-tensors name them; keys and values are kept in full precision here.
_KV_SCALES = r"\.self_attn\.(?:[kv]_proj\.)?[kv]_scale$"
INDEX = "model.safetensors.index.json"


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
            raise CheckpointError(f"{path}: puts {quote(name)} in {quote(shard)}, {what}")
    return weight_map


class CheckpointModule(Protocol):
    """What loading and saving ask of a model; see `models.common.LanguageModel`."""

    @property
    def tied(self) -> dict[str, str]: ...
    @property
    def ignored(self) -> tuple[str, ...]: ...
    @property
    def constants(self) -> dict[str, Tensor]: ...
    @property
    def row_read(self) -> set[str]: ...
    def checkpoint_tensors(self) -> dict[str, Tensor]: ...
    def canonical_name(self, name: str) -> str: ...
    def disk_name(self, name: str) -> str: ...
    def named_parameters(self) -> Iterable[tuple[str, Any]]: ...


@dataclass
class LoadReport:
    """What a load found, by the names on disk. The first group are problems, each of which refuses the checkpoint."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[str] = field(default_factory=list)
    wrong_dtype: list[str] = field(default_factory=list)
    wrong_value: list[str] = field(default_factory=list)  # of what config.json determines
    duplicate: list[str] = field(default_factory=list)
    wrong_file: list[str] = field(default_factory=list)  # the index and the shards contradict each other

    loaded: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)  # present although tied, and equal to their source
    constant: list[str] = field(default_factory=list)  # present although config.json determines them, and equal to that
    notes: list[str] = field(default_factory=list)
    dtypes: Counter[str] = field(default_factory=Counter)  # on disk: "bfloat16" -> how many of `loaded`
    bytes: int = 0  # of all tensors read, mapped or compared
    mapped: int = 0  # of those that lie in the mapped file
    seconds: float = 0.0

    def problems(self) -> str:
        """All problems as text, ten of each kind; empty if there are none."""
        kinds = ("missing", "unexpected", "wrong_shape", "wrong_dtype", "wrong_value", "duplicate", "wrong_file")
        lines = []
        for kind in kinds:
            if names := getattr(self, kind):
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                lines.append(f"  {kind.replace('_', ' ')} ({len(names)}): " + "; ".join(sorted(names)[:10]) + more)
        return "\n".join(lines)


class _Read(NamedTuple):
    """One tensor of one file and where in the model it goes."""

    file: SafetensorsFile
    name: str
    slot: str  # the model's name for it; of a tied tensor, the name of its source
    tied: bool  # compare it with the slot instead of filling it
    mappable: bool  # the slot is a whole parameter of the same dtype, or a table's shard
    row_read: bool = False  # only rows of it are needed: a mapped one is not brought into memory

    @property
    def info(self) -> TensorInfo:
        return self.file.tensors[self.name]


class Checkpoint:
    """The open weight files of a folder, on their way into a model: `check`, then perhaps `views`, then `read`."""

    def __init__(self, folder: Path, files: Sequence[SafetensorsFile] | None = None) -> None:
        """`files`: already open, and closed by who opened them; default those of the folder."""
        self.folder = folder
        self.report = LoadReport()
        self._started = time.perf_counter()
        self._plan: list[_Read] = []
        self._mapped: set[str] = set()
        self._lent: set[str] = set()
        with ExitStack() as opened:  # if one is damaged, those before it are closed
            paths = weight_files(folder) if files is None else []
            self._files = files or [opened.enter_context(SafetensorsFile(path)) for path in paths]
            self._opened = opened.pop_all()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.close()

    def has_language_head(self) -> bool:
        """False for a base model's files (an embedding checkpoint), whose names lack the `model.` prefix and a head."""
        names = {name for file in self._files for name in file.tensors}
        return "lm_head.weight" in names or not any(name.startswith("embed_tokens.") for name in names)

    def has_draft_layer(self) -> bool:
        """Whether there are weights for multi-token prediction. transformers drops them when it saves a model."""
        return any(name.startswith("mtp.") for file in self._files for name in file.tensors)

    def tensors(self, model: CheckpointModule) -> dict[str, TensorInfo]:
        """dtype and shape of everything in the files, by the model's names."""
        return {model.canonical_name(name): info for file in self._files for name, info in file.tensors.items()}

    def check(self, model: CheckpointModule) -> None:
        """Decide where each tensor goes. The model needs names, shapes and dtypes, but no memory yet (meta device).

        Raises CheckpointError that names every missing, unexpected, wrongly shaped or typed, or duplicate tensor.
        """
        self._plan = _plan(model, self._files, self.report)
        _check_index(self.folder, self._files, self.report)
        if problems := self.report.problems():
            raise CheckpointError(f"{self.folder} does not fit its config.json:\n{problems}{_hint(self.report)}")
        self.report.bytes = sum(read.info.end - read.info.start for read in self._plan)

    def views(self, *, tables_only: bool = False) -> dict[str, Tensor]:
        """Parameter or shard name -> view of its file, where that is possible. The model must take them: `read` passes them
        over. `tables_only`: of what is read by rows."""
        wanted = [read for read in self._plan if read.mappable and (read.row_read or not tables_only)]
        views = {read.slot: read.file.view(read.name) for read in wanted}
        shards = {read.slot for read in wanted if read.row_read}
        if any(views[slot] is None for slot in shards):  # a table is mapped as a whole or not at all
            views = {slot: view for slot, view in views.items() if slot not in shards}
        possible = {slot: view for slot, view in views.items() if view is not None}
        for read in wanted:
            if read.row_read and read.slot in possible:
                read.file.read_by_rows(read.name)
        self._mapped = set(possible)
        self.report.mapped = sum(view.nbytes for view in possible.values())
        return possible

    @contextmanager
    def lent(self, slot: str) -> Iterator[Tensor]:
        """One tensor for a while, in the file's dtype, not to be written to: mapped where possible, let go afterwards.

        What has been lent counts as loaded, and `read` passes it over. `slot` is the model's name; an expert's matrix may
        lie in a stack. A tied copy in the files is compared with it.
        """
        reads = [read for read in self._plan if read.slot == slot]
        source = next((read for read in reads if not read.tied), None) or self._stack_of(slot)
        whole = source.file.view(source.name)
        whole = source.file.read(source.name) if whole is None else whole
        source.file.prefault(source.name)
        tensor = whole if source.slot == slot else _part_of(whole, slot)
        for read in reads:
            if read.tied:
                _check_tied(read, tensor)
        yield tensor
        if source.slot == slot:
            source.file.release(source.name)
        if source.name not in self._lent:
            self._lent.add(source.name)
            self.report.loaded.append(source.name)
            self.report.dtypes[str(source.info.dtype).removeprefix("torch.")] += 1

    def _stack_of(self, slot: str) -> _Read:
        owner, _, projection, _ = slot.rsplit(".", 3)
        stack = f"{owner}.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"
        return next(read for read in self._plan if read.slot == stack)

    def read(self, model: CheckpointModule, *, progress: bool = True, check_finite: bool = False) -> LoadReport:
        """Fill the model's memory with what is not mapped, converted to its dtype and device.

        Peak memory is the model and one block of 4 MiB; where the file holds a copy of a tied tensor, that copy instead.
        `check_finite` also refuses NaN and infinity.
        """
        from tqdm import tqdm

        targets = _targets(model.checkpoint_tensors(), dict(model.named_parameters()))
        if meta := [name for name, target in targets.items() if target.is_meta]:
            raise CheckpointError(f"the model's {meta[0]} has no memory (meta device): allocate it before loading")
        bar = tqdm(total=self.report.bytes, unit="B", unit_scale=True, desc="loading", delay=1, disable=not progress)
        with bar:
            for read in self._plan:
                if read.slot not in targets:  # lent before, to be quantised
                    continue
                self._carry_out(read, targets[read.slot])
                if check_finite and not bool(torch.isfinite(targets[read.slot]).all()):
                    raise CheckpointError(f"{read.file.path}: tensor {quote(read.name)} holds NaN or infinity")
                bar.update(read.info.end - read.info.start)
        self.report.seconds = time.perf_counter() - self._started
        return self.report

    def _carry_out(self, read: _Read, target: Tensor) -> None:
        if not read.tied:
            if read.slot in self._mapped:
                if not read.row_read:
                    read.file.prefault(read.name)
            else:
                read.file.read_into(read.name, target)
            self.report.loaded.append(read.name)
            self.report.dtypes[str(read.info.dtype).removeprefix("torch.")] += 1
        else:
            _check_tied(read, target)


def _check_tied(read: _Read, source: Tensor) -> None:
    if not torch.equal(read.file.read(read.name).to(source.dtype), source.cpu()):
        what = "differs from the embedding, but config.json says tie_word_embeddings"
        raise CheckpointError(f"{read.file.path}: {quote(read.name)} {what}")


def _part_of(stack: Tensor, part: str) -> Tensor:
    """One expert's matrix of a stack: (E, 2I, H), gate rows before up rows, or (E, H, I)."""
    _, e, projection, _ = part.rsplit(".", 3)
    matrix = stack[int(e)]
    return matrix if projection == "down_proj" else matrix.chunk(2)[projection == "up_proj"]


def load_weights(
    model: CheckpointModule, folder: Path, *, progress: bool = True, check_finite: bool = False
) -> LoadReport:
    """Fill a model that has memory from the folder's safetensors: `Checkpoint.check` and `Checkpoint.read`."""
    with Checkpoint(folder) as checkpoint:
        checkpoint.check(model)
        return checkpoint.read(model, progress=progress, check_finite=check_finite)


def _targets(slots: dict[str, Tensor], parameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """All a file may fill: the tensors the model names, and the stacked parameters of which they are parts."""
    return slots | {name: parameter.data for name, parameter in parameters.items() if name not in slots}


def _plan(model: CheckpointModule, files: Sequence[SafetensorsFile], report: LoadReport) -> list[_Read]:
    """Decide for every tensor on disk where it goes, and note in the report what does not fit."""
    slots, parameters, tied = model.checkpoint_tensors(), dict(model.named_parameters()), model.tied
    targets = _targets(slots, parameters)
    parts, rows, constants = _parts(slots, targets), model.row_read, model.constants
    _check_coverage(slots, parameters)
    filled: dict[str, str] = {}
    plan = []
    for file in files:
        for disk_name, info in file.tensors.items():
            name = model.canonical_name(disk_name)
            if any(re.search(pattern, name) for pattern in (*model.ignored, _KV_SCALES)):
                report.ignored.append(disk_name)
                continue
            if name in constants:
                _check_constant(file, disk_name, constants[name], report)
                continue
            is_tied = name in tied and name not in slots
            slot = tied[name] if is_tied else name
            if slot not in targets:
                report.unexpected.append(f"{disk_name} {info.dtype} {list(info.shape)}".replace("torch.", ""))
                continue
            target = targets[slot]
            if info.shape != tuple(target.shape):
                report.wrong_shape.append(f"{disk_name} is {list(info.shape)}, the config wants {list(target.shape)}")
            elif not converts(info.dtype, target.dtype):
                report.wrong_dtype.append(f"{disk_name} is {info.dtype}, not {target.dtype}".replace("torch.", ""))
            for part in parts.get(name) or [name]:
                if part in filled:
                    report.duplicate.append(f"{part} ({filled[part]} and {file.path.name}:{disk_name})")
                filled[part] = f"{file.path.name}:{disk_name}"
            if is_tied:
                report.tied.append(disk_name)
            row_read = slot in rows
            mappable = not is_tied and (row_read or (slot in parameters and info.dtype == target.dtype))
            plan.append(_Read(file, disk_name, slot, is_tied, mappable, row_read))
    report.missing.extend(name for name in slots if name not in filled)
    plan.sort(key=lambda read: read.tied)  # a tied copy is compared once its source is read
    return plan


def _check_constant(file: SafetensorsFile, name: str, value: Tensor, report: LoadReport) -> None:
    info = file.tensors[name]
    if info.shape != tuple(value.shape) or info.dtype != value.dtype:
        report.wrong_value.append(f"{name} is {info.dtype} {list(info.shape)}, not {value.dtype} {list(value.shape)}")
    elif not torch.equal(found := file.read(name), value):
        report.wrong_value.append(f"{name} is {quote(found.tolist())}, config.json determines {quote(value.tolist())}")
    else:
        report.constant.append(name)


def _parts(slots: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Each stacked parameter and the names of its parts."""
    parts: dict[str, list[str]] = {name: [] for name in targets if name not in slots}
    for slot, view in slots.items():
        for name in parts:
            if slot.startswith(name.rpartition(".")[0] + ".") and _memory(view) == _memory(targets[name]):
                parts[name].append(slot)
    return parts


def _check_coverage(slots: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> None:
    """Each parameter's elements are as many as its storage's slots: memory nobody names would stay uninitialised."""
    named: Counter[int] = Counter()
    for view in slots.values():
        named[_memory(view)] += view.numel()
    for name, parameter in parameters.items():
        if parameter.numel() > named[_memory(parameter)]:
            raise CheckpointError(f"checkpoint_tensors() leaves part of {name} out: a fault of the model, not the file")


def _memory(tensor: Tensor) -> int:
    """Which storage a tensor lies in. Not its address: on the meta device all addresses are 0."""
    return tensor.untyped_storage()._cdata


def _check_index(folder: Path, files: Sequence[SafetensorsFile], report: LoadReport) -> None:
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
    folder = folder.expanduser().absolute()  # "." has no name to put another beside
    if exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; nothing is overwritten")
    for name in extra or {}:
        if Path(name).name != name or name.endswith(".safetensors") or name in ("config.json", INDEX):
            raise CheckpointError(f"{quote(name)} is not the name of an extra file")
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.mkdir(parents=True)
        tensors = {**model.checkpoint_tensors(), **model.constants}
        tensors = {model.disk_name(name): tensor for name, tensor in tensors.items()}
        shards = _shards(tensors, max_shard_bytes)
        names = ["model.safetensors"] if len(shards) == 1 else [
            f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        for name, tensors in zip(names, shards, strict=True):
            write_safetensors(temporary / name, tensors)
        if len(shards) > 1:
            weight_map = {t: name for name, tensors in zip(names, shards, strict=True) for t in tensors}
            total = sum(t.nbytes for tensors in shards for t in tensors.values())
            write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(temporary / "config.json", config)
        for name, content in (extra or {}).items():
            (temporary / name).write_bytes(content)
        if folder.exists():
            folder.rmdir()  # Windows does not rename onto a folder, not even an empty one
        temporary.rename(folder)
    except OSError as problem:
        raise CheckpointError(f"could not write {folder}: {problem.strerror or problem}") from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
