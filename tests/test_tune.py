"""The search for launch parameters: on a pretended device whose times are a formula, so that the best entry is known."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from qwen_ref import backend, ops
from qwen_ref.bench import tune
from qwen_ref.errors import RequestError

module_of_tune = sys.modules["qwen_ref.bench.tune"]


@pytest.fixture
def kernel(monkeypatch):
    """A swiglu that notes the entry it is launched with, is wrong with more than 8 warps, and does not launch with 32."""
    module = types.ModuleType("qwen_kernels.swiglu")
    module.TUNED = {("any device", "rows"): {"BLOCK": 64, "num_warps": 4, "num_stages": 2}}
    module.launched = []

    def run(gate, up):
        entry = module.TUNED.get(("cpu", "rows")) or module.TUNED["any device", "rows"]
        module.launched.append(entry)
        if entry["num_warps"] > 16:
            raise RuntimeError("out of resource")
        return ops.swiglu(gate, up) * (2 if entry["num_warps"] > 8 else 1)

    module.run = run
    monkeypatch.setitem(sys.modules, "qwen_kernels.swiglu", module)
    monkeypatch.setattr(module_of_tune, "kernel_module", lambda operation: module)
    monkeypatch.setitem(
        backend.OPERATIONS["swiglu"].implementations, "triton", backend.Implementation("triton", lambda: run)
    )

    def seconds(run, copies, limit):  # BLOCK 512 is best, more stages are better up to 4, more warps always
        entry = module.launched[-1]
        far = abs(entry["BLOCK"].bit_length() - 10) + abs(entry["num_stages"] - 4)
        return [(1 + far) / entry["num_warps"]] * 3

    monkeypatch.setattr(module_of_tune, "repeat", seconds)
    return module


def test_it_finds_the_best_right_entry_and_leaves_the_table_as_it_was(kernel):
    before = {key: dict(entry) for key, entry in kernel.TUNED.items()}
    (row,) = tune("swiglu", model="tiny", tokens=[3, 5], dtype=torch.float32, device="cpu")
    assert row.entry == {"BLOCK": 512, "num_warps": 8, "num_stages": 4}
    assert row.before == pytest.approx(2 * (1 + 3 + 2) / 4) and row.after == pytest.approx(2 / 8)  # two shapes
    assert 0 < row.refused < row.tried
    assert before == kernel.TUNED and type(kernel.TUNED) is dict
    assert row.line.startswith("    ('cpu', 'rows'): {'BLOCK': 512, 'num_warps': 8, 'num_stages': 4},  # 250000.0 us")


def test_an_entry_in_force_that_is_wrong_is_an_error(kernel):
    kernel.TUNED["cpu", "rows"] = {"BLOCK": 64, "num_warps": 16, "num_stages": 2}
    with pytest.raises(RequestError, match="in force for 'rows' is wrong"):
        tune("swiglu", model="tiny", tokens=[3], dtype=torch.float32, device="cpu")
    assert kernel.TUNED["cpu", "rows"]["num_warps"] == 16


def test_calls_that_look_up_nothing_are_an_error(kernel):
    kernel.run = ops.swiglu
    with pytest.raises(RequestError, match="no call of swiglu with 3, 5 tokens looks up an entry"):
        tune("swiglu", model="tiny", tokens=[3, 5], dtype=torch.float32, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(RequestError, match="rope cannot be tuned on cuda"):
        tune("rope")
