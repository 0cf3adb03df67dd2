"""Prompts in, text out: batches, streaming, stopping, and the split of reasoning from answer.

    results = generate(model, tokenizer, ["Once upon a time"], max_tokens=64)
    for piece in stream(model, tokenizer, [{"role": "user", "content": "Hello"}]): print(piece.text, end="")

A string is continued as it stands; a list of messages goes through the chat template; a list of ids is taken as it is.
"""

from __future__ import annotations

import operator
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .cache import Cache
from .chat import decode_arguments
from .config import Fields
from .errors import ConfigError, NumericsError, RequestError
from .models.common import LanguageModel
from .sampling import Sampling, choose, penalize
from .speculative import Speculator
from .text import Reasoning, TextSplitter
from .tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
_TEMPLATE_ARGUMENTS = ("self", "messages", "tools", "allow_special")


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a token under the raw logits (before penalties and temperature), natural logarithm."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # the n most likely (id, log probability), best first


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, found in the session's cache
    reasoning_tokens: int
    drafted_tokens: int = 0  # guesses of the draft layer that the model has read, see `speculative`
    accepted_tokens: int = 0  # those that were right and spared the model a pass


@dataclass(frozen=True)
class Result:
    text: str  # the answer, without its reasoning
    reasoning: str
    token_ids: list[int]  # everything generated, the end token included
    finish_reason: str  # "stop": end token or stop string; "length": max_tokens or the context is full
    logprobs: list[TokenLogprob] | None
    usage: Usage
    prefill_seconds: float  # of the whole batch
    decode_seconds: float


@dataclass(frozen=True)
class Piece:
    """What one step of a stream adds. Joined, the texts and reasonings are those of the `Result`."""

    text: str
    reasoning: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    result: Result | None = None  # with the last piece


class Session:
    """The cache of one conversation: a following prompt is read only from where it departs from what is held.

    A model with recurrent layers can go back to the lengths it has marked only: the last few places where `generate`
    began or stopped reading a prompt, the latest being at most 64 tokens before its end. Turns may speculate or not, in any
    mixture: what is kept, and what is read again, is the same. One turn at a time: a stream that is not at its end when the
    next turn begins raises RequestError if it is asked for more.

    It is of this model, and of what `fuse` makes of it. What was read while hooks edited activations stays as it was read:
    begin a new session after them.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.cache = model.make_cache()
        self.head = model.lm_head  # which a fused model shares with the one it was made of, and no other
        self.ids: list[int] = []  # the tokens in the cache

    def check(self, model: LanguageModel) -> None:
        """RequestError for a model that the cache is not of: its keys would be taken for this one's."""
        if model.lm_head is not self.head:
            raise RequestError("this session holds the cache of another model: make one for this model, Session(model)")

    def reuse(self, prompt: list[int]) -> int:
        """Cut back to a prefix of `prompt`, the longest one possible, leaving at least one token to read. Tokens kept."""
        common = 0
        for held, wanted in zip(self.ids, prompt[:-1], strict=False):
            if held != wanted:
                break
            common += 1
        self.cache.expect([len(prompt)])  # which decides whether its keys can serve this prompt too
        self.ids = self.ids[:common]
        self.settle()
        return len(self.ids)

    def settle(self) -> None:
        """Cut the cache back to `ids`, or to the most of them that it can keep: no guess stays, nor a way back from one."""
        kept = self.cache.reachable(len(self.ids))
        self.cache.truncate(kept)
        self.cache.remember(0)
        del self.ids[kept:]


@dataclass(frozen=True)
class Options:
    """One request's settings, complete."""

    sampling: Sampling
    max_tokens: int
    seed: int | None
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    logprobs: int | None
    thinking_budget: int | None


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    *,
    session: Session | None = None,
    tools: list[dict[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    allow_special: bool = False,
    variables: Mapping[str, Any] | None = None,
    chat: bool | None = None,
    prefill_chunk: int = 512,
    speculate: int = 0,
    **options: Any,
) -> list[Result]:
    """Generate for one prompt or a batch; a list of results in the order of the prompts.

    Args:
        prompts: text to continue, a list of messages, a list of ids, or a list of any of these.
        session: keeps the cache between calls (one prompt only), see `Session`.
        tools, enable_thinking, variables: for the chat template. allow_special: let text name control tokens.
        chat: whether an answer may open with reasoning; by default, whether the prompt is messages.
        prefill_chunk: tokens of the prompt per forward pass; bounds memory, changes no result beyond rounding.
        speculate: how many tokens the draft layer guesses at a time (one prompt only); 0 = it is not used. Changes no
            result beyond rounding, see `speculative`.
        options: max_tokens (default 512); temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
            frequency_penalty, logit_bias (see `Sampling`; default generation_config.json, else greedy); seed (an int, or
            one per prompt); stop (a string or several); stop_ids (added to the model's end tokens); ignore_eos;
            logprobs (0..n: report the chosen token's, and the n most likely); thinking_budget (tokens, then `</think>`).
    Raises: RequestError for arguments out of range, NumericsError for NaN or infinite logits.
    """
    sequences, pieces = _begin(
        model, tokenizer, _as_batch(prompts), session=session, chat=chat, prefill_chunk=prefill_chunk, speculate=speculate,
        tools=tools, enable_thinking=enable_thinking, allow_special=allow_special, variables=variables, **options,
    )  # fmt: skip
    for _ in pieces:
        pass
    return [s.result for s in sequences]  # type: ignore[misc]


def stream(model: LanguageModel, tokenizer: Tokenizer, prompt: Prompt, **arguments: Any) -> Iterator[Piece]:
    """`generate` for one prompt, with its arguments, piece by piece: never half a character, never a part of a stop string."""
    _, pieces = _begin(model, tokenizer, [prompt], **arguments)
    return (piece for _, piece in pieces)


def _begin(
    model: LanguageModel,
    tokenizer: Tokenizer,
    batch: list[Prompt],
    *,
    session: Session | None = None,
    chat: bool | None = None,
    prefill_chunk: int = 512,
    speculate: int = 0,
    seed: Any = None,
    tools: list[dict[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    allow_special: bool = False,
    variables: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[list[_Sequence], Iterator[tuple[int, Piece]]]:
    """Everything checked: the requests, and the loop over them, which has not begun."""
    _check_parties(model, tokenizer, session, len(batch))
    template = {"tools": tools, "enable_thinking": enable_thinking, "variables": variables}
    if not any(map(_is_messages, batch)) and (unused := [name for name, value in template.items() if value is not None]):
        raise RequestError(f"{unused[0]} is for the chat template, which text and ids do not go through: give messages, as in "
                           '[{"role": "user", "content": "..."}]')
    reader = _reader(model, model.make_cache() if session is None else session.cache, len(batch), speculate)
    chunk, sequences = _integer("prefill_chunk", prefill_chunk, 1, 1 << 40), []
    for prompt, own_seed in zip(batch, _seeds(seed, len(batch)), strict=True):
        ids = encode_prompt(tokenizer, prompt, tools, enable_thinking, allow_special, variables)
        settings = resolve_options(model, tokenizer, seed=own_seed, **options)
        is_chat = _is_messages(prompt) if chat is None else chat
        sequences.append(_Sequence(model, tokenizer, ids, settings, chat=is_chat))
    return sequences, _run(model, reader, sequences, session, chunk)


def _check_parties(model: Any, tokenizer: Any, session: Any, count: int) -> None:
    if not isinstance(model, LanguageModel) or not hasattr(tokenizer, "encode_chat"):
        raise RequestError(f"a model and its tokenizer are needed, as load(name) returns them, not {type(model).__name__} and "
                           f"{type(tokenizer).__name__}")
    if session is None:
        return
    if not isinstance(session, Session):
        raise RequestError(f"the session is {session!r:.80}; Session(model) begins one")
    session.check(model)
    if count != 1:
        raise RequestError(f"a session holds one conversation, but there are {count} prompts")


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: Prompt,
    tools: list[dict[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    allow_special: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids a prompt stands for; `variables` go to the chat template. RequestError if it is empty."""
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, allow_special=allow_special)
    elif _is_messages(prompt):
        messages: list[Any] = list(prompt)
        if not allow_special:  # which asks for transformers' behaviour to the letter
            messages = decode_arguments(messages)
        if enable_thinking is not None:
            variables = {"enable_thinking": enable_thinking, **(variables or {})}
        ids = tokenizer.encode_chat(messages, tools, allow_special=allow_special, **_checked_variables(variables or {}))
    else:
        ids = _as_ids(prompt)
    if not ids:
        raise RequestError("the prompt is empty: a model continues at least one token")
    return ids


def _checked_variables(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    if taken := [name for name in variables if not isinstance(name, str) or name in _TEMPLATE_ARGUMENTS]:
        raise RequestError(f"a variable of the chat template cannot be named {taken[0]!r}: that is an argument of its own")
    return variables


def end_tokens(model: LanguageModel, tokenizer: Tokenizer) -> dict[str, list[int]]:
    """The end-of-sequence ids each of the three places names; generation stops at any of them.

    In Qwen 1's generation_config.json `chat_format` names two more: "chatml" ends at either mark of a turn.
    """
    places = {
        "generation_config.json": model.generation_config.get("eos_token_id"),
        "config.json": model.raw_config.get("eos_token_id"),
        "tokenizer_config.json": tokenizer.eos_token_id,
    }
    found = {}
    for place, value in places.items():
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(i) is not int or i < 0 for i in ids):
            raise ConfigError(f"{place}: eos_token_id is {value!r}, not a token id or a list of them")
        found[place] = ids
    if model.generation_config.get("chat_format") == "chatml":
        marks = (tokenizer.id_of(token) for token in ("<|im_end|>", "<|im_start|>"))
        found["generation_config.json"] = found["generation_config.json"] + [id for id in marks if id is not None]
    return found


def resolve_options(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    max_tokens: int = 512,
    seed: int | None = None,
    stop: str | Iterable[str] | None = None,
    stop_ids: Iterable[int] | None = None,
    ignore_eos: bool = False,
    logprobs: int | None = None,
    thinking_budget: int | None = None,
    **sampling: Any,
) -> Options:
    """Fill what the caller left out from generation_config.json. RequestError on unknown names and bad values."""
    if unknown := sampling.keys() - Sampling.__dataclass_fields__.keys():
        raise _unknown_option(min(unknown))
    stops = [stop] if isinstance(stop, str) else _listed("stop", stop)
    if any(not isinstance(s, str) or not s for s in stops):
        raise RequestError(f"stop is {stop!r}; it must be a non-empty string or a list of them")
    vocab = model.config.vocab_size
    ends = {_integer("an id of stop_ids", i, 0, vocab - 1) for i in _listed("stop_ids", stop_ids)}
    given = {name: value for name, value in sampling.items() if value is not None}
    chosen = Sampling(**{**sampling_defaults(model.generation_config), **given})
    if any(not 0 <= token < vocab for token in chosen.logit_bias):
        raise RequestError(f"logit_bias names a token id outside 0..{vocab - 1}")
    return Options(
        chosen,
        _integer("max_tokens", max_tokens, 1, 1 << 40),
        None if seed is None else _integer("seed", seed, -(1 << 63), (1 << 64) - 1),
        tuple(stops),
        frozenset(ends if ignore_eos else ends.union(*end_tokens(model, tokenizer).values())),
        None if logprobs is None else _integer("logprobs", logprobs, 0, 1000),
        None if thinking_budget is None else _integer("thinking_budget", thinking_budget, 0, 1 << 40),
    )


def _unknown_option(name: str) -> RequestError:
    own = [*(field for field in Options.__dataclass_fields__ if field != "sampling"), "ignore_eos"]
    meant = get_close_matches(name, [*own, *Sampling.__dataclass_fields__], n=1)
    advice = f", did you mean {meant[0]}" if meant else ""
    return RequestError(f"unknown option {name}{advice}; there are {', '.join(own)}, and for sampling "
                        f"{', '.join(Sampling.__dataclass_fields__)}")


def _integer(name: str, value: Any, low: int, high: int) -> int:
    """An integer of any kind, NumPy's too, as Python's. RequestError if it is none, or out of range."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise RequestError(f"{name} is {value!r}; it must be an integer from {low} to {high}")
    return number


def _listed(name: str, values: Any) -> list[Any]:
    """Several values; None for none of them."""
    if values is None:
        return []
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise RequestError(f"{name} is {values!r}; it must be a list")
    return list(values)


def sampling_defaults(generation_config: dict[str, Any]) -> dict[str, Any]:
    """The sampling fields of a generation_config.json. Without `do_sample` it means greedy, as in transformers."""
    f = Fields(generation_config, "generation_config.json")
    sample = f.flag("do_sample", False)
    defaults: dict[str, Any] = {"repetition_penalty": f.positive("repetition_penalty", 1.0)}
    if sample:
        if f.data.get("temperature") != 0:
            defaults["temperature"] = f.positive("temperature", 1.0)
        defaults["top_k"] = f.integer("top_k", 50, low=0)  # transformers' default when the file is silent
        defaults["top_p"] = f.positive("top_p", 1.0)
        if f.data.get("min_p"):
            defaults["min_p"] = f.positive("min_p")
    return defaults


class _Sequence:
    """One request on its way: the tokens so far, how to pick the next, and what text is safe to show."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, prompt: list[int], options: Options, *, chat: bool
    ) -> None:
        context, vocab = model.config.max_position_embeddings, model.config.vocab_size
        if len(prompt) >= context:
            raise RequestError(f"the prompt has {len(prompt)} tokens; this model's context holds {context}")
        if (worst := max(prompt)) >= vocab or min(prompt) < 0:
            raise RequestError(f"the prompt holds token id {worst if worst >= vocab else min(prompt)}, outside 0..{vocab - 1}")
        self.prompt, self.options = prompt, options
        self.room = min(options.max_tokens, context - len(prompt))
        self.generated: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.cached = 0
        self.result: Result | None = None
        self._tokenizer = tokenizer
        self._prompt_set = {i for i in prompt if i < tokenizer.vocab_size}
        self._counts: Counter[int] = Counter()
        self._forced: deque[int] = deque()
        self._splitter = TextSplitter(tokenizer, Reasoning.of_prompt(tokenizer, prompt, chat), options.stop)
        self._generator = torch.Generator(device=model.device)
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed & ((1 << 64) - 1))

    def pick(self, logits: Tensor) -> int:
        """Choose the next token from (V,) logits and take note of it."""
        logits = logits.float()[: self._tokenizer.vocab_size]  # the rows beyond pad the matrix and stand for no token
        if self._forced:
            token = self._forced.popleft()
        else:
            sampling = self.options.sampling
            token = choose(penalize(logits, sampling, self._prompt_set, self._counts), sampling, self._generator)
        if self.options.logprobs is not None:
            self.logprobs.append(token_logprob(logits, token, self.options.logprobs))
        self.generated.append(token)
        self._counts[token] += 1
        return token

    def advance(self, token: int) -> tuple[str, str, str | None]:
        """Text and reasoning that became final with this token, and the reason to finish, if any."""
        if token in self.options.stop_ids:
            return *self._splitter.finish(), "stop"
        text, reasoning = self._splitter.push(token)
        if self._splitter.stopped:
            return text, reasoning, "stop"
        if len(self.generated) >= self.room:
            rest = self._splitter.finish()
            return text + rest[0], reasoning + rest[1], "length"
        budget = self.options.thinking_budget
        spent = budget is not None and self._splitter.in_reasoning and self._splitter.reasoning_tokens >= budget
        if spent and not self._forced:
            self._forced.extend(self._tokenizer.encode("\n</think>\n\n", allow_special=True))
        return text, reasoning, None

    def finish(self, reason: str, prefill: float, decode: float, reader: Reader | Speculator) -> Result:
        splitter = self._splitter
        usage = Usage(len(self.prompt), len(self.generated), self.cached, splitter.reasoning_tokens, reader.drafted,
                      reader.accepted)  # fmt: skip
        logprobs = None if self.options.logprobs is None else self.logprobs
        self.result = Result(
            splitter.text, splitter.reasoning, self.generated, reason, logprobs, usage, prefill, decode
        )
        return self.result


class Reader:
    """A model and its cache: `read` a part of the prompts, then `step` with every token chosen."""

    drafted = accepted = 0

    def __init__(self, model: LanguageModel, cache: Cache) -> None:
        if model.lm_head is None:
            raise RequestError("this checkpoint has no language head (an embedding model): use qwen_ref.embed")
        self.model, self.cache = model, cache

    @torch.inference_mode()
    def read(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """One forward pass (B, T); the output head reads the last position only: (B, V)."""
        return self.model.lm_head(self.model.model(ids, positions, self.cache)[:, -1])

    step = read


def _reader(model: LanguageModel, cache: Cache, count: int, speculate: int) -> Reader | Speculator:
    if not speculate:
        return Reader(model, cache)
    if count != 1:
        raise RequestError(f"speculate is for one prompt, but there are {count}: generate for each alone, or without it")
    return Speculator(model, speculate, cache)


def _run(
    model: LanguageModel, reader: Reader | Speculator, sequences: list[_Sequence], session: Session | None, chunk: int
) -> Iterator[tuple[int, Piece]]:
    """`_loop`, with a session that is left in order however it ends."""
    if session is None:
        yield from _loop(model, reader, sequences, chunk)
        return
    sequences[0].cached = session.reuse(sequences[0].prompt)
    ids = session.ids  # another list once another turn has begun
    try:
        for i, piece in _loop(model, reader, sequences, chunk, ids):
            yield i, piece
            if session.ids is not ids and piece.result is None:
                raise RequestError("another turn of this session has begun: this stream cannot go on")
    finally:
        if session.ids is ids:
            session.settle()


def _loop(
    model: LanguageModel, reader: Reader | Speculator, sequences: list[_Sequence], chunk: int, held: list[int] | None = None
) -> Iterator[tuple[int, Piece]]:
    """Read the prompts, then one token for every unfinished sequence. `held`: the tokens known to be in a session's cache."""
    started = time.perf_counter()
    logits = _prefill(reader, sequences, chunk, mark=held is not None)  # (B, V)
    prefilled = time.perf_counter()
    if held is not None:
        held[:] = sequences[0].prompt
    active = list(range(len(sequences)))  # row of the cache -> sequence
    while True:
        _check_finite(model, logits, [sequences[i] for i in active])
        going, tokens = [], []
        for row, i in enumerate(active):
            sequence = sequences[i]
            token = sequence.pick(logits[row])
            text, reasoning, reason = sequence.advance(token)
            result = None
            if reason is None:
                going.append(row)
                tokens.append(token)
            else:
                result = sequence.finish(reason, prefilled - started, time.perf_counter() - prefilled, reader)
            logprobs = sequence.logprobs[-1:] if sequence.options.logprobs is not None else None
            yield i, Piece(text, reasoning, [token], logprobs, result)
        if not going:
            return
        if len(going) < len(active):
            reader.cache.select(torch.tensor(going, device=model.device))
            active = [active[row] for row in going]
        logits = reader.step(torch.tensor(tokens, device=model.device)[:, None])
        if held is not None:
            held.append(tokens[0])


def _prefill(reader: Reader | Speculator, sequences: list[_Sequence], chunk: int, *, mark: bool) -> Tensor:
    """Read all prompts, left-padded to one length, `chunk` tokens at a time. Logits of the last position, (B, V).

    `mark`: so that a later prompt can depart from the end of this one, or from shortly before it, where templates do.
    """
    rows = [s.prompt[s.cached :] for s in sequences]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=reader.model.device)  # (B, T)
    positions = None
    if any(len(row) < longest for row in rows):  # padding stands at position -1, which nothing attends to
        spans = [[-1] * (longest - len(row)) + list(range(len(row))) for row in rows]
        positions = torch.tensor(spans, device=reader.model.device)
    reader.cache.expect([len(s.prompt) for s in sequences])
    edges = {*range(0, longest, chunk), longest}
    if mark:
        edges.add((longest - 1) // 64 * 64)
    for start, end in pairwise(sorted(edges)):
        logits = reader.read(ids[:, start:end], None if positions is None else positions[:, start:end])
        if mark:
            reader.cache.mark()
    return logits


def _check_finite(model: LanguageModel, logits: Tensor, sequences: list[_Sequence]) -> None:
    if bool(torch.isfinite(logits).all()):
        return
    row = int((~torch.isfinite(logits)).any(-1).nonzero()[0])
    sequence = sequences[row]
    where = first_non_finite(model, sequence.prompt + sequence.generated)
    raise NumericsError(
        f"the logits hold NaN or infinity; the first bad output is that of {where} "
        f"(dtype {model.dtype}; float16 overflows where bfloat16 does not, damaged weights show up here too)"
    )


@torch.inference_mode()
def first_non_finite(model: LanguageModel, ids: list[int]) -> str:
    """Name of the first module whose output is not finite when `ids` are read in one pass."""
    bad: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: Any, args: Any, output: Any) -> None:
            if not bad and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                bad.append(name)

        return look

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    try:
        model(torch.tensor([ids], device=model.device))
    except RequestError:  # a fused model, not all of whose modules are called
        return "a module that the model it was fused of would name here"
    finally:
        for handle in handles:
            handle.remove()
    return bad[0] if bad else "no module when read in one pass, so the cached pass differs"


def token_logprob(logits: Tensor, token: int, n: int) -> TokenLogprob:
    """Log probability of `token`, and of the n most likely tokens, under logits (V,)."""
    table = logits.log_softmax(-1)
    best = table.topk(n) if n else None
    top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best is not None else []
    return TokenLogprob(token, float(table[token]), top)


def _is_messages(prompt: Any) -> bool:
    return _is_sequence(prompt) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _as_list(value: Any) -> Any:
    """A tensor or an array as the lists it stands for; all else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _as_batch(prompts: Any) -> list[Any]:
    prompts = _as_list(prompts)
    if not _is_sequence(prompts) or _is_messages(prompts):
        return [prompts]
    if len(prompts) == 0:
        raise RequestError("there are no prompts")
    return [prompts] if isinstance(prompts[0], Integral) else list(prompts)


def _as_ids(prompt: Any) -> list[int]:
    if isinstance(prompt, Mapping):
        raise RequestError("a single message is no prompt: give a list of messages, [message]")
    prompt = _as_list(prompt)
    if not _is_sequence(prompt):
        raise RequestError(f"a prompt is text, a list of messages or a list of token ids, not {prompt!r:.80}")
    return [_integer("a token id of the prompt", i, 0, (1 << 31) - 1) for i in prompt]


def _seeds(seed: Any, count: int) -> list[Any]:
    """One for every prompt, of which `resolve_options` asks that it be an integer."""
    seed = _as_list(seed)
    if not _is_sequence(seed):
        return [seed] * count
    if len(seed) != count:
        raise RequestError(f"there are {len(seed)} seeds for {count} prompts")
    return list(seed)
