"""Each formula against fp64, a closed form, or a plain loop that shares no line with it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from qwen_ref import backend, ops
from qwen_ref.errors import RequestError

G = torch.Generator().manual_seed(3)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order_of_tests():
    G.manual_seed(3)


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=G, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm(dtype):
    x, w = rand(3, 5, 37, dtype=dtype) * 7, rand(37, dtype=dtype)
    before = x.clone()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    rounded = w * exact.to(dtype)  # the rounding point of the official code: before the weight
    # In its own dtype half an eps each: the mean, its root, its reciprocal, two products, and the two roundings of what it is
    # compared with. Of 16 bits only the last ones, for what is before them is made in fp32.
    rounding = torch.finfo(dtype).eps * (3.5 if dtype.itemsize > 2 else 2)
    torch.testing.assert_close(ops.rms_norm(x, w, 1e-6), rounded, rtol=rounding, atol=0)
    assert torch.equal(x, before)


def test_rope_is_a_rotation_by_position():
    """The pair (x_j, x_{j+D/2}) as a complex number, multiplied by e^{i p f_j}."""
    x, positions = rand(2, 3, 5, 12, dtype=torch.float64), torch.tensor([[0, 1, 7, 300, 4095], [3, 2, 1, 0, 9]])
    frequencies = ops.rope_frequencies(12, 1e4)
    cos, sin = ops.rope_tables(positions, frequencies, 1.0, torch.float64)
    z = torch.complex(x[..., :6], x[..., 6:])
    turned = z * torch.exp(1j * (positions[:, None, :, None].float() * frequencies).double())
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(ops.rope(x, cos, sin), expected, rtol=0, atol=1e-6)  # fp32 tables
    assert [float(f) for f in frequencies] == pytest.approx([10000 ** (-j / 6) for j in range(6)], rel=1e-6)


def test_yarn_keeps_fast_and_divides_slow_frequencies():
    plain, yarn = ops.rope_frequencies(128, 1e6), ops.yarn_frequencies(128, 1e6, 4.0, 32768)
    turns = 32768 * plain / (2 * math.pi)
    fast, slow = turns > 40, turns < 0.9
    assert fast.any() and slow.any()
    torch.testing.assert_close(yarn[fast], plain[fast], rtol=1e-6, atol=0)
    torch.testing.assert_close(yarn[slow], plain[slow] / 4, rtol=1e-6, atol=0)
    between = yarn[~fast & ~slow] / plain[~fast & ~slow]
    assert (between.diff() <= 1e-6).all() and (between >= 0.2499).all() and (between <= 1.0001).all()


def attention_by_loops(q, k, v, mask):
    """One query of one head at a time, fp64."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            group = n // (q.shape[1] // k.shape[1])
            for i in range(q.shape[2]):
                scores = k[b, group].double() @ q[b, n, i].double() / math.sqrt(q.shape[3])
                weights = scores[mask[b, i]].exp()
                out[b, n, i] = (weights / weights.sum()) @ v[b, group][mask[b, i]].double()
    return out


@pytest.mark.parametrize("implementation", ["eager", "torch"])
@pytest.mark.parametrize("queries,keys,window", [(7, 7, None), (1, 9, None), (4, 9, None), (7, 7, 3), (2, 9, 4)])
def test_attention(implementation, queries, keys, window):
    q, k, v = rand(2, 6, queries, 20), rand(2, 2, keys, 20), rand(2, 2, keys, 20)
    positions = torch.arange(keys)[None]
    sees = torch.tensor(
        [[j <= i and (window is None or j > i - window) for j in range(keys)] for i in range(keys - queries, keys)]
    )
    mask = None if window is None else ops.visible(positions[:, keys - queries :], positions, window)
    if mask is not None:
        assert torch.equal(mask[0, 0], sees)
    with backend.use({"attention": implementation}, strict=True):
        out = backend.attention(q, k, v, mask)
    torch.testing.assert_close(out.double(), attention_by_loops(q, k, v, sees.expand(2, -1, -1)), rtol=1e-5, atol=1e-6)


def test_visible_and_padding():
    q = torch.tensor([[-1, -1, 0, 1]])
    expected = [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 1, 1]]  # padding queries may see all, padding keys none
    assert torch.equal(ops.visible(q, q)[0, 0], torch.tensor(expected, dtype=torch.bool))


def test_repeat_kv_gives_each_head_to_consecutive_queries():
    x = torch.arange(3.0).view(1, 3, 1, 1)
    assert ops.repeat_kv(x, 6).flatten().tolist() == [0, 0, 1, 1, 2, 2]


def test_router_softmaxes_all_then_chooses_then_renormalises():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0, 0.5]])
    p = [math.exp(x) for x in logits[0].tolist()]
    p = [x / sum(p) for x in p]
    weights, experts = ops.router_topk(logits, 2, False)
    assert experts.tolist() == [[1, 2]] and weights[0].tolist() == pytest.approx([p[1], p[2]])
    weights, _ = ops.router_topk(logits, 2, True)
    assert weights[0].tolist() == pytest.approx([p[1] / (p[1] + p[2]), p[2] / (p[1] + p[2])])
    assert ops.router_topk(logits.bfloat16(), 2, True)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_moe_experts_token_by_token(tokens):
    x, gate_up, down = rand(tokens, 11), rand(5, 14, 11), rand(5, 11, 7)
    weights, experts = rand(tokens, 3).abs(), torch.rand(tokens, 5, generator=G).argsort(-1)[:, :3]
    expected = torch.zeros(tokens, 11, dtype=torch.float64)
    for t in range(tokens):
        for w, e in zip(weights[t], experts[t], strict=True):
            gate, up = (gate_up[e].double() @ x[t].double()).split(7)
            expected[t] += w * (down[e].double() @ (gate * gate.sigmoid() * up))
    torch.testing.assert_close(ops.moe_experts(x, gate_up, down, weights, experts).double(), expected, rtol=1e-4, atol=1e-4)


def test_swiglu_and_last_token():
    gate, up = rand(3, 8), rand(3, 8)
    torch.testing.assert_close(ops.swiglu(gate, up), gate / (1 + (-gate).exp()) * up)
    hidden = rand(2, 4, 3)
    assert torch.equal(ops.last_token(hidden, torch.tensor([4, 2])), torch.stack((hidden[0, 3], hidden[1, 1])))


def test_backend_chooses_restores_refuses_and_reports():
    calls = []

    @backend.register("swiglu", "test_only", supports=lambda device, dtype: None if dtype == torch.float32 else "fp32 only")
    def mine(gate, up):
        calls.append(gate.dtype)
        return ops.swiglu(gate, up)

    try:
        gate = rand(2, 4)
        with backend.use({"swiglu": "test_only"}):
            torch.testing.assert_close(backend.swiglu(gate, gate), F.silu(gate) * gate)
            backend.swiglu(gate.double(), gate.double())  # refused: the formula runs instead
            assert calls == [torch.float32]
            assert "eager" in backend.report(dtype=torch.float64) and "fp32 only" in backend.report(dtype=torch.float64)
        backend.swiglu(gate, gate)
        assert len(calls) == 1  # restored
        with backend.use({"swiglu": "test_only"}, strict=True):
            with pytest.raises(RequestError, match="fp32 only"):
                backend.swiglu(gate.double(), gate.double())
            (line,) = (x for x in backend.report("cpu", torch.float64).splitlines() if x.startswith("swiglu "))
            assert line.split()[1] == "nothing" and "test_only (fp32 only)" in line and "eager (not chosen)" in line
        with pytest.raises(RequestError, match="no implementation 'absent'"):
            backend.use({"swiglu": "absent"})
        with pytest.raises(RequestError, match="no operation 'swigloo'"):
            backend.use({"swigloo": "eager"})
        for half_wrong in ({"swiglu": "test_only", "rope": "absent"}, {"swiglu": "test_only", "swigloo": "eager"}):
            with pytest.raises(RequestError):
                backend.use(half_wrong, strict=True)
            assert (backend.swiglu.forced, backend.swiglu.strict) == (None, False)  # nothing of a refused choice stays
    finally:
        del backend.OPERATIONS["swiglu"].implementations["test_only"]
