"""Making quantised models: rounding, GPTQ, exchange on the fly, and the written checkpoints, read by the libraries that define them."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from conftest import TINY
from gguf import GGUFReader, dequantize
from quantised import dequantize_4bit
from safetensors.torch import load_file, save_file

import qwen_ref as qr
import qwen_ref.checkpoint
from qwen_ref.errors import CheckpointError, RequestError
from qwen_ref.loading import load_model
from qwen_ref.quant import calibrated, making, packed, rounding
from qwen_ref.quant.layers import PackedEmbedding, PackedExperts, PackedLinear
from qwen_ref.safetensors_file import SafetensorsFile

making_module = sys.modules["qwen_ref.quantize"]
FIXED_CT = {"int4": 4, "int8": 8}
HYBRIDS = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
IDS = torch.tensor([[5, 77, 200, 12, 33, 100, 7]])


def matrix(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A plain checkpoint whose rows are whole groups of 16 and blocks of ggml's 32, by name of the model."""
    folders = {}
    hybrid = {"num_hidden_layers": 3, "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 16,
              "linear_value_head_dim": 32, "shared_expert_intermediate_size": 160}  # fmt: skip
    for kind, sizes in (("qwen3", {}), ("qwen3_moe", {"mlp_only_layers": []}), ("qwen2", {}), ("qwen2_moe", {"shared_expert_intermediate_size": 160}),
                        *((kind, hybrid) for kind in HYBRIDS)):
        module, config = TINY[kind]
        config = {**config, "hidden_size": 96, "intermediate_size": 224, "num_attention_heads": 4, "num_key_value_heads": 2,
                  "head_dim": 32, "moe_intermediate_size": 64, "vocab_size": 4096, **sizes}
        if not config.get("num_experts"):
            del config["moe_intermediate_size"]
        if kind.startswith("qwen2"):
            config.pop("head_dim")
        model = module.Model(module.Config.from_json(config)).requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            std = 0.3 if p.dim() == 1 else p.shape[-1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * std + (name.endswith("norm.weight")))
        folders[kind] = tmp_path_factory.mktemp("plain") / kind
        tiny = Path(qr.loading.ASSETS) / "tiny"
        model.extra_files = {name: (tiny / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
        model.save(folders[kind])
    return folders


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "group"), [("int8", 51), ("int4", 16), ("int4", 51), ("int4", 128)])
def test_integers_err_by_half_a_step_at_most(kind, group, dtype):
    weight = matrix(37, 51, dtype=dtype)
    weight[3] = 0
    weight[4] *= 1e-4
    layout = rounding.int8(weight) if kind == "int8" else rounding.int4(weight, group, (1.0,))
    assert layout.scale.dtype == dtype
    step = packed.spread(layout.scale.double(), group, 51)
    error = (layout.dequantize(torch.float64, 51) - weight.double()).abs()
    assert bool((error <= step * (0.5 + 1e-6)).all())
    assert bool((layout.dequantize(torch.float32, 51)[3] == 0).all())
    most = {"int8": 127, "int4": 7.5}[kind]
    amax = weight.double().abs().split(group, 1)[0].amax(1)
    assert torch.allclose(layout.scale[amax > 0, 0].double(), amax[amax > 0] / most, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_int4_by_hand():
    weight = torch.tensor([[7.5, -7.5, 1.2, -0.4, 0.6, 3.5], [0.0, 0.0, 0.0, 30.0, -15.0, 6.0]])
    layout = rounding.int4(weight, 3, (1.0,))
    assert layout.scale.tolist() == [[1.0, pytest.approx(3.5 / 7.5)], [1.0, 4.0]]
    assert packed.unpack4(layout.codes)[0, :3].tolist() == [15, 0, 9]  # 7.5 to even is 8, cut to 7; -8; 1
    assert packed.unpack4(layout.codes)[1].tolist() == [8, 8, 8, 15, 4, 10]  # 7.5; -3.75; 1.5 to even is 2


def test_a_searched_scale_is_the_best_of_three_for_its_group():
    weight = matrix(50, 96, seed=8)
    chosen = (rounding.int4(weight, 32).dequantize(columns=96) - weight).view(50, 3, 32).square().sum(-1)
    each = [(rounding.int4(weight, 32, (share,)).dequantize(columns=96) - weight).view(50, 3, 32).square().sum(-1)
            for share in rounding.SHRINK]
    assert torch.equal(chosen, torch.stack(each).amin(0)) and bool((chosen < each[0]).any())


@pytest.mark.parametrize("shape", [(24, 64), (7, 96), (5, 40), (300, 1024)])
def test_nf4_is_bitsandbytes(shape):
    weight = matrix(*shape)
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = rounding.nf4(weight)
    codes = torch.stack((theirs.flatten() >> 4, theirs.flatten() & 15), -1).flatten()[: weight.numel()].view(shape)
    assert torch.equal(packed.unpack4(ours.codes)[:, : shape[1]], codes)
    assert torch.equal(ours.dequantize(columns=shape[1]), dequantize_4bit(theirs, state))


def test_fp8_blocks_by_a_loop():
    weight = matrix(37, 51)
    layout = rounding.fp8(weight, (16, 32))
    for i in range(0, 37, 16):
        for j in range(0, 51, 32):
            block = weight[i : i + 16, j : j + 32]
            scale = block.abs().max() / 448
            assert layout.scale[i // 16, j // 32] == pytest.approx(scale.item(), rel=1e-6)
            codes = (block / layout.scale[i // 16, j // 32]).to(torch.float8_e4m3fn)
            assert torch.equal(layout.codes[i : i + 16, j : j + 32].view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_four_bit_floats_take_the_nearest_level(kind):
    weight = matrix(9, 70)
    layout = rounding.ROUND[kind](weight)
    levels = layout.table.double() * packed.spread(layout.scale.double(), layout.group, 70)[..., None]  # (9, 70, 16)
    least = (levels - weight.double()[..., None]).abs().amin(-1)
    error = (layout.dequantize(torch.float64, 70) - weight.double()).abs()
    assert torch.allclose(error, least, rtol=1e-5, atol=1e-7)
    if kind == "mxfp4":
        amax = weight[:, :32].abs().amax(1)
        assert torch.equal(layout.scale[:, 0].float(), torch.exp2(amax.log2().floor() - 2))
        ties = rounding.mxfp4(torch.tensor([[4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0]]))
        assert ties.dequantize(columns=10)[0].tolist() == [4, 0, 1, 1, 2, 2, 4, 4, 0, -4]  # to the even code


@pytest.mark.parametrize(("kind", "size"), [("int8", None), ("int4", 48), ("int4:plain", 48), ("nf4", None), ("fp8", (64, 32)), ("fp8", (128, 128)), ("mxfp4", None)])
def test_some_rows_at_a_time_is_the_whole(kind, size):
    weight = matrix(1000, 400)  # chunks of 640 and 360 rows; blocks of 64 run over rows of 400
    whole = rounding.ROUND[kind](weight) if size is None else rounding.ROUND[kind](weight, size)
    parts = making.rounder(kind, size)("x", weight)
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("kind", making.KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(kind, bad):
    model, _ = qr.load("tiny", dtype="float32")
    model.model.layers[2].mlp.up_proj.weight.data[5, 7] = bad
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight: .*NaN"):
        making.quantize_model(model, kind)


# ---------------------------------------------------------------- gptq


def correlated(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs with a few strong directions, as activations have them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    return torch.randn(tokens, columns, generator=generator) @ mix.T


def objective(weight: torch.Tensor, layout: packed.Packed, x: torch.Tensor) -> float:
    delta = layout.dequantize(torch.float64, weight.shape[1]) - weight.double()
    return (x.double() @ delta.T).square().sum().item()


@pytest.mark.parametrize("group", [16, 48])
def test_gptq_loses_less_of_the_output_than_rounding(group):
    weight, x = matrix(40, 144, seed=3), correlated(500, 144)
    plain, better = rounding.int4(weight, group, (1.0,)), calibrated.gptq(weight, calibrated._gram(x), group)
    assert objective(weight, better, x) < 0.5 * objective(weight, plain, x)
    assert objective(weight, better, correlated(500, 144)[:100]) < objective(weight, plain, correlated(500, 144)[:100])


def test_gptq_is_the_papers_update_in_fp64():
    """Against the definition: after each column the rest is what minimises the error given what is fixed (least squares)."""
    group, columns, rows = 10, calibrated.COLUMNS + 12, 6
    weight, x = matrix(rows, columns, seed=4), correlated(600, columns, seed=5)
    hessian = calibrated._gram(x)
    layout = calibrated.gptq(weight, hessian, group, damping=1e-3)
    steps = packed.spread(layout.scale.double(), group, columns)
    h = hessian.double() + torch.eye(columns).double() * hessian.diagonal().double().mean() * 1e-3
    order = hessian.diagonal().argsort(descending=True, stable=True)
    w, codes = weight.double(), torch.zeros(rows, columns, dtype=torch.uint8)
    fixed = torch.zeros(rows, columns, dtype=torch.float64)
    for n, i in enumerate(order.tolist()):
        codes[:, i] = rounding.nibbles(w[:, i], steps[:, i].float())
        fixed[:, i] = (codes[:, i].double() - 8) * steps[:, i]
        done, free = order[: n + 1], order[n + 1 :]
        if len(free):  # d_free = -H_ff^-1 H_fd d_done
            delta = fixed[:, done] - weight.double()[:, done]
            w = w.clone()
            w[:, free] = weight.double()[:, free] - torch.linalg.solve(h[free][:, free], h[free][:, done] @ delta.T).T
    ours = packed.unpack4(layout.codes)
    assert (ours != codes).float().mean() < 0.02  # a tie may fall the other way in fp32
    assert objective(weight, layout, x) == pytest.approx(objective(weight, layout._replace(codes=packed.pack4(codes)), x), rel=0.02)


def test_inputs_that_never_vary_leave_rounding():
    weight = matrix(12, 32)
    layout = calibrated.gptq(weight, torch.zeros(32, 32), 16)
    error = (layout.dequantize(columns=32) - weight).abs()
    assert bool((error <= packed.spread(layout.scale, 16, 32) * 0.51 + 0.4 * weight.abs()).all())


STORY = (
    "Once upon a time there was a little duck. It lived near a pond and loved to swim. One day, the duck met a frog. The frog said, "
    "\"Can you help me find my red ball?\" The duck was happy to help. They looked under the big tree and behind the house. At last "
    "they saw the ball in the water. The frog said thank you, and the two friends played until the sun went down. Then the duck went "
    "home to its mother and told her about the day."
)


def test_gptq_beats_rounding_on_the_bundled_models_activations():
    plain, tokenizer = qr.load("tiny-moe", dtype="float32")
    ids = tokenizer.encode(making_module.CALIBRATION.read_text(encoding="utf-8"), allow_special=True)
    test_ids = torch.tensor([tokenizer.encode(STORY)])  # long enough that the order of a CPU's sums decides nothing
    wanted = plain(test_ids).log_softmax(-1)
    distance = {}
    for method in ("rtn", "gptq"):
        model, _ = qr.load("tiny-moe", dtype="float32")
        if method == "gptq":
            model, notes = calibrated.quantize_model(model, calibrated.windows_of(ids))
            assert notes == []
        else:
            making.quantize_model(model, "int4")
        distance[method] = (wanted.exp() * (wanted - model(test_ids).log_softmax(-1))).sum(-1).mean().item()
    assert distance["gptq"] < 0.8 * distance["rtn"]


def test_experts_without_tokens_are_rounded_and_named(source):
    model = load_model(source["qwen3_moe"], dtype="float32")
    gate = model.model.layers[0].mlp.gate.weight.data
    gate[4] = -gate.mean(0) * 0 - 1e4 * torch.ones(96).sign()  # a router that never finds expert 4 for positive inputs
    model.model.layers[0].post_attention_layernorm.weight.data.abs_()
    seen_before = making.rounder("int4", 16)("x", model.model.layers[0].mlp.experts.down_proj[4].data)
    original = calibrated.LEAST_EXPERT_TOKENS
    try:
        calibrated.LEAST_EXPERT_TOKENS = 10**9
        model, notes = calibrated.quantize_model(model, [list(range(300))], group=16)
    finally:
        calibrated.LEAST_EXPERT_TOKENS = original
    assert any("model.layers.0.mlp.experts.4 got" in note for note in notes)
    stack = model.model.layers[0].mlp.experts.down
    assert torch.equal(packed.expert(stack, 4).codes, seen_before.codes)


@pytest.mark.parametrize("name", HYBRIDS)
def test_gptq_of_hybrids(name, source, tmp_path):
    """A layer at a time out of the file is the model as a whole, and what matrices are multiplied with is better kept."""
    model = load_model(source[name], dtype="float32")
    ids = torch.randint(0, 4096, (300,), generator=torch.Generator().manual_seed(3)).tolist()
    block, seen = model.model.layers[0], calibrated.Calibration(model, [ids]).look(0)
    z = "in_proj_qkvz" if name == "qwen3_next" else "in_proj_z"
    path = f"model.layers.0.linear_attn.{z}"
    x = block.input_layernorm(model.model.embed_tokens(torch.tensor(ids)))
    weight = block.linear_attn.get_submodule(z).weight
    assert torch.allclose(seen.hessians[seen.same.get(path, path)], x.T @ x, rtol=1e-4, atol=1e-2)
    # Random embeddings are nearly uncorrelated, which leaves little to make good.
    assert objective(weight, seen.rounder(32)(f"{path}.weight", weight), x) < 0.9 * objective(weight, rounding.int4(weight, 32), x)
    qr.quantize(source[name], tmp_path / "out", "int4", method="gptq", group=32, calibration="the cat sat on a mat. " * 60, progress=False)
    read, plain = load_model(tmp_path / "out", dtype="float32"), load_model(source[name], dtype="float32")
    text = qr.Tokenizer.load(source[name]).encode("the cat sat on a mat. " * 60)
    made, _ = calibrated.quantize_model(plain, calibrated.windows_of(text), group=32)
    made.lm_head = read.lm_head  # in memory it takes eight bits
    assert torch.equal(read(IDS), made(IDS))
    linear = read.model.layers[1].linear_attn
    assert isinstance(linear.out_proj, PackedLinear) and not any("in_proj_a" in n or "in_proj_b" in n for n, _ in read.packed_modules())


@pytest.mark.parametrize("to", ["int8", "gguf:q8_0"])
def test_of_a_multimodal_source_the_language_model_is_written(to, source, tmp_path):
    shutil.copytree(source["qwen3_5_moe"], tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    weights = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in weights.items()}
    save_file({**weights, "model.visual.blocks.0.attn.qkv.weight": torch.ones(2, 2)}, tmp_path / "whole" / "model.safetensors")
    raw = json.loads((tmp_path / "whole" / "config.json").read_text())
    whole = {"model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"], "text_config": raw, "vision_config": {}}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(whole))
    out = tmp_path / ("out.gguf" if "gguf" in to else "out")
    notes = qr.quantize(tmp_path / "whole", out, to, progress=False).notes
    assert notes == ["left out: 1 tensors that are not of the language model, such as model.visual.blocks.0.attn.qkv.weight"]
    with torch.no_grad():
        read, plain = load_model(out, dtype="float32")(IDS), load_model(source["qwen3_5_moe"], dtype="float32")(IDS)
    assert (read - plain).norm() < 0.05 * plain.norm()
    if "gguf" not in to:
        written = json.loads((out / "config.json").read_text())
        assert written["architectures"] == ["Qwen3_5MoeForCausalLM"] and not {"text_config", "vision_config"} & written.keys()


def test_calibration_too_short():
    with pytest.raises(RequestError, match=r"has 100 tokens; it must have at least 256"):
        calibrated.windows_of(list(range(100)))


# ---------------------------------------------------------------- on the fly


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "fp8", "mxfp4", "gguf:q8_0", "gguf:q4_0", "gguf:q4_k"])
def test_loaded_packed_is_the_dequantised_model(name, kind):
    model, tokenizer = qr.load(name, dtype="float32", quantize=kind)
    plain, _ = qr.load(name, dtype="float32", mapped=False)
    modules = dict(model.named_modules())
    assert isinstance(model.lm_head, PackedLinear) and isinstance(model.model.embed_tokens, PackedEmbedding)
    assert model.lm_head.packed is model.model.embed_tokens.packed
    for path, module in plain.named_modules():
        if isinstance(modules.get(path), PackedLinear) and path != "lm_head":
            module.weight.data.copy_(modules[path].dequantize())
        elif isinstance(modules.get(path), PackedExperts):
            module.gate_up_proj.data.copy_(modules[path].gate_up.dequantize(torch.float32, module.gate_up_proj.shape[-1]))
            module.down_proj.data.copy_(modules[path].down.dequantize(torch.float32, module.down_proj.shape[-1]))
        elif path.endswith("mlp.gate"):
            assert torch.equal(module.weight, modules[path].weight)  # the router stays
    plain.model.embed_tokens.weight.data.copy_(model.model.embed_tokens.weight)
    ids = torch.tensor([tokenizer.encode("Once upon a time, a frog sat in")])
    assert torch.allclose(model(ids), plain(ids), atol=2e-5)
    assert all(not isinstance(m, qr.layers.Linear) or p.endswith("mlp.gate") for p, m in modules.items())


def test_untied_head_takes_eight_bits_and_the_embedding_stays(source):
    model = load_model(source["qwen3"], dtype="float32", quantize="nf4")
    assert isinstance(model.lm_head.packed, packed.Int8) and isinstance(model.model.embed_tokens, torch.nn.Embedding)


def test_an_embedding_shared_with_the_head_stays_one_when_it_moves():
    model, _ = qr.load("tiny", quantize="int8")
    model.to("meta")
    assert model.lm_head.packed is model.model.embed_tokens.packed and model.lm_head.packed.codes.is_meta


def test_group_sizes():
    model, _ = qr.load("tiny")  # rows of 192, 256 and 448
    assert making.fitting(model, "int4") == 64 and making.fitting(model, "int4", 48) == 16
    assert making.fitting(model, "fp8") == (64, 64)
    odd = qr.models.qwen3.Model(qr.models.qwen3.Config.from_json(TINY["qwen3"][1]))
    with pytest.raises(RequestError, match=r"no group size from 16 to 128 divides .* has \d+ columns: take another"):
        making.fitting(odd, "int4")
    with pytest.raises(RequestError, match="must be at least 16"):
        making.fitting(model, "int4", 8)


@pytest.mark.parametrize("kind", ["int5", "gguf:q9", "", 5, True])
def test_unknown_kinds(kind, tmp_path):
    with pytest.raises(RequestError, match="there are int8"):
        qr.load("tiny", quantize=kind)
    with pytest.raises(RequestError, match="there are int8"):
        qr.quantize("tiny", tmp_path / "out", kind)


@pytest.mark.parametrize("kind", ["int8", "gguf:q4_k", "fp8"])
def test_a_quantised_embedding_refuses_ids_that_it_has_not(kind):
    """As the plain one does; a negative one is not counted from the end."""
    model, _ = qr.load("tiny", dtype="float32", quantize=kind)
    for ids in ([[-1]], [[1, -1]], [[4096]], [[5, 4096]]):
        with pytest.raises(IndexError):
            model(torch.tensor(ids))


def test_gptq_for_a_model_that_embeds_fewer_ids_than_the_tokenizer_has(tmp_path):
    model, _ = qr.load("tiny")
    config = {**model.config.to_json(), "vocab_size": 1000}
    small = qr.models.qwen3.Model(qr.models.qwen3.Config.from_json(config))
    small.extra_files = model.extra_files
    small.save(tmp_path / "m")
    with pytest.raises(CheckpointError, match="belong to different models"):
        qr.quantize(tmp_path / "m", tmp_path / "out", "int4", method="gptq", progress=False)


@pytest.mark.parametrize("to", ["int4", "gguf:q8_0"])
@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file/x"])
def test_a_target_that_cannot_be_is_one_typed_error(to, name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write|could not write") as error:
        qr.quantize("tiny", tmp_path / name, to, progress=False)
    assert "goes on from there" not in str(error.value) and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("group", ["x", 32.0, True])
def test_a_group_that_is_no_integer(group, tmp_path):
    with pytest.raises(RequestError, match="must be an integer"):
        qr.quantize("tiny", tmp_path / "out", "int4", group=group, progress=False)


def test_what_is_quantised_is_not_quantised_again(tmp_path):
    qr.quantize("tiny", tmp_path / "a", "int8", progress=False)
    with pytest.raises(RequestError, match=r"quantised already"):
        qr.load(tmp_path / "a", quantize="int4")
    with pytest.raises(CheckpointError, match=r"quantised already"):
        qr.quantize(tmp_path / "a", tmp_path / "b", "int4")
    model, _ = qr.load("tiny", quantize="int8")
    with pytest.raises(RequestError, match="quantised already"):
        making.quantize_model(model, "int4")
    with pytest.raises(CheckpointError, match="is packed"):
        model.save(tmp_path / "c")


def test_peak_memory_is_the_result_and_one_matrix(tmp_path):
    """In a process of its own: 270 MB of bf16 to int4, and what that took beyond `import`."""
    config = {**TINY["qwen3"][1], "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "head_dim": 128,
              "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 512}
    module = qr.models.qwen3
    with torch.no_grad():
        model = module.Model(module.Config.from_json(config)).to(torch.bfloat16)
    model.save(tmp_path / "big")
    del model
    code = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from qwen_ref.loading import load_model
        from qwen_ref.quantize import quantize
        def resident(key):
            return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith(key))
        torch.ones(4, 8) @ torch.ones(8, 4)
        before = resident('VmRSS')
        if sys.argv[2] == 'load':
            model = load_model(Path(sys.argv[1]), quantize='int4')
        else:
            quantize(sys.argv[1], sys.argv[1] + '-int4', 'int4', progress=False)
        print(resident('VmHWM') - before)
    """)
    packed_bytes, slack = 69e6, 3 * 4 * 1024 * 4096  # the largest matrix in fp32, and what rounding makes of it
    at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # or glibc keeps 10 to 50 MB of what was freed
    for what, bound in (("load", packed_bytes + slack), ("write", slack)):
        out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "big"), what], capture_output=True, text=True,
                             env=at_once)  # fmt: skip
        assert out.returncode == 0, out.stderr
        assert int(out.stdout) < bound, f"{what}: {int(out.stdout):,}"


# ---------------------------------------------------------------- written checkpoints


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "fp8"])
@pytest.mark.parametrize("name", ["qwen2", "qwen2_moe", "qwen3", "qwen3_moe", *HYBRIDS])
def test_written_and_read_back_is_what_is_made_on_the_fly(name, kind, source, tmp_path):
    result = qr.quantize(source[name], tmp_path / "out", kind, group=32, progress=False)
    read = load_model(tmp_path / "out", dtype="float32")
    made = making.quantize_model(load_model(source[name], dtype="float32"), kind, group=32)
    fresh, compared = dict(made.named_modules()), 0
    for path, module in read.named_modules():
        if hasattr(module, "packed_tensors"):
            for ours, theirs in zip(module.packed_tensors, fresh[path].packed_tensors, strict=True):
                assert ours.dtype == theirs.dtype and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), path
                compared += 1
    assert compared > 20 and result.bytes < 0.9 * sum(f.stat().st_size for f in source[name].glob("*.safetensors"))
    plain = load_model(source[name], dtype="float32")
    assert torch.equal(read.lm_head.weight, plain.lm_head.weight)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source[name] / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_compressed_tensors_decompresses_what_is_written(kind, source, tmp_path):
    qr.quantize(source["qwen3"], tmp_path / "out", kind, progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    read, tensors = load_model(tmp_path / "out", dtype="float32"), {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        with SafetensorsFile(path) as file:
            tensors |= {name: file.read(name) for name in file.tensors}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        theirs = compressor.decompress(own, scheme)["weight"]
        assert torch.equal(read.get_submodule(name).dequantize(), theirs.float())


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe", *HYBRIDS])
def test_transformers_opens_compressed_tensors(name, kind, source, tmp_path):
    qr.quantize(source[name], tmp_path / "out", kind, group=32, progress=False)
    wanted = load_model(tmp_path / "out", dtype="float32")(IDS)
    # Experts are stacked by transformers, which its compressed modules are not made for: dequantised while it loads.
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True, quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, wanted, atol=2e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_transformers_opens_bitsandbytes_and_fp8(kind, source, tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="transformers reads bitsandbytes and FP8 only where accelerate is installed")
    monkeypatch.setattr("bitsandbytes.matmul_4bit", lambda x, codes, quant_state, bias: torch.nn.functional.linear(
        x, dequantize_4bit(codes, quant_state).to(x.dtype), bias))  # its own product has the fault of `dequantize_4bit`, ...
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # ... and its layout refuses rows of 96
    qr.quantize(source["qwen3"], tmp_path / "out", kind, progress=False)
    wanted = load_model(tmp_path / "out", dtype="float32")(IDS)
    extra = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)} if kind == "fp8" else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", **extra)
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, wanted, atol=5e-5)


def test_bitsandbytes_reads_the_state_that_is_written(source, tmp_path):
    """The part of the above that needs no accelerate: bitsandbytes' own QuantState, from the file's tensors."""
    qr.quantize(source["qwen3"], tmp_path / "out", "nf4", progress=False)
    name, found = "model.layers.1.mlp.gate_proj", {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        with SafetensorsFile(path) as file:
            found |= {k.removeprefix(f"{name}."): file.read(k) for k in file.tensors if k.startswith(f"{name}.")}
    codes = found.pop("weight")
    state = bnb.QuantState.from_dict({k.removeprefix("weight."): v for k, v in found.items()}, torch.device("cpu"))
    read = load_model(tmp_path / "out", dtype="float32")
    assert torch.equal(dequantize_4bit(codes, state), read.get_submodule(name).dequantize())


def test_fp8_file_by_its_definition(source, tmp_path):
    qr.quantize(source["qwen3"], tmp_path / "out", "fp8", progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    high, wide = config["weight_block_size"]
    plain, tensors = load_model(source["qwen3"], dtype="float32"), {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        with SafetensorsFile(path) as file:
            tensors |= {name: file.read(name) for name in file.tensors}
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        weight, scale = tensors[f"{name}.weight"].float().numpy(), tensors[f"{name}.weight_scale_inv"].numpy()
        value = weight * np.kron(scale, np.ones((high, wide), np.float32))[: weight.shape[0], : weight.shape[1]]
        error = np.abs(value - plain.get_submodule(name).weight.detach().numpy())
        assert error.max() <= 16 * scale.max()  # half the last step of e4m3 below 448
        assert config["modules_to_not_convert"] == ["lm_head"]


@pytest.mark.parametrize("preset", ["q8_0", "q4_0", "q4_k"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_gguf_file_holds_what_is_made_on_the_fly(name, preset, source, tmp_path):
    qr.quantize(source[name], tmp_path / "m.gguf", f"gguf:{preset}", progress=False)
    made = load_model(source[name], dtype="float32", quantize=f"gguf:{preset}")
    tensors = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert np.array_equal(tensors["blk.2.attn_q.weight"], made.model.layers[2].self_attn.q_proj.weight.numpy())
    assert np.array_equal(tensors["output.weight"], made.lm_head.weight.numpy())
    if name == "qwen3_moe":
        half = made.model.layers[0].mlp.experts.gate_up.dequantize(torch.float32, 96)[:, 64:].numpy()
        assert np.array_equal(tensors["blk.0.ffn_up_exps.weight"], half)
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        qr.quantize(source[name], tmp_path / "m.gguf", f"gguf:{preset}", progress=False)


# ---------------------------------------------------------------- interrupted, refused


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("after", [0, 1, 2, 4])
def test_a_run_goes_on_where_it_was_killed(method, after, source, tmp_path, monkeypatch):
    settings = {"to": "int4", "method": method, "group": 32, "progress": False}
    qr.quantize(source["qwen3"], tmp_path / "whole", **settings)
    original, written = making_module.write_safetensors, []

    def dies(path, tensors):
        if len(written) == after:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path)
        original(path, tensors)

    monkeypatch.setattr(making_module, "write_safetensors", dies)
    with pytest.raises(KeyboardInterrupt):
        qr.quantize(source["qwen3"], tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.partial").glob("*.safetensors")}
    assert len(finished) == after
    monkeypatch.setattr(making_module, "write_safetensors", original)
    qr.quantize(source["qwen3"], tmp_path / "out", **settings)
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "whole").keys()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == finished  # not written again


def test_a_run_goes_on_that_was_killed_as_it_wrote_its_record(source, tmp_path, monkeypatch):
    def killed(path, value):
        path.write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(making_module, "write_json", killed)
        qr.quantize(source["qwen3"], tmp_path / "out", "int8", progress=False)
    qr.quantize(source["qwen3"], tmp_path / "out", "int8", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_shard_is_made_again(source, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(making_module._Job, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            qr.quantize(source["qwen3"], tmp_path / "out", "int8", progress=False)
    shard = tmp_path / "out.partial" / "model-00002-of-00005.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    qr.quantize(source["qwen3"], tmp_path / "out", "int8", progress=False)
    assert (tmp_path / "out" / shard.name).read_bytes() == whole


def test_other_settings_are_not_mixed_in(source, tmp_path, monkeypatch):
    copy = tmp_path / "source"
    shutil.copytree(source["qwen3"], copy)
    with monkeypatch.context() as patch:
        patch.setattr(making_module._Job, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            qr.quantize(copy, tmp_path / "out", "int4", group=32, progress=False)
    for changed, what in (({"group": 16}, "size"), ({"method": "gptq", "group": 32}, "method and calibration")):
        with pytest.raises(CheckpointError, match=f"begun with another {what}"):
            qr.quantize(copy, tmp_path / "out", "int4", progress=False, **changed)
    os.utime(copy / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="begun with another source"):
        qr.quantize(copy, tmp_path / "out", "int4", group=32, progress=False)


def test_nothing_is_overwritten(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(CheckpointError, match="not empty; nothing is overwritten"):
        qr.quantize(source["qwen3"], tmp_path / "out", "int8")
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "mine").write_text("keep")
    with pytest.raises(CheckpointError, match="is not an unfinished run"):
        qr.quantize(source["qwen3"], tmp_path / "b", "int8")
    assert (tmp_path / "b.partial" / "mine").read_text() == (tmp_path / "out" / "mine").read_text() == "keep"


def test_into_the_folder_one_is_in(source, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    qr.quantize(source["qwen3"], ".", "int8", progress=False)
    assert load_model(tmp_path / "here", progress=False).load_report.notes == [] and not (tmp_path / "here.partial").exists()


def test_a_full_disk(source, tmp_path, monkeypatch):
    def full(path, tensors):
        path.write_bytes(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(making_module, "write_safetensors", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*goes on from there"):
        qr.quantize(source["qwen3"], tmp_path / "out", "int8", progress=False)
    assert not (tmp_path / "out").exists() and not list((tmp_path / "out.partial").glob("*.safetensors"))


def test_methods_that_do_not_go_together(source, tmp_path):
    for changed in ({"to": "int8", "method": "gptq"}, {"method": "awq"}, {"calibration": "text"}):
        with pytest.raises(RequestError, match="gptq"):
            qr.quantize(source["qwen3"], tmp_path / "out", **changed)
    with pytest.raises(RequestError, match="calibration text has 1 tokens"):
        qr.quantize(source["qwen3"], tmp_path / "out", "int4", method="gptq", calibration="a", group=32)


def test_a_source_with_nan_is_refused_by_name(source, tmp_path):
    folder = tmp_path / "source"
    model = load_model(source["qwen3"], dtype="float32", mapped=False)
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = math.nan
    model.save(folder)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight: holds NaN"):
        qr.quantize(folder, tmp_path / "out", "int8", progress=False)


def test_command_line(source, tmp_path, capsys):
    from qwen_ref.cli import main

    assert main(["quantize", str(source["qwen3"]), str(tmp_path / "out"), "--to", "int4", "--group", "32", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["folder"] == str(tmp_path / "out") and printed["bytes"] > 0
    assert main(["quantize", str(source["qwen3"]), str(tmp_path / "out"), "--to", "int4"]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert main(["generate", "--quantize", "int4", "--max-tokens", "3", "Hello"]) == 0


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_experts_of_four_bit_floats_keep_the_scale_of_each_matrix(kind):
    """NVFP4 has a scale for every whole matrix: with one expert's for all, the others would be wrong in silence."""
    plain, _ = qr.load("tiny-moe", dtype="float32")
    made, _ = qr.load("tiny-moe", dtype="float32", quantize=kind)
    weights = dict(made.official_weights())
    for name, tensor in plain.checkpoint_tensors().items():
        if ".experts." in name:
            alone = rounding.ROUND[kind](tensor).dequantize(columns=tensor.shape[1])
            torch.testing.assert_close(weights[name], alone, rtol=3e-7, atol=0)
