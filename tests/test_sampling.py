"""The sampler against transformers' logits processors, and its distribution against itself counted."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

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
    {"logit_bias": {5: math.nan}},
])  # fmt: skip
def test_bad_values_are_named(bad):
    with pytest.raises(RequestError, match=next(iter(bad))):
        Sampling(**bad)


def test_logit_bias_outside_the_vocabulary():
    with pytest.raises(RequestError, match="logit_bias"):
        penalize(torch.zeros(4), Sampling(logit_bias={4: 1.0}), set(), Counter())
