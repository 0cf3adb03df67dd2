"""Qwen 1 against a second derivation of it, written token by token in NumPy, and against what its documentation promises.

transformers has no class of it (its code came with the checkpoints), so there is no other implementation to run.
"""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import qwen_ref as qr
from qwen_ref import backend, ops
from qwen_ref.describe import describe
from qwen_ref.errors import ConfigError, RequestError
from qwen_ref.generate import Session, end_tokens
from qwen_ref.loading import ASSETS, build, load_model
from qwen_ref.models import qwen1, qwen2
from qwen_ref.quantize import quantize
from qwen_ref.tokenizer import Tokenizer
from qwen_ref.verify import write_oracle

SHORT = {**qwen1.TINY, "seq_length": 8}  # so that a few tokens are beyond the trained length
PLAIN = {**SHORT, "use_dynamic_ntk": False, "use_logn_attn": False}
VARIANTS = {
    "trained length": qwen1.TINY,
    "ntk and logn": SHORT,
    "ntk": {**SHORT, "use_logn_attn": False},
    "logn": {**SHORT, "use_dynamic_ntk": False},
    "neither": PLAIN,
    "another base": {**SHORT, "rotary_emb_base": 1e6, "layer_norm_epsilon": 1e-2},
}
IDS = torch.randint(0, 211, (3, 23), generator=torch.Generator().manual_seed(2))
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # fp32, logits of scale 1..10: sums in another order
# The angles are fp32 on both sides, but NumPy's power and cosine are not PyTorch's to the last bit: 23 positions of 6e-8.
DERIVED = 5e-6


def make(raw: dict, dtype: torch.dtype = torch.float32, seed: int = 0) -> qwen1.Model:
    """Random weights, drawn wide enough that no activation is near zero; all biases and norms take part."""
    model = qwen1.Model(qwen1.Config.from_json(raw)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        std = 0.3 if p.dim() == 1 else p.shape[-1] ** -0.5
        p.copy_(torch.randn(p.shape, generator=generator) * std + (p.dim() == 1 and not name.endswith("bias")))
    return model.to(dtype)


# ------------------------------------------------------------------------------------------------- a second derivation


def derived(tensors: dict[str, np.ndarray], raw: dict, ids: list[int], prompt: int | None = None) -> np.ndarray:
    """(T, V) logits in fp64 from tensors by their names on disk, a token and a head at a time."""
    hidden, heads, dim = raw["hidden_size"], raw["num_attention_heads"], raw["kv_channels"]
    width, trained, eps = raw["intermediate_size"] // 2, raw["seq_length"], raw.get("layer_norm_epsilon", 1e-6)
    base, alpha, prompt = raw.get("rotary_emb_base", 10000.0), 1, prompt or len(ids)
    if raw.get("use_dynamic_ntk", True):
        while 2 ** (math.log2(alpha + 1) - 1) * trained < prompt:  # 1, 3, 7, 15, ... serve 1, 2, 4, 8 times the length
            alpha = 2 * alpha + 1
    base *= alpha ** (dim / (dim - 2))

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.dot(x, x) / hidden + eps) * tensors[f"{name}.weight"]

    def turned(x: np.ndarray, position: int) -> np.ndarray:
        out = x.copy()
        for j in range(dim // 2):
            angle = np.float32(position) * np.float32(1 / np.float32(np.float32(base) ** np.float32(2 * j / dim)))
            c, s = float(np.cos(angle)), float(np.sin(angle))
            a, b = x[j], x[j + dim // 2]
            out[j], out[j + dim // 2] = a * c - b * s, b * c + a * s
        return out

    streams = [tensors["transformer.wte.weight"][i] for i in ids]
    for layer in range(raw["num_hidden_layers"]):
        at = f"transformer.h.{layer}"
        keys, values, after = [], [], []
        for p, x in enumerate(streams):
            fused = tensors[f"{at}.attn.c_attn.weight"] @ norm(x, f"{at}.ln_1") + tensors[f"{at}.attn.c_attn.bias"]
            queries = fused[:hidden].reshape(heads, dim)
            keys.append([turned(k, p) for k in fused[hidden : 2 * hidden].reshape(heads, dim)])
            values.append(fused[2 * hidden :].reshape(heads, dim))
            stretch = math.log(p + 1, trained) if raw.get("use_logn_attn", True) and p + 1 > trained else 1.0
            mixed = []
            for n in range(heads):
                query = turned(queries[n], p) * stretch
                weights = [math.exp(np.dot(query, key[n]) / math.sqrt(dim)) for key in keys]
                mixed.append(sum(w * v[n] for w, v in zip(weights, values, strict=True)) / sum(weights))
            after.append(x + tensors[f"{at}.attn.c_proj.weight"] @ np.concatenate(mixed))
        streams = []
        for x in after:
            y = norm(x, f"{at}.ln_2")
            up, gate = tensors[f"{at}.mlp.w1.weight"] @ y, tensors[f"{at}.mlp.w2.weight"] @ y
            assert len(up) == len(gate) == width
            streams.append(x + tensors[f"{at}.mlp.c_proj.weight"] @ (up * gate / (1 + np.exp(-gate))))
    return np.stack([tensors["lm_head.weight"] @ norm(x, "transformer.ln_f") for x in streams])


def on_disk(model: qwen1.Model) -> dict[str, np.ndarray]:
    return {model.disk_name(name): p.double().numpy() for name, p in model.named_parameters()}


def distance(ours: torch.Tensor, other: np.ndarray) -> float:
    return float(np.abs(ours.numpy() - other).max() / np.abs(other).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_second_derivation(name):
    model = make(VARIANTS[name], torch.float64)
    with backend.use("eager"):
        assert distance(model(IDS[:1])[0], derived(on_disk(model), VARIANTS[name], IDS[0].tolist())) < DERIVED


FAULTS = {  # what is replaced, and by what, given the real one
    "silu on w1": (backend, "swiglu", lambda real: lambda gate, up: real(up, gate)),
    "k before q": (backend, "linear", lambda real: lambda x, w, b=None: real(x, w, b).roll(96 if len(w) == 3 * 96 else 0, -1)),
    "alpha one step late": (ops, "ntk_alpha", lambda real: lambda length, trained: real(length // 2 + 1, trained)),
    "base times alpha": (ops, "rope_frequencies", lambda real: lambda dim, base: real(dim, base / 7 ** (2 / (dim - 2)))),
    "logn by p": (ops, "logn_scale", lambda real: lambda p, trained, dtype: real(p - 1, trained, dtype)),
    "no logn": (ops, "logn_scale", lambda real: lambda p, trained, dtype: real(p * 0, trained, dtype)),
    "interleaved pairs": (backend, "rope", lambda real: lambda x, cos, sin: real(x.unflatten(-1, (-1, 2)).mT.flatten(-2), cos, sin)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, monkeypatch):
    where, name, plant = FAULTS[fault]
    model = make(SHORT, torch.float64)
    expected = derived(on_disk(model), SHORT, IDS[0].tolist())
    monkeypatch.setattr(where, name, plant(getattr(where, name)))
    assert distance(model(IDS[:1])[0], expected) > 100 * DERIVED


@pytest.mark.parametrize("length, alpha", [(1, 1), (63, 1), (64, 1), (65, 3), (128, 3), (129, 7), (256, 7), (257, 15), (1 << 20, 32767)])
def test_ntk_alpha_steps_beyond_every_doubling(length, alpha):
    assert ops.ntk_alpha(length, 64) == alpha


def test_logn_is_one_up_to_the_trained_length_and_a_logarithm_beyond():
    positions = torch.tensor([[-1, 0, 6, 7, 8, 63, 511, 32766, 99999]])
    scale = ops.logn_scale(positions, 8, torch.float32)
    assert scale.shape == (1, 1, 9, 1)
    expected = [1, 1, 1, 1, math.log(9, 8), 2, 3, math.log(32767, 8), math.log(100000, 8)]
    assert scale.flatten().tolist() == pytest.approx(expected, rel=1e-7)
    exact = ops.logn_scale(positions, 8, torch.float64).float().bfloat16()
    assert torch.equal(ops.logn_scale(positions, 8, torch.bfloat16), exact)  # rounded once, as the official table is


# ------------------------------------------------------------------------------------------------- half precision


def test_rotation_is_in_fp32_and_rounded_once():
    x = torch.randn(2, 6, 9, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotary = make(SHORT).model.rotary_emb
    cos, sin = rotary(torch.arange(9)[None], torch.bfloat16, None)
    assert cos.dtype == torch.float32
    exact = ops.rope(x.double(), cos.double(), sin.double()).bfloat16()
    rotated = qwen1.rotate(x, cos, sin)
    assert rotated.dtype == torch.bfloat16 and (rotated != exact).float().mean() < 1e-3  # fp32 may round a tie the other way
    in_bf16 = ops.rope(x, cos.bfloat16(), sin.bfloat16())
    assert (in_bf16 != exact).float().mean() > 0.1, "rotation in bf16 would be seen"


def test_bf16_loses_a_few_roundings():
    """Against the fp32 run of the rounded weights: bf16's eps of 2^-8, through three layers."""
    model = make(SHORT, torch.bfloat16)
    exact = make(SHORT)
    for p, q in zip(exact.parameters(), model.parameters(), strict=True):
        p.copy_(q)
    ours, truth = model(IDS).float(), exact(IDS)
    assert float((ours - truth).norm() / truth.norm()) < 4 * 2**-8


# ------------------------------------------------------------------------------------------------- the cache


MODELS = {"trained length": make(qwen1.TINY), "ntk and logn": make(SHORT), "neither": make(PLAIN)}


def read(model: qwen1.Model, ids: torch.Tensor, cuts: list[int], positions: torch.Tensor | None = None, expect=None):
    """(logits, cache) of ids read in pieces."""
    cache, parts = model.make_cache(), []
    if expect is not None:
        cache.expect(expect)
    for a, b in pairwise([0, *cuts, ids.shape[1]]):
        parts.append(model(ids[:, a:b], None if positions is None else positions[:, a:b], cache))
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("attention", ["eager", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_every_split_point_and_token_by_token(name, attention):
    """Where the length is said first, or does not matter."""
    model, expect = MODELS[name], [23, 23, 23] if name == "ntk and logn" else None
    with backend.use({"attention": attention}, strict=True):
        whole = model(IDS)
        for split in range(1, 23):
            torch.testing.assert_close(read(model, IDS, [split], expect=expect)[0], whole, **CLOSE)
        torch.testing.assert_close(read(model, IDS, list(range(1, 23)), expect=expect)[0], whole, **CLOSE)


def test_the_prompt_decides_alpha_and_decoding_keeps_it():
    """7 tokens, then 16 more: alpha stays 1, as a second derivation that is told so computes; whole, it would be 7."""
    model = make(SHORT, torch.float64)
    frozen, _ = read(model, IDS[:1], [7, *range(8, 23)])
    assert distance(frozen[0], derived(on_disk(model), SHORT, IDS[0].tolist(), prompt=7)) < DERIVED
    assert float((frozen - model(IDS[:1])).abs().max()) > 0.1


def test_a_first_chunk_decides_where_nothing_was_said():
    model = MODELS["ntk and logn"]
    torch.testing.assert_close(read(model, IDS, [10])[0], read(model, IDS, [10], expect=[10] * 3)[0], rtol=0, atol=0)
    assert not torch.allclose(read(model, IDS, [10])[0], model(IDS), **CLOSE)


@given(cuts=st.sets(st.integers(1, 22), max_size=4), lengths=st.tuples(*[st.integers(1, 23)] * 3), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_padded_rows_have_their_own_alpha(cuts, lengths, seed):
    """A row padded on the left, read in any chunks beside others, equals the row alone; and so does the token after."""
    model = MODELS["ntk and logn"]
    ids = torch.randint(0, 211, (3, 23), generator=torch.Generator().manual_seed(seed))
    longest = max(lengths)
    positions = torch.stack([(torch.arange(longest) - (longest - n)).clamp_min(-1) for n in lengths])
    ids = ids[:, :longest]
    cuts = sorted(c for c in cuts if c < longest)
    out, cache = read(model, ids, cuts, positions, expect=list(lengths) if cuts else None)
    after = model(ids[:, :1], cache=cache)
    for row, n in enumerate(lengths):
        alone, own = read(model, ids[row : row + 1, longest - n :], [])
        torch.testing.assert_close(out[row, longest - n :], alone[0], **CLOSE)
        torch.testing.assert_close(after[row], model(ids[row : row + 1, :1], cache=own)[0], **CLOSE)


def test_truncate_and_select_keep_each_rows_frequencies():
    model, lengths = MODELS["ntk and logn"], (23, 5, 14)
    positions = torch.stack([(torch.arange(23) - (23 - n)).clamp_min(-1) for n in lengths])
    _, cache = read(model, IDS, [], positions)
    assert len(cache.frequencies.unique(dim=0)) == 3  # alpha 7, 1 and 3
    cache.truncate(22)
    cache.select(torch.tensor([2, 0]))
    again = model(IDS[[2, 0], 22:], cache=cache)
    whole = model(IDS, positions)
    torch.testing.assert_close(again[:, 0], whole[[2, 0], 22], **CLOSE)
    cache.truncate(0)
    assert cache.frequencies is None, "an empty cache takes the next prompt's"


def test_a_snapshot_holds_the_frequencies_and_what_is_cut_back_expects_nothing():
    model = MODELS["ntk and logn"]
    _, cache = read(model, IDS[:1], [], expect=[30])
    kept, after = cache.snapshot(), model(IDS[:1, :1], cache=cache)
    other = model.make_cache()
    model(IDS[:1, :3], cache=other)
    other.restore(kept)
    torch.testing.assert_close(model(IDS[:1, :1], cache=other), after)
    cache.truncate(0)
    assert cache.expected is None
    torch.testing.assert_close(model(IDS[:1, :7], cache=cache), model(IDS[:1, :7]), **CLOSE)


# ------------------------------------------------------------------------------------------------- generation


@pytest.fixture(scope="module")
def speaker() -> tuple[qwen1.Model, Tokenizer]:
    tokenizer = Tokenizer.load(ASSETS / "tiny")
    return make({**SHORT, "vocab_size": tokenizer.vocab_size + 5}), tokenizer


def greedy(model: qwen1.Model, prompt: list[int], count: int, vocab: int) -> list[int]:
    """As the official code: the prompt in one pass, then token by token."""
    cache, step, out = model.make_cache(), torch.tensor([prompt]), []
    for _ in range(count):
        out.append(int(model(step, cache=cache)[0, -1, :vocab].argmax()))
        step = torch.tensor([[out[-1]]])
    return out


def test_generate_in_chunks_and_batches_is_the_official_way(speaker):
    model, tokenizer = speaker
    prompts = [[5 + 7 * i % 200 for i in range(n)] for n in (7, 30, 12)]
    expected = [greedy(model, prompt, 12, tokenizer.vocab_size) for prompt in prompts]
    for chunk in (512, 5):
        results = qr.generate(model, tokenizer, prompts, max_tokens=12, temperature=0, ignore_eos=True, prefill_chunk=chunk)
        assert [r.token_ids for r in results] == expected


def test_a_session_whose_prompt_outgrows_its_frequencies_reads_it_anew(speaker):
    model, tokenizer = speaker
    session, prompt = Session(model), list(range(5, 11))
    options = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
    for length, cached in ((6, 0), (8, 6), (13, 0), (16, 13)):  # alpha 1, 1, 3, 3
        prompt = list(range(5, 5 + length))
        [result] = qr.generate(model, tokenizer, [prompt], session=session, **options)
        assert result.token_ids == greedy(model, prompt, 3, tokenizer.vocab_size)
        assert result.usage.cached_tokens == cached


def test_chatml_ends_at_the_marks_of_a_turn(speaker):
    model, tokenizer = make(qwen1.TINY), speaker[1]
    assert end_tokens(model, tokenizer)["generation_config.json"] == []
    model.generation_config = {"chat_format": "chatml", "eos_token_id": 3}
    marks = [tokenizer.id_of("<|im_end|>"), tokenizer.id_of("<|im_start|>")]
    assert end_tokens(model, tokenizer)["generation_config.json"] == [3, *marks]
    model.generation_config = {"chat_format": "raw", "eos_token_id": 3}
    assert end_tokens(model, tokenizer)["generation_config.json"] == [3]


# ------------------------------------------------------------------------------------------------- files


def test_saved_under_the_official_names_and_read_back(tmp_path):
    model = make(SHORT)
    model.extra_files = {"qwen.tiktoken": b"IQ== 0\n"}
    model.save(tmp_path / "m")
    names = set(load_file(tmp_path / "m" / "model.safetensors"))
    block = ("ln_1.weight", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "ln_2.weight", "mlp.w1.weight",
             "mlp.w2.weight", "mlp.c_proj.weight")
    assert names == {"transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight",
                     *(f"transformer.h.{i}.{name}" for i in range(3) for name in block)}
    assert (tmp_path / "m" / "qwen.tiktoken").read_bytes() == b"IQ== 0\n"
    again = load_model(tmp_path / "m", device="cpu")
    assert again.config == model.config and torch.equal(again(IDS), model(IDS))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["intermediate_size"] == 176


def test_shards_and_the_first_files_buffers_load(tmp_path):
    from safetensors.torch import save_file

    model = make(SHORT)
    model.save(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    weights |= {"transformer.h.1.attn.masked_bias": torch.tensor(-1e4), "transformer.rotary_emb.inv_freq": torch.ones(8)}
    names = sorted(weights)
    index = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: weights[name].clone() for name in part}, tmp_path / "m" / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    again = load_model(tmp_path / "m", device="cpu")
    assert torch.equal(again(IDS), model(IDS))
    assert sorted(again.load_report.ignored) == ["transformer.h.1.attn.masked_bias", "transformer.rotary_emb.inv_freq"]


def test_inspect_knows_its_parts_and_ends(tmp_path):
    model = make(SHORT)
    model.extra_files = {"generation_config.json": b'{"chat_format": "chatml", "eos_token_id": 151643}'}
    model.save(tmp_path / "m")
    found = describe(tmp_path / "m")
    assert found.parameters == {"embedding": 211 * 96, "attention": 3 * (4 * 96 * 96 + 3 * 96), "feed-forward": 3 * 3 * 96 * 88,
                                "norms": 7 * 96, "head": 211 * 96}  # fmt: skip
    assert found.kv_bytes_per_token == 2 * 3 * 96 * 4
    assert found.end_tokens["generation_config.json"] == [151643, "<|im_end|>", "<|im_start|>"]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_under_the_official_names(tmp_path, kind):
    """The fused projection is rounded like any other matrix; the rounded checkpoint is read back as what it was rounded to."""
    model = make({**SHORT, "hidden_size": 128, "kv_channels": 32, "num_attention_heads": 4, "intermediate_size": 256})
    model.save(tmp_path / "m")
    quantize(tmp_path / "m", tmp_path / "q", kind, progress=False)
    names = {name for path in (tmp_path / "q").glob("*.safetensors") for name in load_file(path)}
    assert any(re.fullmatch(r"transformer\.h\.2\.attn\.c_attn\.(qweight|weight_packed|weight)", name) for name in names), names
    packed, plain = (load_model(tmp_path / "q", device="cpu", dequantize=d, progress=False) for d in (False, True))
    assert "packed" in str(type(packed.model.layers[0].attn.c_attn)).lower()
    torch.testing.assert_close(packed(IDS), plain(IDS), rtol=1e-3, atol=1e-3)


OFFICIAL = {  # hidden, layers, heads, intermediate_size, vocabulary -> parameters
    "1.8B": (2048, 24, 16, 11008, 151936, 1_836_828_672),
    "7B": (4096, 32, 32, 22016, 151936, 7_721_324_544),
    "14B": (5120, 40, 40, 27392, 152064, 14_167_290_880),
    "72B": (8192, 80, 64, 49152, 152064, 72_287_920_128),  # half of the official index's total_size, 2 bytes a weight
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sizes(name):
    hidden, layers, heads, width, vocab, parameters = OFFICIAL[name]
    raw = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": width,
           "vocab_size": vocab, "kv_channels": 128, "seq_length": 8192, "model_type": "qwen", "no_bias": True,
           "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}}
    block = 4 * hidden**2 + 3 * hidden + 3 * hidden * width // 2 + 2 * hidden
    assert build(raw).num_parameters() == 2 * vocab * hidden + layers * block + hidden == parameters


FIRST = {  # config.json of the first 7B-Chat
    "activation": "swiglu", "apply_residual_connection_post_layernorm": False, "bf16": False, "ffn_hidden_size": 22016,
    "kv_channels": 128, "layer_norm_epsilon": 1e-05, "model_type": "qwen", "n_embd": 4096, "n_head": 32, "n_layer": 32,
    "n_positions": 6144, "no_bias": True, "onnx_safe": None, "padded_vocab_size": 151936, "pos_emb": "rotary",
    "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 2048,
    "tie_word_embeddings": False, "use_flash_attn": "auto", "vocab_size": 151936, "use_dynamic_ntk": True,
    "use_logn_attn": True,
}  # fmt: skip


def test_the_first_files_spelling():
    config = qwen1.Config.from_json(FIRST)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (4096, 32, 32)
    assert (config.intermediate_size, config.max_position_embeddings, config.seq_length) == (11008, 6144, 2048)
    assert qwen1.Config.from_json(config.to_json()) == config


def test_defaults_are_those_of_the_official_configuration_file():
    config = qwen1.Config.from_json({"model_type": "qwen", "seq_length": 8192})
    assert config == qwen1.Config(
        "qwen", 151936, 4096, 11008, 32, 32, 128, 8192, 1e-6, config.rope, 8192, True, True, False)
    assert config.rope.theta == 10_000 and config.rope.factor is None


@pytest.mark.parametrize("field, value", [
    ("no_bias", False), ("scale_attn_weights", False), ("rotary_pct", 0.25), ("seq_length_expansion", 2), ("seq_length", 1),
    ("seq_length", None), ("kv_channels", 17), ("kv_channels", 128), ("intermediate_size", 175), ("rotary_emb_base", 1),
    ("use_cache_quantization", True), ("visual", {"layers": 48}), ("audio", {"n_layer": 32}), ("use_dynamic_ntk", "yes"),
    ("apply_residual_connection_post_layernorm", True), ("activation", "gelu"), ("pos_emb", "alibi"),
    ("layer_norm_epsilon", 0), ("num_hidden_layers", 10**6), ("vocab_size", "151936"), ("seq_length", 8192.0),
])  # fmt: skip
def test_a_wrong_value_is_named(field, value):
    with pytest.raises(ConfigError, match=f": {field} "):
        build({**qwen1.TINY, field: value})


def test_qwen_vl_is_refused(data):
    """Its config.json says model_type `qwen` too."""
    raw = json.loads((data / "configs" / "Qwen--Qwen-VL-Chat-Int4_config.json").read_text(encoding="utf-8"))
    with pytest.raises(ConfigError, match="visual is set"):
        build(raw)


# ------------------------------------------------------------------------------------------------- hooks


def test_every_point_holds_what_its_name_says():
    model = make(SHORT)
    with backend.use("eager"):
        logits, acts = model.run_with_cache(IDS, "*hook_*")
        assert torch.equal(logits, model(IDS))
    assert set(acts) == set(model.list_hooks())
    assert model.list_hooks() == build(qwen2.TINY).list_hooks(), "the same names in every generation"
    before = acts["hook_embed"]
    for i, block in enumerate(model.model.layers):
        attn, mlp = f"blocks.{i}.attn.hook", f"blocks.{i}.mlp.hook"
        assert torch.equal(acts[f"blocks.{i}.hook_resid_pre"], before)
        fused = torch.cat([acts[f"{attn}_{part}"].flatten(2) for part in "qkv"], -1)  # (B, T, 3H)
        assert torch.equal(fused, block.attn.c_attn(acts[f"blocks.{i}.ln1.hook_out"]))
        assert acts[f"{attn}_q"].shape == acts[f"{attn}_rot_k"].shape == acts[f"{attn}_z"].shape == (3, 23, 6, 16)
        cos, sin = model.model.rotary_emb(torch.arange(23)[None], torch.float32, None)
        for part in "qk":
            turned = ops.rope(acts[f"{attn}_{part}"].transpose(1, 2), cos, sin).transpose(1, 2)
            assert torch.equal(acts[f"{attn}_rot_{part}"], turned)
        logn = ops.logn_scale(torch.arange(23)[None], 8, torch.float32)
        scores = (turned_q := acts[f"{attn}_rot_q"].transpose(1, 2) * logn) @ acts[f"{attn}_rot_k"].permute(0, 2, 3, 1) / 4
        assert turned_q.shape == (3, 6, 23, 16)
        seen = torch.ones(23, 23, dtype=torch.bool).tril()
        torch.testing.assert_close(acts[f"{attn}_attn_scores"][..., seen], scores[..., seen], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(acts[f"{attn}_pattern"], scores.masked_fill(~seen, -math.inf).softmax(-1))
        torch.testing.assert_close(acts[f"{attn}_z"], (acts[f"{attn}_pattern"] @ acts[f"{attn}_v"].transpose(1, 2)).transpose(1, 2))
        torch.testing.assert_close(acts[f"{attn}_result"].sum(2), acts[f"blocks.{i}.hook_attn_out"], rtol=1e-4, atol=1e-5)
        middle = before + acts[f"blocks.{i}.hook_attn_out"]
        assert torch.equal(acts[f"blocks.{i}.hook_resid_mid"], middle)
        gated = torch.nn.functional.silu(acts[f"{mlp}_pre"]) * acts[f"{mlp}_pre_linear"]
        assert torch.equal(acts[f"{mlp}_post"], gated) and gated.shape == (3, 23, 88)
        assert torch.equal(acts[f"{mlp}_pre"], block.mlp.w2(acts[f"blocks.{i}.ln2.hook_out"]))
        before = middle + acts[f"blocks.{i}.hook_mlp_out"]
        assert torch.equal(acts[f"blocks.{i}.hook_resid_post"], before)


def test_every_point_can_be_edited_and_an_identity_edit_changes_nothing():
    model = make(SHORT)
    with backend.use("eager"):
        plain = model(IDS)
        for name in model.list_hooks():
            assert torch.equal(model.run_with_hooks(IDS, [(name, lambda x, hook: x.clone())]), plain), name
            assert not torch.equal(model.run_with_hooks(IDS, [(name, lambda x, hook: x * 1.5 + 0.5)]), plain) or name.endswith(
                "attn_scores"), name  # softmax does not see what is added to all, nor the mask's lowest number times 1.5

        def no_third_head(x, hook):
            x[:, :, 2] = 0

        for part, rows in (("q", slice(32, 48)), ("k", slice(96 + 32, 96 + 48)), ("v", slice(192 + 32, 192 + 48))):
            pruned = make(SHORT)
            pruned.model.layers[1].attn.c_attn.weight[rows] = 0
            pruned.model.layers[1].attn.c_attn.bias[rows] = 0
            edited = model.run_with_hooks(IDS, [(f"blocks.1.attn.hook_{part}", no_third_head)])
            torch.testing.assert_close(edited, pruned(IDS), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- verify


def test_verify_says_in_one_line_that_there_is_no_other_side(tmp_path):
    model = make(qwen1.TINY)
    with pytest.raises(RequestError, match=r"transformers has no model of model_type 'qwen'.*L1,L5"):
        qr.verify(model, progress=False)
    for raw in (qwen1.TINY, SHORT):  # of the second, the prompt is beyond the trained length
        report = qr.verify(make(raw), levels="L1,L5", progress=False)
        assert report.ok and {check.level for check in report.checks} == {"L1", "L5"}
    with pytest.raises(RequestError, match="no model of model_type"):
        write_oracle(model, tmp_path / "oracle.safetensors", progress=False)
