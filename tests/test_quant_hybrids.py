"""Quantised Qwen3.5 as it is published: names of the multimodal file, what stays in full precision, formats that are mixed."""

from __future__ import annotations

import fnmatch
import json

import pytest
import torch
from quantised import FORMATS, HYBRIDS, KEPT, is_quantised, oracle, spelled, write_checkpoint
from safetensors.torch import load_file, save_file
from test_quant_formats import IDS, matrices

from qwen_ref import backend
from qwen_ref.config import text_config
from qwen_ref.describe import describe
from qwen_ref.errors import ConfigError
from qwen_ref.loading import build, load_model
from qwen_ref.quant.convert import read_format
from qwen_ref.quant.fp4 import NVFP4
from qwen_ref.quant.fp8 import FP8

LAYERS = ("model.language_model.layers.0", "model.language_model.layers.1")
FP8_SETTINGS = {  # every module by name, as the official FP8 repositories list them
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [64, 48],
    "modules_to_not_convert": [
        "lm_head", "model.language_model.embed_tokens", "model.visual.blocks.0.attn.qkv", "mtp.fc", "model.language_model.norm",
        *(f"{layer}.{part}" for layer in LAYERS for part in (
            "input_layernorm", "post_attention_layernorm", "linear_attn.conv1d", "linear_attn.in_proj_a", "linear_attn.in_proj_b",
            "mlp.gate", "mlp.shared_expert_gate")),
    ],
}  # fmt: skip
NVFP4_SETTINGS = {  # the mixers and the shared experts stay, as in nvidia/Qwen3.5-397B-A17B-NVFP4
    "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": [
        "lm_head", "*.mlp.shared_expert.*", "model.visual*", "mtp*", "model.language_model.layers.*.mlp.gate",
        *(f"{layer}.{part}" for layer in LAYERS for part in ("linear_attn*", "self_attn*", "mlp.shared_expert_gate"))],
}  # fmt: skip


GPTQ_SETTINGS = {  # as in Qwen/Qwen3.5-35B-A3B-GPTQ-Int4
    **FORMATS["gptq-int4"][0], "dynamic": {
        "lm_head": {}, "model.language_model.embed_tokens": {},
        **{f"-:.*{part}.*": {} for part in ("attn", "shared_expert", "mtp", "visual")}},
}  # fmt: skip


def mixed(name):
    """nvidia/Qwen3.6-27B-NVFP4 and 35B-A3B: mixers in FP8, feed-forwards in NVFP4."""
    return "modelopt-fp8" if "attn" in name else "modelopt-nvfp4"


def mixed_settings(model_type):
    network = build({**HYBRIDS[model_type]})
    names = {spelled(name.split(".experts.")[0] + ".experts" if ".experts." in name else name.removesuffix(".weight"))
             for name in network.checkpoint_tensors() if is_quantised(name)}  # fmt: skip
    layers = {name: {"quant_algo": "FP8"} if "attn" in name else {"quant_algo": "W4A16_NVFP4", "group_size": 16} for name in names}
    return {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "ignore": ["mtp*", "model.visual*"]}


def compare(folder, dequantised, quantised):
    model = load_model(folder, dtype=torch.float32, progress=False)
    found = dict(matrices(model))
    assert set(found) == quantised
    for name, weight in found.items():  # where the table has the matrix's scale, two roundings
        torch.testing.assert_close(weight, dequantised[name].float(), rtol=2.5e-7, atol=0)
    with torch.no_grad(), backend.use("eager"):
        ours, exact = model(IDS), oracle(folder, dequantised)(IDS).logits
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4 * float(exact.std()))
    return model


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
def test_fp8_by_the_names_of_a_multimodal_file(tmp_path, model_type):
    dequantised = write_checkpoint(tmp_path, model_type, lambda name: "fp8", FP8_SETTINGS, multimodal=True)
    model = compare(tmp_path, dequantised, set(filter(is_quantised, dequantised)))
    assert model.load_report.notes == []  # nothing is in full precision that the config does not name
    stored = load_file(tmp_path / "model.safetensors")
    assert any("language_model.layers.0.linear_attn.in_proj_z.weight_scale_inv" in name for name in stored)
    described = describe(tmp_path)
    assert described.total == model.num_parameters() and described.format == "fp8"


def test_nvfp4_of_experts_only(tmp_path):
    """What the config ignores by shell patterns stays plain, also scales of a KV cache that is quantised elsewhere."""
    dequantised = write_checkpoint(tmp_path, "qwen3_5_moe", lambda name: "modelopt-nvfp4", NVFP4_SETTINGS, multimodal=True)
    experts = leave_all_but_experts(tmp_path, dequantised)
    scales = {f"{LAYERS[1]}.self_attn.{p}_proj.{p}_scale": torch.tensor(0.25) for p in "kv"}
    save_file(load_file(tmp_path / "model.safetensors") | scales, tmp_path / "model.safetensors")
    model = compare(tmp_path, dequantised, experts)
    assert len(model.load_report.ignored) == 3 and model.load_report.notes == []


def test_gptq_of_experts_only(tmp_path):
    dequantised = write_checkpoint(tmp_path, "qwen3_5_moe", lambda name: "gptq-int4", GPTQ_SETTINGS, multimodal=True)
    model = compare(tmp_path, dequantised, leave_all_but_experts(tmp_path, dequantised))
    routers = ", ".join(f"model.layers.{i}.mlp.gate" for i in range(2))  # which the official config does not name
    assert model.load_report.notes == [f"left in full precision by the file: {routers}"]


def leave_all_but_experts(folder, dequantised):
    """Rewrite a checkpoint with mixers and shared experts in full precision. Returns the names of what is still quantised."""
    stored = load_file(folder / "model.safetensors")
    plain = {name for name in dequantised if is_quantised(name) and ("attn" in name or "shared_expert" in name)}
    for name in plain:
        for key in [key for key in stored if key.startswith(spelled(name).removesuffix("weight"))]:
            del stored[key]
        stored[spelled(name)] = dequantised[name]
    save_file(stored, folder / "model.safetensors")
    return set(filter(is_quantised, dequantised)) - plain


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
def test_mixed_precision(tmp_path, model_type):
    dequantised = write_checkpoint(tmp_path, model_type, mixed, mixed_settings(model_type), multimodal=True)
    compare(tmp_path, dequantised, set(filter(is_quantised, dequantised)))


def official(raw, name):
    """The quantisation of a module by its official name: fnmatch over the lists as ModelOpt means them."""
    given = raw["quantization_config"]
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in given["ignore"]):
        return None
    layers = given.get("quantized_layers")
    if layers is None:
        return "NVFP4"
    owner = name.split(".experts.")[0] + ".experts" if ".experts." in name else name
    return layers[owner]["quant_algo"].removeprefix("W4A16_") if owner in layers else None


@pytest.mark.parametrize("name", ["Qwen3.5-122B-A10B", "Qwen3.5-397B-A17B", "Qwen3.6-27B", "Qwen3.6-35B-A3B"])
def test_the_official_nvfp4_configs(data, name):
    raw = json.loads((data / "configs" / f"nvidia--{name}-NVFP4_config.json").read_text())
    format = read_format(text_config(raw))
    owners = {tensor.removesuffix(".weight") for tensor, t in build(text_config(raw)).checkpoint_tensors().items() if t.dim() == 2}
    chosen = [o for o in sorted(owners) if "embed" not in o and (".experts." not in o or ".experts.7." in o or ".experts.100." in o)]
    schemes = {owner: format.scheme_of(owner) for owner in chosen}
    for owner, scheme in schemes.items():
        expected = {"FP8": FP8, "NVFP4": NVFP4, None: type(None)}[official(raw, spelled(owner))]
        assert isinstance(scheme, expected), owner
    assert len({type(scheme) for scheme in schemes.values()}) == (2 if "3.5" in name else 3)
    small = [o for o in chosen if o.endswith(tuple(f".{kept}" for kept in KEPT))]
    assert small and ("3.6" not in name or not any(schemes[o] for o in small))


def test_the_official_fp8_of_a_whole_matrix(data):
    """ModelOpt's first files name their producer, and no quant_method."""
    raw = json.loads((data / "configs" / "Qwen--Qwen3-32B-FP8-Static-PerTensor_config.json").read_text())
    format = read_format(raw)
    assert format.scheme_of("model.layers.63.mlp.down_proj") == FP8(None, "weight_scale")
    assert format.scheme_of("lm_head") is None


@pytest.mark.parametrize("layers, match", [
    ({}, "quantized_layers is empty"),
    ({"model.layers.0.mlp": {"quant_algo": "W4A8_AWQ"}}, "W4A8_AWQ"),
    ({"model.layers.0.mlp": "FP8"}, "not an object"),
    ([], "not an object"),
])  # fmt: skip
def test_mixed_precision_that_is_wrong(layers, match):
    with pytest.raises(ConfigError, match=match):
        read_format({"quantization_config": {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}})
