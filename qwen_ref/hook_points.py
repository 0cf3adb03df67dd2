"""The named places inside every model where an activation can be seen: what each is, and which letters measure it.

`points` walks a model's blocks and lists them in the order in which they are computed. Names are TransformerLens's where
it has one. How a value gets out of a point, and back in, is `hooks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .errors import RequestError


@dataclass(frozen=True)
class Point:
    """One place where an activation can be seen."""

    name: str
    path: str  # the module it belongs to, by its official name
    place: str  # "output" or "input" of that module, or the operation inside it
    # Letters of `ops`, one per axis; S keys, V vocabulary, c and d are Dk and Dv; s residual streams, p blocks of keys, q
    # chosen ones, h and i the indexer's heads and their dimension, g n-gram heads, e theirs: see `letter_sizes`.
    dims: str
    call: int = 0  # which of the operation's calls inside the module
    instead: str = ""  # of a point that can be read but not edited: what to edit instead
    part: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)  # of the output, as a view of it; None = all

    @property
    def editable(self) -> bool:
        return not self.instead

    @property
    def layer(self) -> int | None:
        return int(self.name.split(".")[1]) if self.name.startswith("blocks.") else None

    @property
    def short(self) -> str:
        return self.name.rpartition(".")[2].removeprefix("hook_")


def points(model: nn.Module) -> dict[str, Point]:
    """Every named point of a model, in the order in which they are computed."""
    found = [Point("hook_embed", "model.embed_tokens", "output", "BTH")]
    for i, block in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
        found += _block_points(f"blocks.{i}", f"model.layers.{i}", block)
    last: Any = model.get_submodule(final_path(model))
    found += _mixer_points("ln_final", final_path(model)) if hasattr(last, "hc_norm") else _norm_points(
        "ln_final", final_path(model), last)
    if model.lm_head is not None:
        found.append(Point("hook_logits", "lm_head", "output", "BTV"))
    return {point.name: point for point in found}


def final_path(model: nn.Module) -> str:
    """The module that makes the head's input of the residual stream, or streams, that the last block leaves."""
    return "model.norm" if hasattr(model.model, "norm") else "model.hyper_connection_mixer"


def _block_points(name: str, path: str, block: Any) -> list[Point]:
    mixer, inside = next(((kind, points) for kind, points in _MIXERS.items() if hasattr(block, kind)), ("", None))
    if inside is None:
        raise RequestError("this model has no named points inside its blocks; of a fused model, hook the one it was made of")
    first, second = ("ln_1", "ln_2") if hasattr(block, "ln_1") else ("input_layernorm", "post_attention_layernorm")
    mlp = _moe_points if hasattr(block.mlp, "experts") else _mlp_points
    if hasattr(block, "attn_hyper_connection"):
        return _stream_points(name, path, block, mixer, inside, mlp)
    return [
        Point(f"{name}.hook_resid_pre", path, "input", "BTH"),
        *_norm_points(f"{name}.ln1", f"{path}.{first}", getattr(block, first)),
        *inside(f"{name}.attn.hook", f"{path}.{mixer}", getattr(block, mixer)),
        Point(f"{name}.hook_attn_out", f"{path}.{mixer}", "output", "BTH"),
        Point(f"{name}.hook_resid_mid", f"{path}.{second}", "residual", "BTH"),
        *_norm_points(f"{name}.ln2", f"{path}.{second}", getattr(block, second)),
        *mlp(f"{name}.mlp", f"{path}.mlp", block.mlp),
        Point(f"{name}.hook_mlp_out", f"{path}.mlp", "output", "BTH"),
        Point(f"{name}.hook_resid_post", path, "output", "BTH"),
    ]


def _stream_points(
    name: str, path: str, block: Any, mixer: str, inside: Callable[..., list[Point]], mlp: Callable[..., list[Point]]
) -> list[Point]:
    """Of a block with several residual streams, in place of norms and sums."""
    return [
        Point(f"{name}.hook_resid_pre", path, "input", "BTsH"),
        *(_ple_points(f"{name}.ple.hook", f"{path}.ple") if block.ple is not None else []),
        *_mixer_points(f"{name}.ln1", f"{path}.attn_hyper_connection"),
        *inside(f"{name}.attn.hook", f"{path}.{mixer}", getattr(block, mixer)),
        Point(f"{name}.hook_attn_out", f"{path}.{mixer}", "output", "BTH"),
        Point(f"{name}.hook_attn_inject", path, "stream_write", "BTs", call=0),  # how much of it each stream takes
        Point(f"{name}.hook_resid_mid", f"{path}.mlp_hyper_connection", "residual", "BTsH"),
        *_mixer_points(f"{name}.ln2", f"{path}.mlp_hyper_connection"),
        *mlp(f"{name}.mlp", f"{path}.mlp", block.mlp),
        Point(f"{name}.hook_mlp_out", f"{path}.mlp", "output", "BTH"),
        Point(f"{name}.hook_mlp_inject", path, "stream_write", "BTs", call=1),
        Point(f"{name}.hook_resid_post", path, "output", "BTsH"),
    ]


def _mixer_points(name: str, path: str) -> list[Point]:
    return [
        *_norm_points(name, f"{path}.hc_norm", None, stream="s")[:2],
        Point(f"{name}.hook_read", path, "stream_mix", "BTsH"),  # the weight of every number of every stream
        Point(f"{name}.hook_out", path, "output", "BTH"),
    ]


def _ple_points(a: str, path: str) -> list[Point]:
    """Of embeddings of n-grams: the table's rows, what they hold, and what the streams take of it."""
    table = f"{path}.ple_embedding.ngram_embedding"
    return [
        Point(f"{a}_rows", table, "input", "BTg"),
        Point(f"{a}_embed", table, "output", "BTge"),
        Point(f"{a}_key", f"{path}.norm_key", "output", "BTsH"),
        Point(f"{a}_query", f"{path}.norm_query", "output", "BTsH"),
        Point(f"{a}_value", f"{path}.value_proj", "output", "BTH"),
        Point(f"{a}_gated", f"{path}.norm_conv", "input", "BTsH", instead="hook_value, hook_key or hook_query"),
        Point(f"{a}_out", path, "output", "BTsH"),
    ]


def _attention_points(a: str, path: str, attn: Any) -> list[Point]:
    normed = hasattr(attn, "q_norm")
    gated = attn.q_proj.out_features == 2 * attn.o_proj.in_features  # of each head, q_proj has query rows, then gate rows
    dim = attn.head_dim

    def rows(start: int) -> Callable[[Tensor], Tensor]:
        return lambda x: x.unflatten(-1, (-1, 2 * dim))[..., start : start + dim]

    return [
        Point(f"{a}_q", f"{path}.q_proj", "output", "BTND", part=rows(0) if gated else None),
        *([Point(f"{a}_gate", f"{path}.q_proj", "output", "BTND", part=rows(dim))] if gated else []),
        *([Point(f"{a}_q_normed", f"{path}.q_norm", "output", "BTND")] if normed else []),
        Point(f"{a}_k", f"{path}.k_proj", "output", "BTKD"),
        *([Point(f"{a}_k_normed", f"{path}.k_norm", "output", "BTKD")] if normed else []),
        Point(f"{a}_v", f"{path}.v_proj", "output", "BTKD"),
        *_score_points(a, path, attn),
        # What o_proj reads: after the gate, where there is one.
        Point(f"{a}_z", f"{path}.o_proj", "input", "BTND") if gated else Point(f"{a}_z", path, "attention", "BTND"),
        Point(f"{a}_result", f"{path}.o_proj", "heads", "BTNH"),
    ]


def _fused_attention_points(a: str, path: str, attn: Any) -> list[Point]:
    """Of Qwen 1: q, k and v are thirds of one projection."""

    def third(i: int) -> Callable[[Tensor], Tensor]:
        return lambda x: x.chunk(3, dim=-1)[i].unflatten(-1, (-1, attn.head_dim))

    return [
        Point(f"{a}_q", f"{path}.c_attn", "output", "BTND", part=third(0)),
        Point(f"{a}_k", f"{path}.c_attn", "output", "BTKD", part=third(1)),
        Point(f"{a}_v", f"{path}.c_attn", "output", "BTKD", part=third(2)),
        *_score_points(a, path, attn),
        Point(f"{a}_z", path, "attention", "BTND"),
        Point(f"{a}_result", f"{path}.c_proj", "heads", "BTNH"),
    ]


def _score_points(a: str, path: str, attn: Any) -> list[Point]:
    return [
        Point(f"{a}_rot_q", path, "rope", "BTND", call=0),  # of dual chunk attention: as rotated for keys of its own chunk
        Point(f"{a}_rot_k", path, "rope", "BTKD", call=1),
        *(_indexer_points(a, path) if hasattr(attn, "indexer") else []),
        Point(f"{a}_attn_scores", path, "attention", "BNTS"),
        Point(f"{a}_pattern", path, "attention", "BNTS"),
    ]


def _indexer_points(a: str, path: str) -> list[Point]:
    """Of attention that reads chosen blocks. While a query may read all of them none are scored, and nothing is seen here."""
    return [
        Point(f"{a}_index_q", path, "rope", "BThi", call=2),
        Point(f"{a}_index_k", path, "rope", "Bp1i", call=3),
        Point(f"{a}_index_scores", path, "block_scores", "BTp"),
        Point(f"{a}_index_blocks", f"{path}.indexer", "output", "BTq"),  # -1 = none
    ]


def _delta_points(a: str, path: str, delta: Any) -> list[Point]:
    """Of a Gated DeltaNet. q, k and v after the convolution, before q and k are scaled to length one."""
    rule = "gated_delta_rule"
    return [
        Point(f"{a}_q", path, rule, "BTGc"),
        Point(f"{a}_k", path, rule, "BTGc"),
        Point(f"{a}_v", path, rule, "BTPd"),
        Point(f"{a}_decay", path, rule, "BTP"),  # exp(g), the share of the state that stays
        Point(f"{a}_beta", path, rule, "BTP"),  # the share of the error that is written
        # What the rule amounts to as attention among the tokens of this pass.
        Point(f"{a}_pattern", path, rule, "BPTT", instead="hook_q, hook_k, hook_decay or hook_beta"),
        Point(f"{a}_out", path, rule, "BTPd"),
        Point(f"{a}_state", path, rule, "BPcd"),  # after the last token
        Point(f"{a}_gate", f"{path}.norm", "gated_rms_norm", "BTPd"),  # before its activation
        Point(f"{a}_z", f"{path}.norm", "output", "BTPd"),
        Point(f"{a}_result", f"{path}.out_proj", "heads", "BTPH"),
    ]


_MIXERS = {"linear_attn": _delta_points, "self_attn": _attention_points, "attn": _fused_attention_points}


def _norm_points(name: str, path: str, norm: Any, stream: str = "") -> list[Point]:
    operation = "zero_centred_rms_norm" if stream else getattr(norm, "operation", "rms_norm")
    return [
        Point(f"{name}.hook_scale", path, operation, f"BT{stream}1"),  # the root mean square the vector is divided by
        Point(f"{name}.hook_normalized", path, operation, f"BT{stream}H"),  # before the weight, as in TransformerLens
        Point(f"{name}.hook_out", path, "output", "BTH"),
    ]


def _mlp_points(name: str, path: str, mlp: Any) -> list[Point]:
    gate, up, down = ("w2", "w1", "c_proj") if hasattr(mlp, "w2") else ("gate_proj", "up_proj", "down_proj")
    return [
        Point(f"{name}.hook_pre", f"{path}.{gate}", "output", "BTI"),
        Point(f"{name}.hook_pre_linear", f"{path}.{up}", "output", "BTI"),
        Point(f"{name}.hook_post", f"{path}.{down}", "input", "BTI"),
    ]


def _moe_points(name: str, path: str, mlp: Any) -> list[Point]:
    found = [
        Point(f"{name}.hook_router_logits", f"{path}.gate", "output", "BTE"),
        Point(f"{name}.hook_router_probs", path, "router_topk", "BTE", instead="hook_router_logits"),
        Point(f"{name}.hook_topk_weights", path, "router_topk", "BTk"),
        Point(f"{name}.hook_topk_idx", path, "router_topk", "BTk"),
    ]
    if hasattr(mlp, "shared_expert"):
        found.append(Point(f"{name}.hook_shared_gate", f"{path}.shared_expert_gate", "output", "BT1"))
        found.append(Point(f"{name}.hook_shared_out", f"{path}.shared_expert", "output", "BTH"))
    found.append(Point(f"{name}.hook_expert_out", f"{path}.experts", "output", "BTH"))
    return found


def letter_sizes(config: Any) -> dict[str, int]:
    """What the letters of a point's dims stand for in a model, but for B, T, S and p."""
    ngrams = getattr(config, "ngram_heads", 1)
    return {
        "H": config.hidden_size, "N": config.num_attention_heads, "K": config.num_key_value_heads, "D": config.head_dim,
        "R": config.rope.width(config.head_dim), "I": config.intermediate_size, "V": config.vocab_size, "1": 1,
        "E": config.num_experts, "k": config.num_experts_per_tok,
        "G": getattr(config, "linear_num_key_heads", 0), "P": getattr(config, "linear_num_value_heads", 0),
        "c": getattr(config, "linear_key_head_dim", 0), "d": getattr(config, "linear_value_head_dim", 0),
        "s": getattr(config, "hc_count", 1), "g": ngrams, "e": getattr(config, "ple_embed_dim", 0) // ngrams,
        "h": getattr(config, "indexer_n_heads", 0), "i": getattr(config, "indexer_head_dim", 0),
        "q": getattr(config, "indexer_budget", 0) // (getattr(config, "indexer_compress_ratio", 0) or 1),
    }  # fmt: skip
