"""Hostile and unlucky checkpoint files beyond test_checkpoint.py: bounded time, bounded messages, one kind of error."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qwen_ref.checkpoint import load_weights, save_model
from qwen_ref.errors import CheckpointError, ConfigError
from qwen_ref.hub import find
from qwen_ref.safetensors_file import SafetensorsFile
from qwen_ref.strict_json import read_json

U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def make(path: Path, header: object, data: bytes = b"", pad: int = 0) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw = raw.ljust(pad)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


class Module:
    """The loader's side of a model: named memory, every piece of it a parameter unless `parameters` says otherwise."""

    def __init__(self, tensors: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor] | None = None) -> None:
        self.tensors, self.parameters = tensors, parameters if parameters is not None else tensors
        self.tied: dict[str, str] = {}
        self.ignored: tuple[str, ...] = ()
        self.constants: dict[str, torch.Tensor] = {}
        self.row_read: set[str] = set()

    def checkpoint_tensors(self):
        return self.tensors

    def named_parameters(self):
        return ((name, torch.nn.Parameter(t, requires_grad=False)) for name, t in self.parameters.items())

    def canonical_name(self, name: str) -> str:
        return name

    def disk_name(self, name: str) -> str:
        return name


@pytest.mark.parametrize("pad", [0x0280, 0x010280, 0x0380, 0x4B50])
def test_a_header_length_that_looks_like_another_format(tmp_path, pad):
    """Pickles begin with 80 02 and zip files with 50 4B, and so do headers of 640 bytes."""
    path = make(tmp_path / "x.safetensors", {"a": U8}, b"1234", pad)
    with SafetensorsFile(path) as file:
        assert file.read("a").tolist() == [49, 50, 51, 52] == load_file(path)["a"].tolist()


SLOW = {
    # Each takes minutes where the work grows with the square of the header.
    "a key repeated at the end": (b"{" + b"".join(b'"%07d":1,' % i for i in range(300_000)) + b'"0299999":1}', "twice"),
    "the product of many sizes": (json.dumps({"a": {**U8, "shape": [1 << 62] * 300_000}}).encode(), "dimensions"),
}


@pytest.mark.parametrize("case", SLOW)
def test_damage_is_found_in_linear_time(tmp_path, case):
    header, match = SLOW[case]
    path = make(tmp_path / "x.safetensors", header)
    code = "import sys; from qwen_ref.safetensors_file import *; from pathlib import Path; SafetensorsFile(Path(sys.argv[1]))"
    out = subprocess.run([sys.executable, "-O", "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert out.returncode == 1 and "CheckpointError" in out.stderr and match in out.stderr


LONG = "n" * 1_000_000


@pytest.mark.parametrize("header", [
    {LONG: {**U8, "data_offsets": [0, 3]}},
    {LONG: {**U8, "data_offsets": [1, 5]}},
    {LONG: 1},
    {"a": {**U8, "dtype": LONG}},
    {"a": {**U8, "shape": [LONG]}},
    b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,' + b"9" * 4300 + b"]}}",
    b'{"a": ' + b"9" * 1000 + b".0e999}",
    b'{"%s": 1, "%s": 2}' % (LONG.encode(), LONG.encode()),
])  # fmt: skip
def test_messages_are_short_whatever_the_file_holds(tmp_path, header):
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(make(tmp_path / "x.safetensors", header, b"1234"))
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("header,match", [
    (b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', "not a list of sizes"),
    (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[-0,4]}}', "data_offsets"),
    (b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "surrogate"),
    (b'{"__metadata__":{"a":"\\udfff"},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "surrogate"),
    (b' {"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "does not begin with {"),
    (b'{"a":{"dtype":"U8","shape":[0,4611686018427387904,4],"data_offsets":[0,0]}}', "does not fit"),
    (b'{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,4],"data_offsets":[0,4]}}', "9 dimensions"),
])  # fmt: skip
def test_odd_headers_are_refused(tmp_path, header, match):
    with pytest.raises(CheckpointError, match=match):
        SafetensorsFile(make(tmp_path / "x.safetensors", header, b"" if b"[0,0]" in header else b"1234"))


GOOD = b'{ "a" : { "dtype" : "U8" , "shape" : [ 2 , 2 ] , "data_offsets" : [ 0 , 4 ] } }'.split()
PIECES = [*GOOD, *b'"b" "\\ud800" "__metadata__" "F32" 1 -0 -1 1.0 1e0 true null'.split(), b" "]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_rearranged_headers(tmp_path_factory, data):
    """Tokens of a good header replaced, dropped and repeated: what we read, the library reads the same."""
    tokens = list(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(tokens) - 1))
        tokens[at : at + 1] = data.draw(st.lists(st.sampled_from(PIECES), max_size=2))
    path = make(tmp_path_factory.getbasetemp() / "rearranged.safetensors", b"".join(tokens), b"1234")
    try:
        with SafetensorsFile(path) as file:
            ours = {name: file.read(name) for name in file.tensors}
    except CheckpointError:
        return
    try:
        theirs = load_file(path)
    except SafetensorError as refusal:
        pytest.fail(f"accepted what the library refuses: {b''.join(tokens)!r}: {refusal}")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_destination_of_another_shape_or_kind_is_never_filled(tmp_path):
    with SafetensorsFile(make(tmp_path / "x.safetensors", {"a": U8}, b"1234")) as file:
        for out in (torch.zeros(2, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(4)):
            with pytest.raises(CheckpointError, match=r"'a' is torch\.uint8 \[4\]"):
                file.read_into("a", out)
            assert not out.any()


def test_memory_that_no_name_fills_is_an_error(tmp_path):
    whole = torch.full((4,), 7.0)
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="leaves part of w out"):
        load_weights(Module({"a": whole[:2]}, {"w": whole}), tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="meta"):
        load_weights(Module({"a": torch.zeros(2, device="meta")}), tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="a is float32, not int64"):
        load_weights(Module({"a": torch.zeros(2, dtype=torch.int64)}), tmp_path, progress=False)
    save_file({"a": torch.arange(2)}, tmp_path / "model.safetensors")
    buffer = torch.zeros(2, dtype=torch.int64)
    load_weights(Module({"a": buffer}), tmp_path, progress=False)
    assert buffer.tolist() == [0, 1]


def test_saving_fails_with_one_kind_of_error_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    good = Module({"a": torch.zeros(2)})
    for model, config, folder, extra in (
        (good, {}, tmp_path / "file" / "m", {}),
        (good, {"eps": float("nan")}, tmp_path / "m", {}),
        (good, {"dtype": torch.float32}, tmp_path / "m", {}),
        (good, {}, tmp_path / "m", {"../escaped": b""}),
        (good, {}, tmp_path / "m", {"model.safetensors": b""}),
        (Module({"a": torch.zeros(2, dtype=torch.complex64)}), {}, tmp_path / "m", {}),
    ):
        with pytest.raises(CheckpointError):
            save_model(model, config, folder, extra=extra)
        assert os.listdir(tmp_path) == ["file"]


def test_saved_tensors_are_aligned_to_their_items(tmp_path):
    save_model(Module({"h": torch.ones(3).half(), "f": torch.ones(5), "d": torch.ones(1).double()}), {}, tmp_path / "m")
    with SafetensorsFile(tmp_path / "m" / "model.safetensors") as file:
        assert list(file.tensors) == ["d", "f", "h"]
        assert all(info.start % info.dtype.itemsize == 0 for info in file.tensors.values())


def test_names_the_system_cannot_hold():
    with pytest.raises(CheckpointError, match="neither a folder"):
        find("x" * 5000)
    with pytest.raises(ConfigError, match="no such file"):
        read_json(Path("x" * 5000), ConfigError)


def test_a_folder_has_no_revision(tmp_path):
    assert find(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match="revision"):
        find(tmp_path, revision="v1")
