"""How checkpoints lay out what a model holds in one tensor, and the multimodal files of which it reads the language model."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from conftest import TINY, make_pair
from safetensors.torch import save_file

import qwen_ref as qr
from qwen_ref.errors import CheckpointError
from qwen_ref.loading import load_model

IDS = torch.randint(0, 211, (2, 9), generator=torch.Generator().manual_seed(7))
MOE = [name for name, (_, config) in TINY.items() if config.get("num_experts")]


def one_by_one(weights):
    """Every expert's three projections as tensors of their own: qwen2_moe, qwen3_moe, qwen3_next."""
    return dict(weights)


def stacked(weights):
    """All experts' gate and up rows in one tensor, all down in another: qwen3_5_moe, qwen4_exp."""
    out = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for owner in {name.split(".experts.")[0] + ".experts" for name in weights if ".experts." in name}:
        count = len([name for name in weights if name.startswith(f"{owner}.") and name.endswith("up_proj.weight")])
        pairs = [torch.cat((weights[f"{owner}.{e}.gate_proj.weight"], weights[f"{owner}.{e}.up_proj.weight"])) for e in range(count)]
        out[f"{owner}.gate_up_proj"] = torch.stack(pairs)
        out[f"{owner}.down_proj"] = torch.stack([weights[f"{owner}.{e}.down_proj.weight"] for e in range(count)])
    return out


def one_layer_stacked(weights):
    owners = sorted({name.split(".experts.")[0] for name in weights if ".experts." in name})
    mine = {name: tensor for name, tensor in weights.items() if name.startswith(owners[0])}
    return {**{name: tensor for name, tensor in weights.items() if name not in mine}, **stacked(mine)}


def multimodal(weights):
    """The language model one level down, beside a vision tower."""
    inner = {f"model.language_{name}" if name.startswith("model.") else name: tensor for name, tensor in weights.items()}
    return {**inner, "model.visual.blocks.0.attn.qkv.weight": torch.ones(6, 2), "model.visual.patch_embed.proj.bias": torch.ones(2)}


def same_weights(again, model):
    mine, expected = dict(again.named_weights()), dict(model.named_weights())
    assert mine.keys() == expected.keys() and all(torch.equal(mine[name], expected[name]) for name in mine)


def write(folder, model, layout):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config.to_json()))
    weights = {name: tensor.clone().contiguous() for name, tensor in layout(dict(model.official_weights())).items()}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("layout", [one_by_one, stacked, one_layer_stacked])
@pytest.mark.parametrize("name", MOE)
def test_experts(name, layout, tmp_path):
    model, _ = make_pair(TINY[name][1])
    again = load_model(write(tmp_path / "m", model, layout), dtype=torch.float32)
    same_weights(again, model)


@pytest.mark.parametrize("name", MOE)
def test_a_transposed_stack_is_refused(name, tmp_path):
    """Qwen3-VL stores (E, H, 2I), another shape: no such tensor may slip in."""
    model, _ = make_pair(TINY[name][1])

    def transposed(weights):
        return {name: tensor.mT if "gate_up_proj" in name else tensor for name, tensor in stacked(weights).items()}

    with pytest.raises(CheckpointError, match=r"gate_up_proj is \[7, 48, 72\], the config wants \[7, 72, 48\]|gate_up_proj is \[7, 96, 72\]"):
        load_model(write(tmp_path / "m", model, transposed))


def test_half_a_stack_is_missing_experts(tmp_path):
    model, _ = make_pair(TINY["qwen3_5_moe"][1])

    def without_expert_3(weights):
        return {name: tensor for name, tensor in weights.items() if ".experts.3." not in name}

    with pytest.raises(CheckpointError, match=r"missing.*experts\.3\.") as caught:
        load_model(write(tmp_path / "m", model, without_expert_3))
    assert "experts.2." not in str(caught.value)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "qwen4_exp"])
def test_the_language_model_of_a_multimodal_file(name, tmp_path):
    model, _ = make_pair(TINY[name][1])
    again = load_model(write(tmp_path / "m", model, lambda weights: multimodal(stacked(weights))), dtype=torch.float32)
    same_weights(again, model)
    assert sorted(again.load_report.ignored) == ["model.visual.blocks.0.attn.qkv.weight", "model.visual.patch_embed.proj.bias"]


VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 48, "num_position_embeddings": 16,
          "patch_size": 4, "deepstack_visual_indexes": []}  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "qwen4_exp"])
def test_what_transformers_saves_of_the_whole(name, tmp_path):
    """The multimodal model as transformers writes it, config with `text_config` and all, against its own text logits."""
    text = {**TINY[name][1], "dtype": "float32", "tie_word_embeddings": False}
    config = transformers.AutoConfig.for_model(name, text_config=text, vision_config=VISION, tie_word_embeddings=False)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    theirs.save_pretrained(tmp_path / "m")
    assert "text_config" in json.loads((tmp_path / "m" / "config.json").read_text())
    ours = load_model(tmp_path / "m")
    assert ours.dtype == torch.float32 and ours.load_report.ignored
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    report = qr.verify(tmp_path / "m", against="transformers", prompts=IDS[:1].tolist(), new_tokens=8, progress=False, dtype="float32")
    assert report.ok, report.text()
