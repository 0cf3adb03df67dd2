"""The packed layouts: element by element against their definitions, and what is done with them as a whole."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ref import ops
from qwen_ref.quant import packed
from qwen_ref.quant.format import Matrix
from qwen_ref.quant.layers import PackedEmbedding, PackedExperts, PackedLinear, gather, joined, stacked
from qwen_ref.quant.packed import Code4, Fp8, Gguf, Int4, Int8, expert, pack4, quantize_fp8, rows, unpack4

sizes = st.integers(1, 9)


def make(kind, n, k, group=3, *, zero=True, lead=()):
    """A random matrix of a layout, from torch's global generator."""
    g = -(-k // group)
    codes = torch.randint(0, 256, (*lead, n, -(-k // 2)), dtype=torch.uint8)
    scale = torch.rand(*lead, n, g) + 0.5
    if kind == "int4":
        return Int4(codes, scale.half(), torch.randint(0, 16, (*lead, n, g), dtype=torch.uint8) if zero else None, group)
    if kind == "int8":
        q = torch.randint(-128, 128, (*lead, n, k), dtype=torch.int8)
        return Int8(q, scale, torch.randint(-128, 128, (*lead, n, g), dtype=torch.int8) if zero else None, group)
    if kind == "fp8":
        grid = torch.rand(*lead, -(-n // 2), g) + 0.5
        return Fp8(torch.randn(*lead, n, k).to(torch.float8_e4m3fn), grid.bfloat16(), (2, group))
    if kind == "code4":
        return Code4(codes, scale.to(torch.float8_e4m3fn), torch.randn(16), group)
    blocks = torch.randint(0, 256, (*lead, n, 144), dtype=torch.uint8)
    blocks[..., 1] &= 0x3F  # finite scales
    blocks[..., 3] &= 0x3F
    return Gguf(blocks, "Q4_K")


def element(weight, n, k):
    """One element, by the definition of its layout."""
    if isinstance(weight, Int4):
        code = int(weight.codes[n, k // 2]) >> 4 * (k % 2) & 15
        zero = 8 if weight.zero is None else int(weight.zero[n, k // weight.group])
        return (code - zero) * float(weight.scale[n, k // weight.group])
    if isinstance(weight, Int8):
        zero = 0 if weight.zero is None else int(weight.zero[n, k // weight.group])
        return (int(weight.codes[n, k]) - zero) * float(weight.scale[n, k // weight.group])
    if isinstance(weight, Fp8):
        return float(weight.codes[n, k]) * float(weight.scale[n // weight.block[0], k // weight.block[1]])
    code = int(weight.codes[n, k // 2]) >> 4 * (k % 2) & 15
    return float(weight.table[code]) * float(weight.scale[n, k // weight.group])


LAYOUTS = ("int4", "int8", "fp8", "code4")


@given(kind=st.sampled_from(LAYOUTS), n=sizes, k=sizes, group=st.integers(1, 5), zero=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_every_element_is_its_definition(kind, n, k, group, zero, seed):
    torch.manual_seed(seed)
    weight = make(kind, n, k, group, zero=zero)
    exact = torch.tensor([[element(weight, i, j) for j in range(k)] for i in range(n)], dtype=torch.float64)
    assert torch.equal(weight.dequantize(torch.float64, k), exact)
    torch.testing.assert_close(weight.dequantize(torch.float32, k), exact.float(), rtol=1e-7, atol=0)
    assert torch.equal(weight.dequantize(torch.bfloat16, k), weight.dequantize(torch.float32, k).bfloat16())


@given(kind=st.sampled_from(LAYOUTS), n=st.integers(2, 9), k=sizes, seed=st.integers(0, 99), data=st.data())
@settings(max_examples=100, deadline=None)
def test_parts_are_parts_of_the_whole(kind, n, k, seed, data):
    torch.manual_seed(seed)
    stack = make(kind, n, k, lead=(3,))
    whole = stack.dequantize(columns=k)
    first = data.draw(st.integers(0, n - 1).filter(lambda i: kind != "fp8" or i % 2 == 0))
    last = data.draw(st.integers(first + 1, n))
    assert torch.equal(rows(stack, first, last).dequantize(columns=k), whole[:, first:last])
    one = expert(stack, 1)
    assert torch.equal(one.dequantize(columns=k), whole[1])
    index = torch.tensor([n - 1, 0, n - 1])
    assert torch.equal(gather(one, index).dequantize(columns=k), whole[1][index])
    again = stacked([expert(stack, e) for e in range(3)])
    assert torch.equal(again.dequantize(columns=k), whole)
    lower = make(kind, n + 1, k)
    both = joined(one, lower)
    if kind == "code4":  # two tables that have nothing to do with each other
        assert both is None
    else:
        assert torch.equal(both.dequantize(columns=k), torch.cat((whole[1], lower.dequantize(columns=k))))


def test_matrices_of_different_forms_are_joined_where_that_loses_nothing():
    plain, zeros = make("int4", 4, 6, zero=False), make("int4", 4, 6)
    for upper, lower in ((plain, zeros), (zeros, plain)):
        assert torch.equal(joined(upper, lower).dequantize(), torch.cat((upper.dequantize(), lower.dequantize())))
        assert torch.equal(stacked([upper, lower]).dequantize(), torch.stack((upper.dequantize(), lower.dequantize())))
    one = make("code4", 4, 6)
    other = one._replace(table=one.table * 0.3)  # another scale of the whole matrix, as in NVFP4
    exact = torch.cat((one.dequantize(), other.dequantize()))
    torch.testing.assert_close(joined(one, other).dequantize(), exact, rtol=3e-7, atol=0)
    assert stacked([one, other]).table.shape == (2, 16)
    assert torch.equal(stacked([one, other]).dequantize(), torch.stack((one.dequantize(), other.dequantize())))
    assert joined(plain, one) is None and joined(plain, make("int4", 4, 6, group=2)) is None
    assert stacked([plain, one]) is None and stacked([plain, make("int4", 4, 6, group=2)]) is None


@given(n=sizes, k=sizes)
def test_nibbles_are_packed_and_unpacked(n, k):
    codes = torch.randint(0, 16, (2, n, k), dtype=torch.uint8)
    assert torch.equal(unpack4(pack4(codes))[..., :k], codes)
    assert torch.equal(unpack4(pack4(codes).transpose(0, 2)), unpack4(pack4(codes).transpose(0, 2).contiguous()))
    assert pack4(codes).shape == (2, n, -(-k // 2))
    assert pack4(torch.tensor([[3, 10]], dtype=torch.uint8)).tolist() == [[3 + 16 * 10]]


@given(rows=sizes, columns=sizes, group=st.integers(1, 5), scale=st.sampled_from([1e-20, 1.0, 1e20]))
@settings(max_examples=100, deadline=None)
def test_rounding_to_fp8_is_the_nearest(rows, columns, group, scale):
    x = torch.randn(rows, columns) * scale
    codes, scales = quantize_fp8(x, group)
    assert codes.shape == x.shape and scales.shape == (rows, -(-columns // group))
    back = codes.float() * scales.repeat_interleave(group, -1)[:, :columns]
    amax = torch.stack([part.abs().amax(-1) for part in x.split(group, -1)], -1).repeat_interleave(group, -1)[:, :columns]
    assert ((back - x).abs() <= torch.maximum(x.abs() / 16 * 1.001, amax / 448 * 2**-9)).all()  # half a step: 3 bits of mantissa
    zero, ones = quantize_fp8(torch.zeros(2, 4), 3)
    assert not zero.float().any() and (ones == 1).all()


@pytest.mark.parametrize("kind", [*LAYOUTS, "gguf"])
def test_the_products_are_those_of_the_dequantised_matrix(kind):
    k = 256 if kind == "gguf" else 6
    weight = make(kind, 5, k)
    x, bias = torch.randn(2, 3, k, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    exact = torch.einsum("btk,nk->btn", x, weight.dequantize(torch.float64, k)) + bias
    torch.testing.assert_close(getattr(packed, f"linear_{kind}")(x, weight, bias), exact)
    gate_up, down = make(kind, 2 * k, k, lead=(4,)), make(kind, k, k, lead=(4,))
    tokens, chosen = torch.randn(7, k, dtype=torch.float64), torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    weights = torch.rand(7, 2, dtype=torch.float64)
    plain = [w.dequantize(torch.float64, k) for w in (gate_up, down)]
    torch.testing.assert_close(getattr(packed, f"moe_{kind}")(tokens, gate_up, down, weights, chosen),
                               ops.moe_experts(tokens, *plain, weights, chosen))  # fmt: skip


def test_dynamic_fp8_multiplies_rounded_numbers():
    weight, x = make("fp8", 5, 6), torch.randn(4, 6)
    codes, scale = quantize_fp8(x, 3)
    rounded = codes.double() * scale.double().repeat_interleave(3, -1)
    exact = rounded @ weight.dequantize(torch.float64).T
    torch.testing.assert_close(packed.linear_fp8_dynamic(x, weight), exact.float(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(packed.linear_fp8(x, weight), exact.float(), rtol=1e-3)


def test_modules_keep_their_scales_when_the_model_changes_its_dtype():
    weight = make("int8", 5, 6)
    module = PackedLinear(Matrix(weight), (5, 6), torch.nn.Parameter(torch.randn(5)))
    embedding = PackedEmbedding(make("fp8", 7, 6), (7, 6), torch.float32)
    experts = PackedExperts(make("code4", 4, 6, lead=(2,)), make("code4", 6, 2, lead=(2,)), (2, 6, 2))
    before = copy.deepcopy([module.packed, embedding.packed, experts.gate_up])
    for m in (module, embedding, experts):
        m.to(torch.bfloat16)
    assert module.bias.dtype == embedding(torch.tensor([1])).dtype == torch.bfloat16
    for old, new in zip(before, (module.packed, embedding.packed, experts.gate_up), strict=True):
        for a, b in zip(old, new, strict=True):
            assert a == b if not isinstance(a, torch.Tensor) else (a.dtype == b.dtype and torch.equal(a.float(), b.float()))
    assert module(torch.randn(3, 6).bfloat16()).shape == (3, 5)


def test_reordered_inputs_give_the_same_matrix_and_product():
    weight, order = make("int4", 5, 6), torch.randperm(6)
    module = PackedLinear(Matrix(weight, order), (5, 6))
    exact = torch.empty(5, 6)
    exact[:, order] = weight.dequantize()
    assert torch.equal(module.dequantize(), exact)
    x = torch.randn(2, 6)
    torch.testing.assert_close(module(x), x @ exact.T)


def test_an_embedding_gives_rows_and_its_head_shares_them():
    weight = make("int4", 7, 6)
    embedding = PackedEmbedding(weight, (7, 6), torch.float32)
    head = PackedLinear(Matrix(weight), (7, 6))
    ids = torch.tensor([[3, 0, 3], [6, 6, 1]])
    for some in (ids, ids[:1, :1], ids[1, 2], ids[:, :0]):
        assert torch.equal(embedding(some), weight.dequantize()[some])
    assert embedding.identity & head.identity and embedding.count == 42
    assert dict(embedding.plain(torch.bfloat16))["weight"].dtype == torch.bfloat16
