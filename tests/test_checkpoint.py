"""Loading and saving: the safetensors library and transformers are the oracles, and every kind of damage is named."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TINY, make_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qwen_ref as qr
from qwen_ref.checkpoint import INDEX, load_weights, read_index, save_model
from qwen_ref.errors import CheckpointError, ConfigError, QwenRefError
from qwen_ref.loading import build, load_model, materialize, read_config
from qwen_ref.safetensors_file import DTYPES, SafetensorsFile, write_safetensors
from qwen_ref.strict_json import read_json

IDS = torch.randint(0, 211, (2, 9), generator=torch.Generator().manual_seed(5))


def read_back(folder: Path, dtype=torch.float32):
    """A folder's model without its tokenizer, and the report."""
    model = build(read_config(folder))
    materialize(model.to(dtype), torch.device("cpu"))
    for p in model.parameters():
        p.fill_(torch.nan)  # poisoned: what loading forgets would show
    return model, load_weights(model, folder, progress=False)


@pytest.fixture
def saved(tmp_path):
    """A saved qwen3_moe, its weights as a dict, and a function that writes a changed dict in its place."""
    model, _ = make_pair(TINY["qwen3_moe"][1])
    model.save(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"

    def rewrite(change):
        weights = load_file(path)
        change(weights)
        save_file({k: v.contiguous() for k, v in weights.items()}, path)
        return tmp_path / "m"

    return model, rewrite, tmp_path / "m"


# ------------------------------------------------------------------------------------------------- round trips


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, _ = make_pair(TINY["qwen3"][1])
    model.save("~/m")
    assert (tmp_path / "m" / "config.json").is_file() and [p.name for p in tmp_path.iterdir()] == ["m"]
    with pytest.raises(CheckpointError, match="cannot write"):
        model.save("~/" + "x" * 300)


def test_saving_keeps_the_tokens_that_only_config_json_names(tmp_path):
    model, _ = make_pair(TINY["qwen3"][1])
    model.raw_config = {"eos_token_id": [7, 9], "pad_token_id": 3}
    model.save(tmp_path / "m")
    again, _ = read_back(tmp_path / "m")
    assert (again.raw_config["eos_token_id"], again.raw_config["pad_token_id"]) == ([7, 9], 3)
    assert "bos_token_id" not in again.raw_config


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("tie", [False, True])
def test_what_we_save_transformers_loads_and_back(name, tie, tmp_path):
    config = {**TINY[name][1], "tie_word_embeddings": tie}
    model, _ = make_pair(config)
    model.save(tmp_path / "ours")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True, attn_implementation="eager",
        experts_implementation="eager")  # fmt: skip
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        expected = model(IDS)
        atol = 1e-4 if "linear_num_key_heads" in config else 1e-5  # of logits to 10: see test_parity.test_fp32
        torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-5, atol=atol)
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
        assert (tmp_path / "theirs" / INDEX).exists()
        for folder in ("ours", "theirs"):
            again, report = read_back(tmp_path / folder)
            assert torch.equal(again(IDS), expected)
            assert report.problems() == "" and report.bytes > 0


def test_stacked_experts_load_too(saved):
    """Other tools write one tensor per projection of all experts; half a file stacked and half not is fine."""
    model, rewrite, _ = saved

    def stack(weights):
        for layer in (0,):
            prefix = f"model.layers.{layer}.mlp.experts"
            for name in [n for n in weights if n.startswith(prefix)]:
                del weights[name]
            weights[f"{prefix}.gate_up_proj"] = model.model.layers[layer].mlp.experts.gate_up_proj
            weights[f"{prefix}.down_proj"] = model.model.layers[layer].mlp.experts.down_proj

    again, _ = read_back(rewrite(stack))
    assert torch.equal(again(IDS), model(IDS))

    def both(weights):
        weights["model.layers.0.mlp.experts.2.up_proj.weight"] = torch.zeros(36, 48)

    with pytest.raises(CheckpointError, match=r"duplicate.*experts\.2\.up_proj"):
        read_back(rewrite(both))


def test_our_file_is_a_safetensors_file(tmp_path):
    """Every dtype, odd shapes, a scalar, an empty tensor, a strided view: written by us, read by the library, and back."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        code: torch.randint(0, 2, (3, 5), generator=g).to(dtype) for code, dtype in DTYPES.items() if code != "F8_E8M0"
    }
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 7), "strided": torch.randn(6, 4, generator=g).T[::2]}
    path = tmp_path / "x.safetensors"
    write_safetensors(path, tensors)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors) and file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name).float(), tensor.float()), name
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    with SafetensorsFile(path) as ours:
        for name, tensor in tensors.items():
            out = ours.read(name)
            assert out.dtype == tensor.dtype and torch.equal(out.float(), tensor.float()), name
            strided = torch.empty(*tensor.shape, 2, dtype=tensor.dtype)[..., 0]
            ours.read_into(name, strided)
            assert torch.equal(strided.float(), tensor.float())


@pytest.mark.parametrize("disk", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory", [torch.float32, torch.bfloat16])
def test_dtypes_are_converted(disk, memory, tmp_path):
    model, _ = make_pair(TINY["qwen2"][1])
    model.to(disk).save(tmp_path / "m")
    again, _ = read_back(tmp_path / "m", memory)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p.to(memory), q), name


def test_peak_memory_is_the_model_and_one_block(tmp_path):
    """fp32 on disk, bf16 in memory: 516 MB on disk, 258 MB of model; a second copy of the largest tensor would be 105 MB."""
    model = build({**TINY["qwen3"][1], "hidden_size": 1024, "vocab_size": 25600, "intermediate_size": 8192})
    materialize(model, torch.device("cpu"))
    for p in model.parameters():
        p.fill_(0.5)
    model.save(tmp_path / "m")
    code = (
        "import sys, torch; from pathlib import Path; from qwen_ref.loading import *; import tqdm; torch.ones(9).bfloat16()\n"
        "from qwen_ref.checkpoint import load_weights\n"
        "def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024\n"
        "folder = Path(sys.argv[1]); m = build(read_config(folder)); before = peak()\n"
        "materialize(m.bfloat16(), torch.device('cpu')); load_weights(m, folder, progress=False)\n"
        "print(peak() - before, sum(p.nbytes for p in m.parameters()))"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, check=True)
    peak, size = map(int, out.stdout.split())
    assert peak <= size + 60e6, (peak, size)  # a block of 17 MB, and code and arenas that loading pages in


def test_save_is_all_or_nothing(saved, monkeypatch, tmp_path):
    model, _, folder = saved
    with pytest.raises(CheckpointError, match="not empty"):
        model.save(folder)
    import qwen_ref.checkpoint as checkpoint

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    with pytest.raises(CheckpointError, match="No space left"):
        model.save(tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_save_shards(saved, tmp_path):
    model, _, _ = saved
    save_model(model, model.config.to_json(), tmp_path / "s", max_shard_bytes=100_000)
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 3
    assert torch.equal(read_back(tmp_path / "s")[0](IDS), model(IDS))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.float32)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-4, atol=1e-4)


def test_saved_bundled_model_keeps_tokenizer_and_generation_files(tmp_path):
    model, tokenizer = qr.load("tiny")
    model.save(tmp_path / "copy")
    again, again_tokenizer = qr.load(tmp_path / "copy")
    assert again_tokenizer.encode_chat([{"role": "user", "content": "Hi"}]) == tokenizer.encode_chat(
        [{"role": "user", "content": "Hi"}])  # fmt: skip
    assert again.generation_config == model.generation_config and again.dtype == torch.bfloat16
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert theirs("Once upon a time")["input_ids"] == tokenizer.encode("Once upon a time")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model, _ = make_pair(TINY["qwen3"][1])  # 211 ids
    model.extra_files = {name: (qr.loading.ASSETS / "tiny" / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    model.save(tmp_path / "m")
    with pytest.raises(CheckpointError, match="4096 ids.*211.*different models"):
        qr.load(tmp_path / "m")


# ------------------------------------------------------------------------------------------------- the strict report


REPORT = {
    "missing": (lambda w: w.pop("model.norm.weight"), "missing.*model.norm.weight"),
    "missing expert": (lambda w: w.pop("model.layers.0.mlp.experts.4.up_proj.weight"), r"missing.*experts\.4\.up_proj"),
    "missing head": (lambda w: w.pop("lm_head.weight"), "tie_word_embeddings"),
    "unexpected": (lambda w: w.update({"model.extra.weight": torch.zeros(3)}), "unexpected.*model.extra.weight"),
    "wrong shape": (lambda w: w.update({"model.norm.weight": torch.zeros(47)}), r"wrong shape.*\[47\].*\[48\]"),
    "transposed": (lambda w: w.update({"lm_head.weight": torch.zeros(48, 211)}), "wrong shape.*lm_head"),
    "scalar": (lambda w: w.update({"model.norm.weight": torch.tensor(1.0)}), r"wrong shape.*\[\]"),
    "wrong dtype": (lambda w: w.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}), "wrong dtype.*int8.*\n.*quantised"),
    "fp8": (lambda w: w.update({"model.norm.weight": torch.zeros(48).to(torch.float8_e4m3fn)}), "wrong dtype.*float8"),
    "base names twice": (lambda w: w.update({"norm.weight": torch.zeros(48)}), "duplicate.*model.norm.weight"),
}


@pytest.mark.parametrize("case", REPORT)
def test_every_misfit_is_named_before_a_weight_is_read(case, saved, monkeypatch):
    _, rewrite, _ = saved
    change, match = REPORT[case]
    folder = rewrite(change)
    for method in ("read_into", "view"):
        monkeypatch.setattr(SafetensorsFile, method, lambda *a: pytest.fail("a weight was read"))
    monkeypatch.setattr(qr.loading, "materialize", lambda *a: pytest.fail("memory was taken"))
    with pytest.raises(CheckpointError, match=f"(?s){match}"):
        load_model(folder)


def test_tied_head(tmp_path):
    model, _ = make_pair({**TINY["qwen3"][1], "tie_word_embeddings": True})
    model.save(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    assert "lm_head.weight" not in weights
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path)
    again, report = read_back(tmp_path / "m")
    assert report.tied == ["lm_head.weight"] and torch.equal(again(IDS), model(IDS))
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1e-3}, path)
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        read_back(tmp_path / "m")


def test_finite_scan_is_opt_in(saved):
    _, rewrite, _ = saved
    folder = rewrite(lambda w: w["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 4), torch.nan))
    model, _ = read_back(folder)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        load_weights(model, folder, progress=False, check_finite=True)


# ------------------------------------------------------------------------------------------------- index


def write_index(folder: Path, index) -> Path:
    (folder / INDEX).write_text(json.dumps(index) if not isinstance(index, str) else index)
    return folder


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "..",
                                   ".safetensors", "x.bin", 7, None, ["x.safetensors"], "x.safetensors\n", ""])  # fmt: skip
def test_index_names_files_beside_it_only(saved, shard):
    folder = saved[2]
    with pytest.raises(CheckpointError, match="not the name of a safetensors file"):
        read_index(write_index(folder, {"weight_map": {"model.norm.weight": shard}}) / INDEX)


def test_index_and_shards_must_agree(saved):
    _, _, folder = saved
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in halves.items():
        save_file({n: weights[n].contiguous() for n in part}, folder / shard)
    good = {n: shard for shard, part in halves.items() for n in part}
    model, report = read_back(write_index(folder, {"metadata": {"total_size": 5}, "weight_map": good}))
    assert torch.equal(model(IDS), saved[0](IDS)) and "total_size" in report.notes[0]
    moved = {**good, names[0]: "b.safetensors"}
    with pytest.raises(CheckpointError, match="where the index puts it"):
        read_back(write_index(folder, {"weight_map": moved}))
    save_file({names[0]: weights[names[0]].contiguous(), **{n: weights[n].contiguous() for n in names[1::2]}}, folder / "b.safetensors")
    with pytest.raises(CheckpointError, match="duplicate"):
        read_back(write_index(folder, {"weight_map": good}))
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors: No such file"):
        read_back(write_index(folder, {"weight_map": good}))


def test_index_damage(saved):
    folder = saved[2]
    for index, match in (("{", "not valid JSON"), ({}, "no weight_map"), ({"weight_map": []}, "no weight_map"),
                         ({"weight_map": {f"t{i}": "a.safetensors" for i in range(1_000_001)}}, "1,000,001 tensors"),
                         ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "stands twice")):  # fmt: skip
        with pytest.raises(CheckpointError, match=match):
            read_index(write_index(folder, index) / INDEX)


# ------------------------------------------------------------------------------------------------- damaged files


def make(path: Path, header, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


DAMAGE = {
    "empty file": (lambda p: p.write_bytes(b""), "empty"),
    "seven bytes": (lambda p: p.write_bytes(b"1234567"), "only 7 bytes"),
    "length over file": (lambda p: make(p, {}, length=99), "truncated"),
    "length over cap": (lambda p: make(p, {}, length=100_000_001), "over 100,000,000"),
    "length 2^63": (lambda p: make(p, {}, length=1 << 63), "over 100,000,000"),
    "not utf-8": (lambda p: make(p, b'{"\xff": 1}'), "not UTF-8"),
    "not json": (lambda p: make(p, b"{,}"), "not valid JSON"),
    "not an object": (lambda p: make(p, []), "not a JSON object"),
    "deep": (lambda p: make(p, b"[" * 100_000 + b"]" * 100_000), "nested deeper"),
    "duplicate keys": (lambda p: make(p, b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": 1}', b"x"), "'a' stands twice"),
    "nan": (lambda p: make(p, b'{"a": NaN}'), "not finite"),
    "overlap": (lambda p: make(p, {"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "overlaps"),
    "hole": (lambda p: make(p, {"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "hole"),
    "starts late": (lambda p: make(p, {"a": entry(offsets=(4, 12))}, bytes(12)), "hole"),
    "truncated data": (lambda p: make(p, {"a": entry()}, bytes(7)), "truncated"),
    "extra data": (lambda p: make(p, {"a": entry()}, bytes(9)), "end at byte"),
    "reversed": (lambda p: make(p, {"a": entry(offsets=(8, 0))}, bytes(8)), "does not fit"),
    "negative offset": (lambda p: make(p, {"a": entry(offsets=(-8, 0))}, bytes(8)), "data_offsets"),
    "float offset": (lambda p: make(p, {"a": entry(offsets=(0, 8.0))}, bytes(8)), "data_offsets"),
    "bool offset": (lambda p: make(p, {"a": entry("U8", (1,), (False, True))}, bytes(1)), "data_offsets"),
    "negative dim": (lambda p: make(p, {"a": entry(shape=(-2, -1))}, bytes(8)), "not a list of sizes"),
    "bool dim": (lambda p: make(p, {"a": entry(shape=(True, 2))}, bytes(8)), "not a list of sizes"),
    "float dim": (lambda p: make(p, {"a": entry(shape=(2.0,))}, bytes(8)), "not a list of sizes"),
    "product overflow": (lambda p: make(p, {"a": entry(shape=(1 << 62, 1 << 62, 4))}, bytes(8)), "does not fit"),
    "huge dim": (lambda p: make(p, {"a": entry(shape=(1 << 70, 0), offsets=(0, 0))}), "not a list of sizes"),
    "unknown dtype": (lambda p: make(p, {"a": entry("F33")}, bytes(8)), "unknown dtype 'F33'"),
    "dtype not text": (lambda p: make(p, {"a": entry(["F32"])}, bytes(8)), "unknown dtype"),
    "missing field": (lambda p: make(p, {"a": {"dtype": "F32"}}), "lacks"),
    "metadata": (lambda p: make(p, {"__metadata__": {"a": 1}}), "__metadata__"),
    "lfs": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "Git LFS"),
    "html": (lambda p: p.write_text("<!DOCTYPE html><html></html>"), "HTML"),
    "pickle": (lambda p: torch.save({"a": torch.zeros(2)}, p), "never pickles"),
    "gguf": (lambda p: p.write_bytes(b"GGUF" + bytes(60)), "GGUF"),
    "directory": (lambda p: p.mkdir(), "not a regular file"),
    "fifo": (lambda p: os.mkfifo(p), "not a regular file"),
    "dangling link": (lambda p: p.symlink_to("nowhere"), "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_clear_error(case, tmp_path):
    write, match = DAMAGE[case]
    path = tmp_path / "model.safetensors"
    write(path)
    with pytest.raises(CheckpointError, match=match) as caught:
        SafetensorsFile(path)
    assert "model.safetensors" in str(caught.value) and len(str(caught.value)) < 600


def test_a_file_that_shrinks_after_opening(tmp_path):
    path = make(tmp_path / "a.safetensors", {"a": entry(shape=(1000,), offsets=(0, 4000))}, bytes(4000))
    with SafetensorsFile(path) as file:
        os.truncate(path, 2000)
        with pytest.raises(CheckpointError, match="shrunk"):
            file.read("a")


header_json = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 65) | st.floats() | st.sampled_from(["F32", "BF16", "U8", "x"]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(
        st.sampled_from(["a", "b", "dtype", "shape", "data_offsets", "__metadata__"]), x, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(header=header_json, size=st.integers(0, 40), cut=st.integers(0, 12))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_header_is_read_as_the_library_reads_it_or_refused(tmp_path, header, size, cut):
    raw = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    whole = struct.pack("<Q", len(raw)) + raw + bytes(size)
    path.write_bytes(whole[: len(whole) - cut])
    compare_with_library(path)


@given(st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutations_of_a_good_file(tmp_path, data):
    good = make(tmp_path / "y.safetensors", {"a": entry(), "bc": entry("BF16", (3, 2), (8, 20))}, bytes(range(20))).read_bytes()
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(raw))
    compare_with_library(path)


def compare_with_library(path: Path) -> None:
    """Whatever we accept the library accepts, with equal tensors. (We refuse more: duplicate keys, odd numbers.)"""
    try:
        with SafetensorsFile(path) as file:
            ours = {name: file.read(name) for name in file.tensors}
    except CheckpointError:
        return
    theirs = load_file(path)
    assert ours.keys() == theirs.keys()
    assert all((ours[n].dtype == theirs[n].dtype and ours[n].equal(theirs[n])) or ours[n].isnan().any() for n in ours)


def test_guards_hold_without_asserts(tmp_path):
    path = make(tmp_path / "model.safetensors", {"a": entry()}, bytes(7))
    code = (
        "import sys; from pathlib import Path; from qwen_ref.checkpoint import *\n"
        "try: SafetensorsFile(Path(sys.argv[1]))\n"
        "except CheckpointError as e: print('refused')"
    )
    out = subprocess.run([sys.executable, "-O", "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert out.stdout == "refused\n"


# ------------------------------------------------------------------------------------------------- JSON and folders


@pytest.mark.parametrize("content,match", [
    (b"", "not valid JSON"), (b"[]", "not a JSON object"), (b'{"a": 1e999}', "not finite"), (b'{"a": Infinity}', "not finite"),
    (b'{"a": -NaN}', "not valid JSON"), (b'\xef\xbb\xbf{"a": 1}', "byte order mark"), (b'{"a": 1, "a": 2}', "stands twice"),
    (b'{"a": ' + b"[" * 50 + b"]" * 50 + b"}", "nested deeper"), (b'{"a": ' + b"[" * 200_000, "nested deeper|not valid"),
    (b" " * (1 << 20) + b"{}", "at most 1,048,576"), (b'{"a": "\xff"}', "not UTF-8"), (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
])  # fmt: skip
def test_config_json_damage(tmp_path, content, match):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=match):
        read_json(tmp_path / "config.json", ConfigError)


def test_folders_that_are_no_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        qr.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY["qwen3"][1]))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickle, which is never read"):
        qr.load(tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="several safetensors files"):
        qr.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY["qwen3"][1], "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(QwenRefError, match="several|awq"):
        qr.load(tmp_path)
