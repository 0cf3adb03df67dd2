"""The sizes of the official models, so that real shapes need no download. Values of each model's config.json."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RequestError


@dataclass(frozen=True)
class Sizes:
    """Letters of `ops`: hidden H, intermediate I (of one expert in a mixture), heads N, kv_heads K, head_dim D; of a Gated
    DeltaNet key_heads G, value_heads P, key_dim Dk, value_dim Dv and the width of its convolution; of Qwen4-Exp the residual
    streams n, and its indexer's heads h, dimension d, tokens a block and tokens a query may choose."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    experts: int = 0
    top_k: int = 0
    eps: float = 1e-6
    key_heads: int = 16
    value_heads: int = 0  # 0: it has no Gated DeltaNet
    key_dim: int = 128
    value_dim: int = 128
    conv: int = 4
    streams: int = 0  # 0: one stream, and attention that reads everything
    index_heads: int = 4
    index_dim: int = 128
    ratio: int = 4
    budget: int = 2048


MODELS = {
    "Qwen/Qwen1.5-MoE-A2.7B": Sizes(2048, 1408, 16, 16, experts=60, top_k=4),
    "Qwen/Qwen2.5-0.5B": Sizes(896, 4864, 14, 2, 64),
    "Qwen/Qwen3-0.6B": Sizes(1024, 3072, 16, 8),
    "Qwen/Qwen3-1.7B": Sizes(2048, 6144, 16, 8),
    "Qwen/Qwen3-4B": Sizes(2560, 9728, 32, 8),
    "Qwen/Qwen3-8B": Sizes(4096, 12288, 32, 8),
    "Qwen/Qwen3-32B": Sizes(5120, 25600, 64, 8),
    "Qwen/Qwen3-30B-A3B": Sizes(2048, 768, 32, 4, experts=128, top_k=8),
    "Qwen/Qwen3-235B-A22B": Sizes(4096, 1536, 64, 4, experts=128, top_k=8),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": Sizes(6144, 2560, 96, 8, experts=160, top_k=8),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": Sizes(2048, 512, 16, 2, 256, experts=512, top_k=10, value_heads=32),
    "Qwen/Qwen3.5-0.8B": Sizes(1024, 3584, 8, 2, 256, value_heads=16),
    "Qwen/Qwen3.5-27B": Sizes(5120, 17408, 24, 4, 256, value_heads=48),
    "Qwen/Qwen3.5-397B-A17B": Sizes(4096, 1024, 32, 2, 256, experts=512, top_k=10, value_heads=64),
    "Qwen/Qwen4-Exp": Sizes(2560, 640, 24, 2, 256, experts=512, top_k=10, value_heads=48, streams=4),
}
VOCABULARY = 151936  # of all Qwen3, padding included
OTHERS = "others"  # in the place of a model: sizes that none here has, as a `Subject` has them
# Whose sizes are taken where none are named, by what an operation needs of a model.
DEFAULTS = {"": "Qwen/Qwen3-8B", "experts": "Qwen/Qwen3-30B-A3B", "value_heads": "Qwen/Qwen3.5-27B",
            "streams": "Qwen/Qwen4-Exp"}
# Small, and no two alike, so that a swapped axis cannot hide. Also what an interpreter can afford.
TINY = Sizes(hidden=96, intermediate=72, heads=6, kv_heads=2, head_dim=20, experts=11, top_k=3,
             key_heads=2, value_heads=4, key_dim=18, value_dim=22, conv=3, streams=5, index_heads=7, index_dim=14,
             ratio=3, budget=13)  # fmt: skip


def sizes(model: str, needs: str = "") -> Sizes:
    """The sizes of a model of the table ("tiny" for the small ones), which must have what is needed: "experts",
    "value_heads" of a Gated DeltaNet, or "streams" of Qwen4-Exp. Raises RequestError for others."""
    if model == "tiny":
        return TINY
    if model not in MODELS:
        raise RequestError(f"there are no shapes of {model!r}; there are {['tiny', *MODELS]}")
    if needs and not getattr(MODELS[model], needs):
        raise RequestError(f"{model} has no {needs.replace('_', ' ')}; try {DEFAULTS[needs]}")
    return MODELS[model]
