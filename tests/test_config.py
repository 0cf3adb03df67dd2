"""config.json: every official file parses and has transformers' parameter count; every wrong value is named."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ref.config import Fields, Rope
from qwen_ref.errors import ConfigError, QwenRefError
from qwen_ref.loading import build
from qwen_ref.models import module_for


def meta_count(raw: dict) -> int:
    """transformers' own parameter count for a config.json, on the meta device."""
    import transformers

    raw = {k: v for k, v in raw.items() if k not in ("quantization_config", "model_type")}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(raw_config(raw))
    return sum(p.numel() for p in model.parameters())


def raw_config(raw: dict):
    import transformers

    return transformers.AutoConfig.for_model(TYPES[raw["architectures"][0]], **raw)


TYPES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe",
    "Qwen3_5ForCausalLM": "qwen3_5_text",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text",
    "Qwen4ExpForConditionalGeneration": "qwen4_exp",
    "Qwen4ExpForCausalLM": "qwen4_exp_text",
}
INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048,
           "indexer_compress_ratio": 4}
REQUIRED = {"qwen4_exp": {"text_config": INDEXER}, "qwen4_exp_text": INDEXER}  # fields without a default on either side


def test_official_configs_have_transformers_parameter_count(data):
    checked = []
    for path in sorted((data / "configs").glob("*.json")):
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.get("model_type") not in TYPES.values():
            continue
        ours = build(raw)
        assert ours.num_parameters() == meta_count(raw), path.name
        module = module_for(raw)
        assert module.Config.from_json(ours.config.to_json()) == ours.config, path.name
        checked.append(path.name)
    assert len(checked) >= 28, checked  # 11 qwen3, 8 qwen3_moe, 1 qwen3_next, 8 of Qwen3.5 and 3.6


@pytest.mark.parametrize("model_type", TYPES.values())
def test_class_defaults_are_transformers(model_type):
    """A config.json that names nothing but its type: the same sizes on both sides."""
    import transformers

    architecture = next(a for a, t in TYPES.items() if t == model_type)
    required = REQUIRED.get(model_type, {})
    ours = build({"model_type": model_type, **required})
    theirs = transformers.AutoConfig.for_model(model_type, **required).get_text_config()
    c = ours.config
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
                 "num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(c, name) == getattr(theirs, name, 0), name  # qwen3_5_moe has no dense layer, and no size for one
    assert c.rope.theta == theirs.rope_parameters["rope_theta"]
    assert c.rope.share == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    assert ours.num_parameters() == meta_count({"architectures": [architecture], **required})


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters", "type"])
def test_yarn_in_every_spelling(spelling):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    if spelling == "type":
        scaling["type"] = scaling.pop("rope_type")
    raw = {"rope_theta": 1e6, "rope_parameters" if spelling == "rope_parameters" else "rope_scaling": scaling}
    rope = Rope.from_json(Fields(raw), 40960)
    assert rope == Rope(1e6, 4.0, 32768, attention_factor=0.1 * math.log(4) + 1)
    assert Rope.from_json(Fields(rope.to_json()), 1) == rope


@pytest.mark.parametrize("scaling", [
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144, "rope_theta": 1e7},
    {"rope_type": "yarn", "factor": 2.5, "beta_fast": 16.0, "beta_slow": 2.0, "original_max_position_embeddings": 100},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    {"rope_type": "yarn", "factor": 8.0, "truncate": False, "original_max_position_embeddings": 8192},
    {"rope_type": "default"},
])  # fmt: skip
def test_rope_frequencies_are_transformers(scaling):
    import transformers
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    for outside in ({}, {"original_max_position_embeddings": 300}):  # beside `rope_scaling`, where it goes first
        raw = {"rope_theta": 1e6, "max_position_embeddings": 40960, "rope_scaling": scaling, "head_dim": 128, **outside}
        theirs = Qwen3RotaryEmbedding(transformers.Qwen3Config(**json.loads(json.dumps(raw))))
        rope = Rope.from_json(Fields(raw), 40960)
        assert torch.equal(rope.frequencies(128), theirs.inv_freq)
        assert rope.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("share", [None, 0.25, 0.5, 1.0])
def test_what_is_written_is_read_back_by_both_sides(name, share):
    """config.json of every model_type, with the share of a head that is rotated where it may be a part."""
    import transformers

    module, raw = TINY[name]
    parts = share is not None and name not in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
    raw = {**raw, "head_dim": 16, **({"partial_rotary_factor": share} if parts else {})}
    rope = {key: {**raw[key], "partial_rotary_factor": share} for key in ("rope_parameters",) if parts and key in raw}
    config = module.Config.from_json({**raw, **rope})
    assert config.rope.share == (share if parts else module.Config.from_json(TINY[name][1]).rope.share)
    written = config.to_json()
    assert module.Config.from_json(json.loads(json.dumps(written))) == config
    theirs = transformers.AutoConfig.for_model(**written).get_text_config()
    assert theirs.rope_parameters.get("partial_rotary_factor", 1.0) == config.rope.share


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_moe"])
def test_null_is_what_transformers_makes_of_it(model_type):
    import transformers

    raw = {**TINY[model_type][1], "use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}
    raw.pop("layer_types", None)
    if model_type != "qwen3_moe":  # whose class refuses it
        raw["num_key_value_heads"] = None
    ours, theirs = module_for(raw).Config.from_json(raw), transformers.AutoConfig.for_model(**raw)
    assert ours.windows == [theirs.sliding_window] * ours.num_hidden_layers == [None] * ours.num_hidden_layers
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    assert model_type == "qwen3_moe" or ours.num_key_value_heads == raw["num_attention_heads"]


def test_of_a_multimodal_config_the_text_model_has_its_own_fields():
    """What stands beside `text_config` is not its: but whether the head is tied is decided there."""
    import transformers

    inner = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 99}
    raw = {"model_type": "qwen3_5", "attention_bias": True, "head_dim": 32, "rms_norm_eps": 0.5, "hidden_size": 7,
           "text_config": inner}  # fmt: skip
    ours, theirs = build(raw).config, transformers.AutoConfig.for_model(**raw).get_text_config()
    for name in ("attention_bias", "head_dim", "rms_norm_eps", "hidden_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for outer in (True, False):
        for nested in ({}, {"tie_word_embeddings": not outer}):
            raw = {"model_type": "qwen3_5", "tie_word_embeddings": outer, "text_config": {**inner, **nested}}
            assert build(raw).config.tie_word_embeddings is transformers.AutoConfig.for_model(**raw).tie_word_embeddings is outer


BAD = [
    ("hidden_size", 0), ("hidden_size", -5), ("hidden_size", 4096.0), ("hidden_size", True), ("hidden_size", "4096"),
    ("hidden_size", 2**62), ("num_hidden_layers", 10**6), ("num_attention_heads", 0), ("num_key_value_heads", 4),
    ("vocab_size", []), ("head_dim", 7), ("rms_norm_eps", 0), ("rms_norm_eps", -1e-6), ("rms_norm_eps", math.nan),
    ("rms_norm_eps", math.inf), ("rope_theta", 0), ("rope_theta", -1), ("rope_theta", 1), ("hidden_act", "gelu"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 0}), ("rope_scaling", {"rope_type": "yarn", "factor": -4.0}),
    ("rope_scaling", {"rope_type": "yarn", "factor": math.inf}), ("rope_scaling", {"rope_type": "yarn"}),
    ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}), ("rope_scaling", "yarn"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}), ("partial_rotary_factor", 0.5),
    ("tie_word_embeddings", 1), ("use_sliding_window", "yes"), ("layer_types", ["full_attention"]),
    ("layer_types", ["full_attention", "linear_attention", "full_attention"]), ("layer_types", 3),
    ("layer_types", ["sliding_attention"] * 3), ("model_type", "qwen9"), ("model_type", None), ("model_type", ["qwen3"]),
    ("max_position_embeddings", 0),
]  # fmt: skip
BAD_MOE = [
    ("num_experts", 0), ("num_experts", -1), ("num_experts", 30_000), ("num_experts_per_tok", 8), ("num_experts_per_tok", 0),
    ("mlp_only_layers", [5]), ("mlp_only_layers", [-1]), ("mlp_only_layers", ["1"]), ("mlp_only_layers", 1),
    ("decoder_sparse_step", 0), ("norm_topk_prob", "true"), ("moe_intermediate_size", 0),
]  # fmt: skip


BAD_HYBRID = [
    ("head_dim", 7), ("num_key_value_heads", 4), ("linear_num_key_heads", 4), ("linear_num_value_heads", 0),
    ("linear_num_key_heads", -3), ("linear_num_value_heads", 2**62), ("linear_key_head_dim", 0), ("linear_value_head_dim", "8"),
    ("linear_conv_kernel_dim", 0), ("linear_conv_kernel_dim", 2**40), ("full_attention_interval", 0), ("layer_types", ["sliding_attention"] * 5),
    ("layer_types", ["linear_attention"]), ("use_sliding_window", True), ("hidden_act", "gelu"), ("rms_norm_eps", -1),
    ("partial_rotary_factor", 0), ("partial_rotary_factor", 1.5), ("partial_rotary_factor", 0.01),
    ("rope_parameters", {"partial_rotary_factor": "all"}), ("rope_parameters", {"mrope_section": [1, "2"]}),
]  # fmt: skip


@pytest.mark.parametrize("field,value", BAD_HYBRID)
@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5"])
def test_a_wrong_hybrid_value_is_named(model_type, field, value):
    named = next(iter(value)) if isinstance(value, dict) else field
    if named == "mrope_section" and model_type == "qwen3_next":
        return  # which has no such axes
    raw = {**TINY[model_type][1], "partial_rotary_factor": 0.25, "rope_parameters": None, field: value}
    with pytest.raises(ConfigError, match="partial_rotary_factor rotates 1 of 7" if field == "head_dim" else f": {named} |{named} "):
        build(raw)


@pytest.mark.parametrize("field,value", BAD)
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_wrong_value_is_named(model_type, field, value):
    named = field
    if isinstance(value, dict):  # a field inside rope_scaling is at fault
        named = "rope_type" if value["rope_type"] == "dynamic" else "beta_fast" if "beta_fast" in value else "factor"
    with pytest.raises(ConfigError, match=f": {named} "):
        build({**TINY[model_type][1], field: value})


@pytest.mark.parametrize("field,value", BAD_MOE)
@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "qwen3_next"])
def test_a_wrong_moe_value_is_named(model_type, field, value):
    with pytest.raises(ConfigError, match=field):
        build({**TINY[model_type][1], field: value})


@given(st.dictionaries(
    st.sampled_from(sorted({**TINY["qwen3_moe"][1], "rope_scaling": 0, "layer_types": 0, "sliding_window": 0,
                            "use_sliding_window": 0, "rms_norm_eps": 0, "linear_num_key_heads": 0, "rope_parameters": 0,
                            "partial_rotary_factor": 0, "full_attention_interval": 0, "text_config": 0})),
    st.recursive(st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=5),
                 lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3), max_leaves=4),
    max_size=4))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_any_values_parse_or_are_refused(changes):
    for base in (TINY["qwen3_moe"][1], TINY["qwen2_moe"][1], TINY["qwen3_next"][1], TINY["qwen3_5_moe"][1]):
        try:
            build({**base, **{k: v for k, v in changes.items() if k != "model_type"}})
        except QwenRefError:
            pass  # the point of the test: nothing else escapes


def test_auto_map_and_unknown_keys_are_ignored():
    assert build({**TINY["qwen3"][1], "auto_map": {"AutoModel": "evil.Model"}, "some_new_key": [1]}).num_parameters()


def test_dual_chunk_attention_is_refused_not_ignored():
    """Where a generation does not have it: Qwen3's config_1m.json."""
    with pytest.raises(ConfigError, match="dual_chunk_attention_config"):
        build({**TINY["qwen3"][1], "dual_chunk_attention_config": {"chunk_size": 262144}})
