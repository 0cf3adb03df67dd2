"""The Triton kernels and how the backend reaches them.

Without a GPU, Triton's interpreter runs what the kernels say (in fp32: it truncates to bf16 where a GPU rounds), the emulator
runs what the compiler makes of them for a GPU (in bf16), and ahead-of-time compilation counts its registers and memory.
Triton decides when a kernel is defined whether it is interpreted, so each has a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen_ref import backend, ops
from qwen_ref.bench.compile import DTYPES, TOKENS
from qwen_ref.bench.shapes import OTHERS
from qwen_ref.errors import RequestError

ROOT = Path(__file__).resolve().parents[1]
KERNELS = tuple(op.name for op in backend.OPERATIONS.values() if "triton" in op.implementations)
LAYOUTS = ("int4", "int8", "fp8", "code4", "gguf")
PACKED_LINEAR = (*(f"linear_{layout}" for layout in LAYOUTS), "linear_fp8_dynamic")
PACKED = (*PACKED_LINEAR, *(f"moe_{layout}" for layout in LAYOUTS))
ONCE = {"moe_int8", "moe_fp8", "moe_code4"}  # compiled for one target: on the other, moe_int4 and moe_gguf stand for all
STREAMING = {  # nothing to multiply; the most registers, for many programs must fit to hide the latency of memory
    "rms_norm": 64, "add_rms_norm": 64, "swiglu": 64, "rope": 64, "norm_rope_write": 64, "router_topk": 128,
    "cross_entropy": 64, "sample": 128, "zero_centred_rms_norm": 64, "gated_rms_norm": 64, "causal_conv1d": 128,
    "gated_delta_step": 128, "stream_mix": 64, "stream_write": 64, "sigmoid_gate": 64,
    "take_columns": 64,
}  # fmt: skip
# The kernels that multiply tiles: in 16 bits they must be on the tensor cores, or they are right and ten times too slow.
MATRIX = {"attention", "split", "some_rows", "gate_up_tiles", "down_tiles", "scaled_tiles", "prepare", "carry",
          "block_scores", "chosen_blocks"}
DELTA = ("causal_conv1d", "gated_delta_rule", "gated_delta_step", "gated_rms_norm", "sigmoid_gate", "take_columns")  # of the hybrid models only
STREAMS = ("block_scores", "sparse_block_attention", "stream_mix", "stream_write")  # of Qwen4-Exp only
DENSE, MIXTURE = ("Qwen/Qwen3-8B",), ("Qwen/Qwen3-30B-A3B",)
MODELS = ("Qwen/Qwen3-0.6B", *DENSE, *MIXTURE)
TRITON = importlib.util.find_spec("triton")
HAS_AMD = TRITON is not None and (Path(str(TRITON.origin)).parent / "backends" / "amd").is_dir()
needs_triton = pytest.mark.skipif(
    TRITON is None, reason="Triton is not installed (pip install -e '.[triton]'): kernels not run"
)
needs_amd = pytest.mark.skipif(
    not HAS_AMD, reason="no Triton with an AMD backend (PyPI's wheel of 3.7.1 has one): nothing compiled for gfx942"
)


def python(code: str, *, interpret: bool, cache: Path | None = None) -> str:
    """What a fresh interpreter prints, with the repository's packages on its path."""
    return pythons([code], interpret=interpret, cache=cache)[0]


def pythons(codes: list[str], *, interpret: bool, cache: Path | None = None) -> list[str]:
    """Several at the same time."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    env |= {"TRITON_INTERPRET": "1" if interpret else "0"} | ({"TRITON_CACHE_DIR": str(cache)} if cache else {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", code], env=env, **pipes) for code in codes]
    done = [process.communicate() for process in running]
    for process, (_, error) in zip(running, done, strict=True):
        assert process.returncode == 0, error[-3000:]
    return [output for output, _ in done]


# The backend


def test_add_rms_norm_is_its_definition():
    x, residual, weight = torch.randn(3, 5), torch.randn(3, 5), torch.randn(5)
    total, normed = ops.add_rms_norm(x, residual, weight, 1e-6)
    exact = x.double() + residual.double()
    torch.testing.assert_close(total, exact.float())
    torch.testing.assert_close(normed, (weight * exact / (exact.square().sum(-1, True) / 5 + 1e-6).sqrt()).float())


def test_add_rms_norm_is_the_two_operations_in_bf16():
    x, residual, weight = (torch.randn(shape).bfloat16() for shape in ((3, 64), (3, 64), (64,)))
    total, normed = ops.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual) and torch.equal(normed, ops.rms_norm(x + residual, weight, 1e-6))
    total, normed = ops.add_rms_norm(x, residual, weight, 1e-6, True)
    assert torch.equal(total, x + residual) and torch.equal(normed, ops.zero_centred_rms_norm(x + residual, weight, 1e-6))


def test_sigmoid_gate_is_its_definition_and_rounds_every_step():
    x, gate, residual = torch.randn(3, 5), torch.randn(3, 1), torch.randn(3, 5)
    exact = x.double() / (1 + (-gate.double()).exp())
    torch.testing.assert_close(ops.sigmoid_gate(x, gate), exact.float())
    torch.testing.assert_close(ops.sigmoid_gate(x, gate.expand(3, 5), residual), (exact + residual).float())
    x, gate, residual = (torch.randn(3, 64).bfloat16() for _ in range(3))
    steps = (x.float() * (1 / (1 + (-gate.float()).exp())).bfloat16().float()).bfloat16()
    assert torch.equal(ops.sigmoid_gate(x, gate), steps) and torch.equal(ops.sigmoid_gate(x, gate, residual), residual + steps)


def test_a_report_imports_neither_triton_nor_the_kernels():
    code = (
        "import sys; from qwen_ref import backend; print(backend.report('cpu'));"
        "print('LOADED', [m for m in sys.modules if m.split('.')[0] in ('triton', 'qwen_kernels')])"
    )
    report, loaded = python(code, interpret=False).split("LOADED")
    assert loaded.strip() == "[]"
    for kernel in KERNELS:
        (line,) = (line for line in report.splitlines() if line.split()[0] == kernel)
        assert "triton (" in line and line.split()[1] in ("eager", "torch", "cpp")


@pytest.mark.parametrize("absent", ["triton", "qwen_kernels"])
def test_an_absent_package_is_the_reason(monkeypatch, absent):
    monkeypatch.setattr(backend, "_installed", lambda package: package != absent)
    assert f"triton (the {absent} package is not installed)" in backend.report() or f"triton ({absent} is not" in backend.report()
    x = torch.randn(3, 5)
    with backend.use("triton"):  # not strict: the formula runs
        torch.testing.assert_close(backend.rms_norm(x, torch.ones(5), 1e-6), ops.rms_norm(x, torch.ones(5), 1e-6))
    with backend.use("triton", strict=True), pytest.raises(RequestError, match="is not installed"):
        backend.rms_norm(x, torch.ones(5), 1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_the_reason(monkeypatch):
    monkeypatch.setattr(backend, "_installed", lambda package: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backend.report().count("triton (no GPU)") == len(KERNELS)


@pytest.mark.parametrize("choice", ["eager", "test_only"])
def test_operations_are_traced_whole_by_torch_compile(choice):
    calls = []

    @backend.register("rms_norm", "test_only")
    def doubled(x, weight, eps):
        calls.append(1)
        return 2 * ops.rms_norm(x, weight, eps)

    x, weight = torch.randn(3, 5), torch.randn(5)
    compiled = torch.compile(lambda x: backend.add_rms_norm(backend.rms_norm(x, weight, 1e-6), x, weight, 1e-6),
                             fullgraph=True, backend="aot_eager")  # fmt: skip
    try:
        with backend.use({"rms_norm": choice}):
            total, normed = compiled(x)
            factor = 2 if choice == "test_only" else 1
            torch.testing.assert_close(total, factor * ops.rms_norm(x, weight, 1e-6) + x)
            torch.testing.assert_close(normed, ops.rms_norm(total, weight, 1e-6))
        assert bool(calls) == (choice == "test_only")
    finally:
        del backend.OPERATIONS["rms_norm"].implementations["test_only"]
        torch.compiler.reset()


# The numbers, in the interpreter

CHECK = """
import json, torch
from importlib import import_module
from qwen_ref.bench import check
for operation in {packed}:  # an interpreter's time goes with the number of programs, which larger blocks make fewer
    for entry in import_module(f"qwen_kernels.{{operation}}").TUNED.values():
        if "CHUNKS" in entry:
            entry["BLOCK_N" if "BLOCK_N" in entry else "ROWS"] = 32
print(json.dumps([check(operation, "triton", dtype=torch.{dtype}, seeds=1).to_json() for operation in {kernels}]))
"""


# Experts of every packed layout have the decoder of its linear projections and share their tiles: some are emulated only.
CHECKED = (*(kernel for kernel in KERNELS if kernel not in PACKED), *PACKED_LINEAR, "moe_int4", "moe_fp8")


@pytest.fixture(scope="module")
def checked(once):
    halves = [tuple(kernel for kernel in CHECKED if (kernel in PACKED) == packed) for packed in (False, True)]
    codes = [CHECK.format(kernels=kernels, packed=PACKED, dtype="float32") for kernels in halves]
    outputs = once("checked", lambda: pythons(codes, interpret=True))
    return {report["operation"]: report for output in outputs for report in json.loads(output)}


@needs_triton
@pytest.mark.parametrize("kernel", CHECKED)
def test_kernel_is_right_on_every_awkward_input(checked, kernel):
    report = checked[kernel]
    assert report["rows"] and report["ok"], [row for row in report["rows"] if row["faults"]]


# The machine code, emulated

EMULATE = """
import json, torch
from qwen_ref.bench import check
from qwen_ref.bench.emulator import emulate
for target, kernels in {work}.items():
    with emulate(target):
        for kernel in kernels:
            report = check(kernel, "triton", dtype=torch.bfloat16, device="cpu", seeds=1, deterministic=False)
            print(json.dumps({{**report.to_json(), "target": target}}))
"""
# One target each, for compiling takes the time; both where the tensor cores are other instructions (mma, wgmma).
BOTH = ("attention_prefill", "linear_int8", "linear_fp8_dynamic")
EMULATED = {"sm_80": (*KERNELS[::2], *(k for k in BOTH if k not in KERNELS[::2])),
            "sm_90": (*KERNELS[1::2], *(k for k in BOTH if k not in KERNELS[1::2]))}  # fmt: skip


@pytest.fixture(scope="module")
def emulated(once, tmp_path_factory):
    cache = tmp_path_factory.mktemp("emulated")
    codes = [EMULATE.format(work={target: kernels}) for target, kernels in EMULATED.items()]
    outputs = once("emulated", lambda: pythons(codes, interpret=False, cache=cache))
    reports = [json.loads(line) for output in outputs for line in output.splitlines()]
    return {(report["operation"], report["target"]): report for report in reports}


@needs_triton
@pytest.mark.parametrize("kernel, target", [(kernel, target) for target in EMULATED for kernel in EMULATED[target]])
def test_machine_code_is_right_in_bf16_on_every_awkward_input(emulated, kernel, target):
    report = emulated[kernel, target]
    assert report["rows"] and report["ok"], [row for row in report["rows"] if row["faults"]]


@needs_triton
def test_kernels_round_where_the_formulas_round():
    """In fp16 nearly every number is the formula's to the bit: a rounding left out changes far more than the rare ones
    that another order of summation does."""
    code = """
import torch
from qwen_ref import backend, ops
torch.manual_seed(0)
x, y = torch.randn(2, 2, 3, 50, 64).half()
w, tables, logits = torch.randn(64).half(), torch.randn(2, 2, 50, 64).half(), torch.randn(300, 40).half()
calls = {"rms_norm": (x, w, 1e-6), "add_rms_norm": (x, y, w, 1e-6), "swiglu": (x, y), "rope": (x, *tables),
         "router_topk": (logits, 5, True)}
for name, args in calls.items():
    ours, formula = backend.OPERATIONS[name].implementations["triton"].run(*args), getattr(ops, name)(*args)
    if name == "router_topk":
        ours, formula = ours[0], formula[0]
    if name == "add_rms_norm":
        print("sum", float((ours[0] == formula[0]).float().mean()))
        ours, formula = ours[1], formula[1]
    print(name, float((ours == formula).float().mean()))
"""
    lines = dict(line.split() for line in python(code, interpret=True).splitlines())
    assert set(lines) == {"sum", "rms_norm", "add_rms_norm", "swiglu", "rope", "router_topk"}
    assert all(float(alike) > 0.995 for alike in lines.values()), lines


@needs_triton
def test_a_whole_model_on_triton_equals_transformers():
    """Dense and mixture, as they are and fused, prefill and one cached step: every kernel the models reach, in fp32."""
    code = """
import torch
from conftest import TINY, make_pair
from qwen_ref import backend
module, config = TINY[{name!r}]
ours, theirs = make_pair(config)
ids = torch.randint(0, config["vocab_size"], (2, 7), generator=torch.Generator().manual_seed(1))
with torch.no_grad(), backend.use("triton", strict=True):
    wanted = theirs(ids).logits
    for model in (ours, ours.fuse()):
        cache = model.make_cache()
        logits = torch.cat((model(ids[:, :6], cache=cache), model(ids[:, 6:], cache=cache)), 1)
        print(float((logits - wanted).abs().max() / wanted.abs().max()), end=" ")
    kernels = [op for op in backend.OPERATIONS.values() if "triton" in op.implementations]
    chosen = [op.resolve(ids.device, torch.float32).name for op in kernels]
print(*chosen)
"""
    for line in pythons([code.format(name=name) for name in ("qwen3", "qwen3_moe")], interpret=True):
        plain, fused, *chosen = line.split()
        assert set(chosen) == {"triton"}
        assert max(float(plain), float(fused)) < 2e-6, line  # the bound of the eager parity tests


VERIFY = """
import qwen_ref as qr
from conftest import TINY, make_pair
ours, _ = make_pair(TINY[{name!r}][1])
report = qr.verify(ours, backend="triton", levels="L0,L2-L4", prompts=[[5, 9, 2, 77, 3]], new_tokens=3,
                   progress=False)
print(report.ok, report.verdict)
print(sorted(op for op, chosen in report.backend.items() if chosen == "triton"))
"""


@needs_triton
def test_verify_passes_on_triton():
    """Every activation inside every layer, all operations by Triton."""
    for output in pythons([VERIFY.format(name=name) for name in ("qwen3", "qwen3_moe")], interpret=True):
        verdict, operations = output.splitlines()[-2:]
        assert verdict.startswith("True equal in "), output
        assert set(KERNELS) >= set(eval(operations)) >= {"attention", "linear", "moe_experts", "rms_norm", "rope"}


@needs_triton
def test_launchers_refuse_what_they_would_compute_wrongly():
    code = """
import torch
from qwen_kernels import add_rms_norm, gated_rms_norm, rms_norm, rope, router_topk, sigmoid_gate, swiglu, zero_centred_rms_norm
from qwen_ref.errors import RequestError
x, w = torch.randn(2, 3, 4, 6), torch.ones(6)
wide, weight = torch.zeros(1, 16385), torch.zeros(16385)
tables = torch.randn(2, 2, 4, 6)
for call in (
    lambda: rms_norm.run(x, w.requires_grad_(), 1e-6),
    lambda: rms_norm.run(x, torch.ones(5), 1e-6),
    lambda: rms_norm.run(wide, weight, 1e-6),
    lambda: add_rms_norm.run(wide, wide, weight, 1e-6),
    lambda: gated_rms_norm.run(wide, wide, weight, 1e-6),
    lambda: zero_centred_rms_norm.run(wide, weight, 1e-6),
    lambda: add_rms_norm.run(x, x[:1], torch.ones(6), 1e-6),
    lambda: swiglu.run(x, x.half()),
    lambda: swiglu.run(x, x.to("meta")),
    lambda: sigmoid_gate.run(x, x, x.half()),
    lambda: sigmoid_gate.run(x, x[..., :2]),
    lambda: sigmoid_gate.run(x, x.half()),
    lambda: rope.run(x, *tables.half()),
    lambda: rope.run(x, *tables[..., :3]),
    lambda: router_topk.run(torch.randn(2, 5), 6, True),
):
    try:
        print("computed", call())
    except RequestError as error:
        print(error)
print(rms_norm.supports(torch.device("cuda"), torch.float64), "|", rms_norm.supports(torch.device("cpu"), torch.bfloat16))
"""
    lines = python(code, interpret=True).splitlines()
    for line, text in zip(lines, ("no backward pass", "weight of 6", *["16385 is more than"] * 3, "at most 16384",
                                  "equal shapes", "equal shapes", "on cpu and on meta", "equal shapes", *["a gate of x's shape"] * 2, "wider than a head", "wider than a head", "k 6 of 5"), strict=False):  # fmt: skip
        assert text in line
    assert len(lines) == 16 and "float64 is not one of" in lines[-1] and "truncates" in lines[-1]


NO_MASK = ROOT / "tests" / "no_mask.py"


@needs_triton
def test_a_kernel_without_a_mask_is_caught():
    """Its surplus is NaN read beside the input, written beside the output, and inside hidden by the next program's row."""
    code = f"from qwen_ref.bench import check; print(*check('swiglu', 'no_mask', file={str(NO_MASK)!r}, seeds=1).faults, sep='\\n')"
    faults = python(code, interpret=True)
    assert "intermediate: writes outside its output" in faults and "width 1" not in faults


@needs_triton
def test_a_gpu_is_launched_by_its_own_entry_then_by_its_familys_then_by_the_one_for_any():
    code = """
import torch
from qwen_kernels import launch
from qwen_ref.bench import compile as _
import sys
bench = sys.modules["qwen_ref.bench.compile"]
assert (bench.ANY, bench.INSTINCT) == (launch.ANY, launch.INSTINCT)
table = {(launch.ANY, "a"): {"warps": 16}, (launch.ANY, "b"): {"warps": 4}, (launch.INSTINCT, "a"): {"warps": 8},
         ("AMD Instinct MI325X", "a"): {"warps": 2}}
for name in ("NVIDIA H200", "AMD Radeon RX 7900 XTX", "AMD Instinct MI300X", "AMD Instinct MI325X"):
    launch._name = lambda *_: name
    print(*(launch.tuned(table, torch.device("meta"), wanted)["warps"] for wanted in "ab"))
"""
    assert python(code, interpret=False).splitlines() == ["16 4", "16 4", "8 4", "2 4"]


GRIDS = """
import json, sys, torch
from qwen_ref.bench import compile as _
compile = sys.modules["qwen_ref.bench.compile"]
largest = {{}}
def noted(self, grid):
    largest[self.kernel.fn.__name__] = max(largest.get(self.kernel.fn.__name__, 0), *grid[1:], 1)
    return self.note
compile._Recorder.__getitem__ = noted
for operation in {kernels}:
    compile.launches(operation, {models}, (70000,), (torch.bfloat16,))
print(json.dumps(largest))
"""


@needs_triton
def test_grids_of_long_prompts_are_within_what_a_gpu_launches():
    """The second and third axis of a grid end at 65535."""
    models = ("Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B", "Qwen/Qwen3.5-27B", "Qwen/Qwen4-Exp")
    largest = json.loads(python(GRIDS.format(kernels=KERNELS, models=models), interpret=False))
    assert largest.keys() >= {"_add_slots", "_attention", "_prepare"} and max(largest.values()) <= 65535, largest


@needs_triton
def test_a_router_without_numbers_names_experts_that_are_there():
    """An index outside would make the experts' kernels read outside the weights."""
    code = """
import torch
from qwen_kernels import router_topk
logits = torch.randn(3, 37)
logits[0], logits[1, 5] = float("nan"), float("nan")
_, experts = router_topk.run(logits, 4, True)
print(int(experts.min()) >= 0 and int(experts.max()) < 37, bool((experts[2] == logits[2].topk(4).indices).all()))
"""
    assert python(code, interpret=True).split() == ["True", "True"]


# The code, ahead of time

COMPILE = """
import json, torch
from qwen_ref.bench import compile
print(json.dumps([[compile(operation, targets=({target!r},), models=models, tokens=tokens, dtypes=dtypes).to_json()
                   for models, tokens, dtypes, kernels in jobs for operation in kernels] for jobs in {work}]))
"""
REACH = """
import json, sys, torch
from qwen_ref.bench import compile as _, tune as _
compile, tune = (sys.modules["qwen_ref.bench." + name] for name in ("compile", "tune"))
tables = {{name: id(compile.kernel_module(name).TUNED) for name in {kernels}}}
missing = {{tables[name]: set(compile.kernel_module(name).TUNED) for name in tables}}  # some operations share one
for target, work in {work}.items():
    for models, tokens, dtypes, kernels in (job for jobs in work for job in jobs):
        for name in kernels:
            with tune.watched(compile.kernel_module(name).TUNED) as seen:
                compile.launches(name, models, tokens, dtypes)
            rest = missing[tables[name]]
            rest -= {{key for key in rest if key[1] in seen and compile.runs_on(key[0], target)}}
print(json.dumps({{name: [str(key) for key in missing[table]] for name, table in tables.items() if missing[table]}}))
"""
FEW = TOKENS[:4]
EXPERTS = tuple(kernel for kernel in PACKED if kernel not in PACKED_LINEAR)
PLAIN = tuple(kernel for kernel in KERNELS if kernel not in PACKED)
OFTEN = (
    (MODELS, FEW, DTYPES, tuple(kernel for kernel in PLAIN if kernel not in DELTA + STREAMS)),
    (("Qwen/Qwen3.5-27B",), FEW, DTYPES, (*DELTA, "add_rms_norm", "norm_rope_write")),
    (("Qwen/Qwen4-Exp",), FEW, DTYPES, STREAMS),
    (DENSE, FEW, DTYPES, PACKED_LINEAR[:-1]),
    (DENSE, TOKENS, DTYPES, PACKED_LINEAR[-1:]),
)
# The rest of the tuned tables. Of the two targets this one has less shared memory; fp16 is compiled as bf16 is; and where all
# dtypes share an entry one stands for them: fp32 of what streams, for its registers, bf16 of packed weights, for its tiles.
UNUSUAL = ("Qwen/Qwen1.5-MoE-A2.7B", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen3.5-0.8B", OTHERS)
RARE = (
    (UNUSUAL, FEW, DTYPES[2:], ("rms_norm", "add_rms_norm", "zero_centred_rms_norm", "gated_rms_norm", "rope",
                                "norm_rope_write", "router_topk", "gated_delta_step")),
    (UNUSUAL, FEW, (torch.bfloat16, torch.float32), (
        "attention_prefill", "attention_decode", "sparse_block_attention", "gated_delta_rule")),
    (("Qwen/Qwen2.5-0.5B",), TOKENS[4:], (torch.bfloat16, torch.float32), ("linear",)),
    (DENSE, TOKENS[4:], (torch.bfloat16,), PACKED_LINEAR[:-1]),
)  # fmt: skip
# On gfx942, a part that costs a minute of one core: the model that launches all operations, bf16 for its tiles, and the numbers
# of tokens by which every kernel that multiplies tiles is among them.
INSTINCT = tuple(
    (("Qwen/Qwen4-Exp",), tokens, (torch.bfloat16,), kernels)
    for tokens, kernels in (
        ((1024,), tuple(kernel for kernel in PLAIN if kernel != "linear")), ((16,), ("linear", *PACKED_LINEAR)), ((1,), EXPERTS),
    )
) + ((MIXTURE, (4096,), DTYPES[2:], EXPERTS), (MIXTURE, (16,), (torch.bfloat16,), ("moe_code4",)))  # entries of its own
WORK = {
    "sm_80": ((*OFTEN, (MIXTURE, FEW, DTYPES, tuple(k for k in EXPERTS if k not in ONCE))), RARE),
    "sm_90": ((*OFTEN, (MIXTURE, FEW, DTYPES, EXPERTS)), ()),
    "gfx942": ((), INSTINCT),
}


@pytest.fixture(scope="module")
def compilations(once, tmp_path_factory):
    """Two of operation -> rows, of all targets: what official models launch, and the rest of the tuned tables."""
    compilers = [target for target in WORK if HAS_AMD or target != "gfx942"]
    codes = [COMPILE.format(target=target, work=WORK[target]) for target in compilers]
    cache = tmp_path_factory.mktemp("triton")
    outputs = once("compilations", lambda: pythons(codes, interpret=False, cache=cache))
    found: tuple[dict[str, list[dict]], ...] = {}, {}
    for output in outputs:
        for rows, reports in zip(found, json.loads(output), strict=True):
            for report in reports:
                rows.setdefault(report["operation"], []).extend(report["rows"])
    return found


@pytest.fixture(scope="module")
def compiled(compilations):
    return compilations[0]


@needs_triton
def test_every_entry_of_a_tuned_table_is_compiled():
    """An entry for a device on its architecture, one for any device on either target."""
    assert json.loads(python(REACH.format(kernels=KERNELS, work=WORK), interpret=False)) == {}


@needs_triton
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_configuration_compiles_without_spills(compiled, kernel):
    rows = compiled[kernel]
    assert not any(row["fault"] for row in rows), [row for row in rows if row["fault"]]
    assert {row["target"] for row in rows} == ({"sm_90"} if kernel in ONCE else {"sm_80", "sm_90"})
    assert {row["launch"].split()[0] for row in rows} >= {"bf16", "fp16", "fp32"}
    assert all(row["spills"] == 0 for row in rows), [row for row in rows if row["spills"]]


@needs_triton
def test_the_rest_of_the_tuned_tables_compiles_without_spills(compilations):
    rows = [row for found in compilations[1].values() for row in found]
    assert rows and not [row for row in rows if row["fault"] or row["spills"]]


@needs_amd
def test_every_operation_compiles_for_an_mi300(compilations):
    """Without faults and spills, as the test before this one finds; on its matrix cores; launched as its family is."""
    rows = {operation: [row for row in found if row["target"] == "gfx942"] for operation, found in compilations[1].items()}
    assert {operation for operation, found in rows.items() if found} == set(KERNELS)
    assert {row["kernel"] for found in rows.values() for row in found if row["tensor_cores"]} == MATRIX
    assert ["num_warps=8" in row["launch"] for row in rows["gated_delta_step"]] == [True]


@needs_triton
def test_kernels_that_stream_leave_room_for_many_programs(compiled):
    for kernel, most in STREAMING.items():
        assert not any(row["tensor_cores"] for row in compiled[kernel])
        assert max(row["registers"] for row in compiled[kernel]) <= most, kernel


@needs_triton
def test_products_in_16_bits_are_on_the_tensor_cores(compiled):
    rows = [row for found in compiled.values() for row in found]
    assert {row["kernel"] for row in rows if row["tensor_cores"]} == MATRIX
    for row in rows:
        sixteen = not row["launch"].startswith("fp32")
        assert row["tensor_cores"] == (row["kernel"] in MATRIX and sixteen), row


@needs_triton
def test_products_of_vectors_share_nothing_between_warps_until_the_end(compiled):
    """Weights that went through shared memory on their way to the product would take twice as long."""
    vectors = [row for row in compiled["linear"] + compiled["moe_experts"] if row["kernel"] in ("few_rows", "gate_up_vectors")]
    assert {row["kernel"] for row in vectors} == {"few_rows", "gate_up_vectors"}
    for kernel in (f"{what}_{layout}" for what in ("linear", "moe") for layout in ("int4", "int8", "fp8", "code4")):
        # In fp32, where pairs are 8 bytes, x does move between threads; nobody runs a packed model in fp32 for its speed.
        vectors += [row for row in compiled[kernel] if row["kernel"] in ("few_rows", "gate_up_vectors", "down_vectors")
                    and not row["launch"].startswith("fp32")]  # fmt: skip
    assert all(row["shared"] <= 128 for row in vectors), vectors


@needs_triton
def test_two_programs_of_the_experts_fit_a_multiprocessor(compiled):
    rows = [row for row in compiled["moe_experts"] if row["kernel"] == "gate_up_tiles" and row["target"] == "sm_90"]
    assert rows and all(row["shared"] <= 113 << 10 for row in rows)
    assert {row["launch"].split("BLOCK_M=")[1].split()[0] for row in rows} == {"16", "64", "128"}


@needs_triton
def test_too_much_shared_memory_is_a_fault():
    code = """
from qwen_ref.bench import compile as _
import sys
module = sys.modules["qwen_ref.bench.compile"]
module.SHARED_LIMIT = dict.fromkeys(module.TARGETS, 8)
report = module.compile("router_topk", targets=("sm_90",), models=("Qwen/Qwen3-30B-A3B",))
print(report.ok, report.rows[0].fault)
"""
    assert python(code, interpret=False).strip().startswith("False needs 128 bytes of shared memory, sm_90 has 8")


@needs_triton
def test_the_interpreter_cannot_compile():
    code = """
from qwen_ref.bench import compile
try:
    compile("rope")
except Exception as error:
    print(type(error).__name__, error)
"""
    assert python(code, interpret=True).startswith("RequestError TRITON_INTERPRET=1 replaces the compiler")
