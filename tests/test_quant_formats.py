"""Every quantised format: written by the library that defines it, read back element for element, and run."""

from __future__ import annotations

import itertools

import pytest
import torch
from compressed_tensors.utils.match import match_targets
from quantised import CONFIGS, FORMATS, HYBRIDS, checkpoint, is_quantised, oracle

from qwen_ref import backend
from qwen_ref.loading import load_model
from qwen_ref.quant import convert
from qwen_ref.quant.convert import read_format
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
@pytest.mark.parametrize("model_type", [*CONFIGS, *HYBRIDS])
def test_a_checkpoint_is_its_dequantised_weights(tmp_path, model_type, format):
    dequantised = checkpoint(tmp_path, model_type, format)
    model = load_model(tmp_path, dtype=torch.float32, progress=False)
    found = dict(matrices(model))
    for name, weight in found.items():
        tolerance = {"rtol": 2.5e-7, "atol": 0} if format in REORDERED else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(weight, dequantised[name].float(), **tolerance)
    assert set(found) == set(filter(is_quantised, dequantised)), "every quantised matrix, and no other, is packed"
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    theirs = oracle(tmp_path, dequantised)
    with torch.no_grad(), backend.use("eager"):
        ours, exact = model(IDS), theirs(IDS).logits
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4 * float(exact.std()))


@pytest.mark.parametrize("format", FORMATS)
def test_the_reference_of_a_format_is_its_library(tmp_path, format, monkeypatch):
    """Before it is packed: `Scheme.dequantize`, element for element, and a forward pass over it."""
    dequantised = checkpoint(tmp_path, "qwen3_moe", format)
    monkeypatch.setattr("qwen_ref.loading.pack", lambda model, dtype: None)
    model = load_model(tmp_path, dtype=torch.float32, progress=False)
    stored = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {f"{name}.weight" for name in stored} == set(filter(is_quantised, dequantised))
    for name, module in stored.items():
        assert torch.equal(module.dequantize(), dequantised[f"{name}.weight"].float()), name
    with torch.no_grad(), backend.use("eager"):
        as_stored = model(IDS)
        convert.pack(model, torch.float32)
        torch.testing.assert_close(model(IDS), as_stored, rtol=1e-4, atol=1e-4)


NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("targets", [*itertools.permutations([NAME, "re:.*self_attn.*", "re:.*q_proj", "Linear"])])
def test_the_most_specific_target_wins(targets):
    """As in compressed-tensors, which takes the first of its matches, in whatever group and order they stand."""
    for count in range(1, 5):
        groups = {str(i): {"targets": [target], "weights": {"num_bits": 8, "strategy": "group", "group_size": 8 << i}}
                  for i, target in enumerate(targets[:count])}  # fmt: skip
        format = read_format({"quantization_config": {**FORMATS["compressed-int8"][0], "config_groups": groups}})
        for name in (NAME, "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj"):
            theirs = match_targets(name, torch.nn.Linear(2, 2), targets[:count])
            ours = format.scheme_of(name)
            assert (ours and ours.group) == (8 << targets.index(theirs[0]) if theirs else None), (name, targets[:count])


def test_activations_of_an_fp8_model_can_be_rounded_too(tmp_path):
    checkpoint(tmp_path, "qwen3", "fp8")
    model = load_model(tmp_path, dtype=torch.float32, progress=False)
    with torch.no_grad(), backend.use("eager"):
        plain = model(IDS)
        assert convert.round_activations(model) == 2 * 7
        rounded = model(IDS)
        q, x = model.model.layers[0].self_attn.q_proj, torch.randn(3, 96)
        codes = (x.view(3, 2, 48) / (x.view(3, 2, 48).abs().amax(-1, True) / 448)).to(torch.float8_e4m3fn).float()
        seen = (codes * (x.view(3, 2, 48).abs().amax(-1, True) / 448)).view(3, 96)
        torch.testing.assert_close(q(x), seen @ q.weight.T, rtol=1e-5, atol=1e-5)
        convert.round_activations(model, False)
        assert torch.equal(model(IDS), plain)
    error = (rounded - plain).norm() / plain.norm()
    assert 1e-3 < error < 0.2
