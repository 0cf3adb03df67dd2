"""L1: the implementation of each operation that was chosen, against the formula of `ops` in fp64, at the model's own sizes.

The operations of `ARGUMENTS` are those a model's forward may call. What only an engine calls (paged attention, sampling)
is not part of any model; `qwen-ref kernels check` tests it.

Arguments are random, rounded to the dtype under test, and then widened for the fp64 run: what is measured is what the
operation loses, not what its arguments have lost before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backend, ops
from ..models.common import LanguageModel
from ..quant import packed
from ..quant.layers import LINEAR, MOE, PackedExperts, PackedLinear
from ..quant.packed import rows
from .report import Check

SEEDS = 5
TOKENS = (1, 7, 33)  # one decode step, and counts no block size divides
MAGNITUDES = (1.0, 30.0)  # 30: products of two stay inside fp16
_EXPERT_ELEMENTS = 1 << 23  # of the expert weights made up here: 64 MB in fp64; larger models are given two experts
_COLUMNS = 256  # of a projection at most: each is a sum of its own

Rand = Callable[..., Tensor]

# What the formula itself may lose, in units of eps: every rounding costs at most eps/2 of its result, and errors of one
# row are independent, so that relative L2 stays below their plain sum. `_growing_error` adds what grows with the arguments.
ULPS = {
    "linear": 2,  # the sum and its rounding
    "rms_norm": 2,  # two roundings (normed, weighted) and an fp32 mean
    "add_rms_norm": 3,  # one more, of the sum
    "zero_centred_rms_norm": 2,  # one rounding, and an fp32 mean
    "gated_rms_norm": 4,  # those of rms_norm, and the product
    "causal_conv1d": 4,  # the sum and its rounding, silu and its
    "gated_delta_rule": 4,  # the output's, and decays multiplied up
    "rope": 2,  # two products, one sum
    "swiglu": 4,  # exp, quotient and product
    "attention": 4,  # two dot products, and the probabilities' rounding
    "dual_chunk_attention": 5,  # one more, of the scaled key
    "block_scores": 4,  # a product and a sum over heads, in at least fp32
    "sparse_block_attention": 4,  # those of attention
    "stream_mix": 4,  # sigmoid, product and mean
    "stream_write": 6,  # quotient, sigmoid, two products and a sum
    "router_topk": 4,  # exp, sum, two quotients
    "moe_experts": 6,  # two matrix products, swiglu, weight, and the sum over experts
}
PACKED = {op.name for op in (*LINEAR.values(), *MOE.values())}
ULPS |= dict.fromkeys((op.name for op in LINEAR.values()), 3)  # one more, of the weight
ULPS |= dict.fromkeys((op.name for op in MOE.values()), 8)


def check(config: Any, dtype: torch.dtype, device: torch.device, seed: int,
          model: LanguageModel | None = None) -> Iterator[Check]:  # fmt: skip
    """One check per operation and kind of argument, over all `TOKENS` and `SEEDS`. The active backend choice is what runs.

    Of a quantised `model`, also the products with the layouts it has, on its own first matrix of each.

    The formula itself is held, at its worst, to what its roundings explain. Another implementation may lose twice what
    the formula loses in the same dtype; both as root mean square, since single errors of few numbers scatter.
    """
    for name, kinds in {**ARGUMENTS, **(_packed_arguments(model) if model is not None else {})}.items():
        chosen = backend.OPERATIONS[name].resolve(device, dtype).name
        for label, make in kinds.items():
            if not _applies(name, label, config):
                continue
            for magnitude in MAGNITUDES:
                what = f"{name}[{chosen}] {label + ', ' if label else ''}arguments around {magnitude:g}"
                cases = [(t, s) for t in TOKENS for s in range(seed, seed + SEEDS)]
                found = [_measure(name, make(config, t, _random(dtype, device, s, magnitude))) for t, s in cases]
                yield _judge(what, chosen == "eager" or dtype == torch.float64, found, cases, torch.finfo(dtype).eps)


@dataclass(frozen=True)
class _Measured:
    error: float  # relative L2 against fp64
    formula: float  # what the formula itself loses on the same arguments
    roundings: float  # what its roundings explain
    note: str = ""  # why the error is infinite

    @property
    def strain(self) -> float:
        return math.inf if math.isnan(self.error) else self.error / self.roundings


def _judge(what: str, eager: bool, found: list[_Measured], cases: list[tuple[int, int]], eps: float) -> Check:
    worst, (tokens, seed) = max(zip(found, cases, strict=True), key=lambda pair: pair[0].strain)
    detail = f"worst at T={tokens}, seed {seed}"
    if worst.note:
        return Check("L1", what, math.inf, 0.0, f"{worst.note}, at T={tokens}, seed {seed}")
    if eager:  # in fp64 the formula is its own oracle and loses nothing that could be doubled
        return Check("L1", what, worst.error, worst.roundings, detail)
    error, formula = (math.sqrt(sum(e * e for e in side) / len(found)) for side in
                      ([m.error for m in found], [m.formula for m in found]))
    return Check("L1", what, error, 2 * max(formula, eps / 2), detail)  # never less than one rounding


def _measure(name: str, args: tuple[Any, ...]) -> _Measured:
    formula = getattr(packed if name in PACKED else ops, name)
    wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    exact, eps = formula(*wide), torch.finfo(args[0].dtype).eps
    own, roundings = _relative(name, formula(*args), exact, wide), ULPS[name] * eps + _growing_error(name, wide, eps)
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    try:
        error, note = _relative(name, backend.OPERATIONS[name](*args), exact, wide), ""
    except (RuntimeError, IndexError) as problem:
        return _Measured(math.inf, own, roundings, f"{type(problem).__name__}: {str(problem).splitlines()[0]:.100}")
    if any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(args, before, strict=True)):
        error, note = math.inf, "changes its arguments"
    elif error == math.inf:
        note = "another shape, or infinity"
    return _Measured(error, own, roundings, note)


def _growing_error(name: str, wide: tuple[Any, ...], eps: float) -> float:
    """What grows with the arguments. A probability's relative error is its score's absolute one, |score| eps, where the
    scores are rounded; the rounding of a sum of n terms of either sign grows as sqrt(n) in the dtype that accumulates."""
    wider = min(eps, torch.finfo(torch.float32).eps)  # half precision accumulates in fp32
    if name in ("linear", "moe_experts") or name in PACKED:
        return wider * math.sqrt(wide[0].shape[-1]) / 4
    if name == "gated_delta_rule":  # a read sums over Dk, and what it gets wrong is written back, T times
        return wider * math.sqrt(wide[0].shape[-1] * wide[0].shape[1]) / 4
    scores_of: dict[str, Callable[..., Tensor]] = {
        "attention": ops.attention_scores, "dual_chunk_attention": ops.dual_chunk_scores,
        "sparse_block_attention": ops.sparse_block_scores,
    }  # fmt: skip
    if name in scores_of:
        q, k, _, *seen = wide
        scores = scores_of[name](q, k, *seen)
        return 2 * eps * float(scores[scores > torch.finfo(scores.dtype).min].abs().max())
    if name == "router_topk":  # softmax subtracts the maximum in at least fp32
        return 2 * wider * float(wide[0].abs().max())
    return 0.0


def _relative(name: str, result: Any, exact: Any, wide: tuple[Any, ...]) -> float:
    ours, right = _vector(name, result, wide), _vector(name, exact, wide)
    return float((ours - right).norm() / right.norm().clamp_min(1e-300)) if ours.shape == right.shape else math.inf


def _vector(name: str, result: Any, wide: tuple[Any, ...]) -> Tensor:
    if name == "router_topk":  # choices by the probability they have, so that a tie may go either way
        weights, experts = result
        result = (weights, wide[0].softmax(-1).gather(-1, experts))
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.double().flatten() for part in parts])


def _random(dtype: torch.dtype, device: torch.device, seed: int, magnitude: float) -> Rand:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int, scale: float = magnitude) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    return rand


# ------------------------------------------------------------------------------------------------- arguments


def _applies(name: str, label: str, config: Any) -> bool:
    if name in ("router_topk", "moe_experts"):
        return config.num_experts > 0
    if name == "dual_chunk_attention":
        return getattr(config, "dual_chunk", None) is not None
    hybrid = hasattr(config, "linear_num_key_heads")
    if name in _HYBRID:
        return hybrid
    if name in _STREAMS:
        return hasattr(config, "hc_count")
    if name in _BLOCKS:
        return getattr(config, "indexer_n_heads", 0) > 0
    if name in ("rms_norm", "add_rms_norm"):
        return not hybrid
    if label == "down":
        return _inner(config) > 0
    return label != "window" or _window(config) is not None


def _inner(config: Any) -> int:
    """The width of a feed-forward that every token passes."""
    return config.intermediate_size or config.shared_expert_intermediate_size


def _window(config: Any) -> int | None:
    return next((w for w in config.windows if w is not None), None)


def _linear_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    columns = min(c.num_attention_heads * c.head_dim, _COLUMNS)
    return rand(1, t, c.hidden_size), rand(columns, c.hidden_size, scale=c.hidden_size**-0.5), rand(columns)


def _down_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    inner = _inner(c)
    return rand(1, t, inner), rand(min(c.hidden_size, _COLUMNS), inner, scale=inner**-0.5)


def _norm_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    return rand(1, t, c.hidden_size), rand(c.hidden_size, scale=1.0), c.rms_norm_eps


def _head_norm_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    return rand(1, t, c.num_attention_heads, c.head_dim), rand(c.head_dim, scale=1.0), c.rms_norm_eps


def _add_norm_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    return rand(1, t, c.hidden_size), *_norm_arguments(c, t, rand)


def _rope_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    x = rand(1, t, c.num_attention_heads, c.head_dim).transpose(1, 2)  # strided, as the model passes it
    positions = torch.arange(5, 5 + t, device=x.device)[None]
    frequencies = c.rope.frequencies(c.head_dim).to(x.device)
    return x, *ops.rope_tables(positions, frequencies, c.rope.attention_factor, x.dtype)


def _attention_arguments(c: Any, t: int, rand: Rand, window: int | None = None) -> tuple[Any, ...]:
    keys = t + 9  # tokens read before
    q = rand(1, t, c.num_attention_heads, c.head_dim, scale=2.0).transpose(1, 2)
    k = rand(1, keys, c.num_key_value_heads, c.head_dim, scale=2.0).transpose(1, 2)
    v = rand(1, keys, c.num_key_value_heads, c.head_dim).transpose(1, 2)
    positions = torch.arange(keys, device=q.device)[None]
    return q, k, v, None if window is None else ops.visible(positions[:, keys - t :], positions, window)


def _dual_chunk_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    q, k, v, _ = _attention_arguments(c, t, rand)
    others = rand(1, t, 2 * c.num_attention_heads, c.head_dim, scale=2.0).transpose(1, 2).unflatten(1, (-1, 2))
    positions = torch.arange(k.shape[2], device=q.device)[None]
    scale = torch.full((1,), 1.1, device=q.device)
    return torch.cat((q[:, :, None], others), 2), k, v, positions[:, -t:], positions, 4, scale


def _window_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    return _attention_arguments(c, t, rand, min(_window(c) or 5, 5))  # shorter than the keys, or nothing is hidden


def _swiglu_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    return rand(1, t, _inner(c)), rand(1, t, _inner(c))


def _router_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    return rand(t, c.num_experts), c.num_experts_per_tok, _normalize(c)


def _normalize(c: Any) -> bool:
    return getattr(c, "norm_topk_prob", True)  # Qwen3.5 always does and has no field for it


def _experts_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    hidden, inner = c.hidden_size, c.moe_intermediate_size
    experts = min(c.num_experts, max(2, _EXPERT_ELEMENTS // (3 * hidden * inner)))
    x = rand(t, hidden)
    gate_up, down = rand(experts, 2 * inner, hidden, scale=hidden**-0.5), rand(experts, hidden, inner, scale=inner**-0.5)
    weights, chosen = ops.router_topk(rand(t, experts, scale=1.0), min(c.num_experts_per_tok, experts), _normalize(c))
    return x, gate_up, down, weights, chosen


def _gated_norm_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    heads = (1, t, c.linear_num_value_heads, c.linear_value_head_dim)
    return rand(*heads), rand(*heads, scale=1.0), rand(c.linear_value_head_dim, scale=1.0), c.rms_norm_eps


def _conv_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    channels, width = 2 * c.linear_num_key_heads * c.linear_key_head_dim, c.linear_conv_kernel_dim
    return rand(1, t, channels), rand(channels, width, scale=width**-0.5), rand(1, channels, width)


def _delta_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    heads, key, value = c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim
    q, k = rand(1, t, c.linear_num_key_heads, key), rand(1, t, c.linear_num_key_heads, key)
    a, b = rand(1, t, heads, scale=1.0), rand(1, t, heads, scale=1.0)
    g, beta = ops.delta_gates(a, b, rand(heads, scale=1.0), rand(heads, scale=1.0))
    return q, k, rand(1, t, heads, value), g, beta, rand(1, heads, key, value).to(g.dtype)


def _mix_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    return rand(1, t, c.hc_count, c.hidden_size), rand(1, t, c.hc_count, c.hidden_size)


def _write_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    return rand(1, t, c.hc_count, c.hidden_size), rand(1, t, c.hidden_size), rand(1, t, c.hc_count)


def _score_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    return rand(1, t, c.indexer_n_heads, c.indexer_head_dim), rand(1, t + 9, c.indexer_head_dim)


def _sparse_arguments(c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    q, k, v, _ = _attention_arguments(c, t, rand)
    length, ratio = k.shape[2], min(c.indexer_compress_ratio, 4)  # longer blocks would leave nothing to choose
    scores = rand(1, t, length // ratio, scale=1.0)
    return q, k, v, ops.select_blocks(scores, ops.complete_blocks(t, length, ratio, None, q.device), 1), None, ratio


def _packed_arguments(model: LanguageModel) -> dict[str, dict[str, Callable[[Any, int, Rand], tuple[Any, ...]]]]:
    """Operation -> how to make its arguments, for each layout that the model has: the first matrix, or stack, in it."""
    found: dict[str, dict[str, Callable[[Any, int, Rand], tuple[Any, ...]]]] = {}
    for _, module in model.packed_modules():
        if isinstance(module, PackedLinear):
            found.setdefault(LINEAR[type(module.packed)].name, {"": partial(_packed_linear_arguments, module)})
        elif isinstance(module, PackedExperts):
            found.setdefault(MOE[type(module.gate_up)].name, {"": partial(_packed_experts_arguments, module)})
    return found


def _packed_linear_arguments(module: PackedLinear, c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    columns = min(module.out_features, _COLUMNS)
    return rand(1, t, module.in_features), rows(module.packed, 0, columns), rand(columns)


def _packed_experts_arguments(module: PackedExperts, c: Any, t: int, rand: Rand) -> tuple[Any, ...]:
    weights, chosen = ops.router_topk(rand(t, module.experts, scale=1.0), c.num_experts_per_tok, _normalize(c))
    return rand(t, module.hidden), module.gate_up, module.down, weights, chosen


ARGUMENTS: dict[str, dict[str, Callable[[Any, int, Rand], tuple[Any, ...]]]] = {  # operation -> kind -> how to make them
    "linear": {"with bias": _linear_arguments, "down": _down_arguments},
    "rms_norm": {"hidden": _norm_arguments, "heads": _head_norm_arguments},
    "add_rms_norm": {"": _add_norm_arguments},
    "zero_centred_rms_norm": {"hidden": _norm_arguments, "heads": _head_norm_arguments},
    "gated_rms_norm": {"": _gated_norm_arguments},
    "causal_conv1d": {"": _conv_arguments},
    "gated_delta_rule": {"": _delta_arguments},
    "rope": {"": _rope_arguments},
    "attention": {"": _attention_arguments, "window": _window_arguments},
    "dual_chunk_attention": {"": _dual_chunk_arguments},
    "block_scores": {"": _score_arguments},
    "sparse_block_attention": {"": _sparse_arguments},
    "stream_mix": {"": _mix_arguments},
    "stream_write": {"": _write_arguments},
    "swiglu": {"": _swiglu_arguments},
    "router_topk": {"": _router_arguments},
    "moe_experts": {"": _experts_arguments},
}
_HYBRID = ("zero_centred_rms_norm", "gated_rms_norm", "causal_conv1d", "gated_delta_rule")
_STREAMS = ("stream_mix", "stream_write")
_BLOCKS = ("block_scores", "sparse_block_attention")
