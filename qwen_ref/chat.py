"""Chat templates: a conversation -> the text, or the segments, that a checkpoint's Jinja template makes of it.

The text is that of transformers' `apply_chat_template`. Unlike there, a template runs in a child process with bounds on
time, memory and output, and what callers write cannot become a control token.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .errors import TemplateError
from .limits import LIMITS

_WORKER = Path(__file__).with_name("_template_worker.py")
_MEMORY_BYTES = 2 << 30  # of the child's address space: room for LIMITS.text_chars in any script, some copies of it
_DEPTH = 64  # nesting of lists and objects in messages, tools and variables
# Names that a caller's variables may not take: the arguments themselves, options of the same call in transformers, and
# the functions that templates call.
_RESERVED = frozenset((
    "messages", "tools", "add_generation_prompt", "chat_template", "tokenize", "continue_final_message", "conversation",
    "raise_exception", "strftime_now", "namespace", "dict", "range", "lipsum", "cycler", "joiner",
    "loop", "self", "caller", "varargs", "kwargs",
))
# What "chat_format": "chatml" in generation_config.json stands for, Qwen 1's only way to name a template: the official
# make_context. (It encodes role, line break and content one by one, so that a content which begins with a line break has
# two tokens for the two breaks; in the template's text, as in every later generation's, they are one.)
CHATML = """\
{%- if tools %}{{ raise_exception("Qwen 1 was trained without a format for tools: describe them in a message") }}{% endif %}
{%- for message in messages %}
{%- if loop.first and message.role != "system" %}{{ "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" }}{% endif %}
{{- "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>" }}
{%- if not loop.last or add_generation_prompt %}{{ "\n" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""
# Other names for a message's reasoning, in the order in which transformers looks for it.
_REASONING = ("reasoning_content", "thinking", "reasoning")

# Of the environment the child sees what Python may need to start and tell the time: no keys or tokens.
_INHERITED = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")


class Segment(NamedTuple):
    """A part of a rendered conversation: one control token, or text that is to be encoded as nothing but text."""

    text: str
    control: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and what it needs to know of the tokenizer.

    Attributes:
        source: the Jinja source.
        named_tokens: variables such as eos_token that every template gets to see.
        control_tokens: the texts of all added tokens.
    """

    source: str
    named_tokens: Mapping[str, str]
    control_tokens: frozenset[str]

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The text, byte for byte that of transformers, which includes: keys of a message that are None are left out,
        `reasoning` and `thinking` are also given as `reasoning_content`, and `function.arguments` given as a JSON
        string stay a string (Qwen 2.5's template then quotes them twice and Qwen 3.5's refuses them: see
        `decode_arguments`).

        Raises: TemplateError if the template is damaged, refuses the messages or exceeds its bounds, or if messages,
            tools or variables are not what JSON can hold.
        """
        [segment] = self._run(messages, tools, add_generation_prompt, variables, control=None)
        return segment.text

    def segments(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> list[Segment]:
        """The same text, cut at the control tokens that are the template's own.

        Not the caller's words are guarded but the template's: before it runs, each control token in its text and
        string constants is replaced by a secret that callers cannot know, and after it ran the secrets are the
        control tokens. Whatever else looks like one, because a caller wrote it, wrote half of it, or named a JSON
        key so that the template puts the brackets around it, is text. The exception is <think> and </think> in the
        `content` of assistant messages, which are the model's own and which templates parse.

        A template that inspects what other messages say for control tokens (Qwen 3 looks for a user's message that
        is wrapped in <tool_response>) does not find any.
        """
        return self._run(messages, tools, add_generation_prompt, variables, control=sorted(self.control_tokens))

    def _run(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        control: list[str] | None,
    ) -> list[Segment]:
        size = len(self.source.encode("utf-8", "surrogatepass"))
        if size > LIMITS.template_bytes:
            raise TemplateError(f"the chat template has {size} bytes, more than the {LIMITS.template_bytes} allowed")
        _check_arguments(messages, tools, add_generation_prompt, variables)
        request = {
            "template": self.source,
            "variables": {
                "documents": None,
                **self.named_tokens,
                **variables,
                "messages": [_as_transformers_passes(message) for message in messages],
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            },
            "own": [name for name in self.named_tokens if name not in variables],
            "control": control,
            "render_chars": LIMITS.render_chars,
            "render_seconds": LIMITS.render_seconds,
            "memory_bytes": _MEMORY_BYTES,
        }
        return [Segment(text, control) for text, control in _renderer.render(request)]


def decode_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy of messages in which the `arguments` of tool calls that are JSON strings, as OpenAI's API has them, are
    the objects that Qwen's templates expect. Anything that is not the JSON of an object is left as it is."""
    return [
        {**message, "tool_calls": [_decode_call(call) for call in message["tool_calls"]]}
        if isinstance(message, dict) and isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _decode_call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _decode_call(call["function"])}
    if not isinstance(call.get("arguments"), str):
        return call
    try:
        arguments = json.loads(call["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _as_transformers_passes(message: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a message before a template sees it. Key order matters to templates that iterate."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


# ---- checking what callers pass ---------------------------------------------------------------------------------


def _check_arguments(messages: Any, tools: Any, add_generation_prompt: Any, variables: Mapping[str, Any]) -> None:
    if not isinstance(messages, list) or not messages:
        raise TemplateError(f"messages must be a list with at least one message, not {_short(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise TemplateError(f"messages[{i}] must be a dict, not {_short(message)}")
        if not isinstance(message.get("role"), str):
            raise TemplateError(f"messages[{i}].role must be a string, not {_short(message.get('role'))}")
        if not isinstance(message.get("content"), str | list | None):
            raise TemplateError(
                f"messages[{i}].content must be a string, a list of parts or None, not {_short(message['content'])}"
            )
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise TemplateError("tools must be a list of dicts (JSON schemas of functions)")
    if not isinstance(add_generation_prompt, bool):
        raise TemplateError(f"add_generation_prompt must be True or False, not {_short(add_generation_prompt)}")
    for name in variables:
        if name in _RESERVED or not name.isidentifier() or name.startswith("_"):
            raise TemplateError(f"a template variable cannot be named {name!r:.80}")
    if not isinstance(variables.get("enable_thinking", False), bool):
        raise TemplateError(f"enable_thinking must be True or False, not {_short(variables['enable_thinking'])}")
    chars = sum(
        _check_json(value, where, 0)
        for where, value in {"messages": messages, "tools": tools, **variables}.items()
    )
    if chars > LIMITS.text_chars:
        raise TemplateError(f"the conversation has {chars} characters, more than the {LIMITS.text_chars} allowed")


def _check_json(value: Any, where: str, depth: int) -> int:
    """The number of characters in a value, which must be one that JSON can hold."""
    if isinstance(value, str):
        _check_text(value, where)
        return len(value)
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return 0
    if not isinstance(value, dict | list):
        raise TemplateError(f"{where} is {_short(value)}, which JSON cannot hold")
    if depth == _DEPTH:
        raise TemplateError(f"{where} is nested more than {_DEPTH} deep")
    if isinstance(value, list):
        return sum(_check_json(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value))
    chars = 0
    for key, item in value.items():
        if not isinstance(key, str):
            raise TemplateError(f"{where} has the key {_short(key)}, not a string")
        _check_text(key, f"a key of {where}")
        chars += len(key) + _check_json(item, f"{where}.{key:.40}", depth + 1)
    return chars


def _check_text(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TemplateError(f"{where} has a lone surrogate ({text[error.start]!r}) at index {error.start}") from None


def _short(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {value!r:.60}"


# ---- the child process ------------------------------------------------------------------------------------------


class _Renderer:
    """The child process that renders, started when first needed and again after it was killed. One at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, request: dict[str, Any]) -> list[tuple[str, bool]]:
        """Segments, see _template_worker. Raises: TemplateError, within LIMITS.render_seconds."""
        try:
            line = json.dumps(request, ensure_ascii=False).encode("utf-8") + b"\n"
        except ValueError as error:  # an integer of thousands of digits, or a surrogate in the template
            raise TemplateError(f"the template or what is passed to it cannot be written as JSON: {error}") from None
        with self._lock:
            reply = self._exchange(line)
        answer = json.loads(reply.decode("utf-8", "surrogatepass"))
        if "error" in answer:
            raise TemplateError(answer["error"].encode("utf-8", "replace").decode("utf-8"))
        for text, _ in answer["segments"]:
            _check_text(text, "the text that the chat template made")
        return answer["segments"]

    def stop(self) -> None:
        """End the process, if it runs."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _exchange(self, line: bytes) -> bytes:
        process = self._running()
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(LIMITS.render_seconds, expire)
        timer.start()
        try:
            reply = _write_and_read(process, line)
        except BaseException:
            self.stop()  # an interrupted exchange leaves a reply behind, which the next request would take for its own
            raise
        finally:
            timer.cancel()
            timer.join()
        if expired.is_set() or not reply.endswith(b"\n"):
            self.stop()
            raise TemplateError(
                f"the chat template ran for more than {LIMITS.render_seconds:g} s and was stopped"
                if expired.is_set()
                else "the process that renders chat templates died: the template needs too much memory or recursion"
            )
        return reply

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_WORKER), *_folders_of("jinja2", "markupsafe")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _INHERITED if name in os.environ},
            )
        return self._process


def _write_and_read(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    if process.stdin is None or process.stdout is None:
        raise TemplateError("the process that renders chat templates has no pipes")
    try:
        process.stdin.write(line)
        process.stdin.flush()
        return process.stdout.readline(8 * LIMITS.render_chars)  # JSON writes a character in at most 6 bytes
    except OSError:  # the process is gone
        return b""


def _folders_of(*modules: str) -> list[str]:
    folders = []
    for name in modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise TemplateError(f"chat templates need the package {name}; install jinja2>=3.1.6")
        folders.append(str(Path(spec.origin).parents[1]))
    return folders


def _start_afresh() -> None:
    global _renderer
    _renderer = _Renderer()


_renderer = _Renderer()
atexit.register(lambda: _renderer.stop())
if hasattr(os, "register_at_fork"):  # parent and forked child must not share one pipe
    os.register_at_fork(after_in_child=_start_afresh)
