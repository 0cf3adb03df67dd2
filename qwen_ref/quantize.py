"""A checkpoint in, a quantised checkpoint out, one layer in memory at a time.

Every layer becomes a file of its own in `OUT.partial`, which is renamed to OUT when all is there. A run that was
interrupted goes on after the last whole file; `qwen_ref_quantize.json` says what was begun, and a run with other settings
or another source is refused rather than mixed in. The record stays in OUT: it says how the checkpoint was made.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import INDEX, Checkpoint, weight_files
from .errors import CheckpointError, RequestError
from .layers import Experts, Linear
from .loading import EXTRA_FILES, check_fits, locate, materialize, pick_dtype, read_config, skeleton
from .models.common import DRAFT, LanguageModel
from .quant import rounding
from .quant.calibrated import Calibration, windows_of
from .quant.compressed_tensors import Integers
from .quant.format import matches
from .quant.making import GGUF, KEPT, KINDS, Round, fitting, matrices, quantize_module, rounded, rounder
from .quant.packed import Packed
from .quant.store import STORES
from .safetensors_file import SafetensorsFile, exists, write_safetensors
from .strict_json import read_json, write_json
from .tokenizer import Tokenizer

RECORD = "qwen_ref_quantize.json"
METHODS = ("rtn", "gptq")
WRITTEN = (*STORES, *(kind for kind in KINDS if kind.startswith(GGUF)))
CALIBRATION = Path(__file__).parent / "assets" / "calibration.txt"


@dataclass(frozen=True)
class Quantized:
    folder: Path
    bytes: int  # of all weights
    notes: list[str]


def quantize(
    model: str | Path,
    out: str | Path,
    to: str = "int4",
    *,
    method: str = "rtn",
    group: int = rounding.GROUP,
    calibration: str | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> Quantized:
    """Write `model` quantised to the new folder `out`, in a format that transformers and vLLM open.

    Args:
        model: a bundled name, a folder or a hub id; not quantised.
        out: a new folder; for GGUF a new file.
        to: "int8" or "int4" (compressed-tensors), "nf4" (bitsandbytes), "fp8" (as Qwen publishes it), and "gguf:q8_0",
            "gguf:q4_0" or "gguf:q4_k" (llama.cpp), which are written in one go and are not resumable.
        method: "rtn" rounds to nearest; "gptq" (int4 only) corrects as it rounds, see `quant.calibrated`.
        group: of int4, columns that share a scale; see `making.fitting`.
        calibration: text for gptq, best of the kind the model will read; default a small mixed one of 2,000 tokens.
    What stays in the source's precision: embedding, head, norms, biases, routers, the gates and the convolution of a Gated
    DeltaNet, the draft layer (MTP). Of a multimodal source the language model is written.
    Raises: RequestError for what cannot be asked for, CheckpointError for a source that is damaged, holds NaN or is
        quantised already, for an `out` that exists, one begun with other settings, and a full disk.
    """
    source = locate(model, revision=revision)
    raw = read_config(source)
    if isinstance(given := raw.get("quantization_config"), dict):
        raise CheckpointError(f"{source} is quantised already ({given.get('quant_method')}); quantise the one it was made from")
    if to not in WRITTEN:
        raise RequestError(f"cannot write {to!r}; there are {', '.join(WRITTEN)}")
    if method not in METHODS or (method == "gptq" and to != "int4"):
        raise RequestError(f"method {method!r} is not there for {to}; rtn is for all, gptq for int4")
    if calibration is not None and method != "gptq":
        raise RequestError("calibration text is for method 'gptq'; rounding to nearest needs none")
    if to.startswith(GGUF):
        return _write_gguf(source, raw, Path(out), to.removeprefix(GGUF), progress)
    return _Job(source, raw, Path(out), to, method, group, calibration).run(progress)


def _write_gguf(source: Path, raw: dict[str, Any], out: Path, preset: str, progress: bool) -> Quantized:
    from tqdm import tqdm

    from .quant.gguf_write import Planned, Source, plan, stored, write_gguf

    with Checkpoint(source) as checkpoint:
        network = skeleton(raw, checkpoint)
        checkpoint.check(network)
        notes = _left_out(checkpoint)
        shapes = {name: tuple(t.shape) for name, t in network.checkpoint_tensors().items() if not name.startswith(DRAFT)}
        if network.mtp is not None:
            notes.append("left out: the draft layer (MTP), which is not implemented for GGUF")
        planned = plan(shapes, raw, preset)
        bar = tqdm(total=len(planned), desc=f"gguf {preset}", disable=not progress)

        def make(tensor: Planned) -> Tensor:
            parts = []
            for name in tensor.parts:
                with checkpoint.lent(name) as part:
                    parts.append(part.clone())
            bar.update()
            return stored(tensor, parts, raw)

        files = {name: (source / name).read_bytes() for name in EXTRA_FILES if (source / name).is_file()}
        with bar:
            write_gguf(out, raw, files, [Source(t.name, t.shape, t.kind, partial(make, t)) for t in planned], name=out.stem)
    return Quantized(out, out.stat().st_size, notes)


def _left_out(checkpoint: Checkpoint) -> list[str]:
    ignored = checkpoint.report.ignored
    return [f"left out: {len(ignored)} tensors that are not of the language model, such as {ignored[0]}"] if ignored else []


def _language_config(raw: dict[str, Any], network: LanguageModel) -> dict[str, Any]:
    """config.json of the language model, which of a multimodal one is what `read_config` gives."""
    return {**raw, "architectures": network.config.to_json()["architectures"]}


class _Job:
    """One source, one target, one set of settings."""

    def __init__(self, source: Path, raw: dict[str, Any], out: Path, to: str, method: str, group: int,
                 calibration: str | None) -> None:  # fmt: skip
        out = out.absolute()  # "." has no name to put ".partial" after
        if exists(out) and (not out.is_dir() or any(out.iterdir())):
            raise CheckpointError(f"{out} exists and is not empty; nothing is overwritten")
        self.source, self.raw, self.out, self.to, self.method = source, raw, out, to, method
        self.partial = out.with_name(f"{out.name}.partial")
        self.store = STORES[to]
        self.dtype = pick_dtype(None, self.raw)
        self.group, self.notes = group, []  # type: ignore[var-annotated]
        self.windows: list[list[int]] = []
        if method == "gptq":
            text = calibration if calibration is not None else CALIBRATION.read_text(encoding="utf-8")
            self.tokenizer = Tokenizer.load(source)
            self.windows = windows_of(self.tokenizer.encode(text, allow_special=True))

    def run(self, progress: bool) -> Quantized:
        from tqdm import tqdm

        with _written(self.out, self.partial), Checkpoint(self.source) as checkpoint:
            self.checkpoint, self.network = checkpoint, skeleton(self.raw, checkpoint)
            if self.windows:
                check_fits(self.source, self.tokenizer, self.network)
                self.network.to(torch.float32)  # in which the calibration text runs
            checkpoint.check(self.network)
            self.notes += _left_out(checkpoint)
            self.matrices, self.parts = matrices(self.network), _parts(self.network)
            self.kept = [self.network.disk_name(name) for name, module in self.network.named_modules()
                         if isinstance(module, (Linear, Experts)) and matches(name, KEPT)]  # fmt: skip
            self.size = fitting(self.network, self.to, self.group)
            self.begin()
            missing = [path for path in self.parts if not _is_whole(self.file(path))]
            calibration = self.calibration() if self.windows and any(path in missing for path in self.blocks) else None
            for path in tqdm(self.parts, desc=f"{self.to} {self.method}", disable=not progress):
                if calibration is not None and path in self.blocks:
                    self.calibrated(calibration, path, path not in missing)
                elif path in missing:
                    _write_whole(self.file(path), self.tensors(path, rounder(self.to, self.size)))
            return self.finish()

    @property
    def blocks(self) -> list[str]:
        return [path for path in self.parts if path.startswith("model.layers.")]

    def file(self, path: str) -> Path:
        return self.partial / f"model-{list(self.parts).index(path) + 1:05}-of-{len(self.parts):05}.safetensors"

    def tensors(self, path: str, to_bits: Round) -> dict[str, Tensor]:
        """The tensors of a part of the model as they are written."""
        tensors = {}
        for name in self.parts[path]:
            written = self.network.disk_name(name)
            if name not in self.matrices:
                with self.checkpoint.lent(name) as tensor:
                    tensors[written] = tensor.clone()
                continue
            packed = rounded(to_bits, name, self.checkpoint.lent)
            for last, tensor in self.store.tensors(packed, self.matrices[name][1], self.dtype).items():
                tensors[f"{written.removesuffix('weight')}{last}"] = tensor
        return tensors

    def calibration(self) -> Calibration:
        self.fill("model.embed_tokens")
        calibration = Calibration(self.network, self.windows)
        self.network.model.embed_tokens.to("meta")
        return calibration

    def calibrated(self, calibration: Calibration, path: str, is_written: bool) -> None:
        """A block by GPTQ, and the activations after it; of a block that is written already, only those."""
        i = self.blocks.index(path)
        block = self.fill(path)
        made: dict[str, Packed] = {}
        if is_written:
            to_bits = self.read_back(path)
        else:
            seen = calibration.look(i)
            to_bits = seen.rounder(self.size)
            self.notes += seen.notes

        def noted(name: str, weight: Tensor) -> Packed:
            made[name] = to_bits(name, weight)
            return made[name]

        quantize_module(block, path, noted, self.checkpoint.lent)
        if not is_written:
            _write_whole(self.file(path), self.tensors(path, lambda name, _: made[name]))
        if path != self.blocks[-1]:
            calibration.advance(i)
        self.network.model.layers[i] = nn.Identity()  # its memory goes

    def fill(self, path: str) -> nn.Module:
        """Give a part of the model its weights, in fp32."""
        part = self.network.get_submodule(path)
        materialize(part, torch.device("cpu"))
        slots = self.network.checkpoint_tensors()
        for name in self.parts[path]:
            with self.checkpoint.lent(name) as tensor:
                slots[name].copy_(tensor)
        return part

    def read_back(self, path: str) -> Round:
        """The matrices of a part as they were written."""
        scheme = Integers(4, "group", self.size, packed=True)
        with SafetensorsFile(self.file(path)) as file:
            held = {name: file.read(name) for name in file.tensors}

        def find(name: str, weight: Tensor) -> Packed:
            start = self.network.disk_name(name).removesuffix("weight")
            own = {key.removeprefix(start): tensor for key, tensor in held.items() if key.startswith(start)}
            return scheme.pack(own, *self.matrices[name]).weight

        return find

    def begin(self) -> None:
        """Make the folder of an unfinished run, or find out that it is the same run."""
        record = {
            "source": {path.name: _fingerprint(path) for path in [self.source / "config.json", *weight_files(self.source)]},
            "to": self.to,
            "method": self.method,
            "size": list(self.size) if isinstance(self.size, tuple) else self.size,
            "calibration": hashlib.sha256(repr(self.windows).encode()).hexdigest() if self.windows else None,
        }
        path = self.partial / RECORD
        if path.is_file():
            begun = read_json(path)
            if changed := [key for key in record if begun.get(key) != record[key]]:
                raise CheckpointError(f"{self.partial} was begun with another {' and '.join(changed)}: finish it with what it "
                                      "was begun with, remove it, or write elsewhere")
        elif self.partial.exists() and any(self.partial.iterdir()):
            raise CheckpointError(f"{self.partial} exists and is not an unfinished run: nothing is overwritten")
        else:
            self.partial.mkdir(parents=True, exist_ok=True)
            unfinished = self.partial.with_name(f"{self.partial.name}.tmp")  # beside it: in it would be what no run began
            write_json(unfinished, record)
            unfinished.replace(path)

    def finish(self) -> Quantized:
        """Index, config and the files of the tokenizer; then the name it was asked for."""
        weight_map: dict[str, str] = {}
        total = 0
        for path in sorted(self.partial.glob("model-*.safetensors")):
            with SafetensorsFile(path) as file:
                weight_map |= dict.fromkeys(file.tensors, path.name)
                total += sum(info.end - info.start for info in file.tensors.values())
        write_json(self.partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        quantization = self.store.config(self.size, self.kept, self.dtype)
        config = {**_language_config(self.raw, self.network), "quantization_config": quantization}
        write_json(self.partial / "config.json", config)
        for name in EXTRA_FILES:
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, self.partial / name)
        if self.out.exists():
            self.out.rmdir()
        self.partial.rename(self.out)
        return Quantized(self.out, total, self.notes)


def _parts(network: LanguageModel) -> dict[str, list[str]]:
    """What goes into a file each: the embedding, every block, and the rest. Official names, a tied head not among them."""
    names = list(network.checkpoint_tensors())
    blocks = [f"model.layers.{i}" for i in range(len(network.model.layers))]
    parts = {path: [name for name in names if name.startswith(f"{path}.")] for path in ("model.embed_tokens", *blocks)}
    taken = {name for part in parts.values() for name in part}
    return {**parts, "rest": [name for name in names if name not in taken]}


def _fingerprint(path: Path) -> str:
    """Size, time and head of a file: enough to notice another one, without reading gigabytes."""
    status = path.stat()
    with open(path, "rb") as file:
        return f"{status.st_size} {status.st_mtime_ns} {hashlib.sha256(file.read(1 << 20)).hexdigest()}"


def _is_whole(path: Path) -> bool:
    try:
        with SafetensorsFile(path):
            return True
    except CheckpointError:
        return False


def _write_whole(path: Path, tensors: dict[str, Tensor]) -> None:
    """All or nothing, even if the power fails."""
    unfinished = path.with_suffix(".tmp")
    write_safetensors(unfinished, tensors)
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


@contextmanager
def _written(out: Path, partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        kept = f". What is finished is in {partial}; the same command goes on from there" if partial.is_dir() else ""
        raise CheckpointError(f"could not write {out}: {problem.strerror or problem}{kept}") from problem


__all__ = ["CALIBRATION", "METHODS", "RECORD", "Quantized", "quantize"]
