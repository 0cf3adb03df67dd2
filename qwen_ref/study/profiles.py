"""How large activations are, layer by layer, and where attention collects. L layers, T tokens, H channels, N heads.

    norm       ||x||_2 of a token's vector: the residual stream, and what attention and feed-forward add to it
    massive    a few channels of a few tokens (often the first) are larger by orders of magnitude than the median of |x|;
               Sun et al. 2024 ("Massive Activations in Large Language Models") call those massive that exceed 100 and
               1000 times the median
    sink       the share of attention that goes to the first token (Xiao et al. 2023, "Efficient Streaming Language
               Models with Attention Sinks"), which carries those activations
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..hooks import run_with_cache
from .heads import first_token, pattern_names
from .inputs import Ids, one_sequence


@dataclass(frozen=True)
class Profile:
    """fp32 on the CPU. Depth 0 of the residual stream is the embedding, depth L the last block's output."""

    resid_norm: Tensor  # (L+1, T)
    attn_norm: Tensor  # (L, T)
    mlp_norm: Tensor  # (L, T)
    resid_max: Tensor  # (L+1, T) max |x| of the token's channels
    resid_channel: Tensor  # (L+1, T) int64: which channel that is
    resid_median: Tensor  # (L+1,) median |x| of all tokens and channels
    # of the layers with softmax attention
    sink: Tensor  # (L, N) mean attention to the first token, from the second on
    received: Tensor  # (L, T) mean attention token s gets from those that see it (s itself and later), over heads

    def massive(self, least: float = 100.0, times: float = 1000.0) -> Tensor:
        """(L+1, T) bool: tokens whose largest activation exceeds `least` and `times` the median."""
        return (self.resid_max > least) & (self.resid_max > times * self.resid_median[:, None])


@torch.no_grad()
def profile(model: Any, ids: Ids) -> Profile:
    """Norms, largest activations and attention sinks on one sequence of at least 2 tokens."""
    row = one_sequence(model, ids, at_least=2)
    names = [f"blocks.*.hook_{what}" for what in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    with backend.use({"attention": "eager"}):  # the fused kernels never hold a pattern
        _, acts = run_with_cache(model, row, [*names, *pattern_names(model)], device="cpu")
    pre, post = acts.stack("resid_pre")[:1, 0].float(), acts.stack("resid_post")[:, 0].float()
    residual = torch.cat((pre, post)).flatten(2)  # (L+1, T, H), or n H where there are n streams
    attn, mlp = acts.stack("attn_out")[:, 0].float(), acts.stack("mlp_out")[:, 0].float()  # (L, T, H)
    pattern = acts.stack("pattern")[:, 0].float()  # (L, N, T, T)
    largest, channel = residual.abs().max(-1)
    return Profile(
        resid_norm=residual.norm(dim=-1),
        attn_norm=attn.norm(dim=-1),
        mlp_norm=mlp.norm(dim=-1),
        resid_max=largest,
        resid_channel=channel,
        resid_median=residual.abs().flatten(1).median(-1).values,
        sink=first_token(pattern),
        received=torch.stack([received(p, window) for p, window in zip(pattern, model.config.windows, strict=True)]).mean(1),
    )


def received(pattern: Tensor, window: int | None = None) -> Tensor:
    """(..., T, T) -> (..., T): attention each key gets, averaged over the queries that see it: those at or after it, the first
    `window` of them where there is one."""
    seen_by = torch.arange(pattern.shape[-1], 0, -1, device=pattern.device).clamp(max=window or pattern.shape[-1])
    return pattern.sum(-2) / seen_by
