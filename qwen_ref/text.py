"""Token ids to text while they arrive: whole characters, stop strings, reasoning apart from the answer."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


class Reasoning(Enum):
    """Where a prompt leaves the model with respect to its `<think>` block."""

    NONE = "none"  # plain text, or a model without the block: everything is answer
    POSSIBLE = "possible"  # an assistant turn has just begun: the model may open the block itself
    OPEN = "open"  # the prompt ends inside the block
    CLOSED = "closed"  # the prompt ends after a closed block: everything is answer

    @classmethod
    def of_prompt(cls, tokenizer: Tokenizer, prompt: list[int], chat: bool) -> Reasoning:
        """Decided by how the prompt ends, after its last `<|im_start|>`; never by what the model writes."""
        start, opens, closes = (tokenizer.id_of(t) for t in ("<|im_start|>", "<think>", "</think>"))
        if opens is None or closes is None:
            return cls.NONE
        for token in reversed(prompt):
            if token == closes:
                return cls.CLOSED
            if token == opens:
                return cls.OPEN
            if token == start:
                break
        return cls.POSSIBLE if chat else cls.NONE


class TextSplitter:
    """Decodes one sequence token by token into `text` (the answer) and `reasoning`.

    The newlines that frame a `<think>` block belong to the template, not to either text. A text ends before the first
    stop string; what could still become one is held back, so that what `push` returns is final.
    """

    def __init__(self, tokenizer: Tokenizer, state: Reasoning, stop: tuple[str, ...]) -> None:
        self.text = ""
        self.reasoning = ""
        self.reasoning_tokens = 0
        self.stopped = False
        self.in_reasoning = state is Reasoning.OPEN
        self._may_open = state is Reasoning.POSSIBLE
        self._opens, self._closes = tokenizer.id_of("<think>"), tokenizer.id_of("</think>")
        self._decoder = tokenizer.stream_decoder(skip_special=True)
        self._stop = stop
        self._held = ""  # decoded, but perhaps the beginning of a stop string or the newlines that end the reasoning
        self._trim = state is not Reasoning.NONE  # at the start of a part: drop the newlines that frame it

    def push(self, token: int) -> tuple[str, str]:
        """Take one token; return the answer text and the reasoning that became final."""
        if self._may_open and token == self._opens:
            self._may_open, self.in_reasoning, self._held = False, True, ""
            self.reasoning_tokens += 1
            return "", ""
        if self.in_reasoning:
            self.reasoning_tokens += 1
            if token == self._closes:
                return "", self._close()
        piece = self._decoder.push(token)
        if self._may_open and piece.strip():
            self._may_open = False  # the answer has begun without a block
        return self._emit(self._held + piece, final=False)

    def finish(self) -> tuple[str, str]:
        """The end of the sequence: return what was held back."""
        return self._emit(self._held + self._decoder.flush(), final=True)

    def _close(self) -> str:
        _, rest = self._emit(self._held + self._decoder.flush(), final=True)
        self.in_reasoning, self._trim = False, True
        return rest

    def _emit(self, pending: str, *, final: bool) -> tuple[str, str]:
        if self._trim:
            pending = pending.lstrip("\n")
            self._trim = not pending
        cut = [i for i in (pending.find(s) for s in self._stop) if i >= 0]
        if cut:
            self.stopped, final = True, True
            pending = pending[: min(cut)]
        if self.in_reasoning and final:
            pending = pending.rstrip("\n")
        safe = len(pending) if final else len(pending) - self._undecided(pending)
        ready, self._held = pending[:safe], pending[safe:]
        if self.in_reasoning:
            self.reasoning += ready
            return "", ready
        self.text += ready
        return ready, ""

    def _undecided(self, pending: str) -> int:
        """How many characters at the end may still turn out not to be shown."""
        held = 0
        for stop in self._stop:
            possible = range(min(len(stop) - 1, len(pending)), held, -1)
            held = max(held, next((n for n in possible if pending.endswith(stop[:n])), 0))
        if self.in_reasoning:
            held = len(pending) - len(pending[: len(pending) - held].rstrip("\n"))
        return held
