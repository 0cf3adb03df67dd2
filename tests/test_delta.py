"""The formulas of Gated DeltaNet against loops over single numbers, transformers' functions, and each other."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from conftest import TINY, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_5 import modeling_qwen3_5 as hf

from qwen_ref import backend, ops, torch_ops

B, G, P, DK, DV = 2, 2, 6, 5, 7


def arguments(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64, decay: float = 1.0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = randn(B, tokens, G, DK), randn(B, tokens, G, DK), randn(B, tokens, P, DV)
    g = -decay * torch.rand(B, tokens, P, generator=generator, dtype=torch.float64)
    beta = torch.rand(B, tokens, P, generator=generator, dtype=torch.float64)
    return q, k, v, g, beta, randn(B, P, DK, DV).double()


def rule_by_hand(q, k, v, g, beta, state):
    """Every number by itself: no broadcasting, no repetition of heads."""
    out, memory = torch.zeros(v.shape, dtype=torch.float64), state.clone()
    for b in range(B):
        for j in range(P):
            group = j // (P // G)
            for t in range(v.shape[1]):
                kt = [float(x) / math.sqrt(sum(float(y) ** 2 for y in k[b, t, group]) + 1e-6) for x in k[b, t, group]]
                qt = [float(x) / math.sqrt(sum(float(y) ** 2 for y in q[b, t, group]) + 1e-6) / math.sqrt(DK) for x in q[b, t, group]]
                for d in range(DV):
                    column = [math.exp(float(g[b, t, j])) * float(memory[b, j, c, d]) for c in range(DK)]
                    error = float(beta[b, t, j]) * (float(v[b, t, j, d]) - sum(m * x for m, x in zip(column, kt, strict=True)))
                    column = [m + x * error for m, x in zip(column, kt, strict=True)]
                    out[b, t, j, d] = sum(m * x for m, x in zip(column, qt, strict=True))
                    memory[b, j, :, d] = torch.tensor(column, dtype=torch.float64)
    return out, memory


@pytest.mark.parametrize("rule", [ops.gated_delta_rule, ops.gated_delta_chunked, torch_ops.gated_delta_rule])
def test_the_rule_by_hand(rule):
    args = arguments(11)
    for mine, right in zip(rule(*args), rule_by_hand(*args), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (4, 4), (13, 4), (13, 64)])
def test_gradients_through_chunks_are_those_of_the_rule(tokens, chunk):
    """What `tools/train_tiny.py` trains by: the gradients of every argument, the first state's too."""
    found = []
    for rule in (lambda *args: ops.gated_delta_chunked(*args, chunk=chunk), ops.gated_delta_rule):
        args = [x.requires_grad_() for x in arguments(tokens)]
        out, state = rule(*args)
        weights = torch.Generator().manual_seed(9)
        loss = sum((x * torch.randn(x.shape, generator=weights, dtype=x.dtype)).sum() for x in (out, state))
        found.append(torch.autograd.grad(loss, args))
    for mine, right in zip(*found, strict=True):
        assert right.abs().max() > 1e-3
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 127, 128, 131])
def test_chunks_are_the_rule(tokens):
    args = arguments(tokens)
    for mine, right in zip(ops.gated_delta_chunked(*args), ops.gated_delta_rule(*args), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("decay", [0.0, 1.0, 40.0, 800.0])  # exp(-800 * 64) is zero, and its inverse infinite
def test_no_decay_overflows(decay):
    args = arguments(70, decay=decay, dtype=torch.float32)
    for mine, right in zip(ops.gated_delta_chunked(*args), ops.gated_delta_rule(*args), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine.double(), right.double(), rtol=1e-4, atol=1e-5)


@given(cuts=st.lists(st.integers(0, 90), max_size=4), seed=st.integers(0, 20), chunk=st.sampled_from([3, 16, 64]))
@settings(max_examples=30, deadline=None)
def test_any_split_is_the_whole(cuts, seed, chunk):
    *args, state = arguments(90, seed)
    whole, last = ops.gated_delta_rule(*args, state)
    parts, edges = [], [0, *sorted(cuts), 90]
    for start, end in pairwise(edges):
        out, state = ops.gated_delta_chunked(*(x[:, start:end] for x in args), state, chunk=chunk)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-11)


def test_the_pattern_is_the_rule_as_attention():
    q, k, v, g, beta, _ = arguments(37)
    pattern = ops.gated_delta_pattern(q, k, g, beta)
    assert pattern.shape == (B, P, 37, 37) and pattern.triu(1).abs().max() == 0
    out, _ = ops.gated_delta_rule(q, k, v, g, beta)
    torch.testing.assert_close(torch.einsum("bpts,bspd->btpd", pattern, v), out, rtol=1e-10, atol=1e-12)


def test_without_errors_to_write_the_state_only_decays():
    q, k, v, g, beta, state = arguments(9)
    _, last = ops.gated_delta_rule(q, k, v, g, beta * 0, state)
    torch.testing.assert_close(last, state * g.sum(1).exp()[..., None, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transformers_functions(dtype):
    q, k, v, g, beta, state = arguments(70, dtype=dtype)
    g, state = g.float(), state.float()
    beta = beta.to(dtype)
    keys = {"g": g, "beta": beta, "initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    for theirs, mine in ((hf.torch_recurrent_gated_delta_rule, ops.gated_delta_rule), (hf.torch_chunk_gated_delta_rule, ops.gated_delta_chunked)):
        (out, last), (expected, expected_last) = mine(q, k, v, g, beta, state), theirs(q, k, v, **keys)
        assert out.dtype == dtype and last.dtype == torch.float32
        torch.testing.assert_close(last, expected_last, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(out, expected, rtol=max(1e-4, torch.finfo(dtype).eps), atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_convolution_is_transformers_and_goes_on(dtype):
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 11, 6), (6, 4)))
    out, state = ops.causal_conv1d(x, weight)
    assert torch.equal(out, hf.causal_conv1d_fn(x.transpose(1, 2), weight, activation="silu").transpose(1, 2))
    parts, state = [], None
    for start, end in ((0, 1), (1, 1), (1, 3), (3, 11)):  # shorter than the width, empty, and longer
        part, state = ops.causal_conv1d(x[:, start:end], weight, state)
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), out)
    assert torch.equal(state, x.transpose(1, 2)[:, :, -4:])
    by_hand = torch.stack([sum(weight[:, i].double() * x[:, 5 - 3 + i].double() for i in range(4))])[0]
    torch.testing.assert_close(out[:, 5].double(), by_hand * by_hand.sigmoid(), rtol=4 * torch.finfo(dtype).eps, atol=1e-6 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_convolution_tap_by_tap(monkeypatch, dtype):
    """As where a CPU has no 16-bit products, some tokens at a time: one rounding before silu and one after it, and any split."""
    monkeypatch.setattr(torch_ops, "native", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(torch_ops, "BLOCK_BYTES", 4 * 37 * 5)  # five tokens
    for width, tokens in ((4, 23), (3, 1), (5, 2), (1, 7)):
        x, weight = torch.randn(2, tokens, 37).to(dtype), torch.randn(37, width).to(dtype)
        state = torch.randn(2, 37, width).to(dtype)
        for before in (None, state):
            out, after = torch_ops.causal_conv1d(x, weight, before)
            exact, inputs = ops.causal_conv1d(x.double(), weight.double(), None if before is None else before.double())
            assert torch.equal(after.double(), inputs) and after.is_contiguous() and out.dtype == dtype
            assert ((out.double() - exact).abs() <= 3 * torch.finfo(dtype).eps * (exact.abs() + 0.3)).all()
            first, held = torch_ops.causal_conv1d(x[:, :1], weight, before)
            rest, held = torch_ops.causal_conv1d(x[:, 1:], weight, held)
            assert torch.equal(torch.cat((first, rest), 1), out) and torch.equal(held, after)



@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_are_transformers_to_the_bit(dtype):
    generator = torch.Generator().manual_seed(4)
    x, gate, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5, 12), (3, 5, 12), (12,)))
    centred, gated = hf.Qwen3_5RMSNorm(12, eps=1e-6), hf.Qwen3_5RMSNormGated(12, eps=1e-6)
    for norm in (centred, gated):
        norm.weight.data = weight
    assert torch.equal(ops.zero_centred_rms_norm(x, weight, 1e-6), centred(x))
    assert torch.equal(ops.gated_rms_norm(x, gate, weight, 1e-6), gated(x, gate))
    sigmoid = ops.gated_rms_norm(x.double(), gate.double(), weight.double(), 1e-6, "sigmoid")
    torch.testing.assert_close(sigmoid, ops.rms_norm(x.double(), weight.double(), 1e-6) / (1 + (-gate.double()).exp()))


def test_grouped_norm_is_a_norm_per_group():
    x, weight = torch.randn(4, 3, 8), torch.randn(3, 8)
    whole = ops.zero_centred_rms_norm(x, weight, 1e-6)
    for i in range(3):
        assert torch.equal(whole[:, i], ops.zero_centred_rms_norm(x[:, i], weight[i], 1e-6))


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5"])
def test_the_states_are_transformers(name):
    """After a prompt and two steps, in bf16: the convolution's last W inputs, and a memory that stays fp32."""
    import transformers

    ours, theirs = make_pair(TINY[name][1], torch.bfloat16)
    ids = torch.randint(0, 211, (2, 9), generator=torch.Generator().manual_seed(6))
    cache, other = ours.make_cache(), transformers.DynamicCache(config=theirs.config)
    with torch.no_grad(), backend.use("eager"):
        for start, end in ((0, 7), (7, 8), (8, 9)):
            ours(ids[:, start:end], cache=cache)
            theirs(ids[:, start:end], past_key_values=other)
    layer = next(i for i, kind in enumerate(ours.config.layer_types) if kind == "linear_attention")
    window, memory = cache.layers[layer].state
    expected = other.get_recurrent_state(layer, state_idx=0)
    assert memory.dtype == expected.dtype == torch.float32
    assert torch.equal(window, other.get_conv_state(layer, state_idx=0))
    torch.testing.assert_close(memory, expected, rtol=1e-4, atol=1e-6)
