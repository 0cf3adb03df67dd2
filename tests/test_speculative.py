"""Speculative decoding gives plain decoding's answer: on random models with guesses right and wrong at will, and on the
bundled hybrid, whose draft layer is trained, with everything that a request can ask for."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mtp import HYBRIDS, with_draft_layer
from torch import nn

import qwen_ref as qr
from qwen_ref.cache import RecurrentCache
from qwen_ref.errors import RequestError
from qwen_ref.generate import Reader
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
        assert speculator.cache.draft.ids.shape[1] > 0  # the entries of the last round are made at the beginning of the next
        assert holds(model, speculator.cache, (prompt + ids)[:cut], 1e-9) == cut - speculator.cache.draft.ids.shape[1]


def holds(model, cache, ids, atol):
    """Model and draft layer know of `ids` what reading them at once gives: entries at their positions, whichever there are, and
    states without one. The number of entries."""
    sequence, whole, drafts = torch.tensor([ids]), model.make_cache(), model.make_draft_cache()
    with torch.inference_mode():
        hidden = model.model(sequence, cache=whole)
        if len(ids) > 1:
            model.draft(hidden[:, :-1], sequence[:, 1:], cache=drafts)
    assert cache.length == len(ids)
    for mine, theirs in zip(cache.layers, whole.layers, strict=True):
        assert mine.length == theirs.length
        if isinstance(mine, RecurrentCache):
            for state, expected in zip(mine.state, theirs.state, strict=True):
                torch.testing.assert_close(state, expected, rtol=0, atol=max(atol, 1e-6))  # kept in fp32 or wider
        else:
            held = slice(0, mine.length)
            torch.testing.assert_close(mine._buffer[:, :, :, held], theirs._buffer[:, :, :, held], rtol=0, atol=atol)
    draft = cache.draft
    entries = draft.cache.key_positions(0, sequence.device)[0]
    assert entries.tolist() == sorted({*entries.tolist()} & {*range(draft.length - 1)}) and draft.length <= len(ids)
    if len(entries):
        mine, theirs = (c.layers[0]._buffer for c in (draft.cache, drafts))
        torch.testing.assert_close(mine[:, :, :, : len(entries)], theirs[:, :, :, entries], rtol=0, atol=atol)
    without = slice(draft.length - draft.ids.shape[1], draft.length)
    assert draft.ids.tolist() == sequence[:, without].tolist()
    torch.testing.assert_close(draft.states, hidden[:, without], rtol=0, atol=atol)
    return len(entries)


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_a_cache_goes_on_with_what_the_draft_layer_knows(model_type):
    """From the end, and from the middle of the last round, no entry is missing; from a mark, and after plain decoding, those are
    whose states are gone."""
    model, _ = with_draft_layer(model_type, torch.float64)
    model.lm_head.weight.data = nn.functional.normalize(model.lm_head.weight, dim=1)
    layer, cache, ids, missing = model.mtp, model.make_cache(), [], 0
    for cut, more, k, lost in ((0, [5, 77, 201, 3], 3, 0), (0, [7, 8, 9], 3, 0), (2, [100], 3, 0), (8, [30, 31], 3, 1), (0, [8], 0, 0),
                               (0, [4, 4], 2, 1 + 9), (0, [6], 5, 0)):  # fmt: skip
        cache.truncate(len(ids) - cut)
        ids = ids[: len(ids) - cut] + more
        expected, _ = plain(model, ids, 9)
        whole = missing + lost == 0
        model.mtp = Foreseeing(layer, model.lm_head.weight, ids + expected, 1.0, random.Random(1)) if whole else layer
        reader = Speculator(model, k, cache) if k else Reader(model, cache)
        prefill = reader.read(torch.tensor([more]))
        cache.mark()
        found, _ = greedy(lambda _: prefill, reader.step, more, 9)  # noqa: B023
        model.mtp = layer
        ids += found[:-1]
        assert found == expected and (reader.accepted == 6 or not whole)
        cache.truncate(len(ids))
        missing += lost
        if k:
            assert holds(model, cache, ids, 1e-9) == len(ids) - cache.draft.ids.shape[1] - missing


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_a_prompt_may_come_in_pieces(chunk):
    model, _ = with_draft_layer("qwen3_5")
    prompt = [9, 30, 200, 41, 7, 7, 150, 2, 11]
    whole, parts = Speculator(model, 2), Speculator(model, 2)
    whole.read(torch.tensor([prompt]))
    for start in range(0, len(prompt), chunk):
        parts.read(torch.tensor([prompt[start : start + chunk]]))
    assert parts.cache.draft.cache.length == whole.cache.draft.cache.length == len(prompt) - 1
    for mine, theirs in zip(parts.cache.draft.cache.layers, whole.cache.draft.cache.layers, strict=True):
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


# ---------------------------------------------------------------- conversations


def settled(model, session):
    """After a turn: no guess is held, no way back from one is kept, and what is held is right."""
    assert all(layer._recent == {} for layer in session.cache.layers if isinstance(layer, RecurrentCache))
    holds(model, session.cache, session.ids, 2e-4)


def pending(session):
    """The guesses at the end of a session's cache, while a turn is at one of its pieces."""
    draft = session.cache.draft
    return draft.ids[0, len(session.ids) - draft.length + draft.ids.shape[1] :].tolist() if draft else []


@pytest.mark.parametrize("turns", [(2, 2, 2, 2), (3, 0, 1, 5), (0, 2, 0, 2)])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def test_a_conversation_is_the_one_without(hybrid, options, turns):
    """Speculating in every turn or in some: the same answers, as much of every prompt found in the cache, and guesses that are
    right as often in later turns."""
    session, plain, messages, usages = qr.Session(hybrid[0]), qr.Session(hybrid[0]), [], []
    for k, text in zip(turns, ("Tell me a story about a dog, a cat and a big red ball. " * 5, "And a cat?", "What did the bird do?", "Why?"), strict=True):
        messages.append({"role": "user", "content": text})
        asked = {"max_tokens": 24, "enable_thinking": False, "logprobs": 2, **options}
        expected = qr.generate(*hybrid, messages, session=plain, **asked)[0]
        found = qr.generate(*hybrid, messages, session=session, speculate=k, **asked)[0]
        assert same(expected, found) and session.ids == plain.ids
        assert found.usage.cached_tokens == expected.usage.cached_tokens and (found.usage.cached_tokens > 0) == (len(messages) > 1)
        if session.cache.draft:
            settled(hybrid[0], session)
        usages += [found.usage] if k else []
        messages.append({"role": "assistant", "content": found.text})
    assert all(usage.accepted_tokens > 0.2 * usage.drafted_tokens for usage in usages)


def test_the_middle_of_the_history_can_be_edited(hybrid):
    """By so little, and so much, that a hybrid goes on from the end of a prompt, from a mark before it, and from nothing."""
    words = hybrid[1].encode("Once upon a time there was a little dog. He had a red ball. " * 8)
    session, plain = qr.Session(hybrid[0]), qr.Session(hybrid[0])
    kept = []
    for prompt in (words[:100], words[:90] + words[:30], words[:90], words[50:], words[50:] + words[:70], words[50:90]):
        asked = {"max_tokens": 9, "temperature": 0, "logprobs": 2, "ignore_eos": True, "prefill_chunk": 40}
        expected = qr.generate(*hybrid, prompt, session=plain, **asked)[0]
        found = qr.generate(*hybrid, prompt, session=session, speculate=3, **asked)[0]
        assert same(expected, found) and found.usage.cached_tokens == expected.usage.cached_tokens
        settled(hybrid[0], session)
        kept.append(found.usage.cached_tokens)
    assert kept == [0, 80, 80, 0, 86, 0]


ENDS = {
    "max_tokens": [{"max_tokens": n} for n in range(1, 9)],
    "stop": [{"stop": text, "max_tokens": 40} for text in (" was", "a", ".", "little", "e w")],
    "stop token": [{"stop_ids": [token], "max_tokens": 40} for token in (13, 14, 15)],  # and those of the answer, see below
}


@pytest.mark.parametrize("end", ENDS)
def test_what_was_guessed_beyond_the_end_of_a_turn_is_forgotten(hybrid, end):
    """A turn that ends at a token the draft layer had guessed, more guesses after it being read."""
    prompt, inside = hybrid[1].encode(PROMPTS[0]), 0
    answer = qr.generate(*hybrid, prompt, max_tokens=40, temperature=0, ignore_eos=True)[0].token_ids
    for options in [*ENDS[end], *[{"stop_ids": [token]} for token in answer[3:12] if end == "stop token"]]:
        asked = {"temperature": 0, "logprobs": 2, **options}
        session = qr.Session(hybrid[0])
        for pieces in qr.stream(*hybrid, prompt, session=session, speculate=4, **asked):
            last, guessed = pieces, pending(session)
        assert same(qr.generate(*hybrid, prompt, **asked)[0], last.result)
        settled(hybrid[0], session)
        inside += len(guessed) > 1 and guessed[0] == last.token_ids[0]
        following = [*prompt, *last.result.token_ids, *hybrid[1].encode(" The")]
        asked = {"temperature": 0, "logprobs": 2, "max_tokens": 8}
        expected, found = (qr.generate(*hybrid, following, **asked, **more)[0] for more in ({}, {"session": session, "speculate": 2}))
        assert same(expected, found) and found.usage.cached_tokens == len(prompt) + len(last.result.token_ids) - 1
    assert inside > 0


@pytest.mark.parametrize("closed", [True, False])
def test_an_abandoned_stream_leaves_nothing(hybrid, closed):
    for count in range(1, 9):
        session = qr.Session(hybrid[0])
        pieces = qr.stream(*hybrid, PROMPTS[0], session=session, speculate=4, temperature=0)
        tokens = [next(pieces).token_ids[0] for _ in range(count)]
        if closed:
            pieces.close()
            settled(hybrid[0], session)
        prompt = [*hybrid[1].encode(PROMPTS[0]), *tokens[: count // 2], 300, 301]
        asked = {"temperature": 0, "logprobs": 2, "max_tokens": 8}
        other = qr.stream(*hybrid, prompt, session=session, speculate=4, **asked)
        next(other)
        next(other)
        if not closed:  # while the other turn is at its guesses
            assert pending(session)
            with pytest.raises(RequestError, match="another turn"):
                next(pieces)
        found = list(other)[-1].result
        assert same(qr.generate(*hybrid, prompt, **asked)[0], found)
        settled(hybrid[0], session)


@pytest.mark.parametrize("name", ["model.layers.4", "mtp", "mtp.norm"])
def test_an_interrupted_pass_leaves_nothing(hybrid, name):
    """Ctrl-C when some layers have read the tokens and others have not, or the draft layer has noted them and made no entry."""
    model, tokenizer = hybrid
    prompt = tokenizer.encode("Tim and the dog saw a big red ball in the park. " * 6)
    for count in range(1, 9):
        session, calls = qr.Session(model), []
        for k in (2, 0):  # after which entries are missing
            qr.generate(model, tokenizer, prompt[: 70 - k], session=session, speculate=k, temperature=0, max_tokens=6)

        def interrupt(*_, calls=calls, count=count):
            calls.append(1)
            if len(calls) == count:
                raise KeyboardInterrupt

        handle = model.get_submodule(name).register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            qr.generate(model, tokenizer, session.ids + prompt[:5], session=session, speculate=3, temperature=0, ignore_eos=True)
        handle.remove()
        settled(model, session)
        asked = {"temperature": 0, "logprobs": 2, "max_tokens": 8}
        following = prompt[:70] + prompt[:9]
        found = qr.generate(model, tokenizer, following, session=session, speculate=2, **asked)[0]
        assert same(qr.generate(model, tokenizer, following, **asked)[0], found)
        settled(model, session)


TURN = st.fixed_dictionaries({
    "change": st.sampled_from(["extend", "extend", "edit", "again", "other"]),
    "at": st.integers(0, 200),
    "k": st.sampled_from([0, 1, 2, 4]),
    "pieces": st.sampled_from([99, 99, 1, 3, 6]),  # after which it is abandoned
    "options": st.sampled_from([{}, {"stop": "e"}, {"stop": [" was", "."]}, {"stop_ids": [13]}, {"temperature": 0.9, "seed": 5}]),
    "max_tokens": st.integers(1, 12),
})  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(turns=st.lists(TURN, min_size=2, max_size=6))
def test_any_life_of_a_session_is_the_one_without(hybrid, turns):
    """Against a session that never speculates, and against a fresh run of every prompt."""
    model, tokenizer = hybrid
    words = tokenizer.encode("Lily saw a big red ball. It was in the park, and the dog ran to it. Tim was sad. " * 4)
    session, plain, prompt = qr.Session(model), qr.Session(model), words[:70]
    for turn in turns:
        at, more = turn["at"], words[turn["at"] % 60 : turn["at"] % 60 + 1 + turn["at"] % 5]
        prompt = {"extend": session.ids + more, "edit": session.ids[:at] + more, "again": prompt, "other": words[at % 70 :]}[turn["change"]]
        asked = {"temperature": 0, "logprobs": 2, "max_tokens": turn["max_tokens"], **turn["options"]}

        def run(count=turn["pieces"], prompt=prompt, asked=asked, **more):
            pieces = qr.stream(model, tokenizer, prompt, **asked, **more)
            taken = list(itertools.islice(pieces, count))
            pieces.close()
            return taken

        found, expected = run(session=session, speculate=turn["k"]), run(session=plain)
        fresh = qr.generate(model, tokenizer, prompt, **asked)[0]
        if found[-1].result is not None:
            assert same(fresh, found[-1].result) and found[-1].result.usage.cached_tokens == expected[-1].result.usage.cached_tokens
        tokens = [[piece.token_ids[0] for piece in pieces] for pieces in (found, expected)]
        assert tokens[0] == tokens[1] == fresh.token_ids[: turn["pieces"]] and session.ids == plain.ids
        if session.cache.draft:
            settled(model, session)


# ---------------------------------------------------------------- what is refused, and the command line


def test_refusals(hybrid):
    model, tokenizer = hybrid
    for wrong in (-1, True, 1.0, MAX_DRAFT_TOKENS + 1, "2"):
        with pytest.raises(RequestError, match="1 to 64"):
            qr.generate(model, tokenizer, "Tim", speculate=wrong)
    with pytest.raises(RequestError, match="one prompt"):
        qr.generate(model, tokenizer, ["Tim", "Lily"], speculate=2)
    with pytest.raises(RequestError, match="no draft layer"):
        qr.generate(*qr.load("tiny", dtype="float32"), "Tim", speculate=2)


def test_command_line_reports_what_was_accepted():
    command = [sys.executable, "-m", "qwen_ref.cli", "generate", "--model", "tiny-hybrid", "--prompt", "Once upon a time", "--json",
               "--ignore-chat-template", "--temp", "0", "--max-tokens", "24", "--dtype", "float32"]  # fmt: skip
    plain, guessed = (json.loads(subprocess.run([*command, "--speculate", k], capture_output=True, check=True).stdout)
                      for k in ("0", "2"))  # fmt: skip
    assert plain["token_ids"] == guessed["token_ids"] and plain["usage"]["drafted_tokens"] == 0
    assert 0 < guessed["usage"]["accepted_tokens"] <= guessed["usage"]["drafted_tokens"]
