"""Figures of what a model does. Needs the extra `plots`: pip install "qwen-ref[plots]".

Every figure is drawn from numbers that a function returned before: a study (`qwen_ref.study`), a verify report, or one
of the data functions here. A drawing function returns a matplotlib `Figure` made without pyplot: nothing global is
touched, a notebook shows it, `figure.savefig("a.png")` keeps it. `theme` is "light" or "dark".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import RequestError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .study.attribution import Attribution
    from .study.logit_lens import Lens
    from .study.patching import Patching
    from .study.profiles import Profile
    from .study.routing import Routing

WIDTH = 7.0  # inches: a notebook's column at 100 dots per inch
FONTS = (  # the first that has the glyph draws it
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei",
)  # fmt: skip


@dataclass(frozen=True)
class Theme:
    background: str
    ink: str  # text, frames
    muted: str  # what is hidden, limits, guides
    faint: str  # grid, cells that hold nothing
    bad: str  # failures
    lines: tuple[str, ...]
    sequential: tuple[str, ...]  # from nothing (the background) to most
    diverging: tuple[str, ...]  # negative, nothing, positive


THEMES = {
    "light": Theme(
        "#ffffff", "#1b1f24", "#6b7280", "#e6e8ec", "#d11a2a",
        ("#2563eb", "#d9480f", "#0f8a5f", "#9333ea", "#a16207", "#0e7490"),
        ("#ffffff", "#cfe0fb", "#6f9ff0", "#2457c5", "#0b2a6b"),
        ("#8f2d04", "#e08a55", "#ffffff", "#6f9ff0", "#143f9c"),
    ),
    "dark": Theme(
        "#14171c", "#e6e8eb", "#9aa3ad", "#2b3038", "#ff5c6a",
        ("#6ea8fe", "#ff9d5c", "#5fd3a4", "#c79bff", "#f2c14e", "#56c8d8"),
        ("#14171c", "#1d3557", "#2f6db5", "#7db7f5", "#eaf4ff"),
        ("#ffb07a", "#8a4a20", "#14171c", "#275394", "#7db7f5"),
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- text of tokens


def token_labels(tokenizer: Any, ids: Sequence[int] | Tensor) -> list[str]:
    r"""The text of each token, for the axes of a figure. Bytes that are no whole character are written out: `\xe5\xba`."""
    return [tokenizer.token_bytes(int(id)).decode("utf-8", "backslashreplace") for id in ids]


def shown(text: str, length: int | None = None) -> str:
    r"""Text as a figure can show it: spaces as ␣, line ends as ↵, what no installed font can draw as `\u5e8a`.

    Cut to `length` characters, with an ellipsis. What matplotlib would read as mathematics is escaped.
    """
    pieces = [_shown_character(character) for character in text]
    if length is not None and sum(map(len, pieces)) > length:
        while pieces and sum(map(len, pieces)) > max(length - 1, 1):
            pieces.pop()
        pieces.append("…")
    return "".join(pieces).replace("$", r"\$")


def _shown_character(character: str) -> str:
    visible = {" ": "␣", "\n": "↵", "\t": "⇥"}.get(character, character)
    if visible.isprintable() and ord(visible) in _glyphs():
        return visible
    return character.encode("unicode_escape").decode()


@cache
def _installed_fonts() -> tuple[str, ...]:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(name for name in FONTS if name in installed)


@cache
def _glyphs() -> frozenset[int]:
    """Code points that one of the installed FONTS can draw."""
    font_manager = _matplotlib().font_manager
    paths = [font_manager.findfont(name) for name in _installed_fonts()]
    return frozenset().union(*(font_manager.get_font(path).get_charmap() for path in paths))


# ------------------------------------------------------------------------------------------------- attention


def attention(
    pattern: Tensor, tokens: Sequence[str], *, heads: Sequence[int] | None = None, title: str = "", theme: str = "light"
) -> Figure:
    """One panel per head of a layer: pattern (N, T, T), e.g. acts["pattern", 3][0]. `heads`: which; default the first 16."""
    if pattern.dim() != 3 or pattern.shape[1] != pattern.shape[2]:
        raise RequestError(f"attention draws a pattern (heads, T, T), not {list(pattern.shape)}; take one layer and sequence")
    _same_length(tokens, pattern.shape[1])
    heads = range(min(len(pattern), 16)) if heads is None else heads
    if not heads or not all(0 <= head < len(pattern) for head in heads):
        raise RequestError(f"heads is {list(heads)}; the pattern has heads 0..{len(pattern) - 1}")
    columns = min(len(heads), 4 if len(tokens) <= 16 else 3 if len(tokens) <= 21 or len(heads) > 4 else 2)
    rows = math.ceil(len(heads) / columns)
    with _drawing(theme) as style:
        side = (WIDTH - 1.2) / max(columns, 2)
        figure = _figure(rows * (side + 0.25) + 0.8, width=WIDTH if columns > 1 else side + 1.9)
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in panels.flat[len(heads) :]:
            axes.set_visible(False)
        for axes, head in zip(panels.flat, heads, strict=False):
            image = _heat(axes, _without_future(pattern[head]), style, low=0, high=1)
            axes.set_title(f"head {head}")
        for row in range(rows):
            _label_tokens(panels[row, 0], "y", tokens, side)
        for column in range(columns):
            last = panels[(len(heads) - 1 - column) // columns, column]  # the lowest panel of the column
            _label_tokens(last, "x", tokens, side)
            last.tick_params(labelbottom=True)
        figure.supxlabel("key: the token looked at", fontsize=8)
        figure.supylabel("query: the token that looks", fontsize=8)
        _colorbar(figure, image, list(panels.flat), "attention probability")
        return _titled(figure, title)


def _without_future(pattern: Tensor) -> Tensor:
    """NaN where the causal mask hides the key: nothing there, which is not the same as zero."""
    future = torch.ones(pattern.shape, dtype=torch.bool).triu(1)
    return pattern.detach().float().cpu().masked_fill(future, math.nan)


def layers_by_heads(values: Tensor, label: str, *, title: str = "", theme: str = "light") -> Figure:
    """A heat map of one number per head, (L, N): an induction score, a sink share, an entropy."""
    if values.dim() != 2:
        raise RequestError(f"layers_by_heads draws (layers, heads), not {list(values.shape)}")
    with _drawing(theme) as style:
        figure = _figure(0.9 + min(0.28 * len(values), 6))
        axes = figure.subplots()
        _heads_grid(figure, axes, values, label, style)
        return _titled(figure, title)


def _heads_grid(figure: Figure, axes: Axes, values: Tensor, label: str, style: Theme) -> None:
    signed = bool((values < 0).any())
    low, high = _around(values) if signed else (0, None)
    image = _heat(axes, values, style, low=low, high=high, signed=signed)
    axes.invert_yaxis()  # depth grows upwards, as in every figure here
    _number_axis(axes, "x", values.shape[1], "head")
    _number_axis(axes, "y", values.shape[0], "layer")
    if values.shape[0] <= 16 and values.shape[1] <= 12:
        _write_values(axes, image, values, style)
    _colorbar(figure, image, axes, label)


# ------------------------------------------------------------------------------------------------- studies


@dataclass(frozen=True)
class LensGrid:
    """What `logit_lens` writes and colours: D depths, P of the positions."""

    positions: list[int]
    depths: list[str]
    tokens: list[str]  # (P,) what was read
    answers: list[list[str]]  # (D, P) top token
    probabilities: Tensor  # (D, P) its probability
    right: list[list[bool]]  # (D, P) whether it is the token that follows


def lens_grid(lens: Lens, tokenizer: Any, positions: Sequence[int] | None = None) -> LensGrid:
    """The cells of the logit-lens figure; `positions` default to the last 12."""
    count = len(lens.ids)
    at = range(count)[-12:] if positions is None else [p % count for p in positions if -count <= p < count]
    if not at or (positions is not None and len(at) < len(positions)):
        raise RequestError(f"positions are {positions}; there are {count} tokens")
    following = [int(lens.ids[p + 1]) if p + 1 < count else -1 for p in at]
    top = lens.top_ids[:, at, 0]  # (D, P)
    return LensGrid(
        positions=list(at),
        depths=["embed" if d == 0 else f"{d}" + (" = answer" if d == lens.blocks else "") for d in lens.depths],
        tokens=token_labels(tokenizer, lens.ids[at]),
        answers=[token_labels(tokenizer, row) for row in top],
        probabilities=lens.top_logprobs[:, at, 0].float().exp(),
        right=(top == torch.tensor(following)).tolist(),
    )


def logit_lens(
    lens: Lens, tokenizer: Any, *, positions: Sequence[int] | None = None, title: str = "", theme: str = "light"
) -> Figure:
    """The top token at every depth and position, coloured by its probability; framed where it is the one that follows.

    `positions`: which, default the last 12 (more than about 14 leave no room for the words).
    """
    grid = lens_grid(lens, tokenizer, positions)
    with _drawing(theme) as style:
        figure = _figure(1.5 + 0.24 * len(grid.depths))
        axes = figure.subplots()
        image = _heat(axes, grid.probabilities, style, low=0, high=1)
        axes.invert_yaxis()
        letters = max(int(5.4 * 72 / len(grid.positions) / 4.1), 3)  # how many fit into a cell
        for y, row in enumerate(grid.answers):
            for x, text in enumerate(row):
                ink = _ink_on(image, float(grid.probabilities[y, x]), style)
                axes.text(x, y, shown(text, letters), ha="center", va="center", fontsize=6.5, color=ink)
                if grid.right[y][x]:
                    axes.add_patch(_frame(x, y, style))
        labels = [f"{p}  {shown(t, 14)}" for p, t in zip(grid.positions, grid.tokens, strict=True)]
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
        axes.set_yticks(range(len(grid.depths)), grid.depths)
        axes.set_xlabel("position and token read; framed: the guess is the token that follows")
        axes.set_ylabel("blocks passed")
        _colorbar(figure, image, axes, "probability of the top token")
        return _titled(figure, title)


def attribution(result: Attribution, *, title: str = "", theme: str = "light") -> Figure:
    """Heads by layer as a heat map, and the shares of embedding, attention and feed-forward as bars."""
    layers = len(result.mlp)
    with _drawing(theme) as style:
        figure = _figure(1.2 + min(0.3 * layers, 6))
        left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
        _heads_grid(figure, left, result.heads, "share of the logit", style)
        depth = torch.arange(layers)
        right.barh(depth + 0.19, result.attn.numpy(), 0.36, label="attention", color=style.lines[0])
        right.barh(depth - 0.19, result.mlp.numpy(), 0.36, label="feed-forward", color=style.lines[1])
        right.barh([-1], [float(result.embed)], 0.36, label="embedding", color=style.lines[2])
        right.axvline(0, color=style.muted, linewidth=0.8)
        right.set_ylim(-1.5, layers - 0.5)
        left.set_yticks([-1, *left.get_yticks()], ["embed", *(text.get_text() for text in left.get_yticklabels())])
        right.set_xlabel(f"share of the logit, sum {float(result.total):.2f}")
        right.grid(axis="x")
        _legend_above(right, columns=3)
        return _titled(figure, title)


def patching(
    result: Patching, tokens: Sequence[str] | None = None, *, title: str = "", theme: str = "light"
) -> Figure:
    """The grid of a patching study; `tokens` (of the clean prompt) label the positions."""
    if tokens is not None and result.by == "position":
        if max(result.columns) >= len(tokens):
            raise RequestError(f"there are {len(tokens)} tokens, but position {max(result.columns)} was patched")
        tokens = [tokens[at] for at in result.columns]
    with _drawing(theme) as style:
        figure = _figure((1.7 if tokens else 1.0) + min(0.26 * len(result.names), 7))
        axes = figure.subplots()
        low, high = _around(result.restored, at_least=1)
        image = _heat(axes, result.restored, style, low=low, high=high, signed=True)
        axes.invert_yaxis()
        if tokens is not None and result.by == "position":
            _label_tokens(axes, "x", tokens, 5.2)
            axes.set_xlabel("position patched (token of the clean prompt)")
        else:
            _number_axis(axes, "x", len(result.columns), f"{result.by} patched", result.columns)
        step = math.ceil(len(result.names) / 32)
        axes.set_yticks(range(0, len(result.names), step), [_short_point(name) for name in result.names[::step]])
        if result.restored.numel() <= 160:
            _write_values(axes, image, result.restored, style)
        _colorbar(figure, image, axes, "restored: 0 corrupted, 1 clean")
        return _titled(figure, title)


def norms(profile: Profile, *, title: str = "", theme: str = "light") -> Figure:
    """Norms of residual stream, attention and feed-forward by depth, and the largest activations beside the median."""
    layers = len(profile.attn_norm)
    with _drawing(theme) as style:
        figure = _figure(3.4)
        left, right = figure.subplots(1, 2)
        for values, first, name, color in (
            (profile.resid_norm, 0, "residual stream", style.lines[0]),
            (profile.attn_norm, 1, "attention adds", style.lines[1]),
            (profile.mlp_norm, 1, "feed-forward adds", style.lines[2]),
        ):
            _band(left, range(first, layers + 1), values, name, color)
        left.set_ylabel("norm of a token's vector")
        _band(right, range(layers + 1), profile.resid_max, "largest |x| of a token", style.lines[0])
        right.plot(range(layers + 1), profile.resid_max[:, 0], "--", color=style.lines[3], label="of the first token")
        right.plot(range(layers + 1), profile.resid_median, color=style.muted, label="median |x|")
        right.set_ylabel("activation, residual stream")
        for axes in (left, right):
            axes.set_yscale("log")
            _number_axis(axes, "x", layers + 1, "blocks passed")
            axes.grid(axis="y")
            _legend_above(axes, columns=2)
        return _titled(figure, title)


def _band(axes: Axes, x: Sequence[int], values: Tensor, label: str, color: str) -> None:
    """Median over tokens (depth, T) as a line, smallest to largest as a band."""
    axes.plot(x, values.median(1).values, color=color, label=label)
    axes.fill_between(x, values.min(1).values, values.max(1).values, color=color, alpha=0.2, linewidth=0)


# ------------------------------------------------------------------------------------------------- mixture of experts


def router_load(routing: Routing, *, title: str = "", theme: str = "light") -> Figure:
    """Each expert's share of the choices, as a multiple of the even share 1/E, and how many experts that amounts to."""
    relative = routing.load * routing.load.shape[-1]  # (L, E), 1 = even
    with _drawing(theme) as style:
        figure = _figure(1.0 + min(0.3 * len(relative), 6))
        axes = figure.subplots()
        reach = float((relative - 1).abs().max()) or 1.0
        image = _heat(axes, relative, style, low=1 - reach, high=1 + reach, signed=True)
        axes.invert_yaxis()
        _number_axis(axes, "x", relative.shape[1], "expert")
        labels = [f"{layer}  ({n:.1f})" for layer, n in zip(routing.layers, routing.effective.tolist(), strict=True)]
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylabel("layer (effective experts)")
        if relative.numel() <= 160:
            _write_values(axes, image, relative, style)
        bar = _colorbar(figure, image, axes, "load, 1 = even share")
        bar.ax.set_ylim(max(1 - reach, 0), 1 + reach)  # a load below zero does not exist
        return _titled(figure, title)


def experts_by_token(routing: Routing, layer: int, tokens: Sequence[str], *, title: str = "", theme: str = "light") -> Figure:
    """Which experts a layer mixes for each token, and with what weight."""
    weights = routing.by_token(layer)  # (E, T)
    _same_length(tokens, weights.shape[1])
    with _drawing(theme) as style:
        figure = _figure(1.6 + min(0.2 * len(weights), 6))
        axes = figure.subplots()
        image = _heat(axes, weights, style, low=0, high=1)
        _label_tokens(axes, "x", tokens, 5.6)
        _number_axis(axes, "y", len(weights), f"expert of layer {layer}")
        _colorbar(figure, image, axes, "weight in the mixture")
        return _titled(figure, title)


def coactivation(routing: Routing, layer: int, *, title: str = "", theme: str = "light") -> Figure:
    """Which pairs of experts a layer chooses together: the share of its tokens that go to both."""
    routing.by_token(layer)  # refuses a layer without a router
    together = routing.coactivation[routing.layers.index(layer)].clone().fill_diagonal_(math.nan)
    with _drawing(theme) as style:
        figure = _figure(4.2, width=5)
        axes = figure.subplots()
        image = _heat(axes, together, style, low=0, square=True)
        _number_axis(axes, "x", len(together), f"expert of layer {layer}")
        _number_axis(axes, "y", len(together), f"expert of layer {layer}")
        _colorbar(figure, image, axes, "share of tokens that choose both")
        return _titled(figure, title)


# ------------------------------------------------------------------------------------------------- verify


@dataclass(frozen=True)
class ErrorCurve:
    """The compared outputs in order, and where each layer begins."""

    names: list[str]
    errors: list[float]  # relative L2
    allowed: list[float]
    ok: list[bool]
    starts: list[tuple[int, str]]  # (index of a layer's first output, its number); "in" and "out" around the layers
    residual: list[int]  # indices of the outputs of whole blocks

    @property
    def first_difference(self) -> str | None:
        return next((name for name, ok in zip(self.names, self.ok, strict=True) if not ok), None)


def error_curve(rows: Sequence[Any]) -> ErrorCurve:
    """Rows of a verify report (name, relative_l2, allowed, ok), in the order of computation."""
    if not rows:
        raise RequestError("there are no compared outputs to draw")
    starts: list[tuple[int, str]] = []
    for i, row in enumerate(rows):
        layer = re.search(r"(?:layers|blocks)\.(\d+)", row.name)
        label = layer[1] if layer else "out" if any(name.isdigit() for _, name in starts) else "in"
        if not starts or starts[-1][1] != label:
            starts.append((i, label))
    return ErrorCurve(
        names=[row.name for row in rows],
        errors=[float(row.relative_l2) for row in rows],
        allowed=[float(row.allowed) for row in rows],
        ok=[bool(row.ok) for row in rows],
        starts=starts,
        residual=[i for i, row in enumerate(rows) if re.search(r"layers\.\d+$|hook_resid_post$", row.name)],
    )


def error_by_depth(rows: Sequence[Any], *, title: str = "", theme: str = "light") -> Figure:
    """Relative L2 of every compared output in order of depth, with the bound it is held to: the rows of a verify report."""
    curve = error_curve(rows)
    finite = [value for value in (*curve.errors, *curve.allowed) if 0 < value < math.inf] or [1e-16]
    zero, top = min(finite) / 10, max(finite) * 10  # where 0 and NaN are drawn on a logarithmic axis
    drawn = [top if not math.isfinite(error) else max(error, zero) for error in curve.errors]
    bounds = [max(bound, zero) for bound in curve.allowed]
    with _drawing(theme) as style:
        figure = _figure(3.4)
        axes = figure.subplots()
        axes.set_yscale("log")
        axes.set_ylim(min(drawn + bounds) / 5, max(drawn + bounds) * 2)
        places = range(len(drawn))
        good = [i for i in places if curve.ok[i]]
        wrong = [i for i in places if not curve.ok[i]]
        axes.plot(places, bounds, "--", color=style.muted, linewidth=1, label="allowed")
        axes.plot(curve.residual, [drawn[i] for i in curve.residual], color=style.lines[0], label="block outputs")
        axes.plot(good, [drawn[i] for i in good], "o", markersize=2.5, color=style.lines[0], label="all outputs")
        if wrong:
            axes.plot(wrong, [drawn[i] for i in wrong], "x", markersize=5, color=style.bad, label="differs")
            axes.set_title(f"first difference: {curve.first_difference}", color=style.bad)
        if any(error == 0 for error in curve.errors):
            axes.axhline(zero, color=style.faint, linewidth=1, zorder=0)
            axes.annotate("equal to the last bit", (1, zero), (-3, -4), xycoords=("axes fraction", "data"), ha="right",
                          va="top", textcoords="offset points", color=style.muted, fontsize=7)  # fmt: skip
        step = math.ceil(len(curve.starts) / 24)
        kept = curve.starts[::step]
        axes.set_xticks([i for i, _ in kept], [label for _, label in kept])
        for i, _ in curve.starts:
            axes.axvline(i, color=style.faint, linewidth=0.6, zorder=0)
        axes.set_xlabel("layer, every compared output in order of computation")
        axes.set_ylabel("relative L2 error")
        _legend_above(axes, columns=4, above_title=bool(wrong))
        return _titled(figure, title)


# ------------------------------------------------------------------------------------------------- positions and memory


@dataclass(frozen=True)
class RopeCurve:
    """The rotary frequencies of one config. D/2 pairs."""

    name: str
    wavelength: Tensor  # (D/2,) tokens per full turn, 2 pi / frequency
    context: int  # the config's max_position_embeddings; with YaRN the context it stretches


def rope_curves(configs: Mapping[str, Any]) -> list[RopeCurve]:
    """Wavelengths of several configs (a model's `config`) by name."""
    curves = []
    for name, config in configs.items():
        rope = config.rope
        context = rope.original_context if rope.factor is not None else config.max_position_embeddings
        curves.append(RopeCurve(name, 2 * math.pi / rope.frequencies(config.head_dim), context))
    return curves


def rope_frequencies(configs: Mapping[str, Any], *, title: str = "", theme: str = "light") -> Figure:
    """Wavelength of every rotary pair, plain or YaRN, and the context (dotted): pairs above it never turn fully there."""
    curves = _by_curve((c.name, (tuple(c.wavelength.tolist()), c.context)) for c in rope_curves(_some(configs)))
    with _drawing(theme) as style:
        figure = _figure(3.6)
        axes = figure.subplots()
        axes.set_yscale("log")
        for i, ((wavelength, context), names) in enumerate(curves.items()):
            color = style.lines[i % len(style.lines)]
            dashes = "-" if i < len(style.lines) else "--"
            axes.plot(wavelength, dashes, color=color, label=names)
            axes.axhline(context, color=color, linestyle=":", linewidth=1)
        axes.set_xlabel("pair j: dimensions j and j + D/2 of a head")
        axes.set_ylabel("wavelength, tokens per turn")
        axes.grid(axis="y")
        _legend_above(axes, columns=3)
        return _titled(figure, title)


def kv_bytes(config: Any, contexts: Sequence[int], itemsize: int = 2) -> list[int]:
    """Bytes of keys and values of one sequence at each context length: 2 K D itemsize per layer and token held.

    A sliding layer stops growing at its window. Where blocks of keys are chosen, so is a token's key by which its block is.
    """
    token = (2 * config.num_key_value_heads * config.head_dim + getattr(config, "indexer_head_dim", 0)) * itemsize
    return [token * sum(n if w is None else min(n, w) for w in config.windows) for n in contexts]


def kv_memory(
    configs: Mapping[str, Any],
    contexts: Sequence[int] | None = None,
    *,
    itemsize: int = 2,
    title: str = "",
    theme: str = "light",
) -> Figure:
    """KV memory of one sequence against its length, a line per config. `itemsize` 2 is bf16.

    `contexts`: lengths in tokens; default from 256 to each config's own context.
    """
    longest = max(config.max_position_embeddings for config in _some(configs).values())
    ticks = [1 << power for power in range(8, max(longest.bit_length(), 9))] if contexts is None else list(contexts)
    with _drawing(theme) as style:
        from matplotlib.ticker import EngFormatter, NullLocator

        figure = _figure(3.6)
        axes = figure.subplots()
        curves = []
        for name, config in configs.items():
            end = config.max_position_embeddings
            lengths = [n for n in ticks if n < end] + [end] if contexts is None else ticks
            curves.append((name, (tuple(lengths), tuple(kv_bytes(config, lengths, itemsize)))))
        for i, ((lengths, size), names) in enumerate(_by_curve(curves).items()):
            color, dashes = style.lines[i % len(style.lines)], "-" if i < len(style.lines) else "--"
            axes.plot(lengths, size, dashes, color=color, label=names)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        step = math.ceil(len(ticks) / 12)
        axes.set_xticks(ticks[::step], [_tokens(n) for n in ticks[::step]])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
        axes.set_xlabel("tokens in the context")
        axes.set_ylabel(f"keys and values, {itemsize} bytes each")
        axes.grid()
        _legend_above(axes, columns=3)
        return _titled(figure, title)


def _by_curve(named: Iterable[tuple[str, Any]]) -> dict[Any, str]:
    """Curve -> the names of all that have it: drawn one over the other, only the last would be seen."""
    names: dict[Any, list[str]] = {}
    for name, curve in named:
        names.setdefault(curve, []).append(shown_name(name))
    return {curve: "\n".join(those) for curve, those in names.items()}


# ------------------------------------------------------------------------------------------------- kernels


@dataclass(frozen=True)
class Kernel:
    """A measured kernel, for the roofline."""

    name: str
    intensity: float  # floating point operations per byte of memory traffic
    flops: float  # achieved, per second


def attainable(intensity: float, peak_flops: float, peak_bytes: float) -> float:
    """min(peak_flops, intensity * peak_bytes), operations per second (Williams, Waterman & Patterson 2009)."""
    return min(peak_flops, intensity * peak_bytes)


def roofline(
    kernels: Sequence[Kernel], peak_flops: float, peak_bytes: float, *, title: str = "", theme: str = "light"
) -> Figure:
    """Achieved against attainable operations per second; peaks in FLOP/s and bytes/s."""
    values = [peak_flops, peak_bytes, *(v for kernel in kernels for v in (kernel.intensity, kernel.flops))]
    if not kernels or not all(0 < value < math.inf for value in values):
        raise RequestError("a roofline needs at least one kernel; intensities, speeds and peaks must be positive")
    ridge = peak_flops / peak_bytes
    low = min(ridge, *(kernel.intensity for kernel in kernels)) / 4
    high = max(ridge, *(kernel.intensity for kernel in kernels)) * 4
    with _drawing(theme) as style:
        from matplotlib.ticker import EngFormatter

        figure = _figure(3.8)
        axes = figure.subplots()
        axes.loglog([low, ridge, high], [low * peak_bytes, peak_flops, peak_flops], color=style.ink, linewidth=1.5)
        axes.axvline(ridge, color=style.muted, linestyle=":", linewidth=1)
        for i, kernel in enumerate(kernels):
            share = kernel.flops / attainable(kernel.intensity, peak_flops, peak_bytes)
            marker = "osD^vP*X"[i // len(style.lines) % 8]
            axes.plot([kernel.intensity], [kernel.flops], marker, markersize=6, color=style.lines[i % len(style.lines)],
                      label=f"{shown_name(kernel.name)}: {share:.0%}")  # fmt: skip
        axes.set_xlim(low, high)
        axes.yaxis.set_major_formatter(EngFormatter(unit="FLOP/s"))
        axes.set_xlabel(f"operations per byte; {ridge:.3g} (dotted) meets both limits")
        axes.set_ylabel("achieved")
        axes.grid()
        axes.legend(loc="lower right", title="share of attainable", title_fontsize=7, frameon=True, framealpha=0.9,
                    facecolor=style.background, edgecolor="none")  # fmt: skip
        return _titled(figure, title)


# ------------------------------------------------------------------------------------------------- how it is drawn


def _matplotlib() -> Any:
    """The package. RequestError if it is not installed."""
    try:
        import matplotlib.font_manager
    except ImportError as error:
        raise RequestError('figures need matplotlib, which is not installed: pip install "qwen-ref[plots]"') from error
    return matplotlib


@contextmanager
def _drawing(theme: str) -> Iterator[Theme]:
    """The theme's colours and fonts as matplotlib's settings, for what is made inside; restored after."""
    if theme not in THEMES:
        raise RequestError(f"theme is {theme!r}; there are {', '.join(THEMES)}")
    matplotlib = _matplotlib()
    style = THEMES[theme]
    settings: Any = {
        "font.family": list(_installed_fonts()), "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8,
        "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7, "legend.frameon": False,
        "figure.facecolor": style.background, "axes.facecolor": style.background, "savefig.facecolor": "auto",
        "text.color": style.ink, "axes.labelcolor": style.ink, "axes.edgecolor": style.muted, "axes.linewidth": 0.6,
        "xtick.color": style.muted, "ytick.color": style.muted, "xtick.labelcolor": style.ink, "ytick.labelcolor": style.ink,
        "grid.color": style.faint, "grid.linewidth": 0.6, "axes.axisbelow": True, "image.interpolation": "nearest",
        "text.usetex": False, "axes.unicode_minus": True,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield style


def _figure(height: float, width: float = WIDTH) -> Any:
    # lower than 2.2 inches the labels of the axes and the colour bar have no room
    return _figure_class()(figsize=(width, max(height, 2.2)), dpi=100, layout="constrained")


@cache
def _figure_class() -> Any:
    from matplotlib import rc_context, rcParams
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """A Figure that a notebook shows without pyplot, and that keeps its theme when matplotlib adds ticks late."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self._settings = {name: rcParams[name] for name in rcParams if name.startswith(("xtick", "ytick", "grid", "font"))}

        def draw(self, renderer: Any) -> None:
            with rc_context(self._settings):
                super().draw(renderer)

        def _repr_png_(self) -> bytes:
            from io import BytesIO

            buffer = BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    return NotebookFigure


def _heat(
    axes: Axes, values: Tensor, style: Theme, *, low: float | None = None, high: float | None = None, signed: bool = False,
    square: bool = False,
) -> Any:  # fmt: skip
    """A matrix as colours, row 0 on top; NaN is drawn as a cell that holds nothing."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("qwen_ref", style.diverging if signed else style.sequential)
    return axes.imshow(values.detach().float().cpu().numpy(), cmap=colors.with_extremes(bad=style.faint), vmin=low, vmax=high,
                       aspect="equal" if square else "auto")  # fmt: skip


def _around(values: Tensor, at_least: float = 0.0) -> tuple[float, float]:
    """Limits of a signed colour scale: zero in the middle."""
    finite = values[values.isfinite()].abs()
    reach = max(float(finite.max()) if finite.numel() else 0.0, at_least) or 1.0
    return -reach, reach


def _colorbar(figure: Figure, image: Any, axes: Any, label: str) -> Any:
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05, aspect=30)
    bar.set_label(label, fontsize=7)
    bar.outline.set_visible(False)
    return bar


def _ink_on(image: Any, value: float, style: Theme) -> str:
    """The text colour that can be read on the colour of a value."""
    red, green, blue, _ = image.cmap(image.norm(value))
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
    return "#111418" if bright else "#f4f6f8"


def _write_values(axes: Axes, image: Any, values: Tensor, style: Theme) -> None:
    digits = 1 if float(values.abs().max()) >= 10 else 2
    for y, row in enumerate(values.tolist()):
        for x, value in enumerate(row):
            text = f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")  # + 0.0: no "-0.00"
            axes.text(x, y, text, ha="center", va="center", fontsize=6, color=_ink_on(image, value, style))


def _frame(x: int, y: int, style: Theme) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, edgecolor=style.lines[1], linewidth=1.2)


def _label_tokens(axes: Axes, axis: str, tokens: Sequence[str], inches: float) -> None:
    """Tokens along an axis of this length; every second, third, ... where they would overlap."""
    step = math.ceil(len(tokens) * 6.4 / (inches * 72))
    places, labels = range(0, len(tokens), step), [shown(token, 14) for token in tokens[::step]]
    if axis == "x":
        axes.set_xticks(places, labels, rotation=90, fontsize=6.5)
    else:
        axes.set_yticks(places, labels, fontsize=6.5)


def _number_axis(axes: Axes, axis: str, count: int, label: str, names: Sequence[int] | None = None) -> None:
    step = math.ceil(count / 24)
    places = range(0, count, step)
    ticks = [str(names[i] if names is not None else i) for i in places]
    if axis == "x":
        axes.set_xticks(places, ticks)
        axes.set_xlabel(label)
    else:
        axes.set_yticks(places, ticks)
        axes.set_ylabel(label)


def _legend_above(axes: Axes, columns: int, above_title: bool = False) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.07 if above_title else 1.0), ncols=columns,
                borderaxespad=0.3, columnspacing=1.2, handlelength=1.5)  # fmt: skip


def _titled(figure: Any, title: str) -> Figure:
    if title:
        figure.suptitle(shown_name(title), fontsize=9)
    return figure


def shown_name(text: str) -> str:
    """A title or name: as it is, but what no font can draw escaped, and no mathematics."""
    return "".join(c if c in " \n" else _shown_character(c) for c in text).replace("$", r"\$")


def _short_point(name: str) -> str:
    """blocks.3.attn.hook_z -> 3 attn.z"""
    return re.sub(r"^blocks\.(\d+)\.", r"\1  ", name).replace("hook_", "")


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


def _same_length(tokens: Sequence[str], count: int) -> None:
    if len(tokens) != count:
        raise RequestError(f"there are {len(tokens)} token labels for {count} tokens")


def _some(configs: Mapping[str, Any]) -> Mapping[str, Any]:
    if not configs:
        raise RequestError("there is no config to draw")
    return configs
