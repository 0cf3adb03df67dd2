"""Qwen4-Exp (2026), the language model: model_type `qwen4_exp`.

From Qwen3.5's mixture of experts: four residual streams in place of one, mixed before and written to after every sub-layer by
learned weights (`GatedResidual`), which replace the residual sums and all norms of blocks and of the model. The attention
layers read only blocks of keys that a small indexer chooses (QSA, `Indexer`). One layer begins with embeddings of hashed
n-grams, out of a table of 51 billion numbers (PLE). The gate of the Gated DeltaNet may be a sigmoid. The formulas of the
three are in `ops.streams`, `ops.block_attention` and `ops.ngram`. transformers 5.23, models/qwen4_exp.

The official files are multimodal: the language model's fields are in `text_config`, its tensors under `model.language_model`.
Neither the vision tower nor the draft layer (`mtp.*`), whose structure no published code shows, is read here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backend, ops
from ..cache import Cache, IndexedKVCache, JoinedCache, RecurrentCache
from ..config import Fields, Rope, hybrid_types, mixture, text_config
from ..layers import (
    MLP,
    CausalConv1d,
    Experts,
    GatedRMSNorm,
    Linear,
    Rotary,
    ShardedEmbedding,
    StreamRMSNorm,
    ZeroCentredRMSNorm,
    positions_and_masks,
)
from .common import LanguageModel

SCORE_BYTES = 1 << 28  # of the indexer's scores of all its heads at a time


@dataclass(frozen=True)
class Config:
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    attention_bias: bool
    tie_word_embeddings: bool
    layer_types: tuple[str, ...]  # linear_attention or indexed_attention
    eos_token_ids: tuple[int, ...]  # the first ends a sentence for the n-grams
    # Gated DeltaNet
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    output_gate_type: str
    # mixture of experts, in every layer
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool
    # residual streams
    hc_count: int
    hc_lowrank: int
    # n-gram embeddings
    ple_layer_ids: tuple[int, ...]  # counted from 1
    ple_embed_dim: int
    ple_conv_kernel_size: int
    ngram_size: int
    heads_per_ngram: int
    ngram_vocab_size_base: int
    make_ngram_vocab_size_divisible_by: int
    seed: int
    split_ngram_parts: int
    # the indexer of attention layers; 0 where there are none
    indexer_n_heads: int
    indexer_head_dim: int
    indexer_budget: int
    indexer_compress_ratio: int
    intermediate_size: int = 0  # no layer is dense

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Config:
        """Read config.json; absent fields take the class defaults of transformers. ConfigError on what is wrong."""
        f = Fields(text_config(data))
        f.choice("model_type", ("qwen4_exp", "qwen4_exp_text"))
        f.choice("hidden_act", ("silu",), "silu")
        f.refuse("use_sliding_window")
        layers = f.integer("num_hidden_layers", 40, high=4096)
        max_position = f.integer("max_position_embeddings", 32768, high=1 << 40)
        types = hybrid_types(f, layers, full="indexed_attention")
        indexed = "indexed_attention" in types
        hidden = f.integer("hidden_size", 2048)
        experts, top_k = mixture(f, layers, 512, 10)
        config = cls(
            model_type="qwen4_exp_text",
            vocab_size=f.integer("vocab_size", 248320),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=f.integer("num_attention_heads", 16),
            num_key_value_heads=f.integer("num_key_value_heads", 2),
            head_dim=f.integer("head_dim", 256),
            max_position_embeddings=max_position,
            rms_norm_eps=f.positive("rms_norm_eps", 1e-6),
            # Unlike Qwen3.5, a config without the field rotates whole heads.
            rope=Rope.from_json(f, max_position, default_share=1.0, default_sections=(11, 11, 10)),
            attention_bias=f.flag("attention_bias", False),
            tie_word_embeddings=f.flag("tie_word_embeddings", False),
            layer_types=types,
            eos_token_ids=_token_ids(f, "eos_token_id"),
            linear_num_key_heads=f.integer("linear_num_key_heads", 16),
            linear_num_value_heads=f.integer("linear_num_value_heads", 32),
            linear_key_head_dim=f.integer("linear_key_head_dim", 128),
            linear_value_head_dim=f.integer("linear_value_head_dim", 128),
            linear_conv_kernel_dim=f.integer("linear_conv_kernel_dim", 4),
            output_gate_type=f.choice("output_gate_type", ("silu", "sigmoid"), "silu"),
            num_experts=experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=f.integer("moe_intermediate_size", 512),
            shared_expert_intermediate_size=f.integer("shared_expert_intermediate_size", 512),
            norm_topk_prob=f.flag("norm_topk_prob", True),
            hc_count=f.integer("hc_count", 4, low=2, high=1024),
            hc_lowrank=f.integer("hc_lowrank", 320),
            ple_layer_ids=_ple_layers(f, types),
            ple_embed_dim=f.integer("ple_embed_dim", hidden),
            ple_conv_kernel_size=f.integer("ple_conv_kernel_size", 4, high=1024),
            ngram_size=f.integer("ngram_size", 3, low=2, high=64),
            heads_per_ngram=f.integer("heads_per_ngram", 8, high=1024),
            ngram_vocab_size_base=f.integer("ngram_vocab_size_base", 20_000_000, high=1 << 32),
            make_ngram_vocab_size_divisible_by=f.integer("make_ngram_vocab_size_divisible_by", 128),
            seed=f.integer("seed", 1234, low=0, high=(1 << 63) - 1),
            split_ngram_parts=f.integer("split_ngram_parts", 512, high=1 << 16),
            indexer_n_heads=f.integer("indexer_n_heads") if indexed else 0,
            indexer_head_dim=f.integer("indexer_head_dim") if indexed else 0,
            indexer_budget=f.integer("indexer_budget") if indexed else 0,
            indexer_compress_ratio=f.integer("indexer_compress_ratio") if indexed else 0,
        )
        config._check(f)
        return config

    def _check(self, f: Fields) -> None:
        f.divides("num_key_value_heads", self.num_key_value_heads, self.num_attention_heads)
        f.divides("linear_num_key_heads", self.linear_num_key_heads, self.linear_num_value_heads)
        if (width := self.rope.width(self.head_dim)) % 2 or not width:
            raise f.error("partial_rotary_factor", f"rotates {width} of {self.head_dim} numbers; it must be an even count")
        if self.indexer_n_heads:
            if f.integer("indexer_kv_heads") != 1:
                raise f.error("indexer_kv_heads", "must be 1: the heads of the indexer share one key")
            if self.indexer_budget % self.indexer_compress_ratio:
                raise f.error("indexer_budget", f"is {self.indexer_budget}, not a multiple of indexer_compress_ratio, "
                              f"{self.indexer_compress_ratio}")
            if width > self.indexer_head_dim:
                raise f.error("indexer_head_dim", f"is {self.indexer_head_dim}, less than the {width} numbers that are rotated")
        if self.ple_layer_ids:
            if self.ngram_heads * len(self.ple_layer_ids) > 1 << 14:  # each needs a prime of its own
                layers = len(self.ple_layer_ids)
                raise f.error("heads_per_ngram", f"asks for {self.ngram_heads} hash functions in {layers} layers: over 16,384")
            if self.ple_embed_dim % self.ngram_heads:
                raise f.error("ple_embed_dim", f"is {self.ple_embed_dim}, no multiple of the {self.ngram_heads} n-gram heads")
            if not self.eos_token_ids:
                raise f.error("eos_token_id", "is missing: the n-grams of ple_layer_ids end at it")

    @property
    def windows(self) -> list[int | None]:
        """The sliding window of each layer that keeps keys; None = all keys are kept, of which each query reads some."""
        return [None for kind in self.layer_types if kind == "indexed_attention"]

    @property
    def ngram_heads(self) -> int:
        return (self.ngram_size - 1) * self.heads_per_ngram

    def to_json(self) -> dict[str, Any]:
        """config.json as the official files spell it, of the language model alone, readable by transformers."""
        indexer = {
            "indexer_n_heads": self.indexer_n_heads,
            "indexer_kv_heads": 1,
            "indexer_head_dim": self.indexer_head_dim,
            "indexer_budget": self.indexer_budget,
            "indexer_compress_ratio": self.indexer_compress_ratio,
        }
        return {
            "architectures": ["Qwen4ExpForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            **self.rope.to_json(),
            "attention_bias": self.attention_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "layer_types": list(self.layer_types),
            **({"eos_token_id": list(self.eos_token_ids)} if self.eos_token_ids else {}),
            "linear_num_key_heads": self.linear_num_key_heads,
            "linear_num_value_heads": self.linear_num_value_heads,
            "linear_key_head_dim": self.linear_key_head_dim,
            "linear_value_head_dim": self.linear_value_head_dim,
            "linear_conv_kernel_dim": self.linear_conv_kernel_dim,
            "output_gate_type": self.output_gate_type,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "moe_intermediate_size": self.moe_intermediate_size,
            "shared_expert_intermediate_size": self.shared_expert_intermediate_size,
            "norm_topk_prob": self.norm_topk_prob,
            "hc_count": self.hc_count,
            "hc_lowrank": self.hc_lowrank,
            "ple_layer_ids": list(self.ple_layer_ids),
            "ple_embed_dim": self.ple_embed_dim,
            "ple_conv_kernel_size": self.ple_conv_kernel_size,
            "ngram_size": self.ngram_size,
            "heads_per_ngram": self.heads_per_ngram,
            "ngram_vocab_size_base": self.ngram_vocab_size_base,
            "make_ngram_vocab_size_divisible_by": self.make_ngram_vocab_size_divisible_by,
            "seed": self.seed,
            "split_ngram_parts": self.split_ngram_parts,
            **(indexer if self.indexer_n_heads else {}),
        }


def _token_ids(f: Fields, name: str) -> tuple[int, ...]:
    """A token id or a list of them."""
    value = f.data.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int or not 0 <= i < 1 << 31 for i in ids):
        raise f.error(name, f"is {value!r}, not a token id or a list of them")
    return tuple(ids)


def _ple_layers(f: Fields, types: tuple[str, ...]) -> tuple[int, ...]:
    """The layers with n-gram embeddings, counted from 1: linear_attention only, whose state is where theirs is kept."""
    ids = f.array("ple_layer_ids", [])
    for i in ids:
        if type(i) is not int or not 1 <= i <= len(types):
            raise f.error("ple_layer_ids", f"holds {i!r}, not the number of one of {len(types)} layers, counted from 1")
        if types[i - 1] != "linear_attention":
            raise f.error("ple_layer_ids", f"holds {i}, a layer of {types[i - 1]}; only linear_attention can have one")
    return tuple(sorted(set(ids)))


class StreamMixer(nn.Module):
    """What is read of the residual streams: a mixture of their norms by weights that are made of these. `ops.streams`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        wide = config.hc_count * config.hidden_size
        self.hc_norm = StreamRMSNorm(wide, config.rms_norm_eps)
        self.input_mix_weight_down = Linear(wide, config.hc_lowrank, bias=False)
        self.input_mix_weight_up = Linear(config.hc_lowrank, wide, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, n, H) -> (B, T, H)
        return self.mix(self.hc_norm(x))

    def mix(self, normed: Tensor) -> Tensor:  # (B, T, n, H) -> (B, T, H)
        low = nn.functional.silu(self.input_mix_weight_down(normed.flatten(2)) / normed.shape[2])  # (B, T, r)
        return backend.stream_mix(normed, self.input_mix_weight_up(low).view_as(normed))


class GatedResidual(StreamMixer):
    """A `StreamMixer` that also says how strongly each stream takes what the sub-layer returns."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.block_inject_weight = Linear(config.hc_count * config.hidden_size, config.hc_count, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(B, T, n, H) -> the mixture (B, T, H), and the logits for `stream_write` (B, T, n)."""
        normed = self.hc_norm(x)
        return self.mix(normed), self.block_inject_weight(normed.flatten(2))


class NGramEmbedding(nn.Module):
    """The rows of the n-grams that end in each token, side by side: `ops.ngram_rows` of a `ShardedEmbedding`."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        heads, self.eos = config.ngram_heads, config.eos_token_ids[0]
        primes = ops.primes_from(config.ngram_vocab_size_base, (index + 1) * heads)[index * heads :]
        multipliers = ops.ngram_multipliers(config.vocab_size, config.ngram_size, index, config.seed)
        offsets = [sum(primes[:h]) for h in range(heads)]
        # Not parameters: they follow from the config. Checkpoints repeat them, under these names.
        self.constants = {
            "layer_multipliers": torch.tensor(multipliers, device="cpu"),
            "ngram_heads_vocab_sizes": torch.tensor(primes, device="cpu"),
            "ngram_heads_offsets": torch.tensor(offsets, device="cpu"),
        }
        multiple = config.make_ngram_vocab_size_divisible_by
        rows = math.ceil(sum(primes) / multiple) * multiple
        self.ngram_embedding = ShardedEmbedding(rows, config.ple_embed_dim // heads, config.split_ngram_parts)

    def forward(self, input_ids: Tensor, before: Tensor | None) -> Tensor:
        """ids (B, T) and those before them, from `context` -> (B, T, heads D)."""
        multipliers, sizes, offsets = (x.to(input_ids.device) for x in self.constants.values())
        before = self.context(input_ids[:, :0], before)
        rows = ops.ngram_rows(input_ids, before, multipliers, sizes, offsets, self.eos)  # (B, T, heads)
        return self.ngram_embedding(rows).flatten(2)

    def context(self, input_ids: Tensor, before: Tensor | None) -> Tensor:
        """What the next token needs of those up to now, the last n - 1: (B, n - 1)."""
        count = self.constants["layer_multipliers"].shape[0] - 1
        if before is None:
            before = input_ids.new_full((input_ids.shape[0], count), self.eos)
        return torch.cat((before, input_ids), dim=1)[:, -count:].clone()


class DilatedConv1d(nn.Module):
    """`ops.dilated_conv1d`."""

    def __init__(self, channels: int, width: int, dilation: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, width))
        self.dilation = dilation

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:  # (B, T, C), (B, C, reach) -> the same two
        return ops.dilated_conv1d(x, self.weight[:, 0], state, self.dilation)


class PerLayerEmbedding(nn.Module):
    """What the n-grams of each token add to the streams: their value, gated by how well it suits each stream, and a
    convolution of it over the tokens before."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        wide, eps = config.hc_count * config.hidden_size, config.rms_norm_eps
        self.streams = (config.hc_count, config.hidden_size)
        self.ple_embedding = NGramEmbedding(config, index)
        self.key_proj = Linear(config.ple_embed_dim, wide, bias=False)
        self.value_proj = Linear(config.ple_embed_dim, config.hidden_size, bias=False)
        self.norm_key = StreamRMSNorm(wide, eps)
        self.norm_query = StreamRMSNorm(wide, eps)
        self.norm_conv = StreamRMSNorm(wide, eps)
        self.conv1d = DilatedConv1d(wide, config.ple_conv_kernel_size, config.ngram_size)

    def forward(self, x: Tensor, input_ids: Tensor, real: Tensor | None, cache: RecurrentCache | None) -> Tensor:
        cache = RecurrentCache() if cache is None else cache
        if real is not None:
            input_ids = torch.where(real, input_ids, self.ple_embedding.eos)
        _, before = cache.state or (None, None)
        embedded = self.ple_embedding(input_ids, before).to(x.dtype)  # (B, T, P)
        key = self.norm_key(self.key_proj(embedded).unflatten(-1, self.streams))  # (B, T, n, H)
        gated = ops.ngram_gate(key, self.norm_query(x), self.value_proj(embedded))  # (B, T, n, H)
        normed = self.norm_conv(gated)
        if real is not None:  # padding adds nothing, here and to the convolution of the tokens after it
            gated, normed = gated * real[..., None, None], normed * real[..., None, None]
        outs = []
        for t in cache.pieces(x.shape[1]):
            history, before = cache.state or (None, None)
            out, history = self.conv1d(normed[:, t].flatten(2), history)  # (B, T, n H)
            cache.advance(out.shape[1], history, self.ple_embedding.context(input_ids[:, t], before))
            outs.append(out)
        return gated + torch.cat(outs, dim=1).view_as(gated)  # (B, T, n, H)


class Blocks(NamedTuple):
    """Where the blocks of keys begin, the same for all attention layers: `ops.block_attention`."""

    starts: Tensor | None  # (B,) the first real key
    first: Tensor  # (B or 1, P) the first key of each block
    rope: tuple[Tensor, Tensor]  # of these keys' positions, (B or 1, P, R) each


class Indexer(nn.Module):
    """Chooses for every query the blocks of keys that its attention reads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.head_dim = config.indexer_n_heads, config.indexer_head_dim
        self.ratio = config.indexer_compress_ratio
        self.top = config.indexer_budget // config.indexer_compress_ratio
        self.index_qk_proj = Linear(config.hidden_size, (self.heads + 1) * self.head_dim, bias=False)
        self.q_layernorm = ZeroCentredRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_layernorm = ZeroCentredRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], blocks: Blocks | None, cache: IndexedKVCache | None
    ) -> Tensor | None:
        """x (B, T, H) -> (B, T, k) indices of blocks, -1 = none; None where no query has more than it may choose."""
        q, keys = self.index_qk_proj(x).split((self.heads * self.head_dim, self.head_dim), dim=-1)
        if cache is not None:
            keys = cache.append_index(keys)  # (B, S, d)
        if blocks is None:
            return None
        length, count = keys.shape[1], x.shape[1]
        q = self.q_layernorm(q.unflatten(-1, (self.heads, -1)))  # (B, T, h, d)
        q = backend.rope(q.transpose(1, 2), *rope).transpose(1, 2)
        keys = self.k_layernorm(ops.block_means(keys, blocks.first, self.ratio))  # (B, P, d)
        keys = backend.rope(keys[:, None], *blocks.rope)[:, 0]
        complete = ops.complete_blocks(count, length, self.ratio, blocks.starts, x.device)  # (B or 1, T)
        step = max(1, SCORE_BYTES // (4 * x.shape[0] * self.heads * max(keys.shape[1], 1)))
        return torch.cat([ops.select_blocks(backend.block_scores(q[:, t : t + step], keys), complete[:, t : t + step], self.top)
                          for t in range(0, count, step)], dim=1)  # fmt: skip


class Attention(nn.Module):
    """Grouped-query attention over chosen blocks, queries and keys normalised and partly rotated, behind a sigmoid gate."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = dim
        self.q_proj = Linear(hidden, config.num_attention_heads * 2 * dim, bias=bias)  # per head: query rows, gate rows
        self.k_proj = Linear(hidden, config.num_key_value_heads * dim, bias=bias)
        self.v_proj = Linear(hidden, config.num_key_value_heads * dim, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * dim, hidden, bias=bias)
        self.q_norm = ZeroCentredRMSNorm(dim, config.rms_norm_eps)  # one weight for all heads
        self.k_norm = ZeroCentredRMSNorm(dim, config.rms_norm_eps)
        self.indexer = Indexer(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, blocks: Blocks | None, cache: IndexedKVCache | None
    ) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)  # x (B, T, H)
        q, gate = self.q_proj(x).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)  # (B, T, N, D) each
        q = self.q_norm(q).transpose(1, 2)  # (B, N, T, D)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, K, T, D)
        q, k = backend.rope(q, *rope), backend.rope(k, *rope)
        chosen = self.indexer(x, rope, blocks, cache)  # (B, T, k)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, D)
        if chosen is None or blocks is None:
            out = backend.attention(q, k, v, mask)  # (B, N, T, D)
        else:
            out = backend.sparse_block_attention(q, k, v, chosen, blocks.starts, self.indexer.ratio)
        return self.o_proj((out.transpose(1, 2) * torch.sigmoid(gate)).flatten(2))  # (B, T, H)


class GatedDeltaNet(nn.Module):
    """Linear attention by the gated delta rule: `ops.gated_delta_rule`, behind a short convolution of q, k and v.

    Letters: G key heads, P value heads, Dk and Dv their dimensions, C = 2 G Dk + P Dv channels.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, groups, heads = config.hidden_size, config.linear_num_key_heads, config.linear_num_value_heads
        key, value = config.linear_key_head_dim, config.linear_value_head_dim
        self.key_dim, self.value_dim = key, value
        self.parts = (groups * key, groups * key, heads * value)  # channels of q, k and v
        self.in_proj_qkv = Linear(hidden, sum(self.parts), bias=False)
        self.in_proj_z = Linear(hidden, heads * value, bias=False)
        self.in_proj_b = Linear(hidden, heads, bias=False)
        self.in_proj_a = Linear(hidden, heads, bias=False)
        self.conv1d = CausalConv1d(sum(self.parts), config.linear_conv_kernel_dim)
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.norm = GatedRMSNorm(value, config.rms_norm_eps, config.output_gate_type)
        self.out_proj = Linear(heads * value, hidden, bias=False)

    def forward(self, x: Tensor, real: Tensor | None, cache: RecurrentCache | None) -> Tensor:
        if real is not None:
            x = x * real[..., None]  # (B, T, H): padding brings nothing into the convolution and the state
        cache = RecurrentCache() if cache is None else cache
        mixed, z, b, a = self.project(x)
        g, beta = ops.delta_gates(a, b, self.A_log, self.dt_bias)  # (B, T, P) each
        outs = []
        for t in cache.pieces(x.shape[1]):
            window, state = cache.state or (None, None)
            conved, window = self.conv1d(mixed[:, t], window)  # (B, T, C), (B, C, W)
            q, k, v = conved.split(self.parts, dim=-1)
            q, k = q.unflatten(-1, (-1, self.key_dim)), k.unflatten(-1, (-1, self.key_dim))  # (B, T, G, Dk)
            v = v.unflatten(-1, (-1, self.value_dim))  # (B, T, P, Dv)
            out, state = backend.gated_delta_rule(q, k, v, g[:, t], beta[:, t], state)  # (B, T, P, Dv), (B, P, Dk, Dv)
            cache.advance(out.shape[1], window, state)
            outs.append(out)
        return self.out_proj(self.norm(torch.cat(outs, dim=1), z).flatten(2))  # (B, T, H)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q|k|v (B, T, C), z (B, T, P, Dv), and b and a (B, T, P)."""
        z = self.in_proj_z(x).unflatten(-1, (-1, self.value_dim))
        return self.in_proj_qkv(x), z, self.in_proj_b(x), self.in_proj_a(x)


class SparseMoE(nn.Module):
    """k of E feed-forwards per token, mixed by the router's probabilities, plus a gated one that every token passes."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.top_k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared_expert = MLP(config.hidden_size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (M, H)
        weights, experts = backend.router_topk(self.gate(tokens), self.top_k, self.normalize)  # (M, k) each
        shared = torch.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)  # (M, H)
        return (self.experts(tokens, weights, experts) + shared).view_as(x)  # (B, T, H)


class Block(nn.Module):
    """Streams (B, T, n, H), to which the n-grams, if this layer has them, then mixer and feed-forward each add."""

    def __init__(self, config: Config, kind: str, ple_index: int | None) -> None:
        super().__init__()
        self.ple = PerLayerEmbedding(config, ple_index) if ple_index is not None else None
        self.attn_hyper_connection = GatedResidual(config)
        if kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = Attention(config)
        self.linear = kind == "linear_attention"
        self.mlp_hyper_connection = GatedResidual(config)
        self.mlp = SparseMoE(config)

    def forward(
        self,
        x: Tensor,
        input_ids: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        real: Tensor | None,
        blocks: Blocks | None,
        cache: Any,
    ) -> Tensor:
        if self.ple is not None:
            x = x + self.ple(x, input_ids, real, cache.embedding if cache is not None else None)
            cache = cache.mixer if cache is not None else None
        u, inject = self.attn_hyper_connection(x)  # (B, T, H), (B, T, n)
        out = self.linear_attn(u, real, cache) if self.linear else self.self_attn(u, rope, mask, blocks, cache)  # (B, T, H)
        x = backend.stream_write(x, out, inject)  # (B, T, n, H)
        u, inject = self.mlp_hyper_connection(x)
        return backend.stream_write(x, self.mlp(u), inject)


class Decoder(nn.Module):
    """Token ids to final hidden states: everything but the output head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.streams = config.hc_count
        self.ratio, self.budget = config.indexer_compress_ratio, config.indexer_budget
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        ple = {layer - 1: index for index, layer in enumerate(config.ple_layer_ids)}
        self.layers = nn.ModuleList(Block(config, kind, ple.get(i)) for i, kind in enumerate(config.layer_types))
        self.hyper_connection_mixer = StreamMixer(config)
        self.rotary_emb = Rotary(config.head_dim, config.rope)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)  # (B, T, H)
        positions, masks = positions_and_masks(x, positions, cache, {None})  # (B or 1, T)
        visible = masks[None]  # (B, 1, T, S), None = causal
        real = None if visible is None else positions >= 0  # (B, T)
        rope = self.rotary_emb(positions, x.dtype)  # cos, sin: (B or 1, T, R)
        keys = positions if cache is None else cache.key_positions(x.shape[1], x.device)  # (B or 1, S)
        blocks = self.blocks(keys, padded=visible is not None, dtype=x.dtype)
        x = x[:, :, None].repeat(1, 1, self.streams, 1)  # (B, T, n, H)
        for i, block in enumerate(self.layers):
            x = block(x, input_ids, rope, visible, real, blocks, cache.layers[i] if cache is not None else None)
        return self.hyper_connection_mixer(x)  # (B, T, H)

    def blocks(self, keys: Tensor, padded: bool, dtype: torch.dtype) -> Blocks | None:
        """The blocks of keys at these positions (B or 1, S); None where every query may read all that is complete."""
        if not self.ratio or keys.shape[1] // self.ratio <= self.budget // self.ratio:
            return None
        starts = (keys < 0).sum(-1) if padded else None  # (B,)
        first = ops.block_starts(keys.shape[1], self.ratio, starts, keys.device)  # (B or 1, P)
        return Blocks(starts, first, self.rotary_emb.tables(keys.gather(1, first), dtype))


class Model(LanguageModel):
    config: Config
    ignored = (r"^model\.visual\.", r"^mtp\.")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Next-token logits of every position.

        Args:
            input_ids: (B, T) int64.
            positions: (B, T) int64, -1 for padding, which must be on the left; None = after the cached tokens.
            cache: from `make_cache`; T new tokens are added to it.
        Returns: (B, T, V) in the model's dtype.
        """
        return self.lm_head(self.model(input_ids, positions, cache))

    def canonical_name(self, name: str) -> str:
        return super().canonical_name(name.replace("model.language_model.", "model.", 1))

    @property
    def constants(self) -> dict[str, Tensor]:
        return {f"{path}.{name}": value for path, module in self.named_modules() if isinstance(module, NGramEmbedding)
                for name, value in module.constants.items()}  # fmt: skip

    def make_cache(self, rewind: int = 0) -> Cache:
        """`rewind`: how many of the last tokens `truncate` can take back; a state is kept for each. See `RecurrentCache`."""
        layers: list[Any] = []
        for i, kind in enumerate(self.config.layer_types):
            layer: Any = RecurrentCache(rewind) if kind == "linear_attention" else IndexedKVCache()
            layers.append(JoinedCache(RecurrentCache(rewind), layer) if i + 1 in self.config.ple_layer_ids else layer)
        return Cache(layers)


TINY = {  # sizes all different, so that a swapped axis cannot hide; few keys are read, so that the choice matters
    "model_type": "qwen4_exp_text",
    "vocab_size": 211,
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 2, 1],
    },
    "full_attention_interval": 3,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 9,
    "linear_key_head_dim": 14,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
    "output_gate_type": "sigmoid",
    "num_experts": 7,
    "num_experts_per_tok": 5,
    "moe_intermediate_size": 36,
    "shared_expert_intermediate_size": 52,
    "hc_count": 3,
    "hc_lowrank": 22,
    "eos_token_id": [13, 5],
    "ple_layer_ids": [2],
    "ple_embed_dim": 32,
    "ple_conv_kernel_size": 5,
    "ngram_size": 3,
    "heads_per_ngram": 4,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 16,
    "split_ngram_parts": 6,
    "indexer_n_heads": 8,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 20,
    "indexer_budget": 6,
    "indexer_compress_ratio": 2,
}
