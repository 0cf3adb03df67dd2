"""Speculative decoding gives plain decoding's answer: on random models with guesses right and wrong at will, and on the
bundled hybrid, whose draft layer is trained, with everything that a request can ask for."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys

import pytest
import torch
from test_mtp import HYBRIDS, with_draft_layer
from torch import nn

import qwen_ref as qr
from qwen_ref.errors import RequestError
from qwen_ref.speculative import MAX_DRAFT_TOKENS, Speculator

CHAT = [{"role": "user", "content": "Tell me a story about a little frog."}]
PROMPTS = ["Once upon a time", "Tim", "The dog ran to the", CHAT]


# ---------------------------------------------------------------- random models


def greedy(read, step, prompt, count):
    """`count` tokens after the prompt, and the least distance between the best two logits on the way."""
    logits, ids, margin = read(torch.tensor([prompt])), [], math.inf
    while True:
        best = logits[0].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
        if len(ids) == count:
            return ids, margin
        logits = step(torch.tensor([ids[-1:]]))


def plain(model, prompt, count):
    cache = model.make_cache()

    def step(ids):
        with torch.inference_mode():
            return model(ids, cache=cache)[:, -1]

    return greedy(step, step, prompt, count)


class Foreseeing(nn.Module):
    """A draft layer that knows the sequence, and says for every entry what is right, or with probability 1 - q something
    random. Which token is right it finds by where its cache stands, so only if that is in step with the model's.
    """

    def __init__(self, layer, head, sequence, q, rng):
        super().__init__()
        self.layer, self.head, self.sequence, self.q, self.rng = layer, head, sequence, q, rng  # rows of the head: unit vectors

    def forward(self, hidden, x, rope, mask, cache):
        self.layer(hidden, x, rope, mask, cache)
        first = cache.length - x.shape[1]  # entry t guesses token t + 2
        right = [self.sequence[t + 2] if t + 2 < len(self.sequence) else 0 for t in range(first, cache.length)]
        said = [token if self.rng.random() < self.q else self.rng.randrange(len(self.head)) for token in right]
        return self.head[said][None]  # a row's best match is itself


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_guesses_right_and_wrong_at_random_change_nothing(model_type):
    model, _ = with_draft_layer(model_type)
    layer = model.mtp
    model.lm_head.weight.data = nn.functional.normalize(model.lm_head.weight, dim=1)
    passes = []
    model.model.register_forward_hook(lambda *args: passes.append(1))
    rng = random.Random(7)
    for trial in range(12):
        prompt = [rng.randrange(211) for _ in range(rng.choice((1, 2, 3, 9, 30)))]
        count, k, q = rng.randint(2, 24), rng.choice((1, 2, 3, 5)), rng.choice((0.0, 0.4, 0.8, 1.0))
        expected, margin = plain(model, prompt, count)
        assert margin > 1e-4, "a tie: choose another seed"  # fp32 adds in another order: about 1e-6 of logits near 1
        model.mtp = Foreseeing(layer, model.lm_head.weight, prompt + expected, q, random.Random(trial))
        speculator = Speculator(model, k)
        passes.clear()
        found, _ = greedy(speculator.read, speculator.step, prompt, count)
        assert found == expected, (trial, prompt, k, q)
        assert len(passes) == count - speculator.accepted  # one for the prompt, and none that plain decoding spares
        if q == 1.0:
            assert len(passes) == 1 + math.ceil((count - 1) / (k + 1))


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_caches_hold_what_reading_it_all_at_once_gives(model_type):
    """After some rounds: the model's cache up to the last token known, the draft layer's up to the round before."""
    model, _ = with_draft_layer(model_type, torch.float64)
    model.lm_head.weight.data = nn.functional.normalize(model.lm_head.weight, dim=1)
    layer, prompt = model.mtp, [5, 77, 201, 3, 3, 18]
    expected, _ = plain(model, prompt, 13)
    for k in (1, 3):
        model.mtp = Foreseeing(layer, model.lm_head.weight, prompt + expected, 0.7, random.Random(k))
        speculator = Speculator(model, k)
        ids, _ = greedy(speculator.read, speculator.step, prompt, 13)
        assert ids == expected and 0 < speculator.accepted < speculator.drafted
        cut = speculator.cache.length - len(speculator._guesses)
        speculator.cache.truncate(cut)
        sequence = torch.tensor([(prompt + ids)[:cut]])
        with torch.inference_mode():
            whole, drafts = model.make_cache(), model.make_draft_cache()
            hidden = model.model(sequence, cache=whole)
            model.draft(hidden[:, :-1], sequence[:, 1:], cache=drafts)
        held = speculator._draft_cache.length
        known = speculator._states.shape[1] - len(speculator._guesses)
        assert held == cut - known  # the entries of the last round are written at the beginning of the next
        for mine, theirs in ((speculator.cache.layers[2], whole.layers[2]), (speculator._draft_cache.layers[0], drafts.layers[0])):
            length = mine.length
            torch.testing.assert_close(mine._buffer[:, :, :, :length], theirs._buffer[:, :, :, :length], rtol=0, atol=1e-9)
        for mine, theirs in zip(speculator.cache.layers[0].state, whole.layers[0].state, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)  # states are kept in fp32 or wider


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_a_prompt_may_come_in_pieces(chunk):
    model, _ = with_draft_layer("qwen3_5")
    prompt = [9, 30, 200, 41, 7, 7, 150, 2, 11]
    whole, parts = Speculator(model, 2), Speculator(model, 2)
    whole.read(torch.tensor([prompt]))
    for start in range(0, len(prompt), chunk):
        parts.read(torch.tensor([prompt[start : start + chunk]]))
    assert parts._draft_cache.length == whole._draft_cache.length == len(prompt) - 1
    for mine, theirs in zip(parts._draft_cache.layers, whole._draft_cache.layers, strict=True):
        end = mine.length
        torch.testing.assert_close(mine._buffer[:, :, :, :end], theirs._buffer[:, :, :, :end], rtol=0, atol=1e-4)


# ---------------------------------------------------------------- the bundled hybrid


@pytest.fixture(scope="module")
def hybrid():
    return qr.load("tiny-hybrid", dtype="float32")


def same(a, b, margin=1e-3):
    """All that the two results say is equal; or the tokens part where plain decoding had two within the margin."""
    for i, (mine, theirs) in enumerate(zip(a.token_ids, b.token_ids, strict=False)):
        if mine != theirs:
            (_, first), (_, second) = a.logprobs[i].top[:2]
            assert first - second < margin, f"token {i} differs, and it was no tie: {first - second}"
            return False
    assert a.token_ids == b.token_ids
    assert (a.text, a.reasoning, a.finish_reason) == (b.text, b.reasoning, b.finish_reason)
    for mine, theirs in zip(a.logprobs, b.logprobs, strict=True):
        assert mine.token_id == theirs.token_id and mine.logprob == pytest.approx(theirs.logprob, abs=margin)
    usage = a.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.reasoning_tokens) == (
        b.usage.prompt_tokens, b.usage.completion_tokens, b.usage.reasoning_tokens)  # fmt: skip
    return True


OPTIONS = {
    "plain": {},
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
    "stop": {"stop": [" was", "\n"], "max_tokens": 30},
    "stop token": {"stop_ids": [13]},
    "no end": {"ignore_eos": True, "max_tokens": 40},
    "budget": {"thinking_budget": 4},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    "bias": {"logit_bias": {13: 2.0, 200: -100.0}},
    "sampled": {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 11},
    "chunks": {"prefill_chunk": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_request_is_answered_as_without(hybrid, name):
    options = {"temperature": 0, "max_tokens": 24, "logprobs": 2, **OPTIONS[name]}
    for prompt, k in ((PROMPTS[0], 2), (CHAT, 5)):
        expected = qr.generate(*hybrid, prompt, **options)[0]
        pieces = list(qr.stream(*hybrid, prompt, speculate=k, **options))
        found = pieces[-1].result
        assert same(expected, found)
        assert "".join(piece.text for piece in pieces) == found.text
        assert [token for piece in pieces for token in piece.token_ids] == found.token_ids
        passes = found.usage.completion_tokens - 1 - found.usage.accepted_tokens  # after the prompt's
        assert found.usage.drafted_tokens == k * passes


def test_the_trained_layer_is_often_right(hybrid):
    found = [qr.generate(*hybrid, prompt, temperature=0, max_tokens=32, speculate=1)[0].usage for prompt in PROMPTS]
    assert sum(usage.accepted_tokens for usage in found) > 0.4 * sum(usage.drafted_tokens for usage in found)


def test_in_bfloat16_it_departs_only_at_ties():
    """A pass of several tokens rounds in other places than one of a single token, and bf16 has three digits."""
    model, tokenizer = qr.load("tiny-hybrid", dtype="bfloat16")
    options = {"temperature": 0, "max_tokens": 16, "logprobs": 2}
    for prompt in (PROMPTS[0], CHAT):
        expected = qr.generate(model, tokenizer, prompt, **options)[0]
        for k in (1, 3):
            same(expected, qr.generate(model, tokenizer, prompt, speculate=k, **options)[0], margin=0.25)


def test_quantised_models_speculate_too(hybrid):
    model, tokenizer = qr.load("tiny-hybrid", dtype="float32", quantize="int8", progress=False)
    options = {"temperature": 0, "max_tokens": 32, "logprobs": 2}
    assert same(*(qr.generate(model, tokenizer, PROMPTS[0], speculate=k, **options)[0] for k in (0, 2)))


# ---------------------------------------------------------------- what is refused, and the command line


def test_refusals(hybrid):
    model, tokenizer = hybrid
    for wrong in (-1, True, 1.0, MAX_DRAFT_TOKENS + 1, "2"):
        with pytest.raises(RequestError, match="1 to 64"):
            qr.generate(model, tokenizer, "Tim", speculate=wrong)
    with pytest.raises(RequestError, match="one prompt"):
        qr.generate(model, tokenizer, ["Tim", "Lily"], speculate=2)
    with pytest.raises(RequestError, match="without a session"):
        qr.generate(model, tokenizer, "Tim", speculate=2, session=qr.Session(model))
    with pytest.raises(RequestError, match="no draft layer"):
        qr.generate(*qr.load("tiny", dtype="float32"), "Tim", speculate=2)


def test_command_line_reports_what_was_accepted():
    command = [sys.executable, "-m", "qwen_ref.cli", "generate", "--model", "tiny-hybrid", "--prompt", "Once upon a time", "--json",
               "--ignore-chat-template", "--temp", "0", "--max-tokens", "24", "--dtype", "float32"]  # fmt: skip
    plain, guessed = (json.loads(subprocess.run([*command, "--speculate", k], capture_output=True, check=True).stdout)
                      for k in ("0", "2"))  # fmt: skip
    assert plain["token_ids"] == guessed["token_ids"] and plain["usage"]["drafted_tokens"] == 0
    assert 0 < guessed["usage"]["accepted_tokens"] <= guessed["usage"]["drafted_tokens"]
