"""Qwen3-Next (2025): model_type `qwen3_next`. Qwen3-Next-80B-A3B, Qwen3-Coder-Next.

From Qwen3: in three of four layers attention is replaced by a Gated DeltaNet, whose memory is one matrix per head however
long the text is. The full attention that remains has heads of 256, rotates a quarter of each, and gates its output. All
norms are zero-centred (1 + weight). The experts are smaller and more (512, ten per token), and a shared one is back. A
draft layer (MTP) predicts the token after next. Gated Delta Networks, arXiv 2412.06464; Gated Attention, arXiv 2505.06708;
config.json of Qwen/Qwen3-Coder-Next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend, ops
from ..cache import Cache, KVCache, RecurrentCache
from ..config import Fields, Rope, hybrid_types, mixture, sparse_layers
from ..layers import (
    MLP,
    CausalConv1d,
    Experts,
    GatedRMSNorm,
    Linear,
    MultiTokenPrediction,
    Rotary,
    ZeroCentredRMSNorm,
    positions_and_masks,
)
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
    layer_types: tuple[str, ...]
    # Gated DeltaNet
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    # mixture of experts
    sparse_layers: tuple[bool, ...]
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Config:
        """Read config.json; absent fields take the class defaults of transformers. ConfigError on what is wrong."""
        f = Fields(data)
        f.choice("hidden_act", ("silu",), "silu")
        f.refuse("use_sliding_window")
        layers = f.integer("num_hidden_layers", 48, high=4096)
        max_position = f.integer("max_position_embeddings", 32768, high=1 << 40)
        experts, top_k = mixture(f, layers, 512, 10)
        config = cls(
            model_type=f.choice("model_type", ("qwen3_next",)),
            vocab_size=f.integer("vocab_size", 151936),
            hidden_size=f.integer("hidden_size", 2048),
            intermediate_size=f.integer("intermediate_size", 5632),
            num_hidden_layers=layers,
            num_attention_heads=f.integer("num_attention_heads", 16),
            num_key_value_heads=f.integer("num_key_value_heads", 2),
            head_dim=f.integer("head_dim", 256),
            max_position_embeddings=max_position,
            rms_norm_eps=f.positive("rms_norm_eps", 1e-6),
            rope=Rope.from_json(f, max_position, default_share=0.25),
            attention_bias=f.flag("attention_bias", False),
            tie_word_embeddings=f.flag("tie_word_embeddings", False),
            layer_types=hybrid_types(f, layers),
            linear_num_key_heads=f.integer("linear_num_key_heads", 16),
            linear_num_value_heads=f.integer("linear_num_value_heads", 32),
            linear_key_head_dim=f.integer("linear_key_head_dim", 128),
            linear_value_head_dim=f.integer("linear_value_head_dim", 128),
            linear_conv_kernel_dim=f.integer("linear_conv_kernel_dim", 4),
            sparse_layers=sparse_layers(f, layers),
            num_experts=experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=f.integer("moe_intermediate_size", 512),
            shared_expert_intermediate_size=f.integer("shared_expert_intermediate_size", 512),
            norm_topk_prob=f.flag("norm_topk_prob", True),
        )
        f.divides("num_key_value_heads", config.num_key_value_heads, config.num_attention_heads)
        f.divides("linear_num_key_heads", config.linear_num_key_heads, config.linear_num_value_heads)
        if (width := config.rope.width(config.head_dim)) % 2 or not width:
            raise f.error("partial_rotary_factor", f"rotates {width} of {config.head_dim} numbers; it must be an even count")
        return config

    @property
    def windows(self) -> list[int | None]:
        """The sliding window of each layer that keeps keys; None = full attention."""
        return [None for kind in self.layer_types if kind == "full_attention"]

    def to_json(self) -> dict[str, Any]:
        """config.json as the official files spell it, readable by transformers."""
        return {
            "architectures": ["Qwen3NextForCausalLM"],
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
            "partial_rotary_factor": self.rope.share,
            "attention_bias": self.attention_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "layer_types": list(self.layer_types),
            "linear_num_key_heads": self.linear_num_key_heads,
            "linear_num_value_heads": self.linear_num_value_heads,
            "linear_key_head_dim": self.linear_key_head_dim,
            "linear_value_head_dim": self.linear_value_head_dim,
            "linear_conv_kernel_dim": self.linear_conv_kernel_dim,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, sparse in enumerate(self.sparse_layers) if not sparse],
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "moe_intermediate_size": self.moe_intermediate_size,
            "shared_expert_intermediate_size": self.shared_expert_intermediate_size,
            "norm_topk_prob": self.norm_topk_prob,
        }


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys, partly rotated, whose output passes a sigmoid gate."""

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

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)  # x (B, T, H)
        q, gate = self.q_proj(x).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)  # (B, T, N, D) each
        q = self.q_norm(q).transpose(1, 2)  # (B, N, T, D)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, K, T, D)
        q, k = backend.rope(q, *rope), backend.rope(k, *rope)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, D)
        out = backend.attention(q, k, v, mask).transpose(1, 2)  # (B, T, N, D)
        return self.o_proj((out * torch.sigmoid(gate)).flatten(2))  # (B, T, H)


class GatedDeltaNet(nn.Module):
    """Linear attention by the gated delta rule: `ops.gated_delta_rule`, behind a short convolution of q, k and v.

    Letters: G key heads, P value heads, r = P / G, Dk and Dv their dimensions, C = 2 G Dk + P Dv channels.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, groups, heads = config.hidden_size, config.linear_num_key_heads, config.linear_num_value_heads
        key, value = config.linear_key_head_dim, config.linear_value_head_dim
        self.groups, self.key_dim, self.value_dim = groups, key, value
        self.parts = (groups * key, groups * key, heads * value)  # channels of q, k and v
        # The rows of both belong to the key heads, one after the other: q, k, r v, r z; and r b, r a.
        self.in_proj_qkvz = Linear(hidden, 2 * groups * key + 2 * heads * value, bias=False)
        self.in_proj_ba = Linear(hidden, 2 * heads, bias=False)
        self.conv1d = CausalConv1d(sum(self.parts), config.linear_conv_kernel_dim)
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.norm = GatedRMSNorm(value, config.rms_norm_eps)
        self.out_proj = Linear(heads * value, hidden, bias=False)

    def forward(self, x: Tensor, real: Tensor | None, cache: RecurrentCache | None) -> Tensor:
        if real is not None:
            x = x * real[..., None]  # (B, T, H): padding brings nothing into the convolution and the state
        cache = RecurrentCache() if cache is None else cache
        mixed, z, b, a = self.project(x)
        g, beta = ops.delta_gates(a, b, self.A_log, self.dt_bias)  # (B, T, P) each
        outs = []
        for t in cache.pieces(x.shape[1]):  # one piece, unless the last states are to be come back to
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
        """q|k|v (B, T, C), z (B, T, P, Dv), and b and a (B, T, P), out of the rows that each key head has together."""
        return self.arrange(self.in_proj_qkvz(x), self.in_proj_ba(x))

    def arrange(self, qkvz: Tensor, ba: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of what the two projections give, which is put in order and nothing else."""
        q, k, v, z = qkvz.unflatten(-1, (self.groups, -1)).split(
            [self.key_dim, self.key_dim, self.parts[2] // self.groups, self.parts[2] // self.groups], dim=-1
        )  # (B, T, G, Dk) twice, (B, T, G, r Dv) twice
        b, a = ba.unflatten(-1, (self.groups, -1)).chunk(2, dim=-1)  # (B, T, G, r) each
        mixed = torch.cat((q.flatten(2), k.flatten(2), v.flatten(2)), dim=-1)
        return mixed, z.flatten(2).unflatten(-1, (-1, self.value_dim)), b.flatten(2), a.flatten(2)


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
    """x + mixer(norm(x)), then x + feed_forward(norm(x)); the mixer is attention or a Gated DeltaNet."""

    def __init__(self, config: Config, kind: str, sparse: bool) -> None:
        super().__init__()
        self.input_layernorm = ZeroCentredRMSNorm(config.hidden_size, config.rms_norm_eps)
        if kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = Attention(config)
        self.linear = kind == "linear_attention"
        self.post_attention_layernorm = ZeroCentredRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMoE(config) if sparse else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        normed = self.input_layernorm(x)  # (B, T, H)
        x = x + (self.linear_attn(normed, mask, cache) if self.linear else self.self_attn(normed, rope, mask, cache))
        return x + self.mlp(self.post_attention_layernorm(x))  # (B, T, H)


class Decoder(nn.Module):
    """Token ids to final hidden states: everything but the output head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        kinds = zip(config.layer_types, config.sparse_layers, strict=True)
        self.layers = nn.ModuleList(Block(config, kind, sparse) for kind, sparse in kinds)
        self.norm = ZeroCentredRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Rotary(config.head_dim, config.rope)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)  # (B, T, H)
        positions, masks = positions_and_masks(x, positions, cache, {None})  # (B or 1, T)
        visible = masks[None]  # (B, 1, T, S), None = causal
        real = None if visible is None else positions >= 0  # (B, T)
        rope = self.rotary_emb(positions, x.dtype)  # cos, sin: (B or 1, T, R)
        for i, block in enumerate(self.layers):
            x = block(x, rope, real if block.linear else visible, cache.layers[i] if cache is not None else None)
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
        """`rewind`: how many of the last tokens `truncate` can take back; a state is kept for each. See `RecurrentCache`."""
        return Cache([RecurrentCache(rewind) if kind == "linear_attention" else KVCache() for kind in self.config.layer_types])

    def make_mtp(self) -> MultiTokenPrediction:
        config = self.config
        return MultiTokenPrediction(config.hidden_size, config.rms_norm_eps, Block(config, "full_attention", sparse=True))


TINY = {  # sizes all different, so that a swapped axis cannot hide
    "model_type": "qwen3_next",
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 3,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 9,
    "linear_key_head_dim": 14,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
    "num_experts": 7,
    "num_experts_per_tok": 5,
    "moe_intermediate_size": 36,
    "shared_expert_intermediate_size": 52,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
