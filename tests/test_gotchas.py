"""Each place where a re-implementation of a Qwen goes wrong unnoticed, planted on purpose: the comparison must see it.

Rounding orders are compared in bf16, to the bit; everything else in fp64, to ten digits. Each fault is first left out, to
show that the comparison holds, and then planted.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, casts_lifted, make_pair

from qwen_ref import backend, ops
from qwen_ref.models import qwen3, qwen3_5, qwen3_next
from qwen_ref.verify import capture

IDS = torch.randint(0, 211, (2, 23), generator=torch.Generator().manual_seed(1))


@contextmanager
def replaced(owner, name, value):
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


@contextmanager
def operation(name, wrong):
    backend.register(name, "wrong")(wrong)
    try:
        with backend.use({name: "wrong"}, strict=True):
            yield
    finally:
        op = backend.OPERATIONS[name]
        del op.implementations["wrong"]
        op.choose(None, False)


def far_apart(ours, theirs) -> bool:
    """Whether fp64 logits differ by more than rounding."""
    with torch.no_grad(), casts_lifted(theirs):
        mine, reference = ours(IDS), theirs(IDS).logits
    return not bool((mine - reference).abs().max() <= 1e-9 * reference.abs().max())


def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_by_mean(x, eps=1e-6):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


def unit_eps_outside(x, eps=1e-6):
    return x / ((x * x).sum(-1, keepdim=True).sqrt() + 1e-3)


def rows_in_flat_order(self, x):
    """q|k|v|z and b|a as if each were one block of rows, which is Qwen3.5's layout."""
    q, k, v, z = self.in_proj_qkvz(x).split([*self.parts, self.parts[2]], dim=-1)
    b, a = self.in_proj_ba(x).chunk(2, dim=-1)
    return torch.cat((q, k, v), -1), z.unflatten(-1, (-1, self.value_dim)), b, a


def gate_in_halves(self, x, rope, mask, cache):
    """Queries and gates as two halves of q_proj's rows instead of head by head."""
    q, gate = self.q_proj(x).chunk(2, dim=-1)
    q, gate = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, gate))
    q = self.q_norm(q).transpose(1, 2)
    k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
    v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
    q, k = backend.rope(q, *rope), backend.rope(k, *rope)
    out = backend.attention(q, k, v, mask).transpose(1, 2)
    return self.o_proj((out * torch.sigmoid(gate)).flatten(2))


def norm_after_rope(self, x, rope, mask, cache):
    heads = (*x.shape[:2], -1, self.head_dim)
    q, k, v = (p(x).view(heads).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
    q, k = self.q_norm(backend.rope(q, *rope)), self.k_norm(backend.rope(k, *rope))
    return self.o_proj(backend.attention(q, k, v, mask).transpose(1, 2).flatten(2))


def topk_of_logits(logits, k, normalize):
    weights, experts = logits.topk(k, dim=-1)
    return wide(weights).softmax(-1).to(logits.dtype), experts


def never(flag):
    return lambda logits, k, normalize: ops.router_topk(logits, k, flag)


def up_first(x, gate_up, down, weights, experts):
    return ops.moe_experts(x, gate_up.roll(gate_up.shape[1] // 2, 1), down, weights, experts)


def tiled_heads(q, k, heads):
    """Value head j beside key head j mod G, the order of GGUF files, instead of j // (P/G)."""
    q, k = (ops.l2_norm(x).repeat(1, 1, heads // x.shape[2], 1) for x in (q, k))
    return q * q.shape[-1] ** -0.5, k


def interleaved(x, cos, sin):
    """Rotation of the pairs (x_2j, x_2j+1), the convention of the Llama papers."""
    width = cos.shape[-1]
    order = torch.cat((torch.arange(0, width, 2), torch.arange(1, width, 2)))
    turned = ops.rope(x[..., :width][..., order], cos, sin)[..., order.argsort()]
    return torch.cat((turned, x[..., width:]), -1)


def rotate_the_end(x, cos, sin):
    rest = x.shape[-1] - cos.shape[-1]
    return torch.cat((x[..., :rest], ops.rope(x[..., rest:], cos, sin)), -1)


def late_bias(a, b, a_log, dt_bias):
    return -wide(a_log).exp() * (F.softplus(wide(a)) + dt_bias), b.sigmoid()


def no_silu(x, weight, state=None):
    inputs = torch.cat((x.new_zeros(x.shape[0], x.shape[2], weight.shape[1]), x.transpose(1, 2)), -1)
    return F.conv1d(inputs, weight[:, None], groups=weight.shape[0])[:, :, 1:].transpose(1, 2), inputs[:, :, -weight.shape[1] :]


def flipped_taps(x, weight, state=None):
    return ops.causal_conv1d(x, weight.flip(1), state)


def no_query_scale(q, k, heads):
    q, k = (ops.l2_norm(x).repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    return q, k


def sigmoid_gate(x, gate, weight, eps, activation="silu"):
    return ops.gated_rms_norm(x, gate, weight, eps, "sigmoid")


def gate_before_norm(x, gate, weight, eps, activation="silu"):
    return ops.rms_norm(x * F.silu(gate), weight, eps)


WRONG_NUMBERS = {  # fault -> (model_types it concerns, how to plant it)
    "2: q_norm and k_norm after the rotation": (["qwen3", "qwen3_moe"], lambda: replaced(qwen3.Attention, "forward", norm_after_rope)),
    "2, 11: query and gate rows as halves": (["qwen3_next"], lambda: replaced(qwen3_next.Attention, "forward", gate_in_halves)),
    "2, 11: query and gate rows as halves, 3.5": (["qwen3_5", "qwen3_5_moe"], lambda: replaced(qwen3_5.Attention, "forward", gate_in_halves)),
    "4: top-k of the logits, softmax over these": (["qwen2_moe"], lambda: operation("router_topk", topk_of_logits)),
    "6: top-k weights renormalised": (["qwen2_moe"], lambda: operation("router_topk", never(True))),
    "6: top-k weights not renormalised": (["qwen3_moe", "qwen3_next", "qwen3_5_moe"], lambda: operation("router_topk", never(False))),
    "8: up before gate": (["qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe"], lambda: operation("moe_experts", up_first)),
    "9: mean of squares in place of their sum": (["qwen3_next", "qwen3_5"], lambda: replaced(ops.delta, "l2_norm", unit_by_mean)),
    "9: eps outside the root": (["qwen3_next", "qwen3_5"], lambda: replaced(ops.delta, "l2_norm", unit_eps_outside)),
    "9: queries without 1/sqrt(Dk)": (["qwen3_next", "qwen3_5"], lambda: replaced(ops.delta, "unit_queries_keys", no_query_scale)),
    "9: dt_bias after softplus": (["qwen3_next"], lambda: replaced(ops, "delta_gates", late_bias)),
    "9: convolution without silu": (["qwen3_5"], lambda: operation("causal_conv1d", no_silu)),
    "9: convolution's taps reversed": (["qwen3_5"], lambda: operation("causal_conv1d", flipped_taps)),
    "9: sigmoid in the output gate": (["qwen3_next", "qwen3_5"], lambda: operation("gated_rms_norm", sigmoid_gate)),
    "9: gate before the norm": (["qwen3_next", "qwen3_5"], lambda: operation("gated_rms_norm", gate_before_norm)),
    "10: projection rows in flat order": (["qwen3_next"], lambda: replaced(qwen3_next.GatedDeltaNet, "project", rows_in_flat_order)),
    "10: value heads tiled over key heads": (["qwen3_next", "qwen3_5"], lambda: replaced(ops.delta, "unit_queries_keys", tiled_heads)),
    "weights without the 1 +": (["qwen3_next", "qwen3_5"], lambda: operation("zero_centred_rms_norm", ops.rms_norm)),
    "rotation of neighbours": (["qwen2", "qwen3", "qwen3_next", "qwen3_5"], lambda: operation("rope", interleaved)),
    "rotation of the last numbers of a head": (["qwen3_next", "qwen3_5"], lambda: operation("rope", rotate_the_end)),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG_NUMBERS)
def test_a_wrong_formula_is_seen(fault):
    names, plant = WRONG_NUMBERS[fault]
    for name in names:
        ours, theirs = make_pair(TINY[name][1], torch.float64)
        with backend.use("eager"):
            assert not far_apart(ours, theirs), name
            with plant():
                assert far_apart(ours, theirs), name
            assert not far_apart(ours, theirs), name


# ------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("name,change", [
    ("qwen3", {"head_dim": None}),  # 7: the class default is 128, not hidden / heads
    ("qwen3_moe", {"head_dim": None}),  # 7: and here it is hidden / heads
    ("qwen3_next", {"partial_rotary_factor": None}),  # 7: a quarter
    ("qwen3_moe", {"norm_topk_prob": None}),  # 6: the class default is False
    ("qwen3_next", {"norm_topk_prob": None}),  # 6: and here True
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),  # 19: from this layer on
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),  # 19: even layers below it
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),  # 19: all layers
    ("qwen3_5", {"rope_parameters": None, "rope_theta": None}),  # 7: theta 10,000 and a quarter of a head
])  # fmt: skip
def test_defaults_that_bite(name, change):
    config = {key: value for key, value in {**TINY[name][1], **change}.items() if value is not None}
    ours, theirs = make_pair(config, torch.float64)
    assert not far_apart(ours, theirs)


# ------------------------------------------------------------------------------------------------- rounding, in bf16


def norm_cast_last(x, weight, eps):
    """N1 rounded once, at the end: N2's order."""
    return (wide(x) * torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + eps) * wide(weight)).to(x.dtype)


def centred_cast_first(x, weight, eps):
    """N2 rounded before the weight: N1's order."""
    return ops.rms_norm(x, 1 + weight, eps)


def gated_in_activation_dtype(x, gate, weight, eps, activation="silu"):
    return ops.rms_norm(x, weight, eps) * F.silu(gate)


def gated_cast_last(x, gate, weight, eps, activation="silu"):
    return (norm_cast_last(wide(x), wide(weight), eps) * F.silu(wide(gate))).to(x.dtype)


def half_softmax(scores):
    """Written out: PyTorch's own softmax of bf16 is one of fp32, rounded at the end."""
    exponential = (scores - scores.amax(-1, keepdim=True)).exp()
    return exponential / exponential.sum(-1, keepdim=True)


def router_in_half(logits, k, normalize):
    weights, experts = logits.softmax(-1).topk(k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if normalize else weights), experts


def unrounded_weights(logits, k, normalize):
    """Router weights that stay fp32 until the expert's output is scaled."""
    return ops.router_topk(wide(logits), k, normalize)


def late_sum(x, gate_up, down, weights, experts):
    """Experts added up in fp32 and rounded once, which is grouped_mm's way."""
    return ops.moe_experts(x.float(), gate_up.float(), down.float(), weights.float(), experts).to(x.dtype)


def tables_in_fp32(x, cos, sin):
    """Rotation in fp32, as in the vision towers and Qwen 1."""
    return ops.rope(wide(x), wide(cos), wide(sin)).to(x.dtype)


def beta_in_fp32(a, b, a_log, dt_bias):
    return -wide(a_log).exp() * F.softplus(wide(a) + dt_bias), wide(b).sigmoid()


def gates_in_half(a, b, a_log, dt_bias):
    return (-a_log.exp() * F.softplus(a + dt_bias)).float(), b.sigmoid()


def silu_unrounded(x, weight, state=None):
    out, state = ops.causal_conv1d(wide(x), wide(weight), None if state is None else wide(state))
    return out.to(x.dtype), state.to(x.dtype)


WRONG_ROUNDING = {  # fault -> (model_type, module whose output must show it, how to plant it)
    "1: RMSNorm rounded after its weight": ("qwen3", "model.layers.0.input_layernorm", lambda: operation("rms_norm", norm_cast_last)),
    "1: zero-centred norm rounded before its weight": ("qwen3_5", "model.layers.0.input_layernorm", lambda: operation("zero_centred_rms_norm", centred_cast_first)),
    "1: gated norm's product in bf16": ("qwen3_5", "model.layers.0.linear_attn.norm", lambda: operation("gated_rms_norm", gated_in_activation_dtype)),
    "1: gated norm rounded once": ("qwen3_5", "model.layers.0.linear_attn.norm", lambda: operation("gated_rms_norm", gated_cast_last)),
    "3: rotation in fp32": ("qwen3", "model.layers.0.self_attn", lambda: operation("rope", tables_in_fp32)),
    "4: router probabilities in bf16": ("qwen3_moe", "model.layers.0.mlp", lambda: operation("router_topk", router_in_half)),
    "4: experts summed in fp32": ("qwen3_moe", "model.layers.0.mlp", lambda: operation("moe_experts", late_sum)),
    "4: router weights not rounded before the product": ("qwen3_moe", "model.layers.0.mlp", lambda: operation("router_topk", unrounded_weights)),
    "5: softmax in bf16": ("qwen3", "model.layers.0.self_attn", lambda: replaced(sys.modules["qwen_ref.ops.attention"], "attention_softmax", half_softmax)),
    "9: beta in fp32": ("qwen3_5", "model.layers.0.linear_attn", lambda: replaced(ops, "delta_gates", beta_in_fp32)),
    "9: decay in bf16": ("qwen3_5", "model.layers.0.linear_attn", lambda: replaced(ops, "delta_gates", gates_in_half)),
    "9: convolution and silu rounded once": ("qwen3_5", "model.layers.0.linear_attn", lambda: operation("causal_conv1d", silu_unrounded)),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG_ROUNDING)
def test_a_wrong_rounding_is_seen(fault):
    """The first block's module gets the same bf16 input on both sides. Without the fault its output is transformers' to the
    bit, or, behind the delta rule whose sums have another order, differs in a few numbers; with it, in far more."""
    name, path, plant = WRONG_ROUNDING[fault]
    ours, theirs = make_pair(TINY[name][1], torch.bfloat16)

    def unlike():
        with torch.no_grad(), backend.use("eager"), ExitStack() as stack:
            for context in planted:
                stack.enter_context(context())
            mine = capture(ours, IDS)[path].reshape(reference.shape)
        return float((mine != reference).float().mean())

    reference, planted = capture(theirs, IDS)[path], []
    without = unlike()
    planted = [plant]
    with_fault = unlike()
    exact = "linear_attn" not in path
    assert without == 0 if exact else without < 0.02, without
    assert with_fault > max(10 * without, 0.01), (without, with_fault)


def test_frequencies_survive_bf16():
    """3: model.to(bfloat16) must not round the frequencies, which are no buffer."""
    model, _ = make_pair(TINY["qwen3_5"][1])
    before = model.model.rotary_emb.frequencies.clone()
    assert torch.equal(model.to(torch.bfloat16).model.rotary_emb.frequencies, before)


def test_masked_rows_are_finite_and_logits_keep_the_dtype():
    """14, 16: a padding row is garbage that must not become NaN; logits are in the activation dtype."""
    for name in TINY:
        model, _ = make_pair(TINY[name][1], torch.bfloat16)
        positions = torch.arange(23).repeat(2, 1) - 9
        with torch.no_grad():
            logits = model(IDS, positions.clamp_min(-1))
        assert logits.isfinite().all() and logits.dtype == torch.bfloat16, name


def test_linear_layers_see_no_padding():
    """14: what stands in the padding reaches neither convolution nor state."""
    model, _ = make_pair(TINY["qwen3_next"][1], torch.float64)
    positions = (torch.arange(23).repeat(2, 1) - 9).clamp_min(-1)
    other = IDS.clone()
    other[:, :9] = 3
    with torch.no_grad():
        mine, same = model(IDS, positions)[:, 9:], model(other, positions)[:, 9:]
    torch.testing.assert_close(mine, same, rtol=1e-11, atol=1e-12)  # experts sum over more or fewer rows at once
