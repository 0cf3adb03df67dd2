"""Qwen3-0.6B at its real size: random weights written by transformers, read by us, compared layer by layer."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from qwen_ref import backend
from qwen_ref.checkpoint import load_weights
from qwen_ref.loading import build, materialize, read_config
from qwen_ref.verify import capture

IDS = torch.randint(0, 151643, (1, 21), generator=torch.Generator().manual_seed(4))


@pytest.mark.slow
def test_qwen3_06b(data, tmp_path):
    raw = json.loads((data / "configs" / "config-Qwen3-0.6B.json").read_text())
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**raw)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path)
    ours = build(read_config(tmp_path))
    materialize(ours, torch.device("cpu"))
    report = load_weights(ours, tmp_path, progress=False)
    assert report.problems() == "" and ours.num_parameters() == 596_049_920
    with backend.use("eager"):
        mine, reference = capture(ours, IDS), capture(theirs, IDS)
    compared = [name for name in mine if name in reference]
    assert len(compared) >= 28 * 14
    for name in compared:
        error = (mine[name] - reference[name]).abs().max() / reference[name].abs().max()
        assert error <= 1e-4, f"{name}: {error:.1e} of its scale"
    assert torch.equal(mine["lm_head"].argmax(-1), reference["lm_head"].argmax(-1))

    truth, ours, theirs = reference["lm_head"], ours.to(torch.bfloat16), theirs.to(torch.bfloat16)
    theirs.model.rotary_emb.inv_freq = ours.model.rotary_emb.frequencies.clone()  # .to(bfloat16) rounded the buffer
    with torch.no_grad(), backend.use("eager"):
        half, reference = ours(IDS).float(), theirs(IDS).logits.float()
    assert (half - truth).norm() <= 1.25 * (reference - truth).norm()
    assert torch.equal(half.argmax(-1), reference.argmax(-1))
