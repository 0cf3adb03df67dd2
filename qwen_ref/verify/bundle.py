"""An oracle bundle: what transformers computed, in one file, so that a machine without it can still check.

A bundle is a safetensors file. Its tensors are the oracle's activations of some fixed prompts, and in half precision
also those of its fp32 run, so that a check against the file gives the numbers a live one gives. Its metadata is JSON:
the config, a fingerprint of the weights, the contract (dtype, tolerances, the oracle's own error by name), the prompts,
the oracle's greedy continuation, versions, and a digest of all of it.

The digest finds damage and careless edits; it is no signature, and whoever wants to can compute it anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, NumericsError, RequestError
from ..hook_points import letter_sizes
from ..models.common import LanguageModel
from ..safetensors_file import SafetensorsFile, write_safetensors
from ..strict_json import parse_json
from . import oracle

FORMAT = 1
_KEY = "qwen_ref_oracle"  # of the safetensors metadata: the JSON
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLE = 1024  # elements of each weight that enter the fingerprint
_BLOCK_BYTES = 1 << 24  # hashed at a time


@dataclass(frozen=True)
class Greedy:
    """The oracle's greedy continuation of the first prompt; of no tokens where the bundle was written block by block."""

    tokens: list[int]
    margins: list[float]  # per step, the best logit minus the second best: how decided the oracle was
    logits: Tensor  # (steps, V)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose digest and form have been checked; tensors are read from the file when asked for."""

    path: Path
    about: dict[str, Any]  # the JSON of the metadata

    @property
    def dtype(self) -> torch.dtype:
        """What the model must be loaded in."""
        return _DTYPES[self.about["dtype"]]

    @property
    def prompts(self) -> list[Tensor]:
        """Token ids, each (1, T) int64."""
        return [torch.tensor([row]) for row in self.about["prompts"]]

    @property
    def names(self) -> list[str]:
        """Activations by our hook names, in the order in which they are computed."""
        return self.about["names"]

    @property
    def tolerances(self) -> dict[str, float]:
        return self.about["tolerances"]

    def theirs(self, i: int) -> dict[str, Tensor]:
        """The oracle's activations of prompt i, in the contract's dtype, as `oracle.capture_theirs` gives them."""
        return self._read("theirs", i)

    def exact(self, i: int) -> dict[str, Tensor]:
        """Those of its fp32 run in half precision; otherwise `theirs`."""
        return self._read("exact" if self.about["own_error"] else "theirs", i)

    def own_error(self, name: str) -> float:
        """||theirs - exact|| / ||exact|| over all prompts, by which half precision is held to its bound; else 0."""
        return self.about["own_error"].get(name, 0.0)

    @property
    def greedy(self) -> Greedy:
        with SafetensorsFile(self.path) as file:
            return Greedy(self.about["greedy"]["tokens"], self.about["greedy"]["margins"], file.read("greedy.logits"))

    def check(self, ours: LanguageModel, parts: Iterable[Mapping[str, Tensor]] | None = None) -> None:
        """Refuse a model that is not the one the bundle was written from: CheckpointError or RequestError says why.

        `parts`: its weights, some at a time, where the model itself is on the meta device.
        """
        if ours.dtype != self.dtype:
            raise RequestError(f"{self.path} was written in {self.about['dtype']}, the model is in {_plain(ours.dtype)}: "
                               f"load it with dtype={self.about['dtype']!r}")
        mine = ours.config.to_json()
        if _sha256_of(mine) != self.about["config_sha256"]:
            theirs = self.about["config"]
            fields = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
            raise CheckpointError(f"{self.path} was written for another config: {', '.join(fields)[:200]} differ; check the "
                                  f"model it was written for ({self.about['model']!r:.100}), or write a bundle for this one")
        if max(map(max, self.about["prompts"])) >= ours.config.vocab_size or self.names != list(oracle.points(ours)):
            raise CheckpointError(f"{self.path} holds other activations or ids than this model has: write it again")
        self._check_shapes(ours)
        if fingerprint(_weights(ours) if parts is None else parts) != self.about["fingerprint"]:
            raise CheckpointError(f"{self.path} was written from other weights of the same config "
                                  f"({self.about['model']!r:.100}): check those, or write a bundle for these")

    def _read(self, side: str, i: int) -> dict[str, Tensor]:
        if not 0 <= i < len(self.about["prompts"]):
            raise RequestError(f"{self.path} has prompts 0 to {len(self.about['prompts']) - 1}, not {i}")
        with SafetensorsFile(self.path) as file:
            return {name: file.read(f"{side}.{i}.{name}") for name in self.names}

    def _check_shapes(self, ours: LanguageModel) -> None:
        sizes = letter_sizes(ours.config) | {"B": 1}
        points = oracle.points(ours)
        with SafetensorsFile(self.path) as file:
            for key, info in file.tensors.items():
                side, _, rest = key.partition(".")
                if side == "greedy":
                    fits = info.shape == (len(self.about["greedy"]["tokens"]), ours.config.vocab_size)
                else:
                    i, _, name = rest.partition(".")
                    tokens = len(self.about["prompts"][int(i)])
                    fits = info.shape == tuple(sizes.get(d, tokens) for d in points[name].dims)
                if not fits:
                    raise CheckpointError(f"{self.path}: {key} has the shape {list(info.shape)}, which this model never has")


# ------------------------------------------------------------------------------------------------- writing


def write_bundle(
    path: str | Path,
    ours: LanguageModel,
    theirs: nn.Module,
    exact: nn.Module,
    prompts: Sequence[Tensor],
    *,
    model: str,
    tolerances: Mapping[str, float],
    new_tokens: int = 32,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write a bundle: under a temporary name first, never over a file that exists.

    Args:
        ours: the model it is for: its config, weights and dtype are what a check will ask for.
        theirs, exact: the oracle in that dtype and in fp32; the same object where the dtype is fp32 or fp64.
        prompts: ids, each (1, T) int64. `model`: what to call it.
        tolerances: the contract, by name, which a check reads back.
        progress: told what begins.
    Raises: RequestError if the file exists; CheckpointError if it cannot be written.
    """
    tell = progress or (lambda text: None)
    check_free(path)
    if not prompts or any(ids.dim() != 2 or ids.shape[0] != 1 or not ids.numel() for ids in prompts):
        raise RequestError("a bundle needs at least one prompt, each (1, T) with T > 0")
    sides: dict[str, list[dict[str, Tensor]]] = {}
    for i, ids in enumerate(prompts):
        for side, network in (("theirs", theirs), *([("exact", exact)] if exact is not theirs else [])):
            tell(f"prompt {i + 1} of {len(prompts)}, {side}")
            sides.setdefault(side, []).append(oracle.capture_theirs(network, ids.to(ours.device)))
    tell(f"{new_tokens} greedy tokens")
    greedy = continuation(theirs, prompts[0], new_tokens)
    tell("writing")
    write_captured(path, ours, _weights(ours), sides, prompts, greedy, model=model, tolerances=tolerances)


def write_captured(
    path: str | Path,
    ours: LanguageModel,
    parts: Iterable[Mapping[str, Tensor]],
    sides: Mapping[str, Sequence[Mapping[str, Tensor]]],
    prompts: Sequence[Tensor],
    greedy: Greedy | None,
    *,
    model: str,
    tolerances: Mapping[str, float],
) -> None:
    """Write a bundle of activations that are there already.

    Args:
        ours: as for `write_bundle`, or the same on the meta device. parts: its weights, some at a time.
        sides: "theirs", and in half precision "exact" -> the activations of each prompt by name.
        greedy: None = no continuation, so that a check against the bundle has no L4.
    """
    path = Path(path)
    tensors = {f"{side}.{i}.{name}": value.cpu() for side, prompt in sides.items()
               for i, acts in enumerate(prompt) for name, value in acts.items()}
    names, config = list(sides["theirs"][0]), ours.config.to_json()
    greedy = greedy or Greedy([], [], torch.empty(0, ours.config.vocab_size, dtype=ours.dtype))
    tensors["greedy.logits"] = greedy.logits.cpu()
    about: dict[str, Any] = {
        "format": FORMAT,
        "model": model,
        "config": config,
        "config_sha256": _sha256_of(config),
        "fingerprint": fingerprint(parts),
        "dtype": _plain(ours.dtype),
        "tolerances": dict(tolerances),
        "names": names,
        "own_error": _own_errors(tensors, names, len(prompts)) if "exact" in sides else {},
        "prompts": [ids[0].tolist() for ids in prompts],
        "greedy": {"tokens": greedy.tokens, "margins": greedy.margins},
        "versions": {"torch": torch.__version__, "transformers": oracle.require().__version__,
                     "python": platform.python_version()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if not all(map(math.isfinite, (*about["own_error"].values(), *greedy.margins))):
        raise NumericsError(f"the oracle overflows in {about['dtype']} on these prompts: write the bundle in another dtype")
    about["digest"] = _digest(about, ((name, tensors[name]) for name in sorted(tensors)))
    _write(path, tensors, about)


@torch.no_grad()
def continuation(theirs: nn.Module, prompt: Tensor, count: int) -> Greedy:
    """The oracle's greedy tokens after prompt (1, T), every step read anew, without a cache that could be wrong."""
    run: Any = theirs
    if run.lm_head is None:
        return Greedy([], [], torch.empty(0, run.config.vocab_size, dtype=run.dtype))
    ids, rows = prompt.to(run.device), []
    for _ in range(count):
        rows.append(run(ids, use_cache=False).logits[0, -1])  # (V,)
        ids = torch.cat((ids, rows[-1].argmax().view(1, 1)), dim=1)
    logits = torch.stack(rows) if rows else torch.empty(0, run.config.vocab_size, dtype=run.dtype)  # (steps, V)
    best = logits.double().topk(2).values
    return Greedy(ids[0, prompt.shape[1] :].tolist(), (best[:, 0] - best[:, 1]).tolist(), logits)


def _weights(ours: LanguageModel) -> Iterator[dict[str, Tensor]]:
    """One at a time: packed matrices are dequantised anew."""
    return ({name: tensor} for name, tensor in ours.official_weights())


def fingerprint(parts: Iterable[Mapping[str, Tensor]]) -> str:
    """sha256 over every checkpoint tensor's name, shape, dtype and a sample of its bytes, as loaded, some at a time.

    A sample, not the whole: up to about a thousand elements of each tensor, at an odd stride so that it meets every
    column. It tells checkpoints apart; a change of a few single weights may pass it (and shows in the activations).
    """
    samples: dict[str, bytes] = {}
    for part in parts:
        for name, tensor in part.items():
            sample = tensor.detach().flatten()[:: tensor.numel() // _SAMPLE | 1]
            samples[name] = _heading(name, tensor) + bytes(_bytes(sample))
    return hashlib.sha256(b"".join(samples[name] for name in sorted(samples))).hexdigest()


def _own_errors(tensors: Mapping[str, Tensor], names: Iterable[str], prompts: int) -> dict[str, float]:
    def whole(side: str, name: str) -> Tensor:
        return torch.cat([tensors[f"{side}.{i}.{name}"].double().flatten() for i in range(prompts)])

    errors = {}
    for name in names:
        exact = whole("exact", name)
        errors[name] = float((whole("theirs", name) - exact).norm() / exact.norm().clamp_min(1e-300))
    return errors


def check_free(path: str | Path) -> None:
    """RequestError if a bundle cannot be written there."""
    path = Path(path)
    if os.path.lexists(path):
        raise RequestError(f"{path} exists and is not overwritten: choose another name or remove it")
    if not path.parent.is_dir():
        raise RequestError(f"{path}: the folder {path.parent} does not exist")


def _write(path: Path, tensors: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        write_safetensors(temporary, tensors, metadata={_KEY: _canonical(about)})
        check_free(path)  # it may have come into being meanwhile
        temporary.rename(path)
    except OSError as problem:
        raise CheckpointError(f"could not write {path}: {problem.strerror or problem}") from problem
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- reading


def read(path: str | Path) -> Bundle:
    """Open a bundle and check all of it once. `Bundle.check` then tells whether it belongs to a model.

    Raises: CheckpointError if it is no bundle, or truncated, damaged or edited. At most one tensor is in memory.
    """
    path = Path(path)
    with SafetensorsFile(path) as file:
        if _KEY not in file.metadata:
            raise CheckpointError(f"{path} is no oracle bundle; `qwen-ref verify MODEL --write-oracle FILE` writes one")
        about = parse_json(file.metadata[_KEY].encode(), f"{path} (metadata)", CheckpointError)
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise CheckpointError(f"{path} is an oracle bundle of another format than {FORMAT}: write it again")
        digest = _digest(about, ((name, file.read(name)) for name in sorted(file.tensors)))
        if about.get("digest") != digest or set(file.metadata) - {_KEY, "format"}:
            raise CheckpointError(f"{path} was damaged or edited: its digest does not match. Copy it anew or write it again")
        _check_form(path, about, file)
    return Bundle(path, about)


def _check_form(path: Path, about: dict[str, Any], file: SafetensorsFile) -> None:
    """The fields have the types `Bundle` relies on, and the tensors are exactly those the fields announce."""
    greedy = about.get("greedy")
    wanted = {
        "model": isinstance(about.get("model"), str),
        "config": isinstance(about.get("config"), dict),
        "config_sha256": about.get("config_sha256") == _sha256_of(about.get("config")),
        "fingerprint": isinstance(about.get("fingerprint"), str),
        "dtype": about.get("dtype") in tuple(_DTYPES),
        "tolerances": _maps_to_numbers(about.get("tolerances")),
        "names": _list_of(str, about.get("names")),
        "own_error": _maps_to_numbers(about.get("own_error")),
        "prompts": _list_of(list, about.get("prompts")) and all(map(_are_ids, about["prompts"])),
        "greedy": isinstance(greedy, dict) and set(greedy) == {"tokens", "margins"} and _are_ids(greedy["tokens"], 0)
        and _are_numbers(greedy["margins"]) and len(greedy["tokens"]) == len(greedy["margins"]),
        "versions": isinstance(about.get("versions"), dict),
    }
    if wrong := [name for name, right in wanted.items() if not right]:
        raise CheckpointError(f"{path}: {', '.join(wrong)} of its metadata have another form than this version writes")
    sides, prompts, names = ["theirs", *(["exact"] if about["own_error"] else [])], about["prompts"], about["names"]
    announced = len(sides) * len(prompts) * len(names) + 1  # first: the names themselves could be too many to write out
    if announced != len(file.tensors) or set(file.tensors) != {"greedy.logits"}.union(
        f"{side}.{i}.{name}" for side in sides for i in range(len(prompts)) for name in names
    ):
        raise CheckpointError(f"{path}: its tensors are not those its metadata announce: write it again")


def _list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is kind for item in value)


def _are_ids(value: object, at_least: int = 1) -> bool:
    return isinstance(value, list) and len(value) >= at_least and all(type(i) is int and 0 <= i < 1 << 31 for i in value)


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(v) in (int, float) and 0 <= v < math.inf for v in value)


def _maps_to_numbers(value: object) -> bool:
    return isinstance(value, dict) and _are_numbers(list(value.values()))


# ------------------------------------------------------------------------------------------------- hashing


def _digest(about: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    sha = hashlib.sha256(_canonical({key: value for key, value in about.items() if key != "digest"}).encode())
    for name, tensor in tensors:
        sha.update(_heading(name, tensor))
        flat = tensor.detach().flatten()
        for part in flat.split(max(1, _BLOCK_BYTES // flat.itemsize)):
            sha.update(_bytes(part))
    return sha.hexdigest()


def _heading(name: str, tensor: Tensor) -> bytes:
    return f"{name} {_plain(tensor.dtype)} {list(tensor.shape)}\n".encode()


def _bytes(flat: Tensor) -> Any:
    return flat.cpu().contiguous().view(torch.uint8).numpy().data if flat.numel() else b""


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
