"""Models larger than memory: the same comparison with one block of one side in memory at a time.

Both models are built on the meta device, where they have names and shapes but no memory. The official forward runs once
per prompt with blocks that only note what they are given (residual stream, masks, rotary tables); then each block in
turn is filled from the folder, run on its side's residual stream with its points recorded, and dropped again. Our side
reads with our reader, transformers' with the safetensors library, so that a fault of the reader cannot hide. As in
memory, our routers' choices are recorded and the tokens then sent to the oracle's experts.

The oracle may also have run before: its activations then come from a bundle, and only our side is computed.

Peak memory: one block, in half precision one fp32 block of the oracle's exact run (as much as two of the model's own); the
table of n-grams is part of its block. The embedding or the head while in use; one block's activations of all prompts, of
both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import backend
from ..checkpoint import Checkpoint, weight_files
from ..errors import CheckpointError, RequestError
from ..hook_points import final_path
from ..loading import build, materialize, pick_dtype, read_config, skeleton
from ..models.common import LanguageModel
from ..safetensors_file import SafetensorsFile
from . import oracle
from .levels import HALF, Acts, Choice, Comparison, Oracle, Tolerances, following
from .report import Row

EAGER: Choice = dict.fromkeys(backend.OPERATIONS, "eager")


@dataclass(frozen=True)
class Stage:
    """What one part of the model computed on both sides."""

    name: str  # official: "model.embed_tokens", "model.layers.3", "lm_head"
    captures: list[tuple[Acts, Acts, Acts]]  # per prompt: ours, the oracle's, the oracle's fp32 run


def verify_streaming(
    folder: Path,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    prompts: Sequence[Tensor],
    layers: Sequence[int] | None = None,
    *,
    choice: Choice = EAGER,
    tolerances: Tolerances | None = None,
) -> Iterator[Row]:
    """The rows of `verify`'s L2, as they are computed: arguments as `stages` has them."""
    dtype = pick_dtype(dtype, raw := read_config(folder))
    comparison = Comparison(build(raw), tolerances or Tolerances(), dtype)
    for stage in stages(folder, dtype, device, prompts, layers, choice=choice):
        for acts in stage.captures:
            comparison.add(*acts)
        yield from comparison.rows()


@torch.no_grad()
def stages(
    folder: Path,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    prompts: Sequence[Tensor],
    layers: Sequence[int] | None = None,
    *,
    choice: Choice = EAGER,
    recorded: Oracle | None = None,
) -> Iterator[Stage]:
    """Embedding, blocks and head of a folder's model, one after the other, each computed by both sides.

    Args:
        dtype: to compute in; None as config.json says.
        prompts: ids, each (B, T) int64.
        layers: which blocks; the others are left out on both sides. None = all.
        choice: operation -> implementation of our side; without eager attention there are no patterns.
        recorded: what the oracle computed for these prompts; None = run it here.
    Raises: CheckpointError if the folder's tensors are not exactly those of its config.json, before anything is computed.
    """
    raw = read_config(folder)
    dtype, device = pick_dtype(dtype, raw), torch.device(device)
    with ExitStack() as stack:
        ours = stack.enter_context(_Ours(folder, raw, dtype, device, choice))
        chosen = _chosen(layers, len(ours.model.model.layers))
        oracles: list[_Recorded] | list[_Theirs]
        if recorded is not None:
            count = range(len(prompts))
            oracles = [_Recorded([side(p) for p in count], device) for side in (recorded.theirs, recorded.exact)]
        else:
            dtypes = (dtype, torch.float32) if dtype in HALF else (dtype,)
            oracles = [_Theirs(folder, ours.model, d, device) for d in dtypes]
        ids = [row.to(device) for row in prompts]
        yield _stage("model.embed_tokens", ours.begin(ids), [side.begin(ids) for side in oracles])
        for i in chosen:
            theirs = [side.block(i) for side in oracles]
            yield _stage(f"model.layers.{i}", ours.block(i, follow=theirs[0]), theirs)
        yield _stage("lm_head", ours.end(), [side.end() for side in oracles])


def weights(folder: Path, dtype: torch.dtype, device: torch.device | str) -> Iterator[dict[str, Tensor]]:
    """The checkpoint's tensors by name, as our side loads them, one part of the model after the other."""
    with _Ours(folder, read_config(folder), dtype, torch.device(device), EAGER) as ours:
        blocks = [f"model.layers.{i}" for i in range(len(ours.model.model.layers))]
        head = ["lm_head"] if ours.model.lm_head is not None else []
        for path in ("model.embed_tokens", *blocks, final_path(ours.model), *head):
            with ours.loaded(path):
                yield ours.tensors(path)


def _stage(name: str, ours: list[Acts], oracles: list[list[Acts]]) -> Stage:
    return Stage(name, list(zip(ours, oracles[0], oracles[-1], strict=True)))


def _chosen(layers: Sequence[int] | None, count: int) -> list[int]:
    chosen = list(range(count)) if layers is None else list(layers)
    if wrong := [i for i in chosen if not 0 <= i < count]:
        raise RequestError(f"layers holds {wrong[0]}; the model has blocks 0 to {count - 1}")
    return chosen


# ------------------------------------------------------------------------------------------------- one side


class _Side:
    """A model without memory, of which one part at a time is filled, run and dropped."""

    model: Any

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self.names = list(oracle.points(model))
        self.residuals: list[Tensor] = []  # per prompt, (B, T, H)
        self.given: list[list[tuple[tuple, dict]]] = []  # per prompt and block, its further arguments

    def fill(self, path: str, part: nn.Module) -> None:
        """Read the weights of the part at `path`, which has memory."""
        raise NotImplementedError

    def recording(self, names: list[str], follow: Acts) -> AbstractContextManager[dict[str, Tensor]]:
        raise NotImplementedError

    def begin(self, prompts: Sequence[Tensor]) -> list[Acts]:
        """The embedding and the rotary tables; notes what every block is given."""
        captures: list[Acts] = []
        with self.loaded("model.embed_tokens", final_path(self.model)):
            for ids in prompts:
                names = self._names("hook_embed", "rotary.")
                with self.recording(names, {}) as acts, self._noting() as calls:
                    self.model.model(ids)
                captures.append(oracle.in_order(acts, names))
                self.residuals.append(calls[0][0][0])
                self.given.append([(args[1:], kwargs) for args, kwargs in calls])
        return captures

    def block(self, i: int, follow: Sequence[Acts] | None = None) -> list[Acts]:
        """Block i on the residual stream of every prompt; `follow` has the experts to send tokens to."""
        block, names = self.model.model.layers[i], self._names(f"blocks.{i}.")
        captures: list[Acts] = []
        with self.loaded(f"model.layers.{i}"):
            for p, x in enumerate(self.residuals):
                args, kwargs = self.given[p][i]
                with self.recording(names, follow[p] if follow else {}) as acts:
                    self.residuals[p] = block(x, *args, **kwargs)
                captures.append(oracle.in_order(acts, names))
        return captures

    def end(self) -> list[Acts]:
        """The final norm and, if there is one, the head."""
        head, names = self.model.lm_head, self._names("ln_final.", "hook_logits")
        captures: list[Acts] = []
        path = final_path(self.model)
        with self.loaded(path, *(["lm_head"] if head is not None else [])):
            for x in self.residuals:
                with self.recording(names, {}) as acts:
                    x = self.model.get_submodule(path)(x)
                    if head is not None:
                        head(x)
                captures.append(oracle.in_order(acts, names))
        return captures

    def _names(self, *starts: str) -> list[str]:
        return [name for name in self.names if name.startswith(starts)]

    @contextmanager
    def loaded(self, *paths: str) -> Iterator[None]:
        """While active, these parts have their weights."""
        parts = {path: self.model.get_submodule(path) for path in paths}
        try:
            for path, part in parts.items():
                materialize(part.to(self.dtype), self.device)
                self.fill(path, part)
            yield
        finally:
            for part in parts.values():
                part.to("meta")

    @contextmanager
    def _noting(self) -> Iterator[list[tuple[tuple, dict]]]:
        """Blocks that hand the residual stream on and note their arguments."""
        calls: list[tuple[tuple, dict]] = []

        def note(*args: Any, **kwargs: Any) -> Tensor:
            calls.append((args, kwargs))
            return args[0]

        for block in self.model.model.layers:
            block.forward = note
        try:
            yield calls
        finally:
            for block in self.model.model.layers:
                del block.forward


class _Ours(_Side):
    """Our model, its weights read by `checkpoint`."""

    def __init__(
        self, folder: Path, raw: dict[str, Any], dtype: torch.dtype, device: torch.device, choice: Choice
    ) -> None:
        with Checkpoint(folder) as checkpoint:
            model = skeleton(raw, checkpoint).to(dtype)
            checkpoint.check(model)
        super().__init__(model.eval(), dtype, device)
        self.tied, self.choice = model.tied, choice
        if choice["attention"] != "eager":  # a fused attention never has its pattern
            self.names = [name for name in self.names if not name.endswith("hook_pattern")]
        self._opened = ExitStack()
        files = [self._opened.enter_context(SafetensorsFile(path)) for path in weight_files(folder)]
        self.files = {model.canonical_name(name): (file, name) for file in files for name in file.tensors}

    def __enter__(self) -> _Ours:
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    @contextmanager
    def recording(self, names: list[str], follow: Acts) -> Iterator[dict[str, Tensor]]:
        experts = [value for name, value in follow.items() if name.endswith("topk_idx")]
        with oracle.recording_ours(self.model, names) as acts, backend.use(self.choice, strict=True), following(experts):
            yield acts

    def fill(self, path: str, part: nn.Module) -> None:
        targets = {name: p.data for name, p in part.named_parameters(prefix=path)} | self.tensors(path)
        for name, target in targets.items():  # a stack of experts and its parts: the file has the one or the others
            source = self.tied.get(name, name)
            if source in self.files:
                file, disk_name = self.files[source]
                file.read_into(disk_name, target)

    def tensors(self, path: str) -> dict[str, Tensor]:
        """The checkpoint tensors of the part at `path`; a tied head, here a tensor of its own, is none."""
        return {name: p for name, p in self.model.checkpoint_tensors().items()
                if name.startswith(f"{path}.") and name not in self.tied}


class _Theirs(_Side):
    """transformers' model, its weights read by the safetensors library and stacked as transformers' loader does."""

    def __init__(self, folder: Path, ours: LanguageModel, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(oracle.skeleton(folder, ours, dtype, device), dtype, device)
        self.tied = ours.tied
        self.files: dict[str, Path] = {}
        for path in weight_files(folder):
            with _safe_open(path) as file:
                self.files.update(dict.fromkeys(file.keys(), path))

    def recording(self, names: list[str], follow: Acts) -> AbstractContextManager[dict[str, Tensor]]:
        return oracle.recording_theirs(self.model, names)

    def fill(self, path: str, part: nn.Module) -> None:
        for name, parameter in part.named_parameters(prefix=path):
            owner, _, leaf = name.rpartition(".")
            source = self._on_disk(self.tied.get(name, name))
            if source in self.files:
                self._read(source, parameter)
            elif leaf == "gate_up_proj":  # (E, 2I, H): each expert's gate over its up
                for e, both in enumerate(parameter):
                    for name, half in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                        self._read(self._on_disk(f"{owner}.{e}.{name}.weight"), half)
            elif (shard := f"{owner}.shard_{{}}.weight") and self._on_disk(shard.format(0)) in self.files:  # rows of a table
                for i, rows in enumerate(parameter.chunk(self.model.config.split_ngram_parts)):
                    self._read(self._on_disk(shard.format(i)), rows)
            else:
                for e, matrix in enumerate(parameter):
                    self._read(self._on_disk(f"{owner}.{e}.{leaf}.weight"), matrix)

        for name, _ in list(part.named_buffers(prefix=path)):  # constants of n-grams, which are not computed on the meta device
            owner, _, leaf = name.rpartition(".")
            with _safe_open(self.files[self._on_disk(name)]) as file:
                setattr(self.model.get_submodule(owner), leaf, file.get_tensor(self._on_disk(name)).to(self.device))

    def _on_disk(self, name: str) -> str:
        return name if name in self.files else name.removeprefix("model.")  # as an embedding checkpoint has it

    def _read(self, name: str, out: Tensor) -> None:
        if name not in self.files:
            raise CheckpointError(f"{name} is in no safetensors file that transformers would read")
        with _safe_open(self.files[name]) as file:  # opened anew each time: it maps, and mapped pages count as memory
            out.copy_(file.get_tensor(name))


class _Recorded:
    """An oracle that has run before: every prompt's activations, of which each part is given its own."""

    def __init__(self, acts: list[Acts], device: torch.device) -> None:
        self.acts, self.device = acts, device

    def begin(self, prompts: Sequence[Tensor]) -> list[Acts]:
        return self._named("hook_embed", "rotary.")

    def block(self, i: int) -> list[Acts]:
        return self._named(f"blocks.{i}.")

    def end(self) -> list[Acts]:
        return self._named("ln_final.", "hook_logits")

    def _named(self, *starts: str) -> list[Acts]:
        return [{name: value.to(self.device) for name, value in acts.items() if name.startswith(starts)} for acts in self.acts]


class _Reader(Protocol):
    def keys(self) -> list[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...


def _safe_open(path: Path) -> AbstractContextManager[_Reader]:
    try:
        from safetensors import safe_open
    except ImportError as error:  # transformers itself needs it
        raise RequestError("the oracle's weights are read by safetensors, which is not installed: pip install safetensors"
                           ) from error
    return safe_open(path, framework="pt")
