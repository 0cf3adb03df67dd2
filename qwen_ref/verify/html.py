"""A report as one page: no script, no file beside it, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from .report import LEVELS, Report, Row, by_layer

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --page: #fff; --soft: #6b7280; --line: #d7dbe0; --bad: #b42318;
        --good: #1a7f37; --ours: #2463c5; --bound: #b7791f; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --page: #14171a; --soft: #9aa3ad; --line: #343a41;
        --bad: #ff7b72; --good: #56d364; --ours: #79b0ff; --bound: #e3b341; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
.bad { color: var(--bad); font-weight: 600; } .good { color: var(--good); } .soft { color: var(--soft); }
.scroll { overflow-x: auto; } svg { max-width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: .1rem .9rem .1rem 0; border-bottom: 1px solid var(--line); }
td.n { font-family: ui-monospace, monospace; font-size: .9em; white-space: nowrap; }
tr.bad td { color: var(--bad); } details { margin: .5rem 0; } summary { cursor: pointer; }
"""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 760, 300, 64, 40, 24
_LOWEST = 1e-9  # what is equal to the last bit is drawn here


def page(report: Report) -> str:
    """The report as HTML."""
    state = "good" if report.ok else "bad"
    facts = {"against": report.against, "dtype": report.dtype, "device": report.device, **report.environment,
             "seed": report.seed, "config sha256": report.config_sha256,
             "not the formula": ", ".join(f"{k}: {v}" for k, v in report.backend.items() if v != "eager") or "nothing",
             "prompt lengths": ", ".join(str(len(row)) for row in report.prompts)}
    skipped = "".join(f"<li>{escape(what)}: {escape(why)}</li>" for what, why in report.skipped.items())
    return "\n".join([
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>verify {escape(report.model)}</title>", f"<style>{_STYLE}</style>", "</head>", "<body>",
        f"<h1>{escape(report.model)}</h1>", f'<p class="{state}">{escape(report.verdict)}</p>',
        *(["<h2>Error by depth</h2>", _plot(report.rows)] if report.rows else []),
        "<h2>Checks</h2>", *_checks(report), f"<h2>Not run</h2><ul>{skipped}</ul>" if skipped else "",
        *(["<h2>Activations</h2>", *_rows(report)] if report.rows else []),
        "<h2>Conditions</h2>", "<table>",
        *(f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>" for key, value in facts.items()), "</table>",
        "</body>", "</html>", "",
    ])  # fmt: skip


def _checks(report: Report) -> list[str]:
    lines = []
    for level in [name for name in LEVELS if any(check.level == name for check in report.checks)]:
        checks = [check for check in report.checks if check.level == level]
        failed = sum(not check.ok for check in checks)
        said = _span("bad", f"{failed} of {len(checks)} fail") if failed else _span("good", f"{len(checks)} ok")
        lines += [f"<details{' open' if failed else ''}><summary>{level} {escape(LEVELS[level])}: {said}</summary>",
                  '<div class="scroll"><table>', "<tr><th>check</th><th>value</th><th>allowed</th><th></th></tr>"]
        lines += [f"<tr{_class(check.ok)}><td>{escape(check.name)}</td><td class=n>{check.value:.3g}</td>"
                  f"<td class=n>{check.allowed:.3g}</td><td>{escape(check.detail)}</td></tr>" for check in checks]
        lines += ["</table></div>", "</details>"]
    return lines


def _rows(report: Report) -> list[str]:
    lines, first = [], report.first_row
    titles = ("activation", "relative L2", "allowed", "max abs", "cosine", "official module")
    head = f"<tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"
    for place, rows in by_layer(report.rows):
        failed = sum(not row.ok for row in rows)
        worst = max(row.relative_l2 for row in rows)
        said = _span("bad", f"{failed} of {len(rows)} differ") if failed else _span("soft", f"{worst:.1e}")
        lines += [f"<details{' open' if first in rows else ''}><summary>{escape(place)}: {said}</summary>",
                  '<div class="scroll"><table>', head]
        lines += [f"<tr{_class(row.ok)}><td class=n>{escape(row.name)}</td><td class=n>{row.relative_l2:.2e}</td>"
                  f"<td class=n>{row.allowed:.1e}</td><td class=n>{row.max_abs:.1e}</td><td class=n>{row.cosine:.7f}</td>"
                  f"<td class=n>{escape(row.path)}</td></tr>" for row in rows]
        lines += ["</table></div>", "</details>"]
    return lines


def _span(kind: str, text: str) -> str:
    return f'<span class="{kind}">{text}</span>'


def _class(ok: bool) -> str:
    return "" if ok else ' class="bad"'


def _plot(rows: list[Row]) -> str:
    """Relative L2 of every activation in order, on a log scale; the line is what is allowed."""
    finite = [v for row in rows for v in (row.relative_l2, row.allowed) if math.isfinite(v) and v > _LOWEST]
    low, high = -9, math.ceil(math.log10(max(finite, default=1.0)))
    high = max(high, low + 1)

    def x(i: float) -> float:
        return _LEFT + (i + 0.5) * (_WIDTH - _LEFT - 10) / len(rows)

    def y(value: float) -> float:
        exponent = math.log10(min(max(value, _LOWEST), 10.0**high)) if math.isfinite(value) else high
        return _TOP + (high - exponent) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="relative L2 by depth">']
    for exponent in range(low, high + 1, max(1, (high - low) // 6)):
        at = y(10.0**exponent)
        label = "equal" if exponent == low else f"1e{exponent}"
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{at:.1f}" y2="{at:.1f}" stroke="var(--line)"/>'
                     f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    parts += _places(rows, x)
    steps = " ".join(f"{x(i):.1f},{y(row.allowed):.1f}" for i, row in enumerate(rows) if row.allowed)
    parts.append(f'<polyline points="{steps}" fill="none" stroke="var(--bound)" stroke-dasharray="5 3"/>')
    parts += [f'<circle cx="{x(i):.1f}" cy="{y(row.relative_l2):.1f}" r="{2.2 if row.ok else 3.2}" '
              f'fill="var(--{"ours" if row.ok else "bad"})"><title>{escape(row.name)} {row.relative_l2:.1e}</title></circle>'
              for i, row in enumerate(rows)]
    title = "relative L2 of each activation, in the order of computation; dashed: allowed"
    parts.append(f'<text x="{_LEFT}" y="14">{title}</text>')
    return "\n".join([*parts, "</svg>"])


def _places(rows: list[Row], x: Callable[[float], float]) -> list[str]:
    """A mark where a block begins, its number below, as many as are legible."""
    places = [(place.removeprefix("block "), len(group)) for place, group in by_layer(rows)]
    blocks, at, marks = sum(name.isdigit() for name, _ in places), 0, []
    every = max(1, math.ceil(blocks / 24))
    for name, count in places:
        if name.isdigit() and int(name) % every == 0:
            left, middle, below = x(at - 0.5), x(at + count / 2 - 0.5), _HEIGHT - _BOTTOM
            marks.append(f'<line x1="{left:.1f}" x2="{left:.1f}" y1="{_TOP}" y2="{below}" stroke="var(--line)"/>'
                         f'<text x="{middle:.1f}" y="{below + 16}" text-anchor="middle">{name}</text>')
        at += count
    title = f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">block</text>'
    return [*marks, title] if blocks else marks
