"""Qwen3 (2025), dense and mixture of experts: model_type `qwen3` and `qwen3_moe`.

From Qwen2: queries and keys are normalised per head before the rotation (q_norm, k_norm); no bias on q, k, v; the head
dimension is a number of its own, so heads * head_dim need not be the hidden size. The MoE has no shared expert and
renormalises the top-k weights. Qwen3 Technical Report, arXiv 2505.09388; config.json of Qwen/Qwen3-0.6B and 30B-A3B.
Qwen3-Embedding and Qwen3-Reranker are this model read in another way: see `retrieval.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .. import backend
from ..cache import Cache, KVCache, SlidingKVCache
from ..config import Fields, Rope, layer_types, mixture, sparse_layers
from ..layers import MLP, Experts, Linear, RMSNorm, Rotary, positions_and_masks
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
    attention_bias: bool
    tie_word_embeddings: bool
    sliding_window: int | None
    layer_types: tuple[str, ...]
    # mixture of experts; all layers dense in `qwen3`
    sparse_layers: tuple[bool, ...]
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Config:
        """Read config.json; absent fields take the class defaults of transformers. ConfigError on what is wrong."""
        f = Fields(data)
        model_type = f.choice("model_type", ("qwen3", "qwen3_moe"))
        moe = model_type == "qwen3_moe"
        f.choice("hidden_act", ("silu",), "silu")
        f.refuse("dual_chunk_attention_config")  # of the config_1m.json beside the config.json of the 2507 releases
        hidden = f.integer("hidden_size", 2048 if moe else 4096)
        layers = f.integer("num_hidden_layers", 24 if moe else 32, high=4096)
        heads = f.integer("num_attention_heads", 32)
        kv_heads = heads if f.is_null("num_key_value_heads") else f.integer("num_key_value_heads", 4 if moe else 32)
        head_dim = f.integer("head_dim", hidden // heads if moe else 128)
        if heads % kv_heads:
            raise f.error("num_key_value_heads", f"is {kv_heads}, which does not divide the {heads} query heads")
        if head_dim % 2:
            raise f.error("head_dim", f"is {head_dim}; rotary embedding needs an even one")
        default = f.integer("num_local_experts", 128)  # as Mixtral calls it; transformers reads either
        experts, top_k = mixture(f, layers, default, 8) if moe else (0, 0)
        windowed = f.flag("use_sliding_window", False) and not f.is_null("sliding_window")
        window = f.integer("sliding_window", 4096) if windowed else None
        max_window_layers = 0 if moe else f.integer("max_window_layers", 28, low=0)  # the MoE slides in every layer
        slides = [window is not None and i >= max_window_layers for i in range(layers)]
        types = ["sliding_attention" if s else "full_attention" for s in slides]
        if not moe:
            types = list(layer_types(f, layers, types))
        if window is None and "sliding_attention" in types:
            raise f.error("layer_types", "holds sliding_attention, but use_sliding_window is not set")
        max_position = f.integer("max_position_embeddings", 32768, high=1 << 40)
        return cls(
            model_type=model_type,
            vocab_size=f.integer("vocab_size", 151936),
            hidden_size=hidden,
            intermediate_size=f.integer("intermediate_size", 6144 if moe else 22016),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position,
            rms_norm_eps=f.positive("rms_norm_eps", 1e-6),
            rope=Rope.from_json(f, max_position),
            attention_bias=f.flag("attention_bias", False),
            tie_word_embeddings=f.flag("tie_word_embeddings", False),
            sliding_window=window,
            layer_types=tuple(types),
            sparse_layers=sparse_layers(f, layers) if moe else (False,) * layers,
            num_experts=experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=f.integer("moe_intermediate_size", 768) if moe else 0,
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
            "norm_topk_prob": self.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, sparse in enumerate(self.sparse_layers) if not sparse],
        }
        return {
            "architectures": ["Qwen3MoeForCausalLM" if self.num_experts else "Qwen3ForCausalLM"],
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
            "attention_bias": self.attention_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_sliding_window": self.sliding_window is not None,
            "sliding_window": self.sliding_window,
            **({} if self.num_experts else {"layer_types": list(self.layer_types)}),
            **(moe if self.num_experts else {}),
        }


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = dim
        self.q_proj = Linear(hidden, config.num_attention_heads * dim, bias=bias)
        self.k_proj = Linear(hidden, config.num_key_value_heads * dim, bias=bias)
        self.v_proj = Linear(hidden, config.num_key_value_heads * dim, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * dim, hidden, bias=bias)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)  # one weight for all heads
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)  # x (B, T, H)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)  # (B, N, T, D)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(shape).transpose(1, 2)  # (B, K, T, D)
        q, k = backend.rope(q, *rope), backend.rope(k, *rope)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, D)
        out = backend.attention(q, k, v, mask)  # (B, N, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, H)


class SparseMoE(nn.Module):
    """k of E feed-forwards per token, mixed by the router's probabilities."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.top_k, self.normalize = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (M, H)
        weights, experts = backend.router_topk(self.gate(tokens), self.top_k, self.normalize)  # (M, k) each
        return self.experts(tokens, weights, experts).view_as(x)  # (B, T, H)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
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


class Model(LanguageModel):
    config: Config

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

    def make_cache(self, rewind: int = 0) -> Cache:
        return Cache([KVCache() if w is None else SlidingKVCache(w) for w in self.config.windows])


TINY = {  # sizes all different, so that a swapped axis cannot hide
    "model_type": "qwen3",
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}

TINY_MOE = {
    **TINY,
    "model_type": "qwen3_moe",
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 36,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
