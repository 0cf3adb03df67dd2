"""Qwen1.5, Qwen2 and Qwen2.5 (2024), dense and mixture of experts: model_type `qwen2` and `qwen2_moe`.

From Qwen 1: separate q, k, v projections with bias, grouped kv heads, a SwiGLU of three plain projections, and optional
sliding windows and YaRN. Qwen2.5-1M (2025) reads a million tokens by dual chunk attention. The MoE adds to its routed
experts a shared one behind a sigmoid gate and does not renormalise the top-k weights. Qwen2 Technical Report, arXiv
2407.10671; Qwen2.5-1M Technical Report, arXiv 2501.15383; config.json of Qwen/Qwen2.5-7B and Qwen/Qwen1.5-MoE-A2.7B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend, ops
from ..cache import Cache, KVCache, SlidingKVCache
from ..config import DualChunk, Fields, Rope, layer_types, mixture, sparse_layers
from ..layers import MLP, Experts, Linear, RMSNorm, Rotary, note_positions, positions_and_masks
from .common import LanguageModel


@dataclass(frozen=True)
class Config:
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    qkv_bias: bool
    tie_word_embeddings: bool
    sliding_window: int | None
    layer_types: tuple[str, ...]
    dual_chunk: DualChunk | None
    # mixture of experts; all layers dense in `qwen2`
    sparse_layers: tuple[bool, ...]
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Config:
        """Read config.json; absent fields take the class defaults of transformers. ConfigError on what is wrong."""
        f = Fields(data)
        model_type = f.choice("model_type", ("qwen2", "qwen2_moe"))
        moe = model_type == "qwen2_moe"
        f.choice("hidden_act", ("silu",), "silu")
        hidden = f.integer("hidden_size", 2048 if moe else 4096)
        layers = f.integer("num_hidden_layers", 24 if moe else 32, high=4096)
        heads = f.integer("num_attention_heads", 16 if moe else 32)
        kv_heads = heads if f.is_null("num_key_value_heads") else f.integer("num_key_value_heads", 16 if moe else 32)
        head_dim = f.integer("head_dim", hidden // heads)
        if heads % kv_heads:
            raise f.error("num_key_value_heads", f"is {kv_heads}, which does not divide the {heads} query heads")
        if head_dim % 2:
            raise f.error("head_dim", f"is {head_dim}; rotary embedding needs an even one")
        experts, top_k = mixture(f, layers, 60, 4) if moe else (0, 0)
        windowed = f.flag("use_sliding_window", False) and not f.is_null("sliding_window")
        window = f.integer("sliding_window", 4096) if windowed else None
        border = f.integer("max_window_layers", 28, low=0)
        # The dense model slides from layer `max_window_layers` on, the MoE in every second layer below it.
        slides = [window is not None and (i < border and i % 2 == 0 if moe else i >= border) for i in range(layers)]
        types = layer_types(f, layers, ["sliding_attention" if s else "full_attention" for s in slides])
        if window is None and "sliding_attention" in types:
            raise f.error("layer_types", "holds sliding_attention, but use_sliding_window is not set")
        max_position = f.integer("max_position_embeddings", 32768, high=1 << 40)
        rope, dual_chunk = Rope.from_json(f, max_position), DualChunk.from_json(f)
        if dual_chunk is not None and (window is not None or rope.factor is not None):
            raise f.error("dual_chunk_attention_config", "is set beside YaRN or a sliding window, which is not implemented")
        return cls(
            model_type=model_type,
            vocab_size=f.integer("vocab_size", 151936),
            hidden_size=hidden,
            intermediate_size=f.integer("intermediate_size", 5632 if moe else 22016),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position,
            rms_norm_eps=f.positive("rms_norm_eps", 1e-6),
            rope=rope,
            qkv_bias=f.flag("qkv_bias", True) if moe else True,
            tie_word_embeddings=f.flag("tie_word_embeddings", False),
            sliding_window=window,
            layer_types=types,
            dual_chunk=dual_chunk,
            sparse_layers=sparse_layers(f, layers) if moe else (False,) * layers,
            num_experts=experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=f.integer("moe_intermediate_size", 1408) if moe else 0,
            shared_expert_intermediate_size=f.integer("shared_expert_intermediate_size", 5632) if moe else 0,
            norm_topk_prob=f.flag("norm_topk_prob", False) if moe else False,
        )

    @property
    def windows(self) -> list[int | None]:
        """The sliding window of each layer; None = full attention."""
        return [self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types]

    def to_json(self) -> dict[str, Any]:
        """config.json as the official files spell it, readable by transformers."""
        moe = {
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "moe_intermediate_size": self.moe_intermediate_size,
            "shared_expert_intermediate_size": self.shared_expert_intermediate_size,
            "qkv_bias": self.qkv_bias,
            "norm_topk_prob": self.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, sparse in enumerate(self.sparse_layers) if not sparse],
        }
        return {
            "architectures": ["Qwen2MoeForCausalLM" if self.num_experts else "Qwen2ForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            **self.rope.to_json(),
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_sliding_window": self.sliding_window is not None,
            "sliding_window": self.sliding_window,
            "layer_types": list(self.layer_types),
            **({"dual_chunk_attention_config": self.dual_chunk.to_json()} if self.dual_chunk else {}),
            **(moe if self.num_experts else {}),
        }


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, dim, bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.head_dim = dim
        self.q_proj = Linear(hidden, config.num_attention_heads * dim, bias=bias)
        self.k_proj = Linear(hidden, config.num_key_value_heads * dim, bias=bias)
        self.v_proj = Linear(hidden, config.num_key_value_heads * dim, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * dim, hidden, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)  # x (B, T, H)
        q = self.q_proj(x).view(shape).transpose(1, 2)  # (B, N, T, D)
        k = self.k_proj(x).view(shape).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(shape).transpose(1, 2)  # (B, K, T, D)
        q, k = backend.rope(q, *rope), backend.rope(k, *rope)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, D)
        out = backend.attention(q, k, v, mask)  # (B, N, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, H)


@dataclass(frozen=True)
class ChunkedRope:
    """What the layers of a pass need for dual chunk attention."""

    own: tuple[Tensor, Tensor]  # cos, sin at the place inside the chunk, for keys too: (B or 1, T, D)
    before: tuple[Tensor, Tensor]  # for keys of the chunk before, then of earlier ones: (B or 1, 2T, D)
    positions: Tensor  # of the queries, (B or 1, T)
    keys: Tensor  # positions of all keys, (B or 1, S)
    span: int
    scale: Tensor  # (B or 1,)


class DualChunkAttention(Attention):
    """Grouped-query attention over contexts longer than the rotation was trained on: `ops.dual_chunk`."""

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | ChunkedRope, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        if not isinstance(rope, ChunkedRope):  # there is one chunk yet
            return super().forward(x, rope, mask, cache)
        shape = (*x.shape[:2], -1, self.head_dim)  # x (B, T, H)
        q = self.q_proj(x).view(shape).transpose(1, 2)  # (B, N, T, D)
        k = self.k_proj(x).view(shape).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(shape).transpose(1, 2)  # (B, K, T, D)
        own, k = backend.rope(q, *rope.own), backend.rope(k, *rope.own)
        before = backend.rope(q.repeat(1, 1, 2, 1), *rope.before)  # (B, N, 2T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, D)
        q = torch.stack((own, *before.chunk(2, dim=2)), dim=2)  # (B, N, 3, T, D)
        out = backend.dual_chunk_attention(q, k, v, rope.positions, rope.keys, rope.span, rope.scale)  # (B, N, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, H)


class SparseMoE(nn.Module):
    """k of E feed-forwards per token, mixed by the router's probabilities, plus one that every token takes."""

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
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DualChunkAttention(config) if config.dual_chunk else Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        sparse = config.sparse_layers[layer]
        self.mlp = SparseMoE(config) if sparse else MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)  # (B, T, H)
        return x + self.mlp(self.post_attention_layernorm(x))  # (B, T, H)


class Decoder(nn.Module):
    """Token ids to final hidden states: everything but the output head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Rotary(config.head_dim, config.rope)
        self.windows = config.windows

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)  # (B, T, H)
        positions, masks = positions_and_masks(x, positions, cache, set(self.windows))  # (B or 1, T)
        rope = self.rotary_emb(positions, x.dtype)  # cos, sin: (B or 1, T, D)
        for i, block in enumerate(self.layers):
            x = block(x, rope, masks[self.windows[i]], cache.layers[i] if cache is not None else None)
        return self.norm(x)  # (B, T, H)


class ScaledCache(Cache):
    """Keys and values, and the scale of scores each token was read with (B or 1, S): what follows a token depends on it."""

    def __init__(self, layers: list[KVCache], original_context: int) -> None:
        super().__init__(layers)
        self.original_context = original_context
        self.scales: Tensor | None = None  # until the first token is read

    def note(self, scale: Tensor, count: int) -> None:
        """`count` tokens are about to be read with this scale, (B or 1,)."""
        held = scale.new_empty(1, 0) if self.scales is None else self.scales[:, : self.length]
        rows = max(len(held), len(scale))
        self.scales = torch.cat((held.expand(rows, -1), scale[:, None].expand(rows, count)), dim=1)

    def reachable(self, length: int) -> int:
        """Where a prompt is expected, only tokens that were read with the scale they have in it, or behind it one by one."""
        if length and self.expected is not None and self.scales is not None:
            positions = self.key_positions(0, self.scales.device)  # (B or 1, S)
            lengths = torch.tensor(self.expected, device=self.scales.device)[:, None].maximum(positions + 1)
            same = (self.scales[:, : self.length] == ops.length_scale(lengths, self.original_context)).all(0)  # (S,)
            length = min(length, int(same.long().cumprod(0).sum()))
        return super().reachable(length)

    def truncate(self, length: int) -> None:
        super().truncate(length)
        if length == 0:
            self.scales = None

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        if self.scales is not None and len(self.scales) > 1:
            self.scales = self.scales[rows]


class DualChunkDecoder(Decoder):
    """The decoder of Qwen2.5-1M: plain attention within the first chunk and the original context, then dual chunk attention.

    Scores grow with the sequence's length T (`ops.length_scale`), which is the prompt's as far as it was announced
    (`Cache.expect`, as `generate` does) and otherwise the number of tokens read so far. So once T is beyond the original
    context, T + 1 tokens at once, and T tokens, then one, are two computations: in the first, earlier queries have the
    larger scale too. Keys are cached without it, and all of them get the one of the pass that reads them. (Engines scale
    a key when they store it and leave it so: while decoding, older keys keep the prompt's.)
    """

    def __init__(self, config: Config, chunks: DualChunk) -> None:
        super().__init__(config)
        self.chunks = chunks

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, cache: Any = None) -> Tensor:  # a ScaledCache
        if self._is_plain(input_ids, positions, cache):
            if cache is not None:
                cache.note(torch.ones(1, device=input_ids.device), input_ids.shape[1])
            return super().forward(input_ids, positions, cache)
        x = self.embed_tokens(input_ids)  # (B, T, H)
        positions, keys, _ = note_positions(x, positions, cache)  # (B or 1, T), (B or 1, S)
        rope = self._chunked_rope(positions, keys, x.dtype, cache)
        if cache is not None:
            cache.note(rope.scale, x.shape[1])
        for i, block in enumerate(self.layers):
            x = block(x, rope, None, cache.layers[i] if cache is not None else None)
        return self.norm(x)  # (B, T, H)

    def _is_plain(self, input_ids: Tensor, positions: Tensor | None, cache: Cache | None) -> bool:
        """Whether all tokens so far are one chunk, and not scaled."""
        end = input_ids.shape[1] + (cache.length if cache is not None else 0)
        if positions is not None:
            end = max(end, int(positions.max()) + 1)
        announced = max(cache.expected) if cache is not None and cache.expected else 0
        return end <= self.chunks.span and max(end, announced) <= (self.chunks.original_context or math.inf)

    def _chunked_rope(self, positions: Tensor, keys: Tensor, dtype: torch.dtype, cache: Cache | None) -> ChunkedRope:
        c = self.chunks
        own, *before = ops.dual_chunk_positions(positions, c.chunk, c.local).unbind(1)
        lengths = positions.amax(-1) + 1  # (B or 1,)
        if cache is not None and cache.expected:
            lengths = lengths.maximum(torch.tensor(cache.expected, device=lengths.device))
        return ChunkedRope(self.rotary_emb(own, dtype), self.rotary_emb(torch.cat(before, 1), dtype), positions, keys, c.span,
                           ops.length_scale(lengths, c.original_context))


class Model(LanguageModel):
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.model = DualChunkDecoder(config, config.dual_chunk) if config.dual_chunk else Decoder(config)
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

    def make_cache(self, rewind: int = 0) -> Cache:
        if self.config.dual_chunk:
            return ScaledCache([KVCache() for _ in self.model.layers], self.config.dual_chunk.original_context)
        return Cache([KVCache() if w is None else SlidingKVCache(w) for w in self.config.windows])


TINY = {  # sizes all different, so that a swapped axis cannot hide
    "model_type": "qwen2",
    "vocab_size": 211,
    "hidden_size": 96,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}

TINY_1M = {  # chunks of 8 tokens
    **TINY,
    "dual_chunk_attention_config": {"chunk_size": 11, "local_size": 3, "original_max_position_embeddings": 13},
}

TINY_MOE = {
    **TINY,
    "model_type": "qwen2_moe",
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 36,
    "shared_expert_intermediate_size": 52,
    "mlp_only_layers": [1],
}
