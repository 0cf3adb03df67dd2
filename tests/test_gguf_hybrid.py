"""GGUF files of hybrids: written here by llama.cpp's package after its converter's rules, one number at a time, and read;
what we write, read back and run by llama.cpp where that is installed."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from conftest import TINY, make_pair
from gguf import GGMLQuantizationType as Type
from test_gguf import compare_tokenizers, tokenizer_files

import qwen_ref as qr
from qwen_ref import backend
from qwen_ref.describe import describe
from qwen_ref.errors import CheckpointError, ConfigError
from qwen_ref.loading import ASSETS, load_model
from qwen_ref.models import module_for
from qwen_ref.quant.gguf import ggml_name, official_name, open_gguf
from qwen_ref.quant.gguf_write import Source, plan, stored, write_gguf
from qwen_ref.quant.layers import PackedLinear
from qwen_ref.tokenizer import Tokenizer

ARCHITECTURES = {"qwen3_next": "qwen3next", "qwen3_5": "qwen35", "qwen3_5_moe": "qwen35moe"}
IDS = torch.randint(0, 4096, (2, 11), generator=torch.Generator().manual_seed(1))


def config_of(model_type, **changes):
    """Rows of 256 and 192: whole blocks of every kind, and of 32 only; heads of 32 of which a block of 256 spans several."""
    config = {**TINY[model_type][1], "vocab_size": 4113, "hidden_size": 256, "intermediate_size": 288, "moe_intermediate_size": 96,
              "shared_expert_intermediate_size": 160, "linear_num_key_heads": 2, "linear_num_value_heads": 8, "linear_key_head_dim": 24,
              "linear_value_head_dim": 32, "num_hidden_layers": 3, "tie_word_embeddings": False}  # fmt: skip
    if model_type == "qwen3_next":
        config["mlp_only_layers"] = []
    if model_type == "qwen3_5":
        del config["moe_intermediate_size"], config["shared_expert_intermediate_size"]
    if model_type == "qwen3_5_moe":
        del config["intermediate_size"]
    return config | changes


# ------------------------------------------------------------------------------------------------- the converter's rules


def converted(model, config):
    """GGUF name -> array, by loops over heads, from the facts in `gguf_hybrid`."""
    groups, heads, key, value = (config[f"linear_{name}"] for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim"))
    per, tiled = heads // groups, config["model_type"] != "qwen3_next"
    library = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch_of(config)), config["num_hidden_layers"])
    out, experts = {}, {}

    def by_head(rows, width):  # grouped to tiled
        return np.concatenate([rows[(k * per + j) * width : (k * per + j + 1) * width] for j in range(per) for k in range(groups)]) if tiled else rows

    for name, tensor in model.checkpoint_tensors().items():
        w = tensor.numpy().astype(np.float32)
        block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        if name.endswith("norm.weight") and "linear_attn.norm" not in name:
            w = w + 1
        if name.endswith("in_proj_qkvz.weight"):
            step, parts = 2 * key + 2 * per * value, {"q": [], "k": [], "v": [], "z": []}
            for k in range(groups):
                row = k * step
                for part, count in (("q", key), ("k", key), ("v", per * value), ("z", per * value)):
                    parts[part].append(w[row : row + count])
                    row += count
            out[f"{block}attn_qkv.weight"] = np.concatenate(parts["q"] + parts["k"] + parts["v"])
            out[f"{block}attn_gate.weight"] = np.concatenate(parts["z"])
            continue
        if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
            w = w.squeeze(1) if "conv1d" in name else w
            w = np.concatenate((w[: 2 * groups * key], by_head(w[2 * groups * key :], value)))
        if name.endswith("in_proj_z.weight"):
            w = by_head(w, value)
        if name.endswith(("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias")):
            w = by_head(w, 1)
        if name.endswith("linear_attn.out_proj.weight"):
            w = by_head(w.T, value).T
        if name.endswith("A_log"):
            out[f"{block}ssm_a"] = -np.exp(w)
        elif name.endswith("dt_bias"):
            out[f"{block}ssm_dt.bias"] = w
        elif ".experts." in name:
            _, e, part, _ = name.rsplit(".", 3)
            experts.setdefault(f"{block}ffn_{part.removesuffix('_proj')}_exps.weight", {})[int(e)] = w
        else:
            out[library.get_name(name, try_suffixes=(".weight", ".bias"))] = w.squeeze(0) if "shared_expert_gate" in name else w
    return out | {name: np.stack([stack[e] for e in sorted(stack)]) for name, stack in experts.items()}


def arch_of(config):
    return ARCHITECTURES[config["model_type"].removesuffix("_text")]


def library_file(path, model, config, kind_of, *, drafts=0, tensors_in_a_part=0):
    arch, settings = arch_of(config), module_for(config).Config.from_json(config)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=tensors_in_a_part)
    writer.add_block_count(config["num_hidden_layers"] + drafts)
    writer.add_context_length(512)
    writer.add_embedding_length(config["hidden_size"])
    if "intermediate_size" in config:
        writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(settings.rope.width(config["head_dim"]))
    if settings.rope.sections:
        writer.add_rope_dimension_sections([*settings.rope.sections, 0])
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_num_value_heads"] * config["linear_value_head_dim"])
    writer.add_full_attention_interval(3)
    if drafts:
        writer.add_nextn_predict_layers(drafts)
    if config.get("num_experts"):
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    exact = {}
    for name, w in converted(model, config).items():
        kind = kind_of(name, w) if w.ndim > 1 and "norm" not in name else Type.F32
        packed = gguf.quants.quantize(w, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        exact[name] = gguf.quants.dequantize(packed, kind) if kind != Type.F32 else w
    if drafts:
        writer.add_tensor(f"blk.{config['num_hidden_layers']}.nextn.eh_proj.weight", np.zeros((4, 8), np.float32))
        writer.add_tensor(f"blk.{config['num_hidden_layers']}.attn_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert arch == gguf.GGUFReader(min(path.parent.glob(f"{path.stem}*"))).fields["general.architecture"].contents()
    return exact


def eight_bits(name, w):
    return Type.F32 if "conv1d" in name or "ffn_gate_inp" in name or w.shape[-1] % 32 else Type.Q8_0


def of_many_kinds(name, w):
    """Q5_0 of one part of in_proj_qkvz and Q8_0 of the other; Q4_0 elsewhere, floats where heads need them."""
    if "attn_qkv" in name:
        return Type.Q5_0
    if "ssm_beta" in name or "ssm_ba" in name:
        return Type.F16
    return eight_bits(name, w) if "attn_gate" in name or eight_bits(name, w) == Type.F32 else Type.Q4_0


def put(model, exact, config):
    """The weights of a file in our model: a model whose weights are their own addresses, converted, says where each went."""
    reference, _ = make_pair(config)
    at, addresses = 0, {}
    for name, tensor in reference.checkpoint_tensors().items():
        count = tensor.numel()
        addresses[name] = slice(at, at + count)
        tensor.copy_(torch.arange(at, at + count, dtype=torch.float64).view(tensor.shape))
        at += count
    assert at < 1 << 24  # exact in fp32
    flat = np.zeros(at, np.float32)
    for name, where in converted(reference, config).items():
        value = exact[name]
        if "norm" in name and "ssm_norm" not in name:
            where, value = where - 1, value - 1
        if name.endswith("ssm_a"):
            continue
        flat[where.astype(np.int64)] = value
    tensors = model.checkpoint_tensors()
    for name, place in addresses.items():
        if not name.endswith("A_log"):  # exp of an address is no address: compared by itself
            tensors[name].copy_(torch.from_numpy(flat[place]).view(tensors[name].shape))


@pytest.mark.parametrize("kind_of", [eight_bits, of_many_kinds])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_file_after_the_converter_is_the_model(tmp_path, model_type, kind_of):
    config = config_of(model_type)
    model, theirs = make_pair(config)
    exact = library_file(tmp_path / "m.gguf", model, config, kind_of)
    put(model, exact, config)  # dequantised
    parameters = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        parameter.data.copy_(parameters[name])
    read = load_model(tmp_path / "m.gguf", dtype=torch.float32, progress=False)
    plain = dict(model.named_weights())
    for name, tensor in read.named_weights():
        if name.endswith("A_log"):
            torch.testing.assert_close(tensor, plain[name], rtol=1e-6, atol=1e-6)  # through exp and log in fp32
        else:
            assert torch.equal(tensor, plain[name]), name
    loaded = load_model(tmp_path / "m.gguf", dtype=torch.float32, dequantize=True, progress=False)
    assert all(torch.equal(tensor, dict(read.named_weights())[name]) for name, tensor in loaded.named_weights())
    out = read.model.layers[0].linear_attn.out_proj
    assert isinstance(out, PackedLinear) and (out.order is not None) == (model_type != "qwen3_next")
    mixed = model_type == "qwen3_next" and kind_of is of_many_kinds
    assert any("dequantised" in note for note in read.load_report.notes) == mixed
    with torch.no_grad(), backend.use("eager"):
        ours, right = read(IDS), theirs(IDS).logits
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4 * float(right.std()))


def test_the_draft_layer_of_a_file_is_left_out(tmp_path):
    config = config_of("qwen3_5")
    model, _ = make_pair(config)
    library_file(tmp_path / "m.gguf", model, config, eight_bits, drafts=1)
    read = load_model(tmp_path / "m.gguf", progress=False)
    assert read.config.num_hidden_layers == 3
    assert "left out: 2 tensors of the draft layer (MTP)" in read.load_report.notes


def test_a_split_file_opens_by_any_of_its_parts(tmp_path):
    config = config_of("qwen3_5")
    model, _ = make_pair(config)
    library_file(tmp_path / "m.gguf", model, config, eight_bits)
    library_file(tmp_path / "split.gguf", model, config, eight_bits, tensors_in_a_part=20)
    whole = dict(load_model(tmp_path / "m.gguf", progress=False).named_weights())
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) == 3
    for part in parts:
        weights = dict(load_model(part, progress=False).named_weights())
        assert weights.keys() == whole.keys() and all(torch.equal(weights[name], whole[name]) for name in whole), part


FIT = "metadata say|wrong shape"
METADATA = [  # key, value, what the error names; None: the key is missing
    ("ssm.group_count", 3, "ssm.group_count"), ("ssm.group_count", 0, "ssm.group_count"),
    ("ssm.group_count", 4, FIT), ("ssm.group_count", 1, FIT),
    ("ssm.inner_size", 264, FIT), ("ssm.inner_size", 0, "ssm.inner_size"), ("ssm.inner_size", 257, "ssm.time_step_rank"),
    ("ssm.state_size", 1 << 31, "ssm.state_size"), ("ssm.state_size", 0, "ssm.state_size"), ("ssm.state_size", 32, FIT),
    ("ssm.time_step_rank", None, "ssm.time_step_rank"), ("ssm.time_step_rank", 4, FIT),
    ("ssm.time_step_rank", 0, "ssm.time_step_rank"), ("ssm.conv_kernel", 0, "linear_conv_kernel_dim|ssm.conv_kernel"),
    ("ssm.conv_kernel", 5, "wrong shape.*conv1d"), ("ssm.conv_kernel", 1 << 31, "linear_conv_kernel_dim|ssm.conv_kernel"),
    ("nextn_predict_layers", 4, "nextn_predict_layers"),
    ("block_count", 2, "unexpected.*model.layers.2."), ("block_count", 5, "missing.*model.layers.3."),
    ("rope.dimension_count", 64, "partial_rotary_factor"),
]  # fmt: skip


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_metadata_that_do_not_fit(tmp_path, monkeypatch, model_type):
    config, add = config_of(model_type), gguf.GGUFWriter.add_key_value
    model, _ = make_pair(config)
    for i, (wrong, instead, match) in enumerate(METADATA):

        def changed(self, key, value, *args, wrong=wrong, instead=instead, **kwargs):
            if not key.endswith(wrong) or instead is not None:
                add(self, key, instead if key.endswith(wrong) else value, *args, **kwargs)

        monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", changed)
        library_file(tmp_path / f"{i}.gguf", model, config, eight_bits, drafts=1)
        with pytest.raises((CheckpointError, ConfigError), match=match):
            load_model(tmp_path / f"{i}.gguf", progress=False)


def test_a_part_of_in_proj_qkvz_that_is_no_matrix(tmp_path, monkeypatch):
    config, add = config_of("qwen3_next"), gguf.GGUFWriter.add_tensor

    def deeper(self, name, tensor, **kwargs):
        add(self, name, tensor[:, None] if name == "blk.0.attn_qkv.weight" else tensor, **kwargs)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", deeper)
    library_file(tmp_path / "m.gguf", make_pair(config)[0], config, eight_bits)
    with pytest.raises(CheckpointError, match="in_proj_qkv.weight' and .* are not both matrices"):
        load_model(tmp_path / "m.gguf", progress=False)


def test_sections_of_the_rotary_embedding_that_are_no_list(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_dimension_sections", lambda self, _: self.add_uint32("qwen35.rope.dimension_sections", 11))
    config = config_of("qwen3_5")
    library_file(tmp_path / "m.gguf", make_pair(config)[0], config, eight_bits)
    with pytest.raises(ConfigError, match="rope.dimension_sections is 11, not a list"):
        load_model(tmp_path / "m.gguf", progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 0.5])
def test_rates_of_decay_that_are_no_exponentials(tmp_path, monkeypatch, value):
    """ssm_a is -exp(A_log): of anything else the logarithm would be NaN."""
    config, add = config_of("qwen3_5"), gguf.GGUFWriter.add_tensor

    def changed(self, name, tensor, **kwargs):
        if name == "blk.0.ssm_a":
            tensor = tensor.copy()
            tensor[-1] = value
        add(self, name, tensor, **kwargs)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", changed)
    library_file(tmp_path / "m.gguf", make_pair(config)[0], config, eight_bits)
    with pytest.raises(CheckpointError, match="layers.0.linear_attn.A_log.* not minus an exponential"):
        load_model(tmp_path / "m.gguf", progress=False)


# ------------------------------------------------------------------------------------------------- what we write


def write(path, model_type, preset, **changes):
    config = config_of(model_type, **changes)
    model, _ = make_pair(config)
    tensors = model.checkpoint_tensors()
    planned = plan({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, preset)
    write_gguf(path, config, tokenizer_files(), [
        Source(p.name, p.shape, p.kind, lambda p=p: stored(p, [tensors[part] for part in p.parts], config)) for p in planned])
    return model, config


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_is_written_is_what_the_converter_would_write(tmp_path, model_type):
    model, config = write(tmp_path / "m.gguf", model_type, "f32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {t.name: np.array(t.data) for t in reader.tensors}
    expected = converted(model, config)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape and np.allclose(found[name], value, rtol=1e-6), name
    library_file(tmp_path / "theirs.gguf", model, config, lambda name, w: Type.F32)
    theirs = gguf.GGUFReader(tmp_path / "theirs.gguf").fields
    for key, field in theirs.items():  # every key of the architecture, with its type
        if key.startswith(f"{arch_of(config)}."):
            assert reader.fields[key].contents() == field.contents() and reader.fields[key].types == field.types, key
    for name in expected:
        official = official_name(name)
        assert official is not None and ggml_name(official, hybrid=True) == name


@pytest.mark.parametrize("preset", ["f32", "q8_0", "q4_k"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_written_and_read_back(tmp_path, model_type, preset):
    model, config = write(tmp_path / "m.gguf", model_type, preset, rms_norm_eps=1e-5, tie_word_embeddings=model_type == "qwen3_5")
    read = load_model(tmp_path / "m.gguf", dtype=torch.float32, progress=False)
    module = module_for(config)
    assert read.config == module.Config.from_json({**config, "intermediate_size": config.get("intermediate_size", 96)})
    weights = dict(read.named_weights())
    for name, tensor in model.named_parameters():
        bound = {"f32": 1e-6, "q8_0": 0.01, "q4_k": 0.1}[preset] if tensor.dim() > 1 else 1e-6
        assert (weights[name] - tensor).norm() <= bound * (tensor.norm() + 1), name
    assert describe(tmp_path / "m.gguf").total == read.num_parameters() == model.num_parameters()
    with open_gguf(tmp_path / "m.gguf") as checkpoint:
        assert json.loads(json.dumps(checkpoint.config)) == checkpoint.config
        (tmp_path / "tokenizer").mkdir()
        for name, content in checkpoint.tokenizer_files.items():
            (tmp_path / "tokenizer" / name).write_bytes(content)
    compare_tokenizers(Tokenizer.load(tmp_path / "tokenizer"), Tokenizer.load(ASSETS / "tiny"))


def test_the_bundled_hybrid(tmp_path):
    """With its draft layer left out, and tokenizer and all, from one file."""
    result = qr.quantize("tiny-hybrid", tmp_path / "m.gguf", "gguf:q8_0", progress=False)
    assert any("draft layer" in note for note in result.notes)
    read, tokenizer = qr.load(tmp_path / "m.gguf", dtype="float32")
    plain, _ = qr.load("tiny-hybrid", dtype="float32")
    ids = torch.tensor([tokenizer.encode("Once upon a time there was a little cat who lived in a big house.")])
    with torch.no_grad():
        ours, right = read(ids), plain(ids)
    assert read.mtp is None and (ours - right).norm() < 0.02 * right.norm()
    assert (ours.argmax(-1) == right.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("model_type, changes, match", [
    ("qwen3_5", {"layer_types": ["full_attention", "linear_attention", "linear_attention"]}, "layer_types"),
    ("qwen3_5", {"attention_bias": True}, "attention_bias"),
    ("qwen3_next", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("qwen3_next", {"mlp_only_layers": [1]}, "dense"),
])  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_not_written(tmp_path, model_type, changes, match):
    with pytest.raises(ConfigError, match=match):
        write_gguf(tmp_path / "m.gguf", config_of(model_type, **changes), tokenizer_files(), [])


def test_verify_reads_a_file(tmp_path):
    write(tmp_path / "m.gguf", "qwen3_5", "q8_0")
    report = qr.verify(tmp_path / "m.gguf", new_tokens=6, progress=False)
    assert report.ok, report.verdict


def test_llama_cpp_computes_the_same(tmp_path):
    """Logits of fp32 weights; llama.cpp keeps keys and values in fp16."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it is built from source")
    for model_type in ARCHITECTURES:
        model, _ = write(tmp_path / f"{model_type}.gguf", model_type, "f32", linear_key_head_dim=32)
        theirs = llama_cpp.Llama(str(tmp_path / f"{model_type}.gguf"), logits_all=True, n_ctx=64, n_threads=1, verbose=False)
        ids = list(range(100, 130))
        theirs.eval(ids)
        expected, ours = torch.tensor(theirs.scores[: len(ids)]), model(torch.tensor([ids]))[0]
        assert (ours - expected).norm() < 2e-3 * expected.norm(), model_type
