"""The kernels of the Gated DeltaNet: what the generic check does not ask of them, and the formula of the fused step."""

from __future__ import annotations

import json

import pytest
import torch
from test_kernels import needs_triton, python

from qwen_ref import ops
from qwen_ref.bench import check
from qwen_ref.bench.shapes import sizes
from qwen_ref.bench.subjects import Draw, subject


def rule(tokens: int, *, decay: float = 0.2, dtype: torch.dtype = torch.float16, batch: int = 1, seed: int = 0):
    """q, k, v, g, beta, state: one key head of 18 numbers, two value heads of 22."""
    torch.manual_seed(seed)
    q, k = (torch.randn(batch, tokens, 1, 18) + 0.3 for _ in range(2))
    g, beta = -decay * torch.rand(batch, tokens, 2), torch.rand(batch, tokens, 2)
    v, state = torch.randn(batch, tokens, 2, 22), torch.randn(batch, 2, 18, 22)
    return [*(x.to(dtype) for x in (q, k, v)), g, beta.to(dtype), state]


def step_arguments(dtype: torch.dtype = torch.float32, batch: int = 3, seed: int = 0):
    """Of `gated_delta_step`: 2 key heads of 6 numbers, 4 value heads of 10, 3 taps: 64 channels."""
    torch.manual_seed(seed)
    shapes = ((batch, 64), (batch, 64, 3), (64, 3), (batch, 4), (batch, 4), (4,), (4,), (batch, 4, 10), (10,))
    return [*(torch.randn(shape).to(dtype) for shape in shapes), 1e-6, torch.randn(batch, 4, 6, 10)]


# The formula


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_the_fused_step_is_its_definition_in_scalars(activation):
    """One sequence after the other and one value head after the other, in fp64, from the equations alone."""
    args = [x.double() if isinstance(x, torch.Tensor) else x for x in step_arguments()]
    mixed, window, taps, a, b, a_log, dt_bias, z, weight, eps, state = (x.clone() if isinstance(x, torch.Tensor) else x for x in args)
    out = ops.gated_delta_step(*args, activation)
    window_after, state_after = args[1], args[10]
    for n in range(3):
        inputs = torch.cat((window[n, :, 1:], mixed[n, :, None]), dim=1)
        torch.testing.assert_close(window_after[n], inputs)
        y = (inputs * taps).sum(1)
        y = y / (1 + torch.exp(-y))
        for head in range(4):
            group = head // 2
            q, k, v = y[6 * group :][:6], y[12 + 6 * group :][:6], y[24 + 10 * head :][:10]
            q, k = q / (q.square().sum() + 1e-6).sqrt() / 6**0.5, k / (k.square().sum() + 1e-6).sqrt()
            decay = torch.exp(-torch.exp(a_log[head]) * torch.log(1 + torch.exp(a[n, head] + dt_bias[head])))
            share = 1 / (1 + torch.exp(-b[n, head]))
            held = decay * state[n, head]
            held = held + share * torch.outer(k, v - k @ held)
            torch.testing.assert_close(state_after[n, head], held)
            o = q @ held
            gate = 1 / (1 + torch.exp(-z[n, head])) * (z[n, head] if activation == "silu" else 1)
            wanted = o / (o.square().mean() + eps).sqrt() * weight * gate
            torch.testing.assert_close(out[n, 10 * head :][:10], wanted)


def test_the_fused_step_gives_the_bits_of_its_parts_in_bf16():
    args = step_arguments(torch.bfloat16)
    mixed, window, taps, a, b, a_log, dt_bias, z, weight, eps, state = args
    conved, kept = ops.causal_conv1d(mixed[:, None], taps, window)
    q, k, v = conved.split((12, 12, 40), dim=-1)
    gates = ops.delta_gates(a[:, None], b[:, None], a_log, dt_bias)
    q, k, v = q.unflatten(-1, (2, 6)), k.unflatten(-1, (2, 6)), v.unflatten(-1, (4, 10))
    out, after = ops.gated_delta_rule(q, k, v, *gates, state)
    assert torch.equal(ops.gated_delta_step(*args), ops.gated_rms_norm(out[:, 0], z, weight, eps).flatten(1))
    assert torch.equal(window, kept) and torch.equal(state, after)  # where the old ones were


def test_what_a_step_costs_is_its_state():
    ((name, args),) = subject("gated_delta_step").real(sizes("Qwen/Qwen3.5-27B"), 8, Draw(0, torch.bfloat16, torch.device("meta")))
    assert name == "8 sequences, 16/48 heads"
    cost, state = subject("gated_delta_step").cost(*args), 2 * 4 * 8 * 48 * 128 * 128
    assert state < cost.bytes < 1.1 * state and cost.flops > 7 * 8 * 48 * 128 * 128


def test_the_cases_reach_every_path():
    cases = list(subject("gated_delta_rule").cases(sizes("tiny"), Draw(0, torch.float32, torch.device("cpu"))))
    lengths = {args[2].shape[1] for _, args in cases}
    assert {0, 1} < lengths and any(16 < n < 64 for n in lengths) and 65 in lengths and 128 in lengths
    assert any(float(args[3].min()) < -50 < -0.1 < float(args[3].max()) for _, args in cases if args[3].numel())
    assert check("gated_delta_rule", "eager", dtype=torch.bfloat16, seeds=1).ok


# The kernels, in the interpreter


RULE = """
import json, torch
from test_kernels_delta import rule
from qwen_kernels import gated_delta_rule as kernel
from qwen_ref import ops
def exact(args):
    return ops.gated_delta_rule(*(None if x is None else x.double() for x in args))
def off(ours, true):
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, true))
found = {}
"""


@needs_triton
def test_any_split_of_the_tokens_gives_the_same():
    """In parts, by either kernel, from state to state: the fp64 result of the whole, as near as the whole itself."""
    code = RULE + """
args = rule(150)
true = exact(args)
for split in ([150], [64, 86], [17, 1, 132], [100, 40, 10]):
    state, outs, start = args[5], [], 0
    for count in split:
        out, state = kernel.run(*(x[:, start:start + count] for x in args[:5]), state)
        outs.append(out)
        start += count
    found[str(split)] = off((torch.cat(outs, 1), state), true)
print(json.dumps(found))
"""
    found = json.loads(python(code, interpret=True))
    assert len(found) == 4 and max(found.values()) < 2**-10, found  # fp16 rounds by 2^-11, here several times


@needs_triton
def test_the_ends_of_decay_and_share():
    """g = 0 forgets nothing and beta = 1 writes all; g = -1e4 is exp's 0; beta = 0 leaves the state to decay alone."""
    code = RULE + """
q, k, v, g, beta, state = rule(70)
ends = {"nothing": (g * 0, beta), "all": (g * 0 - 1e4, beta), "some": (torch.where(g < -0.1, g * 1e5, g), beta),
        "one": (g, beta * 0 + 1), "zero": (g, beta * 0)}
for name, (decay, share) in ends.items():
    args = (q, k, v, decay, share, state)
    ours = kernel.run(*args)
    found[name] = off(ours, exact(args))
    if name == "zero":
        found["alone"] = float((ours[1] / (state * g.double().sum(1).exp()[..., None, None]) - 1).abs().max())
print(json.dumps(found))
"""
    found = json.loads(python(code, interpret=True))
    assert found.pop("alone") < 1e-5
    assert len(found) == 5 and max(found.values()) < 2**-10, found


@needs_triton
def test_every_launch_of_the_chunked_kernels_is_right():
    """All entries of the table, and all widths of a block of values, on one input; and the inverse by itself in fp32."""
    code = RULE + """
import triton, triton.language as tl
from qwen_kernels.gated_delta_rule import inverse
args = rule(66)
true, table = exact(args), dict(kernel.TUNED)
widths = []
block_of = kernel.block_of
kernel.block_of = lambda *sizes: widths.append(block_of(*sizes)) or widths[-1]
for programs in (1, 2, 132):
    for most in (16, 32, 64):
        for key, entry in table.items():
            if key[1][0] == "carry":
                kernel.TUNED[key] = {**entry, "MOST": most, "PROGRAMS": programs}
        found[f"{programs} {most}"] = off(kernel.run(*args), true)
@triton.jit
def invert(lower, out):
    square = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + square, inverse(tl.load(lower + square), 6))
torch.manual_seed(0)
keys = torch.nn.functional.normalize(torch.randn(64, 8).abs(), dim=-1)  # in 8 dimensions, all in one octant: much alike
for name, lower in (("alike", (keys @ keys.T).tril(-1)), ("same", torch.ones(64, 64).tril(-1)), ("zero", torch.zeros(64, 64))):
    out = torch.empty(64, 64)
    invert[(1,)](lower, out)
    found[name] = float((out - torch.linalg.inv(torch.eye(64).double() + lower.double())).abs().max())
print(json.dumps({"widths": sorted(set(widths)), **found}))
"""
    found = json.loads(python(code, interpret=True))
    assert found.pop("widths") == [16, 32]
    assert max(found.pop(name) for name in ("alike", "same", "zero")) < 3e-6
    assert len(found) == 9 and max(found.values()) < 2**-10, found


@needs_triton
def test_the_step_goes_on_from_what_the_rule_left():
    """A prefill by the chunked kernels, then tokens one by one through the fused step: the formulas over all tokens."""
    code = """
import torch
from qwen_kernels import causal_conv1d, gated_delta_rule, gated_delta_step, gated_rms_norm
from qwen_ref import ops
torch.manual_seed(0)
x, taps = torch.randn(2, 23, 64).half(), torch.randn(64, 3).half()
a, b, z = torch.randn(2, 23, 4).half(), torch.randn(2, 23, 4).half(), torch.randn(2, 23, 4, 10).half()
a_log, dt_bias, weight = torch.randn(4).half(), torch.randn(4).half(), torch.rand(10).half()
def prefill(conv, rule, norm, x, a, b, z, dtype=None):
    y, window = conv(x, taps.to(x.dtype), None)
    q, k, v = y.split((12, 12, 40), dim=-1)
    q, k, v = q.unflatten(-1, (2, 6)), k.unflatten(-1, (2, 6)), v.unflatten(-1, (4, 10))
    gates = ops.delta_gates(a, b, a_log.to(x.dtype), dt_bias.to(x.dtype))
    out, state = rule(q, k, v, *gates, None)
    return norm(out, z, weight.to(x.dtype), 1e-6, "silu").flatten(2), window, state
kernels = causal_conv1d.run, gated_delta_rule.run, gated_rms_norm.run
first, window, state = prefill(*kernels, *(t[:, :20] for t in (x, a, b, z)))
outs = [first]
for t in range(20, 23):
    out = gated_delta_step.run(x[:, t], window, taps, a[:, t], b[:, t], a_log, dt_bias, z[:, t], weight, 1e-6, state)
    outs.append(out[:, None])
ops_ = ops.causal_conv1d, ops.gated_delta_rule, ops.gated_rms_norm
true = prefill(*ops_, *(t.double() for t in (x, a, b, z)))
own = prefill(*ops_, x, a, b, z)
def off(ours):
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, true)]
print(*off((torch.cat(outs, 1), window, state)), *off(own))
"""
    out, window, state, own_out, _, own_state = map(float, python(code, interpret=True).split())
    assert window == 0 and out < 2 * own_out and state < 2 * own_state, (out, window, state, own_out, own_state)


@needs_triton
def test_the_launchers_refuse_what_they_would_compute_wrongly():
    code = """
import torch
from test_kernels_delta import rule, step_arguments
from qwen_kernels import causal_conv1d, gated_delta_rule, gated_delta_step, gated_rms_norm, norm_rope_write, zero_centred_rms_norm
from qwen_ref.errors import RequestError
q, k, v, g, beta, state = rule(3)
step = step_arguments()
x, w = torch.randn(2, 5, 6), torch.randn(6, 4)
for call in (
    lambda: gated_delta_rule.run(q.float(), k, v, g, beta),
    lambda: gated_delta_rule.run(q, k[:, :2], v, g, beta),
    lambda: gated_delta_rule.run(q, k, v[:, :, :1].expand(-1, -1, 2, -1), g[..., :1], beta),
    lambda: gated_delta_rule.run(q.expand(-1, -1, 3, -1), k.expand(-1, -1, 3, -1), v, g, beta),
    lambda: gated_delta_rule.run(q, k, v, g, beta, state.mT),
    lambda: gated_delta_rule.run(q, k, v, g.requires_grad_(), beta),
    lambda: gated_delta_step.run(step[0].half(), *step[1:]),
    lambda: gated_delta_step.run(step[0][:, :60], *step[1:]),
    lambda: gated_delta_step.run(*step[:5], torch.zeros(3), *step[6:]),
    lambda: gated_delta_step.run(*step, "relu"),
    lambda: gated_delta_step.run(*step[:10], step[10].double()),
    lambda: causal_conv1d.run(x, w[:5]),
    lambda: causal_conv1d.run(x, w.half()),
    lambda: causal_conv1d.run(x, w, torch.zeros(2, 6, 3)),
    lambda: gated_rms_norm.run(x, x, torch.ones(6), 1e-6, "relu"),
    lambda: gated_rms_norm.run(x, x[:1], torch.ones(6), 1e-6),
    lambda: zero_centred_rms_norm.run(x, torch.ones(4, 6), 1e-6),
):
    try:
        print("computed", call())
    except RequestError as error:
        print(error)
"""
    lines = python(code, interpret=True).splitlines()
    wanted = ("one dtype", "for v (B, T, P, Dv)", "for v (B, T, P, Dv)", "divide the value heads", "needs a state", "no backward",
              "in mixed's", "mixed of shape", "A_log of shape (4,)", "no activation 'relu'", "must be float32", "needs a weight (C, W)", "all of one dtype",
              "a state (B, C, W)", "silu or sigmoid", "a gate of x's shape", "one for each group")  # fmt: skip
    assert len(lines) == len(wanted), lines
    for line, text in zip(lines, wanted, strict=True):
        assert text in line, (line, text)
