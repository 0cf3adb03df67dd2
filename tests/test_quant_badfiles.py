"""Quantised checkpoints that are damaged, hostile or not implemented: one kind of error, which names what and where."""

from __future__ import annotations

import copy
import json
import math
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from conftest import make_pair
from quantised import FORMATS, HYBRIDS, checkpoint
from safetensors.torch import load_file, save_file

from qwen_ref.checkpoint import save_model
from qwen_ref.config import Fields
from qwen_ref.errors import CheckpointError, ConfigError
from qwen_ref.loading import load_model
from qwen_ref.quant import convert
from qwen_ref.quant.convert import read_format
from qwen_ref.quant.format import matches, patterns

AWQ, GPTQ, FP8 = FORMATS["awq"][0], FORMATS["gptq-int4"][0], FORMATS["fp8"][0]
INT4, NF4 = FORMATS["compressed-int4"][0], FORMATS["bnb-nf4"][0]


def changed(settings, **changes):
    return {**copy.deepcopy(settings), **changes}


def weights_changed(**changes):
    settings = copy.deepcopy(INT4)
    settings["config_groups"]["group_0"]["weights"].update(changes)
    return settings


@pytest.mark.parametrize("settings,match", [
    ("int4", "not an object"),
    ([], "not an object"),
    ({}, "quant_method is None"),
    ({"quant_method": "quip#"}, "quant_method is 'quip#', which is not implemented; there are awq"),
    ({"quant_method": ["awq"]}, "quant_method"),
    ({"quant_algo": "FP8", "producer": "modelopt"}, "quant_method is None"),
    ({"quant_algo": "FP8", "producer": {"name": ["modelopt"]}}, "quant_method is None"),
    ({"quant_algo": "FP4", "producer": {"name": "modelopt"}}, "quant_algo is 'FP4'"),
    (changed(AWQ, version="gemv"), "version is 'gemv'"),
    (changed(AWQ, bits=3), "bits is 3"),
    (changed(AWQ, zero_point=False), "zero_point"),
    (changed(AWQ, group_size=0), "group_size is 0"),
    (changed(AWQ, group_size=-2), "group_size is -2"),
    (changed(AWQ, group_size=True), "group_size is True"),
    (changed(AWQ, group_size=1e30), "group_size is 1e\\+30"),
    (changed(AWQ, modules_to_not_convert="lm_head"), "not a list"),
    (changed(AWQ, modules_to_not_convert=[1]), "holds '1'"),
    (changed(AWQ, modules_to_not_convert=["x" * 500]), "not the name of a module"),
    (changed(GPTQ, bits=2), "bits is 2"),
    (changed(GPTQ, checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
    (changed(GPTQ, dynamic={"+:x": {"bits": 8}}), r"dynamic has other settings for '\+:x'"),
    (changed(GPTQ, dynamic={"lm_head": {}, "model.layers.0": {"group_size": 32}}), "dynamic has other settings for 'model.layers.0'"),
    (changed(GPTQ, dynamic={"-:(a+)+$": {}}), "too complex"),
    (changed(GPTQ, dynamic=["-:x"]), "not an object"),
    (changed(FP8, fmt="e5m2"), "fmt is 'e5m2'"),
    (changed(FP8, weight_block_size=[128]), "weight_block_size"),
    (changed(FP8, weight_block_size=[128, 0]), "weight_block_size"),
    (changed(FP8, weight_block_size="128"), "not a list"),
    (changed(FP8, weight_block_size=[10**30, 10**30]), "weight_block_size is .*, not two integers from 1 to 16777216"),
    (weights_changed(type="float", num_bits=8, strategy="block"), "block_structure is missing"),
    (weights_changed(type="float", num_bits=8, strategy="block", block_structure=[32, 1 << 40]), "block_structure is .*not two"),
    (changed(INT4, config_groups={}), "config_groups is empty"),
    (changed(INT4, config_groups=[1]), "not an object"),
    (changed(INT4, config_groups={"a": {**INT4["config_groups"]["group_0"], "targets": []}}), "config_groups has no targets"),
    (changed(INT4, config_groups={"a": None}), "weights is missing"),
    (changed(INT4, format="marlin-24"), "marlin-24"),
    (changed(INT4, sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
    (changed(INT4, ignore=["re:("]), "no regular expression"),
    (changed(INT4, ignore=["re:(a+)+$"]), "too complex"),
    (changed(INT4, ignore=["re:" + ".*" * 20]), "too complex"),
    (changed(INT4, ignore=["re:" + ".*" * 5 + "Z"]), "too complex"),
    (changed(INT4, ignore=["re:" + ".?" * 25 + "Z"]), "too complex"),
    (changed(INT4, ignore=["re:" + "(.|.)" * 25 + "Z"]), "too complex"),
    (changed(INT4, ignore=["re:a{99999999999}"]), "no regular expression"),
    (weights_changed(num_bits=3), "num_bits is 3"),
    (weights_changed(strategy="block"), "strategy is 'block'"),
    (weights_changed(group_size=0), "group_size is 0"),
    (changed(NF4, load_in_8bit=True), "both true or both false"),
    (changed(NF4, bnb_4bit_quant_type="int3"), "bnb_4bit_quant_type"),
    ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ'"),
])  # fmt: skip
def test_a_config_that_is_wrong_or_not_implemented_is_refused(settings, match):
    with pytest.raises(ConfigError, match=match) as caught:
        read_format({"quantization_config": settings})
    assert "config.json" in str(caught.value) and len(str(caught.value)) < 800


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj"


def put(name, make):
    return lambda tensors: tensors.__setitem__(name, make(tensors.get(name)))


def nan(tensor):
    values = tensor.float()
    values.view(-1)[-1] = float("nan")
    return values.to(tensor.dtype)


def state(change):
    def make(tensor):
        data = json.loads(bytes(tensor.tolist()))
        change(data)
        return torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)

    return make


STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"
DAMAGE = {
    "a scale is missing": ("awq", lambda t: t.pop(f"{Q}.scales"), rf"missing \(1\): {Q}.scales"),
    "zeros are missing": ("gptq-int4", lambda t: t.pop(f"{Q}.qzeros"), rf"missing \(1\): {Q}.qzeros"),
    "the codes are missing": ("compressed-int4", lambda t: t.pop(f"{Q}.weight_packed"), rf"missing \(1\): {Q}.weight_packed"),
    "a scale of FP8 is missing": ("fp8", lambda t: t.pop(f"{Q}.weight_scale_inv"), rf"missing \(1\): {Q}.weight_scale_inv"),
    "the map is missing": ("bnb-nf4", lambda t: t.pop(f"{Q}.weight.quant_map"), rf"missing \(1\): {Q}.weight.quant_map"),
    "nested scales are missing": ("bnb-nf4-nested", lambda t: t.pop(f"{Q}.weight.nested_absmax"), "missing|nested_absmax"),
    "a tensor too many": ("awq", put(f"{Q}.qscales", lambda _: torch.ones(2)), rf"unexpected \(1\): {Q}.qscales"),
    "a matrix of a module in full precision": (
        "awq", put("lm_head.qweight", lambda _: torch.ones(2, 2).int()), r"unexpected \(1\): lm_head.qweight"),
    "another shape": ("gptq-int4", put(f"{Q}.scales", lambda s: s[:, :-1]), rf"wrong shape \(1\): {Q}.scales"),
    "another dtype": ("gptq-int4", put(f"{Q}.qweight", lambda q: q.long()), rf"wrong dtype \(1\): {Q}.qweight"),
    "scales that are NaN": ("awq", put(f"{Q}.scales", nan), f"{Q}: AWQ's scales holds NaN"),
    "GPTQ scales that are NaN": ("gptq-int8", put(f"{Q}.scales", nan), f"{Q}: GPTQ's scales holds NaN"),
    "FP8 scales that are NaN": ("fp8", put(f"{Q}.weight_scale_inv", nan), f"{Q}: weight_scale_inv holds NaN"),
    "FP8 weights that are NaN": (
        "fp8-tensor", put(f"{Q}.weight", lambda w: w.view(torch.uint8).fill_(255).view(w.dtype)), f"{Q}: weight holds NaN"),
    "compressed scales that are NaN": ("compressed-int8", put(f"{Q}.weight_scale", nan), f"{Q}: weight_scale holds NaN"),
    "MXFP4 scales that are NaN": ("compressed-mxfp4", put(f"{Q}.weight_scale", lambda s: s.fill_(255)), "weight_scale holds NaN"),
    "NVFP4's scale is zero": ("compressed-nvfp4", put(f"{Q}.weight_global_scale", lambda s: s * 0), "weight_global_scale holds NaN"),
    "NVFP4's scale is infinite": ("compressed-nvfp4", put(f"{Q}.weight_global_scale", lambda s: s * math.inf), "weight_global_scale holds NaN"),
    "bitsandbytes scales that are NaN": ("bnb-int8", put(f"{Q}.SCB", nan), f"{Q}: SCB holds NaN"),
    "NF4 scales that are NaN": ("bnb-nf4", put(f"{Q}.weight.absmax", nan), f"{Q}: weight.absmax holds NaN"),
    "a group that is not there": ("gptq-int4", put(f"{Q}.g_idx", lambda g: g.fill_(99)), f"{Q}: g_idx names a group outside"),
    "a group below zero": ("gptq-int4", put(f"{Q}.g_idx", lambda g: g - 1), f"{Q}: g_idx names a group outside"),
    "a group of integers that is not there": (
        "compressed-int4", put(f"{Q}.weight_g_idx", lambda _: torch.full((96,), 99)), f"{Q}: weight_g_idx names a group outside"),
    "a bias that is not zero": (
        "gptq-int4", put("model.layers.1.mlp.down_proj.bias", lambda _: torch.ones(96)), "down_proj.bias is not zero"),
    "a zero beyond four bits": (
        "compressed-int4-tensor", put(f"{Q}.weight_zero_point", lambda z: z * 0 + 8), f"{Q}: weight_zero_point holds what 4 bits do not"),
    "another matrix's shape": (
        "compressed-int4", put(f"{Q}.weight_shape", lambda s: s.flip(0)), f"{Q}: weight_shape is"),
    "columns that int8 in another order": (
        "bnb-int8", put(f"{Q}.weight_format", lambda f: f + 2), f"{Q}: weight_format is not 0"),
    "a state that is no JSON": ("bnb-nf4", put(STATE, lambda s: s[:-3]), f"{Q}: quant_state of bitsandbytes: not valid JSON"),
    "a state that is a list": ("bnb-nf4", put(STATE, lambda s: torch.tensor([91, 93], dtype=torch.uint8)), "not a JSON object"),
    "a state of megabytes": (
        "bnb-nf4", put(STATE, lambda s: torch.zeros(1 << 20, dtype=torch.uint8)), "which bitsandbytes does not write"),
    "a state of another shape": ("bnb-nf4", put(STATE, state(lambda d: d.update(shape=[96, 192]))), f"{Q}: .*the config wants"),
    "blocks of nothing": ("bnb-nf4", put(STATE, state(lambda d: d.update(blocksize=0))), "blocksize is 0"),
    "blocks of another size": ("bnb-nf4", put(STATE, state(lambda d: d.update(blocksize=128))), "not one for each 128 weights"),
    "no offset": ("bnb-nf4-nested", put(STATE, state(lambda d: d.pop("nested_offset"))), "nested_offset is None"),
    "an offset beyond fp32": (
        "bnb-nf4-nested", put(STATE, state(lambda d: d.update(nested_offset=10**400))), "nested_offset is 1000.*not a number"),
}  # fmt: skip


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(tmp_path, case, dequantize):
    format, change, match = DAMAGE[case]
    checkpoint(tmp_path, "qwen3", format)
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(tmp_path, progress=False, dequantize=dequantize)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_bias_of_zeros_that_the_model_does_not_have_is_let_go(tmp_path, dequantize):
    """AutoGPTQ's first versions wrote one for every matrix."""
    checkpoint(tmp_path, "qwen3", "gptq-int4")
    rewrite(tmp_path, put("model.layers.1.mlp.down_proj.bias", lambda _: torch.zeros(96).half()))
    assert load_model(tmp_path, progress=False, dequantize=dequantize).model.layers[1].mlp.down_proj.bias is None


def test_a_block_larger_than_its_matrix_takes_no_more_memory(tmp_path):
    def one(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
            tensors[name] = tensors[name][:1, :1]

    checkpoint(tmp_path, "qwen3", "fp8")
    rewrite(tmp_path, one)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"]["weight_block_size"] = [1 << 24, 1 << 24]  # repeated so often, one scale would be 10^15 bytes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    packed, plain = (load_model(tmp_path, dtype=torch.float32, progress=False, dequantize=expanded) for expanded in (False, True))
    stored = load_file(tmp_path / "model.safetensors")
    weight = stored[f"{Q}.weight"].float() * stored[f"{Q}.weight_scale_inv"]
    for model in (packed, plain):
        assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight)


def test_a_group_size_that_does_not_divide_is_named(tmp_path):
    checkpoint(tmp_path, "qwen3", "awq")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"]["group_size"] = 40
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.q_proj: the group size 40 does not divide the 96 columns"):
        load_model(tmp_path, progress=False)


def test_a_matrix_that_the_file_has_in_full_precision_is_noted(tmp_path):
    dequantised = checkpoint(tmp_path, "qwen3", "awq")

    def plain(tensors):
        for name in ("qweight", "qzeros", "scales"):
            del tensors[f"{Q}.{name}"]
        tensors[f"{Q}.weight"] = dequantised[f"{Q}.weight"]

    rewrite(tmp_path, plain)
    model = load_model(tmp_path, dtype=torch.float32, progress=False)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, dequantised[f"{Q}.weight"])
    assert model.load_report.notes == [f"left in full precision by the file: {Q}"]


@pytest.mark.parametrize("format, ignore", [
    ("compressed-int4", [f"re:.*.*.*.*{i}" for i in range(500)]),
    ("compressed-int4", ["model.layers"] * 10**4),
    ("modelopt-nvfp4", [f"*{i}*Z" for i in range(5000)]),
])  # fmt: skip
def test_names_that_would_take_hours_to_match_are_refused(tmp_path, monkeypatch, format, ignore):
    checkpoint(tmp_path, "qwen3", format)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"]["ignore"] += ignore
    (tmp_path / "config.json").write_text(json.dumps(raw))
    monkeypatch.setattr("qwen_ref.quant.convert.MOST_STEPS", convert.MOST_STEPS * 16 // 92_747)  # as if it had all experts
    with pytest.raises(ConfigError, match="16 matrices with .* names may take"):
        load_model(tmp_path, progress=False)


def test_wildcards_that_would_be_tried_for_ever():
    """Every star of a shell pattern once doubled the time, at least."""
    given = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*o" * 60 + "Z", "*mlp*g?te", "*.[qk]_proj"]}
    format = read_format({"quantization_config": given})
    names = [f"model.layers.0.{part}" for part in ("mlp.gate", "mlp.gate_proj", "self_attn.k_proj", "self_attn.v_proj")]
    start = time.perf_counter()
    assert [format.scheme_of(name) is None for name in names] == [True, False, True, False]
    assert time.perf_counter() - start < 1


def test_names_match_as_the_formats_mean_them():
    assert matches("model.layers.3.mlp.gate", ["mlp.gate"]) and not matches("model.layers.3.mlp.gate_proj", ["mlp.gate"])
    assert matches("lm_head", ["lm_head"]) and not matches("model.lm_head_2", ["lm_head"])
    assert matches("model.layers.3.mlp.gate", ["re:.*mlp.gate$"]) and not matches("model.layers.3.mlp.gate_proj", ["re:.*mlp.gate$"])
    assert not matches("model.layers.13.mlp", ["layers.3"]) and matches("model.layers.3.mlp", ["layers.3"])
    assert patterns(Fields({"ignore": ["re:.*gate$", "lm_head"]}), "ignore") == ("re:.*gate$", "lm_head")


FUZZ = """
    import json, random, resource, sys
    from pathlib import Path
    import torch
    from safetensors.torch import load_file, save_file
    from qwen_ref.errors import QwenRefError
    from qwen_ref.loading import load_model
    from qwen_ref.quant.layers import PackedLinear

    resource.setrlimit(resource.RLIMIT_AS, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + (6 << 30),) * 2)
    folder, seed, part, keys = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4].split()
    raw = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    plain = "quantization_config" not in raw
    chosen = sorted(n for n in tensors if part in n and (plain or n.rpartition(".")[2] not in ("weight", "bias")) or "SCB" in n)
    random.seed(seed)
    VALUES = [None, True, -1, 0, 1, 3, 1 << 40, -0.5, 1e300, "x", "int", "group", [], [0], {}, {"a": 1}, "re:.*"]
    if plain:
        VALUES += [2, 4, 12, 64, 1 << 14, 1 << 24, 1 << 63, "full_attention", "linear_attention", ["linear_attention"] * 2]
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(60):
        config, stored = json.loads(json.dumps(raw)), dict(tensors)
        for _ in range(random.randint(1, 3)):
            if random.random() < 0.5:
                at, key = config, random.choice(keys)
                while isinstance(at[key], (dict, list)) and at[key] and random.random() < 0.8:
                    at = at[key]
                    key = random.choice(list(at) if isinstance(at, dict) else range(len(at)))
                at[key] = random.choice(VALUES)
            else:
                name = random.choice(chosen)
                t = stored.get(name, torch.ones(1))
                changed = random.choice([
                    lambda: t.flatten()[: t.numel() // 2], lambda: t[None], lambda: t.float(), lambda: t.int() * 0 - 1,
                    lambda: torch.randint(0, 256, (t.nbytes,)).byte().view(t.dtype).view(t.shape) if t.dim() else t,
                    lambda: torch.zeros(0, dtype=t.dtype), lambda: (t.float() * float("inf")).to(t.dtype), lambda: None,
                ])()
                if changed is None:
                    stored.pop(name, None)
                else:
                    stored[name] = changed
        (folder / "config.json").write_text(json.dumps(config))
        save_file({n: t.contiguous().clone() for n, t in stored.items()}, folder / "model.safetensors")
        try:
            model = load_model(folder, dtype=torch.float32, progress=False)
            model(torch.tensor([[1, 2, 3]]))
            outcomes["loaded"] += 1
            if plain and {n: t.shape for n, t in model.checkpoint_tensors().items()} != {n: t.shape for n, t in stored.items()}:
                raise RuntimeError(f"loaded what does not fit: {config}")
        except QwenRefError as error:
            assert len(str(error)) < 3000, len(str(error))
            outcomes["refused"] += 1
    print(json.dumps(outcomes))
"""


@pytest.mark.parametrize("format", ["awq", "gptq-int8-act-order", "fp8", "compressed-int4-zeros", "bnb-nf4-nested", "modelopt-nvfp4"])
def test_mutations_of_config_and_tensors_load_or_are_refused(tmp_path, format):
    checkpoint(tmp_path, "qwen2", format)
    assert fuzz(tmp_path, format, "self_attn", "quantization_config")["refused"] > 20


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_mutations_of_a_gated_delta_net_load_or_are_refused(tmp_path, model_type):
    save_model(make_pair(HYBRIDS[model_type])[0], HYBRIDS[model_type], tmp_path / "m")
    keys = [key for key in HYBRIDS[model_type] if key.startswith("linear_")]
    outcomes = fuzz(tmp_path / "m", model_type, "linear_attn", *keys, "layer_types", "rope_parameters")
    assert outcomes["refused"] > 20 and outcomes["loaded"], outcomes


def fuzz(folder: Path, seed: str, part: str, *keys: str) -> dict[str, int]:
    """What became of mutations of the config under these keys, and of tensors whose name holds `part`."""
    number = str(random.Random(seed).randrange(1 << 30))
    command = [sys.executable, "-c", textwrap.dedent(FUZZ), str(folder), number, part, " ".join(keys)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout)
