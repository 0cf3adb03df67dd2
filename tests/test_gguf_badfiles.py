"""Damaged and hostile GGUF files: bounded time and memory, short messages, one kind of error."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pair
from quantised import HYBRIDS

from qwen_ref.errors import CheckpointError
from qwen_ref.quant.gguf import GgufFile, open_gguf
from qwen_ref.quant.gguf_write import Source, plan, stored, write_gguf

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
NORM = "blk.0.attn_norm.weight"


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def info(name: str | bytes = NORM, shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def make(pairs: list[bytes] = [], infos: list[bytes] | None = None, data: bytes = bytes(32), *, magic: bytes = b"GGUF",  # noqa: B006
         version: int = 3, tensors: int | None = None, keys: int | None = None) -> bytes:  # fmt: skip
    infos = [info()] if infos is None else infos
    head = magic + struct.pack("<IQQ", version, len(infos) if tensors is None else tensors, len(pairs) if keys is None else keys)
    head += b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


HUGE = (1 << 64) - 1
LONG = "n" * 1_000_000
BAD = {
    "empty": (b"", "ends inside its header"),
    "only a magic": (b"GGUF", "ends inside its header"),
    "safetensors": (struct.pack("<Q", 64) + b'{"a":', "not b'GGUF'"),
    "a pointer of git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "not b'GGUF'|LFS pointer"),
    "a zip file": (b"PK\x03\x04" + bytes(50), "zip or PyTorch pickle"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (make(version=1), "version is 1"),
    "version 4": (make(version=4), "version is 4"),
    "version 0": (make(version=0), "version is 0"),
    "endless tensors": (make(tensors=HUGE), "tensors, over"),
    "many tensors": (make(infos=[], tensors=100_000, data=b""), "ends inside|no place"),
    "endless pairs": (make(keys=HUGE), "metadata pairs, over"),
    "many pairs": (make(infos=[], keys=60_000, data=b""), "ends inside"),
    "endless key": (make([struct.pack("<Q", HUGE)]), "ends inside"),
    "endless text": (make([pair("k", STRING, struct.pack("<Q", 1 << 62))]), "ends inside"),
    "a key that is not UTF-8": (make([pair(b"\xff\xfe", U32, bytes(4))]), "not UTF-8"),
    "a text that is not UTF-8": (make([pair("k", STRING, text(b"abc\x80"))]), "not UTF-8 .byte 3"),
    "half a surrogate": (make([pair("k", STRING, text(b"\xed\xa0\x80"))]), "not UTF-8"),
    "a key twice": (make([pair("k", U32, bytes(4))] * 2), "'k' stands twice"),
    "an unknown type": (make([pair("k", 13, bytes(8))]), "unknown type 13"),
    "a truth value of 2": (make([pair("k", BOOL, b"\2")]), "neither 0 nor 1"),
    "a list of arrays": (make([pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(64))]), "holds arrays"),
    "a list of nothing": (make([pair("k", ARRAY, struct.pack("<IQ", 99, 1) + bytes(64))]), "unknown type 99"),
    "an endless list": (make([pair("k", ARRAY, struct.pack("<IQ", 0, HUGE))]), "ends inside"),
    "a list that overflows": (make([pair("k", ARRAY, struct.pack("<IQ", 12, 1 << 61))]), "ends inside"),
    "an endless list of texts": (make([pair("k", ARRAY, struct.pack("<IQ", STRING, 1 << 61))]), "ends inside"),
    "a list with 2 as a truth": (make([pair("k", ARRAY, struct.pack("<IQ", BOOL, 3) + b"\0\1\2")]), "neither 0 nor 1"),
    "an alignment of 0": (make([pair("general.alignment", U32, struct.pack("<I", 0))]), "alignment is 0"),
    "an alignment of 48": (make([pair("general.alignment", U32, struct.pack("<I", 48))]), "alignment is 48"),
    "an alignment of 2 GiB": (make([pair("general.alignment", U32, struct.pack("<I", 1 << 31))]), "alignment is 2147483648"),
    "an alignment in words": (make([pair("general.alignment", STRING, text("32"))]), "alignment is '32'"),
    "an alignment that is true": (make([pair("general.alignment", BOOL, b"\1")]), "alignment is True"),
    "no dimension": (make(infos=[info(shape=())]), "0 dimensions"),
    "five dimensions": (make(infos=[info(shape=(1, 1, 1, 1, 4))]), "5 dimensions"),
    "a billion dimensions": (make(infos=[text(NORM) + struct.pack("<I", 1 << 30)]), "1073741824 dimensions"),
    "a size of zero": (make(infos=[info(shape=(0, 4))]), "sizes are from 1"),
    "a size that overflows": (make(infos=[info(shape=(1 << 62, 4))]), "sizes are from 1"),
    "sizes whose product overflows": (make(infos=[info(shape=(1 << 24,) * 4)]), "truncated"),
    "an unknown tensor type": (make(infos=[info(kind=1000)]), "of type 1000; implemented: F32"),
    "a removed tensor type": (make(infos=[info(kind=4)]), "of type 4"),
    "a type not implemented": (make(infos=[info(kind=34, shape=(256,))]), "of type TQ1_0; implemented"),
    "half a block": (make(infos=[info(shape=(48, 2), kind=8)]), "not whole blocks of 32 .Q8_0"),
    "less than a block": (make(infos=[info(shape=(32, 8), kind=12)]), "not whole blocks of 256 .Q4_K"),
    "a tensor twice": (make(infos=[info(), info(offset=32)], data=bytes(64)), "stands twice"),
    "a tensor of another model": (make(infos=[info("blk.0.ssm_d")]), "'blk.0.ssm_d' has no place"),
    "a tensor under its official name": (make(infos=[info("lm_head.weight")]), "no place"),
    "an offset between alignments": (make(infos=[info(offset=8)]), "no multiple of 32"),
    "an offset beyond the file": (make(infos=[info(offset=64)]), "hole"),
    "an offset that overflows": (make(infos=[info(offset=HUGE - 31)]), "hole"),
    "tensors that overlap": (make(infos=[info(), info("output_norm.weight")]), "overlaps the tensor before"),
    "a hole between tensors": (make(infos=[info(), info("output_norm.weight", offset=64)], data=bytes(96)), "hole"),
    "an end before its data": (make(data=bytes(12)), "truncated"),
    "no data": (make(data=b""), "truncated"),
    "a long key": (make([pair(LONG, 13, b"")]), "unknown type"),
    "a long key twice": (make([pair(LONG, U32, bytes(4))] * 2), "twice"),
    "a long name": (make(infos=[info(LONG)]), "no place"),
    "a long text that is not UTF-8": (make([pair("k", STRING, text(LONG.encode() + b"\xff"))]), "not UTF-8"),
}


def test_the_undamaged_file_is_read(tmp_path):
    (tmp_path / "x.gguf").write_bytes(make([pair("k", F32, struct.pack("<f", 0.5))], data=struct.pack("<4f", 1, 2, 3, 4)))
    with GgufFile(tmp_path / "x.gguf") as file:
        assert file.metadata == {"k": 0.5}
        assert file.read("model.layers.0.input_layernorm.weight").tolist() == [1, 2, 3, 4]
    (tmp_path / "x.gguf").write_bytes(make(version=2))
    assert GgufFile(tmp_path / "x.gguf").tensors


@pytest.mark.parametrize("case", BAD)
def test_damage_is_named(tmp_path, case):
    raw, match = BAD[case]
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=match) as caught:
        open_gguf(tmp_path / "x.gguf")
    assert str(caught.value).startswith(str(tmp_path / "x.gguf")) and len(str(caught.value)) < 800


@pytest.mark.parametrize("raw,match", [
    (pair("split.count", U32, struct.pack("<I", 1 << 20)), "split.count is 1048576"),
    (pair("split.count", STRING, text("3")), "split.count is '3'"),
    (pair("split.tensors.count", U32, struct.pack("<I", 5)), "hold 1 tensors, not 5"),
])  # fmt: skip
def test_wrong_splits(tmp_path, raw, match):
    (tmp_path / "x.gguf").write_bytes(make([raw]))
    with pytest.raises(CheckpointError, match=match):
        open_gguf(tmp_path / "x.gguf")


def test_a_tensor_in_two_parts(tmp_path):
    for number in (0, 1):
        pairs = [pair(f"split.{key}", U32, struct.pack("<I", value)) for key, value in (("no", number), ("count", 2))]
        (tmp_path / f"m-{number + 1:05}-of-00002.gguf").write_bytes(make(pairs))
    with pytest.raises(CheckpointError, match="also in a part before"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")


def test_a_header_over_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen_ref.quant.gguf.LIMITS", type("Small", (), {"gguf_header_bytes": 200, "width": 1 << 24}))
    (tmp_path / "x.gguf").write_bytes(make([pair("k", STRING, text("x" * 300))]))
    with pytest.raises(CheckpointError, match="its header exceeds 200 bytes"):
        open_gguf(tmp_path / "x.gguf")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.gguf")
    for path, match in ((tmp_path, "not a regular file"), (tmp_path / "fifo.gguf", "not a regular file"),
                        (tmp_path / "absent.gguf", "No such file"), (Path("x" * 5000), "too long")):  # fmt: skip
        with pytest.raises(CheckpointError, match=match):
            open_gguf(path)


def test_every_file_is_closed_after_damage(tmp_path):
    (tmp_path / "x.gguf").write_bytes(make(tensors=HUGE))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(5):
        with pytest.raises(CheckpointError):
            open_gguf(tmp_path / "x.gguf")
    assert not before or len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_shrinks_after_opening(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(make(data=bytes(1 << 16), infos=[info(shape=(1 << 14,))]))
    with GgufFile(path) as file:
        os.truncate(path, 1000)
        with pytest.raises(CheckpointError, match="shrunk"):
            file.read("model.layers.0.input_layernorm.weight")
        with pytest.raises(CheckpointError, match="a moment ago"):
            file.view("model.layers.0.input_layernorm.weight")


def small_model() -> bytes:
    """A whole model of one layer, with a tokenizer of 256 bytes and four added tokens, in a few kilobytes."""
    from qwen_ref.tokenizer import _CHAR_OF

    def texts(values: list[str]) -> bytes:
        return struct.pack("<IQ", STRING, len(values)) + b"".join(map(text, values))

    tokens = [*(_CHAR_OF[i] for i in range(256)), "ab", "<|endoftext|>", "<|im_end|>", "<think>", "[PAD260]"]
    ints = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64,
            "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 16}  # fmt: skip
    pairs = [pair("general.architecture", STRING, text("qwen3"))]
    pairs += [pair(f"qwen3.{key}", U32, struct.pack("<I", value)) for key, value in ints.items()]
    pairs += [pair(f"qwen3.{key}", F32, struct.pack("<f", value)) for key, value in
              {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e4, "rope.scaling.factor": 2.0}.items()]  # fmt: skip
    pairs += [pair("qwen3.rope.scaling.type", STRING, text("yarn")),
              pair("qwen3.rope.scaling.original_context_length", U32, struct.pack("<I", 32)),
              pair("tokenizer.ggml.model", STRING, text("gpt2")), pair("tokenizer.ggml.pre", STRING, text("qwen2")),
              pair("tokenizer.ggml.tokens", ARRAY, texts(tokens)),
              pair("tokenizer.ggml.token_type", ARRAY, struct.pack("<IQ261i", 5, 261, *[1] * 257, 3, 3, 4, 5)),
              pair("tokenizer.ggml.merges", ARRAY, texts(["a b"])),
              pair("tokenizer.ggml.eos_token_id", U32, struct.pack("<I", 258)),
              pair("tokenizer.ggml.add_bos_token", BOOL, b"\0"),
              pair("tokenizer.chat_template", STRING, text("{{ messages }}"))]  # fmt: skip
    sizes = {"token_embd": ((32, 261), 8, 34 * 261), "output_norm": ((32,), 0, 128), "blk.0.attn_q": ((32, 32), 2, 18 * 32),
             "blk.0.attn_k": ((32, 16), 20, 18 * 16), "blk.0.attn_v": ((32, 16), 39, 17 * 16),
             "blk.0.ffn_up": ((256, 8), 12, 144 * 8), "blk.0.ffn_down": ((256, 4), 14, 210 * 4)}  # fmt: skip
    infos, data = [], b""
    for name, (shape, kind, size) in sizes.items():
        infos.append(info(f"{name}.weight", shape, kind, len(data)))
        data += bytes(size) + bytes(-size % 32)
    return make(pairs, infos, data)


def small_hybrid(path: Path, model_type: str) -> None:
    """A Gated DeltaNet and a layer of attention, with the tokenizer of `small_model`."""
    path.write_bytes(small_model())
    with open_gguf(path) as checkpoint:
        tokenizer = checkpoint.tokenizer_files
    path.unlink()
    config = {**HYBRIDS[model_type], "vocab_size": 261, "mlp_only_layers": []}
    tensors = make_pair(config)[0].checkpoint_tensors()
    planned = plan({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config, "q8_0")
    write_gguf(path, config, tokenizer, [
        Source(p.name, p.shape, p.kind, lambda p=p: stored(p, [tensors[part] for part in p.parts], config)) for p in planned])


FUZZ = """
    import collections, json, random, resource, signal, struct, sys, tempfile
    from pathlib import Path
    import torch
    from qwen_ref.errors import QwenRefError
    from qwen_ref.loading import load_model
    from qwen_ref.models import module_for
    from qwen_ref.quant.gguf import GgufFile, open_gguf, repack
    from qwen_ref.tokenizer import Tokenizer

    folder, seed, count, whole = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "whole"
    good = (folder / "good.gguf").read_bytes()
    with GgufFile(folder / "good.gguf") as file:
        header = min(info.start for info in file.tensors.values()) + 80  # and some numbers, which may be any
    texts = good.index(b"tokenizer.ggml"), good.index(b"{{ messages }}")
    draw = random.Random(seed)
    EXTREMES = [0, 1, 7, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]

    def mutate(raw):
        raw = bytearray(raw)
        for _ in range(draw.choice([1, 1, 1, 2, 5])):
            at, kind = draw.randrange(min(header, len(raw)) or 1), draw.choice([0, 0, 0, 0, 1, 2, 2, 3, 4, 5, 6])
            if whole and texts[0] <= at < texts[1]:  # the small model's part
                at = draw.randrange(texts[0])
            if kind == 0:
                raw[at : at + 1] = bytes([draw.randrange(256)])
            elif kind == 1:
                raw[at : at + 8] = struct.pack("<Q", draw.choice(EXTREMES))
            elif kind == 2:
                raw[at : at + 4] = struct.pack("<I", draw.choice(EXTREMES) & 0xFFFFFFFF)
            elif kind == 3:
                del raw[at : at + draw.choice([1, 4, 8, 50])]
            elif kind == 4:
                raw[at:at] = draw.randbytes(draw.choice([1, 4, 8, 50]))
            elif kind == 5:
                del raw[draw.randrange(len(raw) or 1) :]
            elif kind == 6:  # a whole piece again elsewhere
                start = draw.randrange(len(raw) or 1)
                raw[at:at] = raw[start : start + draw.randrange(200)]
        return bytes(raw)

    def use(path):
        with open_gguf(path) as checkpoint:
            module_for(checkpoint.config).Config.from_json(checkpoint.config)
            with tempfile.TemporaryDirectory() as tokenizer:
                for name, content in checkpoint.tokenizer_files.items():
                    (Path(tokenizer) / name).write_bytes(content)
                Tokenizer.load(tokenizer)
            for file in checkpoint.files:
                for name in file.tensors:
                    tensor = file.read(name)
                    if name in file.kinds:
                        repack(file.kinds[name], tensor).dequantize()
        if whole:
            with torch.no_grad():
                load_model(path, progress=False)(torch.tensor([[1, 2, 3]]))

    use(folder / "good.gguf")
    size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20), resource.RLIM_INFINITY))
    seen = collections.Counter()
    for i in range(count):
        (folder / "bad.gguf").write_bytes(mutate(good))
        signal.alarm(20)  # whose signal ends the process
        try:
            use(folder / "bad.gguf")
            seen["read"] += 1
        except QwenRefError as error:
            seen[type(error).__name__] += 1
            if len(str(error)) > 1000:
                raise RuntimeError("a long message") from error
        except BaseException:
            (folder / "failed.gguf").write_bytes((folder / "bad.gguf").read_bytes())
            raise
    print(json.dumps(seen))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux's")
@pytest.mark.parametrize("seed, count, model_type", [(0, 1000, None), (1, 1000, None), *((2, 300, name) for name in HYBRIDS)])
def test_mutations_raise_nothing_but_our_errors(tmp_path, seed, count, model_type):
    """Under a limit of 256 MB beyond what the imports take. A hybrid is loaded and run too."""
    if model_type is None:
        (tmp_path / "good.gguf").write_bytes(small_model())
    else:
        small_hybrid(tmp_path / "good.gguf", model_type)
    whole = "whole" if model_type else "part"
    command = [sys.executable, "-c", textwrap.dedent(FUZZ), str(tmp_path), str(seed), str(count), whole]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-3000:]
    seen: dict[str, Any] = json.loads(out.stdout)
    assert seen["CheckpointError"] > count / 5 and seen["read"] > count / 50, seen  # neither refuses all nor reads all


def test_the_small_model_is_whole(tmp_path):
    """So that mutations begin from a file that is right."""
    (tmp_path / "x.gguf").write_bytes(small_model())
    with open_gguf(tmp_path / "x.gguf") as checkpoint:
        assert checkpoint.kinds["model.layers.0.self_attn.v_proj.weight"] == "MXFP4"
        assert checkpoint.shapes["model.layers.0.mlp.up_proj.weight"] == (8, 256)
        assert checkpoint.config["vocab_size"] == 261 and checkpoint.config["rope_scaling"]["factor"] == 2.0
        assert checkpoint.config["tie_word_embeddings"] and checkpoint.config["eos_token_id"] == 258
        assert all(torch.isfinite(file.read(name).float()).all() for file in checkpoint.files for name in file.tensors)
