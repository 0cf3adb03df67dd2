"""verify on quantised checkpoints, and the faults of quantised loading that it must name.

The oracle is transformers on weights dequantised by the format's definition; ours are the packed ones. The faults are
those that loaders of these formats have had.
"""

from __future__ import annotations

import sys

import pytest
import torch
from quantised import checkpoint

from qwen_ref.loading import load_model
from qwen_ref.quant import convert
from qwen_ref.quant.layers import PackedExperts, PackedLinear
from qwen_ref.verify import verify


@pytest.mark.parametrize("format", ["awq", "gptq-int8-act-order", "fp8", "compressed-int4-zeros", "bnb-nf4-nested", "modelopt-nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantised_checkpoint_verifies_at_every_level(tmp_path, format, dtype):
    checkpoint(tmp_path, "qwen3_moe", format)
    report = verify(tmp_path, dtype=dtype, new_tokens=8, progress=False)
    assert report.ok, report.verdict
    assert any(check.name.startswith("linear_") for check in report.checks if check.level == "L1")


@pytest.mark.parametrize("model_type, format", [("qwen3_next", "fp8"), ("qwen3_5", "gptq-int8"), ("qwen3_5_moe", "modelopt-nvfp4")])
def test_a_quantised_hybrid_verifies(tmp_path, model_type, format):
    checkpoint(tmp_path, model_type, format)
    report = verify(tmp_path, dtype=torch.float32, new_tokens=6, progress=False)
    assert report.ok, report.verdict
    assert any(check.name.startswith("linear_") for check in report.checks if check.level == "L1")


# ------------------------------------------------------------------------------------------------- faults


def codes(change):
    """A fault of the packed codes."""
    return lambda packed: packed._replace(codes=change(packed.codes))


def scale(change):
    return lambda packed: packed._replace(scale=change(packed.scale))


def nibbles_swapped(packed_codes):
    return packed_codes >> 4 | packed_codes << 4


def rows_of_scales_shifted(values):
    return values.roll(1, dims=-2)


FAULTS = {
    # AWQ's eight outputs of a word taken in order
    "outputs not reordered": ("awq", codes(lambda c: c.unflatten(0, (-1, 8))[:, [0, 4, 1, 5, 2, 6, 3, 7]].flatten(0, 1))),
    "nibbles swapped": ("compressed-int4", codes(nibbles_swapped)),
    "zero points one too small": ("gptq-int4-zeros", lambda p: p._replace(zero=p.zero - 1)),  # the quirk of version 1 forgotten
    "zero points forgotten": ("compressed-int4-zeros", lambda p: p._replace(zero=None)),
    "scales of the next block": ("fp8-bf16-scales", scale(rows_of_scales_shifted)),
    "scale divides": ("fp8-tensor", scale(lambda s: 1 / s)),  # as the name weight_scale_inv suggests
    "high nibble second": ("bnb-nf4", codes(nibbles_swapped)),
    "sign of the code lost": ("compressed-nvfp4", lambda p: p._replace(table=p.table.abs())),
    "127 forgotten": ("bnb-int8", scale(lambda s: s * 127)),
    "offset of the scales lost": ("bnb-nf4-nested", scale(lambda s: s - s.mean())),
    "exponent off by one": ("compressed-mxfp4", scale(lambda s: (s.view(torch.uint8) + 1).view(torch.float8_e8m0fnu))),
    "groups of another size": ("gptq-int8", lambda p: p._replace(scale=p.scale.flip(-1))),
}
PLACES = {  # where the fault is planted -> the first name that must differ
    "model.layers.0.self_attn.k_proj": "blocks.0.attn.hook_k",
    "model.layers.1.mlp.down_proj": "blocks.1.hook_mlp_out",
}


def planted(monkeypatch, place, fault):
    """From now on, loading packs one matrix wrongly; the definition, which the oracle is made with, stays right."""
    real = convert._packed

    def wrong(name, module):
        result = real(name, module)
        if name == place:
            result.packed = fault(result.packed)
        return result

    monkeypatch.setattr(convert, "_packed", wrong)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_quantised_loading_is_caught_and_named(tmp_path, monkeypatch, name, place):
    format, fault = FAULTS[name]
    checkpoint(tmp_path, "qwen2", format)
    planted(monkeypatch, place, fault)
    report = verify(tmp_path, levels="L0,L2", progress=False)
    assert report.first_row is not None and report.first_row.name == PLACES[place]
    values = next(check for check in report.checks if check.name == "weights that differ in value")
    assert not values.ok and values.detail == f"{place}.weight"


@pytest.mark.parametrize("fault", ["order", "gate and up", "experts"])
def test_a_fault_of_act_order_and_of_expert_stacks_is_caught_and_named(tmp_path, monkeypatch, fault):
    checkpoint(tmp_path, "qwen2_moe", "gptq-int4-act-order" if fault == "order" else "gptq-int4")
    real = load_model(tmp_path, dtype=torch.float32, progress=False)
    if fault == "order":
        module, guilty = real.model.layers[0].self_attn.q_proj, "blocks.0.attn.hook_q"
        assert isinstance(module, PackedLinear) and module.order is not None
        module.order = None
    else:
        module, guilty = real.model.layers[0].mlp.experts, "blocks.0.mlp.hook_expert_out"
        assert isinstance(module, PackedExperts)
        half = module.intermediate
        swap = torch.arange(2 * half).roll(half) if fault == "gate and up" else torch.arange(2 * half)
        experts = torch.arange(5) if fault == "gate and up" else torch.tensor([1, 0, 2, 3, 4])
        module.gate_up = module.gate_up._replace(codes=module.gate_up.codes[experts][:, swap])
        if fault == "gate and up":
            module.gate_up = module.gate_up._replace(scale=module.gate_up.scale[:, swap])
    package = sys.modules["qwen_ref.verify"]

    monkeypatch.setattr(package, "load_model", lambda *args, dequantize=False, **rest: (
        load_model(*args, dequantize=True, **rest) if dequantize else real))
    report = verify(tmp_path, levels="L2", progress=False)
    assert report.first_row is not None and report.first_row.name == guilty
