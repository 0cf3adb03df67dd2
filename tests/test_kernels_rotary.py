"""norm_rope_write: the formula against the operations it joins, the check of what an operation fills, and the kernel."""

from __future__ import annotations

import pytest
import torch
from test_kernels import needs_triton, python

from qwen_ref import backend, ops
from qwen_ref.bench import check
from qwen_ref.bench.shapes import sizes
from qwen_ref.bench.subjects import Draw, subject
from qwen_ref.cache import KVCache

EPS = 1e-6


def inputs(tokens: int, rows: int = 1, entries: int = 16, dtype: torch.dtype = torch.float32, first: int = 0):
    """Everything but the slots: 6 and 2 heads of 20 numbers."""
    torch.manual_seed(first)
    q, k, v = torch.randn(tokens, 10, 20, dtype=dtype).split((6, 2, 2), 1)
    weights = torch.randn(2, 20, dtype=dtype)
    positions = torch.arange(first, first + tokens)[None]
    cos, sin = (table[0] for table in ops.rope_tables(positions, ops.rope_frequencies(20, 1e6), 1.0, dtype))
    caches = torch.randn(2, rows, 2, entries, 20, dtype=dtype)
    return [q, k, v, *weights, EPS, cos, sin, *caches]


# The formula


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_is_stored_as_the_cache_of_the_model_stores_it(dtype):
    """A prefill of 5 and a step of 1 give the bits of rms_norm, rope and KVCache.append."""
    theirs, (k_cache, v_cache) = KVCache(), inputs(1, dtype=dtype)[8:10]
    for first, tokens in ((0, 5), (5, 1)):
        q, k, v, q_weight, k_weight, eps, cos, sin, *_ = inputs(tokens, dtype=dtype, first=first)
        slots = torch.arange(first, first + tokens)
        ours = ops.norm_rope_write(q, k, v, q_weight, k_weight, eps, cos, sin, k_cache, v_cache, slots)
        heads = [x[None].transpose(1, 2) for x in (ops.rms_norm(q, q_weight, eps), ops.rms_norm(k, k_weight, eps), v)]
        turned = [ops.rope(x, cos[None], sin[None]) for x in heads[:2]]
        keys, values = theirs.append(turned[1], heads[2])
        assert torch.equal(ours, turned[0][0].transpose(0, 1))
        assert torch.equal(k_cache[:, :, : first + tokens], keys) and torch.equal(v_cache[:, :, : first + tokens], values)


def test_it_turns_unit_vectors_and_keeps_to_its_slots():
    """Against complex numbers, one head at a time in fp64; negative slots and all other entries stay as they were."""
    args = inputs(7, rows=3, entries=4, first=11, dtype=torch.float64)
    q, k, v, q_weight, k_weight, _, _, _, k_cache, v_cache = args
    slots = torch.tensor([9, -1, 0, 11, -5, 4, 6])
    wanted_k, wanted_v = k_cache.clone(), v_cache.clone()
    angles = [(11 + token) * ops.rope_frequencies(20, 1e6).double() for token in range(7)]

    def turned(x, weight, token):
        x = x / (x.square().sum() / 20 + EPS).sqrt() * weight
        pairs = torch.complex(x[:10], x[10:]) * torch.polar(torch.ones(10, dtype=torch.float64), angles[token])
        return torch.cat((pairs.real, pairs.imag))

    for token, slot in enumerate(slots.tolist()):
        for head in range(2):
            if slot >= 0:
                wanted_k[slot // 4, head, slot % 4] = turned(k[token, head], k_weight, token)
                wanted_v[slot // 4, head, slot % 4] = v[token, head]
    wanted = torch.stack([torch.stack([turned(q[t, n], q_weight, t) for n in range(6)]) for t in range(7)])
    close = {"rtol": 1e-5, "atol": 1e-5}  # the angles are fp32
    torch.testing.assert_close(ops.norm_rope_write(*args, slots), wanted, **close)
    torch.testing.assert_close(k_cache, wanted_k, **close)
    assert torch.equal(v_cache, wanted_v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_centred_norms_and_heads_turned_in_part(dtype):
    """As the attention of hybrids has them, queries between their gates: the bits of the operations one by one."""
    _, k, v, q_weight, k_weight, eps, cos, sin, k_cache, v_cache = inputs(5, dtype=dtype)
    q, cos, sin = torch.randn(5, 12, 20).to(dtype)[:, ::2], cos[:, :6], sin[:, :6]
    ours = ops.norm_rope_write(q, k, v, q_weight, k_weight, eps, cos, sin, k_cache, v_cache, torch.arange(5), True)
    normed = [ops.zero_centred_rms_norm(x, weight, eps) for x, weight in ((q, q_weight), (k, k_weight))]
    turned = [ops.rope(x.transpose(0, 1)[None], cos[None], sin[None])[0] for x in normed]
    assert torch.equal(ours, turned[0].transpose(0, 1)) and torch.equal(ours[..., 6:], normed[0][..., 6:])
    assert torch.equal(k_cache[0, :, :5], turned[1]) and torch.equal(v_cache[0, :, :5], v.transpose(0, 1))


def test_without_weights_nothing_is_normed():
    q, k, v, _, _, eps, cos, sin, k_cache, v_cache = inputs(3)
    ours = ops.norm_rope_write(q, k, v, None, None, eps, cos, sin, k_cache, v_cache, torch.arange(3))
    torch.testing.assert_close(ours.norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(k_cache[0, :, :3].norm(dim=-1), k.norm(dim=-1).t())


# The check of an operation that fills arguments


@pytest.fixture
def faults_of():
    def faults(run):
        backend.register("norm_rope_write", "planted")(run)
        return " | ".join(check("norm_rope_write", "planted", seeds=1).faults)

    yield faults
    backend.OPERATIONS["norm_rope_write"].implementations.pop("planted", None)


def test_a_right_implementation_passes(faults_of):
    def right(*args):
        args = list(args)
        filled = [args[8].clone(), args[9].clone()]
        out = ops.norm_rope_write(*args[:8], *filled, *args[10:])
        for cache, new in zip(args[8:10], filled, strict=True):
            cache.copy_(new)
        return out

    assert not faults_of(right)


def test_a_wrong_slot_is_caught(faults_of):
    def wrong(*args):
        return ops.norm_rope_write(*args[:10], torch.where(args[10] >= 0, args[10] ^ 1, args[10]), *args[11:])

    assert "into shuffled pages: is off by" in faults_of(wrong)


def test_a_token_too_many_and_one_too_few_are_caught(faults_of):
    def all_tokens(*args):
        return ops.norm_rope_write(*args[:10], args[10].clamp(min=0), *args[11:])

    def none(*args):
        return ops.norm_rope_write(*args[:10], torch.full_like(args[10], -1), *args[11:])

    assert "nothing stored: is off by" in faults_of(all_tokens)
    assert "one token: is off by" in faults_of(none)


@pytest.mark.parametrize("which", [8, 9])
def test_writing_beside_a_cache_is_caught(faults_of, which):
    def beside(*args):
        out = ops.norm_rope_write(*args)
        cache = args[which]
        behind = sum((n - 1) * stride for n, stride in zip(cache.shape, cache.stride(), strict=True)) + 1
        cache.as_strided((1,), (1,), cache.storage_offset() + behind).zero_()
        return out

    assert "one token: changes an input, or memory beside it" in faults_of(beside)


def test_writing_between_the_rows_of_a_cache_is_caught(faults_of):
    def between(*args):
        out = ops.norm_rope_write(*args)
        if args[8].stride(0) > args[8][0].numel():
            args[8].as_strided((1,), (1,), args[8].storage_offset() + args[8].stride(0) - 1).zero_()
        return out

    assert faults_of(between).startswith("slices of wider caches: changes an input")


@pytest.mark.parametrize("which", [0, 1, 2, 6, 10])
def test_writing_to_another_argument_is_caught(faults_of, which):
    def writes(*args):
        out = ops.norm_rope_write(*args)
        args[which].zero_()
        return out

    assert "into shuffled pages: changes an input" in faults_of(writes)


def test_unequal_runs_are_caught_in_the_caches_too(faults_of):
    calls = []

    def noisy(*args):
        out = ops.norm_rope_write(*args)
        calls.append(args[9].mul_(1 + 2e-7 * (len(calls) % 2)))
        return out

    assert "differs between two runs" in faults_of(noisy)


def test_its_cost_counts_what_is_touched_not_the_cache():
    ((name, args),) = subject("norm_rope_write").real(sizes("Qwen/Qwen3-8B"), 16, Draw(0, torch.bfloat16, torch.device("cpu")))
    cost = subject("norm_rope_write").cost(*args)
    assert name == "16 tokens, 32 + 2 x 8 heads"
    assert cost.bytes == 2 * (2 * 16 * 48 * 128 + 2 * 16 * 128 + 2 * 128) + 8 * 16
    assert cost.flops == 7 * 16 * 40 * 128


# The kernel


@needs_triton
def test_the_kernel_gives_nearly_always_the_bits_of_the_formula_in_fp16():
    code = """
import torch
from test_kernels_rotary import inputs
from qwen_kernels import norm_rope_write
from qwen_ref import ops
args, slots = inputs(40, rows=3, dtype=torch.float16), torch.randperm(48)[:40].masked_fill(torch.arange(40) == 7, -1)
ours, formula = [*args[:8], *(a.clone() for a in args[8:])], args
for turned, centred in ((20, False), (6, True)):
    for a in (ours, formula):
        a[6:8] = args[6][:, :turned], args[7][:, :turned]
    results = [[f(*a, slots, centred), *a[8:]] for f, a in ((norm_rope_write.run, ours), (ops.norm_rope_write, formula))]
    print(*(float((a == b).float().mean()) for a, b in zip(*results)))
"""
    for line in python(code, interpret=True).splitlines():
        q, k, v = map(float, line.split())
        assert q > 0.995 and k > 0.995 and v == 1


@needs_triton
def test_the_launcher_refuses_what_it_would_compute_wrongly():
    code = """
import torch
from test_kernels_rotary import inputs
from qwen_kernels import norm_rope_write
from qwen_ref.errors import RequestError
good = [*inputs(3), torch.arange(3)]
norm_rope_write.run(*good)
changes = {1: good[1][:2], 3: torch.ones(19), 6: good[6].half(), 8: good[8].half(), 9: good[9][:, :, :5],
           10: torch.arange(3, dtype=torch.int32)}
for i, value in changes.items():
    try:
        print("computed", norm_rope_write.run(*good[:i], value, *good[i + 1:]))
    except RequestError as error:
        print(i, error)
odd = [a[..., :19] if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a for a in good]
try:
    print("computed", norm_rope_write.run(*odd))
except RequestError as error:
    print("odd", error)
"""
    lines = python(code, interpret=True).splitlines()
    wanted = ("1 .*needs k of shape", "3 .*needs weight 0", "6 .*needs cos", "8 .*needs k_cache", "9 .*needs v_cache", "10 .*int64 slots", "odd .*even count")
    assert len(lines) == len(wanted)
    for line, text in zip(lines, wanted, strict=True):
        start, end = text.split(" .*")
        assert line.startswith(f"{start} ") and end in line
