"""The emulator of a GPU: its instructions against closed forms and against what transcribes them; that what Triton compiles
runs as the kernel says; and that faults planted in kernels and in their machine code are seen.
"""

from __future__ import annotations

import importlib.util
import re
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import NO_MASK

from qwen_ref import backend
from qwen_ref.bench.check import House
from qwen_ref.bench.emulator import Fault, emulate, machine, numbers, ptx
from qwen_ref.bench.emulator.memory import INSIDE
from qwen_ref.cli import main
from qwen_ref.errors import RequestError

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install -e '.[triton]'): nothing to emulate"
)
HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid 32
{
    .reg .pred %p<9>;
    .reg .b16 %rs<40>;
    .reg .b32 %r<90>;
    .reg .b64 %rd<40>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
"""
TAIL = """
    ret;
}
"""


def run(body: str, *arguments, threads: int = 32, grid=(1, 1, 1), shared: int = 1024) -> None:
    machine.run(ptx.parse(HEAD + textwrap.dedent(body) + TAIL), grid, threads, shared, arguments)


def each_lane(body: str, inputs: torch.Tensor, outputs: torch.Tensor, kind: str = "b32", result: str = "b32") -> torch.Tensor:
    """Lane i computes %r10 (%rd10, %rs10) of row i of the inputs, in %r20 ... (%rd20, %rs20)."""
    registers = {"b16": "%rs", "b32": "%r", "b64": "%rd"}
    size, out = inputs.element_size(), outputs.element_size()
    columns = inputs.shape[1]
    load = "".join(
        f"ld.global.{kind} {registers[kind]}{20 + i}, [%rd3 + {i * size}];\n" for i in range(columns)
    )
    run(f"mad.wide.u32 %rd3, %r1, {columns * size}, %rd1;\n{load}{body}\n"
        f"mad.wide.u32 %rd4, %r1, {out}, %rd2;\nst.global.{result} [%rd4], {registers[result]}10;", inputs, outputs)  # fmt: skip
    return outputs


def bits(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64).to(torch.int32)


# Instructions


words = st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 3), min_size=32, max_size=32)
INTEGERS = {
    "add.s32": lambda a, b, c: a + b, "sub.s32": lambda a, b, c: a - b, "mul.lo.s32": lambda a, b, c: a * b,
    "mul.hi.u32": lambda a, b, c: a * b >> 32, "and.b32": lambda a, b, c: a & b, "xor.b32": lambda a, b, c: a ^ b,
    "min.u32": lambda a, b, c: min(a, b), "max.s32": lambda a, b, c: max(signed(a), signed(b)),
    "shl.b32": lambda a, b, c: a << b if b < 32 else 0, "shr.u32": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b, c: signed(a) >> min(b, 31),
    "div.s32": lambda a, b, c: int(signed(a) / signed(b)) if b else -1,
    "rem.u32": lambda a, b, c: a % b if b else a,
}  # fmt: skip


def signed(a: int) -> int:
    return a - 2**32 if a >= 2**31 else a


@pytest.mark.parametrize("name", INTEGERS)
@given(rows=words, small=st.booleans())
@settings(max_examples=10, deadline=None)
def test_integers_are_pythons(name, rows, small):
    """small: second operands below 40, the range in which shifts and quotients are interesting."""
    rows = [(a, b % 40 if small else b, c) for a, b, c in rows]
    out = torch.empty(32, dtype=torch.int32)
    each_lane(f"{name} %r10, %r20, %r21;", torch.stack([bits(*row) for row in rows]), out)
    assert out.tolist() == [signed(INTEGERS[name](*row) % 2**32) for row in rows]


@given(rows=words, table=st.integers(0, 255), start=st.integers(0, 40), length=st.integers(0, 40))
@settings(max_examples=20, deadline=None)
def test_bits_are_taken_put_and_permuted_as_strings_are(rows, table, start, length):
    def expect(instruction: str, function) -> None:
        out = each_lane(instruction, torch.stack([bits(*row) for row in rows]), torch.empty(32, dtype=torch.int32))
        assert out.tolist() == [signed(function(*row)) for row in rows], instruction

    def field(a: int) -> str:  # lowest bit first
        return f"{a:032b}"[::-1][start : start + length]

    def extended(a: int) -> int:
        text = field(a)
        return int((text[-1] * (32 - len(text)) + text[::-1]) or "0", 2) if text else 0

    expect(f"bfe.u32 %r10, %r20, {start}, {length};", lambda a, b, c: int(field(a)[::-1] or "0", 2))
    expect(f"bfe.s32 %r10, %r20, {start}, {length};", lambda a, b, c: extended(a))
    expect(f"lop3.b32 %r10, %r20, %r21, %r22, {table};", lambda a, b, c: sum(
        (table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32)))  # fmt: skip
    expect("prmt.b32 %r10, %r20, %r21, 29984;", lambda a, b, c: int.from_bytes(  # 0x7520: bytes 0, 2, 5, 7
        bytes((a.to_bytes(4, "little") + b.to_bytes(4, "little"))[i] for i in (0, 2, 5, 7)), "little"))  # fmt: skip
    expect("popc.b32 %r10, %r20;", lambda a, b, c: f"{a:b}".count("1"))
    expect("clz.b32 %r10, %r20;", lambda a, b, c: 32 - a.bit_length())


FLOATS = [0.0, -0.0, 1.0, -1.5, 3.0, 1e-3, 65504.0, 1e30, -1e-30, 2.0**-133, float("inf"), -float("inf"), float("nan"), 1.0 / 3]


def test_floats_are_rounded_as_pytorch_rounds_them():
    x = torch.tensor([FLOATS[i % len(FLOATS)] * (1 + i * 2.0**-12) for i in range(32)]).reshape(32, 1)
    for name, dtype in (("cvt.rn.bf16.f32", torch.bfloat16), ("cvt.rn.f16.f32", torch.float16)):
        out = each_lane(f"{name} %rs10, %r20;", x, torch.empty(32, dtype=dtype), result="b16")
        torch.testing.assert_close(out, x[:, 0].to(dtype), rtol=0, atol=0, equal_nan=True)
    packed = each_lane("cvt.rn.bf16x2.f32 %r10, %r20, %r21;", torch.cat((x, x.flip(0)), 1), torch.empty(32, dtype=torch.int32))
    halves = packed.view(torch.bfloat16).view(32, 2)  # the first operand is the upper half
    torch.testing.assert_close(halves, torch.cat((x.flip(0), x), 1).bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = each_lane("cvt.f32.bf16 %r10, %rs20;", x.bfloat16(), torch.empty(32), kind="b16")
    torch.testing.assert_close(back, x[:, 0].bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_a_fused_product_rounds_once_and_a_pair_of_16_bits_each_alone():
    torch.manual_seed(0)
    a, b, c = (torch.randn(32, 1) for _ in range(3))
    out = each_lane("fma.rn.f32 %r10, %r20, %r21, %r22;", torch.cat((a, b, c), 1), torch.empty(32))
    assert torch.equal(out, (a.double() * b.double() + c.double()).float()[:, 0])
    assert not torch.equal(out, (a * b + c)[:, 0])
    pairs = torch.randn(32, 6).bfloat16()
    out = each_lane("fma.rn.bf16x2 %r10, %r20, %r21, %r22;", pairs.view(torch.int32), torch.empty(32, dtype=torch.int32))
    wanted = (pairs[:, 0:2].double() * pairs[:, 2:4].double() + pairs[:, 4:6].double()).bfloat16()
    assert torch.equal(out.view(torch.bfloat16).view(32, 2), wanted)


def test_comparisons_with_nan_are_false_unless_they_say_otherwise():
    x = torch.tensor([[1.0, 2.0], [2.0, 2.0], [float("nan"), 2.0], [3.0, float("nan")]] * 8)
    for name, wanted in (("lt", [1, 0, 0, 0]), ("ltu", [1, 0, 1, 1]), ("ne", [1, 0, 0, 0]), ("neu", [1, 0, 1, 1]),
                         ("geu", [0, 1, 1, 1]), ("nan", [0, 0, 1, 1]), ("num", [1, 1, 0, 0])):  # fmt: skip
        body = f"setp.{name}.f32 %p1, %r20, %r21;\nselp.b32 %r10, 1, 0, %p1;"
        assert each_lane(body, x, torch.empty(32, dtype=torch.int32)).tolist() == wanted * 8, name


@given(seed=st.integers(0, 2**32 - 1), move=st.integers(0, 31))
@settings(max_examples=20, deadline=None)
def test_shuffles_take_from_the_lane_they_name(seed, move):
    values = torch.randint(0, 2**31, (32, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    held = values[:, 0].tolist()
    for mode, clamp, source in (("bfly", 31, lambda i: i ^ move), ("idx", 31, lambda i: move),
                                ("up", 0, lambda i: i - move), ("down", 31, lambda i: i + move)):  # fmt: skip
        body = f"shfl.sync.{mode}.b32 %r10, %r20, {move}, {clamp}, -1;"
        out = each_lane(body, values, torch.empty(32, dtype=torch.int32)).tolist()
        assert out == [held[source(i)] if 0 <= source(i) < 32 else held[i] for i in range(32)], mode
    out = each_lane("redux.sync.max.s32 %r10, %r20, -1;", values, torch.empty(32, dtype=torch.int32))
    assert out.tolist() == [max(held)] * 32


def test_a_rounding_to_odd_makes_two_roundings_one():
    torch.manual_seed(1)
    exact = np.concatenate((np.random.default_rng(0).normal(size=2000), 1 + 2.0**-8 + np.array([2.0**-40, -(2.0**-40), 0])))
    once = torch.from_numpy(exact).to(torch.float64)
    nearest = torch.stack([b for b in (once.float().bfloat16().view(torch.int16) + d for d in (-1, 0, 1))]).view(torch.bfloat16)
    wanted = nearest.double().sub(once).abs().min(0).values
    ours = torch.from_numpy(numbers.to_bf16(exact).astype(np.int32)).to(torch.int16).view(torch.bfloat16)
    assert torch.equal((ours.double() - once).abs(), wanted)


# Ways through a program


def test_threads_that_part_meet_again():
    """Lanes loop a different number of times: the Collatz steps of lane + 1."""
    out = torch.full((64,), -1, dtype=torch.int32)
    run("""
        mov.u32 %r2, %ctaid.x;
        mad.lo.s32 %r3, %r2, 32, %r1;
        add.s32 %r4, %r3, 1;
        mov.b32 %r5, 0;
    $loop:
        setp.eq.s32 %p1, %r4, 1;
        @%p1 bra $done;
        and.b32 %r6, %r4, 1;
        setp.eq.s32 %p2, %r6, 0;
        @%p2 bra $even;
        mad.lo.s32 %r4, %r4, 3, 1;
        bra.uni $next;
    $even:
        shr.s32 %r4, %r4, 1;
    $next:
        add.s32 %r5, %r5, 1;
        bra.uni $loop;
    $done:
        mad.wide.u32 %rd3, %r3, 4, %rd1;
        st.global.b32 [%rd3], %r5;
    """, out, grid=(2, 1, 1))  # fmt: skip

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    assert out.tolist() == [steps(n) for n in range(1, 65)]


def test_threads_that_parted_meet_before_a_barrier():
    """At the first place that all pass, not at the end, which all pass too."""
    skip = "setp.lt.s32 %p1, %r1, {};\n@%p1 bra $next{};\nadd.s32 %r4, %r4, 1;\n$next{}:\n"
    out = torch.zeros(32, dtype=torch.int32)
    run("mov.b32 %r4, 0;\n" + skip.format(5, 1, 1) + "bar.sync 0;\n" + skip.format(9, 2, 2)
        + "mad.wide.u32 %rd3, %r1, 4, %rd1;\nst.global.b32 [%rd3], %r4;", out)  # fmt: skip
    assert out.tolist() == [0] * 5 + [1] * 4 + [2] * 23


def test_a_grid_has_three_axes_and_blocks_beyond_one_run():
    out = torch.zeros(3, 50, 40, dtype=torch.int32)
    run("""
        mov.u32 %r2, %ctaid.x;
        mov.u32 %r3, %ctaid.y;
        mov.u32 %r4, %ctaid.z;
        mov.u32 %r5, %nctaid.y;
        mad.lo.s32 %r6, %r4, %r5, %r3;
        mov.u32 %r7, %nctaid.x;
        mad.lo.s32 %r6, %r6, %r7, %r2;
        mad.wide.u32 %rd3, %r6, 4, %rd1;
        setp.eq.s32 %p1, %r1, 0;
        @%p1 st.global.b32 [%rd3], %r6;
    """, out, grid=(40, 50, 3))  # fmt: skip
    assert torch.equal(out.flatten(), torch.arange(6000, dtype=torch.int32))


# What is no result


def expect_fault(body: str, text: str, *arguments, **kwargs) -> None:
    with pytest.raises(Fault, match=text):
        run(body, *(arguments or (torch.zeros(64), torch.zeros(64))), **kwargs)


OFFSET = "mad.wide.u32 %rd3, %r1, 4, %rd1;\nadd.s64 %rd3, %rd3, {};\n"
SLOT = "shl.b32 %r2, %r1, 2;\nmov.b32 %r3, global_smem;\nadd.s32 %r2, %r2, %r3;\n"


def test_an_access_outside_every_tensor_or_misaligned_is_a_fault():
    expect_fault(OFFSET.format(256 - 124) + "ld.global.b32 %r4, [%rd3];", "reads 4 bytes outside every tensor.* byte 256 of .* 256")
    expect_fault(OFFSET.format(-4) + "st.global.b32 [%rd3], %r1;", "writes 4 bytes outside every tensor")
    expect_fault(OFFSET.format(2) + "ld.global.b32 %r4, [%rd3];", "no multiple of 4")
    expect_fault(OFFSET.format(0) + "ld.global.v2.b32 {%r4, %r5}, [%rd3];", "no multiple of 8")
    expect_fault(SLOT + "st.shared.b32 [%r2 + 1024], %r1;", "outside it", shared=1024)


def test_what_lies_around_a_tensor_under_test_is_outside():
    house = House.of(torch.zeros(64))
    run(OFFSET.format(0) + "ld.global.b32 %r4, [%rd3];", house.tensor, torch.zeros(64))
    for place in (-4, 256 - 124, 256 + 400):
        expect_fault(OFFSET.format(place) + "ld.global.b32 %r4, [%rd3];", "outside every tensor", house.tensor, torch.zeros(64))
    known = len(INSIDE)
    del house
    assert len(INSIDE) == known - 1


def test_threads_and_blocks_that_write_one_address_are_a_fault_unless_they_agree():
    expect_fault("st.global.b32 [%rd1], %r1;", "two threads write different bytes")
    expect_fault("mov.u32 %r2, %ctaid.x;\nst.global.b32 [%rd1], %r2;", "two threads write different bytes", grid=(2, 1, 1))
    later = "mov.u32 %r2, %ctaid.x;\nsetp.eq.s32 %p1, %r2, {};\n@%p1 st.global.b32 [%rd1], %r2;\n"
    expect_fault(later.format(0) + later.format(1), "writes other bytes than another block", grid=(2, 1, 1))
    expect_fault(
        "mov.u32 %r2, %ctaid.x;\nmad.wide.u32 %rd3, %r2, 4, %rd1;\nst.global.b32 [%rd3], %r2;\nld.global.b32 %r4, [%rd1];",
        "reads what another block wrote", grid=(2, 1, 1),
    )  # fmt: skip
    expect_fault(
        "mov.u32 %r2, %ctaid.x;\nmov.b32 %r3, 1;\nsub.s32 %r3, %r3, %r2;\nmad.wide.u32 %rd3, %r3, 4, %rd1;\n"
        "ld.global.b32 %r4, [%rd3];\nmad.wide.u32 %rd3, %r2, 4, %rd1;\nadd.s32 %r2, %r2, 5;\nst.global.b32 [%rd3], %r2;",
        "writes other bytes where another block has read", grid=(2, 1, 1),
    )  # fmt: skip
    expect_fault(SLOT + "st.shared.b32 [%r3], %r1;", "two warps write different bytes", threads=64)
    run("mov.b32 %r4, 7;\nst.global.b32 [%rd1], %r4;", out := torch.zeros(64, dtype=torch.int32), grid=(3, 1, 1))
    assert out[0] == 7


REVERSED = SLOT + """
    st.shared.b32 [%r2], %r1;
    {barrier}
    sub.s32 %r5, 63, %r1;
    shl.b32 %r5, %r5, 2;
    add.s32 %r5, %r5, %r3;
    ld.shared.b32 %r6, [%r5];
    {second}
    st.shared.b32 [%r2], %r6;
    mad.wide.u32 %rd3, %r1, 4, %rd1;
    st.global.b32 [%rd3], %r6;
"""


def test_warps_that_share_memory_need_a_barrier_before_and_after():
    out = torch.zeros(64, dtype=torch.int32)
    run(REVERSED.format(barrier="bar.sync 0;", second="bar.sync 0;"), out, threads=64)
    assert out.tolist() == list(range(63, -1, -1))
    for barrier, second, text in (("", "bar.sync 0;", "reads shared memory that another warp wrote"),
                                  ("bar.sync 0;", "", "writes shared memory that another warp read"),
                                  ("bar.warp.sync -1;", "bar.sync 0;", "reads shared memory that another warp wrote")):  # fmt: skip
        expect_fault(REVERSED.format(barrier=barrier, second=second), text, out, threads=64)
    both = "mov.b32 %r3, global_smem;\nld.shared.b32 %r4, [%r3];\nsetp.eq.s32 %p1, %r1, {};\n@%p1 st.shared.b32 [%r3], %r1;"
    for writer in (0, 32):  # what two warps have read neither of them may write
        expect_fault(both.format(writer), "writes shared memory that another warp read", out, threads=64)
    run(REVERSED.replace("63", "31").format(barrier="", second=""), out)  # one warp needs none
    expect_fault("setp.lt.s32 %p1, %r1, 5;\n@%p1 bra $some;\nbra.uni $end;\n$some:\nbar.sync 0;\n$end:\n", "do not reach")


COPIED = SLOT + """
    mad.wide.u32 %rd3, %r1, 4, %rd1;
    cp.async.ca.shared.global [%r2], [%rd3], 0x4;
    cp.async.commit_group;
    {wait}
    {barrier}
    xor.b32 %r5, %r1, {lane};
    shl.b32 %r5, %r5, 2;
    add.s32 %r5, %r5, %r3;
    ld.shared.b32 %r6, [%r5];
    mad.wide.u32 %rd4, %r1, 4, %rd2;
    st.global.b32 [%rd4], %r6;
"""


def test_a_copy_arrives_when_it_is_waited_for():
    given, out = torch.arange(64.0), torch.zeros(64)
    run(COPIED.format(wait="cp.async.wait_group 0;", barrier="bar.sync 0;", lane=63), given, out, threads=64)
    assert torch.equal(out, given.flip(0))
    run(COPIED.format(wait="cp.async.wait_group 1;", barrier="bar.sync 0;", lane=63), given, out, threads=64)
    assert out.isnan().all()  # it may still be on its way
    before = SLOT + "st.shared.b32 [%r2], %r1;\nbar.sync 0;\n"
    run(COPIED.replace(SLOT, before).format(wait="cp.async.wait_group 1;", barrier="bar.sync 0;", lane=63), given, out, threads=64)
    assert out.isnan().all()  # and what was there is no longer
    expect_fault(COPIED.format(wait="cp.async.wait_group 0;", barrier="", lane=63), "another warp wrote", given, out, threads=64)


def test_what_is_unknown_is_refused_by_name():
    with pytest.raises(RequestError, match="does not know the instruction 'tex"):
        run("tex.1d.v4.s32.s32 {%r1, %r2, %r3, %r4}, [%rd1, {%r5}];", torch.zeros(4))
    with pytest.raises(RequestError, match="has 0 kernels"):
        ptx.parse(".version 8.7")
    with pytest.raises(RequestError, match="ends within a kernel"):
        ptx.parse(HEAD + "ret;")


# Matrices: every lane holds what the instruction's picture says, so a product with a matrix of units gives it back


def fragment(rows: int, columns: int) -> list[tuple[int, int]]:
    """(row, column) of the numbers that lane 0 to 31 hold, 2 a register: ISA, figures of mma.m16n8k16."""
    return [(g + 8 * (r % 2), 2 * c + e + 8 * (r // 2)) for g in range(8) for c in range(4) for r in range(rows * columns // 64)
            for e in range(2)]  # fmt: skip


def test_a_tensor_core_multiplies_the_fragments_of_the_isa():
    torch.manual_seed(2)
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    lanes = torch.stack([a[r, c] for r, c in fragment(16, 16)]).view(32, 8).view(torch.int32)
    right = torch.stack([b[2 * c + e + 8 * h, g] for g in range(8) for c in range(4) for h in range(2) for e in range(2)])
    right = right.view(32, 4).view(torch.int32)
    out = torch.empty(32, 4)
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%rd3 + {4 * i}];\n" for i in range(6))
    zeros = "".join(f"mov.b32 %r{20 + i}, 0;\n" for i in range(4))
    run(f"""
        mad.wide.u32 %rd3, %r1, 24, %rd1;
        mad.wide.u32 %rd4, %r1, 16, %rd2;
        {loads}{zeros}
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%r20, %r21, %r22, %r23}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r20, %r21, %r22, %r23}};
        st.global.v4.b32 [%rd4], {{%r20, %r21, %r22, %r23}};
    """, torch.cat((lanes, right), 1).contiguous(), out)  # fmt: skip
    product = a.float() @ b.float()
    wanted = torch.stack([product[g + 8 * h, 2 * c + e] for g in range(8) for c in range(4) for h in range(2) for e in range(2)])
    torch.testing.assert_close(out, wanted.view(32, 4), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("turned", ["", ".trans"])
def test_ldmatrix_and_stmatrix_are_each_others_inverse_and_move_rows(turned):
    given, out = torch.arange(256, dtype=torch.int16), torch.zeros(256, dtype=torch.int16)
    run(f"""
        mad.wide.u32 %rd3, %r1, 16, %rd1;
        mad.wide.u32 %rd4, %r1, 16, %rd2;
        mov.b32 %r3, global_smem;
        mad.lo.s32 %r2, %r1, 16, %r3;
        ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd3];
        st.shared.v4.b32 [%r2], {{%r4, %r5, %r6, %r7}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{turned}.shared.b16 {{%r4, %r5, %r6, %r7}}, [%r2];
        st.global.v4.b32 [%rd4], {{%r4, %r5, %r6, %r7}};
    """, given, out)  # fmt: skip
    matrices = given.view(4, 8, 8).mT if turned else given.view(4, 8, 8)
    wanted = matrices.reshape(4, 32, 2).transpose(0, 1)  # lane, matrix, two numbers
    assert torch.equal(out.view(32, 4, 2), wanted)


# What Triton compiles


@pytest.fixture(scope="module")
def triton_kernels(tmp_path_factory):
    """Kernels of a file of their own: Triton reads their source."""
    path = tmp_path_factory.mktemp("kernels") / "emulated.py"
    path.write_text(KERNELS)
    found = importlib.util.spec_from_file_location("emulated", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


KERNELS = """
import triton
import triton.language as tl


@triton.jit
def product(a, b, out, a0, a1, b0, b1, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, MADE: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for step in range(steps):
        left = tl.load(a + i[:, None] * a0 + (step * K + k)[None, :] * a1)
        right = tl.load(b + (step * K + k)[:, None] * b0 + j[None, :] * b1)
        if MADE:  # the left operand comes from registers
            left = (left.to(tl.float32) * 2).to(left.dtype)
        total = tl.dot(left, right, total)
    tl.store(out + i[:, None] * N + j[None, :], total)


@triton.jit
def sums(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    values = tl.load(x + i).to(tl.float32)
    tl.store(out + i, tl.cumsum(values, 0) + tl.sum(tl.exp2(values)))
"""


@needs_triton
@pytest.mark.parametrize("target, dtype, turned", [
    *((target, *rest) for target in ("sm_80", "sm_90") for rest in (
        (torch.bfloat16, ""), (torch.bfloat16, "a"), (torch.float16, "b"), (torch.bfloat16, "ab"), (torch.float32, ""))),
    ("sm_90", torch.float8_e4m3fn, "b"),  # an sm_80 has none
])  # fmt: skip
def test_products_of_tiles_are_pytorchs(triton_kernels, target, dtype, turned):
    """On sm_90 through descriptors of shared memory in every order of axes and several swizzles; pipelined copies feed them."""
    torch.manual_seed(3)
    m, n, k, steps = 64, 32, 64, 3
    a, b = torch.randn(m, k * steps).to(dtype), torch.randn(k * steps, n).to(dtype)
    a = a.t().contiguous().t() if "a" in turned else a
    b = b.t().contiguous().t() if "b" in turned else b
    wanted = a.float() @ b.float()
    for made in (False, True) if dtype in (torch.bfloat16, torch.float16) else (False,):
        out = torch.full((m, n), float("nan"))
        with emulate(target):
            code = triton_kernels.product[(1,)](a, b, out, *a.stride(), *b.stride(), steps, M=m, N=n, K=k, MADE=made, num_stages=3)
        tolerance = 2e-3 if dtype == torch.float32 else 1e-6  # tf32 keeps 11 bits
        assert float((out - (2 if made else 1) * wanted).norm() / wanted.norm()) < tolerance
        assert ("wgmma.mma_async" if target == "sm_90" else "mma.sync") in code.asm["ptx"]


@needs_triton
@pytest.mark.parametrize("removed", [
    r"bar\.sync\s+0;", r"cp\.async\.wait_group\s+\d;", r"fence\.proxy\.async\S*;", r"wgmma\.wait_group\S*\s+\d;",
])  # fmt: skip
def test_machine_code_without_its_synchronisation_is_seen(triton_kernels, removed):
    torch.manual_seed(4)
    a, b, out = torch.randn(64, 192).bfloat16(), torch.randn(192, 32).bfloat16(), torch.empty(64, 32)
    with emulate("sm_90"):
        code = triton_kernels.product[(1,)](a, b, out, 192, 1, 32, 1, 3, M=64, N=32, K=64, MADE=False, num_stages=3)
    text, shared = code.asm["ptx"], code.metadata.shared
    arguments = (a, b, out, 192, 32, 3)
    machine.run(ptx.parse(text), (1, 1, 1), 128, shared, arguments)
    whole = out.clone()
    broken, count = re.subn(removed, "", text)
    assert count > 0
    try:
        machine.run(ptx.parse(broken), (1, 1, 1), 128, shared, arguments)
    except Fault:
        return
    assert not torch.equal(out, whole)


@needs_triton
def test_scans_and_sums_across_warps(triton_kernels):
    x = torch.randn(512).bfloat16()
    for target in ("sm_80", "sm_90"):
        out = torch.empty(512)
        with emulate(target):
            triton_kernels.sums[(1,)](x, out, N=512, num_warps=4)
        torch.testing.assert_close(out, x.float().cumsum(0) + x.float().exp2().sum(), rtol=1e-5, atol=1e-4)


@needs_triton
def test_the_check_of_a_kernel_runs_on_an_emulated_gpu(capsys):
    good = ["kernels", "check", "swiglu", "--impl", "triton", "--dtype", "bfloat16", "--emulate", "sm_80", "--seeds", "2"]
    assert main(good) == 0
    assert "swiglu by triton in bfloat16 on cpu, emulating NVIDIA A100" in capsys.readouterr().out
    assert main([*good[:4], "no_mask", *good[5:], "--file", str(NO_MASK)]) == 1
    out = capsys.readouterr().out
    assert re.search("odd width .*outside", out) and re.search("width 1 .*ok", out)
    assert main(["kernels", "check", "swiglu", "--impl", "triton"]) == 2  # not emulated: there is no GPU
    assert main([*good, "--device", "cuda"]) == 2
    del backend.OPERATIONS["swiglu"].implementations["no_mask"]


def test_only_known_gpus_are_emulated():
    with pytest.raises(RequestError, match="no emulator of 'sm_100'"), emulate("sm_100"):
        pass
    assert backend.emulated() is None
