"""L5: ways to compute the same logits, compared among each other; no oracle takes part."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..backend import OPERATIONS
from ..models.common import LanguageModel
from .levels import HALF, Choice, Tolerances, following, is_recurrent, run
from .report import Check

_SHORT = 24  # tokens of the prompt that L5 cuts at every point
_LONGEST_WINDOW = 64  # a sliding window up to this many tokens is reached by repeating the prompt



class Relations:
    """Checks of one model against itself.

    Those that concern cache, batch, padding and chunks hold to rounding only, and half precision's rounding is as large
    as a small fault: in half precision they run on an fp32 copy of the model. The implementations of operations are
    compared in the dtype itself, by what each loses against that copy.
    """

    def __init__(self, model: LanguageModel, prompts: Sequence[Tensor], choice: Choice, tolerances: Tolerances) -> None:
        self.half, self.choice, self.tolerances = model.dtype in HALF, choice, tolerances
        self.model = model
        self.exact = copy.deepcopy(model).float() if self.half else model
        self.prompts = [_short(prompt, model.config.windows) for prompt in prompts]
        self.ids = self.prompts[0]
        self.rounding = tolerances.relative_l2(
            torch.float32, len(model.model.layers), 0.0, recurrent=is_recurrent(model))
        if model.dtype == torch.float64:  # both sides are ours here, and fp64 throughout
            self.rounding *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps

    def beyond_reach(self) -> list[int]:
        """Sliding windows that are longer than the prompt, so that nothing slides."""
        return sorted({w for w in self.model.config.windows if w is not None and w >= self.ids.shape[1]})

    @torch.no_grad()
    def checks(self, bar: Callable[..., Any]) -> Iterator[Check]:
        relations = {"cached = full, at every split": self._cached, "chunked prefill = whole": self._chunked,
                     "batch = single": self._batched, "left padding = none": self._padded}
        with backend.use(self.choice):  # not strict: what runs in half precision only has nothing to say about fp32
            whole = run(self.exact, self.ids)
            for name, pairs in relations.items():
                yield self._check(name, bar(pairs(whole), desc=f"L5 {name}"))
        yield from self._implementations()

    def _check(self, name: str, pairs: Iterator[tuple[str, Tensor, Tensor]]) -> Check:
        """The worst of (where, one way, the other way); a way that cannot be gone at all is infinitely far off."""
        try:
            errors = [(where, _relative_l2(ours, other)) for where, ours, other in pairs]
        except (RuntimeError, IndexError) as error:  # what torch raises where shapes do not fit
            return Check("L5", name, math.inf, self.rounding, _first_line(error))
        worst, value = max(errors, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])
        first = next((where for where, error in errors if not error <= self.rounding), None)
        return Check("L5", name, value, self.rounding, f"first {first}" if first else f"worst {worst}")

    def _read(self, pieces: Sequence[Tensor], positions: Tensor | None = None) -> Tensor:
        cache, out = self.exact.make_cache(), []
        padding = [0] * len(pieces[0]) if positions is None else (positions < 0).sum(-1).tolist()
        cache.expect([sum(piece.shape[1] for piece in pieces) - pad for pad in padding])
        for piece in pieces:
            out.append(run(self.exact, piece, positions, cache))
            positions = None
        return torch.cat(out, dim=1)

    def _cached(self, whole: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        count = self.ids.shape[1]
        for s in range(1, count):
            yield f"split after {s}", self._read(self.ids.split([s, count - s], dim=1)), whole
        yield "token by token", self._read(self.ids.split(1, dim=1)), whole

    def _chunked(self, whole: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        for size in (2, 3, 7):
            yield f"chunks of {size}", self._read(self.ids.split(size, dim=1)), whole

    def _batched(self, whole: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        length = min(prompt.shape[1] for prompt in self.prompts)
        rows = [prompt[:, :length] for prompt in self.prompts] + [self.ids[:, :length].flip(1)]
        together = run(self.exact, torch.cat(rows))
        for i, row in enumerate(rows):
            yield f"row {i}", together[i : i + 1], run(self.exact, row)

    def _padded(self, whole: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """One row padded, one not, in one batch; at once, and with the last tokens read from the cache."""
        pad, count = 3, self.ids.shape[1]
        other = self.ids.flip(1)[:, :pad]
        ids = torch.cat((torch.cat((other, self.ids), 1), torch.cat((self.ids, other), 1)))  # (2, pad + T)
        positions = torch.arange(pad + count, device=ids.device).repeat(2, 1)
        positions[0] = (positions[0] - pad).clamp_min(-1)
        yield "padded row", run(self.exact, ids, positions)[:1, pad:], whole
        cut = pad + count - 2
        cached = self._read([ids[:, :cut], *ids[:, cut:].split(1, 1)], positions[:, :cut])
        yield "padded row, cached", cached[:1, pad:], whole
        yield "full row beside it, cached", cached[1:], run(self.exact, ids[1:])

    def _implementations(self) -> Iterator[Check]:
        """The model with one operation exchanged, for each implementation that can run here, against all eager.

        Of the operations that the model calls: an implementation that never ran would equal anything.
        """
        with _noting_operations() as outputs:
            reference = self._with("eager", self.model, [])
        experts = [chosen for _, chosen in outputs.get("router_topk", [])]
        exact = self._with("eager", self.exact, experts)
        own = _relative_l2(reference, exact) if self.half else 0.0
        allowed = self.tolerances.relative_l2(self.model.dtype, 0, own, exact.numel()) if self.half else self.rounding
        for operation in map(OPERATIONS.__getitem__, outputs):
            for name, implementation in operation.implementations.items():
                if name == "eager" or implementation.supports(self.model.device, self.model.dtype) is not None:
                    continue
                error, detail = math.inf, ""
                try:
                    error = _relative_l2(self._with({operation.name: name}, self.model, experts), exact)
                except (RuntimeError, IndexError) as problem:
                    detail = _first_line(problem)
                yield Check("L5", f"{operation.name}[{name}] = eager", error, allowed, detail)

    def _with(self, choice: Choice | str, model: LanguageModel, experts: Sequence[Tensor]) -> Tensor:
        """Logits of the model, all eager but for what is chosen, its tokens sent to these experts if there are any."""
        with backend.use("eager"), backend.use(choice, strict=True), following(experts):
            return run(model, self.ids)


@contextmanager
def _noting_operations() -> Iterator[dict[str, list[Any]]]:
    """A dict that fills with the names of the operations that are called, and what the routers among them choose."""
    outputs: dict[str, list[Any]] = {}

    def note(name: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output, kept = run(*args, **kwargs), outputs.setdefault(name, [])
        if name == "router_topk":
            kept.append(output)
        return output

    with ExitStack() as stack:
        for name in OPERATIONS:
            stack.enter_context(backend.intercept(name, partial(note, name)))
        yield outputs


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), ''):.100}"


def _relative_l2(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300))


def _short(prompt: Tensor, windows: Sequence[int | None]) -> Tensor:
    """At most `_SHORT` tokens, or as many as make the shortest sliding window slide, if that is in reach."""
    window = min((w for w in windows if w is not None), default=0)
    needed = window + 6 if window + 6 <= _LONGEST_WINDOW else 0
    length = max(min(prompt.shape[1], _SHORT), needed, 3)
    return prompt.repeat(1, -(-length // prompt.shape[1]))[:, :length]
