"""The logit lens: what the model would answer if it stopped after d blocks.

    logits_d = lm_head(norm(x_d)),   x_0 = the embedding, x_d = the residual stream after d blocks

(nostalgebraist 2020, "interpreting GPT: the logit lens".) The model's own final norm and head are applied, so the
deepest entry is the model's answer itself, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from ..hook_points import final_path
from ..hooks import run_with_cache
from .inputs import Ids, head_of, one_sequence, several, whole


@dataclass(frozen=True)
class Lens:
    """D depths, T positions, k tokens. Log-probabilities and divergences in nats, at least fp32, on the CPU."""

    blocks: int  # L, of the model
    depths: tuple[int, ...]  # blocks passed: 0 the embedding, L the model's answer
    ids: Tensor  # (T,) what was read
    top_ids: Tensor  # (D, T, k) most probable next tokens, best first
    top_logprobs: Tensor  # (D, T, k)
    next_rank: Tensor  # (D, T-1) place of the token that really follows; 0 = first
    next_logprob: Tensor  # (D, T-1)
    kl: Tensor  # (D, T) KL(final || this depth) = sum p_final (log p_final - log p_depth)


@torch.no_grad()
def lens(model: Any, ids: Ids, layers: Sequence[int] | None = None, top: int = 5) -> Lens:
    """Read every depth of the residual stream through the final norm and head.

    Args:
        ids: one sequence, T tokens.
        layers: depths to read, 0 (embedding) to L (the answer), -1 = L; None = all.
        top: tokens kept per position.
    Raises: RequestError: a depth the model does not have, `top` outside the vocabulary, ids that are not one sequence.
    """
    head_of(model)
    row = one_sequence(model, ids)
    depths = _depths(len(model.model.layers), layers)
    top = whole(top, "top")
    if not 1 <= top <= model.config.vocab_size:
        raise RequestError(f"top is {top}; it must be within 1..{model.config.vocab_size}")
    logits, acts = run_with_cache(model, row, ("blocks.0.hook_resid_pre", "blocks.*.hook_resid_post"))
    residuals = list(acts.values())  # x_0, x_1, ..., x_L: (1, T, H) each
    final = _log_softmax(logits)  # (T, V)
    entries = [_read(_log_softmax(at_depth(model, residuals[d])), final, row[0], top) for d in depths]
    columns = (torch.stack(column).cpu() for column in zip(*entries, strict=True))
    return Lens(len(model.model.layers), depths, row[0].cpu(), *columns)


def at_depth(model: Any, residual: Tensor) -> Tensor:
    """The logits a residual stream would give: (B, T, H), or (B, T, n, H) where there are n -> (B, T, V)."""
    return head_of(model)(model.get_submodule(final_path(model))(residual))


def _read(here: Tensor, final: Tensor, ids: Tensor, top: int) -> tuple[Tensor, ...]:
    logprobs, tokens = here.topk(top, dim=-1)  # (T, k)
    following = here[:-1].gather(1, ids[1:, None])  # (T-1, 1)
    rank = (here[:-1] > following).sum(-1)  # (T-1,)
    kl = (final.exp() * (final - here)).sum(-1)  # (T,)
    return tokens, logprobs, rank, following[:, 0], kl


def _log_softmax(logits: Tensor) -> Tensor:
    return logits[0].log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _depths(blocks: int, layers: Sequence[int] | None) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(blocks + 1))
    chosen = several(layers, "layers")
    if not chosen:
        raise RequestError("layers is empty: name the depths to read, or leave it out for all")
    for depth in chosen:
        if not -blocks - 1 <= depth <= blocks:
            raise RequestError(f"there is no depth {depth}: 0 is the embedding, {blocks} (or -1) the last block's output")
    return tuple(depth % (blocks + 1) for depth in chosen)
