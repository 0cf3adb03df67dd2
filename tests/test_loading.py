"""`load_model`: weights that stay in the mapped file, what the report says, and headless files."""

from __future__ import annotations

import copy
import hashlib
import json
import mmap
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TINY, make_pair
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qwen_ref as qr
from qwen_ref.checkpoint import INDEX, Checkpoint, save_model
from qwen_ref.errors import CheckpointError, ConfigError, RequestError
from qwen_ref.loading import build, load_model, materialize, read_config
from qwen_ref.safetensors_file import SafetensorsFile

IDS = torch.randint(0, 211, (2, 9), generator=torch.Generator().manual_seed(5))


def saved(folder: Path, kind: str = "qwen3", **changes):
    """A random fp32 model, written to `folder`."""
    model, _ = make_pair({**TINY[kind][1], **changes})
    model.save(folder)
    return model


def same_logits(a: torch.Tensor, b: torch.Tensor) -> None:
    """Not bit by bit: matrix libraries choose their loops by a weight's alignment, which is the file's when mapped."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------- mapped weights


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_mapped_weights_are_the_read_ones(kind, tie, shards, tmp_path):
    model, _ = make_pair({**TINY[kind][1], "tie_word_embeddings": tie})
    config = {**model.config.to_json(), "dtype": "float32"}
    save_model(model, config, tmp_path / "m", max_shard_bytes=50_000 if shards else 1 << 40)
    assert (tmp_path / "m" / INDEX).exists() == shards
    mapped, read = (load_model(tmp_path / "m", device="cpu", mapped=choice) for choice in (True, False))
    assert read.load_report.mapped == 0 and read.load_report.bytes == mapped.load_report.bytes
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)  # stacked from parts: read
    assert mapped.load_report.mapped == sum(p.nbytes for p in model.parameters()) - experts > 0
    for name, tensor in model.checkpoint_tensors().items():
        assert torch.equal(mapped.checkpoint_tensors()[name], tensor) and torch.equal(read.checkpoint_tensors()[name], tensor)
    assert not any(p.requires_grad for p in mapped.parameters())
    assert (mapped.lm_head.weight is mapped.model.embed_tokens.weight) == tie
    same_logits(mapped(IDS), model(IDS))


def test_a_write_to_a_mapped_weight_does_not_reach_the_file(tmp_path):
    saved(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    before, first, second = digest(path), load_model(tmp_path / "m", device="cpu"), load_model(tmp_path / "m", device="cpu")
    for p in first.parameters():
        p.fill_(3.0)
    assert all(bool((p == 3).all()) for p in first.parameters())
    assert not any(bool((p == 3).all()) for p in second.parameters()) and digest(path) == before


def test_a_mapped_model_can_be_copied_pickled_cast_and_saved(tmp_path):
    model = saved(tmp_path / "m", tie_word_embeddings=True)
    mapped, expected = load_model(tmp_path / "m", device="cpu"), model(IDS)
    size = sum(p.nbytes for p in model.parameters())
    assert mapped.load_report.mapped == size
    mapped.save(tmp_path / "copy")
    pickled = pickle.dumps(mapped)
    assert len(pickled) < 1.5 * size, "more than the parameters was pickled"
    clones = [copy.deepcopy(mapped), pickle.loads(pickled), load_model(tmp_path / "copy", device="cpu")]
    for p in mapped.parameters():
        p.zero_()  # none of the clones shares its memory
    for clone in clones:
        same_logits(clone(IDS), expected)
        assert clone.lm_head.weight is clone.model.embed_tokens.weight
    half = load_model(tmp_path / "m", device="cpu").to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    for name, p in model.named_parameters():
        assert torch.equal(half.get_parameter(name), p.to(torch.bfloat16)), name


def test_the_file_may_be_replaced_by_rename(tmp_path):
    model = saved(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    mapped = load_model(tmp_path / "m", device="cpu")
    (tmp_path / "new").write_bytes(b"another version")
    os.replace(tmp_path / "new", path)
    same_logits(mapped(IDS), model(IDS))


def test_what_does_not_fit_is_read(tmp_path):
    """Another dtype, and a tensor that begins between two items; the rest of the file is still mapped."""
    model = saved(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    norm = "model.norm.weight"
    weights = load_file(path)
    save_file({**weights, norm: weights[norm].double()}, path)
    loaded = load_model(tmp_path / "m", device="cpu", dtype="float32")
    assert loaded.load_report.mapped == loaded.load_report.bytes - 2 * model.get_parameter(norm).nbytes
    assert load_model(tmp_path / "m", device="cpu", dtype="bfloat16").load_report.mapped == 0
    same_logits(loaded(IDS), model(IDS))

    save_file(weights, path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    shifted = load_model(tmp_path / "m", device="cpu")
    assert shifted.load_report.mapped == 0
    same_logits(shifted(IDS), model(IDS))


def test_stacked_experts_on_disk_are_mapped_whole(tmp_path):
    model = saved(tmp_path / "m", "qwen3_moe")
    path = tmp_path / "m" / "model.safetensors"
    weights = {name: w for name, w in load_file(path).items() if ".experts." not in name}
    stacked = {name: p.data.clone() for name, p in model.named_parameters() if ".experts." in name}
    save_file(weights | stacked, path)
    loaded = load_model(tmp_path / "m", device="cpu")
    assert stacked and loaded.load_report.mapped == loaded.load_report.bytes
    same_logits(loaded(IDS), model(IDS))


def test_what_we_write_begins_at_a_cache_line(tmp_path):
    for kind in ("qwen3", "qwen2_moe"):
        saved(tmp_path / kind, kind)
        with SafetensorsFile(tmp_path / kind / "model.safetensors") as file:
            assert min(info.start for info in file.tensors.values()) % 64 == 0


def test_empty_and_scalar_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"empty": torch.empty(0, 7), "scalar": torch.tensor(3.5)}, path)
    with SafetensorsFile(path) as file:
        assert file.view("empty") is None and file.view("scalar").shape == () and file.view("scalar") == 3.5


def test_a_system_that_cannot_map_reads(tmp_path, monkeypatch):
    model = saved(tmp_path / "m")

    def refuse(*args, **options):
        raise OSError(19, "No such device")

    monkeypatch.setattr(qr.safetensors_file.mmap, "mmap", refuse)
    monkeypatch.setattr(qr.loading, "empty", lambda shape, dtype, device: torch.empty(shape, dtype=dtype))
    loaded = load_model(tmp_path / "m", device="cpu")
    assert loaded.load_report.mapped == 0
    same_logits(loaded(IDS), model(IDS))


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_systems_without_advice_map_too(platform, tmp_path, monkeypatch):
    model = saved(tmp_path / "m")
    monkeypatch.setattr(qr.safetensors_file.sys, "platform", platform)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(qr.safetensors_file, "_POPULATE_READ", None)  # passing it on would be a TypeError
    loaded = load_model(tmp_path / "m", device="cpu")
    assert loaded.load_report.mapped == loaded.load_report.bytes
    same_logits(loaded(IDS), model(IDS))


def test_a_kernel_that_does_not_know_the_advice(tmp_path, monkeypatch):
    model = saved(tmp_path / "m")
    monkeypatch.setattr(qr.safetensors_file, "_POPULATE_READ", 9999)  # EINVAL
    same_logits(load_model(tmp_path / "m", device="cpu")(IDS), model(IDS))


# In child processes: where the guard fails, the process ends by SIGBUS.
SHRINKING = """
import os, sys
from pathlib import Path
from qwen_ref import checkpoint as c, loading
folder = Path(sys.argv[1])
path, cut = folder / "model.safetensors", lambda: os.truncate(path, os.path.getsize(path) // 3)
def cut_before(function):
    def both(*args, **options):
        cut()
        return function(*args, **options)
    return both
target = {"views": (c.Checkpoint, "views"), "read": (c.Checkpoint, "read")}[sys.argv[2]]
setattr(*target, cut_before(getattr(*target)))
try:
    model = loading.load_model(folder, device="cpu", mapped=sys.argv[3] == "mapped")
    print("loaded", sum(float(p.sum()) for p in model.parameters()))
except c.CheckpointError as error:
    print("refused:", error)
"""


# views: after the headers were checked; read: after the file was mapped, where it is
@pytest.mark.parametrize("how,moment", [("mapped", "views"), ("mapped", "read"), ("copied", "read")])
def test_a_file_that_shrinks_while_it_is_loaded(moment, how, tmp_path):
    if sys.platform != "linux" and how == "mapped" and moment == "read":
        pytest.skip("only Linux can ask for mapped pages and be told that they are gone")
    saved(tmp_path / "m")
    out = subprocess.run(
        [sys.executable, "-c", SHRINKING, str(tmp_path / "m"), moment, how], capture_output=True, text=True, timeout=300)  # fmt: skip
    assert out.returncode == 0 and out.stdout.startswith("refused:"), (out.returncode, out.stdout, out.stderr)
    assert "model.safetensors" in out.stdout and ("shrunk" in out.stdout or "being written" in out.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapping_takes_no_memory_of_its_own(tmp_path):
    """A model of 110 MB: its pages are the file's, and nothing is allocated beside them."""
    model = build({**TINY["qwen3"][1], "hidden_size": 512, "vocab_size": 25600, "intermediate_size": 2048})
    materialize(model, torch.device("cpu"))
    for p in model.parameters():
        p.fill_(0.5)
    model.save(tmp_path / "m")
    code = (
        "import sys; from pathlib import Path; from qwen_ref.loading import *; import tqdm\n"
        "def own(): return int(next(l for l in open('/proc/self/status') if l.startswith(sys.argv[2])).split()[1]) * 1024\n"
        "build(read_config(Path(sys.argv[1]))); before = own()\n"
        "m = load_model(Path(sys.argv[1]), device='cpu', progress=False)\n"
        "print(own() - before, sum(p.nbytes for p in m.parameters()))"
    )
    for field, share in (("RssAnon", 0.2), ("VmData", 1.2)):  # touched; promised: a private mapping counts once
        out = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "m"), field], capture_output=True, text=True, check=True)  # fmt: skip
        own, size = map(int, out.stdout.split())
        assert size > 100e6 and own < share * size, (field, own, size)


def test_building_leaves_out_initial_values_only(tmp_path):
    """Initial values on the meta device import hundreds of modules, seconds of a first load."""
    code = (
        "import sys; from qwen_ref.loading import build; from qwen_ref.models import qwen3\n"
        "m = build(qwen3.TINY); print('sympy' in sys.modules, {p.device.type for p in m.parameters()}, len(list(m.parameters())))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    whole, _ = make_pair(TINY["qwen3"][1])
    assert out == ["False", "{'meta'}", str(len(list(whole.parameters())))]
    assert bool(torch.nn.init.ones_(torch.zeros(2)).all()), "initial values stay switched off"


# ------------------------------------------------------------------------------------------------- the report


def test_the_report_is_on_the_model(tmp_path):
    model = saved(tmp_path / "m")
    assert model.load_report is None
    report = load_model(tmp_path / "m", device="cpu").load_report
    assert Counter(report.loaded) == Counter(load_file(tmp_path / "m" / "model.safetensors").keys())
    assert report.dtypes == {"float32": len(report.loaded)} and report.notes == [] and report.seconds > 0
    assert qr.load("tiny", device="cpu")[0].load_report.mapped > 7_000_000


def test_a_dtype_other_than_the_config_names_is_noted(tmp_path):
    saved(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for claim, notes in (({"dtype": "bfloat16"}, ["config.json says bfloat16, 36 tensors are float32"]),
                         ({"torch_dtype": "torch.bfloat16"}, ["config.json says bfloat16, 36 tensors are float32"]),
                         ({"dtype": "float32"}, []), ({}, [])):  # fmt: skip
        kept = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
        (tmp_path / "m" / "config.json").write_text(json.dumps(kept | claim))
        report = load_model(tmp_path / "m", device="cpu").load_report
        assert report.notes == [note.replace("36", str(len(report.loaded))) for note in notes]


def test_a_tied_copy_is_compared_not_loaded(tmp_path):
    saved(tmp_path / "m", tie_word_embeddings=True)
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path)
    report = load_model(tmp_path / "m", device="cpu").load_report
    assert report.tied == ["lm_head.weight"] and "lm_head.weight" not in report.loaded
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1e-3}, path)
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        load_model(tmp_path / "m", device="cpu")


# ------------------------------------------------------------------------------------------------- headless files


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "qwen3_moe"])
def test_a_model_without_head_is_saved_as_embedding_checkpoints_are(kind, tmp_path):
    model, _ = make_pair(TINY[kind][1])
    model.lm_head = None
    expected = model.model(IDS)
    model.save(tmp_path / "a")
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "embed_tokens.weight" in names and not any(name.startswith(("model.", "lm_head")) for name in names)

    again = load_model(tmp_path / "a", device="cpu")
    assert again.lm_head is None
    with pytest.raises(RequestError, match="without an output head, so there are no logits: use qwen_ref.embed"):
        again(IDS)
    same_logits(again.model(IDS), expected)
    again.save(tmp_path / "b")
    assert digest(tmp_path / "a" / "model.safetensors") == digest(tmp_path / "b" / "model.safetensors")

    theirs, info = transformers.AutoModel.from_pretrained(tmp_path / "b", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_every_open_file_is_closed_again(tmp_path):
    """Also those before a damaged shard."""
    model, _ = make_pair(TINY["qwen3"][1])
    save_model(model, model.config.to_json(), tmp_path / "m", max_shard_bytes=50_000)
    last = sorted((tmp_path / "m").glob("*.safetensors"))[-1]
    last.write_bytes(b"")
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    kept = []  # the exceptions hold the frames, so nothing is closed by the collector
    for _ in range(3):
        with pytest.raises(CheckpointError, match="empty") as caught:
            Checkpoint(tmp_path / "m")
        kept.append(caught)
    assert sys.platform != "linux" or len(os.listdir("/proc/self/fd")) == before
    assert read_config(tmp_path / "m")["model_type"] == "qwen3"


def test_a_dtype_or_device_no_model_runs_in():
    for dtype in (torch.int8, torch.complex64, "int3"):
        with pytest.raises(ConfigError, match="is not one of bfloat16"):
            qr.load("tiny", dtype=dtype)
    for device in ("foo", "cuda:99", 1.5):
        with pytest.raises(RequestError, match="cannot be used here"):
            qr.load("tiny", device=device)


@pytest.mark.parametrize("name", ["", None, 5, b"tiny"])
def test_what_names_no_model_is_refused(name):
    with pytest.raises(CheckpointError, match="name a bundled one"):
        qr.load(name)
