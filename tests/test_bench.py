"""The bench itself: does it catch planted faults, does it pass what is right, are its shapes and costs the official ones?"""

from __future__ import annotations

import argparse
import json
import math
import sys
import types
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qwen_ref import backend, ops
from qwen_ref.bench import bench, check, compile
from qwen_ref.bench.check import GUARD, Error, Finding, House, Poisoned, distance
from qwen_ref.bench.cli import add_commands
from qwen_ref.bench.shapes import MODELS, sizes
from qwen_ref.bench.subjects import SUBJECTS, Draw, subject
from qwen_ref.config import text_config
from qwen_ref.errors import EmulatorError, RequestError
from qwen_ref.quant import packed
from qwen_ref.quant.packed import Int4


@pytest.fixture
def planted():
    """register(operation, function): an implementation called "planted", forgotten after the test."""
    operations = []

    def register(operation, run):
        backend.register(operation, "planted")(run)
        operations.append(operation)

    yield register
    for operation in operations:
        backend.OPERATIONS[operation].implementations.pop("planted", None)


def faults_of(operation="rms_norm", **options):
    return " | ".join(check(operation, "planted", **{"seeds": 1, **options}).faults)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", list(SUBJECTS))
def test_every_formula_passes_its_own_check(operation, dtype):
    report = check(operation, "eager", dtype=dtype, seeds=2)
    assert report.ok, report.table()


def test_every_operation_has_inputs():
    assert set(SUBJECTS) == set(backend.OPERATIONS)


def test_other_right_implementations_pass(planted):
    planted("rms_norm", lambda x, w, eps: torch.nn.functional.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype) * w)
    assert check("rms_norm", "planted").ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", [op.name for op in backend.OPERATIONS.values() if "torch" in op.implementations])
def test_pytorchs_own_kernels_pass(operation, dtype):
    report = check(operation, "torch", dtype=dtype, seeds=2)
    assert report.ok, report.table()


# The five planted kernels, and seven more: each is the formula but for one thing a kernel gets wrong.
def test_wrong_eps_is_caught(planted):
    planted("rms_norm", lambda x, w, eps: ops.rms_norm(x, w, 1.1 * eps))
    assert "as small as eps: is off by" in faults_of()


def test_reading_past_the_row_is_caught(planted):
    def past(x, w, eps):
        wide = x.as_strided((*x.shape[:-1], x.shape[-1] + 1), x.stride()).float()  # one number too many in the mean
        return w * (x.float() * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    planted("rms_norm", past)
    assert "one row: gives NaN" in faults_of()


def test_changing_an_input_is_caught(planted):
    planted("rms_norm", lambda x, w, eps: x.copy_(ops.rms_norm(x, w, eps)))
    assert "hidden: changes an input" in faults_of()


def test_wrong_dtype_is_caught(planted):
    planted("rms_norm", lambda x, w, eps: ops.rms_norm(x.float(), w.float(), eps))
    assert "returns torch.float32" in faults_of(dtype=torch.bfloat16)
    assert not faults_of(dtype=torch.float32)


def test_nondeterminism_is_caught_unless_declared(planted):
    def noisy(x, w, eps):  # far below a rounding of fp16, yet some numbers round the other way
        return (ops.rms_norm(x.float(), w.float(), eps) * (1 + 1e-4 * torch.rand(x.shape))).to(x.dtype)

    planted("rms_norm", noisy)
    assert "differs between two runs" in faults_of(dtype=torch.float16)
    assert not faults_of(dtype=torch.float16, deterministic=False)


def test_wrong_shape_and_count_are_caught(planted):
    planted("rms_norm", lambda x, w, eps: ops.rms_norm(x, w, eps)[..., :-1])
    assert "returns shape (1, 3, 95) instead of (1, 3, 96)" in faults_of()
    planted("add_rms_norm", lambda x, r, w, eps: ops.rms_norm(x + r, w, eps))
    assert "returns 1 results instead of 2" in faults_of("add_rms_norm")


def test_an_exception_is_named(planted):
    def fails(x, w, eps):
        raise ZeroDivisionError("no rows")

    planted("rms_norm", fails)
    assert "raises ZeroDivisionError: no rows" in faults_of()


def test_output_left_unwritten_is_caught(planted):
    def lazy(gate, up):
        out = torch.empty_like(gate)
        out[..., :-1] = ops.swiglu(gate, up)[..., :-1]
        return out

    planted("swiglu", lazy)
    assert "leaves output unwritten" in faults_of("swiglu")


def test_writing_outside_the_output_is_caught(planted):
    def spills(gate, up):
        out = torch.empty(gate.shape, dtype=gate.dtype)
        if out.numel():
            out.as_strided((out.numel() + 1,), (1,)).zero_()
        return out.copy_(ops.swiglu(gate, up))

    planted("swiglu", spills)
    assert "writes outside its output" in faults_of("swiglu")


def test_memory_of_an_input_and_a_result_given_twice_are_caught(planted):
    kept: dict = {}

    def cached(x, w, eps):  # as if two layers shared one buffer
        return kept.setdefault(x.shape, torch.empty_like(x)).copy_(ops.rms_norm(x, w, eps))

    planted("rms_norm", cached)
    assert "returns the same memory again" in faults_of()

    def keeps(x, weight, state=None):
        y, after = ops.causal_conv1d(x, weight, state)
        width = weight.shape[-1]
        return y, x[:, -width:] if x.shape[1] >= width else after

    planted("causal_conv1d", keeps)
    assert "returns the memory of an input" in faults_of("causal_conv1d")


def test_writing_outside_memory_of_zeros_is_caught(planted):
    def spills(gate, up):
        out = torch.zeros_like(gate)
        if out.numel():
            out.as_strided((out.numel() + 1,), (1,)).fill_(3)
        return out.copy_(ops.swiglu(gate, up))

    planted("swiglu", spills)
    assert "writes outside its output" in faults_of("swiglu")


def test_a_maximum_that_passes_over_nan_is_caught(planted):
    """As a GPU's does: what is read unwritten must not only be NaN."""

    def reads(x, w, eps):
        out = torch.empty_like(x)
        return torch.fmax(out, ops.rms_norm(x, w, eps))

    planted("rms_norm", reads)
    assert "is off by" in faults_of()


def test_leaving_the_process_is_no_success(planted, tmp_path):
    def leaves(x, w, eps):
        raise SystemExit(0)

    planted("rms_norm", leaves)
    assert "raises SystemExit" in faults_of()
    (tmp_path / "mine.py").write_text("raise SystemExit(0)")
    with pytest.raises(RequestError, match="SystemExit"):
        check("swiglu", "eager", file=tmp_path / "mine.py")


def test_what_the_emulator_does_not_know_is_no_fault_of_the_kernel(planted):
    def atomic(x, w, eps):
        raise EmulatorError("the emulator does not know the instruction 'atom.global.add'")

    planted("rms_norm", atomic)
    with pytest.raises(EmulatorError, match=r"atom\.global"):
        check("rms_norm", "planted", seeds=1)


def test_an_implementation_asked_for_that_cannot_run_is_status_2(monkeypatch):
    from qwen_ref.bench import measure

    def refused(*args, **kwargs):
        rows = [measure.Timing("8 x 8", "eager", median=1.0), measure.Timing("8 x 8", "triton", refused="no GPU")]
        return SimpleNamespace(rows=rows, table=lambda: "")

    monkeypatch.setattr(measure, "bench", refused)
    assert run_cli("bench", "swiglu", "--device", "cpu", "--impl", "triton") == 2
    assert run_cli("bench", "swiglu", "--device", "cpu", "--impl", "eager") == run_cli("bench", "swiglu", "--device", "cpu") == 0


BOUNDED = {  # right up to some size, as kernels are that were never tried beyond
    "linear": lambda x, w, bias=None: ops.linear(x, w, bias) * (torch.arange(w.shape[0]) < 64),
    "rms_norm": lambda x, w, eps: w * (x * torch.rsqrt(x[..., :128].square().mean(-1, keepdim=True) + eps)).to(x.dtype),
    "moe_experts": lambda x, up, down, w, e: ops.moe_experts(x, up, down, w, e % 16),
    "attention_decode": lambda q, k, v, held, window=None: ops.attention_decode(q, k, v, held.clamp(max=256), window),
    "cross_entropy": lambda x, t: ops.cross_entropy(x[:, :16384], t.clamp(max=min(16384, x.shape[1]) - 1)),
    "sample": lambda x, heat, *rest: torch.where(heat == 0, x.shape[1] - 1 - x.flip(-1).argmax(-1), ops.sample(x, heat, *rest)),
}


@pytest.mark.parametrize("operation", BOUNDED)
def test_sizes_beyond_one_tile_are_tried(planted, operation):
    planted(operation, BOUNDED[operation])
    assert faults_of(operation)


def test_more_rows_than_a_tile_are_tried(planted):
    planted("linear", lambda x, w, bias=None: torch.where(torch.arange(max(1, x[..., 0].numel())).view(*x.shape[:-1], 1) < 32,
                                                          ops.linear(x, w, bias), 0) if x.numel() else ops.linear(x, w, bias))  # fmt: skip
    assert faults_of("linear")


def test_skipping_the_rounding_of_silu_is_allowed_but_a_coarser_sum_is_not(planted):
    planted("swiglu", lambda g, u: ops.swiglu(g.double(), u.double()).to(g.dtype))
    assert not faults_of("swiglu", dtype=torch.bfloat16)
    planted("swiglu", lambda g, u: ops.swiglu(g.bfloat16(), u.bfloat16()).to(g.dtype))
    assert "is off by" in faults_of("swiglu", dtype=torch.float32)


def test_router_ties_may_go_either_way_but_no_expert_twice(planted):
    def last_of_equals(logits, k, normalize):
        weights, experts = ops.router_topk(logits.flip(-1), k, normalize)
        return weights, logits.shape[-1] - 1 - experts

    planted("router_topk", last_of_equals)
    assert not faults_of("router_topk")
    planted("router_topk", lambda *args: (ops.router_topk(*args)[0], ops.router_topk(*args)[1] * 0))
    assert "the same expert twice" in faults_of("router_topk")
    planted("router_topk", lambda *args: (ops.router_topk(*args)[0], ops.router_topk(*args)[1] + 40))
    assert "outside the experts there are" in faults_of("router_topk")


def test_a_dropped_renormalisation_or_window_is_caught(planted):
    planted("router_topk", lambda logits, k, normalize: ops.router_topk(logits, k, True))
    assert "normalize=False: is off" in faults_of("router_topk")
    planted("attention", lambda q, k, v, mask: ops.attention(q, k, v, None))
    assert "sliding window: is off" in faults_of("attention")


def test_swapped_halves_and_a_shared_table_are_caught(planted):
    def interleaved(x, cos, sin):
        return x * cos[:, None] + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin[:, None]

    planted("rope", interleaved)
    assert "is off" in faults_of("rope")
    planted("rope", lambda x, cos, sin: ops.rope(x, cos[:1], sin[:1]))  # right as long as all sequences start alike
    assert "queries as the model has them: is off" in faults_of("rope")


def test_a_users_file_is_run_and_its_faults_are_the_users(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from qwen_ref import backend, ops\nbackend.register('swiglu', 'from_file')(lambda g, u: ops.swiglu(g, u))\n")
    assert check("swiglu", "from_file", file=file, seeds=1).ok
    del backend.OPERATIONS["swiglu"].implementations["from_file"]
    file.write_text("1 / 0")
    for bad, text in ((file, "ZeroDivisionError"), (tmp_path / "absent.py", "not a Python file")):
        with pytest.raises(RequestError, match=text):
            check("swiglu", "eager", file=bad)


def test_unknown_names_are_errors(monkeypatch):
    monkeypatch.delitem(backend.OPERATIONS["attention"].implementations, "triton")
    for call, text in (
        (lambda: check("rms_nrom", "eager"), "no inputs for 'rms_nrom'"),
        (lambda: check("rms_norm", "absent"), "no implementation 'absent'"),
        (lambda: check("rms_norm", "eager", model="Qwen/Qwen9"), "no shapes of 'Qwen/Qwen9'"),
        (lambda: check("moe_experts", "eager", model="Qwen/Qwen3-8B"), "has no experts"),
        (lambda: bench("rms_norm", implementations=["absent"]), "no implementation 'absent'"),
        (lambda: compile("attention"), "no Triton kernel"),
        (lambda: compile("rope", targets=["sm_1"]), "unknown target"),
    ):
        with pytest.raises(RequestError, match=text):
            call()


def test_compiling_for_a_model_that_lacks_the_operation_is_an_error():
    pytest.importorskip("triton")
    with pytest.raises(RequestError, match="moe_experts is not launched by Qwen/Qwen3-8B; try Qwen/Qwen3-30B-A3B"):
        compile("moe_experts", models=["Qwen/Qwen3-8B"])


def test_compiling_without_triton_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises ImportError
    with pytest.raises(RequestError, match=r"qwen-ref\[triton\]"):
        compile("rms_norm")


def test_poisoned_memory_keeps_strides_and_shows_every_change():
    x = torch.arange(24.0).view(2, 3, 4).transpose(0, 1)[..., ::2]
    house = House.of(x)
    assert torch.equal(house.tensor, x) and house.tensor.stride() == x.stride() and not house.changed()
    assert house.buffer.isnan().sum() == house.buffer.numel() - x.numel()  # the gaps between its numbers too
    house.buffer[GUARD + 1] = 0.0  # in a gap
    assert house.changed()
    with Poisoned() as made:
        out = torch.empty(3, 5)
    assert out.isnan().all() and not made.houses[0].spilled()
    out.zero_()
    assert not made.houses[0].spilled()
    out.as_strided((1,), (1,), out.storage_offset() - 1).zero_()
    assert made.houses[0].spilled()


PACKED = [name for name in SUBJECTS if name.partition("_")[2] in ("int4", "int8", "fp8", "fp8_dynamic", "code4", "gguf")]


def test_packed_arguments_are_poisoned_inside_and_their_codes_read_exactly(planted):
    """A NamedTuple's tensors are housed one by one, and fp64 judges the values that the codes stand for."""

    def spoils(x, weight, bias=None):
        y = packed.linear_fp8(x, weight, bias)
        weight.scale.mul_(2)
        return y

    planted("linear_fp8", spoils)
    assert "1 rows: changes an input" in faults_of("linear_fp8")
    planted("linear_int4", lambda x, w, bias=None: packed.linear_int4(x, w._replace(codes=w.codes >> 4 | w.codes << 4), bias))
    assert "6 rows, no zeros: is off by" in faults_of("linear_int4")
    planted("linear_int8", lambda x, w, bias=None: packed.linear_int8(x, w._replace(zero=None), bias))
    assert "1 rows, groups: is off by" in faults_of("linear_int8")
    for kind in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
        codes = torch.arange(127, dtype=torch.uint8).view(kind)
        house = House.of(codes)
        assert not house.changed() and house.buffer.float().isnan().sum() == 2 * GUARD
        assert torch.equal(codes.double(), codes.float().double())


def test_packed_inputs_are_about_as_large_as_real_ones():
    """x is normal and weights are K^-0.5 large: so is the result, and no error is hidden by one large term."""
    for name in PACKED:
        for case, args in subject(name).real(sizes("tiny" if "gguf" not in name else "Qwen/Qwen3-30B-A3B"), 3,
                                             Draw(1, torch.float32, torch.device("cpu"))):  # fmt: skip
            if name.startswith("linear"):
                assert 0.4 < float(subject(name).formula(*args).std()) < 2.5, case
            if "gguf" in name:
                break  # these sizes are a real model's


@pytest.mark.parametrize("later, ok", [(2e-6, True), (1e-6, False)])
def test_an_error_is_held_against_a_kernel_after_a_second_look(monkeypatch, planted, later, ok):
    """In the first five seeds the formula is lucky: the kernel errs three times as much. In later ones it is not, or it is."""
    planted("swiglu", ops.swiglu)
    looks = []

    def examine(what, run, args, deterministic, **rest):
        looks.append(args[0])
        own = 1e-6 if len(looks) <= 5 else later
        return Finding((), ((Error(3e-6, 3e-6), Error(own, own)),))

    monkeypatch.setattr(sys.modules["qwen_ref.bench.check"], "examine", examine)
    monkeypatch.setattr(sys.modules["qwen_ref.bench.check"], "subject", lambda name: replace(subject(name), cases=one_case))
    report = check("swiglu", "planted")
    assert report.ok == ok, report.table()
    assert len(looks) == 40 and not any(torch.equal(looks[0], other) for other in looks[1:])


def one_case(sizes, draw):
    yield "rows", (draw.normal(3, 5), draw.normal(3, 5))


def test_distance_is_the_textbooks():
    error = distance(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert error.l2 == pytest.approx(0.5 / 5) and error.max == pytest.approx(0.5 / 4)
    assert math.isnan(distance(torch.tensor([math.nan]), torch.ones(1).double()).l2)


def test_shapes_are_those_of_the_official_configs(data):
    seen = set()
    for file in (data / "configs").glob("*onfig*.json"):
        config = text_config(json.loads(file.read_text(encoding="utf-8")))
        name = file.name.removeprefix("Qwen--").removeprefix("config-").removesuffix("_config.json").removesuffix(".json")
        size = MODELS.get(f"Qwen/{name}")
        if size is None:
            continue
        seen.add(name)
        moe = "num_experts" in config
        assert size.hidden == config["hidden_size"] and size.eps == config["rms_norm_eps"], name
        assert size.intermediate == config["moe_intermediate_size" if moe else "intermediate_size"], name
        assert (size.heads, size.kv_heads, size.head_dim) == (
            config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]), name
        assert (size.experts, size.top_k) == ((config["num_experts"], config["num_experts_per_tok"]) if moe else (0, 0)), name
    without_file = {"Qwen1.5-MoE-A2.7B", "Qwen2.5-0.5B", "Qwen3-Next-80B-A3B-Instruct", "Qwen3.5-0.8B", "Qwen4-Exp"}
    assert seen == {name.removeprefix("Qwen/") for name in MODELS} - without_file


def test_costs_by_hand():
    def cost(operation, model, tokens, dtype=torch.bfloat16):
        what = subject(operation)
        return [what.cost(*args) for _, args in what.real(sizes(model), tokens, Draw(0, dtype, torch.device("meta")))]

    assert cost("rms_norm", "Qwen/Qwen3-8B", 7)[0] == (2 * (2 * 7 * 4096 + 4096), 4 * 7 * 4096)
    assert cost("add_rms_norm", "Qwen/Qwen3-8B", 7)[0].bytes == 2 * (4 * 7 * 4096 + 4096)
    assert cost("swiglu", "Qwen/Qwen3-8B", 7)[0].bytes == 2 * 3 * 7 * 12288
    assert cost("rope", "Qwen/Qwen3-8B", 7)[1].bytes == 2 * (2 * 7 * 8 * 128 + 2 * 7 * 128)
    assert cost("router_topk", "Qwen/Qwen3-30B-A3B", 7)[0].bytes == 7 * (128 * 2 + 8 * 2 + 8 * 8)
    one = cost("moe_experts", "Qwen/Qwen3-30B-A3B", 1)[0]  # eight experts' weights, the token in and out, the choice
    assert one.bytes == 2 * 8 * 3 * 2048 * 768 + 2 * 2 * 2048 + 8 * (2 + 8)
    assert one.flops == 2 * 8 * 3 * 2048 * 768
    group = cost("linear_int4", "Qwen/Qwen3-8B", 7)[0]  # q: codes, fp16 scales, zeros of a byte, x and the result
    assert group.bytes == 4096 * (2048 + 32 * (2 + 1)) + 2 * 7 * 4096 * 2 and group.flops == 2 * 7 * 4096 * 4096
    assert cost("linear_fp8", "Qwen/Qwen3-8B", 7)[0].bytes == 4096 * 4096 + 32 * 32 * 4 + 2 * 7 * 4096 * 2
    assert cost("linear_gguf", "Qwen/Qwen3-8B", 7)[0].bytes == 4096 * 16 * 144 + 2 * 7 * 4096 * 2
    one = cost("moe_int4", "Qwen/Qwen3-30B-A3B", 1)[0]
    codes = 8 * 3 * 2048 * 768
    assert one.bytes == codes // 2 + codes // 128 * 3 + 2 * 2 * 2048 + 8 * (2 + 8) and one.flops == 2 * codes
    pairs = int(ops.causal_mask(64, 64, torch.device("cpu")).sum())
    assert cost("attention", "Qwen/Qwen3-8B", 64)[0].flops == 2 * 2 * 128 * 32 * pairs
    assert cost("attention", "Qwen/Qwen3-8B", 1)[0].bytes == 2 * (2 * 32 * 128 + 2 * 4096 * 8 * 128)


def test_bench_times_the_right_and_refuses_the_wrong(planted, monkeypatch):
    from qwen_ref.bench import measure

    monkeypatch.setattr(measure, "roofline", lambda device, dtype: measure.Roofline(bandwidth=1e9, compute=1e8))
    planted("swiglu", lambda gate, up: ops.swiglu(gate, up) * 1.01)
    result = bench("swiglu", model="tiny", implementations=["eager", "planted"], dtype=torch.float32, tokens=[3], seconds=0.01)
    right, wrong = result.rows
    assert right.median > 0 and right.fast <= right.median <= right.slow
    assert right.bytes_per_second == pytest.approx(4 * 3 * 3 * 72 / right.median)
    assert right.share == pytest.approx(5 * 3 * 72 / 1e8 / right.median)  # 1080 FLOPs take longer here than 2592 bytes
    assert wrong.median is None and wrong.wrong and "its check failed" in wrong.refused
    assert "no time: its check failed" in result.table()
    assert json.loads(json.dumps(result.to_json()))["rows"][0]["median"] == right.median


def test_what_does_not_fit_the_memory_gets_no_time_and_is_not_called_wrong(planted, monkeypatch):
    from qwen_ref.bench import measure

    def examine(what, run, args, **rest):
        raise torch.OutOfMemoryError("the formula in fp64")

    monkeypatch.setattr(measure, "roofline", lambda device, dtype: measure.Roofline(bandwidth=1e9, compute=1e8))
    monkeypatch.setattr(measure, "examine", examine)
    planted("swiglu", ops.swiglu)
    options = {"model": "tiny", "dtype": torch.float32, "tokens": [3], "seconds": 0.01, "device": "cpu"}
    eager, ours = bench("swiglu", implementations=["eager", "planted"], **options).rows
    assert eager.median > 0 and ours.median is None and "does not fit the memory" in ours.refused and not ours.wrong


def test_bench_draws_its_roofline(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from qwen_ref.bench import measure

    monkeypatch.setattr(measure, "roofline", lambda device, dtype: measure.Roofline(bandwidth=1e9, compute=1e8))
    shape = ("--model", "tiny", "--tokens", "3", "--dtype", "float32", "--device", "cpu")
    assert run_cli("bench", "swiglu", "--impl", "eager", *shape, "--plot", str(tmp_path / "roofline.svg")) == 0
    assert "eager" in capsys.readouterr().out
    assert "eager, (1, 3, 72)" in (tmp_path / "roofline.svg").read_text()


def test_an_entry_for_one_gpu_is_compiled_for_its_architecture_only():
    from qwen_ref.bench.compile import ANY, INSTINCT, TARGETS, runs_on

    def targets(device):
        return [target for target in TARGETS if runs_on(device, target)]

    assert targets(ANY) == ["sm_80", "sm_90", "gfx942"]
    assert targets("NVIDIA H200") == targets("NVIDIA H100 80GB HBM3") == ["sm_90"]
    assert targets("NVIDIA A100-SXM4-80GB") == ["sm_80"] and targets("AMD Instinct MI300X") == targets(INSTINCT) == ["gfx942"]


def test_a_family_launches_by_its_own_entries():
    from qwen_ref.bench.compile import ANY, INSTINCT, Launch, made_on

    kernel = types.SimpleNamespace(fn=types.SimpleNamespace(__name__="kernel"))
    recorded = ((ANY, 16), (ANY, 4), ("NVIDIA H200", 8), ("NVIDIA H200", 4), (INSTINCT, 8), (INSTINCT, 4))
    found = [Launch(kernel, (("x", "*bf16"),), (), (), (("num_warps", warps),), device) for device, warps in recorded]

    def warps(target, found):
        return [dict(launch.options)["num_warps"] for launch in made_on(target, found)]

    assert warps("sm_80", found) == [16, 4] and warps("sm_90", found) == [16, 4, 8] and warps("gfx942", found) == [8, 4]
    assert warps("gfx942", found[:4]) == [16, 4]  # without entries for the family, those for any device


def test_what_an_amd_gpu_spills_to_memory_is_told_from_what_moves_between_registers():
    from qwen_ref.bench.compile import _amd_use

    said = ".sgpr_spill_count: 80\n.vgpr_count: 205\n.vgpr_spill_count: {}\n.private_segment_fixed_size: {}\n"
    assert _amd_use(said.format(0, 0)) == (205, 0) and _amd_use(said.format(8, 36)) == (205, 36)
    assert _amd_use("") == (None, None)


def test_bench_gives_a_kernel_without_its_device_no_time(monkeypatch):
    from qwen_ref.bench import measure

    monkeypatch.setattr(measure, "roofline", lambda device, dtype: measure.Roofline(1e9, 1e9))
    (row,) = bench("swiglu", model="tiny", implementations=["triton"], device="cpu", tokens=[1]).rows
    assert row.median is None and row.refused and not row.wrong


def test_roofline_is_measured():
    from qwen_ref.bench.measure import roofline

    roof = roofline(torch.device("cpu"), torch.float32)
    assert 1e8 < roof.bandwidth < 1e13 and 1e7 < roof.compute < 1e15  # no machine that runs this is outside


def test_rotatingcopies_of_differ_in_address_and_keep_strides():
    from qwen_ref.bench.measure import MOST_COPIES, copies_of

    x = torch.randn(8, 4, 6).transpose(0, 1)
    pair = Int4(torch.zeros(3, 2, dtype=torch.uint8), torch.ones(3, 1), None, 4)
    for args in copies_of((x, pair))[0]:
        assert type(args[1]) is Int4 and args[1].codes.data_ptr() != pair.codes.data_ptr() and args[1].group == 4
    copies, cold = copies_of((x, 1e-6))
    assert len({args[0].data_ptr() for args in copies}) == len(copies) == MOST_COPIES and not cold
    assert all(torch.equal(args[0], x) and args[0].stride() == x.stride() and args[1] == 1e-6 for args in copies)


def run_cli(*args):
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    parsed = parser.parse_args(["kernels", *args])
    return parsed.run(parsed)


def test_cli(planted, capsys):
    assert run_cli("list", "--json") == 0
    rows = {row["operation"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["rms_norm"]["runs"] == "eager" and rows["rms_norm"]["implementations"]["eager"] is None
    assert run_cli("list") == 0
    assert "add_rms_norm" in capsys.readouterr().out
    assert run_cli("check", "swiglu", "--impl", "eager", "--seeds", "1") == 0
    assert "right on all 9 inputs" in capsys.readouterr().out
    planted("swiglu", lambda gate, up: gate * up)
    assert run_cli("check", "swiglu", "--impl", "planted", "--json") == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    for arguments, text in ((("check", "swiglu", "--impl", "absent"), "no implementation"),
                            (("check", "swiglu", "--impl", "eager", "--device", "nonsense"), "cannot be used here"),
                            (("list", "--device", "cuda:99"), "cannot be used here"),
                            (("bench", "swiglu", "--device", "cuda:99"), "cannot be used here"),
                            (("bench", "swiglu", "--plot", "roof.txt"), "ends in .png"),
                            (("bench", "swiglu", "--plot", "nowhere/roof.png"), "folder that exists")):  # fmt: skip
        with pytest.raises(RequestError, match=text):
            run_cli(*arguments)


def test_what_is_called_compiled_was_compiled(monkeypatch):
    """Dynamo gives a function up for good that it first meets inside a dispatch mode, as the poisoned memory is one."""
    from torch._dynamo.utils import counters

    from qwen_ref.bench import measure

    monkeypatch.setattr(measure, "roofline", lambda device, dtype: measure.Roofline(bandwidth=1e9, compute=1e8))
    counters.clear()
    options = {"model": "tiny", "dtype": torch.float32, "tokens": [3], "seconds": 0.01, "device": "cpu"}
    (row,) = bench("swiglu", implementations=["compiled"], **options).rows
    assert row.median > 0 and counters["stats"]["unique_graphs"] == 1
