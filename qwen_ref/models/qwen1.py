"""Qwen 1 (2023): 1.8B, 7B, 14B and 72B, base and chat: model_type `qwen`.

The first generation: one biased projection for q, k and v, as many kv heads as query heads, a SwiGLU whose gate is `w2`,
and rotation in fp32. To read more than it was trained on it stretches the rotary base to fit the prompt (dynamic NTK) and
scales the queries beyond the trained length (logn attention). Qwen Technical Report, arXiv 2309.16609; configuration_qwen.py
and modeling_qwen.py of Qwen/Qwen-7B. transformers has no class for it: the code came with the checkpoints.

**Dynamic NTK and the cache.** alpha belongs to a prompt: it is chosen by the prompt's length, each row of a batch by its
own, when the first token is read, and kept for all that follows; keys in the cache are never rotated again. So reading
T + 1 tokens at once and T tokens, then one, are two computations where T + 1 passes a multiple of the trained length, in
the official code as here. A prompt read in chunks would be judged by its first chunk: `Cache.expect` tells the cache the
whole length first, as `generate` does, and then any chunks compute what one pass does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend, ops
from ..cache import Cache, KVCache
from ..config import Fields, Rope
from ..layers import Linear, RMSNorm, positions_and_masks
from .common import LanguageModel

# What the files call the outer modules, and what every generation of this package calls them.
OUTER_NAMES = {
    "transformer.wte.": "model.embed_tokens.",
    "transformer.h.": "model.layers.",
    "transformer.ln_f.": "model.norm.",
}


@dataclass(frozen=True)
class Config:
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # the SwiGLU's width: half of what config.json calls so
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    seq_length: int  # the trained length, beyond which NTK and logn begin
    use_dynamic_ntk: bool
    use_logn_attn: bool
    tie_word_embeddings: bool

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Config:
        """Read config.json in the spelling of today's files or of the first ones (n_embd, n_layer, ...); absent fields take
        the defaults of configuration_qwen.py. ConfigError on what is wrong.

        `softmax_in_fp32` changes nothing, for the softmax is taken in fp32 either way, as PyTorch's fused kernel does in the
        official code. Its flags of precision and of flash attention choose among kernels and are not read.
        """
        f = Fields(data)
        hidden = f.integer("hidden_size", f.integer("n_embd", 4096))
        heads = f.integer("num_attention_heads", f.integer("n_head", 32))
        width = f.integer("intermediate_size", f.integer("ffn_hidden_size", 22016))
        channels = f.integer("kv_channels", 128)
        if channels * heads != hidden:
            raise f.error("kv_channels", f"is {channels}; {heads} heads of that do not make the hidden size {hidden}")
        if channels % 2 or channels < 4:
            raise f.error("kv_channels", f"is {channels}; rotary embedding with dynamic NTK needs an even one above 2")
        if width % 2:
            raise f.error("intermediate_size", f"is {width}; the two projections share it, so it must be even")
        theta = f.positive("rotary_emb_base", 10_000.0)
        if theta <= 1:
            raise f.error("rotary_emb_base", f"is {theta}, which must be above 1")
        f.choice("activation", ("swiglu",), "swiglu")
        f.choice("pos_emb", ("rotary",), "rotary")
        f.refuse("use_cache_quantization", "apply_residual_connection_post_layernorm", "visual", "audio")
        for name, only in (("no_bias", True), ("scale_attn_weights", True)):
            if f.flag(name, only) is not only:
                raise f.error(name, f"is {not only}, which is not implemented")
        for name in ("rotary_pct", "seq_length_expansion"):
            if f.positive(name, 1.0) != 1.0:
                raise f.error(name, "is not 1, which is not implemented")
        return cls(
            model_type=f.choice("model_type", ("qwen",)),
            vocab_size=f.integer("vocab_size", 151936),
            hidden_size=hidden,
            intermediate_size=width // 2,
            num_hidden_layers=f.integer("num_hidden_layers", f.integer("n_layer", 32, high=4096), high=4096),
            num_attention_heads=heads,
            head_dim=channels,
            max_position_embeddings=f.integer("max_position_embeddings", f.integer("n_positions", 8192, high=1 << 40),
                                              high=1 << 40),
            rms_norm_eps=f.positive("layer_norm_epsilon", 1e-6),
            rope=Rope(theta),
            seq_length=f.integer("seq_length", low=2, high=1 << 40),
            use_dynamic_ntk=f.flag("use_dynamic_ntk", True),
            use_logn_attn=f.flag("use_logn_attn", True),
            tie_word_embeddings=f.flag("tie_word_embeddings", False),
        )  # fmt: skip

    num_experts = num_experts_per_tok = 0

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def windows(self) -> list[None]:
        """The sliding window of each layer: all have full attention."""
        return [None] * self.num_hidden_layers

    def to_json(self) -> dict[str, Any]:
        """config.json as the official files spell it today, without the `auto_map` to code that is not written with it."""
        return {
            "architectures": ["QWenLMHeadModel"],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": 2 * self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "kv_channels": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "layer_norm_epsilon": self.rms_norm_eps,
            "rotary_emb_base": self.rope.theta,
            "rotary_pct": 1.0,
            "seq_length": self.seq_length,
            "use_dynamic_ntk": self.use_dynamic_ntk,
            "use_logn_attn": self.use_logn_attn,
            "no_bias": True,
            "scale_attn_weights": True,
            "tie_word_embeddings": self.tie_word_embeddings,
        }


class NtkRotary(nn.Module):
    """cos and sin tables whose base fits the length of the prompt."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope.theta
        self.trained = config.seq_length if config.use_dynamic_ntk else None

    def forward(self, positions: Tensor, dtype: torch.dtype, cache: NtkCache | None) -> tuple[Tensor, Tensor]:
        """(B or 1, T) -> 2 x (B or 1, T, D), in fp32 whatever the activations' dtype (fp64 for fp64)."""
        if cache is None:
            frequencies = self.of_lengths(self.lengths(positions), positions.device)
        elif cache.frequencies is None:
            lengths = self.lengths(positions) if cache.expected is None else cache.expected
            frequencies = cache.frequencies = self.of_lengths(lengths, positions.device)
        else:
            frequencies = cache.frequencies
        return ops.rope_tables(positions, frequencies[:, None], 1.0, ops.at_least_fp32(dtype))

    def lengths(self, positions: Tensor) -> list[int]:
        """Of every row, padding not counted. Without NTK nothing depends on it, and the device is not asked."""
        return [1] if self.trained is None else (positions.amax(-1) + 1).clamp_min(1).tolist()

    def of_lengths(self, lengths: list[int], device: torch.device) -> Tensor:
        """(B or 1, D/2) fp32: the frequencies of prompts of these lengths."""
        alphas = [1] if self.trained is None else [ops.ntk_alpha(length, self.trained) for length in lengths]
        bases = [self.theta * alpha ** (self.head_dim / (self.head_dim - 2)) for alpha in alphas]
        return torch.stack([ops.rope_frequencies(self.head_dim, base) for base in bases]).to(device)


class NtkCache(Cache):
    """Keys and values, and the frequencies (B or 1, D/2) they were rotated with, which the prompt's length has chosen."""

    def __init__(self, layers: list[KVCache], rotary: NtkRotary) -> None:
        super().__init__(layers)
        self.frequencies: Tensor | None = None  # until the first token is read
        self._rotary = rotary

    def reachable(self, length: int) -> int:
        """Nothing where a prompt is expected whose length asks for other frequencies: none of the keys can serve it."""
        if self.expected is not None and self.frequencies is not None:
            wanted = self._rotary.of_lengths(self.expected, self.frequencies.device)
            if not bool((self.frequencies == wanted).all()):
                return 0
        return super().reachable(length)

    def truncate(self, length: int) -> None:
        super().truncate(length)
        if length == 0:
            self.frequencies = None

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        if self.frequencies is not None and len(self.frequencies) > 1:
            self.frequencies = self.frequencies[rows]


class Attention(nn.Module):
    """Multi-head attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.c_attn = Linear(config.hidden_size, 3 * config.hidden_size, bias=True)  # rows of q, then k, then v
        self.c_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], logn: Tensor | None, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)  # x (B, T, H)
        q, k, v = (part.reshape(heads).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))  # (B, N, T, D) each
        q, k = rotate(q, *rope), rotate(k, *rope)
        if logn is not None:
            q = q * logn
        if cache is not None:
            k, v = cache.append(k, v)  # (B, N, S, D)
        out = backend.attention(q, k, v, mask)  # (B, N, T, D)
        return self.c_proj(out.transpose(1, 2).flatten(2))  # (B, T, H)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`ops.rope` in the tables' precision, fp32 at least, and rounded once: (B, N, T, D) -> (B, N, T, D) in x's dtype."""
    return backend.rope(x.to(cos.dtype), cos, sin).to(x.dtype)


class MLP(nn.Module):
    """SwiGLU feed-forward: c_proj(w1(x) * silu(w2(x))). Here the second projection is the gate."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.w1 = Linear(hidden, intermediate, bias=False)
        self.w2 = Linear(hidden, intermediate, bias=False)
        self.c_proj = Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., H) -> (..., H)
        return self.c_proj(backend.swiglu(self.w2(x), self.w1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.ln_2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], logn: Tensor | None, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), rope, logn, mask, cache)  # (B, T, H)
        return x + self.mlp(self.ln_2(x))  # (B, T, H)


class Decoder(nn.Module):
    """Token ids to final hidden states: everything but the output head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = NtkRotary(config)
        self.logn_length = config.seq_length if config.use_logn_attn else None

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, cache: NtkCache | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)  # (B, T, H)
        positions, masks = positions_and_masks(x, positions, cache, {None})  # (B or 1, T)
        rope = self.rotary_emb(positions, x.dtype, cache)  # cos, sin: (B or 1, T, D)
        logn = None if self.logn_length is None else ops.logn_scale(positions, self.logn_length, x.dtype)  # (B or 1, 1, T, 1)
        for i, block in enumerate(self.layers):
            x = block(x, rope, logn, masks[None], cache.layers[i] if cache is not None else None)
        return self.norm(x)  # (B, T, H)


class Model(LanguageModel):
    config: Config
    # Buffers that the first files hold and the official code skips too.
    ignored = (r"\.attn\.masked_bias$", r"(^|\.)rotary_emb\.inv_freq$")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, cache: NtkCache | None = None) -> Tensor:
        """Next-token logits of every position.

        Args:
            input_ids: (B, T) int64.
            positions: (B, T) int64, -1 for padding, which must be on the left; None = after the cached tokens. The official
                code knows no positions: there padding on the left shifts them, here a padded row equals the row alone.
            cache: from `make_cache`; T new tokens are added to it.
        Returns: (B, T, V) in the model's dtype.
        """
        return self.lm_head(self.model(input_ids, positions, cache))

    def make_cache(self, rewind: int = 0) -> NtkCache:
        return NtkCache([KVCache() for _ in self.model.layers], self.model.rotary_emb)

    def canonical_name(self, name: str) -> str:
        return next((ours + name.removeprefix(disk) for disk, ours in OUTER_NAMES.items() if name.startswith(disk)), name)

    def disk_name(self, name: str) -> str:
        return next((disk + name.removeprefix(ours) for disk, ours in OUTER_NAMES.items() if name.startswith(ours)), name)


TINY = {  # sizes all different, so that a swapped axis cannot hide
    "model_type": "qwen",
    "vocab_size": 211,
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "kv_channels": 16,
    "max_position_embeddings": 512,
    "seq_length": 64,
}
