"""The metadata of a GGUF file and what it says in the official spelling: config.json, tokenizer files, and back.

Keys are those of docs/gguf.md in github.com/ggml-org/ggml and of llama.cpp's converter. What llama.cpp fixes in its code
instead of a key is fixed here too: qwen3moe renormalises the weights of its experts, qwen2moe does not.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..config import Fields, Rope, hybrid_types
from ..errors import TokenizerError
from ..limits import LIMITS
from ..strict_json import parse_json, quote
from ..tokenizer import PATTERN_QWEN, PATTERN_QWEN3_5, Tokenizer

ARCHITECTURES = {  # general.architecture -> model_type, architectures of config.json
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen2moe": ("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "qwen3next": ("qwen3_next", "Qwen3NextForCausalLM"),
    "qwen35": ("qwen3_5_text", "Qwen3_5ForCausalLM"),
    "qwen35moe": ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
}
_MIXTURES = ("qwen2moe", "qwen3moe", "qwen3next", "qwen35moe")
_HYBRIDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
_SECTIONS = [11, 11, 10]  # of Qwen3.5's rotary frequencies, where a config names none
_ROPE_SCALING = ("type", "factor", "original_context_length", "finetuned",
                 "yarn_beta_fast", "yarn_beta_slow", "yarn_attn_factor")  # fmt: skip
# tokenizer.ggml.pre -> tokenizer_class, which is how a folder with vocab.json names its pattern
_PATTERNS = {"qwen2": PATTERN_QWEN, "qwen35": PATTERN_QWEN3_5}
_CLASSES = {"qwen2": "Qwen2Tokenizer", "deepseek-r1-qwen": "Qwen2Tokenizer", "qwen35": "Qwen3_5Tokenizer"}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
# llama.cpp's converter makes every <|...|> a control token. These are ordinary added tokens in all official tokenizers.
_NOT_SPECIAL = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja")
_END_OF_TEXT = "<|endoftext|>"  # ends a text of any Qwen model; llama.cpp stops at it too
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
             "penalty_repeat": "repetition_penalty"}  # fmt: skip


# ------------------------------------------------------------------------------------------------- config, from metadata


def read_config(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """config.json of a model. `shapes` tells what no key does: whether there is a head of its own, and biases.

    Raises: ConfigError naming the key that is missing, wrong or not implemented.
    """
    f = Fields(dict(metadata), where)
    arch = f.choice("general.architecture", tuple(ARCHITECTURES))
    f = Fields({key.removeprefix(f"{arch}."): value for key, value in metadata.items()}, f"{where}, {arch}")
    hidden, heads = f.integer("embedding_length"), f.integer("attention.head_count")
    head_dim = f.integer("attention.key_length", hidden // heads)
    model_type, name = ARCHITECTURES[arch]
    whole = ("attention.value_length", "rope.dimension_count")[: 1 if model_type in _HYBRIDS else 2]  # they rotate a part
    for key in whole:
        if f.integer(key, head_dim) != head_dim:
            raise f.error(key, f"is {f.data[key]}, not the {head_dim} of the keys, which is not implemented")
    f.refuse("attention.sliding_window", "attention.scale", "logit_scale", "expert_weights_scale", "expert_group_count")
    if not f.flag("attention.causal", True):
        raise f.error("attention.causal", "is false, which is not implemented")
    tokens = _tokens(metadata, where)
    return {
        "architectures": [name],
        "model_type": model_type,
        "hidden_act": "silu",
        "vocab_size": len(tokens),
        "hidden_size": hidden,
        "intermediate_size": _read_width(f),
        "num_hidden_layers": layer_count(metadata, where),
        "num_attention_heads": heads,
        "num_key_value_heads": f.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": f.integer("context_length", high=1 << 40),
        "rms_norm_eps": _decimal(f.positive("attention.layer_norm_rms_epsilon")),
        **_read_rope(f, model_type, head_dim),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "use_sliding_window": False,
        **_read_biases(model_type, shapes),
        **(_read_experts(f, model_type) if arch in _MIXTURES else {}),
        **(_read_delta(f, shapes, layer_count(metadata, where)) if model_type in _HYBRIDS else {}),
        **{f"{name}_token_id": id for name, id in _named_ids(metadata, len(tokens), where).items() if name != "eot"},
    }


def draft_layers(metadata: Mapping[str, Any], where: str) -> range:
    """Which blocks are a draft layer's (MTP): the last of them."""
    arch = metadata.get("general.architecture")
    f = Fields({key.removeprefix(f"{arch}."): value for key, value in metadata.items()}, f"{where}, {arch}")
    blocks, drafts = f.integer("block_count", high=LIMITS.layers), f.integer("nextn_predict_layers", 0, low=0)
    if drafts >= blocks:
        raise f.error("nextn_predict_layers", f"is {drafts} of {blocks} blocks")
    return range(blocks - drafts, blocks)


def layer_count(metadata: Mapping[str, Any], where: str) -> int:
    """Blocks of the trunk."""
    return draft_layers(metadata, where).start


def _read_width(f: Fields) -> int:
    """Of a dense feed-forward. A mixture without one may have no such key: then it does not matter what it is."""
    width = f.integer("expert_feed_forward_length", 0, low=0)
    return f.integer("feed_forward_length", width) if width else f.integer("feed_forward_length")


def _read_rope(f: Fields, model_type: str, head_dim: int) -> dict[str, Any]:
    theta, scaling = _decimal(f.positive("rope.freq_base", 10_000.0)), _read_rope_scaling(f)
    if model_type not in _HYBRIDS:
        return {"rope_theta": theta, "rope_scaling": scaling}
    width = f.integer("rope.dimension_count", head_dim)
    rope = {"rope_type": "default", **(scaling or {}), "rope_theta": theta, "partial_rotary_factor": width / head_dim}
    if model_type != "qwen3_next":
        sections = f.data.get("rope.dimension_sections", _SECTIONS)
        if not isinstance(sections, Sequence):
            raise f.error("rope.dimension_sections", f"is {sections!r}, not a list")
        rope |= {"mrope_section": [*sections[:3]], "mrope_interleaved": True}
    return {"rope_parameters": rope}


def _read_delta(f: Fields, shapes: Mapping[str, tuple[int, ...]], layers: int) -> dict[str, Any]:
    """The Gated DeltaNet. Which layers have one, their tensors say, whatever the interval is."""
    heads = f.integer("ssm.time_step_rank")
    linear = [f"model.layers.{i}.linear_attn.out_proj.weight" in shapes for i in range(layers)]
    return {
        "linear_conv_kernel_dim": f.integer("ssm.conv_kernel"),
        "linear_num_key_heads": f.integer("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": f.integer("ssm.state_size"),
        "linear_value_head_dim": f.integer("ssm.inner_size") // heads,
        "layer_types": ["linear_attention" if own else "full_attention" for own in linear],
    }


def _read_biases(model_type: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    has_bias = any(name.endswith("self_attn.q_proj.bias") for name in shapes)
    if model_type == "qwen2":
        return {}  # always has them
    return {"qkv_bias" if model_type == "qwen2_moe" else "attention_bias": has_bias}


def _read_experts(f: Fields, model_type: str) -> dict[str, Any]:
    used, width = f.integer("expert_used_count"), _read_width(f)
    config = {
        "num_experts": f.integer("expert_count"),
        "num_experts_per_tok": used,
        # The first files of qwen2moe have no such key; llama.cpp takes the same defaults.
        "moe_intermediate_size": f.integer("expert_feed_forward_length", max(1, width // used)),
        "norm_topk_prob": model_type != "qwen2_moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if model_type != "qwen3_moe":
        config["shared_expert_intermediate_size"] = f.integer("expert_shared_feed_forward_length", width)
    return config


def _read_rope_scaling(f: Fields) -> dict[str, Any] | None:
    known = [f"rope.scaling.{key}" for key in _ROPE_SCALING]
    f.refuse(*(key for key in f.data if key.startswith("rope.scaling.") and key not in known))
    kind = f.choice("rope.scaling.type", ("none", "yarn"), "none")
    if kind == "none":
        return None
    factor = _decimal(f.positive("rope.scaling.factor"))
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": f.integer("rope.scaling.original_context_length", high=1 << 40),
    }
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if f"rope.scaling.{key}" in f.data:
            scaling[name] = _decimal(f.positive(f"rope.scaling.{key}"))
    if f.positive("rope.scaling.yarn_attn_factor", 1.0) != 1.0:
        raise f.error("rope.scaling.yarn_attn_factor", "is not 1, which is not implemented")
    return scaling


def _decimal(value: float) -> float:
    """The shortest decimal that is this number in fp32: 1e-06, where the nearest fp64 is 9.99999997e-07."""
    if abs(value) > 3e38:
        return value
    single = struct.pack("<f", value)
    return next((short for digits in range(1, 10)
                 if struct.pack("<f", short := float(f"{value:.{digits}g}")) == single), value)  # fmt: skip


# ------------------------------------------------------------------------------------------------- config, to metadata


def write_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a config.json: ints are u32, floats f32, lists of ints i32.

    Raises: ConfigError for what llama.cpp computes in another way and no key can change.
    """
    f = Fields(dict(config))
    architectures = {model_type: arch for arch, (model_type, _) in ARCHITECTURES.items()}
    architectures |= {"qwen3_5": "qwen35", "qwen3_5_moe": "qwen35moe"}
    arch = architectures[f.choice("model_type", tuple(architectures))]
    hybrid = ARCHITECTURES[arch][0] in _HYBRIDS
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    head_dim, context = f.integer("head_dim", hidden // heads), f.integer("max_position_embeddings", high=1 << 32)
    sections = tuple(_SECTIONS) if arch.startswith("qwen35") else ()
    rope = Rope.from_json(f, context, default_share=0.25 if hybrid else None, default_sections=sections)
    f.choice("hidden_act", ("silu",), "silu")
    if f.flag("use_sliding_window", False) or "sliding_attention" in f.array("layer_types", []):
        raise f.error("use_sliding_window", "has no counterpart in GGUF: llama.cpp attends to everything")
    if f.data.get("dual_chunk_attention_config"):
        raise f.error("dual_chunk_attention_config", "has no counterpart in GGUF: llama.cpp attends plainly at any length")
    if arch == "qwen3" or hybrid:
        f.refuse("attention_bias")
    values = {
        "block_count": f.integer("num_hidden_layers"),
        "context_length": context,
        "embedding_length": hidden,
        "feed_forward_length": f.integer("moe_intermediate_size" if arch == "qwen35moe" else "intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": f.integer("num_key_value_heads", heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": f.positive("rms_norm_eps", 1e-6),
        "rope.freq_base": rope.theta,
        **_write_rope_scaling(f, rope),
        **(_write_experts(f, arch) if arch in _MIXTURES else {}),
        **(_write_delta(f, rope, head_dim) if hybrid else {}),
        "vocab_size": f.integer("vocab_size"),
    }
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in values.items()}}


def _write_experts(f: Fields, arch: str) -> dict[str, Any]:
    if f.array("mlp_only_layers", []) or f.integer("decoder_sparse_step", 1) != 1:
        raise f.error("mlp_only_layers", "or decoder_sparse_step leaves layers dense, which llama.cpp has no key for")
    normalised = arch != "qwen2moe"
    if arch != "qwen35moe" and f.flag("norm_topk_prob", arch == "qwen3next") != normalised:
        raise f.error("norm_topk_prob", f"is {not normalised}; llama.cpp computes {arch} with {normalised} only")
    values = {
        "expert_count": f.integer("num_experts", f.integer("num_local_experts", 0, low=0)),
        "expert_used_count": f.integer("num_experts_per_tok"),
        "expert_feed_forward_length": f.integer("moe_intermediate_size"),
    }
    if arch != "qwen3moe":
        values["expert_shared_feed_forward_length"] = f.integer("shared_expert_intermediate_size")
    return values


def _write_delta(f: Fields, rope: Rope, head_dim: int) -> dict[str, Any]:
    layers, heads = f.integer("num_hidden_layers"), f.integer("linear_num_value_heads", 32)
    types = hybrid_types(f, layers)
    interval = types.index("full_attention") + 1 if "full_attention" in types else layers + 1
    if any((kind == "full_attention") != ((i + 1) % interval == 0) for i, kind in enumerate(types)):
        raise f.error("layer_types", "are not full attention at every n-th layer, and llama.cpp has no key for anything else")
    return {
        "full_attention_interval": interval,
        "ssm.conv_kernel": f.integer("linear_conv_kernel_dim", 4),
        "ssm.state_size": f.integer("linear_key_head_dim", 128),
        "ssm.group_count": f.integer("linear_num_key_heads", 16),
        "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * f.integer("linear_value_head_dim", 128),
        "rope.dimension_count": rope.width(head_dim),
        **({"rope.dimension_sections": [*rope.sections, 0]} if rope.sections else {}),
    }


def _write_rope_scaling(f: Fields, rope: Rope) -> dict[str, Any]:
    if rope.factor is None:
        return {}
    if not rope.truncate or rope.attention_factor != Rope.from_json(_without_attention_factor(f), 1).attention_factor:
        raise f.error("rope_scaling", "has a truncate or attention_factor of its own, which llama.cpp has no key for")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": rope.factor,
        "rope.scaling.original_context_length": rope.original_context,
        "rope.scaling.yarn_beta_fast": rope.beta_fast,
        "rope.scaling.yarn_beta_slow": rope.beta_slow,
    }


def _without_attention_factor(f: Fields) -> Fields:
    scaling = f.data.get("rope_scaling") or f.data["rope_parameters"]
    return Fields({"rope_scaling": {key: value for key, value in scaling.items() if key != "attention_factor"}})


# ------------------------------------------------------------------------------------------------- tokenizer, from metadata


def read_tokenizer(metadata: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """vocab.json, merges.txt, tokenizer_config.json and generation_config.json as the official folders have them.

    Padding of the vocabulary ([PAD151669], ...) is left out: no text becomes it. Raises: TokenizerError.
    """
    pre = metadata.get("tokenizer.ggml.pre", "qwen2")  # absent in the first files
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        raise TokenizerError(f"{where}: tokenizer.ggml.model is {quote(metadata.get('tokenizer.ggml.model'))}, not 'gpt2'")
    if not isinstance(pre, str) or pre not in _CLASSES:
        raise TokenizerError(f"{where}: tokenizer.ggml.pre is {quote(pre)}, not one of {', '.join(_CLASSES)}")
    tokens = _tokens(metadata, where)
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if isinstance(types, str | bytes) or not isinstance(types, Sequence) or len(types) != len(tokens):
        raise TokenizerError(f"{where}: tokenizer.ggml.token_type does not give one type for each of {len(tokens)} tokens")
    if odd := set(types) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}:
        raise TokenizerError(f"{where}: tokenizer.ggml.token_type holds {quote(min(odd))}, which no Qwen tokenizer has")
    vocab = {token: id for id, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _NORMAL}
    if len(vocab) != sum(kind == _NORMAL for kind in types):
        raise TokenizerError(f"{where}: tokenizer.ggml.tokens holds a token twice")
    added = {id: _added_token(token, kind) for id, (token, kind) in enumerate(zip(tokens, types, strict=True))
             if kind in (_CONTROL, _USER_DEFINED)}  # fmt: skip
    named = _named_ids(metadata, len(tokens), where)
    config = {
        "tokenizer_class": _CLASSES[pre],
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token") is True,
        "added_tokens_decoder": {str(id): entry for id, entry in added.items()},
        "eos_token": tokens[named["eos"]] if "eos" in named else None,
        "pad_token": tokens[named["pad"]] if "pad" in named else None,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
    }
    config["bos_token"] = tokens[named["bos"]] if config["add_bos_token"] and "bos" in named else None
    if (template := _template(metadata, where)) is not None:
        config["chat_template"] = template
    merges = "\n".join(["#version: 0.2", *_merges(metadata, where), ""])
    return {
        "vocab.json": _json(vocab),
        "merges.txt": merges.encode(),
        "tokenizer_config.json": _json(config),
        "generation_config.json": _json(_read_generation(metadata, named, added)),
    }


def _tokens(metadata: Mapping[str, Any], where: str) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise TokenizerError(f"{where}: tokenizer.ggml.tokens is missing or not a list of texts")
    return tokens


def _merges(metadata: Mapping[str, Any], where: str) -> Iterator[str]:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise TokenizerError(f"{where}: tokenizer.ggml.merges is missing or not a list of texts")
    for merge in merges:
        if len(parts := merge.split(" ")) != 2 or merge.split() != parts:
            raise TokenizerError(f"{where}: tokenizer.ggml.merges holds {quote(merge)}, not two tokens and a space")
        yield merge


def _added_token(token: str, kind: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": token, **flags, "special": kind == _CONTROL and token not in _NOT_SPECIAL}


def _named_ids(metadata: Mapping[str, Any], count: int, where: str) -> dict[str, int]:
    """bos, eos, eot and pad, as far as the file names them."""
    ids = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("eot", "eot"), ("pad", "padding")):
        id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if id is None:
            continue
        if type(id) is not int or not 0 <= id < count:
            raise TokenizerError(f"{where}: tokenizer.ggml.{key}_token_id is {quote(id)}, the tokens are 0 to {count - 1}")
        ids[name] = id
    return ids


def _template(metadata: Mapping[str, Any], where: str) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{where}: tokenizer.chat_template is not a text")
    if template is not None and len(template.encode()) > LIMITS.template_bytes:
        raise TokenizerError(f"{where}: tokenizer.chat_template has more than {LIMITS.template_bytes:,} bytes")
    return template


def _read_generation(metadata: Mapping[str, Any], named: dict[str, int], added: dict[int, Any]) -> dict[str, Any]:
    ends = [named[name] for name in ("eos", "eot") if name in named]
    ends += [id for id, entry in added.items() if entry["content"] == _END_OF_TEXT]
    sampling = {official: metadata.get(f"general.sampling.{key}") for key, official in _SAMPLING.items()}
    sampling = {name: _decimal(value) if isinstance(value, float) else value for name, value in sampling.items()
                if isinstance(value, int | float)}  # fmt: skip
    config: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(ends))}
    config |= {f"{name}_token_id": named[name] for name in ("bos", "pad") if name in named}
    return config | ({"do_sample": True, **sampling} if sampling else {})


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


# ------------------------------------------------------------------------------------------------- tokenizer, to metadata


def write_tokenizer(files: Mapping[str, bytes], vocab_size: int) -> dict[str, Any]:
    """The metadata of a folder's tokenizer files, padded to the model's `vocab_size` as llama.cpp's converter does it.

    Raises: TokenizerError if they are damaged, or not those of a Qwen tokenizer from Qwen1.5 on.
    """
    with TemporaryDirectory() as folder:  # whatever is wrong with the files is found here
        for name in _FILES:
            if name in files:
                (Path(folder) / name).write_bytes(files[name])
        tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(f"the tokenizer has {tokenizer.vocab_size} ids, the model embeds {vocab_size}")
    config = _object(files, "tokenizer_config.json")
    vocab, merges, pre = _vocabulary(files, config)
    by_id = {id: token for token, id in (vocab | tokenizer.added_tokens).items()}
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [by_id.get(id, f"[PAD{id}]") for id in range(vocab_size)],
        "tokenizer.ggml.token_type": [_token_type(by_id.get(id), id, tokenizer) for id in range(vocab_size)],
        "tokenizer.ggml.merges": merges,
    }
    bos = config.get("bos_token") or _END_OF_TEXT  # llama.cpp's default would be token 11
    bos_id = tokenizer.id_of(bos["content"] if isinstance(bos, dict) else bos)
    for key, id in (("bos", bos_id), ("eos", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id)):
        if id is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = id
    metadata["tokenizer.ggml.add_bos_token"] = config.get("add_bos_token") is True
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata | _write_sampling(files)


def _token_type(token: str | None, id: int, tokenizer: Tokenizer) -> int:
    if token is None:
        return _UNUSED
    if token not in tokenizer.added_tokens:
        return _NORMAL
    # llama.cpp finds user-defined tokens in any text, so what looks like control must be control, as its converter has it.
    control = id in tokenizer.special_ids or (token.startswith("<|") and token.endswith("|>"))
    return _CONTROL if control else _USER_DEFINED


def _vocabulary(files: Mapping[str, bytes], config: dict[str, Any]) -> tuple[dict[str, int], list[str], str]:
    """Vocabulary, merges and the name of the pattern, of files that `Tokenizer.load` has accepted."""
    if "tokenizer.json" not in files:
        pre = "qwen35" if config.get("tokenizer_class") == _CLASSES["qwen35"] else "qwen2"
        lines = files["merges.txt"].decode().splitlines()
        return _object(files, "vocab.json"), [line for line in lines[lines[0].startswith("#version") :] if line.strip()], pre
    spec = _object(files, "tokenizer.json")
    pre = next((name for name, pattern in _PATTERNS.items() if pattern in _patterns(spec["pre_tokenizer"])), "")
    if not pre:
        raise TokenizerError("tokenizer.json cuts words by a pattern that is not Qwen's; llama.cpp has no name for it")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    return spec["model"]["vocab"], merges, pre


def _patterns(stage: dict[str, Any]) -> list[str]:
    """The regular expressions of a pre-tokenizer and, for a sequence, of its members."""
    own = [stage["pattern"]["Regex"]] if isinstance(stage.get("pattern"), dict) and "Regex" in stage["pattern"] else []
    return own + [pattern for member in stage.get("pretokenizers", []) for pattern in _patterns(member)]


def _write_sampling(files: Mapping[str, bytes]) -> dict[str, Any]:
    generation = _object(files, "generation_config.json") if "generation_config.json" in files else {}
    values = {key: generation[name] for key, name in _SAMPLING.items() if type(generation.get(name)) in (int, float)}
    return {f"general.sampling.{key}": int(value) if key == "top_k" else float(value) for key, value in values.items()
            if 0 <= value < 1 << 31}  # fmt: skip


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        raise TokenizerError(f"{name} is missing: a GGUF file carries its tokenizer")
    value = parse_json(files[name], name, TokenizerError)
    if not isinstance(value, dict):
        raise TokenizerError(f"{name} holds a {type(value).__name__}, not a JSON object")
    return value
