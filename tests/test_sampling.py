"""The sampler against transformers' logits processors, and its distribution against itself counted."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen_ref import ops
from qwen_ref.errors import RequestError
from qwen_ref.sampling import Sampling, choose, distribution, penalize


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
)
@settings(max_examples=200, deadline=None)
def test_distribution_is_transformers(seed, temperature, top_k, top_p, min_p):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p > 0.0:
        scores = MinPLogitsWarper(min_p)(None, scores)
    before = logits.clone()
    ours = distribution(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    torch.testing.assert_close(ours, scores.softmax(-1)[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(logits, before)


def by_sorting(logits, s):
    """The filters by their definitions, in fp64 over the whole vocabulary. And how near top_p was to another choice."""
    logits, near = logits.double() / s.temperature, math.inf
    if 0 < s.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.sort(descending=True).values[s.top_k - 1], -math.inf)
    if s.top_p < 1.0:
        ordered, ids = logits.sort(descending=True, stable=True)
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p
        near = float((before - s.top_p)[p > 0].abs().min())
        logits = logits.index_fill(0, ids[before >= s.top_p], -math.inf)
    p = logits.softmax(-1)
    p = p.masked_fill(p < s.min_p * p.max(), 0.0)
    return p / p.sum(), near


@given(
    seed=st.integers(0, 1 << 30),
    vocabulary=st.sampled_from([1, 2, 50, 3000, 20000]),
    spread=st.sampled_from([0, 1, 8, 120]),  # of logits in eighths: none to few of them equal
    excluded=st.sampled_from([0.0, 0.3, 0.999]),
    temperature=st.sampled_from([0.25, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 2, 20, 2000, 1 << 31]),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 1.0)),
    min_p=st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0, 1.0)),
)
@settings(max_examples=300, deadline=None)
def test_distribution_is_that_of_a_full_sort(seed, vocabulary, spread, excluded, temperature, top_k, top_p, min_p):
    """Vocabularies beyond the first search, equal logits at every edge, tokens that must not come."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-spread, spread + 1, (vocabulary,), generator=generator) / 8
    logits[1:][torch.rand(vocabulary - 1, generator=generator) < excluded] = -math.inf
    s = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected, near = by_sorting(logits, s)
    assume(near > 1e-6 and not 0 < abs(min_p - 1) < 1e-6)
    ours = distribution(logits, s)
    assert torch.equal(ours > 1e-30, expected > 1e-30)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.8}])
def test_draws_are_those_of_the_operation(options):
    """One uniform number a token, and the token that `ops.sample` has for it."""
    logits = torch.randn(4000, generator=torch.Generator().manual_seed(1)) * 3
    s, uniforms = Sampling(temperature=0.7, **options), torch.Generator().manual_seed(2)
    uniform = torch.stack([torch.rand((), dtype=torch.float64, generator=uniforms) for _ in range(200)])
    settings = torch.full((200,), s.temperature), torch.full((200,), s.top_k), torch.full((200,), s.top_p), uniform.float()
    expected = ops.sample(logits.expand(200, -1), *settings).tolist()
    drawn = torch.Generator().manual_seed(2)
    assert [choose(logits, s, drawn) for _ in range(200)] == expected
    assert len(set(expected)) > 5


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.25, 3), (1 - 2**-53, 3)])
def test_the_ends_of_the_draw_stay_on_tokens_that_may_come(monkeypatch, uniform, token):
    monkeypatch.setattr(torch, "rand", lambda *size, **kind: torch.tensor(uniform, dtype=torch.float64))
    logits = torch.tensor([-math.inf, 0.0, -math.inf, math.log(3.0), -math.inf])
    assert choose(logits, Sampling(temperature=1.0), torch.Generator()) == token


def test_penalties():
    logits = torch.tensor([2.0, -2.0, 0.5, 1.0, 3.0])
    prompt, generated = {0, 1}, Counter({1: 1, 4: 3})
    s = Sampling(repetition_penalty=1.5)
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[0, 1, 4]]), logits[None])[0]
    torch.testing.assert_close(penalize(logits, s, prompt, generated), expected)
    s = Sampling(presence_penalty=0.5, frequency_penalty=0.25)  # OpenAI: generated tokens only, mu - c*freq - [c>0]*pres
    assert penalize(logits, s, prompt, generated).tolist() == pytest.approx([2.0, -2.75, 0.5, 1.0, 1.75])
    s = Sampling(logit_bias={2: 10.0, 4: -math.inf})
    assert penalize(logits, s, prompt, generated).tolist() == [2.0, -2.0, 10.5, 1.0, -math.inf]
    assert logits.tolist() == [2.0, -2.0, 0.5, 1.0, 3.0]


def test_draws_follow_the_distribution():
    logits, s = torch.tensor([1.0, 2.0, 0.0, -1.0]), Sampling(temperature=0.8, top_k=3)
    generator = torch.Generator().manual_seed(0)
    counts = Counter(choose(logits, s, generator) for _ in range(4000))
    p = distribution(logits, s)
    assert counts[3] == 0
    for i in range(3):  # five standard deviations of a binomial
        assert abs(counts[i] / 4000 - p[i]) < 5 * math.sqrt(p[i] * (1 - p[i]) / 4000)


def test_greedy_and_seed():
    logits = torch.tensor([1.0, 5.0, 2.0])
    assert choose(logits, Sampling(), torch.Generator()) == 1
    hot = Sampling(temperature=5.0)
    draws = [[choose(logits, hot, g) for _ in range(20)] for g in (torch.Generator().manual_seed(s) for s in (7, 7, 8))]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("bad", [
    {"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": True}, {"top_p": 0.0},
    {"top_p": 1.1}, {"top_p": "0.9"}, {"min_p": -0.1}, {"min_p": math.nan}, {"top_k": -1}, {"top_k": 2.0},
    {"repetition_penalty": 0.0}, {"presence_penalty": math.inf}, {"logit_bias": {"5": 1.0}}, {"logit_bias": {5: "x"}},
    {"logit_bias": {5: math.nan}}, {"logit_bias": {5: math.inf}}, {"logit_bias": [5]}, {"logit_bias": {True: 1.0}},
])  # fmt: skip
def test_bad_values_are_named(bad):
    with pytest.raises(RequestError, match=next(iter(bad))):
        Sampling(**bad)


def test_numbers_of_numpy_are_numbers():
    bias = {np.int32(3): np.float64(1)}
    given = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), presence_penalty=np.float16(1), logit_bias=bias)
    assert given == Sampling(temperature=0.5, top_k=3, presence_penalty=1.0, logit_bias={3: 1.0})
    values = (given.temperature, given.top_k, given.presence_penalty, *given.logit_bias, *given.logit_bias.values())
    assert {type(value) for value in values} == {int, float}


@pytest.mark.parametrize("extreme", [
    {"temperature": 1e-38}, {"temperature": 1e-45}, {"temperature": 5e-324}, {"temperature": 1e-40, "top_p": 0.5, "min_p": 0.1},
    {"temperature": 1.0, "top_p": 1e-300}, {"temperature": 1.0, "top_p": 5e-324, "top_k": 3}, {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "logit_bias": {2: 1e39}}, {"temperature": 1.0, "logit_bias": {2: 10**400, 0: -(10**400)}},
    {"temperature": 1.0, "logit_bias": {0: -math.inf, 1: -math.inf, 3: -math.inf}},
    {"temperature": 0.0, "repetition_penalty": 1e-38}, {"temperature": 1e-40, "repetition_penalty": 5e-324},
])  # fmt: skip
def test_extreme_values_that_are_accepted_choose_the_best_token(extreme):
    """Each leaves token 2 alone: the best one, the only one seen, or the one that the bias means."""
    logits, s = torch.tensor([1.0, -2.0, 3.0, 2.5]), Sampling(**extreme)
    penalised = penalize(logits, s, {2}, Counter({2: 1}))
    for seed in range(20):
        assert choose(penalised, s, torch.Generator().manual_seed(seed)) == 2
    assert distribution(penalised, Sampling(**{**extreme, "temperature": 1e-40})).tolist() == [0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_that_leaves_no_token(temperature):
    s = Sampling(temperature=temperature, logit_bias=dict.fromkeys(range(4), -math.inf))
    with pytest.raises(RequestError, match="forbids every token"):
        penalize(torch.zeros(4), s, set(), Counter())


@pytest.mark.parametrize("token", [4, -1, 10**30])
def test_logit_bias_outside_the_vocabulary(token):
    with pytest.raises(RequestError, match=r"logit_bias names a token id outside 0\.\.3"):
        penalize(torch.zeros(4), Sampling(logit_bias={token: 1.0}), set(), Counter())


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_logits_that_are_no_numbers_are_refused(options):
    logits = torch.tensor([1.0, math.nan, 3.0, 2.0])
    with pytest.raises(RequestError, match="hold NaN"):
        choose(logits, Sampling(temperature=1.0, **options), torch.Generator())
