"""The draft layer (multi-token prediction): against a layer assembled from transformers' parts, and on its way through files."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TINY, casts_lifted, make_pair

import qwen_ref as qr
from qwen_ref import backend
from qwen_ref.describe import describe
from qwen_ref.errors import CheckpointError, RequestError
from qwen_ref.loading import load_model
from qwen_ref.quant.making import quantize_model
from qwen_ref.safetensors_file import SafetensorsFile, write_safetensors
from qwen_ref.verify.levels import structure

HYBRIDS = ("qwen3_5", "qwen3_5_moe", "qwen3_next")
IDS = torch.randint(0, 211, (2, 17), generator=torch.Generator().manual_seed(3))


def with_draft_layer(model_type: str, dtype: torch.dtype = torch.float32):
    """(ours with a draft layer of random weights, transformers' model without)."""
    ours, theirs = make_pair(TINY[model_type][1], dtype)
    ours.mtp = ours.make_mtp().eval().requires_grad_(False).to(dtype)
    generator = torch.Generator().manual_seed(5)
    for name, p in ours.mtp.named_parameters():
        std = 0.3 if p.dim() == 1 else p.shape[-1] ** -0.5
        p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype) * std + (name.endswith("norm.weight")))
    return ours, theirs


def assembled(ours, theirs, ids):
    """Logits (B, T - 1, V) of transformers' decoder layer and norms, put together as its own generic MtpLayer does."""
    layer_type, norm_type, i = type(theirs.model.layers[0]), type(theirs.model.norm), 2
    assert theirs.config.layer_types[i] == "full_attention"
    dtype = theirs.dtype
    layer = layer_type(theirs.config, i).to(dtype).eval()
    layer.load_state_dict({k.removeprefix("layers.0."): v for k, v in ours.mtp.state_dict().items() if k.startswith("layers")})

    def norm(name, x):
        module = norm_type(theirs.config.hidden_size, eps=theirs.config.rms_norm_eps).to(dtype)
        module.load_state_dict({"weight": ours.mtp.get_parameter(f"{name}.weight")})
        return module(x)

    hidden = theirs.model(ids).last_hidden_state[:, :-1]  # (B, T - 1, H)
    embedded = theirs.model.embed_tokens(ids[:, 1:])
    x = torch.cat((norm("pre_fc_norm_embedding", embedded), norm("pre_fc_norm_hidden", hidden)), dim=-1)
    x = torch.nn.functional.linear(x, ours.mtp.fc.weight)
    positions = torch.arange(x.shape[1])[None]
    mask = torch.full((x.shape[1],) * 2, torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    rope = theirs.model.rotary_emb(x, positions)
    x = layer(x, position_embeddings=rope, attention_mask=mask, position_ids=positions)
    return theirs.lm_head(norm("norm", x))


@pytest.mark.parametrize("model_type", HYBRIDS)
@torch.no_grad()
def test_drafts_are_those_of_a_layer_assembled_from_transformers(model_type):
    ours, theirs = with_draft_layer(model_type, torch.float64)
    with casts_lifted(theirs), backend.use("eager"):
        expected = assembled(ours, theirs, IDS)
        hidden = ours.model(IDS)
        found = ours.lm_head(ours.draft(hidden[:, :-1], IDS[:, 1:]))
    # fp64 on both sides but for the rotary tables, which are fp32 on both: made alike.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("model_type", HYBRIDS)
@torch.no_grad()
def test_cached_drafts_equal_whole_ones_at_every_split(model_type):
    ours, _ = with_draft_layer(model_type, torch.float64)
    hidden, after = ours.model(IDS)[:, :-1], IDS[:, 1:]
    whole = ours.draft(hidden, after)
    for split in range(1, after.shape[1]):
        cache = ours.make_draft_cache()
        parts = [ours.draft(hidden[:, t], after[:, t], cache=cache) for t in (slice(0, split), slice(split, None))]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12 * float(whole.abs().max()))
        assert cache.length == after.shape[1]


# ---------------------------------------------------------------- on disk


@pytest.fixture(params=HYBRIDS)
def saved(request, tmp_path):
    ours, _ = with_draft_layer(request.param)
    ours.save(tmp_path / "model")
    return ours, tmp_path / "model"


def rewrite(folder, change):
    """The tensors of a checkpoint, changed in place by `change(dict)`."""
    path = folder / "model.safetensors"
    with SafetensorsFile(path) as file:
        tensors = {name: file.read(name) for name in file.tensors}
    change(tensors)
    write_safetensors(path, tensors)


def test_saved_and_loaded_bit_for_bit_under_official_names(saved):
    ours, folder = saved
    with SafetensorsFile(folder / "model.safetensors") as file:
        names = {name for name in file.tensors if name.startswith("mtp.")}
    few = {"fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "layers.0.input_layernorm", "layers.0.self_attn.q_proj"}
    assert {f"mtp.{name}.weight" for name in few} <= names
    assert ("mtp.layers.0.mlp.experts.6.down_proj.weight" in names) == bool(ours.config.num_experts)
    loaded = load_model(folder, dtype="float32", progress=False)
    for name, p in ours.named_parameters():
        assert torch.equal(loaded.get_parameter(name), p), name
    half = load_model(folder, dtype="bfloat16", progress=False)
    assert {p.dtype for p in half.mtp.parameters()} == {torch.bfloat16}


def test_a_damaged_draft_layer_is_refused_by_name(saved):
    _, folder = saved
    rewrite(folder, lambda tensors: tensors.pop("mtp.layers.0.self_attn.k_norm.weight"))
    with pytest.raises(CheckpointError, match=r"missing \(1\): mtp.layers.0.self_attn.k_norm.weight"):
        load_model(folder, progress=False)
    rewrite(folder, lambda tensors: tensors.update({"mtp.layers.0.self_attn.k_norm.weight": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match="mtp.layers.0.self_attn.k_norm.weight is \\[3\\]"):
        load_model(folder, progress=False)


def test_absent_is_no_error_though_the_config_announces_it(saved):
    ours, folder = saved
    assert json.loads((folder / "config.json").read_text())["mtp_num_hidden_layers"] == 1
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")])
    loaded = load_model(folder, dtype="float32", progress=False)
    assert loaded.mtp is None and loaded.num_draft_parameters() == 0
    with pytest.raises(RequestError, match="no draft layer"):
        loaded.draft(ours.model(IDS), IDS)


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "qwen3_next"])
def test_stacked_experts_are_read_too(model_type, tmp_path):
    ours, _ = with_draft_layer(model_type)
    ours.save(tmp_path / "model")

    def stack(tensors):
        path = "mtp.layers.0.mlp.experts"
        for name in [name for name in tensors if name.startswith(f"{path}.")]:
            del tensors[name]
        tensors |= {f"{path}.{part}": p.data for part, p in ours.mtp.layers[0].mlp.experts.named_parameters()}

    rewrite(tmp_path / "model", stack)
    loaded = load_model(tmp_path / "model", dtype="float32", progress=False)
    assert all(torch.equal(p, ours.mtp.get_parameter(name)) for name, p in loaded.mtp.named_parameters())


def test_other_generations_have_no_draft_layer(tmp_path):
    ours, _ = make_pair(TINY["qwen3"][1])
    assert ours.make_mtp() is None
    ours.save(tmp_path / "model")
    rewrite(tmp_path / "model", lambda tensors: tensors.update({"mtp.fc.weight": torch.zeros(3, 6)}))
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): mtp.fc.weight"):
        load_model(tmp_path / "model", progress=False)


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_counts_leave_it_out_as_transformers_does(model_type):
    ours, theirs = with_draft_layer(model_type)
    assert ours.num_parameters() == sum(p.numel() for p in theirs.parameters())
    assert ours.num_draft_parameters() == sum(p.numel() for p in ours.mtp.parameters()) > 0
    assert all(check.ok for check in structure(ours, theirs))  # verify's L0


def test_inspect_lists_it_beside_the_rest(saved):
    ours, folder = saved
    found = describe(folder)
    assert found.draft == ours.num_draft_parameters() and found.total == ours.num_parameters()
    assert sum(found.parameters.values()) == found.total
    assert found.weight_bytes == 4 * (found.total + found.draft)
    assert f"draft layer (MTP), beside them {found.draft:>16,}" in found.text()


# ---------------------------------------------------------------- quantised


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp8"])
def test_quantised_in_memory_it_stays_as_it_is(kind):
    ours, _ = with_draft_layer("qwen3_5_moe")
    before = {name: p.clone() for name, p in ours.mtp.named_parameters()}
    count = ours.num_draft_parameters()
    quantize_model(ours, kind)
    after = dict(ours.mtp.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], p) for name, p in before.items())
    assert ours.num_draft_parameters() == count
    states = ours.draft(ours.model(IDS)[:, :-1], IDS[:, 1:])
    assert bool(torch.isfinite(ours.lm_head(states)).all())


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "fp8"])
def test_quantised_on_disk_it_is_written_as_it_is_and_named_in_the_config(kind, tmp_path):
    source = qr.loading.ASSETS / "tiny-hybrid"
    qr.quantize(source, tmp_path / "out", kind, progress=False)
    plain, made = load_model(source, progress=False), load_model(tmp_path / "out", progress=False)
    for name, p in plain.mtp.named_parameters():
        assert torch.equal(made.mtp.get_parameter(name), p), name
    config = json.dumps(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
    assert "mtp" in config and not made.load_report.notes
    assert made.num_parameters() == plain.num_parameters()


def test_transformers_opens_the_bundled_hybrid_and_agrees():
    transformers = pytest.importorskip("transformers")
    folder = qr.loading.ASSETS / "tiny-hybrid"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model, tokenizer = qr.load("tiny-hybrid", dtype="float32")
    assert model.num_parameters() == sum(p.numel() for p in theirs.parameters())
    ids = torch.tensor([tokenizer.encode("Once upon a time, there was a little girl named")])
    expected = theirs(ids).logits.detach()
    torch.testing.assert_close(model(ids).detach(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
