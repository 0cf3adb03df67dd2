"""The Triton moe_experts and PyTorch's grouped products, and the formula they are checked against."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_kernels import needs_triton, python

from qwen_ref import ops


def by_tokens(x, gate_up, down, weights, experts):
    """Token by token, slot by slot, in fp64."""
    x, gate_up, down, weights = (t.double() for t in (x, gate_up, down, weights))
    out = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for slot, e in enumerate(experts[token].tolist()):
            gate, up = (gate_up[e] @ x[token]).chunk(2)
            out[token] += weights[token, slot] * (down[e] @ (gate / (1 + (-gate).exp()) * up))
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_formula_is_a_loop_over_tokens(dtype, tokens):
    draw = torch.Generator().manual_seed(tokens)
    x, gate_up, down = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((tokens, 8), (7, 10, 8), (7, 8, 5)))
    experts = torch.rand(tokens, 7, generator=draw).argsort(-1)[:, :3]
    weights = torch.rand(tokens, 3, generator=draw).to(dtype)
    args = x, gate_up, down, weights, experts
    truth = by_tokens(*args)
    ours = ops.moe_experts(*args)
    assert ours.dtype == dtype and ours.shape == (tokens, 8)
    assert (ours.double() - truth).norm() <= 4 * torch.finfo(dtype).eps * truth.norm()


def test_formula_of_equal_experts_is_one_mlp():
    """Weights that sum to one over copies of one expert leave that expert's MLP."""
    x, gate_up, down = (torch.randn(shape).double() for shape in ((9, 8), (10, 8), (8, 5)))
    weights, experts = torch.rand(9, 3).double().softmax(-1), torch.rand(9, 4).argsort(-1)[:, :3]
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    ours = ops.moe_experts(x, gate_up.expand(4, -1, -1), down.expand(4, -1, -1), weights, experts)
    torch.testing.assert_close(ours, F.linear(F.silu(gate) * up, down))


@needs_triton
def test_the_counting_sort_is_a_stable_sort():
    """One block and many, experts nobody chose, and the table of tiles that `find` reads."""
    code = """
import torch
from qwen_kernels import moe_experts
moe_experts.SORTED.update(BLOCK=32, CHUNK=8)
for pairs, count in ((1, 3), (8, 1), (31, 5), (32, 8), (33, 8), (700, 11), (1100, 60)):
    experts = (torch.rand(pairs, 1, generator=torch.Generator().manual_seed(pairs)).square() * count).long()
    order, ends = moe_experts._sorted(experts, count, 64, 16)
    held = experts.flatten().bincount(minlength=64)
    print(torch.equal(order.long(), experts.flatten().argsort(stable=True)),
          torch.equal(ends.long(), torch.stack((held, -(-held // 16))).cumsum(-1)))
"""
    assert python(code, interpret=True).split() == ["True"] * 14


@needs_triton
def test_every_path_when_all_loops_turn():
    """Tiles smaller than all sizes, odd sizes, every class of rows; and an expert that does not exist writes nowhere."""
    code = """
import torch
from qwen_kernels import moe_experts
from test_kernels_moe import by_tokens
names = ("_gate_up_vectors", "_down_vectors", "_gate_up_tiles", "_down_tiles")
launched = []
def counted(name):
    kernel = getattr(moe_experts, name)
    class Launcher:
        def __getitem__(self, grid):
            launched.append(name)
            return kernel[grid]
    setattr(moe_experts, name, Launcher())
for name in names:
    counted(name)
for key in moe_experts.TUNED:
    moe_experts.TUNED[key] = ({"ROWS": 8, "BLOCK_K": 32, "num_warps": 1} if isinstance(key[1][0], str) else
                              {"BLOCK_I": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2})
for tokens, count, k in ((2, 5, 3), (4, 3, 1), (5, 6, 2), (40, 2, 2), (150, 2, 2)):
    draw = torch.Generator().manual_seed(tokens)
    x, gate_up, down = (torch.randn(*shape, generator=draw) for shape in ((tokens, 71), (count, 70, 71), (count, 71, 35)))
    experts = torch.rand(tokens, count, generator=draw).argsort(-1)[:, :k]
    weights = torch.randn(tokens, k, generator=draw)
    launched.clear()
    ours, truth = moe_experts.run(x, gate_up, down, weights, experts), by_tokens(x, gate_up, down, weights, experts)
    print(*launched, float((ours - truth).norm() / truth.norm()))
experts[3, 1], experts[5, 0] = count, -1
strange = moe_experts.run(x, gate_up, down, weights, experts)
others = [m for m in range(tokens) if m not in (3, 5)]
print(float((strange[others] - truth[others]).norm() / truth.norm()))
"""
    *lines, last = python(code, interpret=True).splitlines()
    for line, kind in zip(lines, ("vectors", "vectors", "tiles", "tiles", "tiles"), strict=True):
        *launched, error = line.split()
        assert launched == [f"_gate_up_{kind}", f"_down_{kind}"] and float(error) < 5e-7, line
    assert float(last) < 5e-7


@needs_triton
def test_launcher_refuses_what_it_would_compute_wrongly():
    code = """
import torch
from qwen_kernels import moe_experts
from qwen_ref.errors import RequestError
x, gate_up, down = torch.randn(3, 6), torch.randn(4, 10, 6), torch.randn(4, 6, 5)
weights, experts = torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int64)
for args in (
    (x[:, :5], gate_up, down, weights, experts),
    (x, gate_up[:, :8], down, weights, experts),
    (x, gate_up[:3], down, weights, experts),
    (x, gate_up, down, weights[:, :1], experts),
    (x, gate_up, down, weights.half(), experts),
    (x, gate_up, down, weights, experts.float()),
    (x, gate_up, down, weights.clone().requires_grad_(), experts),
):
    try:
        print("computed", moe_experts.run(*args))
    except RequestError as error:
        print(error)
"""
    lines = python(code, interpret=True).splitlines()
    assert len(lines) == 7 and all("gate_up (E, 2I, H)" in line for line in lines[:4])
    assert all("one dtype, and integers" in line for line in lines[4:6]) and "no backward pass" in lines[6]
