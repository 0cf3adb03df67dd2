"""What is particular to the Triton kernels of packed matrices: their decoders bit by bit, and every way to multiply."""

from __future__ import annotations

from test_kernels import needs_triton, python

TILE = """
import torch, triton, triton.language as tl
from qwen_kernels import bits, linear_fp8_dynamic
@triton.jit
def kernel(bytes_, out, KIND: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(out + at, bits.scale_at(bytes_ + at, at < 256, KIND, True))
@triton.jit
def rounding(values, out, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, linear_fp8_dynamic.nearest_e4m3(tl.load(values + at)))
"""


@needs_triton
def test_floats_of_eight_bits_are_pytorchs():
    """Every e4m3 and e8m0 code; and what fp32 rounds to: numbers at, around and between all those of float8_e4m3fn."""
    code = TILE + """
codes = torch.arange(256, dtype=torch.uint8)
for kind, dtype in (("e4m3", torch.float8_e4m3fn), ("e8m0", torch.float8_e8m0fnu)):
    out = torch.empty(256)
    kernel[(1,)](codes, out, KIND=kind)
    wanted = codes.view(dtype).float()
    real = ~wanted.isnan()
    print(torch.equal(out[real], wanted[real]), bool(real.sum() >= 254))
exact = codes.view(torch.float8_e4m3fn).float()
exact = exact[exact.isfinite()].sort().values
middle = (exact[1:] + exact[:-1]) / 2
values = torch.cat((exact, middle, middle * (1 + 2**-20), middle * (1 - 2**-20), torch.randn(999), torch.randn(999) * 2e-3))
values = torch.nn.functional.pad(values.clamp(-448, 448), (0, -len(values) % 512))
out = torch.empty_like(values)
rounding[(len(values) // 512,)](values, out, N=512)
print(torch.equal(out, values.to(torch.float8_e4m3fn).float()))
"""
    assert set(python(code, interpret=True).split()) == {"True"}


@needs_triton
def test_every_kind_of_ggml_that_stays_in_blocks_is_decoded_to_the_bit():
    """Blocks of random bytes, among them those at the ends of their matrix; rows far apart, and at an odd place."""
    code = """
import torch
from test_gguf_blocks import random_blocks
from qwen_kernels import packed_linear, unpack_ggml
from qwen_ref.quant.gguf import repack
from qwen_ref.quant.gguf_blocks import BLOCK
from qwen_ref.quant.packed import Gguf
kept = [kind for kind, (_, size) in BLOCK.items() if isinstance(repack(kind, torch.ones(1, size, dtype=torch.uint8)), Gguf)]
print(sorted(kept) == sorted(unpack_ggml.DECODERS))
for kind in kept:
    columns = 5 * BLOCK[kind][0]
    blocks = random_blocks(kind, (23, columns), finite=True)
    apart = torch.full((23, blocks.shape[-1] + 6), 255, dtype=torch.uint8)
    apart[:, 2:-4] = blocks
    for weight in (Gguf(blocks, kind), Gguf(apart[:, 2:-4], kind)):
        wanted = weight.dequantize(torch.float32)
        print(torch.equal(packed_linear.dense(packed_linear.TUNED, weight, columns, wanted), wanted), bool(wanted.std() > 0))
"""
    assert python(code, interpret=True).split() == ["True"] * 61


PATHS = """
import torch
from importlib import import_module
from qwen_kernels import packed_linear
from qwen_ref.bench.subjects import packed as inputs
from qwen_ref.bench.subjects.common import Draw
launches = []
def counted(module, name):
    kernel = getattr(module, name)
    class Launcher:
        def __getitem__(self, grid):
            launches.append((name, grid))
            return kernel[grid]
    setattr(module, name, Launcher())
for name in ("_few_rows", "_some_rows", "_add_splits", "_dequantize"):
    counted(packed_linear, name)
few = {"BLOCK_N": 32, "CHUNKS": 2}
some = {"BLOCK_N": 32, "BLOCK_K": 32, "PROGRAMS": 11, "num_warps": 4, "num_stages": 2}
table = {(packed_linear.ANY, (rows, kind)): few if rows < 16 else some for rows in (1, 2, 4, 16, 32, 64) for kind in ("narrow", "wide")}
table[packed_linear.ANY, "dense"] = {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4}
packed_linear.MOST_BYTES = 2 * 288 * 128  # the dense matrix in two parts
for name, make in (("int4", inputs.int4), ("int8", inputs.int8), ("code4", inputs.code4)):
    draw = Draw(0, torch.float16, torch.device("cpu"))
    weight, bias = make(draw, 150, 288), draw.normal(150)
    for rows in (1, 4, 5, 64, 65) if name == "int4" else (3, 17, 65):
        x = draw.normal(rows, 288)
        launches.clear()
        ours = packed_linear.linear("linear_" + name, table, x, weight, bias)
        exact = (x.double() @ weight.dequantize(torch.float16, 288).double().T + bias.double()).half()
        alike = float((ours == exact).double().mean()) if rows > 4 else float(((ours - exact).abs() < 4e-3).double().mean())
        print(rows, alike, *(f"{name}{list(grid)}".replace(" ", "") for name, grid in launches))
"""


@needs_triton
def test_every_way_to_multiply_in_fp16():
    """Blocks smaller than the sizes, so that every loop turns and K is split; the product with what the formula dequantises."""
    lines = [line.split() for line in python(PATHS, interpret=True).splitlines()]
    assert [line[0] for line in lines] == ["1", "4", "5", "64", "65", *["3", "17", "65"] * 2]
    for rows, alike, *launched in lines:
        assert float(alike) > 0.95, (rows, alike)
        if int(rows) <= 4:
            assert launched == ["_few_rows[5]"]
        elif int(rows) <= 64:
            assert launched == ["_some_rows[5,1]"] or (launched[0] == "_some_rows[5,2]" and launched[1].startswith("_add_splits"))
        else:
            assert [name.split("[")[0] for name in launched] == ["_dequantize", "_dequantize"]


@needs_triton
def test_a_kernel_that_swaps_nibbles_or_forgets_the_last_group_is_caught():
    code = """
import torch
from qwen_kernels import packed_linear, unpack
from qwen_ref.bench import check
def bad(name, value):
    good = getattr(unpack.Operands, name)
    setattr(unpack.Operands, name, value(good))
    report = check("linear_int4", "triton", seeds=1, dtype=torch.float16)
    print(sum("is off by" in " ".join(row.faults) for row in report.rows), len(report.rows))
    setattr(unpack.Operands, name, good)
for entry in packed_linear.TUNED.values():
    if "CHUNKS" in entry:
        entry["BLOCK_N"] = 32
bad("constants", lambda good: lambda self, most: {**good(self, most), "SECOND": 1.0})  # the high nibble 16 times too large
bad("width", lambda good: lambda self, inner: good(self, inner) - 8)  # a row without its last bytes
"""
    for line in python(code, interpret=True).splitlines():
        caught, cases = map(int, line.split())
        assert caught > 0.8 * cases, line


@needs_triton
def test_launchers_refuse_what_they_would_compute_wrongly():
    code = """
import torch
from qwen_kernels import linear_int4, linear_int8, linear_gguf, moe_int4
from qwen_ref.errors import RequestError
from qwen_ref.quant.packed import Gguf, Int4, Int8
four = Int4(torch.zeros(5, 16, dtype=torch.uint8), torch.ones(5, 1), None, 32)
eight = Int8(torch.zeros(5, 32, dtype=torch.int8), torch.ones(5, 1), None, 32)
stack = Int4(torch.zeros(3, 64, 16, dtype=torch.uint8), torch.ones(3, 64, 1), None, 32)
down = Int4(torch.zeros(3, 32, 16, dtype=torch.uint8), torch.ones(3, 32, 1), None, 32)
x, weights, experts = torch.randn(2, 32), torch.rand(2, 1), torch.zeros(2, 1, dtype=torch.int64)
for call in (
    lambda: linear_int4.run(x[:, :30], four),
    lambda: linear_int8.run(x[:, :31], eight),
    lambda: linear_gguf.run(torch.randn(2, 512), Gguf(torch.zeros(5, 144, dtype=torch.uint8), "Q4_K")),
    lambda: linear_int4.run(x, four, torch.zeros(4)),
    lambda: linear_int4.run(x, four, torch.zeros(5).half()),
    lambda: linear_int4.run(x.requires_grad_(), four),
    lambda: linear_int4.run(x.detach(), four._replace(scale=four.scale.to("meta"))),
    lambda: moe_int4.run(x.detach(), stack, down._replace(codes=down.codes[:2]), weights, experts),
    lambda: moe_int4.run(x.detach(), stack, down, weights.half(), experts),
):
    try:
        print("computed", call())
    except RequestError as error:
        print(error)
"""
    lines = python(code, interpret=True).splitlines()
    wanted = ("30 columns", "31 columns", "512 columns", "needs a bias (5,)", "needs a bias (5,)", "no backward pass",
              "on cpu and on meta", "gate_up E x (2I, H)", "one dtype, and integers")  # fmt: skip
    assert len(lines) == len(wanted) and all(text in line for text, line in zip(wanted, lines, strict=True)), lines
