"""The Triton linear for few rows, and the formula it is checked against."""

from __future__ import annotations

import pytest
import torch
from test_kernels import needs_triton, python

from qwen_ref import ops


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 1, 3), (0, 3)])
def test_formula_is_a_sum_of_products(shape):
    x, weight, bias = torch.randn(shape).double(), torch.randn(5, 3).double(), torch.randn(5).double()
    products = x[..., None, :] * weight  # (..., 5, 3)
    torch.testing.assert_close(ops.linear(x, weight, bias), products.sum(-1) + bias)
    torch.testing.assert_close(ops.linear(x, weight), products.sum(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_formula_rounds_once(dtype):
    """Against the exact sum rounded once: a bf16 sum of 4096 would be off by much more than a last bit now and then."""
    x, weight, bias = torch.randn(3, 4096).to(dtype), torch.randn(40, 4096).to(dtype), torch.randn(40).to(dtype)
    exact = (x.double() @ weight.double().T + bias.double()).to(dtype)
    ours = ops.linear(x, weight, bias)
    assert (ours == exact).float().mean() > 0.95
    torch.testing.assert_close(ours, exact, rtol=torch.finfo(dtype).eps, atol=1e-2)


@needs_triton
def test_every_path_in_fp16():
    """Blocks smaller than the sizes, so that every loop turns and K is split; the exact sum, rounded once."""
    code = """
import torch
from qwen_kernels import linear
torch.manual_seed(0)
launches = []
def counted(name):
    kernel = getattr(linear, name)
    class Launcher:
        def __getitem__(self, grid):
            launches.append((name, grid))
            return kernel[grid]
    setattr(linear, name, Launcher())
for name in ("_few_rows", "_some_rows", "_add_splits"):
    counted(name)
few = {"BLOCK_N": 4, "BLOCK_K": 32, "num_warps": 4}
some = {"BLOCK_N": 16, "BLOCK_K": 16, "PROGRAMS": 6, "num_warps": 4, "num_stages": 2}
linear.TUNED.update({(linear.ANY, (rows, kind)): few if rows < 16 else some
                     for rows in (1, 2, 4, 16) for kind in ("narrow", "wide")})
for rows in (1, 2, 3, 4, 5, 16, 17):
    x, weight, bias = torch.randn(rows, 211).half(), torch.randn(21, 211).half(), torch.randn(21).half()
    launches.clear()
    ours = linear.run(x, weight, bias)
    exact = (x.double() @ weight.double().T + bias.double()).half()
    print(rows, float((ours == exact).double().mean()), *(f"{name}{list(grid)}".replace(" ", "") for name, grid in launches))
"""
    lines = [line.split() for line in python(code, interpret=True).splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3", "4", "5", "16", "17"]
    assert all(float(line[1]) > 0.97 for line in lines), lines
    assert all(line[2:] == ["_few_rows[6]"] for line in lines[:4]), lines
    assert all(line[2:] == ["_some_rows[2,3]", "_add_splits[1]"] for line in lines[4:6]), lines
    assert lines[6][2:] == []  # cuBLAS's


@needs_triton
def test_launcher_refuses_what_it_would_compute_wrongly():
    code = """
import torch
from qwen_kernels import linear
from qwen_ref.errors import RequestError
x, w = torch.randn(2, 6), torch.randn(5, 6)
for args in ((x, w[:, :5]), (x, w, torch.zeros(4)), (x.half(), w), (x, w, torch.zeros(5).half()),
             (x, w.clone().requires_grad_()), (x, w.to("meta"))):
    try:
        print("computed", linear.run(*args))
    except RequestError as error:
        print(error)
"""
    lines = python(code, interpret=True).splitlines()
    assert len(lines) == 6 and all("of one dtype, got (2, 6)" in line for line in lines[:4])
    assert "no backward pass" in lines[4] and "on cpu and on meta" in lines[5]
