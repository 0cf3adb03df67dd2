"""What `verify` found: rows (one activation each), checks (one statement each), and how they are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

LEVELS = {
    "L0": "keys, shapes, config",
    "L1": "operations against fp64",
    "L2": "activations",
    "L3": "logits",
    "L4": "greedy tokens",
    "L5": "cache, batch, padding, chunks, backends",
}
_TOLD = ("L4",)  # levels whose details are worth a line even where all is well
_AROUND = 3  # rows shown on each side of the first difference


@dataclass(frozen=True)
class Row:
    """One activation, all prompts together, under the name `run_with_cache` takes.

    Chosen experts are compared as 0/1 vectors over all experts, so that their cosine is the share of equal choices; a
    swap at a tie lowers the cosine but is no difference, and any other swap is more than the allowed 0.
    """

    name: str
    path: str  # the official module it belongs to
    relative_l2: float  # ||ours - oracle|| / ||oracle||
    max_abs: float
    cosine: float
    allowed: float  # the bound on relative_l2

    @property
    def ok(self) -> bool:
        return self.relative_l2 <= self.allowed  # NaN is not

    @property
    def place(self) -> str:
        """"block 3", or the name itself outside the blocks."""
        return f"block {self.name.split('.')[1]}" if self.name.startswith("blocks.") else self.name

    @property
    def strain(self) -> float:
        """How much of what is allowed it takes: above one it differs."""
        return _share(self.relative_l2, self.allowed)

    def to_json(self) -> dict[str, Any]:
        return {**_finite(asdict(self)), "ok": self.ok}


@dataclass(frozen=True)
class Check:
    """One statement of a level: `value` is how far from true, `allowed` how far it may be."""

    level: str
    name: str
    value: float
    allowed: float = 0.0
    detail: str = ""  # of a failure: what, where; of a success: what was seen

    @property
    def ok(self) -> bool:
        return self.value <= self.allowed  # NaN is not

    @property
    def strain(self) -> float:
        return _share(self.value, self.allowed)

    def to_json(self) -> dict[str, Any]:
        return {**_finite(asdict(self)), "ok": self.ok}

    def text(self) -> str:
        detail = f"  ({self.detail})" if self.detail else ""
        return f"{self.level}  {self.name}: {_number(self.value)}, allowed {_number(self.allowed)}  {_mark(self.ok)}{detail}"


@dataclass(frozen=True)
class Report:
    """The outcome of one `verify`."""

    model: str
    against: str  # "transformers 5.23.0" or the bundle's file
    dtype: str
    device: str
    backend: dict[str, str]  # operation -> the implementation that ran on our side
    levels: tuple[str, ...]  # those that ran
    skipped: dict[str, str]  # level (or part of one) -> why it did not run
    rows: list[Row]
    checks: list[Check]
    prompts: list[list[int]]  # token ids
    seed: int
    config_sha256: str  # of config.json in canonical form
    environment: dict[str, Any] = field(default_factory=dict)  # versions, hardware, date

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows) and all(check.ok for check in self.checks)

    @property
    def first_row(self) -> Row | None:
        """The first activation that differs; all after it inherit the difference."""
        return next((row for row in self.rows if not row.ok), None)

    @property
    def first_difference(self) -> str | None:
        """The hook name of `first_row`; if all rows agree, the first check that fails, as "L5 chunked prefill = whole"."""
        if self.first_row:
            return self.first_row.name
        return next((f"{check.level} {check.name}" for check in self.checks if not check.ok), None)

    @property
    def verdict(self) -> str:
        failed = [check for check in self.checks if not check.ok]
        if not self.ok:
            first = self.first_difference or ""
            where = f"{first} ({self.first_row.path})" if self.first_row else f"{first}: {failed[0].detail or failed[0].text()}"
            levels = ", ".join(dict.fromkeys(check.level for check in failed))
            return f"differs, first at {where}" + (f"; failing checks in {levels}" if failed and self.first_row else "")
        parts = [f"{len(self.rows)} activations"] if self.rows else []
        parts += [f"{len(self.checks)} checks"] if self.checks else []
        worst = max(self.rows, key=lambda row: row.strain, default=None)
        if worst:
            parts.append(f"worst relative L2 {worst.relative_l2:.1e} of {worst.allowed:.1e} allowed ({worst.name})")
        missing = f"; not run: {', '.join(self.skipped)}" if self.skipped else ""
        return f"equal in {_span(self.levels)}: {', '.join(parts)}{missing}"

    def table(self, full: bool = True) -> str:
        """One line per activation, or per layer its worst; the checks by level; what did not run; the verdict."""
        table = Table(full, width=max((len(row.name) for row in self.rows), default=0))
        early = [check for check in self.checks if check.level < "L2"]
        entries: list[Row | Check] = [*early, *self.rows, *self.checks[len(early) :]]
        lines = [line for entry in entries for line in table.add(entry)] + table.finish()
        if not full:
            lines += self.around_first_difference()
        return "\n".join([*lines, *self.closing()])

    def around_first_difference(self) -> list[str]:
        """The rows on both sides of the first that differs; nothing if none does."""
        if self.first_row is None:
            return []
        at = self.rows.index(self.first_row)
        shown = self.rows[max(at - _AROUND, 0) : at + _AROUND + 1]
        width = max(len(row.name) for row in shown)
        return ["", "around the first difference:", _head(width, "activation"), *(_line(row, row.name, width) for row in shown)]

    def closing(self) -> list[str]:
        """What did not run, and the verdict."""
        skipped = [f"{what}  not run: {why}" for what, why in self.skipped.items()]
        return [*skipped, "", f"{self.model}, {self.dtype} on {self.device}, against {self.against}: {self.verdict}"]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; a number that is not finite is null."""
        data = {**self.__dict__, "levels": list(self.levels), "rows": [row.to_json() for row in self.rows],
                "checks": [check.to_json() for check in self.checks]}
        return {"ok": self.ok, "verdict": self.verdict, "first_difference": self.first_difference, **data}

    def html(self) -> str:
        """One self-contained page: verdict, error by depth, table, checks."""
        from .html import page

        return page(self)


class Table:
    """Text lines for rows and checks as they come: every row, or the worst of each layer once the layer is complete."""

    def __init__(self, full: bool, width: int = 40) -> None:
        self.full, self.width = full, max(width, 28)
        self._layer: list[Row] = []
        self._level: list[Check] = []
        self._begun = False

    def add(self, entry: Row | Check) -> list[str]:
        return self._add_row(entry) if isinstance(entry, Row) else self._add_check(entry)

    def _add_row(self, row: Row) -> list[str]:
        lines = self._flush_level()
        if not self._begun:
            lines.append(_head(self.width, "activation" if self.full else "worst of"))
            self._begun = True
        if self.full:
            return [*lines, _line(row, row.name, self.width)]
        if self._layer and self._layer[0].place != row.place:
            lines += self._flush_layer()
        self._layer.append(row)
        return lines

    def _add_check(self, check: Check) -> list[str]:
        lines = self._flush_layer()
        if self._level and self._level[0].level != check.level:
            lines += self._flush_level()
        self._level.append(check)
        return lines

    def finish(self) -> list[str]:
        return [*self._flush_layer(), *self._flush_level()]

    def _flush_layer(self) -> list[str]:
        layer, self._layer = self._layer, []
        if not layer:
            return []
        worst = max(layer, key=lambda row: (not row.ok, row.strain))
        inner = worst.name.split(".", 2)[-1] if worst.strain else f"all {len(layer)} alike"
        return [_line(worst, f"{worst.place:10}{inner}" if worst.name.startswith("blocks.") else worst.name, self.width)]

    def _flush_level(self) -> list[str]:
        level, self._level = self._level, []
        if not level:
            return []
        if self.full:
            return [check.text() for check in level]
        failed = [check for check in level if not check.ok]
        head = f"{level[0].level}  {LEVELS[level[0].level]}: "
        if failed:
            return [f"{head}{len(failed)} of {len(level)} checks FAIL", *(f"    {check.text()}" for check in failed[:_AROUND]),
                    *(["    ..."] if len(failed) > _AROUND else [])]
        worst = max(level, key=lambda check: check.strain)
        notes = [f"nearest to its bound: {worst.name} ({worst.strain:.0%} of it)"] if worst.strain else []
        notes += [f"{check.name}: {check.detail}" for check in level if check.level in _TOLD]
        return [f"{head}{len(level)} check{'s' if len(level) > 1 else ''} ok{''.join('; ' + note for note in notes if note)}"]


def live(write: Callable[[str], None], full: bool = False) -> tuple[Callable[[Row | Check], None], Callable[[], None]]:
    """Two functions: one writes the table as rows and checks come, the other what is left at the end."""
    table = Table(full)

    def add(entry: Row | Check) -> None:
        for line in table.add(entry):
            write(line)

    def finish() -> None:
        for line in table.finish():
            write(line)

    return add, finish


def by_layer(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """(place, its rows), in order."""
    for place, group in groupby(rows, key=lambda row: row.place):
        yield place, list(group)


def write_text(path: str | Path, text: str) -> None:
    """RequestError if the file cannot be written."""
    from ..errors import RequestError

    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror or error}") from error


def _head(width: int, title: str) -> str:
    return f"{title:{width}}  relative L2  allowed   max abs   cosine"


def _line(row: Row, title: str, width: int) -> str:
    return (f"{title:{width}}  {row.relative_l2:<11.2e}  {row.allowed:<8.1e}  {row.max_abs:<8.1e}  {row.cosine:.7f}  "
            f"{_mark(row.ok)}")


def _mark(ok: bool) -> str:
    return "ok" if ok else "DIFFERS"


def _number(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) and value == int(value) else f"{value:.2g}"


def _share(value: float, allowed: float) -> float:
    if value == 0:
        return 0.0
    return value / allowed if allowed else math.inf


def _span(levels: tuple[str, ...]) -> str:
    return f"{levels[0]}-{levels[-1]}" if len(levels) > 2 and levels == tuple(LEVELS)[: len(levels)] else ", ".join(levels)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
