"""Text <-> token ids for every Qwen vocabulary, from the files of an official checkpoint.

All Qwen vocabularies are byte-level BPE: text is normalised to NFC, cut by a regular expression, written in GPT-2's
alphabet of 256 printable characters (one per byte) and merged. The `tokenizers` library does this part; it never sees
the added tokens (`<|im_end|>`, `<think>`, ...), so ordinary text cannot turn into one by accident. Added tokens and
decoding are handled here.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat import CHATML, ChatTemplate, Segment
from .errors import TemplateError, TokenizerError
from .limits import LIMITS

if TYPE_CHECKING:
    from torch import Tensor

# Qwen 1 to Qwen 3. Qwen 3.5 counts combining marks (\p{M}) as parts of words, for Devanagari, Thai and the like.
PATTERN_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERN_QWEN3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A file of ranks says neither its pattern nor its special tokens. Its number of ranks identifies the vocabulary.
_QWEN1_RANKS = 151_643
_QWEN3_5_RANKS = 248_044
_QWEN1_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_LONGEST_RANK = 1024  # bytes. Qwen's longest is 128 spaces; finding a token's merge is quadratic in its length

# The tokens of tokenizer_config.json which transformers also hands to chat templates as variables.
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character of each byte: printable Latin-1 stands for itself, the other 68 are moved to U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


_BYTE_OF = _byte_alphabet()
_CHAR_OF = {byte: char for char, byte in _BYTE_OF.items()}
_TO_LATIN1 = str.maketrans({char: chr(byte) for char, byte in _BYTE_OF.items()})
_FROM_LATIN1 = str.maketrans({chr(byte): char for char, byte in _BYTE_OF.items()})


class Tokenizer:
    """A Qwen tokenizer. Make one with `Tokenizer.load(folder)`.

    Attributes:
        vocab_size: the highest id + 1, added tokens included. Models pad their vocabulary beyond it.
        eos_token_id, pad_token_id: as tokenizer_config.json names them, or None.
        added_tokens: text -> id of every token that is not made by merging, `<think>` and `<tool_call>` included.
        special_ids: those of them marked special: what `skip_special` leaves out of decoded text.
        chat_template: the source of the Jinja template, or None. It may be replaced.
    """

    def __init__(self, spec: dict[str, Any], config: dict[str, Any], template: str | None, source: str) -> None:
        """`spec` is the content of a tokenizer.json (which it changes), `source` the file named in errors."""
        added = _added_tokens(spec, config, source)
        self.added_tokens: dict[str, int] = {token: entry["id"] for token, entry in added.items()}
        self.special_ids = frozenset(entry["id"] for entry in added.values() if entry["special"])
        self.chat_template = template
        vocab = _base_vocabulary(spec, self.added_tokens, source)
        self._ids = vocab | self.added_tokens
        self._bytes = _bytes_of_ids(vocab, source) | {id: token.encode() for token, id in self.added_tokens.items()}
        self.vocab_size = max(self._bytes) + 1
        self._plain = _plain_backend(spec, vocab, source)
        self._added_pattern = _any_of(self.added_tokens)
        self._named_tokens = _named_tokens(config)
        self.eos_token_id = self._named_id("eos_token")
        self.pad_token_id = self._named_id("pad_token")

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json, else vocab.json + merges.txt, else a single *.tiktoken; and tokenizer_config.json and
        chat_template.jinja where they exist (the latter replaces the former's template, as in transformers). Beside a
        *.tiktoken, whose generation knew no templates, `"chat_format": "chatml"` in generation_config.json is one.

        Raises: TokenizerError naming the file and what is wrong with it.
        """
        folder = Path(folder)
        config_path, template_path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = _read_json(config_path) if config_path.exists() else {}
        template = config.get("chat_template")
        if template_path.exists():
            template = _read_text(template_path, LIMITS.template_bytes)
        if not isinstance(template, str | None):
            raise TokenizerError(f"{config_path}: chat_template is not a string; put the one to use in {template_path}")
        spec, path = _read_spec(folder, config)
        if template is None and path.suffix == ".tiktoken" and _chat_format(folder) == "chatml":
            template = CHATML
        return cls(spec, config, template, str(path))

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: at most LIMITS.text_chars characters. Time and memory grow linearly with it (about 1 s and 300 MB
                for a million tokens).
            allow_special: whether added tokens written out in the text become those tokens, as in transformers. By
                default `<|im_end|>` is ordinary text, so that text from outside cannot end a turn.
        Raises: TokenizerError for lone surrogates, over-long text, or a run of millions of spaces (the
            `tokenizers` library gives up on those).
        """
        if not isinstance(text, str):
            raise TokenizerError(f"text is {type(text).__name__}, not str")
        return self._encode_segments(self._split_added(text) if allow_special else [Segment(text, False)])

    def decode(self, ids: Sequence[int] | Tensor, *, skip_special: bool = False) -> str:
        """The text of token ids (a sequence or a one-dimensional integer tensor). Bytes that are not UTF-8 become
        U+FFFD. `skip_special` leaves out the special tokens (`<|im_end|>`), but not `<think>` or `<tool_call>`.

        Raises: TokenizerError for anything that is not the id of a token.
        """
        return b"".join(self._visible(id, skip_special) for id in _as_sequence(ids)).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token, not always whole characters. Raises: TokenizerError if there is no such token."""
        try:
            # operator.index admits the integers of numpy and torch, and no float; a bool is an int to Python
            found = None if isinstance(id, bool) else self._bytes.get(operator.index(id))
        except TypeError:
            found = None
        if found is None:
            raise TokenizerError(
                f"{id!r} is not a token id: this tokenizer has ids 0 to {self.vocab_size - 1}. A model's vocabulary "
                "may be padded beyond that; mask those ids when sampling"
            )
        return found

    def stream_decoder(self, *, skip_special: bool = False) -> StreamDecoder:
        """A decoder that takes one id at a time."""
        return StreamDecoder(lambda id: self._visible(id, skip_special))

    def id_of(self, token: str) -> int | None:
        """The id of a token by its text (added tokens) or its spelling in the vocabulary file, or None."""
        return self._ids.get(token)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        **variables: Any,
    ) -> str:
        """The chat template's text, equal to that of transformers' `apply_chat_template(tokenize=False)`.

        Args:
            messages: dicts with "role" and "content" and whatever else the template reads ("tool_calls", ...).
            tools: the JSON schemas of functions, as dicts.
            add_generation_prompt: whether to end with the header of the assistant's turn.
            enable_thinking: passed to the template unless None. variables: passed to the template as they are.
        Raises: TemplateError if the template is missing, damaged or refuses the messages.
        """
        return self._template().render(
            messages, tools, add_generation_prompt, _with_thinking(variables, enable_thinking)
        )

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        allow_special: bool = False,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation. Arguments as `render`.

        By default only the added tokens that the template itself writes become tokens; whatever the messages, tools
        and variables contain stays text (see `chat.ChatTemplate.segments`). With `allow_special` every added token in
        the rendered text is one, exactly as in transformers. The two differ only if an input holds such a token.
        """
        template, variables = self._template(), _with_thinking(variables, enable_thinking)
        if allow_special:
            return self.encode(template.render(messages, tools, add_generation_prompt, variables), allow_special=True)
        return self._encode_segments(template.segments(messages, tools, add_generation_prompt, variables))

    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise TemplateError(
                "this tokenizer has no chat template (base models often have none); use encode() for plain text, "
                "or set chat_template"
            )
        return ChatTemplate(self.chat_template, self._named_tokens, frozenset(self.added_tokens))

    def _split_added(self, text: str) -> list[Segment]:
        """Cut at added tokens: the leftmost, and of those that start together the longest."""
        pieces = self._added_pattern.split(text) if self._added_pattern else [text]
        return [Segment(piece, bool(i % 2)) for i, piece in enumerate(pieces)]

    def _encode_segments(self, segments: list[Segment]) -> list[int]:
        plain = [segment.text for segment in segments if not segment.control]
        _check_texts(plain)
        with _library_errors("the text cannot be encoded"):
            encoded = iter(self._plain.encode_batch_fast(plain, add_special_tokens=False))
        ids: list[int] = []
        for text, control in segments:
            ids += [self.added_tokens[text]] if control else next(encoded).ids
        return ids

    def _visible(self, id: int, skip_special: bool) -> bytes:
        piece = self.token_bytes(id)
        return b"" if skip_special and operator.index(id) in self.special_ids else piece

    def _named_id(self, name: str) -> int | None:
        token = self._named_tokens.get(name)
        if token is not None and token not in self._ids:
            raise TokenizerError(f"tokenizer_config.json: {name} is {token!r}, which is not a token of the vocabulary")
        return None if token is None else self._ids[token]


class StreamDecoder:
    """Text from ids that arrive one by one. It never gives out part of a character, and all that `push` and the last
    `flush` return, joined, is what `decode` makes of the whole."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that this token completes, possibly none. Raises: TokenizerError as `decode`."""
        return self._utf8.decode(self._bytes_of(id))

    def flush(self) -> str:
        """U+FFFD if the ids ended inside a character, else nothing. The decoder can then be used anew."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def merges_from_ranks(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token of a tiktoken vocabulary, in order of rank.

    tiktoken merges the neighbours whose union has the lowest rank. A token's own merge is therefore the last one when
    its bytes are merged so. Where only one cut leaves two known tokens, it can be no other. Qwen 3.5 has 201 tokens
    that merging does not reach: they have no merge, or one that never applies, and are made only of a word that is
    that token as a whole.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        cuts = [i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        parts = [token[: cuts[0]], token[cuts[0] :]] if len(cuts) == 1 else _merge_to_two(token, ranks)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _merge_to_two(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The two parts before a token's last merge, or more if merging ends before that."""
    parts, never = [token[i : i + 1] for i in range(len(token))], len(ranks)
    pair_ranks = [ranks.get(left + right, never) for left, right in pairwise(parts)]
    while len(parts) > 2 and (best := min(pair_ranks)) < never:
        i = pair_ranks.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del pair_ranks[i]
        for j in (i - 1, i):  # the new part's pairs with its two neighbours
            if 0 <= j < len(pair_ranks):
                pair_ranks[j] = ranks.get(parts[j] + parts[j + 1], never)
    return parts


# ---- reading files ----------------------------------------------------------------------------------------------


def _read_spec(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """The content of tokenizer.json, or what it would be for the older files, and the file it came from."""
    if (folder / "tokenizer.json").exists():
        return _read_json(folder / "tokenizer.json"), folder / "tokenizer.json"
    if (folder / "vocab.json").exists():
        path = folder / "vocab.json"
        pattern = PATTERN_QWEN3_5 if config.get("tokenizer_class") == "Qwen3_5Tokenizer" else PATTERN_QWEN
        return _spec(_read_json(path), _read_merges(folder / "merges.txt"), pattern, ()), path
    found = sorted(folder.glob("*.tiktoken")) if folder.is_dir() else []
    if len(found) != 1:
        problem = f"holds {len(found)} *.tiktoken files" if found else "has no tokenizer.json, vocab.json or *.tiktoken"
        raise TokenizerError(f"{folder} {problem}; is it the folder of a Qwen checkpoint?")
    return _spec_from_ranks(_read_ranks(found[0]), found[0]), found[0]


def _chat_format(folder: Path) -> Any:
    path = folder / "generation_config.json"
    return _read_json(path).get("chat_format") if path.exists() else None


def _spec(vocab: dict[str, int], merges: list[list[str]], pattern: str, special: Iterable[str]) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": token, "special": True, "normalized": False}
            for id, token in enumerate(special, start=len(vocab))
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def _spec_from_ranks(ranks: dict[bytes, int], path: Path) -> dict[str, Any]:
    if len(ranks) not in (_QWEN1_RANKS, _QWEN3_5_RANKS):
        raise TokenizerError(
            f"{path} has {len(ranks)} ranks, so it is neither the vocabulary of Qwen 1 ({_QWEN1_RANKS}) nor that of "
            f"Qwen 3.5 ({_QWEN3_5_RANKS}); use a folder with a tokenizer.json"
        )
    vocab = {_spelling(token): rank for token, rank in ranks.items()}
    merges = [[_spelling(left), _spelling(right)] for left, right in merges_from_ranks(ranks)]
    first = len(ranks) == _QWEN1_RANKS
    spec = _spec(vocab, merges, PATTERN_QWEN if first else PATTERN_QWEN3_5, _QWEN1_SPECIAL if first else ())
    spec["model"]["ignore_merges"] = True  # as tiktoken: a whole word that is a token is that token
    return spec


def _spelling(token: bytes) -> str:
    return token.decode("latin-1").translate(_FROM_LATIN1)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """tiktoken's format: a line per token, its bytes in base64, a space, its rank (which is its id)."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read_text(path, LIMITS.tokenizer_bytes).splitlines(), start=1):
        try:
            encoded, rank = line.split(" ")
            token = base64.b64decode(encoded, validate=True)
        except (ValueError, binascii.Error):
            raise TokenizerError(f"{path}, line {number}: not a token in base64, a space and a rank") from None
        if not (rank.isascii() and rank.isdigit() and len(rank) < 10):
            raise TokenizerError(f"{path}, line {number}: the rank is {rank[:20]!r}, not a number")
        if token in ranks or not 0 < len(token) <= _LONGEST_RANK:
            problem = "appears twice" if token in ranks else f"has {len(token)} bytes, not 1 to {_LONGEST_RANK}"
            raise TokenizerError(f"{path}, line {number}: the token {problem}")
        ranks[token] = int(rank)
    if len(set(ranks.values())) != len(ranks):
        raise TokenizerError(f"{path}: two tokens share a rank")
    return ranks


def _read_merges(path: Path) -> list[list[str]]:
    """merges.txt: a comment line with the version, then a pair of tokens per line, in order of priority."""
    lines = _read_text(path, LIMITS.tokenizer_bytes).split("\n")
    first = 1 if lines[0].startswith("#version") else 0
    merges = []
    for number, line in enumerate(lines[first:], start=first + 1):
        pair = line.removesuffix("\r").split(" ")
        if len(pair) == 2 and all(pair):
            merges.append(pair)
        elif line.strip():
            raise TokenizerError(f"{path}, line {number}: {line[:80]!r} is not two tokens separated by a space")
    return merges


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path, LIMITS.tokenizer_bytes), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} appears twice in one object")
    return result


def _read_text(path: Path, limit: int) -> str:
    try:
        # A named pipe or a device in place of the file would block or never end
        if not path.is_file():
            raise TokenizerError(f"{path} is missing or not a file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise TokenizerError(f"{path} is larger than the {limit} bytes allowed")
        if data.startswith(codecs.BOM_UTF8):
            raise TokenizerError(f"{path} starts with a byte order mark; save it as UTF-8 without one")
        return data.decode("utf-8")
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8: {error}") from None


# ---- checking what they hold ------------------------------------------------------------------------------------


def _added_tokens(spec: dict[str, Any], config: dict[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """The added tokens by text, in order of id: those of tokenizer_config.json, else those of tokenizer.json. Where a
    folder has both lists they are the same, unless somebody changed one; transformers then reads the former."""
    entries = []
    for key, entry in _typed(config, "added_tokens_decoder", dict, "tokenizer_config.json").items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and isinstance(entry, dict)):
            raise TokenizerError(f"tokenizer_config.json: added_tokens_decoder holds {key!r:.40}: {entry!r:.80}")
        entries.append(_added_token({**entry, "id": int(key)}, "tokenizer_config.json"))
    if not entries:
        entries = [_added_token(entry, source) for entry in _typed(spec, "added_tokens", list, source)]
    tokens: dict[str, dict[str, Any]] = {}
    ids: dict[int, str] = {}
    for entry in entries:
        token, id = entry["content"], entry["id"]
        if ids.setdefault(id, token) != token or (token in tokens and tokens[token]["id"] != id):
            raise TokenizerError(f"{source}: the added token {token!r} or its id {id} is also used for another")
        tokens[token] = entry
    return dict(sorted(tokens.items(), key=lambda item: item[1]["id"]))


def _added_token(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise TokenizerError(f"{where}: an added token is {entry!r:.80}, not an object")
    id, token, special = entry.get("id"), entry.get("content"), entry.get("special", False)
    if type(id) is not int or not 0 <= id < LIMITS.width or not isinstance(token, str) or not token:
        raise TokenizerError(f"{where}: an added token has the id {id!r:.40} and the text {token!r:.80}")
    if type(special) is not bool:
        raise TokenizerError(f"{where}: the added token {token!r} is marked special: {special!r:.40}")
    _check_texts([token])
    # These change what is matched around or inside the token. No Qwen tokenizer uses them.
    for flag, default in (("lstrip", False), ("rstrip", False), ("single_word", False), ("normalized", not special)):
        if entry.get(flag, default):
            raise TokenizerError(f"{where}: the added token {token!r} has {flag} set, which is not implemented")
    return {"id": id, "content": token, "special": special}


def _base_vocabulary(spec: dict[str, Any], added: dict[str, int], source: str) -> dict[str, int]:
    """The tokens made by merging. Trained tokenizers list their added tokens in the vocabulary too: they are taken
    out, so that no text can become one. Ids must cover 0 to the highest without gaps or duplicates."""
    vocab = _typed(_typed(spec, "model", dict, source), "vocab", dict, source)
    for token, id in vocab.items():
        if type(id) is not int or added.get(token, id) != id:
            raise TokenizerError(f"{source}: the token {token!r:.80} has the id {id!r:.40} but is an added token"
                                 if token in added else f"{source}: the token {token!r:.80} has the id {id!r:.40}")
    base = {token: id for token, id in vocab.items() if token not in added}
    ids = set(base.values())
    if len(ids) != len(base) or not ids.isdisjoint(added.values()):
        raise TokenizerError(f"{source}: two tokens share an id")
    known = ids.union(added.values())
    missing = next((id for id in range(max(ids, default=0)) if id not in known), None)
    if not ids or min(ids) < 0 or missing is not None:
        raise TokenizerError(f"{source}: the ids of the vocabulary are not 0 to {len(ids) - 1}: {missing} is missing")
    return base


def _bytes_of_ids(vocab: dict[str, int], source: str) -> dict[int, bytes]:
    """The bytes of every base token. All 256 single bytes must be there, or some texts could not be written."""
    unknown = set("".join(vocab)).difference(_BYTE_OF)
    if unknown:
        raise TokenizerError(f"{source}: the vocabulary is not byte-level: it has the character {min(unknown)!r}")
    absent = next((byte for byte, char in _CHAR_OF.items() if char not in vocab), None)
    if absent is not None:
        raise TokenizerError(f"{source}: the vocabulary has no token for the single byte {absent:#04x}")
    return {id: token.translate(_TO_LATIN1).encode("latin-1") for token, id in vocab.items()}


def _plain_backend(spec: dict[str, Any], vocab: dict[str, int], source: str) -> Any:
    """The library's tokenizer without added tokens, and without padding, truncation or tokens put around texts."""
    import tokenizers

    model = spec["model"]
    if model.get("type", "BPE") != "BPE" or any(
        model.get(field) for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    ):
        raise TokenizerError(f"{source}: the model is not plain byte-level BPE, as every Qwen tokenizer is")
    if "ByteLevel" not in _stages(spec.get("pre_tokenizer")) or "ByteLevel" not in _stages(spec.get("decoder")):
        raise TokenizerError(f"{source}: pre_tokenizer and decoder lack the ByteLevel stage of every Qwen tokenizer")
    plain = {
        "version": "1.0",
        "normalizer": spec.get("normalizer"),
        "pre_tokenizer": spec["pre_tokenizer"],
        "model": {**model, "vocab": vocab},
        "added_tokens": [],
        **dict.fromkeys(("truncation", "padding", "post_processor", "decoder")),
    }
    with _library_errors(f"{source} is damaged"):
        return tokenizers.Tokenizer.from_str(json.dumps(plain))


def _stages(stage: Any) -> set[str]:
    """The types of a pre-tokenizer or decoder and, for a sequence, of its members."""
    if not isinstance(stage, dict):
        return set()
    members = stage.get("pretokenizers", stage.get("decoders", []))
    return {str(part.get("type")) for part in [stage, *(members if isinstance(members, list) else [])]
            if isinstance(part, dict)}


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The named special tokens of tokenizer_config.json, each a string or an object with a "content"."""
    tokens = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if not isinstance(value, str | None):
            raise TokenizerError(f"tokenizer_config.json: {name} is {value!r:.80}, not a token")
        if value is not None:
            tokens[name] = value
    return tokens


def _typed(data: dict[str, Any], field: str, kind: type, where: str) -> Any:
    value = data.get(field)
    if value is not None and not isinstance(value, kind):
        raise TokenizerError(f"{where}: {field} is {value!r:.80}, not a {kind.__name__}")
    return kind() if value is None else value


# ---- texts, ids and the library ---------------------------------------------------------------------------------


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Matches any of the tokens, in a group so that `split` keeps them. Longest first: `re` takes the first fit."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def _check_texts(texts: list[str]) -> None:
    if sum(map(len, texts)) > LIMITS.text_chars:
        raise TokenizerError(f"the text has more than the {LIMITS.text_chars} characters allowed; encode it in parts")
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text has a lone surrogate ({text[error.start]!r}) at index {error.start}; "
                "it comes from wrongly decoded input"
            ) from None


def _as_sequence(ids: Any) -> Iterable[Any]:
    listed = ids.tolist() if hasattr(ids, "tolist") else ids  # torch and numpy
    if isinstance(listed, str | bytes) or not isinstance(listed, Iterable):
        raise TokenizerError(f"ids are {type(ids).__name__}, not a sequence or one-dimensional tensor of integers")
    return listed


def _with_thinking(variables: dict[str, Any], enable_thinking: bool | None) -> dict[str, Any]:
    return variables if enable_thinking is None else {**variables, "enable_thinking": enable_thinking}


@contextmanager
def _library_errors(problem: str) -> Iterator[None]:
    """Errors of the `tokenizers` library. It raises bare Exceptions, and a panic of its Rust code arrives as a
    BaseException of a class that cannot be imported."""
    try:
        yield
    except Exception as error:
        raise TokenizerError(f"{problem}: {error}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{problem}: {error}") from None
