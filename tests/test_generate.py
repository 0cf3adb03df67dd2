"""Generation on the bundled models: against transformers' own `generate`, against itself in other batches and streams."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import qwen_ref as qr
from qwen_ref.errors import ConfigError, NumericsError, RequestError
from qwen_ref.generate import encode_prompt, end_tokens, sampling_defaults
from qwen_ref.loading import ASSETS

GOLDEN = Path(__file__).parent / "golden"
PROMPTS = ["Once upon a time", "The dog ran to the", "Lily and Ben saw a big red ball in the park. They wanted", "Tim"]
CHAT = [{"role": "user", "content": "Tell me a story about a small daisy."}]


@pytest.fixture(scope="module", params=qr.loading.BUNDLED)
def bundled(request):
    return request.param, *qr.load(request.param, dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny():
    return qr.load("tiny", dtype=torch.float32)


def test_64_greedy_tokens_are_transformers(bundled):
    name, model, tokenizer = bundled
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        ASSETS / name, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64, min_new_tokens=64,
            eos_token_id=None, pad_token_id=0,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        result = qr.generate(model, tokenizer, prompt, temperature=0, max_tokens=64, ignore_eos=True)[0]
        assert result.token_ids == expected
        assert result.text == tokenizer.decode(expected, skip_special=True)


def test_golden_continuations(bundled):
    """Ten committed greedy continuations: they read as sentences, and nothing between file and text has moved."""
    name, model, tokenizer = bundled
    golden = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    assert len(golden) == 10
    results = qr.generate(model, tokenizer, list(golden), temperature=0, max_tokens=40)
    assert {p: r.text for p, r in zip(golden, results, strict=True)} == golden


def test_batch_equals_single_and_each_stops_alone(bundled):
    _, model, tokenizer = bundled
    prompts = [*PROMPTS, CHAT]
    together = qr.generate(model, tokenizer, prompts, temperature=0, max_tokens=40)
    for prompt, result in zip(prompts, together, strict=True):
        alone = qr.generate(model, tokenizer, prompt, temperature=0, max_tokens=40)[0]
        assert (alone.token_ids, alone.text, alone.finish_reason) == (result.token_ids, result.text, result.finish_reason)
    stops = qr.generate(model, tokenizer, PROMPTS, temperature=0, max_tokens=40, stop=[" the"])
    for full, stopped in zip(together, stops, strict=False):
        assert stopped.text == full.text.split(" the")[0] and " the" not in stopped.text


def test_prefill_chunks_equal_whole(tiny):
    model, tokenizer = tiny
    prompt = "Once upon a time there was a cat. " * 9
    whole = qr.generate(model, tokenizer, [prompt, "A dog"], temperature=0, max_tokens=20)
    for chunk in (1, 7, 64):
        parts = qr.generate(model, tokenizer, [prompt, "A dog"], temperature=0, max_tokens=20, prefill_chunk=chunk)
        assert [r.token_ids for r in parts] == [r.token_ids for r in whole]


@pytest.mark.parametrize("options", [{}, {"stop": ["Lily", " big", ".\n"]}, {"thinking_budget": 5}, {"temperature": 1.2}])
@pytest.mark.parametrize("prompt", [PROMPTS[0], CHAT])
def test_stream_equals_whole(tiny, prompt, options):
    model, tokenizer = tiny
    options = {"temperature": 0, "seed": 3, "max_tokens": 60, "logprobs": 2, **options}
    whole = qr.generate(model, tokenizer, prompt, **options)[0]
    pieces = list(qr.stream(model, tokenizer, prompt, **options))
    assert "".join(p.text for p in pieces) == whole.text
    assert "".join(p.reasoning for p in pieces) == whole.reasoning
    assert [i for p in pieces for i in p.token_ids] == whole.token_ids
    assert [entry for p in pieces for entry in p.logprobs] == whole.logprobs
    last = pieces[-1].result
    assert last.usage == whole.usage and last.finish_reason == whole.finish_reason
    assert all(p.result is None for p in pieces[:-1])


def test_seeds_are_per_request(tiny):
    model, tokenizer = tiny
    options = {"temperature": 1.0, "max_tokens": 12}
    a = [r.token_ids for r in qr.generate(model, tokenizer, [PROMPTS[0]] * 3, seed=[1, 2, 1], **options)]
    assert a[0] == a[2] != a[1]
    assert qr.generate(model, tokenizer, PROMPTS[0], seed=2, **options)[0].token_ids == a[1]
    b = qr.generate(model, tokenizer, PROMPTS[0], **options)[0].token_ids
    c = qr.generate(model, tokenizer, PROMPTS[0], **options)[0].token_ids
    assert b != c  # without a seed two runs differ


def test_logprobs_are_log_softmax_of_the_raw_logits(tiny):
    model, tokenizer = tiny
    result = qr.generate(model, tokenizer, PROMPTS[1], temperature=0, max_tokens=9, logprobs=3, repetition_penalty=1.3)[0]
    ids = tokenizer.encode(PROMPTS[1])
    with torch.no_grad():
        table = model(torch.tensor([ids + result.token_ids]))[0, len(ids) - 1 : -1].double().log_softmax(-1)
    for row, token, entry in zip(table, result.token_ids, result.logprobs, strict=True):
        assert entry.token_id == token and entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [i for i, _ in entry.top] == row.topk(3).indices.tolist()
        assert [p for _, p in entry.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert all(e.top == [] for e in qr.generate(model, tokenizer, "A", max_tokens=2, temperature=0, logprobs=0)[0].logprobs)


def test_session_reuses_the_common_prefix(tiny):
    model, tokenizer = tiny
    session = qr.Session(model)
    options = {"temperature": 0, "max_tokens": 24, "enable_thinking": False}
    first = qr.generate(model, tokenizer, CHAT, session=session, **options)[0]
    assert first.usage.cached_tokens == 0
    turns = [*CHAT, {"role": "assistant", "content": first.text}, {"role": "user", "content": "Tell me another one."}]
    warm = qr.generate(model, tokenizer, turns, session=session, **options)[0]
    cold = qr.generate(model, tokenizer, turns, **options)[0]
    assert warm.token_ids == cold.token_ids
    prompt, again = tokenizer.encode_chat(CHAT, enable_thinking=False), tokenizer.encode_chat(turns, enable_thinking=False)
    common = next(i for i, (a, b) in enumerate(zip(prompt, again, strict=False)) if a != b)
    assert warm.usage.cached_tokens >= common > 10
    other = qr.generate(model, tokenizer, "Something else entirely.", session=session, temperature=0, max_tokens=8)[0]
    assert other.token_ids == qr.generate(model, tokenizer, "Something else entirely.", temperature=0, max_tokens=8)[0].token_ids
    same = qr.generate(model, tokenizer, "Something else entirely.", session=session, temperature=0, max_tokens=8)[0]
    assert same.usage.cached_tokens == same.usage.prompt_tokens - 1  # the last token must be read for its logits
    with pytest.raises(RequestError, match="one conversation"):
        qr.generate(model, tokenizer, PROMPTS, session=session)


def test_a_session_is_of_one_model(tiny):
    """Even of equal ones, for nobody compares weights; a fused one takes turns with the model it was made of."""
    model, tokenizer = tiny
    session, options = qr.Session(model), {"temperature": 0, "max_tokens": 8}
    qr.generate(model, tokenizer, PROMPTS[0], session=session, **options)
    others = [qr.load(name, dtype=dtype)[0] for name, dtype in (("tiny", torch.float32), ("tiny", torch.bfloat16),
                                                                ("tiny-hybrid", torch.float32))]  # fmt: skip
    for other in others:
        with pytest.raises(RequestError, match="cache of another model"):
            qr.generate(other, tokenizer, PROMPTS[0], session=session, **options)
    fast, prompt = model.fuse(), PROMPTS[0]
    for reader in (model, fast, model, fast):
        prompt += " and a dog"
        warm = qr.generate(reader, tokenizer, prompt, session=session, **options)[0]
        assert warm.usage.cached_tokens > 2
        assert warm.token_ids == qr.generate(model, tokenizer, prompt, **options)[0].token_ids


def test_one_turn_at_a_time(tiny):
    """A stream whose session has gone on is refused, and does not disturb it; one that is at its end has merely ended."""
    session, options = qr.Session(tiny[0]), {"temperature": 0, "max_tokens": 6}
    left, ended = (qr.stream(*tiny, PROMPTS[0], session=session, **options) for _ in range(2))
    expected = [next(left).token_ids[0], next(left).token_ids[0]]
    tokens = [next(ended).token_ids[0] for _ in range(6)]
    following = qr.stream(*tiny, PROMPTS[1], session=session, **options)
    next(following)
    with pytest.raises(RequestError, match="another turn of this session has begun"):
        next(left)
    assert next(ended, None) is None and tokens[:2] == expected
    assert list(following)[-1].result.token_ids == qr.generate(*tiny, PROMPTS[1], **options)[0].token_ids


def test_a_hybrid_session_goes_on_from_its_marks():
    """A recurrent state cannot be cut: what follows departs inside the first answer, and is read from the mark before it."""
    model, tokenizer = qr.load("tiny-hybrid", dtype=torch.float32)
    session = qr.Session(model)
    chat, options = {"enable_thinking": False}, {"temperature": 0, "max_tokens": 24}
    long = [{"role": "user", "content": "Tell me a story about a dog, a cat, a bird and a big red ball. " * 9}]
    first = qr.generate(model, tokenizer, long, session=session, **chat, **options)[0]
    turns = [*long, {"role": "assistant", "content": first.text}, {"role": "user", "content": "Tell me another one."}]
    for prompt, kept in ((turns, True), (turns[:1], True), ("Something else entirely.", False), (turns, False)):
        asked = options if isinstance(prompt, str) else {**chat, **options}
        warm = qr.generate(model, tokenizer, prompt, session=session, **asked)[0]
        cold = qr.generate(model, tokenizer, prompt, **asked)[0]
        assert warm.token_ids == cold.token_ids  # nothing of what was read before leaks into it
        read = warm.usage.prompt_tokens - warm.usage.cached_tokens
        assert warm.usage.cached_tokens > 0 and read <= 64 + 24 + 40 if kept else warm.usage.cached_tokens == 0


def test_thinking_budget_closes_the_block(tiny):
    model, tokenizer = tiny
    close = tokenizer.id_of("</think>")
    think = tokenizer.encode_chat(CHAT) + [tokenizer.id_of("<think>")]
    result = qr.generate(model, tokenizer, think, chat=True, temperature=0, max_tokens=30, thinking_budget=4, ignore_eos=True)[0]
    assert close in result.token_ids[4:7] and result.usage.reasoning_tokens <= 7
    assert result.reasoning and result.text and "</think>" not in result.text + result.reasoning


def test_defaults_come_from_generation_config(tiny):
    model, tokenizer = tiny
    assert sampling_defaults({"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}) == {
        "repetition_penalty": 1.0, "temperature": 0.6, "top_k": 20, "top_p": 0.95}  # fmt: skip
    assert sampling_defaults({"temperature": 0.6}) == {"repetition_penalty": 1.0}  # no do_sample: greedy
    for bad in ({"do_sample": True, "temperature": -1}, {"do_sample": "yes"}, {"do_sample": True, "top_k": -5}):
        with pytest.raises(ConfigError, match=r"generation_config\.json"):
            sampling_defaults(bad)
    ends = end_tokens(model, tokenizer)
    assert set(ends) == {"generation_config.json", "config.json", "tokenizer_config.json"}
    assert {tokenizer.id_of("<|im_end|>"), tokenizer.id_of("<|endoftext|>")} == set().union(*ends.values())


def test_a_temperature_too_small_for_fp32_is_greedy(tiny, monkeypatch):
    model, tokenizer = tiny
    greedy = qr.generate(model, tokenizer, PROMPTS[0], temperature=0, max_tokens=8)[0].token_ids
    monkeypatch.setattr(model, "generation_config", {**model.generation_config, "do_sample": True, "temperature": 1e-40})
    assert qr.generate(model, tokenizer, PROMPTS[0], max_tokens=8)[0].token_ids == greedy


def test_tool_arguments_as_servers_send_them(data, tmp_path):
    """OpenAI's API has `arguments` as a JSON string; templates want the object. Both give the same prompt."""
    (tmp_path / "tokenizer.json").write_bytes((data / "tokenizers" / "qwen3" / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes((data / "chat-templates" / "Qwen3-Coder.jinja").read_bytes())
    tokenizer = qr.Tokenizer.load(tmp_path)

    def history(arguments):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        return [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "12"}]

    as_text, as_object = (encode_prompt(tokenizer, history(a)) for a in ('{"city": "Köln"}', {"city": "Köln"}))
    assert as_text == as_object and "Köln" in tokenizer.decode(as_text)


def test_context_is_a_bound(tiny):
    model, tokenizer = tiny
    context = model.config.max_position_embeddings
    result = qr.generate(model, tokenizer, [5] * (context - 3), temperature=0, max_tokens=50, ignore_eos=True)[0]
    assert len(result.token_ids) == 3 and result.finish_reason == "length"
    with pytest.raises(RequestError, match=f"context holds {context}"):
        qr.generate(model, tokenizer, [5] * context)


@pytest.mark.parametrize("prompt,options,match", [
    ("", {}, "prompt is empty"), ([], {}, "no prompts"), ([4096], {}, "outside 0..4095"), ([-1, 5], {}, "prompt is -1"),
    ("A", {"max_tokens": 0}, "max_tokens"), ("A", {"max_tokens": True}, "max_tokens"), ("A", {"stop": ""}, "stop"),
    ("A", {"stop": [3]}, "stop"), ("A", {"temperature": -1.0}, "temperature"), ("A", {"seed": 2**64}, "seed"),
    ("A", {"logprobs": -1}, "logprobs"), ("A", {"temprature": 1.0}, "unknown option temprature"),
    ("A", {"thinking_budget": -1}, "thinking_budget"), (["A", "B"], {"seed": [1]}, "1 seeds for 2 prompts"),
    ("A", {"prefill_chunk": 0}, "prefill_chunk"), ("A", {"logit_bias": {4096: 1.0}}, "logit_bias"),
    ("A", {"prefill_chunk": "a"}, "prefill_chunk is 'a'"), ("A", {"max_tokens": None}, "max_tokens is None"),
    ("A", {"seed": 1.5}, "seed is 1.5"), ("A", {"seed": "7"}, "seed is '7'"), ("A", {"stop": 3}, "stop is 3"),
    ("A", {"stop_ids": 3}, "stop_ids is 3"), ("A", {"stop_ids": ["<|im_end|>"]}, "stop_ids is '<|im_end|>'"),
    ("A", {"stop_ids": [4096]}, r"stop_ids is 4096; it must be an integer from 0 to 4095"),
    ("A", {"max_new_tokens": 5}, "did you mean max_tokens; there are max_tokens, seed, stop, stop_ids"),
    (CHAT, {"variables": {"messages": []}}, "cannot be named 'messages'"),
    (None, {}, "not None"), (5, {}, "not 5"), (b"abc", {}, "not b'abc'"), (CHAT[0], {}, r"give a list of messages"),
    ([["a", "b"]], {}, "token id of the prompt is"), ([[1.7, 2.2]], {}, "token id of the prompt is"),
    ("A", {"session": "x"}, "session is 'x'"), ("A", {"session": False}, "session is False"),
    ("A", {"tools": [1]}, "tools is for the chat template"), ("A", {"variables": {}}, "variables is for the chat template"),
    ([5], {"enable_thinking": False}, "enable_thinking is for the chat template"),
    ("A", {"speculate": 65}, "must be 1 to 64"), ("A", {"speculate": 1}, "no draft layer"),
    ([3, 4.5], {}, "prompt is 4.5"), (torch.tensor([1.5]), {}, "not 1.5"), ([True], {}, "prompt is True"),
])  # fmt: skip
@pytest.mark.parametrize("call", [qr.generate, qr.stream])
def test_bad_requests_are_named(tiny, call, prompt, options, match):
    """By both alike, but that a stream is of one prompt."""
    if call is qr.stream and match in ("no prompts", "1 seeds for 2 prompts", "not 1.5"):
        match = "prompt is"
    with pytest.raises(RequestError, match=match):
        call(*tiny, prompt, **options)  # of a stream before its first piece is asked for


@pytest.mark.parametrize("pair", [(None, 1), (0, None), (1, 0), ("tiny", 1)])
def test_a_model_and_a_tokenizer_are_needed(tiny, pair):
    model, tokenizer = (tiny[x] if isinstance(x, int) else x for x in pair)
    with pytest.raises(RequestError, match="a model and its tokenizer are needed"):
        qr.generate(model, tokenizer, "A")


def test_a_session_can_be_read_on_by_hand(tiny):
    """Also with gradients on, in which nothing can be written to that `generate` made in its own mode."""
    model, tokenizer = tiny
    session = qr.Session(model)
    said = qr.generate(model, tokenizer, PROMPTS[0], session=session, max_tokens=4, temperature=0)[0].token_ids
    expected = model(torch.tensor([[*tokenizer.encode(PROMPTS[0]), *said]]))[:, -1]
    assert session.cache.length == len(tokenizer.encode(PROMPTS[0])) + 3
    logits = model(torch.tensor([said[-1:]]), cache=session.cache)[:, -1]
    torch.testing.assert_close(logits, expected)


def test_integers_and_ids_of_any_kind(tiny):
    model, tokenizer = tiny
    ids, options = tokenizer.encode(PROMPTS[0]), {"temperature": 1.0, "max_tokens": 8}
    expected = qr.generate(model, tokenizer, ids, seed=3, **options)[0].token_ids
    for prompt in (np.array(ids), torch.tensor(ids), list(np.array(ids)), tuple(ids), torch.tensor([ids]), [np.array(ids)]):
        for seed in (np.int64(3), np.array([3])):
            assert qr.generate(model, tokenizer, prompt, seed=seed, stop=None, stop_ids=None, **options)[0].token_ids == expected
    more = {"max_tokens": np.int32(8), "prefill_chunk": np.int64(2), "stop_ids": np.array([expected[4]]), "logprobs": np.int8(1)}
    stopped = qr.generate(model, tokenizer, ids, seed=3, **{**options, **more})[0]
    assert stopped.token_ids == expected[: expected.index(expected[4]) + 1] and stopped.logprobs is not None


def test_variables_reach_the_template(tiny):
    model, tokenizer = tiny
    options = {"temperature": 0, "max_tokens": 4}
    expected = qr.generate(model, tokenizer, CHAT, enable_thinking=False, **options)[0]
    variables = {"enable_thinking": False}
    whole = qr.generate(model, tokenizer, CHAT, variables=variables, **options)[0]
    streamed = list(qr.stream(model, tokenizer, CHAT, variables=variables, **options))[-1].result
    assert whole.usage == streamed.usage == expected.usage
    assert whole.usage.prompt_tokens != qr.generate(model, tokenizer, CHAT, **options)[0].usage.prompt_tokens


def test_non_finite_logits_name_the_first_bad_layer():
    model, tokenizer = qr.load("tiny", dtype=torch.float32)
    model.model.layers[3].mlp.down_proj.weight[7, 5] = torch.inf
    with pytest.raises(NumericsError, match=r"model\.layers\.3\.mlp\.down_proj"):
        qr.generate(model, tokenizer, "Once", max_tokens=3)


def test_padded_vocabulary_rows_are_never_chosen():
    """An id without a token cannot be decoded, so its logit must not win."""
    model, tokenizer = qr.load("tiny", dtype=torch.float32)
    tokenizer.vocab_size = 3000
    with torch.no_grad():
        model.model.embed_tokens.weight[3000:] *= 50
    results = qr.generate(model, tokenizer, "Once upon a time", temperature=0.9, seed=1, max_tokens=30, ignore_eos=True)
    assert max(results[0].token_ids) < 3000
