"""Oracle bundles: a check against the file is the live check, and every way to hold the wrong file is an error."""

from __future__ import annotations

import json
import struct
import sys

import pytest
import torch
from conftest import TINY, make_pair

from qwen_ref import ops
from qwen_ref.errors import CheckpointError, NumericsError, RequestError
from qwen_ref.models import module_for
from qwen_ref.safetensors_file import SafetensorsFile, write_safetensors
from qwen_ref.verify import bundle, oracle

SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
IDS = [torch.randint(0, 211, (1, n), generator=torch.Generator().manual_seed(n)) for n in (11, 4)]


def write(path, ours, dtype=torch.float32, **options):
    theirs = oracle.build(ours, ours, dtype, "cpu")
    half = dtype in (torch.bfloat16, torch.float16)
    exact = oracle.build(ours, ours, torch.float32, "cpu") if half else theirs
    bundle.write_bundle(path, ours, theirs, exact, IDS, model="a tiny one", tolerances={"fp32": 1e-4}, new_tokens=3, **options)
    return theirs, exact


def model_of(name, dtype=torch.float32, seed=0, **changes):
    if "linear_num_key_heads" in TINY[name][1]:  # a hybrid has no sliding windows
        changes = {key: value for key, value in changes.items() if key not in SLIDING}
    return make_pair({**TINY[name][1], **changes}, dtype, seed)[0]


def fingerprint(model):
    return bundle.fingerprint([model.checkpoint_tensors()])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(path, the model it was written from), fp32."""
    path, ours = tmp_path_factory.mktemp("bundle") / "oracle.safetensors", model_of("qwen3")
    write(path, ours)
    return path, ours


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_bundle_holds_what_transformers_computes(name, dtype, tmp_path):
    ours = model_of(name, dtype, **(SLIDING if dtype is torch.float32 else {}))
    theirs, exact = write(tmp_path / "b", ours, dtype)
    read = bundle.read(tmp_path / "b")
    read.check(ours)
    assert read.dtype == dtype and read.tolerances == {"fp32": 1e-4}
    assert [ids.tolist() for ids in read.prompts] == [ids.tolist() for ids in IDS]
    for i, ids in enumerate(IDS):
        for kept, network in ((read.theirs(i), theirs), (read.exact(i), exact)):
            live = oracle.capture_theirs(network, ids)
            assert list(kept) == list(live) == list(oracle.capture_ours(ours, ids))
            assert all(torch.equal(kept[key], live[key]) and kept[key].dtype == live[key].dtype for key in live)


def test_the_oracles_own_error_and_its_continuation(tmp_path):
    ours = model_of("qwen3", torch.bfloat16)
    theirs, exact = write(tmp_path / "b", ours, torch.bfloat16)
    read = bundle.read(tmp_path / "b")
    logits, true = (torch.cat([m(ids).logits.double().flatten() for ids in IDS]) for m in (theirs, exact))
    assert read.own_error("hook_logits") == pytest.approx(float((logits - true).norm() / true.norm()), rel=1e-12)
    assert 1e-3 < read.own_error("hook_logits") < 0.1  # bf16 keeps 8 bits
    assert read.own_error("hook_embed") == 0.0
    tokens = theirs.generate(IDS[0], max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 11:]
    greedy = read.greedy
    assert greedy.tokens == tokens.tolist() == greedy.logits.argmax(-1).tolist()
    top = greedy.logits.double().sort(-1).values
    assert greedy.margins == (top[:, -1] - top[:, -2]).tolist()


def test_a_planted_fault_is_found_through_a_bundle(written, monkeypatch):
    path, ours = written
    read = bundle.read(path)
    read.check(ours)

    def first_difference():
        mine, kept = oracle.capture_ours(ours, IDS[0]), read.theirs(0)
        return next((name for name in kept if not torch.allclose(mine[name].double(), kept[name].double(), atol=1e-5)), None)

    assert first_difference() is None
    norm = ours.model.layers[1].post_attention_layernorm
    monkeypatch.setattr(norm, "forward", lambda x: ops.rms_norm(x, 1 + norm.weight, norm.eps))
    assert first_difference() == "blocks.1.ln2.hook_out"


# ------------------------------------------------------------------------------------------------- the oracle itself


@pytest.mark.parametrize("name", TINY)
def test_both_sides_see_left_padding_alike(name):
    ours = model_of(name, **SLIDING)
    bound = 3e-5 if "linear_num_key_heads" in TINY[name][1] else 1e-6  # see `Tolerances.recurrent`
    positions = torch.arange(13).repeat(2, 1)
    positions[1] -= 5
    ids = torch.randint(0, 211, (2, 13), generator=torch.Generator().manual_seed(3))
    mine = oracle.capture_ours(ours, ids, positions.clamp_min(-1))
    theirs = oracle.capture_theirs(oracle.build(ours, ours, torch.float32, "cpu"), ids, positions)
    for key, value in mine.items():
        if key.startswith("rotary."):
            continue  # padding has no angle that means anything
        tokens = oracle.points(ours)[key].dims.index("T")
        a, b = (x.movedim(tokens, 1)[positions >= 0].double() for x in (value, theirs[key]))
        assert value.shape == theirs[key].shape and (a - b).norm() <= bound * b.norm(), key


def test_capturing_leaves_transformers_as_it_was(monkeypatch):
    import transformers.models.qwen3.modeling_qwen3 as modelling

    real = modelling.apply_rotary_pos_emb
    ours = model_of("qwen3")
    theirs = oracle.build(ours, ours, torch.float32, "cpu")
    oracle.capture_theirs(theirs, IDS[0])
    assert modelling.apply_rotary_pos_emb is real
    monkeypatch.setattr(theirs.model.layers[1].self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises((RequestError, AttributeError)):
        oracle.capture_theirs(theirs, IDS[0])
    assert modelling.apply_rotary_pos_emb is real
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in theirs.modules())


def test_what_was_never_computed_is_named(monkeypatch):
    ours = model_of("qwen3")
    theirs = oracle.build(ours, ours, torch.float32, "cpu")
    monkeypatch.setattr(theirs.model.layers[1].mlp, "forward", lambda x: x)
    with pytest.raises(RequestError, match=r"3 activations were not seen, first blocks\.1\.mlp\.hook_pre:"):
        oracle.capture_theirs(theirs, IDS[0])


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RequestError, match=r"pip install transformers.*--against FILE"):
        oracle.require()


# ------------------------------------------------------------------------------------------------- the wrong file


def test_another_dtype_config_or_weights(written):
    path, ours = written
    read = bundle.read(path)
    with pytest.raises(RequestError, match=r"written in float32, the model is in bfloat16: load it with dtype='float32'"):
        read.check(model_of("qwen3", torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"another config: rms_norm_eps differ.*'a tiny one'"):
        read.check(model_of("qwen3", rms_norm_eps=1e-5))
    with pytest.raises(CheckpointError, match=r"other weights of the same config"):
        read.check(model_of("qwen3", seed=1))
    read.check(ours)


def test_the_fingerprint_sees_each_tensor_its_name_and_its_dtype():
    ours = model_of("qwen2_moe")
    before = fingerprint(ours)
    assert fingerprint(model_of("qwen2_moe")) == before
    seen = {before, fingerprint(model_of("qwen2_moe", torch.bfloat16))}
    for tensor in ours.checkpoint_tensors().values():
        tensor.view(-1)[0] += 1
        seen.add(fingerprint(ours))
        tensor.view(-1)[0] -= 1
    assert len(seen) == 2 + len(ours.checkpoint_tensors())
    in_parts = [{name: tensor} for name, tensor in reversed(ours.checkpoint_tensors().items())]
    assert bundle.fingerprint(in_parts) == fingerprint(ours)


def test_a_flipped_byte_anywhere_is_noticed(written, tmp_path):
    """Of the header, the metadata in it and the tensors, in two bits."""
    path, _ = written
    raw, copy = path.read_bytes(), tmp_path / "copy"
    (length,) = struct.unpack("<Q", raw[:8])
    about = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["qwen_ref_oracle"])
    assert about["digest"]
    places = [*range(0, 8 + length, 101), *range(8 + length, len(raw), len(raw) // 40), len(raw) - 1]
    passed = []
    for at in places:
        for mask in (0x01, 0x20):
            copy.write_bytes(raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :])
            try:
                bundle.read(copy)
                passed.append((at, mask))
            except CheckpointError as error:
                assert str(copy) in str(error)
    assert not passed


def test_edited_numbers_in_the_metadata_are_noticed(written, tmp_path):
    path, _ = written
    with SafetensorsFile(path) as file:
        tensors, about = {name: file.read(name) for name in file.tensors}, json.loads(file.metadata["qwen_ref_oracle"])
    for edit in ({"tolerances": {"fp32": 1.0}}, {"fingerprint": "0" * 64}, {"dtype": "bfloat16"}, {"digest": "0" * 64}):
        copy = tmp_path / next(iter(edit))
        write_safetensors(copy, tensors, metadata={"qwen_ref_oracle": json.dumps({**about, **edit})})
        with pytest.raises(CheckpointError, match="damaged or edited"):
            bundle.read(copy)
    for name, edited in (("greedy.logits", tensors["greedy.logits"].view(torch.int32)),
                         ("greedy.logits", tensors["greedy.logits"].view(1, -1))):  # fmt: skip
        write_safetensors(tmp_path / "bytes", {**tensors, name: edited}, metadata={"qwen_ref_oracle": json.dumps(about)})
        with pytest.raises(CheckpointError, match="damaged or edited"):
            bundle.read(tmp_path / "bytes")
    write_safetensors(tmp_path / "same", tensors, metadata={"qwen_ref_oracle": json.dumps(about)})
    assert bundle.read(tmp_path / "same").about == about


@pytest.mark.parametrize("field,value", [
    ("prompts", []), ("prompts", [[]]), ("prompts", [[1, -1]]), ("prompts", [[True]]), ("prompts", [[1]] * 100_000),
    ("names", []), ("names", ["x"] * 62), ("names", 3), ("own_error", {"hook_embed": -1.0}), ("own_error", []),
    ("dtype", "int8"), ("dtype", ["float32"]), ("config", None), ("config_sha256", "0"), ("greedy", {}), ("greedy", None),
    ("greedy", {"tokens": [1], "margins": []}), ("tolerances", {"fp32": "1"}), ("fingerprint", None), ("model", 1),
    ("versions", None),
], ids=lambda v: str(v)[:24])  # fmt: skip
def test_a_forged_file_with_a_right_digest_still_has_the_form(written, tmp_path, field, value):
    path, ours = written
    with SafetensorsFile(path) as file:
        tensors, about = {name: file.read(name) for name in file.tensors}, json.loads(file.metadata["qwen_ref_oracle"])
    about[field] = value
    about["digest"] = bundle._digest(about, sorted(tensors.items()))
    write_safetensors(tmp_path / "forged", tensors, metadata={"qwen_ref_oracle": json.dumps(about)})
    with pytest.raises(CheckpointError, match="metadata"):
        bundle.read(tmp_path / "forged").check(ours)


def test_forged_tensors_of_another_shape(written, tmp_path):
    path, ours = written
    with SafetensorsFile(path) as file:
        tensors, about = {name: file.read(name) for name in file.tensors}, json.loads(file.metadata["qwen_ref_oracle"])
    tensors["theirs.1.blocks.2.attn.hook_z"] = tensors["theirs.1.blocks.2.attn.hook_z"][:, :1].clone()
    about["digest"] = bundle._digest(about, sorted(tensors.items()))
    write_safetensors(tmp_path / "forged", tensors, metadata={"qwen_ref_oracle": json.dumps(about)})
    with pytest.raises(CheckpointError, match=r"theirs\.1\.blocks\.2\.attn\.hook_z has the shape \[1, 1, 6, 20\]"):
        bundle.read(tmp_path / "forged").check(ours)


def test_truncated_missing_and_foreign_files(written, tmp_path):
    path, _ = written
    raw, copy = path.read_bytes(), tmp_path / "copy"
    for length in (0, 5, 8, 1000, len(raw) // 2, len(raw) - 1):
        copy.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            bundle.read(copy)
    with pytest.raises(CheckpointError, match="No such file"):
        bundle.read(tmp_path / "absent")
    write_safetensors(copy, {"a": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"no oracle bundle.*--write-oracle"):
        bundle.read(copy)
    for about in ('{"format":2}', "[]", "{", "[" * 100_000):
        write_safetensors(copy, {"a": torch.zeros(3)}, metadata={"qwen_ref_oracle": about})
        with pytest.raises(CheckpointError):
            bundle.read(copy)
    with pytest.raises(RequestError, match="prompts 0 to 1, not 2"):
        bundle.read(path).theirs(2)


def test_nothing_is_overwritten_and_nothing_is_left_behind(written, tmp_path, monkeypatch):
    path, ours = written
    before = path.read_bytes()
    with pytest.raises(RequestError, match="not overwritten"):
        write(path, ours)
    assert path.read_bytes() == before
    with pytest.raises(RequestError, match="folder .* does not exist"):
        write(tmp_path / "no" / "b", ours)

    def full(*args, **kwargs):
        args[0].write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, "write_safetensors", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path / "b", ours)
    assert list(tmp_path.iterdir()) == []


def test_an_oracle_that_overflows_is_no_oracle(tmp_path):
    ours = model_of("qwen3", torch.float16)
    ours.model.layers[1].mlp.down_proj.weight *= 60_000
    with pytest.raises(NumericsError, match="overflows in float16"):
        write(tmp_path / "b", ours, torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_prompts_must_be_single_rows(tmp_path):
    ours = module_for(TINY["qwen3"][1]).Model
    theirs = None
    for prompts in ([], [torch.zeros(2, 3, dtype=torch.long)], [torch.zeros(1, 0, dtype=torch.long)]):
        with pytest.raises(RequestError, match="at least one prompt"):
            bundle.write_bundle(tmp_path / "b", ours, theirs, theirs, prompts, model="", tolerances={})
