"""GGUF files against the `gguf` package, which reads and writes them for llama.cpp, and transformers, which runs them."""

from __future__ import annotations

import ctypes
import errno
import json
import re
import weakref
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import TINY, make_pair
from gguf import GGMLQuantizationType
from test_gguf_blocks import random_blocks, theirs
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from qwen_ref.errors import CheckpointError, ConfigError, TokenizerError
from qwen_ref.loading import ASSETS, load_model
from qwen_ref.models import module_for
from qwen_ref.quant.gguf import GgufFile, ggml_name, official_name, open_gguf, repack
from qwen_ref.quant.gguf_blocks import BLOCK, GRIDS
from qwen_ref.quant.gguf_meta import _decimal
from qwen_ref.quant.gguf_write import PRESETS, Source, kind_for, plan, write_gguf
from qwen_ref.tokenizer import Tokenizer

# Rows of 256, 288 and 384: whole blocks of every kind, and such that fall back.
SIZES = {"vocab_size": 4113, "hidden_size": 256, "intermediate_size": 288, "head_dim": 64, "num_hidden_layers": 3}
ARCHITECTURES = {"qwen2": "qwen2", "qwen2_moe": "qwen2moe", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 24.0}


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    config = {**TINY[model_type][1], **SIZES, "tie_word_embeddings": False, **changes}
    if model_type.startswith("qwen2"):
        del config["head_dim"]
        config |= {"num_attention_heads": 4}
    if model_type.endswith("_moe"):
        config |= {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 160, "mlp_only_layers": []}
    return config | changes


def tokenizer_files(folder: Path = ASSETS / "tiny") -> dict[str, bytes]:
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def sources(model: Any, config: dict[str, Any], preset: str) -> list[Source]:
    tensors = model.checkpoint_tensors()

    def make(parts: tuple[str, ...], stacked: bool) -> torch.Tensor:
        return torch.stack([tensors[name] for name in parts]) if stacked else tensors[parts[0]]

    planned = plan({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, preset)
    return [Source(p.name, p.shape, p.kind, lambda p=p: make(p.parts, p.name not in p.parts)) for p in planned]


def write(path: Path, model_type: str = "qwen3", preset: str = "q8_0", **changes: Any) -> tuple[Any, dict[str, Any]]:
    config = config_of(model_type, **changes)
    model, _ = make_pair(config)
    write_gguf(path, config, tokenizer_files(), sources(model, config, preset))
    return model, config


def tokenizer_of(path: Path, folder: Path) -> Tokenizer:
    folder.mkdir()
    with open_gguf(path) as checkpoint:
        for name, content in checkpoint.tokenizer_files.items():
            (folder / name).write_bytes(content)
    return Tokenizer.load(folder)


def fill(model: Any, path: Path) -> set[str]:
    """Put the dequantised tensors of a file into a model; the names of those it has filled."""
    slots, filled = model.checkpoint_tensors(), set()
    with open_gguf(path) as checkpoint:
        for file in checkpoint.files:
            for name in file.tensors:
                tensor = file.read(name)
                if name in file.kinds:
                    tensor = repack(file.kinds[name], tensor).dequantize()
                stack = re.fullmatch(r"(.+\.experts)\.(\w+\.weight)", name)
                parts = {f"{stack[1]}.{e}.{stack[2]}": t for e, t in enumerate(tensor)} if stack else {name: tensor}
                for part, value in parts.items():
                    assert slots[part].shape == value.shape
                    slots[part].copy_(value)
                filled |= parts.keys()
    return filled


# ------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_names_are_those_of_the_library(model_type):
    config = config_of(model_type)
    module = module_for(config)
    with torch.device("meta"):
        model = module.Model(module.Config.from_json(config))
    arch = next(code for code, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[model_type])
    library = gguf.get_tensor_name_map(arch, 3)
    for planned in plan({n: tuple(t.shape) for n, t in model.checkpoint_tensors().items()}, config, "f32"):
        expected = library.get_name(planned.name, try_suffixes=(".weight", ".bias"))
        assert expected is not None and ggml_name(planned.name) == expected
        assert official_name(expected) == planned.name


@pytest.mark.parametrize("name", ["blk.01.attn_q.weight", "blk.1.output.weight", "attn_q.weight", "output.weight\n",
                                  "blk.٣.attn_q.weight", "lm_head.weight", "rope_freqs.weight", ""])  # fmt: skip
def test_other_names_are_none(name):
    assert official_name(name) is None
    assert ggml_name(f"model.layers.0.{name}") is None


# ------------------------------------------------------------------------------------------------- reading


def library_file(path: Path, tensors: dict[str, tuple[np.ndarray, str]], **options: Any) -> None:
    """A file written by llama.cpp's own package."""
    writer = gguf.GGUFWriter(path, "qwen3", **options)
    writer.add_block_count(5)
    for name, (value, kind) in tensors.items():
        writer.add_tensor(name, value, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_type_the_library_writes_is_read(tmp_path):
    generator = np.random.default_rng(0)
    kinds = dict(zip([f"blk.{i}.attn_q.weight" for i in range(len(BLOCK))], BLOCK, strict=True))
    tensors = {name: (random_blocks(kind, (5, 3 * BLOCK[kind][0]), finite=True).numpy(), kind)
               for name, kind in kinds.items()}  # fmt: skip
    tensors["blk.0.ffn_up_exps.weight"] = (random_blocks("Q4_K", (3, 7, 512), finite=True).numpy(), "Q4_K")
    tensors["blk.0.ffn_gate_inp_shexp.weight"] = (generator.standard_normal(9, dtype=np.float32), "F32")
    tensors["output.weight"] = (generator.standard_normal((3, 5)).astype(np.float16), "F16")
    tensors["token_embd.weight"] = (np.arange(30, dtype=np.uint16).reshape(5, 6).view(np.uint8), "BF16")
    library_file(tmp_path / "x.gguf", tensors)
    with GgufFile(tmp_path / "x.gguf") as file:
        assert {ggml_name(name) for name in file.tensors} == tensors.keys()
        assert file.kinds.keys() == {official_name(name) for name in (*kinds, "blk.0.ffn_up_exps.weight")}
        assert file.metadata["general.architecture"] == "qwen3" and file.metadata["qwen3.block_count"] == 5
        for name, (value, kind) in tensors.items():
            name = official_name(name)
            read, view = file.read(name), file.view(name)
            assert torch.equal(read, view) and read.dtype == view.dtype
            assert np.array_equal(read.contiguous().view(torch.uint8).numpy().ravel(), value.view(np.uint8).ravel())
            if kind in BLOCK:
                assert file.kinds[name] == kind and read.shape == value.shape
                assert torch.equal(repack(kind, read).dequantize(), theirs(kind, torch.from_numpy(value)))
        assert file.read("model.layers.0.mlp.shared_expert_gate.weight").shape == (1, 9)
        assert file.read("lm_head.weight").dtype == torch.float16 and file.read("lm_head.weight").shape == (3, 5)
        assert file.read("model.embed_tokens.weight").dtype == torch.bfloat16
        wide = torch.empty(3, 5)
        file.read_into("lm_head.weight", wide)
        assert torch.equal(wide, file.read("lm_head.weight").float())
    assert torch.equal(view, read)  # the mapping outlives the file


def test_every_metadata_type_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen3")
    values = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 1 << 31, "int32": -70000,
              "uint64": 1 << 63, "int64": -(1 << 40), "float32": 0.5, "float64": 0.1, "bool": True, "string": "naïve"}  # fmt: skip
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    for name, value in {"ints": [1, -2, 3], "floats": [0.5, 2.0], "texts": ["a", "", "日本"], "truths": [True, False]}.items():
        writer.add_array(f"x.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(tmp_path / "x.gguf") as file:
        assert {kind: file.metadata[f"x.{kind}"] for kind in values} == values
        assert [list(file.metadata[f"x.{name}"]) for name in ("ints", "floats", "texts", "truths")] == [
            [1, -2, 3], [0.5, 2.0], ["a", "", "日本"], [1, 0]]  # fmt: skip


def split_files(folder: Path) -> dict[str, np.ndarray]:
    tensors = {f"blk.{i}.attn_norm.weight": np.full(4 + i, i, dtype=np.float32) for i in range(5)}
    library_file(folder / "m.gguf", {name: (value, "F32") for name, value in tensors.items()}, split_max_tensors=2)
    return tensors


def test_the_parts_of_a_split_file(tmp_path):
    tensors = split_files(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for number in (1, 3):  # any part names the others
        with open_gguf(tmp_path / f"m-0000{number}-of-00003.gguf") as checkpoint:
            read = {ggml_name(name): file.read(name).numpy() for file in checkpoint.files for name in file.tensors}
            assert checkpoint.shapes["model.layers.4.input_layernorm.weight"] == (8,)
        assert all(np.array_equal(read[name], value) for name, value in tensors.items()) and len(read) == 5


def test_a_missing_exchanged_or_renamed_part_is_named(tmp_path):
    split_files(tmp_path)
    first, second, third = (tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3))
    raw = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003.gguf: is part 2 of 3 by its metadata, not 1"):
        open_gguf(first)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"of its 3 parts m-00002-of-00003\.gguf missing"):
        open_gguf(first)
    second.write_bytes(raw)
    with pytest.raises(CheckpointError, match="found by name"):
        open_gguf(first.rename(tmp_path / "m.gguf"))


# ------------------------------------------------------------------------------------------------- config and tokenizer


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("scaling", [None, YARN])
def test_config_round_trip(tmp_path, model_type, scaling):
    tied = model_type in ("qwen2", "qwen3_moe")
    eps = 3e-6 if tied else 1e-5
    _, config = write(tmp_path / "m.gguf", model_type, tie_word_embeddings=tied, rope_scaling=scaling, rms_norm_eps=eps,
                      rope_theta=1234567.0)  # fmt: skip
    with open_gguf(tmp_path / "m.gguf") as checkpoint:
        read = checkpoint.config
    module = module_for(read)
    assert module.Config.from_json(read) == module.Config.from_json(config)
    assert json.loads(json.dumps(read)) == read and read["torch_dtype"] in ("bfloat16", "float32")
    assert read["bos_token_id"] == 4070 and read["eos_token_id"] == 4072


def test_metadata_is_spelled_as_the_library_spells_it(tmp_path):
    """Every key is one that llama.cpp's package knows, of the type that its converter writes."""
    write(tmp_path / "m.gguf", "qwen2_moe", rope_scaling=YARN)
    groups = [group for group in vars(gguf.constants.Keys).values() if isinstance(group, type)]
    spelled = {value.replace("{arch}", "qwen2moe") for group in groups for value in vars(group).values()
               if isinstance(value, str)}  # fmt: skip
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    unknown = {key for key in fields if not key.startswith("GGUF.")} - spelled
    assert not unknown
    kinds = {key: field.types for key, field in fields.items()}
    value_type = gguf.GGUFValueType
    assert kinds["qwen2moe.block_count"] == [value_type.UINT32] and kinds["qwen2moe.rope.freq_base"] == [value_type.FLOAT32]
    assert kinds["tokenizer.ggml.tokens"] == [value_type.ARRAY, value_type.STRING]
    assert kinds["tokenizer.ggml.token_type"] == [value_type.ARRAY, value_type.INT32]
    assert kinds["tokenizer.ggml.add_bos_token"] == [value_type.BOOL]


REFUSED = [
    ("qwen3", {"use_sliding_window": True, "sliding_window": 64}, "no counterpart"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "dense"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("qwen3", {"rope_scaling": {**YARN, "attention_factor": 1.5}}, "attention_factor"),
    ("qwen3", {"rope_scaling": {**YARN, "truncate": False}}, "truncate"),
    ("qwen3", {"model_type": "llama"}, "model_type"),
]


@pytest.mark.parametrize("model_type,changes,match", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_not_written(tmp_path, model_type, changes, match):
    config = {**config_of(model_type), **changes}
    with pytest.raises(ConfigError, match=match):
        write_gguf(tmp_path / "m.gguf", config, tokenizer_files(), [])
    assert not list(tmp_path.iterdir())


TEXTS = [
    "Hello world, it's 12345 o'clock!  Two  spaces\n\n\tand a tab.\r\n",
    "Ünïcödé ＡＢＣ 日本語 한국어 עברית हिन्दी ไทย 🎉👩‍👩‍👧 e\u0301 \u212b",
    "<|im_start|>user\n<think>no</think><tool_call>{}</tool_call><|fim_prefix|><|endoftext|>",
    "def f(x):\n        return x ** 2  # 🐍\n" * 3 + " " * 40 + "end \u00a0\u200b",
]


def compare_tokenizers(ours: Tokenizer, official: Tokenizer) -> None:
    for text in TEXTS:
        for special in (False, True):
            ids = official.encode(text, allow_special=special)
            assert ours.encode(text, allow_special=special) == ids
            assert ours.decode(ids) == official.decode(ids)
            assert ours.decode(ids, skip_special=True) == official.decode(ids, skip_special=True)
    for name in ("added_tokens", "special_ids", "vocab_size", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(ours, name) == getattr(official, name), name


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_somebody_makes_meanwhile_stays(tmp_path, monkeypatch, links):
    def refused(*args):
        raise OSError(errno.EPERM, "no links here")

    def make():
        (tmp_path / "m.gguf").write_text("somebody's")
        return torch.zeros(4)

    if not links:
        monkeypatch.setattr("os.link", refused)
    with pytest.raises(CheckpointError, match="m.gguf was made meanwhile"):
        write_gguf(tmp_path / "m.gguf", config_of("qwen3"), tokenizer_files(), [Source("model.norm.weight", (4,), "F32", make)])
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"] and (tmp_path / "m.gguf").read_text() == "somebody's"
    (tmp_path / "m.gguf").unlink()
    write_gguf(tmp_path / "m.gguf", config_of("qwen3"), tokenizer_files(), [])
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("value", [1e300, -1e300, 0.1, -0.1])
def test_decimals_are_those_of_fp32(value):
    """Of an fp64 that fp32 cannot hold there is no shorter one."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    assert _decimal(float(single) if np.isfinite(single) else value) == value


def test_bundled_tokenizer_round_trip(tmp_path):
    _, _ = write(tmp_path / "m.gguf")
    ours = tokenizer_of(tmp_path / "m.gguf", tmp_path / "t")
    compare_tokenizers(ours, Tokenizer.load(ASSETS / "tiny"))
    messages = [{"role": "user", "content": "Tell me."}]
    assert ours.encode_chat(messages) == Tokenizer.load(ASSETS / "tiny").encode_chat(messages)
    generation = json.loads((tmp_path / "t" / "generation_config.json").read_text())
    official = json.loads((ASSETS / "tiny" / "generation_config.json").read_text())
    assert generation == {key: value for key, value in official.items() if key != "transformers_version"}
    reloaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    assert reloaded.encode(TEXTS[0]) == ours.encode(TEXTS[0])
    # Its folder again as a source: from vocab.json and merges.txt
    files = {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()}
    for copy, content in {"a": tokenizer_files(), "b": files}.items():
        write_gguf(tmp_path / copy, config_of("qwen3"), content, [])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_official_tokenizer_round_trip(tmp_path, data, name):
    folder = data / "tokenizers" / name
    config = config_of("qwen3", vocab_size=151936)
    write_gguf(tmp_path / "m.gguf", config, tokenizer_files(folder), [])
    official = Tokenizer.load(folder)
    compare_tokenizers(tokenizer_of(tmp_path / "m.gguf", tmp_path / "t"), official)


@pytest.mark.parametrize("name,content,match", [
    ("tokenizer.json", b"{}", "tokenizer.json"),
    ("tokenizer.json", b"[]", "not an object"),
    ("tokenizer.json", None, "has no tokenizer.json"),
    ("tokenizer_config.json", None, "tokenizer_config.json is missing"),
    ("tokenizer.json", (ASSETS / "tiny" / "tokenizer.json").read_bytes().replace(b"\\p{N}| ?", b"\\p{N}{1,3}| ?"), "not Qwen's"),
])  # fmt: skip
def test_damaged_tokenizer_files_are_not_written(tmp_path, name, content, match):
    files = {key: value for key, value in {**tokenizer_files(), name: content}.items() if value is not None}
    with pytest.raises(TokenizerError, match=match):
        write_gguf(tmp_path / "m.gguf", config_of("qwen3"), files, [])
    with pytest.raises(TokenizerError, match="4096 ids, the model embeds 4000"):
        write_gguf(tmp_path / "m.gguf", config_of("qwen3", vocab_size=4000), tokenizer_files(), [])
    assert not list(tmp_path.iterdir())


def test_llama_cpp_computes_the_same(tmp_path):
    """Logits of fp32 weights; llama.cpp keeps keys and values in fp16."""
    reason = "llama-cpp-python is not installed: it is built from source and no dependency of the tests"
    llama_cpp = pytest.importorskip("llama_cpp", reason=reason)
    for model_type in ARCHITECTURES:
        path = tmp_path / f"{model_type}.gguf"
        model, _ = write(path, model_type, "f32", rope_scaling=YARN)
        theirs = llama_cpp.Llama(str(path), logits_all=True, n_ctx=64, n_threads=1, verbose=False)
        assert theirs.tokenize(TEXTS[0].encode(), add_bos=False) == Tokenizer.load(ASSETS / "tiny").encode(TEXTS[0])
        ids = list(range(100, 130))
        theirs.eval(ids)
        expected, ours = torch.tensor(theirs.scores[: len(ids)]), model(torch.tensor([ids]))[0]
        assert (ours - expected).norm() < 2e-3 * expected.norm(), model_type


def test_what_llama_cpp_rounds_to_a_grid_is_read(tmp_path):
    """Its own files of IQ1 to IQ3. It rounds activations to 8 bits, so the logits differ: by as much as with Q2_K."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it is built from source")
    plain = tmp_path / "plain.gguf"
    write(plain, "qwen3", "f32", intermediate_size=512)
    widths = {tensor.name: int(tensor.shape[0]) for tensor in gguf.GGUFReader(plain).tensors}
    data = (llama_cpp.llama_model_imatrix_data * (len(widths) + 1))()  # what each column counts: all alike
    for entry, (name, width) in zip(data, widths.items(), strict=False):
        entry.name, entry.size, entry.data = name.encode(), width, (ctypes.c_float * width)(*[1.0] * width)
    seen, errors, ids = set(), {}, list(range(100, 130))
    for kind in ("Q2_K", *GRIDS):
        path = tmp_path / f"{kind}.gguf"
        how = llama_cpp.llama_model_quantize_default_params()
        called = {"IQ2_S": "IQ2_M"}.get(kind, kind)  # IQ2_S is a mixture without any
        how.ftype, how.pure, how.imatrix = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{called}"), True, data
        assert llama_cpp.llama_model_quantize(str(plain).encode(), str(path).encode(), ctypes.byref(how)) == 0
        with open_gguf(path) as checkpoint:
            seen |= set(checkpoint.kinds.values())
        theirs = llama_cpp.Llama(str(path), logits_all=True, n_ctx=64, n_threads=1, verbose=False)
        theirs.eval(ids)
        expected = torch.tensor(theirs.scores[: len(ids)])
        ours = load_model(path, dtype="float32", progress=False)(torch.tensor([ids]))[0]
        errors[kind] = (ours - expected).norm() / expected.norm()
    assert seen >= set(GRIDS)
    assert all(error < 2 * errors["Q2_K"] < 0.1 for error in errors.values())


def test_tokens_as_llama_cpp_types_them(tmp_path):
    """Control: whatever looks like <|...|>; user-defined: the other added tokens; unused: padding."""
    write(tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    tokens, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    by_type = {kind: [t for t, k in zip(tokens, types, strict=True) if k == kind] for kind in gguf.TokenType}
    assert len(by_type[gguf.TokenType.NORMAL]) == 4070
    assert len(by_type[gguf.TokenType.CONTROL]) == 20 and "<|fim_prefix|>" in by_type[gguf.TokenType.CONTROL]
    assert by_type[gguf.TokenType.USER_DEFINED] == ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
                                                    "<think>", "</think>"]  # fmt: skip
    assert by_type[gguf.TokenType.UNUSED] == [f"[PAD{i}]" for i in range(4096, 4113)]


@pytest.mark.parametrize("key,value,error", [
    ("tokenizer.ggml.model", "llama", TokenizerError),
    ("tokenizer.ggml.pre", "llama-bpe", TokenizerError),
    ("tokenizer.ggml.tokens", [], TokenizerError),
    ("tokenizer.ggml.token_type", [1, 1], TokenizerError),
    ("tokenizer.ggml.token_type", [6] * 4113, TokenizerError),
    ("tokenizer.ggml.merges", ["a b c"], TokenizerError),
    ("tokenizer.ggml.merges", ["a b\n"], TokenizerError),
    ("tokenizer.ggml.eos_token_id", 4113, TokenizerError),
    ("tokenizer.chat_template", "x" * (1 << 21), TokenizerError),
    ("general.architecture", "llama", ConfigError),
    ("qwen3.block_count", 5000, ConfigError),
    ("qwen3.block_count", "3", ConfigError),
    ("qwen3.attention.value_length", 32, ConfigError),
    ("qwen3.attention.sliding_window", 64, ConfigError),
    ("qwen3.rope.scaling.type", "longrope", ConfigError),
    ("qwen3.rope.scaling.attn_factor", 2.0, ConfigError),
    ("qwen3.attention.layer_norm_rms_epsilon", float("nan"), ConfigError),
])  # fmt: skip
def test_metadata_that_cannot_be_expressed_is_refused(tmp_path, key, value, error):
    write(tmp_path / "m.gguf")
    with open_gguf(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.config and checkpoint.tokenizer_files
    with open_gguf(tmp_path / "m.gguf") as checkpoint:
        checkpoint.files[0].metadata[key] = value
        with pytest.raises(error, match=re.escape(key.removeprefix("qwen3."))) as caught:
            _ = checkpoint.tokenizer_files if error is TokenizerError else checkpoint.config
        assert len(str(caught.value)) < 700


# ------------------------------------------------------------------------------------------------- writing


def test_kinds_of_a_preset():
    """As llama.cpp's Q4_K_M of 24 layers; what is not whole blocks falls back."""
    layer = "model.layers.{}.{}.weight"
    better = {i for i in range(24) if kind_for(layer.format(i, "mlp.down_proj"), (4, 512), "q4_k", 24) == "Q6_K"}
    assert better == {0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23}
    assert better == {i for i in range(24) if kind_for(layer.format(i, "self_attn.v_proj"), (4, 512), "q4_k", 24) == "Q6_K"}
    assert kind_for(layer.format(0, "self_attn.q_proj"), (4, 512), "q4_k", 24) == "Q4_K"
    assert kind_for(layer.format(3, "mlp.experts.down_proj"), (7, 4, 512), "q4_k", 24) == "Q4_K"
    assert kind_for(layer.format(0, "self_attn.q_proj"), (4, 96), "q4_k", 24) == "Q5_0"
    assert kind_for(layer.format(0, "mlp.down_proj"), (4, 96), "q4_k", 24) == "Q8_0"
    assert kind_for(layer.format(0, "mlp.down_proj"), (4, 40), "q4_k", 24) == "F16"
    assert kind_for("lm_head.weight", (4, 512), "q4_0", 24) == "Q6_K"
    assert kind_for("lm_head.weight", (4, 512), "q8_0", 24) == "Q8_0"
    for preset in PRESETS:
        for name in (layer.format(0, "mlp.gate"), layer.format(0, "mlp.shared_expert_gate")):
            assert kind_for(name, (4, 512), preset, 24) == "F32"
        assert kind_for("model.norm.weight", (512,), preset, 24) == "F32"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_transformers_runs_what_is_written(tmp_path, model_type, preset):
    """Its dequantised weights are ours, element for element; so are its logits."""
    model, config = write(tmp_path / "m.gguf", model_type, preset, tie_word_embeddings=model_type == "qwen3")
    filled = fill(model, tmp_path / "m.gguf")
    assert filled == model.checkpoint_tensors().keys()
    raw = dict(config)
    settings = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)  # it reads no size of heads or experts
    theirs = transformers.AutoModelForCausalLM.from_config(
        settings, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    read = load_gguf_checkpoint(tmp_path / "m.gguf", return_tensors=True, model_to_load=theirs)
    state = {name: tensor.float() for name, tensor in read["tensors"].items()}
    missing = theirs.load_state_dict(state, strict=False).missing_keys
    assert missing == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    ours = dict(model.named_parameters())
    named = dict(theirs.named_parameters())
    assert named.keys() == ours.keys()
    for name, parameter in named.items():
        assert torch.equal(parameter, ours[name]), name
    ids = torch.randint(0, 4096, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_transformers_reads_config_and_tokenizer(tmp_path):
    _, config = write(tmp_path / "m.gguf", rms_norm_eps=1e-5, rope_theta=50_000.0)
    read = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "max_position_embeddings", "vocab_size"):  # fmt: skip
        assert getattr(read, name) == config[name], name
    assert read.rms_norm_eps == pytest.approx(1e-5) and read.model_type == "qwen3"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    official = Tokenizer.load(ASSETS / "tiny")
    assert theirs.encode(TEXTS[0]) == official.encode(TEXTS[0])
    assert theirs.chat_template == official.chat_template


def test_written_tensors_are_read_by_the_library(tmp_path):
    model, _ = write(tmp_path / "m.gguf", "qwen2_moe", "q4_k")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert set(kinds.values()) == {"F32", "Q4_K", "Q6_K", "Q5_0", "Q8_0"}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.ffn_gate_inp_shexp.weight"].shape.tolist() == [256]
    stack = tensors["blk.1.ffn_up_exps.weight"]
    assert stack.shape.tolist() == [256, 96, 7]
    weights = model.checkpoint_tensors()
    dequantised = gguf.quants.dequantize(stack.data, stack.tensor_type)
    for e in range(7):
        weight = weights[f"model.layers.1.mlp.experts.{e}.up_proj.weight"]
        assert (torch.from_numpy(dequantised[e]) - weight).norm() < 0.08 * weight.norm()
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)


def test_one_tensor_at_a_time_and_nothing_left_behind(tmp_path):
    model, config = write(tmp_path / "m.gguf")
    todo = sources(model, config, "q8_0")
    before = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(CheckpointError, match="exists; nothing is overwritten"):
        write_gguf(tmp_path / "m.gguf", config, tokenizer_files(), todo)
    assert (tmp_path / "m.gguf").read_bytes() == before

    def poisoned() -> torch.Tensor:
        return torch.full(todo[1].shape, torch.nan)

    for bad, match in (
        (todo[1]._replace(make=poisoned), "NaN, infinite"),
        (todo[1]._replace(make=lambda: torch.zeros(2, 3)), "float32 \\[2, 3\\], not floats"),
        (todo[1]._replace(make=lambda: torch.zeros(todo[1].shape, dtype=torch.int8)), "int8"),
        (todo[1]._replace(name="model.layers.0.rotary"), "has no name"),
        (todo[0], "stands twice"),
        (todo[1]._replace(kind="Q3_K"), "cannot be written as Q3_K"),
    ):
        with pytest.raises(CheckpointError, match=match):
            write_gguf(tmp_path / "bad.gguf", config, tokenizer_files(), [todo[0], bad])
        assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]

    alive: list[Any] = []

    def counted(source: Source) -> Source:
        def make() -> torch.Tensor:
            assert not any(ref() is not None for ref in alive), "a tensor before it is still in memory"
            tensor = torch.zeros(source.shape)
            alive.append(weakref.ref(tensor))
            return tensor

        return source._replace(make=make)

    write_gguf(tmp_path / "zeros.gguf", config, tokenizer_files(), map(counted, todo))
    assert len(alive) == len(todo)


def test_presets_and_stacks_that_do_not_exist():
    with pytest.raises(CheckpointError, match="gguf:q3_k is not one of gguf:f32"):
        plan({}, config_of("qwen3"), "q3_k")
    shapes = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": (4, 8) for i in (0, 2)}
    with pytest.raises(CheckpointError, match="not numbered from 0"):
        plan(shapes, config_of("qwen3_moe"), "f16")
