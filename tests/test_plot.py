"""Figures: the numbers behind them against closed forms, and what they hold (labels, values, colours' meaning), not pixels."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch
from conftest import TINY, make_pair

from qwen_ref import plot
from qwen_ref.cache import KVCache
from qwen_ref.errors import RequestError
from qwen_ref.models import qwen2, qwen3
from qwen_ref.study.attribution import Attribution
from qwen_ref.study.logit_lens import Lens
from qwen_ref.study.patching import Patching
from qwen_ref.study.profiles import profile
from qwen_ref.study.routing import Routing, route

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed: extra `plots`")
import itertools  # noqa: E402

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402

# spaces, line ends, mathematics, Chinese, an emoji beyond 16 bits, half a character, control, empty, very long
ODD = ["Once", " upon", "\n", "\t", " $5", "$", "床前", "🌙", "\\xe5", "\x00", "", " antidisestablishmentarianism"]


class Tokenizer:
    """Token i is ODD[i]."""

    def token_bytes(self, id: int) -> bytes:
        return b"\xe5\xba" if id == 8 else ODD[id].encode()


def texts(labels) -> list[str]:
    return [label.get_text() for label in labels]


def values(image) -> torch.Tensor:
    return torch.as_tensor(image.get_array().filled(math.nan), dtype=torch.float32)


# ------------------------------------------------------------------------------------------------- one of each figure


@dataclass(frozen=True)
class Row:
    name: str
    relative_l2: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.relative_l2 <= self.allowed


ROWS = [Row("hook_embed", 0.0, 1e-4)]
ROWS += [Row(f"blocks.{i}.{part}", 2e-7 * (i + 1), 0.0 if "idx" in part and not i else 1e-4)
         for i in range(4) for part in ("attn.hook_q", "mlp.hook_topk_idx", "hook_resid_post")]  # fmt: skip
ROWS[2] = Row("blocks.0.mlp.hook_topk_idx", 0.0, 0.0)
ROWS += [Row("ln_final.hook_out", 9e-7, 1e-4), Row("hook_logits", math.nan, 1e-4)]


def a_pattern(heads: int, tokens: int) -> torch.Tensor:
    scores = torch.randn(heads, tokens, tokens, generator=torch.Generator().manual_seed(1))
    return scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1)


def a_lens() -> Lens:
    generator = torch.Generator().manual_seed(2)
    logprobs = torch.randn(4, 12, 3, generator=generator).log_softmax(-1).sort(-1, descending=True).values
    top = torch.randint(0, 12, (4, 12, 3), generator=generator)
    top[3, :-1, 0] = torch.arange(1, 12)  # the answer is always right
    return Lens(3, (0, 1, 2, 3), torch.arange(12), top, logprobs, torch.zeros(4, 11), torch.zeros(4, 11), torch.zeros(4, 12))


def an_attribution() -> Attribution:
    heads = torch.arange(-8.0, 10).view(3, 6) / 4
    mlp, bias, embed = torch.tensor([0.5, -1.0, 3.0]), torch.zeros(3), torch.tensor(0.25)
    return Attribution(embed, heads, bias, mlp, embed + heads.sum() + mlp.sum())


def a_patching(by: str = "position") -> Patching:
    names = tuple(f"blocks.{i}.attn.hook_z" for i in range(3))
    return Patching(names, (2, 6, 7), by, torch.tensor([[0, 1.5, -0.0], [-3.0, 0.25, 0.5], [1, 1, 1]]), 2.0, -1.0)


def a_routing() -> Routing:
    probs = torch.rand(2, 12, 7, generator=torch.Generator().manual_seed(3)).softmax(-1)
    weights, experts = probs.topk(3)
    return Routing((0, 2), torch.arange(12), probs, experts, weights)


def a_profile():
    model, _ = make_pair(TINY["qwen3"][1])
    return profile(model, torch.arange(12))


def configs():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    slides = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    return {
        "plain $x$": qwen3.Config.from_json(qwen3.TINY),
        "YaRN, 床": qwen3.Config.from_json({**qwen3.TINY, "rope_scaling": yarn}),
        "slides": qwen2.Config.from_json({**qwen2.TINY, **slides}),
    }


KERNELS = [plot.Kernel("rms_norm", 0.5, 1e12), plot.Kernel("matmul", 1000, 6e14), plot.Kernel("a$b$c", 200, 1e14)]

FIGURES = {
    "attention": lambda t: plot.attention(a_pattern(8, 12), ODD, title="layer 3: 床 $x$", theme=t),
    "attention of 40 tokens": lambda t: plot.attention(a_pattern(2, 40), [" word"] * 40, theme=t),
    "attention of one head": lambda t: plot.attention(a_pattern(3, 12), ODD, heads=[1], theme=t),
    "logit_lens": lambda t: plot.logit_lens(a_lens(), Tokenizer(), title="lens", theme=t),
    "attribution": lambda t: plot.attribution(an_attribution(), title="shares", theme=t),
    "patching": lambda t: plot.patching(a_patching(), ODD, title="patching", theme=t),
    "patching by head": lambda t: plot.patching(a_patching("head"), theme=t),
    "layers_by_heads": lambda t: plot.layers_by_heads(torch.rand(28, 16), "score", theme=t),
    "error_by_depth": lambda t: plot.error_by_depth(ROWS, title="verify", theme=t),
    "norms": lambda t: plot.norms(a_profile(), title="norms", theme=t),
    "router_load": lambda t: plot.router_load(a_routing(), theme=t),
    "experts_by_token": lambda t: plot.experts_by_token(a_routing(), 2, ODD, theme=t),
    "coactivation": lambda t: plot.coactivation(a_routing(), 2, theme=t),
    "rope_frequencies": lambda t: plot.rope_frequencies(configs(), theme=t),
    "kv_memory": lambda t: plot.kv_memory(configs(), theme=t),
    "roofline": lambda t: plot.roofline(KERNELS, 989e12, 4.8e12, theme=t),
}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_readably_in_both_themes(name, theme):
    """No missing glyph, no overlapping tick labels, no text outside, the theme's colours, a notebook's width; no state left."""
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that no font has, a layout that does not fit
        figure = FIGURES[name](theme)
        png = figure._repr_png_()
    assert png.startswith(b"\x89PNG") and dict(matplotlib.rcParams) == before
    assert isinstance(figure, matplotlib.figure.Figure)
    assert 4 < figure.get_figwidth() <= 7.2 and figure.get_figheight() < 12 and figure.dpi == 100
    style = plot.THEMES[theme]
    assert matplotlib.colors.same_color(figure.get_facecolor(), style.background)
    renderer = FigureCanvasAgg(figure).get_renderer()  # of the figure as it was laid out for the picture
    for axes in (axes for axes in figure.axes if axes.get_visible()):
        for axis in (axes.xaxis, axes.yaxis):
            labels = [t.label1 for t in axis.get_major_ticks() if t.label1.get_visible() and t.label1.get_text()]
            assert all(matplotlib.colors.same_color(label.get_color(), style.ink) for label in labels)
            boxes = [label.get_window_extent(renderer) for label in labels]
            boxes = [b for b in boxes if b.width]
            for one, two in itertools.pairwise(boxes):
                assert not one.padded(-0.75).overlaps(two), f"{name}: labels overlap along {axis.axis_name}"
        for text in (t for t in [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label] if t.get_text()):
            box = text.get_window_extent(renderer)
            assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1 and box.y0 >= -1 and box.y1 <= figure.bbox.height + 1, text
        if axes.get_legend():
            assert axes.get_legend().get_window_extent(renderer).x1 <= figure.bbox.width


def test_light_and_dark_differ_in_colours_only():
    light, dark = (FIGURES["router_load"](theme) for theme in ("light", "dark"))
    assert torch.equal(values(light.axes[0].images[0]), values(dark.axes[0].images[0]))
    assert texts(light.axes[0].get_yticklabels()) == texts(dark.axes[0].get_yticklabels())
    with pytest.raises(RequestError, match="'blue'; there are light, dark"):
        FIGURES["router_load"]("blue")


def test_pyplot_is_never_imported_and_matplotlib_only_to_draw():
    code = (
        "import sys, torch; from qwen_ref import plot; assert 'matplotlib' not in sys.modules;"
        "figure = plot.layers_by_heads(torch.rand(2, 3), 'x'); figure._repr_png_();"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot._glyphs.cache_clear()  # as in a process that has not drawn yet
    for draw in FIGURES.values():
        with pytest.raises(RequestError, match=r'pip install "qwen-ref\[plots\]"'):
            draw("light")


# ------------------------------------------------------------------------------------------------- text


def test_tokens_are_shown_with_their_spaces(monkeypatch):
    monkeypatch.setattr(plot, "_glyphs", lambda: frozenset(range(32, 0x3000)))  # as on a machine without Chinese fonts
    assert [plot.shown(text) for text in ODD[:11]] == [
        "Once", "␣upon", "↵", "⇥", "␣\\$5", "\\$", "\\u5e8a\\u524d", "\\U0001f319", "\\xe5", "\\x00", "",
    ]  # fmt: skip
    monkeypatch.setattr(plot, "_glyphs", lambda: frozenset(range(32, 0xA000)))
    assert plot.shown("床前 明") == "床前␣明"
    assert plot.shown_name("KV 床 $") == "KV 床 \\$"  # titles keep their spaces


def test_the_installed_fonts_decide():
    from matplotlib import font_manager

    for character in "床é→":
        drawn = any(ord(character) in font_manager.get_font(font_manager.findfont(name)).get_charmap()
                    for name in plot._installed_fonts())  # fmt: skip
        assert plot.shown(character) == (character if drawn else f"\\u{ord(character):04x}")
    assert plot._installed_fonts()[0] == "DejaVu Sans" and ord("␣") in plot._glyphs() and ord("↵") in plot._glyphs()


def test_long_tokens_are_cut_between_characters(monkeypatch):
    monkeypatch.setattr(plot, "_glyphs", lambda: frozenset(range(32, 0x3000)))
    assert plot.shown(" antidisestablishment", 8) == "␣antidi…" and plot.shown(" antidi", 7) == "␣antidi"
    assert plot.shown("床前明", 9) == "\\u5e8a…"  # never half an escape
    assert plot.shown("\\ue5", 1) == "…" or len(plot.shown("\\ue5", 1)) <= 2


def test_token_labels_write_out_bytes_that_are_no_character():
    assert plot.token_labels(Tokenizer(), torch.tensor([1, 8, 6])) == [" upon", "\\xe5\\xba", "床前"]


# ------------------------------------------------------------------------------------------------- studies


def test_attention_shows_the_pattern_and_hides_the_future():
    pattern = a_pattern(8, 12)
    figure = plot.attention(pattern, ODD, heads=[5, 2])
    panels = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["head 5", "head 2"]
    for axes, head in zip(panels, (5, 2), strict=True):
        shown = values(axes.images[0])
        seen = torch.ones(12, 12).tril().bool()
        assert torch.equal(shown[seen], pattern[head][seen]) and shown[~seen].isnan().all()
        assert axes.images[0].get_clim() == (0, 1)
    assert texts(panels[0].get_yticklabels()) == texts(panels[0].get_xticklabels()) == [plot.shown(t, 14) for t in ODD]
    assert len([axes for axes in plot.attention(a_pattern(40, 4), ODD[:4]).axes if axes.get_title()]) == 16
    for call, message in (
        (lambda: plot.attention(pattern, ODD[:-1]), "11 token labels for 12 tokens"),
        (lambda: plot.attention(pattern[None], ODD), "one layer"),
        (lambda: plot.attention(pattern, ODD, heads=[8]), "heads 0..7"),
        (lambda: plot.attention(pattern, ODD, heads=[]), "heads is"),
    ):
        with pytest.raises(RequestError, match=message):
            call()


def test_logit_lens_cells():
    lens = a_lens()
    grid = plot.lens_grid(lens, Tokenizer(), [0, 3, -1])
    assert grid.positions == [0, 3, 11] and grid.tokens == ["Once", "\t", ODD[11]]
    assert grid.depths == ["embed", "1", "2", "3 = answer"]
    assert grid.answers[3][:2] == [" upon", " $5"] and grid.right[3] == [True, True, False]  # nothing follows the last
    torch.testing.assert_close(grid.probabilities, lens.top_logprobs[:, [0, 3, 11], 0].exp())
    figure = plot.logit_lens(lens, Tokenizer(), positions=[0, 3, -1])
    axes = figure.axes[0]
    torch.testing.assert_close(values(axes.images[0]), grid.probabilities)
    assert [t.get_text() for t in axes.texts[9:11]] == ["␣upon", "␣\\$5"] and len(axes.texts) == 12
    frames = {(round(p.get_x() + 0.46), round(p.get_y() + 0.44)) for p in axes.patches}
    assert frames == {(x, y) for y, row in enumerate(grid.right) for x, right in enumerate(row) if right}
    assert texts(axes.get_yticklabels()) == grid.depths and axes.get_ylim()[0] < axes.get_ylim()[1]  # depth grows upwards
    with pytest.raises(RequestError, match="12 tokens"):
        plot.logit_lens(lens, Tokenizer(), positions=[12])


def test_attribution_shows_every_share():
    result = an_attribution()
    figure = plot.attribution(result)
    left, right = figure.axes[:2]
    assert torch.equal(values(left.images[0]), result.heads)
    low, high = left.images[0].get_clim()
    assert -low == high == 2.25  # zero is the middle of the colours
    bars = [round(bar.get_width(), 4) for container in right.containers for bar in container]
    assert bars == pytest.approx([*result.attn.tolist(), *result.mlp.tolist(), 0.25])
    assert f"{float(result.total):.2f}" in right.get_xlabel()
    assert texts(left.get_yticklabels()) == ["embed", "0", "1", "2"]


def test_patching_grid():
    result = a_patching()
    axes = plot.patching(result, ODD).axes[0]
    assert torch.equal(values(axes.images[0]), result.restored) and axes.images[0].get_clim() == (-3, 3)
    assert texts(axes.get_xticklabels()) == ["↵", plot.shown("床前"), plot.shown("🌙")]  # positions 2, 6, 7
    assert texts(axes.get_yticklabels()) == ["0  attn.z", "1  attn.z", "2  attn.z"]
    assert texts(axes.texts)[:4] == ["0.00", "1.50", "0.00", "−3.00"]
    by_head = plot.patching(a_patching("head"), ODD).axes[0]
    assert texts(by_head.get_xticklabels()) == ["2", "6", "7"] and "head" in by_head.get_xlabel()
    small = Patching(result.names, result.columns, "position", result.restored / 10, 1, 0)
    assert plot.patching(small).axes[0].images[0].get_clim() == (-1, 1)  # 1 = clean is always on the scale
    with pytest.raises(RequestError, match="position 7"):
        plot.patching(result, ODD[:7])


def test_layers_by_heads():
    scores = torch.tensor([[0.1, 0.9], [0.25, 0.5], [0, 1]])
    axes = plot.layers_by_heads(scores, "share").axes[0]
    assert torch.equal(values(axes.images[0]), scores) and axes.images[0].get_clim() == (0, 1)
    assert texts(axes.texts) == ["0.10", "0.90", "0.25", "0.50", "0.00", "1.00"]
    low, high = plot.layers_by_heads(scores - 0.5, "share").axes[0].images[0].get_clim()
    assert (low, high) == (-0.5, 0.5)
    with pytest.raises(RequestError, match="layers, heads"):
        plot.layers_by_heads(scores[0], "share")


def test_norms_draw_the_median_and_the_range():
    result = a_profile()
    left, right = plot.norms(result).axes
    lines = {line.get_label(): line for line in (*left.lines, *right.lines)}
    assert lines["residual stream"].get_ydata().tolist() == result.resid_norm.median(1).values.tolist()
    assert lines["attention adds"].get_xdata().tolist() == [1, 2, 3]
    assert lines["feed-forward adds"].get_ydata().tolist() == result.mlp_norm.median(1).values.tolist()
    assert lines["of the first token"].get_ydata().tolist() == result.resid_max[:, 0].tolist()
    assert lines["median |x|"].get_ydata().tolist() == result.resid_median.tolist()
    band = left.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx(tuple(map(float, result.resid_norm.aminmax())), rel=1e-6)
    assert left.get_yscale() == right.get_yscale() == "log"


# ------------------------------------------------------------------------------------------------- experts


def test_router_figures():
    routing = a_routing()
    axes = plot.router_load(routing).axes[0]
    torch.testing.assert_close(values(axes.images[0]), routing.load * 7)
    low, high = axes.images[0].get_clim()
    assert (low + high) / 2 == pytest.approx(1)  # even is the middle
    assert texts(axes.get_yticklabels()) == [f"{i}  ({n:.1f})" for i, n in zip((0, 2), routing.effective.tolist(), strict=True)]
    axes = plot.experts_by_token(routing, 2, ODD).axes[0]
    shown = values(axes.images[0])
    assert torch.equal(shown, routing.by_token(2)) and shown.shape == (7, 12)
    assert shown[routing.experts[1, 4, 0], 4] == routing.weights[1, 4, 0]
    axes = plot.coactivation(routing, 0).axes[0]
    shown, expected = values(axes.images[0]), routing.coactivation[0]
    off = ~torch.eye(7).bool()
    assert torch.equal(shown[off], expected[off]) and shown.diagonal().isnan().all()
    for draw in (plot.coactivation, lambda r, layer: plot.experts_by_token(r, layer, ODD)):
        with pytest.raises(RequestError, match="layer 1 has no router"):
            draw(routing, 1)
    with pytest.raises(RequestError, match="11 token labels"):
        plot.experts_by_token(routing, 2, ODD[1:])


def test_router_figures_of_many_experts_stay_readable():
    probs = torch.rand(24, 30, 128, generator=torch.Generator().manual_seed(3)).softmax(-1)
    weights, experts = probs.topk(8)
    figure = plot.router_load(Routing(tuple(range(24)), torch.arange(30), probs, experts, weights))
    assert not figure.axes[0].texts and len(figure.axes[0].get_xticks()) <= 24


def test_routing_of_a_model_can_be_drawn():
    model, _ = make_pair(TINY["qwen2_moe"][1])
    figure = plot.experts_by_token(route(model, list(range(12))), 0, ODD)
    assert (values(figure.axes[0].images[0]) > 0).sum() == 36


# ------------------------------------------------------------------------------------------------- verify


def test_error_curve_finds_the_layers_and_the_first_difference():
    curve = plot.error_curve(ROWS)
    assert curve.names == [row.name for row in ROWS] and len(curve.errors) == 15
    assert curve.starts == [(0, "in"), (1, "0"), (4, "1"), (7, "2"), (10, "3"), (13, "out")]
    assert curve.residual == [3, 6, 9, 12]
    assert curve.first_difference == "hook_logits" and curve.ok == [True] * 14 + [False]
    modules = plot.error_curve([Row(n, 0, 1) for n in ("model.embed_tokens", "model.layers.0.mlp", "model.layers.0",
                                                       "model.layers.1", "model.norm", "lm_head")])  # fmt: skip
    assert modules.starts == [(0, "in"), (1, "0"), (3, "1"), (4, "out")] and modules.residual == [2, 3]
    assert modules.first_difference is None
    with pytest.raises(RequestError, match="no compared outputs"):
        plot.error_curve([])


def test_error_by_depth_shows_zero_and_nan_apart():
    axes = plot.error_by_depth(ROWS).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    good, bad = lines["all outputs"], lines["differs"]
    assert good.get_xdata().tolist() == list(range(14)) and bad.get_xdata().tolist() == [14]
    assert good.get_ydata()[1] == ROWS[1].relative_l2 and good.get_ydata()[0] == pytest.approx(2e-8)  # zero: a decade below
    assert bad.get_ydata()[0] == pytest.approx(1e-3)  # NaN: a decade above everything
    assert axes.get_title() == "first difference: hook_logits" and axes.get_yscale() == "log"
    assert "equal to the last bit" in texts(axes.texts)
    assert texts(axes.get_xticklabels()) == ["in", "0", "1", "2", "3", "out"]
    plain = plot.error_by_depth([Row("model.layers.0", 1e-6, 1e-4)]).axes[0]
    assert not plain.texts and not plain.get_title()
    assert plot.error_by_depth([Row("model.layers.0", 0, 0)]).axes[0].lines  # nothing positive at all


# ------------------------------------------------------------------------------------------------- positions and memory


def test_rope_wavelengths_closed_form():
    plain, stretched, _ = plot.rope_curves(configs())
    pairs = torch.arange(10, dtype=torch.float64)
    expected = 2 * math.pi * 10000 ** (2 * pairs / 20)
    torch.testing.assert_close(plain.wavelength.double(), expected, rtol=1e-6, atol=0)
    assert (plain.context, stretched.context) == (512, 128)
    ratio = stretched.wavelength / plain.wavelength
    assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(4) and (ratio.diff() >= -1e-6).all()
    axes = plot.rope_frequencies(configs()).axes[0]
    curves = [line for line in axes.lines if len(line.get_xdata()) == 10]
    assert curves[0].get_ydata().tolist() == plain.wavelength.tolist()
    assert sorted(line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":") == [128, 512, 512]
    with pytest.raises(RequestError, match="no config"):
        plot.rope_frequencies({})


def test_kv_bytes_closed_form():
    plain, _, slides = configs().values()
    assert plot.kv_bytes(plain, [1, 100]) == [2 * 3 * 2 * 20 * 2, 100 * 2 * 3 * 2 * 20 * 2]  # k and v, L, K, D, bf16
    assert plot.kv_bytes(plain, [7], itemsize=4) == [7 * 960]
    token = 2 * 2 * 16 * 2  # one layer
    assert plot.kv_bytes(slides, [64, 65, 512]) == [token * 3 * 64, token * (65 + 2 * 64), token * (512 + 2 * 64)]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_5", "qwen4_exp"])
def test_kv_bytes_is_what_a_cache_holds(kind):
    model, _ = make_pair(TINY[kind][1])
    cache = model.make_cache()
    with torch.no_grad():
        model(torch.arange(64)[None], cache=cache)  # 64 tokens fill the buffers exactly
    held = sum(layer.nbytes() for layer in cache.layers if isinstance(layer, KVCache))
    assert plot.kv_bytes(model.config, [64], itemsize=4) == [held]


def test_kv_bytes_of_an_official_config(data):
    config = qwen3.Config.from_json(json.loads((data / "configs" / "config-Qwen3-0.6B.json").read_text()))
    assert plot.kv_bytes(config, [1]) == [2 * 28 * 8 * 128 * 2]


def test_kv_memory_lines():
    axes = plot.kv_memory(configs()).axes[0]
    line = axes.lines[0]
    assert line.get_xdata()[-1] == 512 and line.get_ydata()[-1] == 512 * 480
    chosen = plot.kv_memory(configs(), [1024, 4096, 1 << 20]).axes[0]
    assert texts(chosen.get_xticklabels()) == ["1k", "4k", "1024k"]
    assert chosen.lines[0].get_ydata().tolist() == [n * 480 for n in (1024, 4096, 1 << 20)]
    assert chosen.yaxis.get_major_formatter()(2.5e9) == "2.5 GB"
    twice = plot.kv_memory({**configs(), "the first again": next(iter(configs().values()))}).axes[0]
    assert len(twice.lines) == len(axes.lines)  # one line for equal curves, under all their names
    assert any("\nthe first again" in text for text in texts(twice.get_legend().get_texts()))
    with pytest.raises(RequestError, match="no config"):
        plot.kv_memory({})


# ------------------------------------------------------------------------------------------------- roofline


def test_roofline():
    assert plot.attainable(0.5, 989e12, 4.8e12) == 2.4e12 and plot.attainable(1000, 989e12, 4.8e12) == 989e12
    axes = plot.roofline(KERNELS, 989e12, 4.8e12).axes[0]
    roof = axes.lines[0]
    assert roof.get_xdata()[1] == pytest.approx(989 / 4.8) and roof.get_ydata()[1:].tolist() == [989e12, 989e12]
    assert roof.get_ydata()[0] == pytest.approx(roof.get_xdata()[0] * 4.8e12)
    labels = texts(axes.get_legend().get_texts())
    assert labels == ["rms_norm: 42%", "matmul: 61%", "a\\$b\\$c: 10%"]
    assert [(p.get_xdata()[0], p.get_ydata()[0]) for p in axes.lines[2:]] == [(k.intensity, k.flops) for k in KERNELS]
    for kernels, peak in (([], 1.0), (KERNELS, 0.0), ([plot.Kernel("x", math.nan, 1.0)], 1.0), ([plot.Kernel("x", 1, -1)], 1.0)):
        with pytest.raises(RequestError, match="must be positive"):
            plot.roofline(kernels, peak, 1.0)


def test_a_colour_scale_passes_over_what_is_no_number():
    assert plot._around(torch.tensor([0.2, -0.8, float("nan"), float("inf")])) == pytest.approx((-0.8, 0.8))
    assert plot._around(torch.tensor([float("nan")])) == (-1.0, 1.0)


def test_the_answer_of_a_lens_is_the_models_last_block():
    class Words:
        def token_bytes(self, id: int) -> bytes:
            return b"w"

    depths = [plot.lens_grid(dataclasses.replace(a_lens(), blocks=blocks), Words()).depths for blocks in (3, 8)]
    assert depths == [["embed", "1", "2", "3 = answer"], ["embed", "1", "2", "3"]]
