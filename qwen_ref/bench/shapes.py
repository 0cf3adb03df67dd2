"""The sizes of the official models, so that real shapes need no download. Values of each model's config.json."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RequestError


@dataclass(frozen=True)
class Sizes:
    """Letters of `ops`: hidden H, intermediate I (of one expert in a mixture), heads N, kv_heads K, head_dim D."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    experts: int = 0
    top_k: int = 0
    eps: float = 1e-6


MODELS = {
    "Qwen/Qwen3-0.6B": Sizes(1024, 3072, 16, 8),
    "Qwen/Qwen3-1.7B": Sizes(2048, 6144, 16, 8),
    "Qwen/Qwen3-4B": Sizes(2560, 9728, 32, 8),
    "Qwen/Qwen3-8B": Sizes(4096, 12288, 32, 8),
    "Qwen/Qwen3-32B": Sizes(5120, 25600, 64, 8),
    "Qwen/Qwen3-30B-A3B": Sizes(2048, 768, 32, 4, experts=128, top_k=8),
    "Qwen/Qwen3-235B-A22B": Sizes(4096, 1536, 64, 4, experts=128, top_k=8),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": Sizes(6144, 2560, 96, 8, experts=160, top_k=8),
}
VOCABULARY = 151936  # of all Qwen3, padding included
DEFAULT = "Qwen/Qwen3-8B"
DEFAULT_MOE = "Qwen/Qwen3-30B-A3B"  # where the operation is one of mixtures only
# Small, and no two alike, so that a swapped axis cannot hide. Also what an interpreter can afford.
TINY = Sizes(hidden=96, intermediate=72, heads=6, kv_heads=2, head_dim=20, experts=11, top_k=3)


def sizes(model: str, *, moe: bool = False) -> Sizes:
    """The sizes of a model of the table ("tiny" for the small ones). Raises RequestError for others."""
    if model == "tiny":
        return TINY
    if model not in MODELS:
        raise RequestError(f"there are no shapes of {model!r}; there are {['tiny', *MODELS]}")
    if moe and not MODELS[model].experts:
        raise RequestError(f"{model} has no experts; try {DEFAULT_MOE}")
    return MODELS[model]
