"""Layer by layer against transformers: the same weights, the same tokens, every module's output compared.

Modules carry the official names, so two models are compared by running both with forward hooks and pairing the outputs
by name. The first name that differs is the one that computes something else; all after it inherit the difference.

This is the only module that imports transformers, and only when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import backend
from .errors import RequestError
from .loading import load, locate
from .models.common import LanguageModel

PROMPTS = (
    "Once upon a time, there was a little girl named Lily.",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2\n",
    "床前明月光，疑是地上霜。 🌙 naïve café 12345",
)

# fp32: rounding alone, a few units in the last place per operation, growing slowly with depth.
# Half precision: our error against fp32 may be this much of transformers' own in the same dtype.
FP32_RELATIVE_L2 = 1e-4
FP64_RELATIVE_L2 = 1e-6  # transformers computes norms and softmax in fp32 even in an fp64 model
HALF_RATIO = 1.25


@dataclass(frozen=True)
class Row:
    """One module's output, all prompts together. `allowed` is the bound on `relative_l2` this row is held to."""

    name: str
    relative_l2: float  # ||ours - oracle|| / ||oracle||
    max_abs: float
    cosine: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.relative_l2 <= self.allowed  # NaN is not


@dataclass(frozen=True)
class Report:
    model: str
    dtype: str
    rows: list[Row]
    unmatched: list[str]  # modules with parameters of which transformers has no counterpart: never compared
    greedy: tuple[int, int]  # tokens generated alike, of how many
    transformers: str  # its version

    @property
    def first_difference(self) -> str | None:
        return next((row.name for row in self.rows if not row.ok), None)

    @property
    def ok(self) -> bool:
        return self.first_difference is None and not self.unmatched and self.greedy[0] == self.greedy[1]

    @property
    def verdict(self) -> str:
        same = f"{self.greedy[0]} of {self.greedy[1]} greedy tokens alike"
        if self.ok:
            worst = max(self.rows, key=lambda row: row.relative_l2 / row.allowed)
            return f"equal: {len(self.rows)} outputs, worst relative L2 {worst.relative_l2:.1e} ({worst.name}), {same}"
        return f"differs, first at {self.first_difference or ', '.join(self.unmatched) or 'generation'}; {same}"

    def table(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'output':{width}}  relative L2  allowed      max abs      cosine"]
        for r in self.rows:
            lines.append(
                f"{r.name:{width}}  {r.relative_l2:<11.2e}  {r.allowed:<11.2e}  {r.max_abs:<11.2e}  {r.cosine:.7f}"
                f"  {'ok' if r.ok else 'DIFFERS'}"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "ok": row.ok} for row in self.rows]
        return {**asdict(self), "rows": rows, "ok": self.ok, "verdict": self.verdict,
                "first_difference": self.first_difference}


def verify(
    model: LanguageModel | str | Path = "tiny",
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    prompts: Sequence[str | Sequence[int]] | None = None,
    new_tokens: int = 32,
) -> Report:
    """Compare a model with transformers on the same weights.

    Args:
        model: a bundled name, folder or hub id, read by both sides; or a loaded model, whose weights are copied over.
        prompts: texts or lists of ids. Default: three short texts (ids made from a seed for a loaded model).
        new_tokens: length of the greedy continuation that is compared.
    Returns: a Report; `report.ok`, `report.verdict`, `report.table()`.
    Raises: RequestError if transformers is not installed; CheckpointError and ConfigError as `load`.
    """
    transformers = _transformers()
    if isinstance(model, LanguageModel):
        name, ours, dtype = type(model).__module__, model, model.dtype
        ids = _as_ids(prompts, None, model.config.vocab_size)
    else:
        name = str(model)
        ours, tokenizer = load(model, dtype=dtype, device=device)
        ids = _as_ids(prompts or PROMPTS, tokenizer, ours.config.vocab_size)
    theirs = _oracle(transformers, ours, model, ours.dtype)
    exact = theirs if ours.dtype in (torch.float32, torch.float64) else None
    if exact is None:
        exact = _oracle(transformers, ours, model, torch.float32)
    with backend.use("eager"):
        pairs = [(capture(ours, i), capture(theirs, i), capture(exact, i)) for i in ids]
    rows = [_row(key, pairs, ours.dtype) for key in pairs[0][0] if key in pairs[0][1]]
    missing = [key for key, module in ours.named_modules() if _has_own_parameters(module) and key not in pairs[0][1]]
    same = _greedy_alike(ours, theirs, ids[0], new_tokens)
    return Report(name, str(ours.dtype).removeprefix("torch."), rows, missing, (same, new_tokens), transformers.__version__)


@torch.no_grad()
def capture(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Every module's output for ids (B, T), by module name, in the order in which they finish. Tuples are flattened:
    the first tensor under the name itself, further ones as name[1], ...; integer outputs are left out."""
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


def _row(name: str, pairs: Sequence[tuple[dict[str, Tensor], ...]], dtype: torch.dtype) -> Row:
    ours, theirs, exact = (
        torch.cat([capture[name].double().flatten() for capture in side]) for side in zip(*pairs, strict=True)
    )
    scale = exact.norm().clamp_min(1e-300)
    error = float((ours - exact).norm() / scale)
    if dtype == torch.float32:
        allowed = FP32_RELATIVE_L2
    elif dtype == torch.float64:
        allowed = FP64_RELATIVE_L2
    else:
        # An output both sides hold to the last bit of the dtype would be asked for 1.25 times nothing.
        allowed = HALF_RATIO * max(float((theirs - exact).norm() / scale), torch.finfo(dtype).eps / 4)
    cosine = float(torch.nn.functional.cosine_similarity(ours, exact, dim=0))
    return Row(name, error, float((ours - exact).abs().max()), cosine, allowed)


@torch.no_grad()
def _greedy_alike(ours: LanguageModel, theirs: nn.Module, prompt: Tensor, count: int) -> int:
    """How many of `count` greedy tokens agree, both sides reading the oracle's tokens so that one tie costs one.

    A different choice passes only where the oracle itself was undecided: its margin between the two is below twice the
    largest difference of the two sides' logits.
    """
    cache, ids, alike = ours.make_cache(), prompt, 0
    logits = ours(ids, cache=cache)[0, -1].double()
    for _ in range(count):
        reference = theirs(ids).logits[0, -1].double()
        ours_next, next_token = int(logits.argmax()), int(reference.argmax())
        undecided = float(reference[next_token] - reference[ours_next]) < 2 * float((logits - reference).abs().max())
        second = int(reference.topk(2).indices[1])
        alike += ours_next == next_token or (undecided and ours_next == second)
        step = torch.tensor([[next_token]], device=prompt.device)
        ids = torch.cat((ids, step), dim=1)
        logits = ours(step, cache=cache)[0, -1].double()
    return alike


def _oracle(transformers: Any, ours: LanguageModel, source: Any, dtype: torch.dtype) -> nn.Module:
    """transformers' model, eager attention and experts, in `dtype`: from the same folder, or with our weights."""
    options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": dtype}
    if not isinstance(source, LanguageModel):
        model = transformers.AutoModelForCausalLM.from_pretrained(locate(source), local_files_only=True, **options)
        return model.to(ours.device).eval()
    raw = ours.config.to_json()
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    model = transformers.AutoModelForCausalLM.from_config(config, **options)
    weights = dict(ours.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])
    return model.to(ours.device).eval()


def _as_ids(prompts: Sequence[str | Sequence[int]] | None, tokenizer: Any, vocab: int) -> list[Tensor]:
    if prompts is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(0, vocab, (1, n), generator=generator) for n in (17, 5)]
    rows = []
    for prompt in prompts:
        if isinstance(prompt, str) and tokenizer is None:
            raise RequestError("text prompts need a tokenizer: give verify a folder or hub id, or lists of ids")
        rows.append(tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt))
    if not rows or not all(rows):
        raise RequestError("verify needs at least one prompt, and none of them empty")
    return [torch.tensor([row]) for row in rows]


def _has_own_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise RequestError("verify compares with transformers, which is not installed: pip install transformers") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
