"""GGUF files as models: loaded, run, dequantised, saved; the oracle is transformers on gguf's own dequantisation."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
import transformers
from quantised import CONFIGS

import qwen_ref as qr
from qwen_ref import backend
from qwen_ref.describe import describe
from qwen_ref.errors import CheckpointError
from qwen_ref.hub import find
from qwen_ref.loading import ASSETS, load_model
from qwen_ref.quant.gguf import ggml_name, open_gguf
from qwen_ref.quant.gguf_write import Source, plan, write_gguf
from qwen_ref.quant.layers import PackedEmbedding, PackedExperts, PackedLinear

# Widths that hold whole blocks of 256 in some matrices and only of 32 in others, so that presets fall back.
_WIDE = {"mlp_only_layers": [], "hidden_size": 256, "intermediate_size": 288, "num_attention_heads": 8, "vocab_size": 4096}


def write(folder, model_type, preset, **changes):
    """A random model as a plain checkpoint in folder, and as folder/model.gguf."""
    raw = {**CONFIGS[model_type], **_WIDE, **changes}
    config = transformers.AutoConfig.for_model(**raw)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.1 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder / "plain")
    plain = load_model(folder / "plain", dtype=torch.float32, progress=False)
    raw = json.loads((folder / "plain" / "config.json").read_text())
    tensors = plain.checkpoint_tensors()
    files = {name: (ASSETS / "tiny" / name).read_bytes() for name in
             ("tokenizer.json", "tokenizer_config.json", "generation_config.json") if (ASSETS / "tiny" / name).exists()}  # fmt: skip
    sources = [
        Source(p.name, p.shape, p.kind, lambda p=p: torch.stack([tensors[part] for part in p.parts]).view(p.shape))
        for p in plan({name: tuple(t.shape) for name, t in tensors.items()}, raw, preset)
    ]
    write_gguf(folder / "model.gguf", raw, files, sources)
    return folder / "model.gguf", plain


def dequantised(path):
    """Official name -> values of every tensor, by the gguf package."""
    values = {t.name: np.array(gguf.quants.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}
    with open_gguf(path) as checkpoint:
        return {name: torch.from_numpy(values[ggml_name(name)]).view(shape) for name, shape in checkpoint.shapes.items()}


@pytest.mark.parametrize("preset", ["q8_0", "q4_0", "q4_k"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_file_is_its_dequantised_weights(tmp_path, model_type, preset, tied):
    path, _ = write(tmp_path, model_type, preset, tie_word_embeddings=tied)
    model = load_model(path, dtype=torch.float32, progress=False)
    assert isinstance(model.model.embed_tokens, PackedEmbedding) and isinstance(model.lm_head, PackedLinear)
    exact, weights = dequantised(path), dict(model.named_weights())
    for name, tensor in exact.items():
        if ".experts." in name:
            owner, _, projection = name.removesuffix(".weight").rpartition(".")
            half = model.config.moe_intermediate_size
            stack = {"gate_proj": (":half", "gate_up_proj"), "up_proj": ("half:", "gate_up_proj"), "down_proj": ("", "down_proj")}
            part, parameter = stack[projection]
            mine = weights[f"{owner}.{parameter}"]
            mine = mine[:, :half] if part == ":half" else mine[:, half:] if part else mine
        else:
            mine = weights[name]
        assert torch.equal(mine, tensor), name
    loaded = load_model(path, dtype=torch.float32, dequantize=True, progress=False)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.named_weights())
    loaded.save(tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()
    ids = torch.randint(0, 500, (2, 9))
    with torch.no_grad(), backend.use("eager"):
        ours, right = model(ids), theirs(ids).logits
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4 * float(right.std()))
    if "moe" in model_type:
        assert any(isinstance(m, PackedExperts) for m in model.modules())


def test_a_file_alone_chats(tmp_path):
    """Config, tokenizer, template and end tokens all come from the file."""
    plain, tokenizer = qr.load("tiny")
    tensors = plain.checkpoint_tensors()
    raw = json.loads((ASSETS / "tiny" / "config.json").read_text())
    planned = plan({name: tuple(t.shape) for name, t in tensors.items()}, raw, "q8_0")
    write_gguf(tmp_path / "tiny.gguf", raw, plain.extra_files, [
        Source(p.name, p.shape, p.kind, lambda p=p: tensors[p.parts[0]].float()) for p in planned])
    model, again = qr.load(tmp_path / "tiny.gguf")
    text = "Once upon a time, 小猫 ran!  \n\t1234"
    assert again.encode(text) == tokenizer.encode(text)
    messages = [{"role": "user", "content": "Tell me a story."}]
    assert again.render(messages) == tokenizer.render(messages)
    ours = qr.generate(model, again, messages, max_tokens=12, temperature=0)[0]
    theirs = qr.generate(plain, tokenizer, messages, max_tokens=12, temperature=0)[0]
    assert ours.text[:10] == theirs.text[:10]  # eight bits: the same beginning
    assert model.weight_bytes() < 0.6 * plain.weight_bytes()  # of bfloat16
    assert qr.load(tmp_path)[0].num_parameters() == plain.num_parameters()  # the only file of its folder
    with pytest.raises(CheckpointError, match="2 GGUF models"):
        (tmp_path / "other.gguf").write_bytes(b"GGUF")
        find(tmp_path)


def test_verify_reads_a_file(tmp_path):
    path, _ = write(tmp_path, "qwen3_moe", "q4_k")
    report = qr.verify(path, new_tokens=6, progress=False)
    assert report.ok, report.verdict
    assert {"linear_gguf", "linear_int8"} & {c.name.split("[")[0] for c in report.checks if c.level == "L1"}
    described = describe(path)
    assert described.total == load_model(path, progress=False).num_parameters()
    held = load_model(path, dtype=torch.float32, progress=False).weight_bytes()
    assert 0.95 * held < described.weight_bytes < held  # Q5_0 is held as eight bits
    assert described.format == "gguf: Q4_K, Q5_0, Q6_K, Q8_0"


def test_a_tensor_that_is_missing_or_that_nobody_consumes_is_named(tmp_path):
    _, plain = write(tmp_path, "qwen3", "q8_0")
    tensors = plain.checkpoint_tensors()
    raw = json.loads((tmp_path / "plain" / "config.json").read_text())
    files = plain.extra_files
    planned = plan({name: tuple(t.shape) for name, t in tensors.items()}, raw, "q8_0")

    def rewrite(name, planned):
        write_gguf(tmp_path / name, raw, {f: (ASSETS / "tiny" / f).read_bytes() for f in ("tokenizer.json", "tokenizer_config.json")},
                   [Source(p.name, p.shape, p.kind, lambda p=p: tensors[p.parts[0]].reshape(p.shape)) for p in planned])  # fmt: skip
        return tmp_path / name

    lacking = rewrite("lacking.gguf", [p for p in planned if "1.self_attn.v_proj" not in p.name])
    with pytest.raises(CheckpointError, match=r"missing \(1\): model.layers.1.self_attn.v_proj.weight"):
        load_model(lacking, progress=False)
    router = planned[1]._replace(name="model.layers.0.mlp.gate.weight", shape=(1, 256), kind="F32", parts=("model.norm.weight",))
    more = rewrite("more.gguf", [*planned, router])
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): model.layers.0.mlp.gate.weight"):
        load_model(more, progress=False)
    assert files == {}
