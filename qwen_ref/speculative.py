"""Several tokens from one pass of the model, guessed by its draft layer (MTP), and the same answer.

A round begins with a token that was chosen. The draft layer guesses the k tokens after it, each from its own state for the
one before (Leviathan et al. 2023, arXiv 2211.17192, with the draft of DeepSeek-V3, arXiv 2412.19437, section 2.2). The model
reads all k + 1 in one pass, which gives the logits after each. As long as the tokens then chosen are the guesses, those
logits are what a pass of one token would have given, and no pass is made; at the first that is not, the caches are cut back.

Whatever chooses the tokens (greedy, sampled, penalised, forced) chooses from the same logits in the same order, so the result
is plain decoding's. Except for rounding: a pass of k + 1 tokens adds in another order than one of a single token, so where
the two best logits are closer than the dtype resolves, another one may win, as it may between two batch sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import Cache
from .errors import RequestError
from .models.common import LanguageModel

MAX_DRAFT_TOKENS = 64


class Draft:
    """What the draft layer has read of one sequence; `Cache.draft` of the cache that holds the sequence, and cut with it.

    Entry t is made of the model's state at token t and of token t + 1. The states are not kept: where the model has read tokens
    while nobody drafted, or goes on from the middle of what it held, the entries that would need one are left out, each other
    one standing at its own position. Guesses may be worse for it; answers cannot, nor is a token read again.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.cache = model, model.make_draft_cache()
        self.length = 0  # tokens read, the last n of which have no entry yet:
        self.ids = torch.empty(1, 0, dtype=torch.long, device=model.device)  # (1, n)
        self.states = torch.empty(1, 0, model.config.hidden_size, dtype=model.dtype, device=model.device)  # (1, n, H)

    def hold(self, ids: Tensor, states: Tensor, start: int) -> None:
        """Tokens (1, T) that the model has read at positions `start` on, and its states (1, T, H) there."""
        if start != self.length:
            self._drop(0)
        self.ids, self.states = torch.cat((self.ids, ids), dim=1), torch.cat((self.states, states), dim=1)
        self.length = start + ids.shape[1]

    def enter(self, followers: Tensor) -> Tensor:
        """Make entries of the first T states held and of the tokens (1, T) after them. The draft layer's states, (1, T, H)."""
        count, first = followers.shape[1], self.length - self.ids.shape[1]
        whole = self.cache.contiguous and self.cache.length == first
        positions = None if whole else torch.arange(first, first + count, device=followers.device)[None]
        entered = self.model.draft(self.states[:, :count], followers, positions, cache=self.cache)
        self.ids, self.states = self.ids[:, count:], self.states[:, count:]
        return entered

    def guess(self, token: Tensor, count: int) -> Tensor:
        """The token (1, 1) that follows those read, and the `count` after it as guessed: (1, 1 + count)."""
        state = self.enter(torch.cat((self.ids[:, 1:], token), dim=1))[:, -1:]  # (1, 1, H)
        exact, guesses = self.cache.length, [self.model.lm_head(state).argmax(-1)]  # (1, 1)
        while len(guesses) < count:
            state = self.model.draft(state, guesses[-1], cache=self.cache)
            guesses.append(self.model.lm_head(state).argmax(-1))
        self.cache.truncate(exact)  # the others were made of the draft layer's states, not of the model's
        return torch.cat((token, *guesses), dim=1)

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens, and the entries that were made with one of those."""
        self._drop(max(self.ids.shape[1] - max(self.length - length, 0), 0))
        self.length = min(self.length, length)
        known = self.length - max(self.ids.shape[1], 1)
        positions = self.cache.key_positions(0, self.ids.device)
        self.cache.truncate(int((positions < known).sum()))

    def _drop(self, kept: int) -> None:
        self.ids, self.states = self.ids[:, :kept], self.states[:, :kept]


class Speculator:
    """One sequence being read and continued; `read` the prompt, in any pieces, then `step` with every token chosen.

    `drafted`, `accepted`: guesses that the model has read, and those of them that spared it a pass. The end of the cache may be
    guesses not known to be right: whoever stops cuts it back to the tokens passed to `read` and `step`.
    """

    def __init__(self, model: LanguageModel, draft_tokens: int, cache: Cache | None = None) -> None:
        """`cache`: of the tokens before the prompt. RequestError for a model without draft layer, and for a number of
        `draft_tokens` (k) that is not 1 to 64."""
        if type(draft_tokens) is not int or not 1 <= draft_tokens <= MAX_DRAFT_TOKENS:
            raise RequestError(f"the draft layer is to guess {draft_tokens!r} tokens; it must be 1 to {MAX_DRAFT_TOKENS}, "
                               "or 0 to do without it")
        if model.mtp is None or model.lm_head is None:
            raise RequestError("this model cannot speculate: its checkpoint has no draft layer (tensors named mtp.*)")
        self.model, self.draft_tokens = model, draft_tokens
        self.cache = model.make_cache() if cache is None else cache
        self._draft: Draft = self.cache.draft or Draft(model)
        self.cache.draft = self._draft
        self.drafted = self.accepted = 0
        self._logits: Tensor  # (1, k + 1, V) after each token of the last round
        self._guesses: list[int] = []  # the end of what the cache holds: not yet known to be right or wrong

    @torch.inference_mode()
    def read(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """A part (1, T) of the prompt, not padded. Logits of the token after it, (1, V)."""
        start = self.cache.length
        states = self.model.model(ids, positions, self.cache)  # (1, T, H)
        self._draft.hold(ids, states, start)
        if self._draft.ids.shape[1] > 1:
            self._draft.enter(self._draft.ids[:, 1:])
        return self.model.lm_head(states[:, -1])

    @torch.inference_mode()
    def step(self, token: Tensor) -> Tensor:
        """The chosen token (1, 1) in, the logits (1, V) of the one after it out."""
        if not (self._guesses and self._guesses[0] == int(token)):
            self._round(token)
        else:
            self.accepted += 1
            del self._guesses[0]
        return self._logits[:, -1 - len(self._guesses)]

    def _round(self, token: Tensor) -> None:
        """Guess what follows the token, and let the model read it with the guesses."""
        known = self.cache.length - len(self._guesses)
        self.cache.truncate(known)
        ids = self._draft.guess(token, self.draft_tokens)  # (1, k + 1)
        self.cache.remember(self.draft_tokens + 1)  # of which k can be taken back; with k + 1 each is a step of its own
        states = self.model.model(ids, None, self.cache)
        self._draft.hold(ids, states, known)
        self._logits = self.model.lm_head(states)
        self._guesses = ids[0, 1:].tolist()
        self.drafted += self.draft_tokens
