"""The operations in C++: against fp64 and their formulas, at odd sizes, and what happens where they cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qwen_ref import backend, ops, torch_ops
from qwen_ref.bench.check import check
from qwen_ref.cpp import library
from qwen_ref.cpp import operations as cpp
from qwen_ref.quant import blocked, packed
from qwen_ref.quant.gguf_blocks import BLOCK, GRIDS
from qwen_ref.quant.packed import Code4, Fp8, Gguf, Int4, Int8

COMPILED = cpp.supports_rounding(torch.device("cpu"), torch.bfloat16)
needs_compiler = pytest.mark.skipif(COMPILED is not None, reason=f"no compiled kernel: {COMPILED}")


@pytest.fixture(autouse=True)
def the_same_numbers_in_every_run():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random_int(bits, rows, columns, group, zero=True, scale=torch.float32, seed=0):
    """(layout, its values in fp64), the values made here and not by the layout."""
    g = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    low, high = (0, 16) if bits == 4 else (-128, 128)
    codes = torch.randint(low, high, (rows, columns), generator=g)
    scales = (torch.rand(rows, groups, generator=g) + 0.1).to(scale)
    zeros = torch.randint(low, high, (rows, groups), generator=g) if zero else None
    index = torch.arange(columns) // group
    offset = zeros[:, index] if zero else (8 if bits == 4 else 0)
    values = (codes - offset).double() * scales.double()[:, index]
    if bits == 8:
        return Int8(codes.to(torch.int8), scales, zeros.to(torch.int8) if zero else None, group), values
    if columns % 2:
        codes = torch.cat((codes, torch.full((rows, 1), 5)), dim=1)  # what stands in the odd half byte must not matter
    pairs = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    return Int4(pairs, scales, zeros.to(torch.uint8) if zero else None, group), values


def off(y, x, values, bias=None):
    """The largest error against fp64, relative to the sum of magnitudes: |x| |w|^T."""
    exact = x.double() @ values.T + (0 if bias is None else bias.double())
    bound = x.double().abs() @ values.abs().T + (0 if bias is None else bias.double().abs())
    return ((y.double() - exact).abs() / bound).max().item()


SHAPES = [  # tokens, rows, columns, group
    (1, 8, 256, 32), (1, 24, 1024, 128), (1, 16, 512, 512), (1, 37, 352, 32), (1, 9, 1000, 1000), (2, 40, 256, 64),
    (3, 5, 17, 17), (5, 7, 33, 33), (4, 21, 768, 256), (7, 13, 1536, 512), (6, 11, 320, 64), (263, 19, 384, 128), (1, 1, 1, 1),
    (1, 11, 896, 896), (1, 10, 416, 32), (520, 18, 288, 32), (8, 16, 48, 48),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_against_fp64(bits, shape):
    tokens, rows, columns, group = shape
    linear = cpp.linear_int4 if bits == 4 else cpp.linear_int8
    for zero in (False, True):
        weight, values = random_int(bits, rows, columns, group, zero)
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)) * 3
        bias = torch.randn(rows)
        # x is rounded to 2^-16 of the largest of 256 columns; the sums of fp32 add less than that.
        assert off(linear(x, weight), x, values) < 2e-4
        assert off(linear(x, weight, bias), x, values, bias) < 2e-4


@needs_compiler
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(37, 352, 32), (24, 1024, 128), (9, 768, 768), (21, 768, 256)], ids=str)
def test_a_few_tokens_are_each_as_if_alone(bits, shape):
    """To the bit, so that a batch and guesses do not change an answer. Panels, from 17 tokens on, add in another order."""
    rows, columns, group = shape
    linear = cpp.linear_int4 if bits == 4 else cpp.linear_int8
    x, bias = torch.randn(17, columns, generator=torch.Generator().manual_seed(1)).half(), torch.randn(rows)
    for zero in (False, True):
        weight, values = random_int(bits, rows, columns, group, zero)
        alone = torch.stack([linear(row, weight, bias) for row in x])
        for tokens in range(2, 17):
            assert torch.equal(linear(x[:tokens], weight, bias), alone[:tokens]), tokens
        assert off(linear(x, weight, bias), x, values, bias) < 1e-3  # the result is rounded to fp16


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_few_tokens_of_plain_and_stored_products_are_each_as_if_alone(dtype):
    x, bias = torch.randn(16, 168, generator=torch.Generator().manual_seed(1)).to(dtype), torch.randn(37).to(dtype)
    weight, other = torch.randn(37, 168).to(dtype), stored("fp8 5x7", 37, 168)
    for linear, w in ((cpp.linear, weight), (cpp.linear_stored, other)):
        alone = torch.stack([linear(row, w, bias) for row in x])
        for tokens in range(2, 17 if linear is cpp.linear or dtype != torch.bfloat16 else cpp.TILED):
            assert torch.equal(linear(x[:tokens], w, bias), alone[:tokens]), tokens


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 2, 24), (16, 8, 128), (5, 1, 40)])
@pytest.mark.parametrize("keys", [7, 31, 512, 515, 1030])
def test_a_few_queries_are_each_as_if_decoded(dtype, heads, kv_heads, dim, keys):
    g = torch.Generator().manual_seed(keys)
    q, k, v = (torch.randn(2, n, t, dim, generator=g).to(dtype) for n, t in ((heads, 7), (kv_heads, keys), (kv_heads, keys)))
    together = cpp.attention(q, k, v)
    for t in range(7):
        lengths = torch.full((2,), keys - 6 + t, dtype=torch.int32)
        assert torch.equal(together[:, :, t], cpp.attention_decode(q[:, :, t], k, v, lengths)), t


@needs_compiler
def test_only_x_is_rounded():
    """With x of few whole numbers nothing is lost: the codes, zeros and sums are exact, also at their largest."""
    for bits, worst in ((4, (15, 0)), (8, (-128, 127))):
        weight, _ = random_int(bits, 16, 512, 256, zero=True)
        code, zero = worst
        codes = torch.full((16, 512), code)
        filled = codes.to(torch.int8) if bits == 8 else torch.full((16, 256), code * 17, dtype=torch.uint8)
        weight = weight._replace(codes=filled, zero=torch.full_like(weight.zero, zero), scale=torch.ones(16, 2))
        for tokens in (1, 6):
            x = torch.full((tokens, 512), -1.0)
            y = (cpp.linear_int4 if bits == 4 else cpp.linear_int8)(x, weight)
            torch.testing.assert_close(y, torch.full((tokens, 16), -512.0 * (code - zero)), rtol=1e-6, atol=0)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 9])
def test_compiled_in_half_precision_is_at_least_as_close_as_the_formula(dtype, scale, tokens):
    for bits, linear, formula in ((4, cpp.linear_int4, packed.linear_int4), (8, cpp.linear_int8, packed.linear_int8)):
        weight, values = random_int(bits, 48, 512, 64, scale=scale)
        x, bias = torch.randn(2, tokens, 512).to(dtype), torch.randn(48).to(dtype)
        y = linear(x, weight, bias)
        assert y.dtype == dtype and y.shape == (2, tokens, 48)
        exact = x.double() @ values.T + bias.double()
        assert (y.double() - exact).norm() <= 1.05 * (formula(x, weight, bias).double() - exact).norm()


@needs_compiler
def test_strided_empty_and_outlying_inputs():
    weight, values = random_int(8, 24, 256, 64)
    x = torch.randn(256, 6).T  # not contiguous
    assert off(cpp.linear_int8(x, weight), x, values) < 2e-4
    assert cpp.linear_int8(torch.empty(0, 256), weight).shape == (0, 24)
    big = torch.randn(3, 256)
    big[1, 7] = 5e4  # a massive activation costs the columns beside it precision, no other token
    y = cpp.linear_int8(big, weight)
    assert off(y[[0, 2]], big[[0, 2]], values) < 2e-4
    rounding = 0.5 * 5e4 / 32767 * values.abs().sum(1)  # half a step of x, in every column
    assert ((y[1].double() - big[1].double() @ values.T).abs() <= 1.01 * rounding).all()
    zero = cpp.linear_int8(torch.zeros(2, 256), weight)
    assert torch.equal(zero, torch.zeros(2, 24))


@needs_compiler
def test_a_bias_with_gaps_is_read_where_it_is():
    weight, values = random_int(8, 24, 256, 64)
    x, bias = torch.randn(3, 256), torch.randn(48)[::2]
    assert off(cpp.linear_int8(x, weight, bias), x, values, bias) < 2e-4


@needs_compiler
@pytest.mark.parametrize("fields", [{"scale": (24, 3)}, {"codes": (24, 128)}, {"zero": (23, 4)}, {"bias": (23,)}], ids=str)
def test_shapes_that_do_not_fit_never_reach_the_kernel(fields):
    weight, _ = random_int(8, 24, 256, 64)
    bias = torch.randn(fields.get("bias", (24,)))
    for name in fields.keys() - {"bias"}:
        weight = weight._replace(**{name: getattr(weight, name)[: fields[name][0], : fields[name][1]]})
    with pytest.raises(RuntimeError):
        cpp.linear_int8(torch.randn(2, 256), weight, bias)


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(bad):
    weight, _ = random_int(4, 24, 256, 64)
    x = torch.randn(5, 256)
    x[2, 100] = bad
    y = cpp.linear_int4(x, weight)
    assert not y[2].isfinite().any() and y[[0, 1, 3, 4]].isfinite().all()


@needs_compiler
def test_groups_the_kernel_has_not_go_another_way():
    for bits, linear in ((4, cpp.linear_int4), (8, cpp.linear_int8)):
        for columns, group in ((96, 48), (100, 20), (900, 300), (64, 8)):
            weight, values = random_int(bits, 10, columns, group)
            x = torch.randn(3, columns)
            assert off(linear(x, weight), x, values) < 1e-5


@needs_compiler
def test_gradients_pass():
    weight, values = random_int(4, 12, 64, 32)
    x = torch.randn(3, 64, requires_grad=True)
    backend.linear_int4(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, values.sum(0).float().expand(3, -1), rtol=1e-5, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_and_rotation_round_where_the_formulas_do(dtype):
    x = torch.randn(2, 7, 3, 20).transpose(1, 2).to(dtype)  # (B, N, T, D), only the last axis contiguous
    weight = torch.randn(20).to(dtype)
    ours, formula = cpp.rms_norm(x, weight, 1e-6), ops.rms_norm(x, weight, 1e-6)
    eps = torch.finfo(dtype).eps
    # In fp32 the formula's own sum is as far off as ours; three roundings from fp64 is a bound, not luck.
    right = ops.rms_norm(x.double(), weight.double(), 1e-6) if dtype == torch.float32 else formula.double()
    assert ((ours.double() - right).abs() <= 2 * eps * right.abs()).all()
    assert (ours == formula).float().mean() > (0.5 if dtype == torch.float32 else 0.98)
    for tables in (1, 2):
        angles = torch.randn(tables, 7, 20)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        assert torch.equal(cpp.rope(x, cos, sin), ops.rope(x, cos, sin))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_joined_steps_are_the_formulas(dtype):
    """Rows with gaps, negative slots, and what lies around the slots untouched. Sums in fp64 round otherwise at most once."""
    x, residual, weight = torch.randn(3, 2, 83).to(dtype), torch.randn(3, 2, 166).to(dtype)[..., ::2], torch.randn(83).to(dtype)
    for ours, formula in zip(cpp.add_rms_norm(x, residual, weight, 1e-6), ops.add_rms_norm(x, residual, weight, 1e-6), strict=True):
        torch.testing.assert_close(ours, formula, rtol=2 * torch.finfo(dtype).eps, atol=0)
        assert (ours == formula).float().mean() > 0.98
    q, k, v = (y.unflatten(-1, (-1, 20)) for y in torch.randn(7, 200).to(dtype).split([120, 40, 40], -1))
    angles = torch.randn(7, 20)
    cos, sin, slots = angles.cos().to(dtype), angles.sin().to(dtype), torch.tensor([0, 14, -1, 7, 3, 9, 5])
    for weights in ((None, None), (weight[:20], weight[20:40])):
        mine, theirs = torch.full((2, 2, 3, 2, 9, 20), float("nan"), dtype=dtype)[..., :5, :]  # caches of 3 pages, with gaps
        ours = cpp.norm_rope_write(q, k, v, *weights, 1e-6, cos, sin, mine[0], mine[1], slots)
        formula = ops.norm_rope_write(q, k, v, *weights, 1e-6, cos, sin, theirs[0], theirs[1], slots)
        for a, b in ((ours, formula), (mine, theirs)):
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps, equal_nan=True)
            assert ((a == b) | a.isnan()).float().mean() > 0.98
    gate, up = torch.randn(4, 3, 66).to(dtype).chunk(2, -1)
    assert torch.equal(cpp.swiglu(gate, up), cpp.swiglu(gate.contiguous(), up.contiguous()))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_hybrids_have_rounds_where_the_formulas_do(dtype):
    """Centred norms, of rows and of groups, heads turned in part, gates with strides: the formulas' bits, nearly always."""
    def alike(a, b):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps, equal_nan=True)
        assert ((a == b) | a.isnan()).float().mean() > 0.97

    x, weights = torch.randn(3, 4, 83).to(dtype), torch.randn(4, 83).to(dtype)
    alike(cpp.zero_centred_rms_norm(x, weights, 1e-6), ops.zero_centred_rms_norm(x, weights, 1e-6))
    for a, b in zip(*(module.add_rms_norm(x, x.flip(0), weights[0], 1e-6, True) for module in (cpp, ops)), strict=True):
        alike(a, b)
    parts, angles = torch.randn(7, 16, 20).to(dtype), torch.randn(7, 6)
    q, k, v = parts[:, :12:2], parts[:, 12:14], parts[:, 14:]
    cos, sin, slots = angles.cos().to(dtype), angles.sin().to(dtype), torch.tensor([0, 14, -1, 7, 3, 9, 5])
    mine, theirs = torch.full((2, 2, 3, 2, 5, 20), float("nan"), dtype=dtype)
    for a, b in zip(*([module.norm_rope_write(q, k, v, weights[0, :20], weights[1, :20], 1e-6, cos, sin, *caches, slots, True), caches]
                      for module, caches in ((cpp, mine), (ops, theirs))), strict=True):  # fmt: skip
        alike(a, b)
    heads, gates, residual = torch.randn(2, 3, 4, 20).to(dtype), torch.randn(2, 3, 11, 20).to(dtype)[:, :, 1:9:2], torch.randn(2, 3, 4, 20).to(dtype)
    for gate in (gates, gates[..., :1]):
        for rest in (None, residual):
            alike(cpp.sigmoid_gate(heads, gate, rest), ops.sigmoid_gate(heads, gate, rest))


@needs_compiler
@pytest.mark.parametrize("threaded", [1, 3])
@pytest.mark.parametrize("batch, groups, heads, keys, width, taps", [(1, 16, 16, 128, 128, 4), (2, 3, 9, 14, 10, 4), (3, 1, 2, 33, 72, 1)])
def test_forty_tokens_of_a_gated_delta_net(threads, threaded, batch, groups, heads, keys, width, taps):
    """Step after step over the same memory: the state stays as near fp64's as the formula's own in fp32."""
    threads(threaded)
    channels = 2 * groups * keys + heads * width
    fixed = [torch.randn(channels, taps), torch.randn(heads), torch.randn(heads), torch.rand(width)]
    states = [(torch.randn(batch, channels, taps), torch.randn(batch, heads, keys, width))]
    states += [tuple(x.clone() for x in states[0]), tuple(x.double() for x in states[0])]
    for t in range(40):
        rows = torch.randn(batch, channels + 2 * heads + 2 * heads * width)
        mixed, a, b, z = rows.split([channels, heads, heads, 2 * heads * width], dim=-1)
        moving = [mixed, a, b, z.unflatten(-1, (heads, 2 * width))[..., width:]]
        outs = []
        for run, (window, state), wide in zip((cpp.gated_delta_step, ops.gated_delta_step, ops.gated_delta_step), states, (False, False, True), strict=True):
            (mixed, a, b, z), (taps_, a_log, dt_bias, weight) = ([x.double() if wide else x for x in xs] for xs in (moving, fixed))
            outs.append(run(mixed, window, taps_, a, b, a_log, dt_bias, z, weight, 1e-6, state, "silu" if t % 2 else "sigmoid"))
        ours, usual, exact = (x.double() for x in outs)
        assert (ours - exact).norm() <= 3 * (usual - exact).norm() + 1e-7 * exact.norm(), t
    assert torch.equal(states[0][0], states[1][0])  # the window is a copy of inputs
    ours, usual, exact = (state.double() for _, state in states)
    assert (ours - exact).norm() <= 2 * (usual - exact).norm()


@needs_compiler
@pytest.mark.parametrize("threaded", [1, 3])
@pytest.mark.parametrize("batch, groups, heads, keys, width, tokens", [(1, 4, 8, 128, 128, 130), (2, 3, 9, 14, 10, 40), (3, 1, 2, 33, 72, 7)])
def test_a_prompt_of_a_gated_delta_net(threads, threaded, batch, groups, heads, keys, width, tokens):
    """Views of one projection, with a state and without: as near fp64 as the formula, and any split gives the same bits."""
    threads(threaded)
    rows = torch.randn(batch, tokens, 2 * groups * keys + heads * width + 5)
    q, k, v, _ = rows.split([groups * keys, groups * keys, heads * width, 5], dim=-1)
    g, beta = ops.delta_gates(torch.randn(batch, tokens, heads), torch.randn(batch, tokens, heads), torch.rand(heads), torch.randn(heads))
    for state in (None, torch.randn(batch, heads, keys, width)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            args = [x.to(dtype).unflatten(-1, (-1, d)) for x, d in ((q, keys), (k, keys), (v, width))] + [g, beta.to(dtype)]
            before = None if state is None else state.clone()
            ours, usual = cpp.gated_delta_rule(*args, state), ops.gated_delta_rule(*args, state)
            exact = ops.gated_delta_rule(*(x.double() for x in args), None if state is None else state.double())
            assert ours[0].dtype == dtype and ours[1].dtype == torch.float32 and (state is None or torch.equal(state, before))
            for a, b, e in zip(ours, usual, exact, strict=True):
                assert (a.double() - e).norm() <= 1.05 * (b.double() - e).norm() + 2e-7 * e.norm()
            first, middle = [], state
            for some in (slice(0, 1), slice(1, tokens // 2), slice(tokens // 2, tokens)):
                out, middle = cpp.gated_delta_rule(*(x[:, some] for x in args), middle)
                first.append(out)
            assert torch.equal(torch.cat(first, dim=1), ours[0]) and torch.equal(middle, ours[1])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 50, 64, 4), (2, 3, 37, 4), (2, 9, 8, 1), (1, 1, 11, 3)], ids=str)
def test_convolution_and_norm_of_a_prompt_round_where_the_formulas_do(shape, dtype):
    batch, tokens, channels, taps = shape
    x, weight = torch.randn(batch, tokens, channels + 3)[..., :channels].to(dtype), torch.randn(channels, taps).to(dtype)
    eps = torch.finfo(dtype).eps

    def alike(a, b):
        torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps)
        assert dtype == torch.float32 or (a == b).float().mean() > 0.97

    for state in (None, torch.randn(batch, channels, taps).to(dtype)):
        (y, after), (wanted, kept) = cpp.causal_conv1d(x, weight, state), ops.causal_conv1d(x, weight, state)
        alike(y, wanted)
        assert torch.equal(after, kept) and y.dtype == after.dtype == dtype
        parts, middle = [], state
        for t in range(tokens):
            out, middle = cpp.causal_conv1d(x[:, t : t + 1], weight, middle)
            parts.append(out)
        assert torch.equal(torch.cat(parts, dim=1), y) and torch.equal(middle, after)
    heads, gates = torch.randn(batch, tokens, 3, channels).to(dtype), torch.randn(batch, tokens, 7, channels).to(dtype)[:, :, 1::2]
    for activation in ("silu", "sigmoid"):
        alike(cpp.gated_rms_norm(heads, gates, weight[:, 0], 1e-6, activation), ops.gated_rms_norm(heads, gates, weight[:, 0], 1e-6, activation))


@needs_compiler
def test_what_cpp_has_not_of_a_gated_delta_net_goes_another_way():
    q, k, v = torch.randn(3, 2, 5, 4, 6).unbind()
    g, beta, x = -torch.rand(2, 5, 4), torch.rand(2, 5, 4), torch.randn(2, 5, 6)
    wide = [t.double() for t in (q, k, v, g, beta)]
    for a, b in zip(cpp.gated_delta_rule(*wide), ops.gated_delta_rule(*wide), strict=True):
        torch.testing.assert_close(a, b)
    assert cpp.gated_delta_rule(q[:, :0], k[:, :0], v[:, :0], g[:, :0], beta[:, :0])[0].shape == (2, 0, 4, 6)
    assert cpp.causal_conv1d(x[:, :0], torch.randn(6, 3))[0].shape == (2, 0, 6)
    v.requires_grad_(), x.requires_grad_()
    (cpp.gated_delta_rule(q, k, v, g, beta)[0].sum() + cpp.causal_conv1d(x, torch.randn(6, 3))[0].sum()).backward()
    assert v.grad is not None and x.grad is not None
    mixed = cpp.gated_rms_norm(x.half(), x.half(), torch.ones(6), 1e-6)
    assert torch.equal(mixed, ops.gated_rms_norm(x.half(), x.half(), torch.ones(6), 1e-6))


@needs_compiler
def test_a_step_that_cpp_has_not_goes_to_the_formula():
    """An fp64 state, channels of another dtype, a window with gaps: written to all the same."""
    def arguments(dtype=torch.float32, state=torch.float32):
        torch.manual_seed(1)
        shapes = ((2, 64), (2, 64, 3), (64, 3), (2, 4), (2, 4), (4,), (4,), (2, 4, 10), (10,))
        return [*(torch.randn(shape, dtype=dtype) for shape in shapes), 1e-6, torch.randn(2, 4, 6, 10, dtype=state)]

    gaps, mixed_types = arguments(), arguments()
    gaps[1] = torch.randn(2, 64, 6)[..., ::2]
    mixed_types[7] = mixed_types[7].half()
    for args in (arguments(torch.float64, torch.float64), gaps, mixed_types):
        mine, theirs = ([x.clone() if isinstance(x, torch.Tensor) else x for x in args] for _ in range(2))
        if args is gaps:
            mine[1] = args[1]
        assert torch.equal(cpp.gated_delta_step(*mine), ops.gated_delta_step(*theirs))
        assert all(torch.equal(mine[i], theirs[i]) and not torch.equal(mine[i], arguments()[i].to(mine[i].dtype)) for i in (1, 10))


@needs_compiler
def test_a_column_that_is_not_there_is_an_error():
    for bad in (-1, 5):
        with pytest.raises(IndexError, match="there are 5"):
            cpp.take_columns(torch.randn(3, 5), torch.tensor([0, bad]))


@needs_compiler
def test_a_slot_outside_the_caches_is_an_error_and_nothing_is_written():
    q, k, v = torch.randn(4, 2, 8), torch.randn(4, 1, 8), torch.randn(4, 1, 8)
    caches = torch.zeros(2, 2, 1, 3, 8)
    with pytest.raises(IndexError, match="which have 2 x 3"):
        cpp.norm_rope_write(q, k, v, None, None, 0.0, q[:, 0], q[:, 0], *caches, torch.tensor([0, 1, 6, 2]))
    assert not caches.any()


@needs_compiler
@pytest.mark.parametrize("operation, dtype", [  # packed products refuse fp32: see test_compiled_against_fp64
    (op.name, dtype) for op in backend.OPERATIONS.values() if "cpp" in op.implementations
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if not (op.name.endswith(("int4", "int8")) and dtype.itemsize == 4)
])  # fmt: skip
def test_every_operation_passes_the_check(operation, dtype):
    """Odd, strided and empty inputs in poisoned memory against fp64: at most twice the formula's error in the same dtype."""
    report = check(operation, "cpp", dtype=dtype, device="cpu", model="tiny")
    assert report.ok, report.table()


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 16, 17])
def test_plain_products_of_few_tokens(tokens):
    """Every count of sums in registers, odd rows and columns; in bf16 the sums are fp32, so there is one rounding."""
    for rows, columns in ((1, 1), (19, 83), (8, 32), (40, 264)):
        x, weight, bias = torch.randn(tokens, columns), torch.randn(rows, columns), torch.randn(rows)
        bound = x.abs().double() @ weight.abs().double().T + bias.abs()
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        assert ((cpp.linear(x, weight, bias).double() - exact).abs() < 3e-7 * bound).all()
        x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
        exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        assert ((cpp.linear(x, weight, bias).double() - exact).abs() <= 2**-8 * exact.abs() + 3e-7 * bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_products_of_many_tokens_in_fp32_blocks(dtype, monkeypatch):
    monkeypatch.setattr(torch_ops, "native", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(torch_ops, "BLOCK_BYTES", 4 * 83 * 7)  # seven rows, the last block fewer
    x, weight, bias = torch.randn(3, 11, 83).to(dtype), torch.randn(40, 83).to(dtype), torch.randn(40).to(dtype)
    for b in (None, bias):
        y = torch_ops.linear(x, weight, b)
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        bound = x.abs().double() @ weight.abs().double().T + 3
        assert y.dtype == dtype and y.shape == (3, 11, 40)
        assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * bound).all()
    weight.requires_grad_()
    torch_ops.linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.flatten(0, 1).float().sum(0).to(dtype).expand(40, -1), rtol=0.02, atol=0.02)


@needs_compiler
def test_decode_reads_what_is_held_and_no_more():
    """Lengths of nothing, some and all, a window, NaN behind every end, and a length beyond the room."""
    q, k, v = torch.randn(4, 6, 16), torch.randn(4, 2, 50, 16), torch.randn(4, 2, 50, 16)
    lengths = torch.tensor([0, 1, 37, 50], dtype=torch.int32)
    for b, length in enumerate(lengths):
        k[b, :, length:] = v[b, :, length:] = float("nan")
    for window in (None, 1, 33, 90):
        exact = ops.attention_decode(q.double(), k.double(), v.double(), lengths, window)
        torch.testing.assert_close(cpp.attention_decode(q, k, v, lengths, window).double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(cpp.attention_decode(q, k, v, lengths + 9)[3], cpp.attention_decode(q, k, v, lengths)[3])


@needs_compiler
@pytest.mark.parametrize("count", [1, 2])
def test_a_copy_is_all_of_it_and_nothing_beside_it(threads, count):
    """In one part and in many, the last of them no whole page."""
    threads(count)
    for size in (0, 1, 4095, 4096, 4097, (1 << 21) + 4095, (1 << 21) + 4097):
        source = torch.randint(0, 256, (size,), dtype=torch.uint8)
        to = torch.full((size + 2,), 7, dtype=torch.uint8)
        library.call("copy", to[1:-1], source, size)
        assert torch.equal(to[1:-1], source) and to[0] == to[-1] == 7


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_joins_what_parts_of_a_long_context_give(threads, dtype):
    """Lengths at and around the ends of parts; a maximum in each of them, so that every part is weighed anew."""
    lengths = torch.tensor([1, 511, 512, 513, 1024, 1031, 0, 1900], dtype=torch.int32)
    q, k, v = torch.randn(8, 6, 24), torch.randn(8, 2, 1900, 24), torch.randn(8, 2, 1900, 24)
    k[:, :, 100::400] *= 4
    q, k, v = (x.to(dtype) for x in (q, k, v))
    for window in (None, 600):
        exact = ops.attention_decode(q.double(), k.double(), v.double(), lengths, window)
        results = []
        for count in (1, 5):
            threads(count)
            results.append(cpp.attention_decode(q, k, v, lengths, window))
        usual = ops.attention_decode(q, k, v, lengths, window).double()
        assert (results[0].double() - exact).norm() < 1.5 * (usual - exact).norm()
        assert torch.equal(*results)


@needs_compiler
def test_tensors_that_are_not_on_the_cpu_are_never_addressed():
    with pytest.raises(RuntimeError, match="on the CPU, but one is on meta"):
        cpp.rms_norm(torch.randn(2, 8), torch.ones(8, device="meta"), 1e-6)
    with pytest.raises(AttributeError, match="no operation 'nothing'"):
        library.call("nothing")


@needs_compiler
@pytest.mark.parametrize("which", ["x", "weight", "bias"])
def test_whatever_learns_goes_through_autograd(which):
    """Each argument by itself, of the products and the experts."""
    weight = random_int(8, 24, 64, 32)[0]
    parts = {"x": torch.randn(3, 64), "bias": torch.randn(24), "weight": torch.randn(24, 64)}
    parts[which].requires_grad_()
    cpp.linear(parts["x"], parts["weight"], parts["bias"]).sum().backward()
    assert parts[which].grad is not None
    if which != "weight":
        for run, packed_weight in ((cpp.linear_int8, weight), (cpp.linear_stored, stored("code4 float32", 24, 64))):
            parts[which].grad = None
            run(parts["x"], packed_weight, parts["bias"]).sum().backward()
            assert parts[which].grad is not None
    else:
        for index in range(2):
            stacks = [torch.randn(4, 2 * 8, 16), torch.randn(4, 16, 8)]
            stacks[index].requires_grad_()
            cpp.moe_experts(torch.randn(1, 16), *stacks, torch.rand(1, 2), torch.tensor([[0, 2]])).sum().backward()
            assert stacks[index].grad.abs().sum() > 0


HEADS = [  # batch, heads, kv heads, queries, keys, dim
    (1, 16, 8, 1, 77, 128), (2, 6, 2, 5, 9, 24), (1, 4, 4, 33, 33, 64), (1, 14, 2, 40, 90, 40), (2, 3, 1, 7, 7, 8),
    (1, 40, 2, 3, 64, 16), (2, 6, 3, 50, 300, 64), (1, 14, 2, 40, 401, 128), (1, 32, 1, 20, 20, 32), (2, 4, 2, 130, 131, 256),
]  # fmt: skip


def heads(shape, dtype, scale=2.0):
    """q, k, v as a model has them: heads and tokens exchanged, keys and values the beginning of a longer buffer."""
    batch, count, kv, queries, keys, dim = shape
    q = torch.randn(batch, queries, count, dim).transpose(1, 2)
    k, v = torch.randn(2, batch, kv, keys + 5, dim)[:, :, :, :keys]
    return [(x * scale).to(dtype) if i < 2 else x.to(dtype) for i, x in enumerate((q, k, v))]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_attention_is_closer_than_the_formula(shape, dtype):
    q, k, v = heads(shape, dtype)
    exact = ops.attention(q.double(), k.double(), v.double())
    y = cpp.attention(q, k, v)
    assert y.dtype == dtype and y.shape == exact.shape
    off = (y.double() - exact).abs()
    # Rounded once to its type; before that fp32's sums of a few hundred terms, in the scores (up to 100) as in the result. What
    # a matrix unit multiplies with the values is softmax in bfloat16.
    half = torch.finfo(dtype).eps / 2
    tiled = dtype == torch.bfloat16 and q.shape[2] >= cpp.TILED and library.has_tiles()
    weights = half * ops.attention(q.double(), k.double(), v.double().abs()) if tiled else 0
    assert (off <= half * exact.abs() + weights + 2e-5).all()
    if dtype != torch.float32:
        assert off.norm() < (ops.attention(q, k, v).double() - exact).norm()


@needs_compiler
def test_attention_at_the_extremes():
    q, k, v = heads((1, 4, 2, 40, 70, 16), torch.bfloat16, scale=60)  # scores of thousands: one key has all the weight
    exact = ops.attention(q.double(), k.double(), v.double())
    assert ((cpp.attention(q, k, v).double() - exact).norm() < 5e-3 * exact.norm())
    for bad in (float("nan"), float("inf"), float("-inf")):
        q, k, v = heads((1, 4, 2, 3, 50, 16), torch.bfloat16)
        k[0, 1, 47] = bad  # the first query that sees it is the first of all; kv head 0 does not
        y = cpp.attention(q, k, v)
        assert y[:, :2].isfinite().all() and (bad < 0 or y[:, 2:].isnan().any())
        k[0, 1, 47], k[0, 1, 49] = 0, bad  # now only the last query sees it
        assert cpp.attention(q, k, v)[:, :, :2].isfinite().all()


@needs_compiler
def test_attention_it_has_not_goes_another_way():
    torch.manual_seed(3)
    mask = torch.rand(1, 1, 5, 9) > 0.3
    mask[..., 0] = True
    for shape, seen in (((2, 6, 2, 5, 9, 24), mask), ((2, 6, 2, 5, 9, 20), None), ((1, 2, 2, 0, 3, 8), None)):
        q, k, v = heads(shape, torch.float32)
        torch.testing.assert_close(cpp.attention(q, k, v, seen), ops.attention(q, k, v, seen))
    q, k, v = heads((1, 2, 1, 3, 3, 8), torch.float32)
    q.requires_grad_(), v.requires_grad_()
    cpp.attention(q, k, v).sum().backward()
    torch.testing.assert_close(v.grad.sum(), torch.tensor(48.0))  # every query's weights sum to one
    assert q.grad is not None


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_swiglu_rounds_where_the_formula_does(dtype):
    special = torch.tensor([0.0, 100.0, -100.0, 88.5, -88.5, 3e4, -3e4, float("inf"), float("nan")])
    gate, up = torch.cat((torch.randn(4000) * 6, special)).to(dtype), torch.randn(4009).to(dtype)
    y, formula = cpp.swiglu(gate, up), ops.swiglu(gate, up)
    eps, right = torch.finfo(dtype).eps, ops.swiglu(gate.double(), up.double())
    # Twice rounded, and e^x to two units of fp32; below the type's normal numbers steps are absolute.
    near = (y.double() - right).abs() <= (eps + 4e-7) * right.abs() + torch.finfo(dtype).smallest_normal
    assert (near | ~right.isfinite())[:-2].all() and y[-2].isinf() and y[-1].isnan()
    assert (y == formula).float().mean() > (0.5 if dtype == torch.float32 else 0.99)
    torch.testing.assert_close(cpp.swiglu(gate[::2], up[::2]), formula[::2], equal_nan=True)
    assert cpp.swiglu(gate[:0], up[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocked_equals_the_formula(dtype, monkeypatch):
    """Every layout, in blocks of a few rows, the last one partial."""
    g = torch.Generator().manual_seed(0)
    floats = torch.randn(37, 64, generator=g)
    layouts = {
        "int4": random_int(4, 37, 64, 32)[0],
        "int8": random_int(8, 37, 64, 16)[0],
        "fp8": Fp8(floats.to(torch.float8_e4m3fn), torch.rand(3, 2, generator=g) + 0.5, (16, 48)),
        "fp8 whole": Fp8(floats.to(torch.float8_e4m3fn), torch.rand(1, 1, generator=g) + 0.5, (37, 64)),
        "fp8 small": Fp8(floats.to(torch.float8_e4m3fn), torch.rand(19, 4, generator=g) + 0.5, (2, 16)),
        "code4": Code4(torch.randint(0, 256, (37, 32), dtype=torch.uint8), torch.rand(37, 4), torch.randn(16), 16),
    }
    monkeypatch.setattr(blocked, "BLOCK_BYTES", 64 * 4 * 5)
    x, bias = torch.randn(2, 3, 64, generator=g).to(dtype), torch.randn(37, generator=g).to(dtype)
    for name, weight in layouts.items():
        formula = getattr(packed, f"linear_{name.split()[0]}")
        values = weight.dequantize(torch.float64, 64)
        for b in (None, bias):
            y = blocked.linear_blocked(x, weight, b)
            assert y.dtype == dtype
            exact = x.double() @ values.T + (0 if b is None else b.double())
            allowed = 1.05 * (formula(x, weight, b).double() - exact).norm() + 1e-6 * exact.norm()
            assert (y.double() - exact).norm() <= allowed, name


@pytest.mark.parametrize("length", [23, 25, 48])
def test_blocked_refuses_a_bias_of_another_length(length, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_BYTES", 4096)
    weight, _ = random_int(8, 24, 256, 64)
    with pytest.raises(RuntimeError):
        blocked.linear_blocked(torch.randn(2, 256), weight, torch.zeros(length))


@pytest.mark.parametrize("kind", [Int8, Fp8])
def test_blocked_holds_one_block(monkeypatch, kind):
    """No dequantised block is larger than BLOCK_BYTES, where one scale is for the whole matrix neither."""
    seen = []
    real = kind.dequantize

    def watched(self, dtype=torch.float32, columns=None):
        seen.append(self.codes.numel() * dtype.itemsize)
        return real(self, dtype, columns)

    monkeypatch.setattr(kind, "dequantize", watched)
    monkeypatch.setattr(blocked, "BLOCK_BYTES", 4096)
    weight, values = random_int(8, 100, 96, 32)
    if kind is Fp8:
        codes = torch.randn(100, 96).to(torch.float8_e4m3fn)
        weight, values = Fp8(codes, torch.tensor([[0.3]]), (100, 96)), codes.double() * float(torch.tensor(0.3))
    x = torch.randn(2, 96)
    assert off(blocked.linear_blocked(x, weight), x, values) < 1e-5
    assert len(seen) > 5 and max(seen) <= 4096


@pytest.mark.parametrize("kinds", ["int4", "int8", "mixed"])
def test_experts(kinds):
    """One expert at a time, also where the two stacks have different layouts, against plain dense experts in fp64."""
    E, H, I, M, k = 5, 64, 96, 11, 2
    up_bits, down_bits = {"int4": (4, 4), "int8": (8, 8), "mixed": (4, 8)}[kinds]

    def stack(bits, rows, columns, group):
        made = [random_int(bits, rows, columns, group, seed=e) for e in range(E)]
        first = made[0][0]
        fields = {name: torch.stack([getattr(m[0], name) for m in made]) for name in ("codes", "scale", "zero")}
        return first._replace(**fields), torch.stack([m[1] for m in made])

    gate_up, wide_up = stack(up_bits, 2 * I, H, 32)
    down, wide_down = stack(down_bits, H, I, 32)
    x, weights = torch.randn(M, H) * 0.05, torch.rand(M, k)
    experts = torch.stack([torch.randperm(E)[:k] for _ in range(M)])
    exact = torch.zeros(M, H, dtype=torch.float64)
    for m in range(M):
        for j in range(k):
            gate, up = (wide_up[experts[m, j]] @ x[m].double()).chunk(2)
            exact[m] += weights[m, j].double() * (wide_down[experts[m, j]] @ (gate * gate.sigmoid() * up))
    operation = backend.OPERATIONS[f"moe_{'int4' if up_bits == 4 else 'int8'}"]
    for name, implementation in operation.implementations.items():
        if name == "triton" or (name == "cpp" and COMPILED is not None):
            continue
        y = implementation.run(x, gate_up, down, weights, experts)
        assert (y.double() - exact).norm() < 3e-4 * exact.norm(), name


def stored(layout, rows, columns, seed=0):
    """A matrix of random bits, of scales that are numbers."""
    g = torch.Generator().manual_seed(seed)

    def bits(*shape):
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)

    kind, _, detail = layout.partition(" ")
    if kind == "gguf":
        elements, size = BLOCK[detail]
        blocks = bits(rows, columns // elements, size)
        for at in HALVES[detail]:  # fp16 numbers around one
            blocks[..., at + 1] = blocks[..., at + 1] % 4 + 0x3A
        if detail == "IQ1_M":  # whose bits lie apart
            blocks[..., 55] = blocks[..., 55] % 16 + 0x30
        return Gguf(blocks.flatten(1), detail)
    if kind in ("int4", "int8"):
        group, zero = int(detail.split()[0]), detail.endswith("zeros")
        return random_int(int(kind[-1]), rows, columns, group, zero, seed=seed)[0]
    if kind == "fp8":
        high, wide = map(int, detail.split("x"))
        codes = torch.where(bits(rows, columns) % 128 == 127, 0, bits(rows, columns) & 0x7E).to(torch.uint8)  # no NaN
        scale = torch.rand(-(-rows // high), -(-columns // wide), generator=g) + 0.5
        return Fp8(codes.view(torch.float8_e4m3fn), scale, (high, wide))
    scale = torch.rand(rows, -(-columns // 16), generator=g) + 0.5
    scale = scale.to(getattr(torch, detail))
    return Code4(bits(rows, -(-columns // 2)), scale, torch.randn(16, generator=g), 16)


HALVES = {"Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2),
          "Q6_K": (208,), "IQ4_XS": (0,), **dict.fromkeys(GRIDS, (0,)), "IQ1_M": ()}  # fmt: skip
STORED = [*(f"gguf {kind}" for kind in HALVES), "fp8 128x128", "fp8 5x7", "fp8 1x512", "fp8 400x512", "fp8 1x40",
          "code4 float32", "code4 bfloat16", "code4 float8_e4m3fn", "code4 float8_e8m0fnu", "int4 32", "int4 17 zeros", "int4 128 zeros", "int8 512", "int8 64 zeros", "int8 100 zeros"]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("layout", STORED)
def test_rows_of_other_layouts_are_the_formulas_to_the_last_bit(layout):
    for rows, columns in ((37, 512), (1, 256), *(((11, 83),) if "gguf" not in layout else ())):
        weight = stored(layout, rows, columns)
        exact = weight.dequantize(torch.float32, columns)
        assert exact.isfinite().all()
        cells = cpp._stored(weight, columns)
        for first, last in ((0, rows), (rows // 3, rows // 2), (rows - 1, rows)):
            assert torch.equal(cpp._rows_of(cells, weight, first, last, columns, torch.float32), exact[first:last])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_every_scale_of_eight_bits(dtype):
    scale = torch.arange(256, dtype=torch.uint8).view(dtype)[:, None]
    weight = Code4(torch.full((256, 4), 0x11, dtype=torch.uint8), scale, torch.ones(16), 16)
    values = cpp._rows_of(cpp._stored(weight, 8), weight, 0, 256, 8, torch.float32)
    torch.testing.assert_close(values, scale.float().expand(-1, 8), rtol=0, atol=0, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("layout", STORED)
@pytest.mark.parametrize("tokens", [1, 3, 16, 17])
def test_products_of_other_layouts(layout, tokens):
    weight, columns = stored(layout, 37, 512), 512
    values = weight.dequantize(torch.float64, columns)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, bias = torch.randn(tokens, columns).to(dtype) / 64, torch.randn(37).to(dtype)
        for b in (None, bias):
            y = cpp.linear_stored(x, weight, b)
            exact = torch.nn.functional.linear(x.double(), values, None if b is None else b.double())
            bound = x.double().abs() @ values.abs().T + 1
            assert y.dtype == dtype
            half = torch.finfo(dtype).eps / 2
            many = tokens > 16 or (tokens >= cpp.TILED and dtype is torch.bfloat16)
            weights = half if many and torch_ops.native(dtype) and dtype.itemsize < 4 else 0  # then rounded in blocks
            assert ((y.double() - exact).abs() <= half * exact.abs() + (weights + 1e-6) * bound).all()
    with pytest.raises(RuntimeError):
        cpp.linear_stored(torch.randn(tokens, columns + 32), weight)


@needs_compiler
@pytest.mark.parametrize("layout", STORED)
@pytest.mark.parametrize("threaded", [1, 3])
def test_a_matrix_unit_multiplies_what_the_formula_multiplies(threads, layout, threaded):
    """Weights and x are the formula's bfloat16 numbers, so that only the order of sums is another."""
    if not library.has_tiles():
        pytest.skip("this CPU has no matrix unit (AMX), or it is not granted")
    threads(threaded)
    shapes = [(8, 37, 512), (17, 32, 256), (520, 70, 512)] + ([(33, 11, 83)] if "gguf" not in layout else [])
    for tokens, rows, columns in shapes:
        weight, x, bias = stored(layout, rows, columns), torch.randn(tokens, columns).bfloat16(), torch.randn(rows).bfloat16()
        values = weight.dequantize(torch.bfloat16, columns).double()
        for b in (None, bias):
            y = cpp.linear_stored(x.view(1, tokens, columns), weight, b)
            assert y.shape == (1, tokens, rows) and y.dtype == torch.bfloat16
            exact = torch.nn.functional.linear(x.double(), values, None if b is None else b.double())
            sums = x.double().abs() @ values.abs().T
            assert ((y[0].double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6 * sums).all()


@needs_compiler
def test_a_matrix_unit_keeps_what_is_not_finite_in_its_row_and_token():
    weight = stored("int4 32", 40, 64)
    weight.scale[3, 1] = float("nan")
    x = torch.randn(20, 64).bfloat16()
    x[5, 7], x[18, 0] = float("inf"), float("nan")
    y = cpp.linear_stored(x, weight)
    bad = torch.zeros(20, 40, dtype=torch.bool)
    bad[:, 3] = bad[5] = bad[18] = True
    assert torch.equal(~y.isfinite(), bad)


@pytest.fixture
def plain_library(monkeypatch):
    """library.cpp as a CPU with AVX2 and no more has it."""
    monkeypatch.setattr(library, "BEYOND", {})
    for cached in (library.library, library._number, library.has_tiles):
        cached.cache_clear()
    yield
    for cached in (library.library, library._number, library.has_tiles):
        cached.cache_clear()


@needs_compiler
@pytest.mark.parametrize("bits", [4, 8])
def test_wider_registers_give_the_same_bits(request, bits):
    """Codes are summed as integers, and what follows in one order."""
    if not any(library.has(name) for name in library.BEYOND):
        pytest.skip("this CPU has AVX2 and no more: it is what every other test ran on")

    def products():
        found = []
        for seed, (tokens, rows, columns, group) in enumerate(SHAPES):
            for zero, dtype in ((False, torch.float16), (True, torch.float32)):
                weight, _ = random_int(bits, rows, columns, group, zero, seed=seed)
                x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
                found.append((cpp.linear_int4 if bits == 4 else cpp.linear_int8)(x, weight))
        return found

    wide = products()
    request.getfixturevalue("plain_library")
    assert not library.has_tiles()
    for a, b in zip(wide, products(), strict=True):
        assert torch.equal(a, b)


@needs_compiler
@pytest.mark.parametrize("operation", ["attention", "attention_decode", "gated_delta_rule", "linear_int4", "linear_int8"])
def test_a_cpu_with_avx2_and_no_more_is_checked_too(plain_library, operation):
    report = check(operation, "cpp", dtype=torch.float16, device="cpu")
    assert report.ok, report.table()


@needs_compiler
def test_what_the_cpu_has_beyond_is_used(tmp_path):
    """The library is made without it where a compiler does not know it; not where our own code is wrong."""
    flags, empty = library._beyond(), tmp_path / "empty.cpp"
    empty.touch()
    if subprocess.run([*library._compiler(), *flags, "-c", str(empty), "-o", str(tmp_path / "empty.o")], capture_output=True).returncode:
        pytest.skip(f"the compiler is older than this CPU: it does not know {' '.join(flags)}")
    library._compile(library._compiler(), (*library.FLAGS, *flags))


@needs_compiler
def test_a_compiler_older_than_the_cpu_makes_it_without_what_it_does_not_know(monkeypatch, tmp_path, plain_library):
    monkeypatch.setattr(library, "BEYOND", {"avx2": ("-mfound-next-year",)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not isinstance(library.library(), str)


@needs_compiler
@pytest.mark.parametrize("kinds", ["int4", "int8", "mixed", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 4, 5])
def test_experts_of_few_tokens(kinds, dtype, tokens):
    """One call, or beyond four tokens one expert at a time, against experts in fp64, no further off than the formula."""
    E, H, I, k = 7, 192, 64, 3
    g = torch.Generator().manual_seed(2)

    def stack(bits, rows, columns, group):
        if bits is None:
            plain = (torch.randn(E, rows, columns, generator=g) * 0.2).to(dtype)
            return plain, plain.double()
        made = [random_int(bits, rows, columns, group, zero=bits == 4, seed=e) for e in range(E)]
        fields = {name: torch.stack([getattr(m[0], name) for m in made]) for name in ("codes", "scale", "zero") if made[0][0]._asdict()[name] is not None}
        return made[0][0]._replace(**fields), torch.stack([m[1] for m in made])

    up_bits, down_bits = {"int4": (4, 4), "int8": (8, 8), "mixed": (8, 4), "plain": (None, None)}[kinds]
    (gate_up, wide_up), (down, wide_down) = stack(up_bits, 2 * I, H, 64), stack(down_bits, H, I, 32)
    scale = {"plain": 1.0, "int4": 0.02}.get(kinds, 5e-4)  # so that fp16 does not overflow
    x, weights = (torch.randn(tokens, H, generator=g) * scale).to(dtype), torch.rand(tokens, k, generator=g).to(dtype)
    experts = torch.stack([torch.randperm(E, generator=g)[:k] for _ in range(tokens)])
    exact = torch.zeros(tokens, H, dtype=torch.float64)
    for m in range(tokens):
        for j in range(k):
            gate, up = (wide_up[experts[m, j]] @ x[m].double()).chunk(2)
            exact[m] += weights[m, j].double() * (wide_down[experts[m, j]] @ (gate * gate.sigmoid() * up))
    run, formula = (cpp.moe_experts, ops.moe_experts) if kinds == "plain" else (cpp.moe, packed.moe_packed)
    y = run(x, gate_up, down, weights, experts)
    assert y.dtype == dtype and y.shape == x.shape
    error, allowed = (y.double() - exact).norm(), (formula(x, gate_up, down, weights, experts).double() - exact).norm()
    assert error <= 1.2 * allowed + (1e-6 if kinds == "plain" else 1e-4) * (dtype == torch.float32) * exact.norm()
    if kinds == "plain" and dtype == torch.bfloat16:  # the order of the sum, too, is the formula's
        assert (y == formula(x, gate_up, down, weights, experts)).float().mean() > 0.95
    with pytest.raises(IndexError):
        run(x, gate_up, down, weights, experts + 5)


@needs_compiler
def test_the_router_takes_the_lower_of_equals_and_keeps_nan():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, float("nan"), 1.0, 2.0, 3.0]])
    weights, experts = cpp.router_topk(logits, 2, True)
    assert experts[0].tolist() == [1, 2] and torch.equal(weights[0], torch.tensor([0.5, 0.5])) and weights[1].isnan().all()
    logits = torch.randn(9, 130) * 4
    for k, normalize in ((1, False), (8, True), (130, False)):
        ours, formula = cpp.router_topk(logits, k, normalize), ops.router_topk(logits, k, normalize)
        torch.testing.assert_close(ours[0], formula[0], rtol=2e-6, atol=1e-9)
        assert torch.equal(ours[1], formula[1])


def test_blocked_gguf():
    kind, blocks = "Q8_0", torch.zeros(10, 2 * 34, dtype=torch.uint8)
    blocks[:, 1] = blocks[:, 35] = 0x3C  # fp16 one
    blocks[:, 2] = 3
    x = torch.randn(4, 64)
    torch.testing.assert_close(blocked.linear_blocked(x, Gguf(blocks, kind)), 3 * x[:, :1].expand(-1, 10))


def test_without_a_compiler_the_next_one_runs_and_the_report_says_why(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    library.library.cache_clear()
    try:
        reason = cpp.supports_rounding(torch.device("cpu"), torch.bfloat16)
        assert reason is not None and ("compiler" in reason or "AVX2" in reason)
        assert backend.linear_int4.resolve(torch.device("cpu"), torch.bfloat16).name == "torch"
        assert reason in backend.report()
    finally:
        library.library.cache_clear()


@pytest.mark.parametrize("script, message", [("exit 3", "failed"), ("echo 'library.cpp:1: no such thing' >&2; exit 1", "no such thing")])
def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path, script, message):
    compiler = tmp_path / "mine"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.library.cache_clear()
    try:
        assert message in str(library.library())
    finally:
        library.library.cache_clear()


@needs_compiler
def test_the_library_is_kept_and_a_folder_others_write_to_is_not_trusted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = library._compiler()
    path = library._compile(compiler, library.FLAGS)
    made = path.stat()
    assert path.parent == tmp_path / "qwen-ref" and not path.parent.stat().st_mode & 0o077
    assert library._compile(compiler, library.FLAGS).stat().st_mtime_ns == made.st_mtime_ns
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    path.parent.chmod(0o777)
    assert library._folder() != path.parent


def test_without_a_cache_one_temporary_folder_serves_all_processes(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    temporary = tmp_path / f"qwen-ref-{os.getuid()}"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert library._folder() == library._folder() == temporary and not temporary.stat().st_mode & 0o077
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("no folder")
    assert library._folder() == temporary
    temporary.rmdir()
    (tmp_path / "somebody's").mkdir(mode=0o700)
    temporary.symlink_to(tmp_path / "somebody's")
    assert library._folder() not in (temporary, tmp_path / "somebody's")


def test_refusals(monkeypatch):
    assert "CPU" in cpp.supports_rounding(torch.device("cuda"), torch.bfloat16)
    assert "CPU" in blocked.supports(torch.device("cuda"), torch.bfloat16)
    assert "float64" in cpp.supports_rounding(torch.device("cpu"), torch.float64)
    assert "finer" in cpp.supports_rounding(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert cpp.supports_rounding(torch.device("cpu"), torch.bfloat16) == "needs AVX2"


def test_importing_compiles_nothing():
    code = "import subprocess; subprocess.run = None; import qwen_ref.backend; print('quiet')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "quiet"


def many_loops(x):
    """Operations that read each other's results, each with more numbers than one thread does alone."""
    hidden = cpp.linear_int4(x, MATRICES[0])  # (M, 406)
    gated = cpp.swiglu(hidden[:, :203], hidden[:, 203:])
    y = cpp.linear(gated, MATRICES[1])
    y, normed = cpp.add_rms_norm(y, x, MATRICES[2], 1e-6)
    return y + 0 if x.shape[0] > 16 else cpp.linear_int8(normed, MATRICES[3])


MATRICES = (random_int(4, 406, 512, 128)[0], torch.randn(512, 203, generator=torch.Generator().manual_seed(1)),
            torch.ones(512), random_int(8, 512, 512, 64, seed=2)[0])  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_one_thread_and_many_give_the_same(threads, tokens):
    """More threads than this machine has cores, so that some are late for every loop."""
    x, results = torch.randn(tokens, 512), []
    for count in (1, 3, 11):
        threads(count)
        results.append(many_loops(x))
    assert all(torch.equal(results[0], y) for y in results[1:])


@needs_compiler
@pytest.mark.parametrize("count", [2, 7])
def test_a_team_that_stays_together_leaves_nothing_out(threads, count):
    """Hundreds of replays, by two callers at the same time, while the threads of each come late."""
    xs = torch.randn(40, 2, 512)
    expected = [many_loops(x) for x in xs]
    threads(count)

    def replays(offset):
        with torch.inference_mode():
            tape = library.Tape(many_loops, xs[0])
            torch.set_num_threads(count)  # a setting of each thread
            wrong = [i for i in range(200) if not torch.equal(tape.replay(xs[(i + offset) % 40]), expected[(i + offset) % 40])]
        return tape.whole, wrong

    with ThreadPoolExecutor(2) as callers:
        assert list(callers.map(replays, (0, 17))) == [(True, [])] * 2


TEAM = """
#include <thread>
#include <vector>
#include "threads.h"

int main() {
    Team team;
    std::vector<std::thread> helpers;
    for (int i = 0; i < 5; i++) helpers.emplace_back([&] { team.help(); });
    int wrong = 0;
    for (int64_t loop = 0; loop < 600; loop++) {
        int64_t count = 1 + loop % 97, pieces = 1 + loop % std::min<int64_t>(count, 13);
        std::vector<int> seen(count);
        team.share(count, pieces, [&](int64_t i, int64_t last) {
            std::this_thread::sleep_for(std::chrono::microseconds(loop % 4 * 30));
            for (; i < last; i++) seen[i]++;
        });
        for (int times : seen) wrong += times != 1;
    }
    team.disband();
    for (auto& helper : helpers) helper.join();
    return wrong > 0;
}
"""


@needs_compiler
def test_every_part_of_a_loop_is_done_once_and_before_its_end(tmp_path):
    """With helpers that fall asleep inside their parts."""
    program = tmp_path / "team.cpp"
    program.write_text(TEAM)
    command = [*library._compiler(), *library.FLAGS[:-2], "-pthread", f"-I{library.SOURCE.parent}", str(program), "-o", str(tmp_path / "team")]
    subprocess.run(command, check=True)
    assert subprocess.run([tmp_path / "team"], timeout=60).returncode == 0
