"""Direct logit attribution: how much each part of the model wrote into one logit.

The residual stream is a sum, x = embed + sum_i (attn_i + mlp_i), and attention is a sum over heads. With the root mean
square s of the final norm held at its value, a logit is linear in x:

    logit(y) = sum over parts c of  c . d,      d = (norm weight * lm_head[y]) / s

(Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".) A head n writes z_n W_n^T, so its share is
z_n . (W_n^T d). Only direct writing counts: what a part causes later parts to write is theirs; see `patching`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import RequestError
from ..hook_points import points
from ..hooks import run_with_cache
from ..layers import ZeroCentredRMSNorm
from .inputs import Ids, head_of, one_position, one_sequence, one_token


@dataclass(frozen=True)
class Attribution:
    """Shares of one logit (or difference of two), at least fp32, on the CPU. L layers, N heads. They sum to `logit`.

    A hybrid's layers have different numbers of heads: N is the largest, and the rows of the others end in zeros.
    """

    embed: Tensor  # ()
    heads: Tensor  # (L, N)
    bias: Tensor  # (L,) the output projection's bias, 0 where the model has none
    mlp: Tensor  # (L,) feed-forward or mixture of experts
    logit: Tensor  # () as the model computed it

    @property
    def attn(self) -> Tensor:
        """(L,) each layer's attention, heads and bias together."""
        return self.heads.sum(1) + self.bias

    @property
    def total(self) -> Tensor:
        """() the sum of all shares: the logit, but for rounding."""
        return self.embed + self.attn.sum() + self.mlp.sum()

    def ranked(self, count: int = 10) -> list[tuple[str, float]]:
        """The largest shares, by size: ("blocks.3.head.1", 2.7), ("blocks.7.mlp", -1.2), ..."""
        shares = [("embed", float(self.embed))]
        for i, row in enumerate(self.heads.tolist()):
            shares += [(f"blocks.{i}.head.{n}", value) for n, value in enumerate(row)]
            shares += [(f"blocks.{i}.mlp", float(self.mlp[i]))]
            shares += [(f"blocks.{i}.attn.bias", float(self.bias[i]))] if self.bias[i] else []
        return sorted(shares, key=lambda share: -abs(share[1]))[:count]


@torch.no_grad()
def attribute(model: Any, ids: Ids, token: int, versus: int | None = None, position: int = -1) -> Attribution:
    """Who wrote the logit of `token` at `position`; with `versus`, the difference logit(token) - logit(versus).

    Args: ids one sequence; position of the logits, that is of the token before the one in question.
    Raises: RequestError: a token or position that does not exist.
    """
    row = one_sequence(model, ids)
    at = one_position(row.shape[1], position)
    direction = _output_direction(model, one_token(model, token))  # (H,)
    if versus is not None:
        direction = direction - _output_direction(model, one_token(model, versus, "versus"))
    names = ("blocks.0.hook_resid_pre", "blocks.*.attn.hook_z", "blocks.*.hook_mlp_out", "ln_final.hook_scale")
    logits, acts = run_with_cache(model, row, names, pos_slice=at)
    read = {name: value[0, 0].to(direction.dtype) for name, value in acts.items()}
    direction = direction / read["ln_final.hook_scale"]
    outputs = [model.get_submodule(point.path) for point in points(model).values() if point.place == "heads"]
    heads = [_heads(read[f"blocks.{i}.attn.hook_z"], o_proj, direction) for i, o_proj in enumerate(outputs)]
    bias = [o_proj.bias.to(direction.dtype) @ direction if o_proj.bias is not None else direction.new_zeros(())
            for o_proj in outputs]  # fmt: skip
    mlp = [read[f"blocks.{i}.hook_mlp_out"] @ direction for i in range(len(outputs))]
    logit = logits[0, at, token] - (logits[0, at, versus] if versus is not None else 0)
    return Attribution(
        embed=(read["blocks.0.hook_resid_pre"] @ direction).cpu(),
        heads=pad_sequence(heads, batch_first=True).cpu(),
        bias=torch.stack(bias).cpu(),
        mlp=torch.stack(mlp).cpu(),
        logit=logit.to(direction.dtype).cpu(),
    )


def _output_direction(model: Any, token: int) -> Tensor:
    """The direction of the normalised residual stream that a token's logit reads: norm weight * lm_head[token]. (H,)"""
    if not hasattr(model.model, "norm"):
        raise RequestError(f"{model.config.model_type} has several residual streams, mixed by weights that depend on all of "
                           "them: there is no sum of parts that the logit is linear in")
    wide = torch.promote_types(model.dtype, torch.float32)
    weight = model.model.norm.weight.to(wide)
    weight = 1 + weight if isinstance(model.model.norm, ZeroCentredRMSNorm) else weight
    return weight * head_of(model).weight[token].to(wide)


def _heads(z: Tensor, o_proj: Any, direction: Tensor) -> Tensor:
    """z_n . (W_n^T d) of every head: z (N, D), o_proj.weight (H, N*D), direction (H,) -> (N,)."""
    seen = o_proj.weight.to(direction.dtype).mT @ direction  # (N*D,)
    return (z * seen.view_as(z)).sum(-1)
