"""The verifier is itself verified: faults are planted in the model, each must be found and its place named first."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import TINY, make_pair

from qwen_ref import backend, ops
from qwen_ref.layers import RMSNorm
from qwen_ref.models import qwen3
from qwen_ref.verify import verify

YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}


def drop_q_norm(model, monkeypatch):
    model.model.layers[1].self_attn.q_norm.forward = lambda x: x


def one_plus_weight(model, monkeypatch):
    norm = model.model.layers[2].post_attention_layernorm
    norm.forward = lambda x: ops.rms_norm(x, 1 + norm.weight, norm.eps)


def skip_renormalisation(model, monkeypatch):
    model.model.layers[2].mlp.normalize = False


def shift_rope_by_one(model, monkeypatch):
    """Attention sees only differences of positions: no output but the tables themselves can show this one."""
    real = ops.rope_tables
    monkeypatch.setattr(ops, "rope_tables", lambda p, *rest: real(p + 1, *rest))


def drop_yarn_scale(model, monkeypatch):
    model.model.rotary_emb.scale = 1.0


def swap_kv_heads(model, monkeypatch):
    """kv head n % K instead of n // (N/K)."""
    monkeypatch.setattr(ops, "repeat_kv", lambda x, heads: x.repeat(1, heads // x.shape[1], 1, 1))


def swap_gate_and_up(model, monkeypatch):
    experts = model.model.layers[0].mlp.experts
    real = backend.moe_experts
    experts.forward = lambda x, w, e: real(x, experts.gate_up_proj.roll(experts.gate_up_proj.shape[1] // 2, 1),
                                           experts.down_proj, w, e)  # fmt: skip


def forget_the_residual(model, monkeypatch):
    block = model.model.layers[1]
    real = block.mlp.forward
    block.mlp.forward = lambda x: real(x) * (1 + 1e-3)


def attend_to_the_future(model, monkeypatch):
    monkeypatch.setattr(ops, "causal_mask", lambda t, s, d: torch.ones(1, 1, t, s, dtype=torch.bool))


FAULTS = [
    (drop_q_norm, qwen3.TINY, "model.layers.1.self_attn.q_norm"),
    (one_plus_weight, qwen3.TINY, "model.layers.2.post_attention_layernorm"),
    (skip_renormalisation, qwen3.TINY_MOE, "model.layers.2.mlp.experts"),
    (shift_rope_by_one, qwen3.TINY, "model.rotary_emb"),
    (drop_yarn_scale, {**qwen3.TINY, **YARN}, "model.rotary_emb"),
    (swap_kv_heads, qwen3.TINY, "model.layers.0.self_attn.o_proj"),
    (swap_gate_and_up, TINY["qwen2_moe"][1], "model.layers.0.mlp.experts"),
    (forget_the_residual, TINY["qwen2"][1], "model.layers.1.mlp"),
    (attend_to_the_future, TINY["qwen2"][1], "model.layers.0.self_attn.o_proj"),
]


@pytest.mark.parametrize("fault,config,guilty", FAULTS, ids=lambda x: getattr(x, "__name__", None))
def test_each_planted_fault_is_caught_and_named(fault, config, guilty, monkeypatch):
    model, _ = make_pair(config)
    assert verify(model, new_tokens=4).ok
    fault(model, monkeypatch)
    report = verify(model, new_tokens=4)
    assert not report.ok
    assert report.first_difference == guilty
    assert guilty in report.verdict and "DIFFERS" in report.table()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_pass_and_a_small_fault_does_not(dtype):
    model, _ = make_pair(qwen3.TINY, dtype)
    assert verify(model, new_tokens=4).ok
    model.model.layers[1].self_attn.k_norm = halved = RMSNorm(20, 1e-6).to(dtype).requires_grad_(False)
    halved.weight *= 0.9
    report = verify(model, new_tokens=4)  # the weights are copied over, so only what the module does differs
    assert report.ok
    halved.forward = lambda x: ops.rms_norm(x, halved.weight, 0.5)
    assert verify(model, new_tokens=4).first_difference == "model.layers.1.self_attn.k_norm"


def test_report_is_complete_and_serialisable():
    model, _ = make_pair(TINY["qwen3_moe"][1])
    report = verify(model, new_tokens=3)
    names = {row.name for row in report.rows}
    assert {"model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.1.mlp.up_proj", "model.norm", "lm_head"} <= names
    assert report.unmatched == []
    data = report.to_json()
    assert data["ok"] and data["greedy"] == (3, 3) and math.isfinite(data["rows"][0]["cosine"])
    assert "greedy tokens alike" in report.verdict
