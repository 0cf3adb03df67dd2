"""model_type -> the file that implements it. The table is literal so that a reader can find the file by eye."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from ..errors import ConfigError

FILES = {
    "qwen": "qwen1",  # Qwen 1: 1.8B, 7B, 14B, 72B
    "qwen2": "qwen2",  # Qwen1.5, Qwen2, Qwen2.5, Coder, Math, QwQ
    "qwen2_moe": "qwen2",  # Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B
    "qwen3": "qwen3",  # Qwen3 dense, Qwen3-Embedding, Qwen3-Reranker
    "qwen3_moe": "qwen3",  # Qwen3-30B-A3B, 235B-A22B, Qwen3-Coder
    "qwen3_next": "qwen3_next",  # Qwen3-Next-80B-A3B, Qwen3-Coder-Next
    "qwen3_5": "qwen3_5",  # Qwen3.5 and 3.6 dense; with _text, the config of the language model alone
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",  # Qwen3.5 and 3.6 35B-A3B, 122B-A10B, 397B-A17B
    "qwen3_5_moe_text": "qwen3_5",
    "qwen4_exp": "qwen4_exp",  # Qwen4-Exp
    "qwen4_exp_text": "qwen4_exp",
}


def module_for(config: dict[str, Any]) -> ModuleType:
    """The module that implements this config.json's model_type. ConfigError if there is none."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FILES:
        raise ConfigError(f"config.json: model_type is {model_type!r}; implemented: {', '.join(FILES)}")
    return import_module(f"{__name__}.{FILES[model_type]}")
