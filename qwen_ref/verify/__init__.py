"""Layer by layer against transformers: the same weights, the same tokens, every activation compared by name.

    report = qwen_ref.verify("tiny")
    report.ok; print(report.verdict); print(report.table())

Six levels, each of which can fail alone:

    L0  keys, shapes, values, config as both sides have read them
    L1  each operation against its formula in fp64, at the model's own sizes          (operations)
    L2  every activation, by the name `run_with_cache` takes                          (levels)
    L3  logits: differences, KL, top-1, top-5
    L4  greedy tokens, with a rule for ties
    L5  cached = full, chunked = whole, batch = single, padded = not, and every implementation = the formula

The first name of L2 that differs is the one that computes something else; all after it inherit the difference. The other
side is transformers, run here (`oracle`), block by block where the models do not fit the memory (`streaming`), or what
it computed somewhere else, in a file (`bundle`).
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend as backends
from ..errors import CheckpointError, RequestError
from ..loading import build, extra_files, load_model, load_tokenizer, locate, opened, pick_dtype, usable_device
from ..models.common import LanguageModel
from ..tokenizer import Tokenizer
from . import bundle, levels, memory, operations, oracle, streaming
from .levels import HALF, Comparison, Live, Logits, Oracle, Tolerances
from .relations import Relations
from .report import LEVELS, Check, Report, Row, live

__all__ = ["Check", "Report", "Row", "capture", "verify", "write_oracle"]

PROMPTS = (
    "Once upon a time, there was a little girl named Lily.",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2\n",
    "床前明月光，疑是地上霜。 🌙 naïve café 12345",
)
_RANDOM_LENGTHS = (17, 5)  # of prompts for a model without tokenizer
_FINGERPRINTS = "the bundle's fingerprints of config and weights were compared instead"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "qwen.tiktoken")

Prompts = str | Sequence["str | Sequence[int]"]
Progress = bool | Callable[["Row | Check"], None]


def verify(
    model: LanguageModel | str | Path = "tiny",
    *,
    against: str | Path = "transformers",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    prompts: Prompts | None = None,
    backend: Mapping[str, str] | str | None = None,
    levels: str | Sequence[str] | None = None,
    new_tokens: int = 64,
    seed: int = 0,
    streaming: bool | None = None,
    progress: Progress = True,
) -> Report:
    """Compare a model with transformers on the same weights.

    Args:
        model: a bundled name, folder or hub id, read by both sides; or a loaded model, whose weights are copied over.
        against: "transformers", or the file of an oracle bundle (`write_oracle`).
        dtype: of the comparison; default float32, a loaded model's own, or the bundle's.
        prompts: texts or lists of ids. Default: three short texts; ids from `seed` without a tokenizer.
        backend: implementations on our side: one name, or {operation: name}. What is not named is the formula, "eager".
        levels: "L0-L5" (default), "L2", "L0,L3-L5", or a list of them.
        new_tokens: length of the greedy continuation (L4).
        streaming: hold one block of one side in memory at a time; None = where the models would not fit.
        progress: lines and bars on stderr when it is a terminal; a function is given each Row and Check; False: none.
    Returns: a Report; `.ok`, `.verdict`, `.table()`, `.to_json()`, `.html()`.
    Raises: RequestError for an argument that cannot be (an unknown level or implementation, a prompt beyond the context,
        a model too large), or if transformers is not installed or has no such model; CheckpointError and ConfigError as
        `load`, and for a bundle that is damaged or belongs to another model.
    """
    _check_numbers(new_tokens, seed)
    wanted, choice = _levels(levels), _choice(backend)
    file = None if str(against) == "transformers" else bundle.read(_existing(against))
    if file is None:
        oracle.require()
    elif prompts is not None:
        raise RequestError(f"{against} holds the prompts it was written for; leave out prompts")
    source = _open(model, dtype or (file.dtype if file else None), usable_device(device))
    if file is None and {"L0", "L2", "L3", "L4"} & set(wanted):
        oracle.check_knows(source.config.model_type)
    ids = _prompts(prompts, source, seed) if file is None else [row.to(source.device) for row in file.prompts]
    _check_context(ids, source.config, new_tokens if "L4" in wanted and file is None else 0)
    streamed = _streams(source, wanted, streaming, live=file is None)
    run = _Run(source, wanted, choice, seed, Tolerances.of(file.tolerances) if file else Tolerances(), progress)
    with _reference_arithmetic(), torch.no_grad():
        if streamed:
            run.streamed(file, ids)
        else:
            run.whole(file, ids, new_tokens)
    run.finish()
    versions = file.about["versions"] if file else {"transformers": oracle.require().__version__}
    name = f"transformers {versions.get('transformers', '?')}"
    return Report(
        model=source.name, against=f"{name}, in {against}" if file else name, dtype=_plain(source.dtype),
        device=str(source.device), backend=choice, levels=tuple(name for name in wanted if name not in run.skipped),
        skipped=run.skipped,
        rows=run.rows, checks=run.checks, prompts=[row[0].tolist() for row in ids], seed=seed,
        config_sha256=_sha256(source.raw), environment=_environment(source.device, versions),
    )  # fmt: skip


def write_oracle(
    model: LanguageModel | str | Path,
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    prompts: Prompts | None = None,
    new_tokens: int = 64,
    seed: int = 0,
    streaming: bool | None = None,
    progress: bool = True,
) -> None:
    """Write what transformers computes to a file that `verify(..., against=path)` compares with, where it is not installed.

    Arguments and errors as `verify`; RequestError if the file exists. A streamed bundle has no greedy continuation, whose
    every token would read all weights anew: a check against it has no L4.
    """
    _check_numbers(new_tokens, seed)
    oracle.require()
    source = _open(model, dtype, usable_device(device))
    oracle.check_knows(source.config.model_type)
    ids = _prompts(prompts, source, seed)
    streamed = _streams(source, ("L2",), streaming, live=True)
    _check_context(ids, source.config, 0 if streamed else new_tokens)
    bundle.check_free(path)
    with _reference_arithmetic():
        if streamed:
            _write_streamed(source, path, ids, progress)
            return
        ours, tell = source.load(), partial(print, file=sys.stderr, flush=True)
        theirs, exact = source.oracles(ours)
        bundle.write_bundle(path, ours, theirs, exact, ids, model=source.name, tolerances=Tolerances().to_json(),
                            new_tokens=new_tokens, progress=tell if progress and sys.stderr.isatty() else None)


def _write_streamed(source: _Source, path: str | Path, ids: list[Tensor], progress: bool) -> None:
    sides: dict[str, list[dict[str, Tensor]]] = {side: [{} for _ in ids] for side in ("theirs", "exact")}
    for stage in _bar(source.stages(ids), desc="blocks", total=source.stage_count, quiet=not progress):
        for i, (_, theirs, exact) in enumerate(stage.captures):
            for side, acts in (("theirs", theirs), ("exact", exact)):
                sides[side][i].update({name: value.cpu() for name, value in acts.items()})
    if source.dtype not in HALF:
        del sides["exact"]  # the same
    bundle.write_captured(path, source.skeleton.to(source.dtype), source.weights(), sides, ids, None,
                          model=source.name, tolerances=Tolerances().to_json())


@torch.no_grad()
def capture(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Every module's output for ids (B, T), by its official path, in the order in which they finish; either side's model.

    Tuples are flattened: the first tensor under the path itself, further ones as path[1], ...; integers are left out.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            for i, part in enumerate(p for p in parts if isinstance(p, Tensor) and p.is_floating_point()):
                outputs[f"{name}[{i}]" if i else name] = part.detach()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    try:
        model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


# ------------------------------------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class _Source:
    """A folder or GGUF file, or a model in memory."""

    name: str
    folder: Path | None
    skeleton: LanguageModel  # the model itself if it is in memory, else names and shapes only
    raw: dict[str, Any]  # config.json
    dtype: torch.dtype
    device: torch.device
    quantised: bool = False

    @property
    def config(self) -> Any:
        return self.skeleton.config

    def load(self) -> LanguageModel:
        """Our model with its weights."""
        if self.folder is None:
            return self.skeleton
        return load_model(self.folder, device=self.device, dtype=self.dtype, progress=False)

    def oracles(self, ours: LanguageModel) -> tuple[nn.Module, nn.Module]:
        """transformers' model in the dtype, and in fp32; one and the same but in half precision.

        Of a quantised checkpoint, with the weights dequantised by the format's definition, rounded to the dtype.
        """
        weights: LanguageModel | Path = self.folder or ours
        if self.folder is not None and self.quantised:
            weights = load_model(self.folder, device=self.device, dtype=self.dtype, dequantize=True, progress=False)
        theirs = oracle.build(weights, ours, self.dtype, self.device)
        return theirs, oracle.build(weights, ours, torch.float32, self.device) if self.dtype in HALF else theirs

    def oracle_skeleton(self) -> nn.Module:
        return oracle.skeleton(self._on_disk, self.skeleton, self.dtype, self.device)

    def too_large(self, wanted: Sequence[str], live: bool) -> str | None:
        """Why both sides do not fit the memory; None if they do, or nothing says."""
        free = memory.available(self.device)
        need = memory.needed(self.skeleton, self.dtype, live, "L5" in wanted)
        if free is None or need <= free:
            return None
        return f"needs about {need / 1e9:.1f} GB for both sides' weights, {free / 1e9:.1f} GB are free on {self.device}"

    def stages(self, ids: Sequence[Tensor], **options: Any) -> Iterator[streaming.Stage]:
        """Both sides' computation, block by block."""
        return streaming.stages(self._on_disk, self.dtype, self.device, ids, **options)

    @property
    def stage_count(self) -> int:
        return len(self.skeleton.model.layers) + 2

    def weights(self) -> Iterator[dict[str, Tensor]]:
        """Our side's weights, block by block."""
        return streaming.weights(self._on_disk, self.dtype, self.device)

    @property
    def _on_disk(self) -> Path:
        if self.quantised:
            raise RequestError(f"{self.name} is quantised: it is compared whole, not streamed; use a machine with more memory")
        if self.folder is None:
            raise RequestError(f"{self.name} is in memory already: only a folder can be streamed")
        return self.folder

    def tokenizer(self) -> Tokenizer | None:
        if self.folder is None or not any(name in extra_files(self.folder) for name in _TOKENIZER_FILES):
            return None
        return load_tokenizer(self.folder)


def _open(model: LanguageModel | str | Path, dtype: torch.dtype | str | None, device: torch.device) -> _Source:
    if isinstance(model, LanguageModel):
        if dtype is not None and pick_dtype(dtype, {}) != model.dtype:
            raise RequestError(f"the model is in {_plain(model.dtype)}: leave out dtype, or convert it with model.to(dtype)")
        return _Source(type(model).__module__, None, model, model.config.to_json(), model.dtype, model.device)
    path = locate(model)
    with opened(path) as (raw, format, checkpoint):
        skeleton = build(raw, head=checkpoint.has_language_head())
    quantised = format is not None
    return _Source(str(model), path, skeleton, raw, pick_dtype(dtype or torch.float32, raw), device, quantised)


def _check_numbers(new_tokens: int, seed: int) -> None:
    if new_tokens < 1:
        raise RequestError(f"new_tokens is {new_tokens}; at least one is needed")
    if not -(1 << 63) <= seed < 1 << 63:
        raise RequestError(f"the seed is {seed}; it must fit in 64 bits")


def _prompts(prompts: Prompts | None, source: _Source, seed: int) -> list[Tensor]:
    vocab, tokenizer = source.config.vocab_size, source.tokenizer()
    if prompts is None and tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(0, vocab, (1, n), generator=generator).to(source.device) for n in _RANDOM_LENGTHS]
    rows = []
    for prompt in [prompts] if isinstance(prompts, str) else PROMPTS if prompts is None else prompts:
        if isinstance(prompt, str) and tokenizer is None:
            raise RequestError("text prompts need a tokenizer, which this model does not have: give lists of ids")
        rows.append(tokenizer.encode(prompt) if isinstance(prompt, str) and tokenizer else [int(token) for token in prompt])
    if not rows or not all(rows):
        raise RequestError("verify needs at least one prompt, and none of them empty")
    for row in rows:
        if outside := [token for token in row if not 0 <= token < vocab]:
            raise RequestError(f"a prompt holds the id {outside[0]}; the model has 0 to {vocab - 1}")
    return [torch.tensor([row], device=source.device) for row in rows]


def _check_context(prompts: Sequence[Tensor], config: Any, new_tokens: int) -> None:
    longest, context = max(row.shape[1] for row in prompts), config.max_position_embeddings
    if longest > context:
        raise RequestError(f"a prompt has {longest} tokens, the model's context {context}: shorten it")
    if prompts[0].shape[1] + new_tokens > context:
        raise RequestError(f"the first prompt's {prompts[0].shape[1]} tokens and new_tokens={new_tokens} go beyond the "
                           f"model's context of {context}: lower new_tokens, or leave out L4")


def _levels(levels: str | Sequence[str] | None) -> tuple[str, ...]:
    """"L0-L2", "L1,L3-L5", ["L2", "L4"] -> the levels meant, in order."""
    names, chosen = list(LEVELS), set()
    parts = levels.split(",") if isinstance(levels, str) else names if levels is None else levels
    for part in parts:
        first, dash, last = (end.strip().upper() for end in str(part).partition("-"))
        if first not in names or (dash and last not in names) or (dash and names.index(last) < names.index(first)):
            raise RequestError(f"there is no level {part!r}; there are {', '.join(names)}, and ranges such as L0-L2")
        chosen |= set(names[names.index(first) : names.index(last or first) + 1])
    if not chosen:
        raise RequestError("levels is empty: name at least one of " + ", ".join(names))
    return tuple(name for name in names if name in chosen)


def _choice(backend: Mapping[str, str] | str | None) -> dict[str, str]:
    """Every operation's implementation: as named, and "eager" where nothing is."""
    known = {name: backends.OPERATIONS[name].implementations for name in (*operations.ARGUMENTS, *sorted(operations.PACKED))}
    if isinstance(backend, str):
        backend = {name: backend for name, those in known.items() if backend in those} or {"": backend}
    choice = {**dict.fromkeys(backends.OPERATIONS, "eager"), **(backend or {})}
    for operation, implementation in (backend or {}).items():
        if operation in backends.OPERATIONS and operation not in known:
            raise RequestError(f"no model calls {operation}, so there is nothing to verify with it: "
                               f"`qwen-ref kernels check {operation}` tests the operation itself")
        if implementation not in known.get(operation, ()):
            available = sorted({name for those in known.values() for name in those})
            where = f"operation {operation!r} has no" if operation else "no operation has an"
            raise RequestError(f"{where} implementation {implementation!r}; operations: {', '.join(known)}; "
                               f"implementations: {', '.join(available)}")
    return choice


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise CheckpointError(f'against={str(path)!r} is neither "transformers" nor a file')
    return Path(path)


def _streams(source: _Source, wanted: Sequence[str], asked: bool | None, *, live: bool) -> bool:
    """Whether to go block by block: as asked, or where both sides would not fit the memory."""
    if source.folder is None:
        if asked:
            raise RequestError(f"{source.name} cannot be streamed: it is in memory already")
        return False
    if asked is not None:
        return asked
    if reason := source.too_large(wanted, live):
        print(f"qwen-ref: {source.name} {reason}: going block by block", file=sys.stderr)
    return reason is not None


# ------------------------------------------------------------------------------------------------- the run


@dataclass
class _Run:
    """One comparison: what it collects, and how it shows it meanwhile."""

    source: _Source
    wanted: tuple[str, ...]
    choice: dict[str, str]
    seed: int
    tolerances: Tolerances
    progress: Progress
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if callable(self.progress):
            self.show, self.finish = self.progress, lambda: None
        elif self.progress and sys.stderr.isatty():
            self.show, self.finish = live(partial(print, file=sys.stderr, flush=True))
        else:
            self.show, self.finish = lambda entry: None, lambda: None
        self.bar = partial(_bar, quiet=self.progress is False)
        if "L2" in self.wanted and (fused := self.choice["attention"]) != "eager":
            self.skipped["L2 of hook_pattern"] = f"attention[{fused}] never has it"

    def whole(self, file: bundle.Bundle | None, prompts: list[Tensor], new_tokens: int) -> None:
        """Everything in memory at once."""
        ours, wanted = self.source.load(), self.wanted
        other: Oracle
        if file is not None:
            file.check(ours)
            other = file
            self.skip("L0", _FINGERPRINTS)
        elif {"L0", "L2", "L3", "L4"} & set(wanted):
            theirs, exact = self.source.oracles(ours)
            other = Live(theirs, exact, prompts, new_tokens)
            if "L0" in wanted:
                self.add_all(levels.structure(ours, theirs))
        self.operations(ours)
        if file is not None and not file.greedy.tokens:
            self.skip("L4", "the bundle has no greedy tokens: it was written block by block")
        if ours.lm_head is None:
            self.skip("L3", "the checkpoint has no head")
            self.skip("L4", "the checkpoint has no head")
        if {"L2", "L3"} & set(wanted):
            self.activations(ours, other, prompts)
        if self.runs("L4"):
            self.add_all([levels.greedy(ours, prompts[0], other, self.choice, self.tolerances, self.bar)])
        if "L5" in wanted:
            self.relations(ours, prompts)

    def streamed(self, file: bundle.Bundle | None, prompts: list[Tensor]) -> None:
        """One block of one side in memory at a time."""
        source, dtype = self.source, self.source.dtype
        skeleton = source.skeleton.to(dtype)
        for level in ("L4", "L5"):
            self.skip(level, "streaming: the model is never whole in memory")
        if file is not None:
            file.check(skeleton, source.weights())
            self.skip("L0", _FINGERPRINTS)
        elif "L0" in self.wanted:
            self.add_all(levels.structure(skeleton, source.oracle_skeleton()))
        self.operations()
        if not {"L2", "L3"} & set(self.wanted):
            return
        comparison, logits = Comparison(skeleton, self.tolerances, dtype), Logits(self.tolerances, dtype)
        stages = source.stages(prompts, choice=self.choice, recorded=file)
        for stage in self.bar(stages, desc="L2 blocks", total=source.stage_count):
            for acts in stage.captures:
                comparison.add(*acts)
                if "hook_logits" in acts[0]:
                    logits.add(*(side["hook_logits"] for side in acts))
            self.compared(comparison)
        if skeleton.lm_head is None:
            self.skip("L3", "the checkpoint has no head")
        if self.runs("L3"):
            self.add_all(logits.checks())

    def operations(self, ours: LanguageModel | None = None) -> None:
        if "L1" not in self.wanted:
            return
        with backends.use(self.choice, strict=True):
            found = operations.check(self.source.config, self.source.dtype, self.source.device, self.seed, ours)
            self.add_all(self.bar(found, desc="L1 operations"))

    def activations(self, ours: LanguageModel, other: Oracle, prompts: list[Tensor]) -> None:
        comparison, logits = Comparison(ours, self.tolerances, ours.dtype), Logits(self.tolerances, ours.dtype)
        for i, ids in self.bar(list(enumerate(prompts)), desc="L2 prompts"):
            theirs = other.theirs(i)
            exact = other.exact(i) if ours.dtype in HALF else theirs
            theirs, exact = ({name: value.to(ours.device) for name, value in side.items()} for side in (theirs, exact))
            mine = levels.capture(ours, ids, self.choice, theirs)
            comparison.add(mine, theirs, exact)
            if self.runs("L3"):
                logits.add(*(side["hook_logits"] for side in (mine, theirs, exact)))
        self.compared(comparison)
        if self.runs("L3"):
            self.add_all(logits.checks())

    def relations(self, ours: LanguageModel, prompts: list[Tensor]) -> None:
        relations = Relations(ours, prompts, self.choice, self.tolerances)
        if windows := relations.beyond_reach():
            self.skipped["L5 of a sliding window"] = f"{windows[0]} tokens are more than its short prompt has"
        self.add_all(relations.checks(self.bar))

    def compared(self, comparison: Comparison) -> None:
        for row in comparison.rows() if "L2" in self.wanted else ():
            self.rows.append(row)
            self.show(row)

    def add_all(self, checks: Any) -> None:
        for check in checks:
            self.checks.append(check)
            self.show(check)

    def skip(self, level: str, why: str) -> None:
        if level in self.wanted:
            self.skipped[level] = why

    def runs(self, level: str) -> bool:
        return level in self.wanted and level not in self.skipped


def _bar(steps: Any, *, desc: str, total: int | None = None, quiet: bool = False) -> Any:
    from tqdm import tqdm

    without_terminal = None  # as tqdm says "off where stderr is none"
    return tqdm(steps, desc=desc, total=total, delay=1, leave=False, disable=quiet or without_terminal, file=sys.stderr)


@contextmanager
def _reference_arithmetic() -> Iterator[None]:
    """fp32 matrix products in fp32: TF32 keeps ten bits of the mantissa, and the comparison would show nothing else."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _environment(device: torch.device, versions: Mapping[str, str]) -> dict[str, Any]:
    from .. import __version__

    return {
        "qwen_ref": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": versions.get("transformers", ""),
        "hardware": _hardware(device),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
                platform.processor() or platform.machine())


def _sha256(raw: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
