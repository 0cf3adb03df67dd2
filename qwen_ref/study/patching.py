"""Activation patching: put an activation of a clean run into a corrupted run, and see how much of the answer returns.

    restored = (metric(patched) - metric(corrupted)) / (metric(clean) - metric(corrupted)):   0 nothing, 1 everything

(Meng et al. 2022, "Locating and Editing Factual Associations in GPT"; Heimersheim & Nanda 2024, "How to use and
interpret activation patching".) The prompts must have equally many tokens and differ in what the answer depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from ..hook_points import Point, letter_sizes, points
from ..hooks import Filter, run_with_cache, run_with_hooks, select
from .inputs import Ids, one_position, one_sequence, one_token, several, whole

Metric = Callable[[Tensor], Tensor | float]  # logits (T, V) of one sequence -> a number
HEADS = "NKGP"  # letters of axes that are heads
ROWS = 16  # cells computed in one batch


@dataclass(frozen=True)
class Patching:
    """One row per patched point (usually one per layer), one column per position or head."""

    names: tuple[str, ...]  # the rows
    columns: tuple[int, ...]  # positions, or heads
    by: str  # "position" or "head"
    restored: Tensor  # (names, columns) 0 = as corrupted, 1 = as clean; may lie outside
    clean: float  # the metric of the two runs
    corrupted: float


def logit_difference(model: Any, answer: int, wrong: int, position: int = -1) -> Metric:
    """The usual metric: logit(answer) - logit(wrong) at one position."""
    answer, wrong = one_token(model, answer, "answer"), one_token(model, wrong, "wrong")
    position = whole(position, "position")

    def metric(logits: Tensor) -> Tensor:
        at = one_position(len(logits), position)
        return logits[at, answer] - logits[at, wrong]

    return metric


@torch.no_grad()
def patch(
    model: Any,
    clean_ids: Ids,
    corrupted_ids: Ids,
    names: Filter,
    metric: Metric,
    positions: Sequence[int] | None = None,
    *,
    by: str = "position",
) -> Patching:
    """Patch each named point, one position (or one head) at a time.

    Args:
        names: points to patch, e.g. "blocks.*.hook_resid_pre", "blocks.*.attn.hook_z", "blocks.*.hook_mlp_out".
        metric: a number for logits (T, V); see `logit_difference`.
        positions: where to patch; None = all.
        by: "position": a column per position. "head": a column per head, patched at all `positions`; the points must
            have heads (z, q, k, v, pattern, result ...).
    Raises: RequestError: prompts of different length or equal metric, unknown names, positions or heads that do not exist.
    """
    clean, corrupted = one_sequence(model, clean_ids), one_sequence(model, corrupted_ids)
    where = _positions(clean, corrupted, positions)
    chosen = _points(model, names, by)
    clean_logits, acts = run_with_cache(model, clean, [p.name for p in chosen])
    top, bottom = float(metric(clean_logits[0])), float(metric(model(corrupted)[0]))
    if top == bottom:
        raise RequestError(f"the metric is {top} in both runs: there is nothing to restore; choose prompts that differ")
    columns = tuple(where) if by == "position" else tuple(range(_heads(model, chosen)))
    cells = [[(at, None) for at in where] if by == "position" else [(where, head) for head in columns] for _ in chosen]
    rows = [_metrics(model, corrupted, point, acts[point.name], row, metric) for point, row in zip(chosen, cells, strict=True)]
    restored = (torch.tensor(rows, dtype=torch.float64) - bottom) / (top - bottom) + 0.0  # no -0.0
    return Patching(tuple(p.name for p in chosen), columns, by, restored.float(), top, bottom)


@torch.no_grad()
def run_patched(
    model: Any, corrupted_ids: Ids, activations: dict[str, Tensor], positions: Sequence[int] | None = None
) -> Tensor:
    """The logits (1, T, V) of the corrupted prompt with all these activations, captured by `run_with_cache`, put in at once."""
    corrupted = one_sequence(model, corrupted_ids)
    where = _positions(corrupted, corrupted, positions)
    _points(model, list(activations), "position")
    return run_with_hooks(model, corrupted, [(name, _put(value, [(where, None)])) for name, value in activations.items()])


Cell = tuple[Any, int | None]  # (position or positions, head or None = all)


def _metrics(model: Any, corrupted: Tensor, point: Point, clean: Tensor, cells: Sequence[Cell], metric: Metric) -> list[float]:
    """The metric with the clean activation put in, one cell at a time: the cells are the rows of a batch."""
    values: list[float] = []
    for start in range(0, len(cells), ROWS):
        batch = cells[start : start + ROWS]
        logits = run_with_hooks(model, corrupted.expand(len(batch), -1), [(point.name, _put(clean, batch))])
        values += [float(metric(row)) for row in logits]
    return values


def _put(clean: Tensor, cells: Sequence[Cell]) -> Callable[..., Tensor]:
    """A hook that replaces, in row b of the batch, the positions and head of cell b by the clean ones."""
    if not isinstance(clean, Tensor):
        raise RequestError(f"an activation to put in is {clean!r:.80}; run_with_cache gives tensors")

    def hook(value: Tensor, hook: Point) -> Tensor:
        if clean.shape[1:] != value.shape[1:]:
            raise RequestError(f"{hook.name} was captured as {tuple(clean.shape)}, and this prompt's is {tuple(value.shape)}: "
                               "both must have as many tokens, and be of one model")
        tokens = hook.dims.index("T") - 1  # axes of one row
        for b, (at, head) in enumerate(cells):
            index: list[Any] = [slice(None)] * (value.dim() - 1)
            index[tokens] = at
            if head is not None:
                index[_head_axis(hook) - 1] = head
            value[(b, *index)] = clean[(0, *index)].to(value)
        return value

    return hook


def _head_axis(point: Point) -> int:
    return max(point.dims.find(letter) for letter in HEADS)


def _points(model: Any, names: Filter, by: str) -> list[Point]:
    known = points(model)
    selected = select(model, names)
    chosen = [known[name] for name in selected if name in known]
    if by not in ("position", "head"):
        raise RequestError(f"by is {by!r}; it is 'position' or 'head'")
    if not chosen or len(chosen) < len(selected):
        raise RequestError("patching works on named points (model.list_hooks()), not on module paths")
    for point in chosen:
        if not point.editable or "T" not in point.dims or (by == "head" and _head_axis(point) < 0):
            raise RequestError(f"{point.name} cannot be patched by {by}: its axes are {point.dims}")
    return chosen


def _heads(model: Any, chosen: Sequence[Point]) -> int:
    kinds = {point.dims[_head_axis(point)] for point in chosen}
    if len(kinds) > 1:
        raise RequestError("patch query heads, kv heads and linear heads in separate calls: they are not equally many")
    return letter_sizes(model.config)[kinds.pop()]


def _positions(clean: Tensor, corrupted: Tensor, positions: Sequence[int] | None) -> list[int]:
    length = clean.shape[1]
    if corrupted.shape[1] != length:
        raise RequestError(f"the clean prompt has {length} tokens, the corrupted one {corrupted.shape[1]}; they must match")
    chosen = range(length) if positions is None else several(positions, "positions")
    return [one_position(length, at, "positions") for at in chosen]
