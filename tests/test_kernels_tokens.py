"""sample and cross_entropy: the formulas against loops and other people's functions, what the check sees, the kernels."""

from __future__ import annotations

import math

import pytest
import torch
from test_kernels import needs_triton, python

from qwen_ref import backend, ops, torch_ops
from qwen_ref.bench import check
from qwen_ref.bench.shapes import sizes
from qwen_ref.bench.subjects import Draw, subject
from qwen_ref.errors import RequestError
from qwen_ref.sampling import Sampling, distribution


def options(rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    return torch.full((rows,), temperature), torch.full((rows,), top_k, dtype=torch.int32), torch.full((rows,), top_p)


def kept_by_sorting(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """token -> probability (not normalised) of what is left, in the order of the vocabulary."""
    largest = max(logits)
    p = [math.exp((x - largest) / temperature) for x in logits]
    ordered = sorted(p, reverse=True)[: top_k or None]
    limit, before, least = top_p * math.fsum(ordered), 0.0, ordered[0]
    for value in ordered:
        if before >= limit or value == 0:
            break
        before, least = before + value, value
    return {token: value for token, value in enumerate(p) if value >= least}


# The formulas


@pytest.mark.parametrize("ties", [False, True])
def test_sample_is_a_walk_over_what_sorting_leaves(ties):
    torch.manual_seed(0)
    rows = 200
    logits = torch.randn(rows, 41).double()
    if ties:
        logits = (logits * 2).round() / 2
    logits[:, ::7] = -math.inf
    temperature, top_p, uniform = torch.rand(rows) + 0.3, torch.rand(rows) + 0.01, torch.rand(rows)
    top_p[::3], top_k = 1.0, torch.randint(0, 50, (rows,)).int()
    tokens = ops.sample(logits, temperature, top_k, top_p.clamp(max=1), uniform).tolist()
    for row in range(rows):
        kept = kept_by_sorting(logits[row].tolist(), float(temperature[row]), int(top_k[row]), min(1.0, float(top_p[row])))
        passed, target = 0.0, float(uniform[row]) * math.fsum(kept.values())
        for wanted, value in kept.items():  # noqa: B007
            passed += value
            if passed > target:
                break
        assert tokens[row] == wanted, row


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.7), (8, 0.8)])
def test_sample_has_the_distribution_of_the_generator(top_k, top_p):
    """Over evenly spaced draws a token comes as often as `sampling.distribution` says, to one draw at each of its ends."""
    torch.manual_seed(1)
    row, draws = torch.randn(30), 20_000
    uniform = (torch.arange(draws) + 0.5) / draws
    tokens = ops.sample(row.expand(draws, -1), *options(draws, 0.8, top_k, top_p), uniform)
    shares = torch.bincount(tokens, minlength=30) / draws
    wanted = distribution(row, Sampling(temperature=0.8, top_k=top_k, top_p=top_p))
    assert torch.equal(shares > 0, wanted > 0)
    torch.testing.assert_close(shares, wanted, rtol=0, atol=2 / draws)


def test_sample_of_random_draws_is_softmax():
    torch.manual_seed(2)
    row, draws = torch.randn(10), 50_000
    shares = torch.bincount(ops.sample(row.expand(draws, -1), *options(draws), torch.rand(draws)), minlength=10) / draws
    torch.testing.assert_close(shares, row.softmax(-1), rtol=0, atol=4 * 0.5 / draws**0.5)  # four standard deviations


def test_sample_at_temperature_0_is_the_first_of_the_largest():
    logits = torch.tensor([[1.0, 3.0, 3.0], [5.0, 5.0, 5.0], [-math.inf, -2.0, -1.0]])
    assert ops.sample(logits, *options(3, 0.0, 2, 0.1), torch.full((3,), 0.99)).tolist() == [1, 0, 2]


@pytest.mark.parametrize("run", [ops.cross_entropy, torch_ops.cross_entropy], ids=["formula", "torch"])
def test_cross_entropy_is_minus_log_softmax(run):
    torch.manual_seed(3)
    logits, targets = 5 * torch.randn(6, 37).double(), torch.tensor([0, 36, 5, -1, 7, -100])
    ours = run(logits, targets)
    for row, (x, target) in enumerate(zip(logits.tolist(), targets.tolist(), strict=True)):
        wanted = math.log(math.fsum(math.exp(y - x[target]) for y in x)) if target >= 0 else 0.0
        assert float(ours[row]) == pytest.approx(wanted, rel=1e-12, abs=1e-14)
    kept = targets >= 0
    torch.testing.assert_close(ours[kept], torch.nn.functional.cross_entropy(logits[kept], targets[kept], reduction="none"))
    assert run(logits.bfloat16(), targets).dtype == torch.float32


# What the check of sample sees


@pytest.fixture
def faults_of():
    def faults(run, **more):
        backend.register("sample", "planted")(run)
        return " | ".join(check("sample", "planted", **{"seeds": 2, **more}).faults)

    yield faults
    backend.OPERATIONS["sample"].implementations.pop("planted", None)


def test_another_right_sampler_passes(faults_of):
    """The loop in fp64: other sums in another order."""

    def right(logits, temperature, top_k, top_p, uniform):
        tokens = ops.sample(logits.double(), temperature.double(), top_k, top_p.double(), uniform.double())
        return torch.where(temperature == 0, logits.argmax(-1), tokens)

    assert not faults_of(right) and not faults_of(right, dtype=torch.bfloat16)


WRONG = {
    "the next token": lambda x, t, k, p, u: (ops.sample(x, t, k, p, u) + 1) % max(1, x.shape[1]),
    "no top-p": lambda x, t, k, p, u: ops.sample(x, t, k, torch.ones_like(p), u),
    "no top-k": lambda x, t, k, p, u: ops.sample(x, t, torch.zeros_like(k), p, u),
    "one more": lambda x, t, k, p, u: ops.sample(x, t, torch.where(k > 0, k + 1, 0).int(), p, u),
    "top-p of everything": lambda x, t, k, p, u: torch.where((k > 0) & (p < 1), ops.sample(x, t, k, (p * 1.05).clamp(max=1), u), ops.sample(x, t, k, p, u)),
    "no temperature": lambda x, t, k, p, u: ops.sample(x, (t > 0).float(), k, p, u),
    "always the likeliest": lambda x, t, k, p, u: x.argmax(-1),
    "temperature 0 as 1": lambda x, t, k, p, u: ops.sample(x, t.masked_fill(t == 0, 1), k, p, u),
    "outside": lambda x, t, k, p, u: ops.sample(x, t, k, p, u) + x.shape[1],
    "the draw from above": lambda x, t, k, p, u: ops.sample(x, t, k, p, 0.999999 - u),
    "a draw a little off": lambda x, t, k, p, u: ops.sample(x, t, k, p, (u + 2e-3).clamp(max=0.999999)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_sampler_is_caught(faults_of, how, dtype):
    assert faults_of(WRONG[how], dtype=dtype)


def test_the_observation_is_one_where_right_and_grows_with_the_miss():
    logits, uniform = torch.zeros(5, 100), torch.tensor([0.105, 0.105, 0.105, 0.105, 0.5])
    args, observe = (logits, *options(5), uniform), subject("sample").observe
    (seen,) = observe(args, (torch.tensor([10, 9, 11, 20, 50]),))
    assert seen[0] == 1 and seen[1] == pytest.approx(500, rel=0.01) == seen[2] and seen[3] > 9000
    assert seen[4] == 1  # exactly between 49 and 50: both are right
    with pytest.raises(RequestError, match="outside the vocabulary"):
        observe(args, (torch.tensor([0, 0, 0, 0, 100]),))


def test_costs_are_one_read():
    for operation, shape in (("sample", "(64, 151936) top-k 20, top-p 0.95"), ("cross_entropy", "(1024, 151936)")):
        name, args = next(iter(subject(operation).real(sizes("Qwen/Qwen3-8B"), 4096, Draw(0, torch.bfloat16, torch.device("meta")))))
        rows = args[0].shape[0]
        assert name == shape
        assert subject(operation).cost(*args).bytes == rows * (2 * 151936 + {"sample": 24, "cross_entropy": 12}[operation])


# The kernels; what each test looks at is computed in one process, for a new one costs seconds

CODE = {
    "formula": """
import torch
from qwen_kernels import sample
from qwen_ref import ops
torch.manual_seed(0)
for dtype, k, p in ((torch.float32, 30, 0.9), (torch.float16, 0, 0.5), (torch.float32, 0, 1.0), (torch.float16, 1500, 1.0)):
    logits, uniform = (3 * torch.randn(3, 2049)).to(dtype), torch.rand(3)
    args = (torch.full((3,), 0.7), torch.full((3,), k, dtype=torch.int32), torch.full((3,), p), uniform)
    ours = sample.run(logits, *args)
    alone = sample.run(logits[1:2], *(a[1:2] for a in args))
    wanted = ops.sample(logits.double(), *(a.double() if a.is_floating_point() else a for a in args))
    print(torch.equal(ours, wanted), torch.equal(alone, ours[1:2]))
""",
    "ends": """
import math, torch
from qwen_kernels import sample
logits = torch.full((2, 5000), -math.inf)
logits[:, 100:4000:3] = 0.1 * torch.arange(1300)  # the last of these, 3997, is the likeliest
logits[:, 100] = 500.0
ends = torch.tensor([0.0, 1 - 2**-24])
for k, p in ((0, 1.0), (50, 1.0), (2, 0.999)):
    print(*sample.run(logits / 100, torch.ones(2), torch.full((2,), k, dtype=torch.int32), torch.full((2,), p), ends).tolist())
print(*sample.run(torch.full((2, 5000), -math.inf), torch.ones(2), torch.zeros(2, dtype=torch.int32), torch.ones(2), ends).tolist())
""",
    "exact": """
import torch
from qwen_kernels import cross_entropy
torch.manual_seed(0)
logits, targets = (4 * torch.randn(5, 9001)).half(), torch.tensor([0, 9000, 4096, -1, 9001])
ours = cross_entropy.run(logits, targets)
wanted = torch.nn.functional.cross_entropy(logits[:3].double(), targets[:3], reduction="none")
print(float((ours[:3] - wanted).abs().max() / wanted.abs().max()), float(ours[3]), float(ours[4]))
""",
    "refusals": """
import torch
from qwen_kernels import cross_entropy, sample
from qwen_ref.errors import RequestError
x, one, zero = torch.randn(2, 5), torch.ones(2), torch.zeros(2, dtype=torch.int32)
for call in (
    lambda: sample.run(x, one.double(), zero, one, one),
    lambda: sample.run(x, one, zero.long(), one, one),
    lambda: sample.run(x, one, zero, one[:1], one),
    lambda: sample.run(x[:, :0], one, zero, one, one),
    lambda: cross_entropy.run(x, zero),
    lambda: cross_entropy.run(x, zero[:1].long()),
    lambda: cross_entropy.run(x.requires_grad_(), zero.long()),
):
    try:
        print("computed", call())
    except RequestError as error:
        print(error)
""",
}


@pytest.fixture(scope="module")
def interpreted():
    """What each part of CODE prints under the interpreter."""
    parts = python("".join(f"print('PART {name}'){code}" for name, code in CODE.items()), interpret=True).split("PART ")[1:]
    return dict(part.split("\n", 1) for part in parts)


@needs_triton
def test_sample_is_the_formula_in_fp64_whatever_stands_beside_a_row(interpreted):
    """The same token, row by row and in a batch; 2049 tokens are a block and one more."""
    assert interpreted["formula"].split() == ["True"] * 8


@needs_triton
def test_sample_keeps_the_last_token_where_the_draw_is_almost_one_and_the_first_where_it_is_zero(interpreted):
    assert interpreted["ends"].splitlines() == ["100 3997", "100 3997", "100 3997", "0 0"]


@needs_triton
def test_cross_entropy_of_fp16_logits_is_exact_to_fp32(interpreted):
    """The check allows a rounding of fp16, but the loss is fp32."""
    error, ignored, outside = map(float, interpreted["exact"].split())
    assert error < 5e-7 and ignored == 0 and math.isnan(outside)


@needs_triton
def test_the_launchers_refuse_what_they_would_compute_wrongly(interpreted):
    lines = interpreted["refusals"].splitlines()
    wanted = ("needs temperature", "needs top_k", "needs top_p", "needs a vocabulary", "int64 targets", "int64 targets", "no backward pass")
    assert len(lines) == len(wanted) and all(text in line for line, text in zip(lines, wanted, strict=True)), lines
