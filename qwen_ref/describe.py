"""What a checkpoint is and what it costs, from its config alone: no weight is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import INDEX, read_index
from .config import text_config
from .errors import ConfigError, RequestError
from .loading import build, extra_files, locate, opened, pick_dtype, read_config
from .models.common import DRAFT, LanguageModel
from .quant.convert import install, read_format
from .quant.format import Format
from .quant.ggml import Ggml
from .strict_json import parse_object


@dataclass(frozen=True)
class Description:
    name: str
    config: dict[str, Any]
    dtype: str
    parameters: dict[str, int]  # by part of the model
    total: int
    draft: int  # parameters of the draft layer (MTP), which are none of the total
    active: int  # parameters a token passes through; less than the total in a mixture of experts
    kv_bytes_per_token: int
    context: int
    kv_bytes: int  # at `context` tokens, sliding windows counted as such
    state_bytes: int  # of the layers that keep no keys, however many tokens they have read
    end_tokens: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    format: str | None  # how the weights are quantised; None = they are not
    weight_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "tensors": {name: list(shape) for name, shape in self.tensors.items()}}

    def text(self, *, tensors: bool = False) -> str:
        lines = [f"{self.name}", "", "config"]
        lines += [f"  {key:32} {value}" for key, value in self.config.items()]
        lines += ["", f"parameters {'':21} {'count':>16}  {'share':>6}"]
        lines += [f"  {part:30} {n:>16,}  {n / self.total:>6.1%}" for part, n in self.parameters.items()]
        lines += [f"  {'total':30} {self.total:>16,}"]
        if self.draft:
            lines += [f"  {'draft layer (MTP), beside them':30} {self.draft:>16,}"]
        if self.active != self.total:
            lines += [f"  {'active per token':30} {self.active:>16,}  {self.active / self.total:>6.1%}"]
        lines += ["", f"memory in {self.dtype}" + (f", weights in {self.format}" if self.format else "")]
        lines += [f"  {'weights':30} {size(self.weight_bytes):>16}"]
        lines += [f"  {'KV cache per token':30} {size(self.kv_bytes_per_token):>16}"]
        lines += [f"  {f'KV cache at {self.context:,} tokens':30} {size(self.kv_bytes):>16}"]
        if self.state_bytes:
            lines += [f"  {'recurrent states':30} {size(self.state_bytes):>16}"]
        lines += ["", "end tokens (generation stops at any of them)"]
        lines += [f"  {place:30} {value if value is not None else '-'}" for place, value in self.end_tokens.items()]
        if tensors:
            lines += ["", f"tensors ({len(self.tensors)})"]
            lines += [f"  {name:60} {list(shape)}" for name, shape in self.tensors.items()]
        return "\n".join(lines)


def describe(model: str | Path, *, revision: str | None = None, context: int | None = None) -> Description:
    """Describe a bundled name, folder or hub id. Reads (and downloads) JSON files only.

    `context`: tokens to size the KV cache for, default the config's maximum. Raises ConfigError, CheckpointError.
    """
    path = locate(model, revision=revision, metadata_only=True)
    raw, format, found = _read(path)
    network = build(raw, draft=_has_draft_layer(path, raw))
    config = network.config
    context = config.max_position_embeddings if context is None else context
    if type(context) is not int or context < 1:
        raise RequestError(f"the context is {context} tokens; it must be at least 1")
    dtype = pick_dtype(None, raw)
    parts = Counter[str]()
    for name, parameter in network.named_parameters():
        if not name.startswith(DRAFT):
            parts[_part(name)] += parameter.numel()
    # A key and a value, and the key by which its block is chosen, per layer that keeps keys.
    numbers = 2 * config.num_key_value_heads * config.head_dim + getattr(config, "indexer_head_dim", 0)
    token_bytes = numbers * dtype.itemsize
    held = sum(context if w is None else min(context, w) for w in config.windows)
    ends = extra_files(path)
    return Description(
        name=str(model),
        config=config.to_json(),
        dtype=str(dtype).removeprefix("torch."),
        parameters=dict(parts),
        total=network.num_parameters(),
        draft=network.num_draft_parameters(),
        active=network.num_parameters() - _idle(network),
        kv_bytes_per_token=token_bytes * len(config.windows),
        context=context,
        kv_bytes=token_bytes * held,
        state_bytes=_state_bytes(config, dtype.itemsize),
        end_tokens={
            "generation_config.json": _eos(ends.get("generation_config.json")),
            "config.json": raw.get("eos_token_id"),
            "tokenizer_config.json": _eos(ends.get("tokenizer_config.json")),
        },
        tensors={name: tuple(t.shape) for name, t in network.checkpoint_tensors().items()},
        format=_name(raw, format),
        weight_bytes=_weight_bytes(network, dtype, format, found),
    )


def size(count: float) -> str:
    """Bytes for people: 1.19 GB, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _state_bytes(config: Any, itemsize: int) -> int:
    """Of one sequence: the inputs that convolutions look back to, the states of the delta rule, and the last n-gram."""
    layers = getattr(config, "layer_types", ()).count("linear_attention")
    if not layers:
        return 0
    key_dim, values = config.linear_key_head_dim, config.linear_num_value_heads * config.linear_value_head_dim
    window = (2 * config.linear_num_key_heads * key_dim + values) * config.linear_conv_kernel_dim * itemsize
    rule = key_dim * values * torch.float32.itemsize  # in every dtype
    ngrams = 0
    if ple := getattr(config, "ple_layer_ids", ()):
        history = config.hc_count * config.hidden_size * (config.ple_conv_kernel_size - 1) * config.ngram_size * itemsize
        ngrams = len(ple) * (history + (config.ngram_size - 1) * torch.int64.itemsize)
    return layers * (window + rule) + ngrams


def _part(name: str) -> str:
    for key, part in (("embed_tokens", "embedding"), ("lm_head", "head"), ("ngram_embedding", "table of n-grams"),
                      (".ple.", "n-grams"), ("hyper_connection", "residual streams"), ("self_attn", "attention"),
                      (".attn.", "attention"),
                      ("linear_attn", "linear attention"), ("experts", "experts"),
                      ("shared_expert", "shared expert"), ("mlp.gate.", "router"), ("mlp", "feed-forward")):  # fmt: skip
        if key in name:
            return part
    return "norms"


def _idle(network: LanguageModel) -> int:
    """Expert parameters that a token does not pass through, and rows of a table that it does not read."""
    config = network.config
    rows = sum(table.rows * table.dim - config.ple_embed_dim for _, table in network.tables())
    experts = sum(p.numel() for name, p in network.named_parameters() if ".experts." in name and not name.startswith(DRAFT))
    return rows + (experts * (config.num_experts - config.num_experts_per_tok) // config.num_experts if experts else 0)


def _eos(content: bytes | None) -> Any:
    data = parse_object(content, "tokenizer or generation config", ConfigError) if content else {}
    named = data.get("eos_token_id", data.get("eos_token"))
    return [named, "<|im_end|>", "<|im_start|>"] if data.get("chat_format") == "chatml" else named  # see `generate.end_tokens`


def _read(path: Path) -> tuple[dict[str, Any], Format | None, dict[str, Any]]:
    """config.json, the format, and what the file of a GGUF model holds; weight files of a folder may not be there."""
    if path.suffix != ".gguf":
        raw = read_config(path)
        return raw, read_format(raw), {}
    with opened(path) as (raw, format, checkpoint):
        return raw, format, checkpoint.tensors(build(raw))


def _name(raw: dict[str, Any], format: Format | None) -> str | None:
    if isinstance(format, Ggml):
        return f"gguf: {', '.join(sorted(set(format.kinds.values())))}" if format.kinds else None
    return None if format is None else str(raw["quantization_config"].get("quant_method", "bitsandbytes"))


def _has_draft_layer(path: Path, raw: dict[str, Any]) -> bool:
    """As the index of the weight files says; without one, as config.json does."""
    if (path / INDEX).is_file():
        return any(name.startswith(DRAFT) for name in read_index(path / INDEX))
    return bool(text_config(raw).get("mtp_num_hidden_layers"))


def _weight_bytes(network: LanguageModel, dtype: torch.dtype, format: Format | None, found: dict[str, Any]) -> int:
    """As the weights lie in the files, without what a format leaves open (such as scales of scales)."""
    network.to(dtype)
    if format is not None:
        install(network, format, found)
    return sum(p.nbytes for p in network.parameters())
