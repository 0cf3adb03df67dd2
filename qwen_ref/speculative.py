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

from .errors import RequestError
from .models.common import LanguageModel

MAX_DRAFT_TOKENS = 64


class Speculator:
    """One sequence being read and continued; `read` the prompt, in any pieces, then `step` with every token chosen.

    `drafted`, `accepted`: guesses that the model has read, and those of them that spared it a pass.
    """

    def __init__(self, model: LanguageModel, draft_tokens: int) -> None:
        """RequestError for a model without draft layer, and for a number of `draft_tokens` (k) that is not 1 to 64."""
        if type(draft_tokens) is not int or not 1 <= draft_tokens <= MAX_DRAFT_TOKENS:
            raise RequestError(f"the draft layer is to guess {draft_tokens!r} tokens; it must be 1 to {MAX_DRAFT_TOKENS}")
        if model.mtp is None or model.lm_head is None:
            raise RequestError("this model cannot speculate: its checkpoint has no draft layer (tensors named mtp.*)")
        self.model, self.draft_tokens = model, draft_tokens
        # Of the k + 1 tokens of a round the first stays: k can be taken back, and with rewind k + 1 each is a step of its own.
        self.cache = model.make_cache(rewind=draft_tokens + 1)
        self.drafted = self.accepted = 0
        # Entry t is made of the model's state at token t and of token t + 1: one entry less than the model's cache.
        self._draft_cache = model.make_draft_cache()
        # The last n tokens read, of which the draft layer has no entry yet:
        self._ids = torch.empty(1, 0, dtype=torch.long, device=model.device)  # (1, n)
        self._states = torch.empty(1, 0, model.config.hidden_size, dtype=model.dtype, device=model.device)  # (1, n, H)
        self._logits: Tensor  # (1, n, V)
        self._guesses: list[int] = []  # the end of `_ids`: what was guessed and is not yet known to be right or wrong

    @torch.inference_mode()
    def read(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """A part (1, T) of the prompt, not padded. Logits of the token after it, (1, V)."""
        states = self.model.model(ids, positions, self.cache)  # (1, T, H)
        followers = torch.cat((self._ids, ids), dim=1)[:, 1:]
        if followers.shape[1]:
            self.model.draft(torch.cat((self._states, states), dim=1)[:, :-1], followers, cache=self._draft_cache)
        self._ids, self._states = ids[:, -1:], states[:, -1:]
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
        self.cache.truncate(self.cache.length - len(self._guesses))
        known = self._ids.shape[1] - len(self._guesses)
        followers = torch.cat((self._ids[:, 1:known], token), dim=1)  # (1, known)
        state = self.model.draft(self._states[:, :known], followers, cache=self._draft_cache)[:, -1:]  # (1, 1, H)
        exact, guesses = self._draft_cache.length, [self.model.lm_head(state).argmax(-1)]  # (1, 1)
        while len(guesses) < self.draft_tokens:
            state = self.model.draft(state, guesses[-1], cache=self._draft_cache)
            guesses.append(self.model.lm_head(state).argmax(-1))
        self._draft_cache.truncate(exact)  # the others were made of the draft layer's states, not of the model's
        self._ids = torch.cat((token, *guesses), dim=1)  # (1, k + 1)
        self._states = self.model.model(self._ids, None, self.cache)
        self._logits = self.model.lm_head(self._states)
        self._guesses = self._ids[0, 1:].tolist()
        self.drafted += len(guesses)
