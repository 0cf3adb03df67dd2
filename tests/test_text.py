"""The streaming text splitter against the plain rule applied to the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ref.loading import ASSETS
from qwen_ref.text import Reasoning, TextSplitter
from qwen_ref.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(ASSETS / "tiny")
OPEN, CLOSE = TOKENIZER.id_of("<think>"), TOKENIZER.id_of("</think>")
texts = st.text(st.sampled_from("ab \n.é家🌙�STOP"), max_size=30)
stops = st.lists(st.sampled_from(["STOP", "\n\n", "ab", ".", "家", "OPS", "aba"]), max_size=3, unique=True).map(tuple)


def run(ids: list[int], state: Reasoning, stop: tuple[str, ...]) -> tuple[str, str, list[tuple[str, str]]]:
    splitter, pieces = TextSplitter(TOKENIZER, state, stop), []
    for id in ids:
        pieces.append(splitter.push(id))
        if splitter.stopped:
            break
    else:
        pieces.append(splitter.finish())
    assert "".join(t for t, _ in pieces) == splitter.text
    assert "".join(r for _, r in pieces) == splitter.reasoning
    return splitter.text, splitter.reasoning, pieces


def cut(text: str, stop: tuple[str, ...]) -> str:
    return text[: min([i for i in map(text.find, stop) if i >= 0], default=len(text))]


@given(text=texts, stop=stops, bytewise=st.booleans())
@settings(max_examples=300, deadline=None)
def test_plain_text_is_cut_at_the_first_stop(text, stop, bytewise):
    ids = TOKENIZER.encode(text)
    if bytewise:  # the least favourable tokens: every character comes in pieces
        table = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.vocab_size) if len(TOKENIZER.token_bytes(i)) == 1}
        ids = [table[bytes([b])] for b in text.encode()]
    out, reasoning, pieces = run(ids, Reasoning.NONE, stop)
    whole = TOKENIZER.decode(ids)
    assert out == cut(whole, stop) and reasoning == ""
    for piece, _ in pieces:
        assert "�" not in piece or "�" in text


@given(thought=texts, answer=texts, stop=st.sampled_from([(), ("STOP",), ("家", "ab")]))
@settings(max_examples=300, deadline=None)
def test_reasoning_is_split_from_the_answer(thought, answer, stop):
    inside, after = TOKENIZER.encode(thought), TOKENIZER.encode(answer)
    expected_thought = cut(thought.lstrip("\n"), stop)
    stopped = expected_thought != thought.lstrip("\n")
    expected = ("" if stopped else cut(answer.lstrip("\n"), stop), expected_thought.rstrip("\n"))
    import unicodedata

    expected = tuple(unicodedata.normalize("NFC", part) for part in expected)
    opened = run([*inside, CLOSE, *after], Reasoning.OPEN, stop)[:2]
    possible = run([OPEN, *inside, CLOSE, *after], Reasoning.POSSIBLE, stop)[:2]
    assert opened == possible == expected


@given(answer=texts)
@settings(max_examples=100, deadline=None)
def test_without_a_block_everything_is_answer(answer):
    ids = TOKENIZER.encode(answer)
    whole = TOKENIZER.decode(ids)
    assert run(ids, Reasoning.CLOSED, ())[:2] == (whole.lstrip("\n"), "")
    assert run(ids, Reasoning.POSSIBLE, ())[:2] == (whole.lstrip("\n"), "")
    assert run(ids, Reasoning.NONE, ())[:2] == (whole, "")


def test_truncated_reasoning_does_not_leak_into_the_answer():
    assert run([OPEN, *TOKENIZER.encode("\nI think\n")], Reasoning.POSSIBLE, ())[:2] == ("", "I think")


def test_a_think_tag_late_in_the_answer_is_text():
    ids = [*TOKENIZER.encode("So "), OPEN, *TOKENIZER.encode("x"), CLOSE]
    assert run(ids, Reasoning.POSSIBLE, ())[0] == "So <think>x</think>"


@pytest.mark.parametrize("thinking,state", [(None, Reasoning.POSSIBLE), (True, Reasoning.POSSIBLE), (False, Reasoning.CLOSED)])
def test_state_comes_from_the_end_of_the_prompt(thinking, state):
    history = [
        {"role": "user", "content": "Hi <think>"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"},
        {"role": "user", "content": "</think>"},
    ]
    ids = TOKENIZER.encode_chat(history, enable_thinking=thinking)
    assert Reasoning.of_prompt(TOKENIZER, ids, chat=True) is state
    assert Reasoning.of_prompt(TOKENIZER, [*ids, OPEN, *TOKENIZER.encode("\n")], chat=True) is Reasoning.OPEN
    assert Reasoning.of_prompt(TOKENIZER, TOKENIZER.encode("plain <think>"), chat=False) is Reasoning.NONE
