"""Every quantised format: written by the library that defines it, read back element for element, and run."""

from __future__ import annotations

import pytest
import torch
from quantised import CONFIGS, FORMATS, checkpoint, oracle

from qwen_ref import backend
from qwen_ref.loading import load_model
from qwen_ref.quant import convert
from qwen_ref.quant.layers import PackedExperts, PackedLinear, QuantLinear
from qwen_ref.quant.packed import expert

torch.manual_seed(0)
IDS = torch.randint(0, 211, (2, 9))
# Where a layout multiplies in another order than the library: two roundings of fp32 for each weight.
REORDERED = {"bnb-int8", "compressed-nvfp4", "modelopt-nvfp4"}


def matrices(model):
    """Official name -> dequantised matrix, of everything that is packed."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield f"{name}.weight", module.weight
        elif isinstance(module, PackedExperts):
            for e in range(module.down.codes.shape[0]):
                down = expert(module.down, e).dequantize()
                gate, up = expert(module.gate_up, e).dequantize().chunk(2)
                for part, weight in (("gate", gate), ("up", up), ("down", down)):
                    yield f"{name}.{e}.{part}_proj.weight", weight


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_checkpoint_is_its_dequantised_weights(tmp_path, model_type, format):
    dequantised = checkpoint(tmp_path, model_type, format)
    model = load_model(tmp_path, dtype=torch.float32, progress=False)
    found = dict(matrices(model))
    for name, weight in found.items():
        tolerance = {"rtol": 2.5e-7, "atol": 0} if format in REORDERED else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(weight, dequantised[name].float(), **tolerance)
    quantised = {name for name, t in dequantised.items() if "proj.weight" in name}
    assert set(found) == quantised, "every quantised matrix, and no other, is packed"
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    theirs = oracle(tmp_path, dequantised)
    with torch.no_grad(), backend.use("eager"):
        ours, exact = model(IDS), theirs(IDS).logits
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4 * float(exact.std()))


@pytest.mark.parametrize("format", FORMATS)
def test_the_reference_of_a_format_is_its_library(tmp_path, format, monkeypatch):
    """Before it is packed: `Scheme.dequantize`, element for element, and a forward pass over it."""
    dequantised = checkpoint(tmp_path, "qwen3_moe", format)
    monkeypatch.setattr("qwen_ref.loading.pack", lambda model: [])
    model = load_model(tmp_path, dtype=torch.float32, progress=False)
    stored = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {f"{name}.weight" for name in stored} == {name for name in dequantised if "proj.weight" in name}
    for name, module in stored.items():
        assert torch.equal(module.dequantize(), dequantised[f"{name}.weight"].float()), name
    with torch.no_grad(), backend.use("eager"):
        as_stored = model(IDS)
        convert.pack(model)
        torch.testing.assert_close(model(IDS), as_stored, rtol=1e-4, atol=1e-4)
