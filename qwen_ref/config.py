"""Reading config.json: every field is checked for type and range when it is read, never when it is used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import ops
from .errors import ConfigError
from .limits import LIMITS

_REQUIRED: Any = object()
_TIED = "tie_word_embeddings"
_OUTSIDE = ("architectures", "model_type", "dtype", "torch_dtype", "quantization_config", "bos_token_id", "eos_token_id",
            "pad_token_id", "transformers_version")  # fmt: skip


class Fields:
    """Typed access to a JSON object. A missing or null field gives its default; a wrong one is a ConfigError."""

    def __init__(self, data: dict[str, Any], where: str = "config.json") -> None:
        self.data = data
        self.where = where

    def integer(self, name: str, default: int = _REQUIRED, *, low: int = 1, high: int = LIMITS.width) -> int:
        value = self._get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self.error(name, f"is {value!r}, not an integer from {low} to {high}")
        return value

    def positive(self, name: str, default: float = _REQUIRED) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(name, f"is {value!r}, not a positive finite number")
        return float(value)

    def flag(self, name: str, default: bool = _REQUIRED) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise self.error(name, f"is {value!r}, not true or false")
        return value

    def choice(self, name: str, allowed: Sequence[str], default: str = _REQUIRED) -> str:
        value = self._get(name, default)
        if value not in allowed:
            raise self.error(name, f"is {value!r}; implemented: {', '.join(allowed)}")
        return value

    def object(self, name: str) -> Fields:
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, f"is {value!r}, not an object")
        return Fields(value, f"{self.where}, {name}")

    def array(self, name: str, default: list[Any]) -> list[Any]:
        value = self._get(name, default)
        if not isinstance(value, list):
            raise self.error(name, f"is {value!r}, not a list")
        return value

    def divides(self, name: str, divisor: int, whole: int) -> None:
        """A count that must divide another: the key and value heads, the query heads."""
        if whole % divisor:
            raise self.error(name, f"is {divisor}, which does not divide the {whole} heads it serves")

    def is_null(self, name: str) -> bool:
        """Whether a field is there and null, where that means something else than its absence."""
        return name in self.data and self.data[name] is None

    def refuse(self, *names: str) -> None:
        """Fields which change the computation in a way this model file does not implement."""
        for name in names:
            if self.data.get(name):
                raise self.error(name, "is set, which is not implemented")

    def error(self, name: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.where}: {name} {problem}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.data.get(name)
        if value is None:
            if default is _REQUIRED:
                raise self.error(name, "is missing")
            return default
        return value


@dataclass(frozen=True)
class Rope:
    """Rotary position parameters. `factor` None is plain RoPE, otherwise YaRN stretches the context by it."""

    theta: float
    factor: float | None = None
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # multiplies cos and sin, so attention scores carry its square
    share: float = 1.0  # of a head's numbers that are rotated, the first ones
    sections: tuple[int, ...] = ()  # frequencies per axis (time, height, width) of multimodal positions; equal for text

    @classmethod
    def from_json(
        cls, fields: Fields, max_position: int, default_theta: float = 10_000.0, *, default_share: float | None = None,
        default_sections: tuple[int, ...] = ()
    ) -> Rope:
        """Both spellings: `rope_parameters` (transformers 5) or top-level `rope_theta` with `rope_scaling`.

        `default_share`: of a model_type that may rotate a part of each head; None = it rotates all of it, and a config
        that says otherwise is refused.
        """
        scaling = fields.object("rope_scaling")
        if not scaling.data:
            scaling = fields.object("rope_parameters")
        theta = scaling.positive("rope_theta", fields.positive("rope_theta", default_theta))
        if theta <= 1:
            raise fields.error("rope_theta", f"is {theta}, which must be above 1")
        kind = scaling.choice(
            "rope_type", ("default", "yarn"), scaling.choice("type", ("default", "yarn"), "default")
        )
        share = scaling.positive("partial_rotary_factor", fields.positive("partial_rotary_factor", default_share or 1.0))
        if share > 1 or (share != 1 and default_share is None):
            raise fields.error("partial_rotary_factor", f"is {share:g}, which is not implemented for this model_type")
        sections = tuple(scaling.array("mrope_section", list(default_sections))) if default_sections else ()
        if any(type(size) is not int or size < 0 for size in sections):
            raise scaling.error("mrope_section", f"is {list(sections)}, not the number of frequencies of each axis")
        if kind == "default":
            return cls(theta, share=share, sections=sections)
        scaling.refuse("mscale", "mscale_all_dim")
        factor = scaling.positive("factor")
        if factor < 1:
            raise scaling.error("factor", f"is {factor}, which must be at least 1")
        name = "original_max_position_embeddings"
        return cls(
            theta,
            factor,
            fields.integer(name, scaling.integer(name, max_position, high=1 << 40), high=1 << 40),  # the outer one goes first
            scaling.positive("beta_fast", 32.0),
            scaling.positive("beta_slow", 1.0),
            scaling.flag("truncate", True),
            # Peng et al. 2023, equation 22: the temperature of attention that keeps its entropy over the longer context.
            scaling.positive("attention_factor", 0.1 * math.log(factor) + 1.0),
            share,
            sections,
        )

    def width(self, head_dim: int) -> int:
        """How many numbers of a head are rotated."""
        return int(head_dim * self.share)

    def frequencies(self, head_dim: int) -> Tensor:
        """(R/2,) fp32, radians per position, of the R rotated numbers of a head."""
        if self.factor is None:
            return ops.rope_frequencies(self.width(head_dim), self.theta)
        return ops.yarn_frequencies(
            self.width(head_dim),
            self.theta,
            self.factor,
            self.original_context,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
            truncate=self.truncate,
        )

    def to_json(self) -> dict[str, Any]:
        """The spelling of the official files, which transformers 4 and 5 both read; with sections, which are newer, the
        one dict of transformers 5. Without them the `share` of heads that is rotated is for the model_type to write."""
        if self.sections:
            axes = {"mrope_section": list(self.sections), "mrope_interleaved": True}
            return {"rope_parameters": {"rope_theta": self.theta, "partial_rotary_factor": self.share, **axes,
                                        **(self._scaling() or {"rope_type": "default"})}}
        return {"rope_theta": self.theta, "rope_scaling": self._scaling()}

    def _scaling(self) -> dict[str, Any] | None:
        if self.factor is None:
            return None
        return {
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original_context,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "truncate": self.truncate,
            "attention_factor": self.attention_factor,
        }


@dataclass(frozen=True)
class DualChunk:
    """Sizes of dual chunk attention (`ops.dual_chunk`), in tokens."""

    chunk: int  # no rotation is beyond this position
    local: int  # how far back distances across a chunk's border are the true ones
    original_context: int = 0  # beyond it, scores grow with the length; 0 = never

    @property
    def span(self) -> int:
        """Tokens that share a chunk."""
        return self.chunk - self.local

    @classmethod
    def from_json(cls, fields: Fields) -> DualChunk | None:
        """`dual_chunk_attention_config`, None if it is absent. Its sparse attention, for which it may name each head's
        pattern, is an engine's approximation of this attention, not a part of the model, and is not read."""
        f = fields.object("dual_chunk_attention_config")
        if not f.data:
            return None
        chunk = f.integer("chunk_size", 8192, low=2, high=1 << 40)
        local = f.integer("local_size", 1024, high=1 << 40)
        if local >= chunk:
            raise f.error("local_size", f"is {local}; it must be below the chunk_size {chunk}")
        return cls(chunk, local, f.integer("original_max_position_embeddings", 0, low=0, high=1 << 40))

    def to_json(self) -> dict[str, Any]:
        return {"chunk_size": self.chunk, "local_size": self.local, "original_max_position_embeddings": self.original_context}


def layer_types(
    fields: Fields, layers: int, default: list[str], known: Sequence[str] = ("full_attention", "sliding_attention")
) -> tuple[str, ...]:
    """`layer_types` of the config if it is given, else `default`: one of the `known` kinds per layer."""
    types = fields.array("layer_types", default)
    if len(types) != layers:
        raise fields.error("layer_types", f"has {len(types)} entries for {layers} layers")
    for name in types:
        if name not in known:
            raise fields.error("layer_types", f"holds {name!r}; implemented: {', '.join(known)}")
    return tuple(types)


def hybrid_types(fields: Fields, layers: int, full: str = "full_attention") -> tuple[str, ...]:
    """The kind of every layer: three linear_attention, then one full_attention, unless the config says otherwise.

    `full`: another name of the model_type's for full_attention, which is returned for both.
    """
    interval = fields.integer("full_attention_interval", 4)
    types = [("linear_attention", "full_attention")[(i + 1) % interval == 0] for i in range(layers)]
    known = dict.fromkeys(("linear_attention", "full_attention", full))
    types = list(layer_types(fields, layers, types, tuple(known)))
    return tuple(full if kind == "full_attention" else kind for kind in types)


def text_config(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of the language model: a multimodal config.json nests them in `text_config`, beside a few of its own.

    Of those outside only what speaks of the whole model is taken, and whether the head is tied is decided there.
    """
    nested = data.get("text_config")
    if not isinstance(nested, dict):
        return data
    outside = {name: data[name] for name in (*_OUTSIDE, _TIED) if data.get(name) is not None}
    return {**outside, **nested, **({_TIED: outside[_TIED]} if _TIED in outside else {})}


def mixture(fields: Fields, layers: int, experts: int, chosen: int) -> tuple[int, int]:
    """How many experts a layer has, and how many of them a token is given; with their defaults. ConfigError if there are more
    than `LIMITS.experts` in all layers, or fewer than a token is given."""
    count = fields.integer("num_experts", experts, high=max(1, LIMITS.experts // layers))
    top_k = fields.integer("num_experts_per_tok", chosen)
    if top_k > count:
        raise fields.error("num_experts_per_tok", f"is {top_k}, more than the {count} experts")
    return count, top_k


def sparse_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Which layers hold experts: every `decoder_sparse_step`-th, except those in `mlp_only_layers`."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.array("mlp_only_layers", [])
    for i in dense:
        if type(i) is not int or not 0 <= i < layers:
            raise fields.error("mlp_only_layers", f"holds {i!r}, not the index of one of {layers} layers")
    return tuple((i + 1) % step == 0 and i not in dense for i in range(layers))
