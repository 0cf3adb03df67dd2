"""The verifier is itself verified: faults are planted in the model, each must be found and its place named first.

Faults of quantised loading are planted in test_verify_quantised.py.
"""

from __future__ import annotations

import json
import math
import sys
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, make_pair, patch_formula

import qwen_ref as qr
from qwen_ref import backend, cli, layers, ops
from qwen_ref.cache import Cache, KVCache, SlidingKVCache
from qwen_ref.errors import CheckpointError, ConfigError, QwenRefError, RequestError
from qwen_ref.layers import RMSNorm
from qwen_ref.models import qwen2, qwen3
from qwen_ref.verify import verify, write_oracle
from qwen_ref.verify.levels import Logits, Tolerances, at_a_tie
from qwen_ref.verify.report import Check, Report, Row, Table

package = sys.modules["qwen_ref.verify"]  # qr.verify is the function

YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
SQUARE = {**qwen3.TINY, "head_dim": 8}  # q_proj is 48 x 48
QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE = qwen2.TINY, qwen2.TINY_MOE, qwen3.TINY, qwen3.TINY_MOE


def replace(monkeypatch, operation, wrong):
    """The formula itself is wrong, wherever the model calls it."""
    monkeypatch.setattr(backend, operation, wrong(getattr(backend, operation)))


def layer(model, i):
    return model.model.layers[i]


# ------------------------------------------------------------------------------------------- faults of the forward pass


def drop_q_norm(model, monkeypatch):
    layer(model, 1).self_attn.q_norm.forward = lambda x: x


def one_plus_weight(model, monkeypatch):
    norm = layer(model, 2).post_attention_layernorm
    norm.forward = lambda x: ops.rms_norm(x, 1 + norm.weight, norm.eps)


def wrong_epsilon(model, monkeypatch):
    layer(model, 1).input_layernorm.eps = 1e-3


def rms_without_root(model, monkeypatch):
    model.model.norm.forward = lambda x: model.model.norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6)


def shift_rope_by_one(model, monkeypatch):
    """Attention sees only differences of positions: no output but the tables themselves can show this one."""
    real = ops.rope_tables
    patch_formula(monkeypatch, "rope_tables", lambda p, *rest: real(p + 1, *rest))


def drop_yarn_scale(model, monkeypatch):
    model.model.rotary_emb.scale = 1.0


def plain_frequencies(model, monkeypatch):
    """YaRN's interpolation forgotten. Position 0 has the same cosines; the others differ."""
    model.model.rotary_emb.frequencies = ops.rope_frequencies(20, 1e4)


def interleaved_rope(model, monkeypatch):
    """Pairs (x_2j, x_2j+1) instead of (x_j, x_j+D/2)."""

    def wrong(real):
        def rope(x, cos, sin):
            half = x.shape[-1] // 2
            order = torch.arange(x.shape[-1]).view(2, half).T.flatten()  # j, j + D/2, ...
            back = torch.argsort(order)
            return real(x[..., back], cos, sin)[..., order]

        return rope

    replace(monkeypatch, "rope", wrong)


def swap_kv_heads(model, monkeypatch):
    """kv head n % K instead of n // (N/K)."""
    patch_formula(monkeypatch, "repeat_kv", lambda x, heads: x.repeat(1, heads // x.shape[1], 1, 1))


def unscaled_scores(model, monkeypatch):
    """1/sqrt(H/N) instead of 1/sqrt(D)."""
    real = ops.attention_scores
    patch_formula(monkeypatch, "attention_scores", lambda q, k, mask: real(q * (20 / 8) ** 0.5, k, mask))


def attend_to_the_future(model, monkeypatch):
    patch_formula(monkeypatch, "causal_mask", lambda t, s, d: torch.ones(1, 1, t, s, dtype=torch.bool))


def wider_window(model, monkeypatch):
    real = ops.visible
    patch_formula(monkeypatch, "visible", lambda q, k, window=None: real(q, k, window and window + 1))


def values_of_the_wrong_head(model, monkeypatch):
    attention = layer(model, 0).self_attn
    attention.v_proj.forward = lambda x: F.linear(x, attention.v_proj.weight).view(*x.shape[:2], 2, 20).flip(2).flatten(2)


def drop_k_bias(model, monkeypatch):
    k_proj = layer(model, 1).self_attn.k_proj
    k_proj.forward = lambda x: F.linear(x, k_proj.weight)


def merged_heads_in_the_wrong_order(model, monkeypatch):
    """(B, T, D, N) flattened instead of (B, T, N, D): o_proj is given the right numbers at the wrong places."""
    o_proj = layer(model, 2).self_attn.o_proj
    o_proj.forward = lambda z: F.linear(z.unflatten(-1, (-1, 20)).transpose(-1, -2).flatten(-2), o_proj.weight)


def gelu_for_silu(model, monkeypatch):
    replace(monkeypatch, "swiglu", lambda real: lambda gate, up: F.gelu(gate) * up)


def scaled_mlp(model, monkeypatch):
    mlp = layer(model, 1).mlp
    real = mlp.forward
    mlp.forward = lambda x: real(x) * (1 + 1e-3)


def residual_of_the_norm(model, monkeypatch):
    """norm(x) + mlp(norm(x)) instead of x + mlp(norm(x))."""
    block = layer(model, 1)

    def forward(x, rope, mask, cache):
        x = x + block.self_attn(block.input_layernorm(x), rope, mask, cache)
        normed = block.post_attention_layernorm(x)
        return normed + block.mlp(normed)

    block.forward = forward


def skip_renormalisation(model, monkeypatch):
    layer(model, 2).mlp.normalize = False


def renormalise_all_the_same(model, monkeypatch):
    layer(model, 0).mlp.normalize = True


def softmax_after_topk(model, monkeypatch):
    def wrong(real):
        def choose(logits, k, normalize):
            values, experts = logits.topk(k, dim=-1)
            return values.sigmoid(), experts

        return choose

    patch_formula(monkeypatch, "router_topk", wrong(None))
    monkeypatch.setitem(backend.router_topk.implementations, "eager", backend.Implementation("eager", lambda: wrong(None)))
    backend.router_topk.choose(None, False)


def one_expert_too_few(model, monkeypatch):
    """The least of the chosen experts exchanged for the next best, its weight kept."""

    def choose(logits, k, normalize):
        weights, experts = ops.router_topk(logits, k, normalize)
        return weights, torch.cat((experts[:, :-1], logits.topk(k + 1, dim=-1).indices[:, -1:]), dim=1)

    monkeypatch.setitem(backend.router_topk.implementations, "eager", backend.Implementation("eager", lambda: choose))
    backend.router_topk.choose(None, False)


def swap_gate_and_up(model, monkeypatch):
    experts = layer(model, 0).mlp.experts
    real = backend.moe_experts
    experts.forward = lambda x, w, e: real(x, experts.gate_up_proj.roll(experts.gate_up_proj.shape[1] // 2, 1),
                                           experts.down_proj, w, e)  # fmt: skip


def shared_gate_of_another_layer(model, monkeypatch):
    layer(model, 2).mlp.shared_expert_gate.forward = layer(model, 0).mlp.shared_expert_gate.forward


def scaled_head(model, monkeypatch):
    weight = model.lm_head.weight
    model.lm_head.forward = lambda x: F.linear(x, weight * 1.001)


FAULTS = [
    (drop_q_norm, QWEN3, "blocks.1.attn.hook_q_normed"),
    (one_plus_weight, QWEN3, "blocks.2.ln2.hook_out"),
    (wrong_epsilon, QWEN2, "blocks.1.ln1.hook_out"),
    (rms_without_root, QWEN2, "ln_final.hook_out"),
    (shift_rope_by_one, QWEN3, "rotary.hook_cos"),
    (drop_yarn_scale, {**QWEN3, **YARN}, "rotary.hook_cos"),
    (plain_frequencies, {**QWEN3, **YARN}, "rotary.hook_cos"),
    (interleaved_rope, QWEN3, "blocks.0.attn.hook_rot_q"),
    (swap_kv_heads, QWEN3, "blocks.0.attn.hook_pattern"),
    (unscaled_scores, QWEN3, "blocks.0.attn.hook_pattern"),
    (attend_to_the_future, QWEN2, "blocks.0.attn.hook_pattern"),
    (wider_window, {**QWEN3, **SLIDING}, "blocks.2.attn.hook_pattern"),  # the first layer that slides
    (values_of_the_wrong_head, QWEN3, "blocks.0.attn.hook_v"),
    (drop_k_bias, QWEN2, "blocks.1.attn.hook_k"),
    (merged_heads_in_the_wrong_order, QWEN3, "blocks.2.hook_attn_out"),
    (gelu_for_silu, QWEN2, "blocks.0.mlp.hook_post"),
    (scaled_mlp, QWEN2, "blocks.1.hook_mlp_out"),
    (residual_of_the_norm, QWEN3, "blocks.1.hook_resid_post"),
    (skip_renormalisation, QWEN3_MOE, "blocks.2.mlp.hook_topk_weights"),
    (renormalise_all_the_same, QWEN2_MOE, "blocks.0.mlp.hook_topk_weights"),
    (softmax_after_topk, QWEN3_MOE, "blocks.0.mlp.hook_topk_weights"),
    (one_expert_too_few, QWEN3_MOE, "blocks.0.mlp.hook_topk_idx"),
    (swap_gate_and_up, QWEN2_MOE, "blocks.0.mlp.hook_expert_out"),
    (shared_gate_of_another_layer, QWEN2_MOE, "blocks.2.mlp.hook_shared_gate"),
    (scaled_head, QWEN3, "hook_logits"),
]


@pytest.mark.parametrize("fault,config,guilty", FAULTS, ids=lambda x: getattr(x, "__name__", None))
def test_each_planted_fault_is_caught_and_named(fault, config, guilty, monkeypatch):
    model, _ = make_pair(config)
    assert verify(model, levels="L0,L2").ok
    fault(model, monkeypatch)
    report = verify(model, levels="L0,L2")
    monkeypatch.undo()
    backend.router_topk.choose(None, False)
    assert not report.ok
    assert report.first_difference == guilty
    assert f"first at {guilty} ({report.first_row.path})" in report.verdict
    assert report.first_row.path.startswith(("model.", "lm_head"))
    assert guilty in "\n".join(report.around_first_difference()) and "DIFFERS" in report.table(full=False)


# ------------------------------------------------------------------------------------------------- faults of the cache


def last_key_overwritten(monkeypatch):
    """The cache is one token behind: what comes next is written over the last key and value."""
    real = KVCache.append

    def append(self, k, v):
        keys, values = real(self, k, v)
        if keys.shape[2] > k.shape[2]:
            at = keys.shape[2] - k.shape[2]
            keys[:, :, at - 1], values[:, :, at - 1] = k[:, :, 0], v[:, :, 0]
        return keys, values

    monkeypatch.setattr(KVCache, "append", append)


def one_key_too_many_dropped(monkeypatch):
    """The sliding cache keeps w - 2 tokens; what the mask expects is filled with a copy of the oldest left."""
    real = SlidingKVCache.append

    def append(self, k, v):
        keys, values = (x.clone() for x in real(self, k, v))
        if keys.shape[2] == self.window - 1 + k.shape[2]:
            keys[:, :, 0], values[:, :, 0] = keys[:, :, 1], values[:, :, 1]
        return keys, values

    monkeypatch.setattr(SlidingKVCache, "append", append)


def one_key_too_many_dropped_and_not_replaced(monkeypatch):
    """As above, as a programmer would: torch then refuses the mask."""
    real = SlidingKVCache.append
    monkeypatch.setattr(SlidingKVCache, "append",
                        lambda self, k, v: tuple(x[:, :, 1:] if x.shape[2] > self.window else x for x in real(self, k, v)))


def positions_not_advanced(monkeypatch):
    monkeypatch.setattr(Cache, "next_positions", lambda self, count, device: torch.arange(count, device=device)[None])


def padding_attended(monkeypatch):
    """Padding hides nothing: position -1 is before every query."""
    def visible(q, k, window=None):
        seen = k[:, None, :] <= q[:, :, None]
        return (seen if window is None else seen & (k[:, None, :] > q[:, :, None] - window))[:, None]

    patch_formula(monkeypatch, "visible", visible)


def rows_of_a_batch_mixed(monkeypatch):
    """The second row is given the first row's rotation; alone it is right."""
    real = layers.RMSNorm.forward
    monkeypatch.setattr(layers.RMSNorm, "forward", lambda self, x: real(self, x - 1e-3 * (x.roll(1, 0) - x)))


CACHE_FAULTS = [
    (last_key_overwritten, QWEN3, "cached = full, at every split"),
    (one_key_too_many_dropped, {**QWEN3, **SLIDING}, "cached = full, at every split"),
    (one_key_too_many_dropped_and_not_replaced, {**QWEN2, **SLIDING}, "cached = full, at every split"),
    (positions_not_advanced, QWEN2_MOE, "cached = full, at every split"),
    (padding_attended, QWEN3_MOE, "left padding = none"),
    (rows_of_a_batch_mixed, QWEN2, "batch = single"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault,config,guilty", CACHE_FAULTS, ids=lambda x: getattr(x, "__name__", None))
def test_faults_of_cache_batch_and_padding_are_caught_by_L5_alone(fault, config, guilty, dtype, monkeypatch):
    model, _ = make_pair(config, dtype)
    assert verify(model, levels="L5").ok
    fault(monkeypatch)
    report = verify(model, levels="L2,L5")
    assert report.first_row is None  # a whole forward without a cache is right
    assert report.first_difference == f"L5 {guilty}"
    assert guilty in report.verdict and not report.ok
    check = next(check for check in report.checks if not check.ok)
    assert "split" in check.detail or "row" in check.detail or "Error" in check.detail


def test_a_fault_of_the_cache_changes_greedy_tokens(monkeypatch):
    model, _ = make_pair(QWEN3)
    assert verify(model, levels="L4", new_tokens=24).ok
    positions_not_advanced(monkeypatch)
    report = verify(model, levels="L4", new_tokens=24)
    assert report.first_difference == "L4 greedy tokens that differ" and "the oracle's" in report.verdict


# ----------------------------------------------------------------------------------------------- faults of the loader


def transposed(model):
    weight = layer(model, 1).self_attn.q_proj.weight
    weight.data = weight.data.T.contiguous()


def permuted_expert(model):
    weight = layer(model, 0).mlp.experts.down_proj
    weight.data = weight.data[[1, 0, *range(2, len(weight))]]


@pytest.mark.parametrize("config,fault,tensor,guilty", [
    (SQUARE, transposed, "model.layers.1.self_attn.q_proj.weight", "blocks.1.attn.hook_q"),
    (QWEN2_MOE, permuted_expert, "model.layers.0.mlp.experts.down_proj", "blocks.0.mlp.hook_expert_out"),
])  # fmt: skip
def test_weights_wrongly_loaded_are_named(config, fault, tensor, guilty, tmp_path, monkeypatch):
    model, _ = make_pair(config)
    model.save(tmp_path / "m")  # without a tokenizer
    assert verify(tmp_path / "m", levels="L0,L2").ok
    real = package.load_model

    def load_wrongly(*args, **kwargs):
        fault(loaded := real(*args, **kwargs))
        return loaded

    monkeypatch.setattr(package, "load_model", load_wrongly)
    report = verify(tmp_path / "m", levels="L0,L2")
    assert report.first_difference == guilty
    failed = [check for check in report.checks if not check.ok]
    assert [check.name for check in failed] == ["weights that differ in value"] and failed[0].detail == tensor
    assert verify(tmp_path / "m", levels="L0").first_difference == "L0 weights that differ in value"


@pytest.mark.parametrize("change,check", [
    ({"rope_theta": 5e4}, "config values that differ"), ({"rms_norm_eps": 1e-5}, "config values that differ"),
    ({"norm_topk_prob": False}, "config values that differ"), ({"mlp_only_layers": [0]}, "parameters only transformers has"),
    ({"moe_intermediate_size": 38}, "shapes that differ"),
])  # fmt: skip
def test_L0_names_what_the_two_sides_read_differently(change, check):
    from qwen_ref.verify.levels import structure

    _, theirs = make_pair(QWEN3_MOE)
    ours, _ = make_pair({**QWEN3_MOE, **change})
    failed = {c.name: c.detail for c in structure(ours, theirs) if not c.ok}
    assert check in failed
    assert next(iter(change)).removeprefix("rope_").removeprefix("mlp_only_")[:5] in failed["config values that differ"]


# ---------------------------------------------------------------------------------------------- each level, by itself


@pytest.mark.parametrize("operation,wrong,label", [
    ("rope", lambda x, cos, sin: ops.rope(x, cos, -sin), ""),
    ("rms_norm", lambda x, w, eps: (w * ops.rms_norm(x, torch.ones_like(w), eps)) * (1 + 1e-5), ""),
    ("attention", lambda q, k, v, mask=None: ops.attention(q, k, v, None), "window"),
    ("swiglu", lambda gate, up: gate.mul_(gate.sigmoid()) * up, ""),
    ("router_topk", lambda logits, k, n: tuple(x.flip(-1) for x in ops.router_topk(logits, k, n)), ""),
    ("moe_experts", lambda x, g, d, w, e: ops.moe_experts(F.pad(x[:, :-1], (0, 1)), g, d, w, e), ""),
    ("swiglu", lambda gate, up: (F.silu(gate) * up)[..., 1:], ""),
    ("rope", lambda x, cos, sin: x @ cos, ""),
    ("linear", lambda x, w, b=None: ops.linear(x, w), "with bias"),
    ("linear", lambda x, w, b=None: ops.linear(x[..., :-1], w[:, :-1], b), ""),
])  # fmt: skip
def test_L1_finds_a_wrong_implementation(operation, wrong, label, monkeypatch):
    """A sign, a small factor, an ignored mask, an argument changed in place, an order, a lost last column, a shape; what raises."""
    model, _ = make_pair({**QWEN2_MOE, **SLIDING})
    op = backend.OPERATIONS[operation]
    monkeypatch.setattr(op, "implementations", {**op.implementations, "wrong": backend.Implementation("wrong", lambda: wrong)})
    report = verify(model, levels="L1", backend={operation: "wrong"})
    failed = {check.name for check in report.checks if not check.ok}
    assert failed and all(name.startswith(f"{operation}[wrong] {label}") for name in failed)
    assert "seed" in next(check.detail for check in report.checks if not check.ok)


def test_L1_and_L5_take_a_right_implementation_and_L5_finds_a_wrong_one(monkeypatch):
    model, _ = make_pair(QWEN3_MOE, torch.bfloat16)
    assert verify(model, backend="torch", new_tokens=4).ok
    op = backend.swiglu
    monkeypatch.setattr(op, "implementations", {
        **op.implementations, "wrong": backend.Implementation("wrong", lambda: lambda gate, up: ops.swiglu(gate, up) * 1.1)})
    report = verify(model, levels="L5")
    assert report.first_difference == "L5 swiglu[wrong] = eager"
    with pytest.raises(RequestError, match="torch"):
        verify(model, levels="L2", backend={"swiglu": "torch"})


@pytest.mark.parametrize("name", TINY)
def test_L1_knows_every_operation_a_model_calls_and_L5_exchanges_no_other(name, monkeypatch):
    model, _ = make_pair(TINY[name][1])
    called, real = set(), backend.Operation.__call__
    with monkeypatch.context() as patch:
        patch.setattr(backend.Operation, "__call__", lambda op, *args: (called.add(op.name), real(op, *args))[1])
        cache = model.make_cache()
        model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5]]), cache=cache)  # more than an indexer lets a query read
        model(torch.tensor([[1]]), cache=cache)
    checks = [check.name for check in verify(model, levels="L1,L5").checks]
    assert called <= {check.split("[")[0] for check in checks if "arguments around" in check}
    exchanged = {check.split("[")[0] for check in checks if check.endswith("= eager")}
    assert exchanged & {"attention", "sparse_block_attention"} and exchanged <= called


def test_an_implementation_that_raises_fails_L5_with_its_words(monkeypatch):
    model, _ = make_pair(QWEN3)
    broken = backend.Implementation("broken", lambda: lambda gate, up: gate.view(-1, 7) * up)
    monkeypatch.setitem(backend.swiglu.implementations, "broken", broken)
    report = verify(model, levels="L5")
    assert report.first_difference == "L5 swiglu[broken] = eager" and "RuntimeError" in report.verdict


def test_a_chosen_implementation_runs_on_our_side_and_its_pattern_is_said_to_be_missing(monkeypatch):
    model, _ = make_pair(QWEN3)
    real, calls = backend.attention.implementations["torch"].run, []
    counted = backend.Implementation("torch", lambda: lambda *args: calls.append(1) or real(*args))
    monkeypatch.setitem(backend.attention.implementations, "torch", counted)
    report = verify(model, backend="torch", levels="L2")
    assert report.ok and len(calls) == 3 * 2  # layers, prompts
    assert report.backend["attention"] == "torch" and report.backend["rope"] == "eager"
    assert not any("pattern" in row.name for row in report.rows)
    assert "L2 of hook_pattern" in report.skipped and "never has it" in report.table()


def test_experts_chosen_at_a_tie_are_excused_and_followed():
    """In bfloat16 fused attention rounds otherwise, and some token's last expert is another: not a fault of anything after."""
    swaps = 0
    for seed in range(6):
        model, _ = make_pair(QWEN3_MOE, torch.bfloat16, seed=seed)
        report = verify(model, backend="torch", levels="L2,L3", prompts=[[(7 * i) % 211 for i in range(60)]])
        assert report.ok, report.verdict
        swaps += sum(row.cosine < 1 - 1e-9 for row in report.rows if row.name.endswith("topk_idx"))
    assert swaps  # or the test has shown nothing


def test_L3_fails_on_the_distribution_and_not_on_a_tie():
    torch.manual_seed(0)
    exact = torch.randn(1, 9, 50) * 4

    def failed(ours):
        logits = Logits(Tolerances(), torch.float32)
        logits.add(ours, exact, exact)
        return {check.name for check in logits.checks() if not check.ok}

    assert failed(exact + 1e-6 * torch.randn_like(exact)) == set()
    assert "KL max" in failed(exact + 1e-2 * torch.randn_like(exact))
    swapped = exact.clone()
    top = exact[0, 3].topk(2).indices
    swapped[0, 3, top] = swapped[0, 3, top.flip(0)]
    assert {"top-1 that differ", "logits max difference / scale", "KL max"} <= failed(swapped)
    tied, other = exact.clone(), exact.clone()
    tied[0, 3, top], other[0, 3, top] = torch.tensor([20.0, 20.0 - 1e-5]), torch.tensor([20.0 - 1e-5, 20.0])
    logits = Logits(Tolerances(), torch.float32)
    logits.add(other, tied, tied)
    assert [check.detail for check in logits.checks()][-2] == "8 of 9 equal, 1 at a tie" and all(c.ok for c in logits.checks())
    assert "KL mean" in failed(torch.full_like(exact, math.nan)) and "logits max difference / scale" in failed(exact * math.nan)


def test_a_tie_is_what_neither_side_can_know():
    """By hand: the oracle's two numbers 0.4 and 0.38 are known apart at an error of 0.005, and not at one of 0.0101."""
    oracles, ours = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    numbers, one = torch.tensor([[0.40, 0.38, 0.9]], dtype=torch.float64), torch.ones(1, 1)
    assert not at_a_tie(ours, oracles, numbers, 0.005 * one)
    assert at_a_tie(ours, oracles, numbers, 0.0101 * one)
    assert at_a_tie(oracles, oracles, numbers, 0 * one)  # nothing differs
    assert not at_a_tie(ours, oracles, numbers, math.nan * one) and not at_a_tie(ours, oracles, numbers * math.nan, one)


def swap_the_best_two(model):
    head = model.lm_head.weight

    def forward(x):
        logits = F.linear(x, head)
        best = logits.topk(2, dim=-1)
        return logits.scatter(-1, best.indices, best.values.flip(-1))

    model.lm_head.forward = forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_oracles_second_choice_is_no_tie_by_itself(dtype):
    """Two logits that have changed places lie within twice the error that moved them: that alone may not excuse them."""
    model, _ = make_pair(QWEN3, dtype)
    swap_the_best_two(model)
    checks = {check.name: check for check in verify(model, levels="L3,L4", new_tokens=16).checks}
    assert not checks["top-1 that differ"].ok and checks["top-5 that are missing"].ok
    assert checks["greedy tokens that differ"].value > 8


# --------------------------------------------------------------------------------------------------- what must pass


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_pass(name, dtype):
    model, _ = make_pair(TINY[name][1], dtype)
    levels = ("L0", "L1", "L2", "L3", "L4", "L5")
    # In fp16 one generated token reads block 1 in place of 4: their scores in fp32 are 14.826 and 14.834. What it then says is
    # another matter, and L4 does not follow the oracle's blocks.
    if name == "qwen4_exp" and dtype == torch.float16:
        levels = ("L0", "L1", "L2", "L3", "L5")
    report = verify(model, new_tokens=6, levels=",".join(levels))
    assert report.ok, report.verdict
    assert report.levels == levels and report.dtype == str(dtype)[6:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_small_fault_does_not(dtype):
    model, _ = make_pair(QWEN3, dtype)
    layer(model, 1).self_attn.k_norm = halved = RMSNorm(20, 1e-6).to(dtype).requires_grad_(False)
    halved.weight *= 0.9  # the weights are copied over, so only what the module does differs
    assert verify(model, levels="L2").ok
    halved.forward = lambda x: ops.rms_norm(x, halved.weight, 0.5)
    assert verify(model, levels="L2").first_difference == "blocks.1.attn.hook_k_normed"


@pytest.mark.parametrize("config", [{**QWEN2, **SLIDING, "tie_word_embeddings": True}, {**QWEN3, **YARN, **SLIDING}], ids=["tied", "yarn"])
def test_variants_pass_every_level(config):
    model, _ = make_pair(config)
    report = verify(model, new_tokens=6)
    assert report.ok and not report.skipped, report.verdict


def test_the_fp32_bound_is_near_what_rounding_costs():
    """Fused attention takes every sum in another order: it may use a half of the bound, but not a hundredth."""
    worst = 0.0
    for name in TINY:
        model, _ = make_pair(TINY[name][1])
        worst = max(worst, *(row.strain for row in verify(model, backend="torch", levels="L2").rows))
    assert 0.01 < worst < 0.5


# ------------------------------------------------------------------------------------------------- report and page


class Page(HTMLParser):
    VOID = ("meta", "line", "polyline")

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.tags, self.links = [], [], set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def reports():
    """(equal, differs), every level."""
    model, _ = make_pair(QWEN3_MOE)
    equal = verify(model, new_tokens=3, seed=4)
    layer(model, 1).self_attn.o_proj.forward = lambda z: torch.full((*z.shape[:2], 48), math.nan)
    return equal, verify(model, new_tokens=3)


def test_report_is_complete_and_serialisable(reports):
    for report in reports:
        data = json.loads(json.dumps(report.to_json(), allow_nan=False))
        assert data["ok"] == report.ok and data["verdict"] == report.verdict
        assert data["first_difference"] == report.first_difference
        assert {"python", "torch", "transformers", "qwen_ref", "hardware", "date"} <= data["environment"].keys()
        assert len(data["config_sha256"]) == 64 and data["dtype"] == "float32" and len(data["prompts"]) == 2
        assert all(isinstance(row["ok"], bool) and row["path"] for row in data["rows"] + [{"ok": True, "path": "x"}])
    equal, differs = reports
    names = {row.name: row for row in equal.rows}
    assert set(names) >= {"hook_embed", "blocks.0.mlp.hook_router_logits", "blocks.1.mlp.hook_pre", "ln_final.hook_out", "hook_logits"}
    assert names["blocks.2.attn.hook_k_normed"].path == "model.layers.2.self_attn.k_norm"
    assert {check.level for check in equal.checks} == {"L0", "L1", "L3", "L4", "L5"} and equal.to_json()["seed"] == 4
    assert equal.verdict.startswith("equal in L0-L5: ") and "4" in equal.verdict
    assert differs.first_difference == "blocks.1.hook_attn_out"
    assert next(row for row in differs.to_json()["rows"] if not row["ok"])["relative_l2"] is None  # NaN


def test_an_output_of_another_shape_differs():
    model, _ = make_pair(QWEN3)
    model.lm_head.forward = lambda x: F.linear(x, model.lm_head.weight)[..., :-1]
    report = verify(model, levels="L2")
    assert report.first_difference == "hook_logits" and report.first_row.relative_l2 == math.inf


def test_every_name_of_a_row_is_one_that_run_with_cache_takes(reports):
    model, _ = make_pair(QWEN3_MOE)
    names = [row.name for row in reports[0].rows if not row.name.startswith("rotary.") and "pattern" not in row.name]
    assert set(names) <= set(model.list_hooks())
    _, acts = model.run_with_cache(torch.tensor([[3, 1, 4]]), names)
    assert set(acts) == set(names)


def test_page_is_whole_and_names_the_first_difference(reports):
    _equal, differs = reports
    for report in reports:
        page = Page(report.html())
        assert page.open == [] and page.links == [] and "script" not in page.tags and {"svg", "table", "style"} <= page.tags
        text = " ".join(page.text)
        assert report.verdict in text and all(row.name in text for row in report.rows)
        assert "prefers-color-scheme: dark" in text and "nan" not in report.html().partition("<svg")[2].partition("</svg>")[0].replace(" nan</title>", "")
    assert "blocks.1.hook_attn_out (model.layers.1.self_attn)" in " ".join(Page(differs.html()).text)
    hostile = Report("<b>&", "t", "d", "c", {}, ("L0",), {"<i>": "</p>"}, [], [Check("L0", "<x>", 1)], [[1]], 0, "0")
    assert Page(hostile.html()).open == []


def test_the_compact_table_shows_the_worst_of_each_layer():
    rows = [Row("hook_embed", "e", 0, 0, 1, 1e-6), Row("blocks.0.a", "p", 1e-7, 1, 1, 1e-6), Row("blocks.0.b", "p", 5e-7, 1, 1, 1e-6),
            Row("blocks.1.a", "p", 0, 0, 1, 1e-6), Row("blocks.1.b", "q", math.nan, 0, 1, 1e-6), Row("blocks.1.c", "p", 2e-6, 1, 1, 1e-6)]  # fmt: skip
    table = Table(full=False)
    lines = [line for row in rows for line in table.add(row)] + table.finish()
    assert [line.split()[:3] for line in lines[1:]] == [["hook_embed", "0.00e+00", "1.0e-06"], ["block", "0", "b"], ["block", "1", "b"]]
    report = Report("m", "t", "d", "c", {}, ("L2",), {}, rows, [], [[1]], 0, "0")
    assert report.first_difference == "blocks.1.b" and "first at blocks.1.b (q)" in report.verdict


def test_rows_are_told_as_they_come_and_silence_is_possible(capsys):
    model, _ = make_pair(QWEN2)
    told = []
    report = verify(model, levels="L0,L2", progress=told.append)
    assert told == [*report.checks, *report.rows]
    verify(model, levels="L0,L2", progress=False)
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------- bundle, streaming, command


@pytest.fixture
def folder(tmp_path):
    model, _ = make_pair(QWEN3_MOE)
    model.save(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bundle_gives_the_same_rows_without_transformers(folder, tmp_path, dtype, monkeypatch):
    live = verify(folder, dtype=dtype, new_tokens=5)
    write_oracle(folder, tmp_path / "o.safetensors", dtype=dtype, new_tokens=5)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RequestError, match="not installed"):
        verify(folder)
    report = verify(folder, against=tmp_path / "o.safetensors")
    assert report.ok and report.rows == live.rows and "L0" in report.skipped
    assert [c for c in report.checks if c.level != "L0"] == [c for c in live.checks if c.level != "L0"]
    assert report.dtype == dtype and "o.safetensors" in report.against
    patch_formula(monkeypatch, "causal_mask", lambda t, s, d: torch.ones(1, 1, t, s, dtype=torch.bool))
    assert verify(folder, against=tmp_path / "o.safetensors", levels="L2").first_difference == "blocks.0.attn.hook_pattern"


def test_a_bundle_of_another_checkpoint_is_refused(folder, tmp_path):
    write_oracle(folder, tmp_path / "o", new_tokens=2)
    other, _ = make_pair(QWEN3_MOE, seed=1)
    with pytest.raises(CheckpointError, match="other weights"):
        verify(other, against=tmp_path / "o")
    with pytest.raises(RequestError, match="exists"):
        write_oracle(folder, tmp_path / "o", new_tokens=2)
    with pytest.raises(RequestError, match="prompts"):
        verify(folder, against=tmp_path / "o", prompts=[[1]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streaming_gives_the_same_rows_and_says_what_it_leaves_out(folder, dtype):
    whole, streamed = verify(folder, dtype=dtype, new_tokens=2), verify(folder, dtype=dtype, streaming=True)
    assert streamed.ok and [r.name for r in streamed.rows] == [r.name for r in whole.rows]
    for a, b in zip(streamed.rows, whole.rows, strict=True):
        assert (a.relative_l2, a.allowed, a.max_abs) == pytest.approx((b.relative_l2, b.allowed, b.max_abs), rel=1e-6), a.name
    assert streamed.skipped.keys() == {"L4", "L5"} and "L4" in streamed.verdict and streamed.levels == ("L0", "L1", "L2", "L3")
    assert [c for c in streamed.checks if c.level == "L3"] == [c for c in whole.checks if c.level == "L3"]


def test_a_tied_head_is_no_tensor_of_the_checkpoint_block_by_block_either(tmp_path):
    model, _ = make_pair({**QWEN2, "tie_word_embeddings": True})
    model.save(tmp_path / "m")
    write_oracle(tmp_path / "m", tmp_path / "o", new_tokens=2)
    assert verify(tmp_path / "m", against=tmp_path / "o", streaming=True, levels="L2,L3").ok


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_as_transformers_saves_it_without_the_width_of_a_head(name, streaming, tmp_path):
    """No official Qwen1.5, 2 or 2.5 names `head_dim`, and transformers' config of theirs has no such field."""
    config = {key: value for key, value in TINY[name][1].items() if key != "head_dim" or "linear_key_head_dim" in TINY[name][1]}
    make_pair(config)[1].save_pretrained(tmp_path / "m")
    if name in ("qwen2", "qwen2_moe"):
        assert "head_dim" not in json.loads((tmp_path / "m" / "config.json").read_text())
    report = verify(tmp_path / "m", levels="L0,L2,L3", prompts=[[3, 1, 4, 1, 5, 9]], streaming=streaming, progress=False)
    assert report.ok and report.rows, report.verdict


def test_a_model_too_large_streams_by_itself_and_says_so(folder, monkeypatch, capsys):
    monkeypatch.setattr(package.memory, "available", lambda device: 1000)
    assert "L5" in verify(folder, levels="L2-L5").skipped
    assert "block by block" in capsys.readouterr().err
    assert verify(folder, levels="L2", streaming=False).ok
    write_oracle(folder, folder.parent / "o")
    assert "block by block" in capsys.readouterr().err


def test_streaming_takes_another_implementation_and_finds_a_wrong_one(folder, monkeypatch):
    report = verify(folder, backend={"attention": "torch"}, levels="L2", streaming=True)
    assert report.ok and "L2 of hook_pattern" in report.skipped and any(row.relative_l2 > 0 for row in report.rows)
    wrong = backend.Implementation("wrong", lambda: lambda gate, up: ops.swiglu(gate, up) * 1.01)
    monkeypatch.setitem(backend.swiglu.implementations, "wrong", wrong)
    report = verify(folder, backend={"swiglu": "wrong"}, levels="L1-L2", streaming=True)
    assert report.first_difference == "blocks.1.mlp.hook_post"  # the only dense block
    assert {check.name.split("]")[0] for check in report.checks if not check.ok} == {"swiglu[wrong"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bundle_is_written_and_read_block_by_block(folder, tmp_path, dtype, monkeypatch):
    whole, streamed = tmp_path / "whole", tmp_path / "streamed"
    write_oracle(folder, whole, dtype=dtype, new_tokens=3)
    write_oracle(folder, streamed, dtype=dtype, streaming=True)
    one, other = (package.bundle.read(path) for path in (whole, streamed))
    assert one.about["fingerprint"] == other.about["fingerprint"] and other.greedy.tokens == []
    assert other.about["own_error"] == pytest.approx(one.about["own_error"], rel=1e-6)
    for i in range(2):
        for a, b in ((one.theirs(i), other.theirs(i)), (one.exact(i), other.exact(i))):
            assert list(a) == list(b) and all(torch.allclose(a[name], b[name], rtol=1e-5, atol=1e-6) for name in a)
    live = verify(folder, dtype=dtype, levels="L2,L3")
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = verify(folder, against=streamed)  # in memory against a file that was not
    assert report.ok and "written block by block" in report.skipped["L4"]
    report = verify(folder, against=whole, streaming=True)
    assert report.ok and report.levels == ("L1", "L2", "L3") and [row.name for row in report.rows] == [row.name for row in live.rows]
    swapped, _ = make_pair(QWEN3_MOE, seed=1)
    swapped.save(tmp_path / "other")
    with pytest.raises(CheckpointError, match="other weights"):
        verify(tmp_path / "other", against=whole, streaming=True)
    patch_formula(monkeypatch, "causal_mask", lambda t, s, d: torch.ones(1, 1, t, s, dtype=torch.bool))
    assert verify(folder, against=whole, streaming=True).first_difference == "blocks.0.attn.hook_pattern"


def test_needed_memory_counts_every_copy():
    model, _ = make_pair(QWEN3)
    n, needed = model.num_parameters(), package.memory.needed
    assert needed(model, torch.float32, True, True) == 8 * n and needed(model, torch.float32, False, False) == 4 * n
    assert needed(model, torch.bfloat16, True, True) == (2 + 2 + 4 + 4) * n and needed(model, torch.bfloat16, False, True) == 6 * n
    assert 1e6 < package.memory.available(torch.device("cpu")) < 1e14


def test_command_status_0_1_2(folder, tmp_path, monkeypatch, capsys):
    run = ["verify", str(folder), "--new-tokens", "3", "--levels", "L0-L3"]
    page, data = tmp_path / "r.html", tmp_path / "r.json"
    assert cli.main([*run, "--html", str(page), "--json", str(data)]) == 0
    out = capsys.readouterr().out
    assert "block 2" in out and "equal in L0, L1, L2, L3" in out.replace("L0-L3", "L0, L1, L2, L3") and "hook_embed" in out
    assert json.loads(data.read_text())["ok"] and Page(page.read_text()).open == []
    assert cli.main([*run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["levels"] == ["L0", "L1", "L2", "L3"]
    patch_formula(monkeypatch, "causal_mask", lambda t, s, d: torch.ones(1, 1, t, s, dtype=torch.bool))
    assert cli.main([*run, "--json", str(data)]) == 1
    assert json.loads(data.read_text())["first_difference"] == "blocks.0.attn.hook_pattern"
    out = capsys.readouterr().out
    assert "around the first difference" in out and "blocks.0.attn.hook_rot_k" in out
    assert cli.main([*run, "--full"]) == 1
    assert "blocks.2.mlp.hook_topk_idx" in capsys.readouterr().out
    for wrong in (["--levels", "L9"], ["--backend", "mine"], ["--against", str(tmp_path / "none")], ["--dtype", "int3"], ["--prompt", "x"],
                  ["--html", str(tmp_path / "no" / "r.html")], ["--device", "nowhere"]):  # fmt: skip
        assert cli.main([*run, *wrong]) == 2, wrong
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert cli.main(["verify", "--json", str(folder)]) == 2 and "model first" in capsys.readouterr().err


def test_command_writes_an_oracle_and_checks_against_it(folder, tmp_path, capsys):
    oracle = str(tmp_path / "o.safetensors")
    assert cli.main(["verify", str(folder), "--write-oracle", oracle, "--new-tokens", "3"]) == 0
    assert cli.main(["verify", str(folder), "--against", oracle, "--backend", "torch"]) == 0
    assert "transformers" in capsys.readouterr().out
    assert cli.main(["verify", "tiny", "--against", oracle]) == 2


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("arguments,message", [
    ({"levels": "L6"}, "no level 'L6'"), ({"levels": "L3-L1"}, "no level"), ({"levels": []}, "empty"), ({"levels": ("L2", "")}, "no level"),
    ({"backend": "cuda13"}, "cuda13"), ({"backend": {"softmax": "eager"}}, "softmax"), ({"backend": {"rope": "torch"}}, "rope"),
    ({"backend": {"sample": "eager"}}, "no model calls sample"),
    ({"prompts": [list(range(200)) * 3]}, "600 tokens"), ({"prompts": [[1] * 500]}, "new_tokens=64"), ({"prompts": [[]]}, "empty"),
    ({"prompts": []}, "at least one"), ({"prompts": [[211]]}, "id 211"), ({"prompts": [[-1]]}, "id -1"), ({"prompts": ["text"]}, "tokenizer"),
    ({"new_tokens": 0}, "new_tokens"), ({"against": "nowhere.bundle"}, "neither"), ({"streaming": True}, "in memory already"),
    ({"dtype": "bfloat16"}, "leave out dtype"), ({"dtype": "int3"}, "int3"),
])  # fmt: skip
def test_bad_requests_are_typed_errors(arguments, message):
    model, _ = make_pair(QWEN3)
    with pytest.raises((RequestError, CheckpointError, ConfigError), match=message):
        verify(model, **arguments)


def test_bad_folders_are_typed_errors(tmp_path):
    for path in (tmp_path, tmp_path / "none", qr.loading.ASSETS / "tiny" / "config.json"):
        with pytest.raises(QwenRefError):
            verify(path)


def test_a_prompt_of_one_token_and_a_model_of_one_layer():
    model, _ = make_pair({**QWEN3_MOE, "num_hidden_layers": 1, "mlp_only_layers": []})
    assert verify(model, prompts=[[5]], new_tokens=2).ok


def test_bundled_model_passes_as_a_user_calls_it():
    report = qr.verify("tiny-moe", dtype="bfloat16", prompts="Once upon a time", new_tokens=8)
    assert report.ok and len(report.prompts) == 1, report.verdict
