"""Where a mixture of experts sends its tokens. L sparse layers, T tokens, E experts, k chosen per token.

    load             f_e = share of all k*T choices that fell on expert e; even = 1/E
    effective        exp(entropy of f): how many experts the load amounts to; E if even, k at least
    router entropy   -sum_e p_e log p_e of one token's probabilities, nats; log E if undecided
    balance          E * sum_e f_e * mean_t p_e: 1 if even, more if the popular experts are also the probable ones; the
                     auxiliary loss of Fedus et al. 2021 ("Switch Transformers"), with f summing to one
    co-activation    c[e, g] = share of tokens that chose both e and g; the diagonal, those that chose e
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from ..hook_points import points
from ..hooks import run_with_cache
from .inputs import Ids, one_sequence


@dataclass(frozen=True)
class Routing:
    """What the routers did, on the CPU. Token t of `ids` is column t everywhere."""

    layers: tuple[int, ...]  # the model's sparse layers: dense ones have no router
    ids: Tensor  # (T,)
    probs: Tensor  # (L, T, E) softmax over all experts, at least fp32
    experts: Tensor  # (L, T, k) int64, the chosen ones, best first
    weights: Tensor  # (L, T, k) as the model mixes them

    @property
    def load(self) -> Tensor:
        """(L, E)"""
        return load(self.experts, self.probs.shape[-1])

    @property
    def entropy(self) -> Tensor:
        """(L,) the routers' mean entropy, nats."""
        return entropy(self.probs).mean(-1)

    @property
    def effective(self) -> Tensor:
        """(L,) effective number of experts."""
        return effective(self.load)

    @property
    def balance(self) -> Tensor:
        """(L,)"""
        return balance(self.load, self.probs)

    @property
    def coactivation(self) -> Tensor:
        """(L, E, E)"""
        return coactivation(self.experts, self.probs.shape[-1])

    def by_token(self, layer: int) -> Tensor:
        """(E, T) the weight of each expert for each token, 0 where not chosen. `layer` as the model counts."""
        if layer not in self.layers:
            raise RequestError(f"layer {layer} has no router; those with one: {list(self.layers)}")
        i = self.layers.index(layer)
        empty = torch.zeros(self.probs.shape[1:], dtype=self.weights.dtype)  # (T, E)
        return empty.scatter(1, self.experts[i], self.weights[i]).mT


@torch.no_grad()
def route(model: Any, *sequences: Ids) -> Routing:
    """Run each sequence by itself and collect what every router did; their tokens are joined in order.

    Raises: RequestError: a model without routers, no sequence, ids that are not one sequence.
    """
    routers = [point for point in points(model).values() if point.short == "router_probs"]
    layers = tuple(point.layer for point in routers if point.layer is not None)
    if not layers:
        raise RequestError(f"this {model.config.model_type} model is dense: it has no router")
    if not sequences:
        raise RequestError("give at least one sequence of token ids")
    rows = [one_sequence(model, ids) for ids in sequences]
    names = [f"blocks.*.mlp.hook_{what}" for what in ("router_probs", "topk_idx", "topk_weights")]
    runs = [run_with_cache(model, row, names, device="cpu")[1] for row in rows]

    def joined(what: str) -> Tensor:
        return torch.cat([acts.stack(what)[:, 0] for acts in runs], dim=1)  # (L, T, ...)

    return Routing(layers, torch.cat([row[0] for row in rows]).cpu(), joined("router_probs"), joined("topk_idx"),
                   joined("topk_weights"))  # fmt: skip


def load(experts: Tensor, count: int) -> Tensor:
    """Choices (..., T, k) of `count` experts -> share of each (..., E); rows sum to one."""
    return _chosen(experts, count).mean(-2) / experts.shape[-1]


def entropy(probabilities: Tensor) -> Tensor:
    """(..., E) -> (...), nats."""
    return torch.special.entr(probabilities).sum(-1)


def effective(load: Tensor) -> Tensor:
    """(..., E) -> (...): the perplexity of the load."""
    return entropy(load).exp()


def balance(load: Tensor, probabilities: Tensor) -> Tensor:
    """Load (..., E) and probabilities (..., T, E) -> (...); 1 if even."""
    return load.shape[-1] * (load * probabilities.mean(-2)).sum(-1)


def coactivation(experts: Tensor, count: int) -> Tensor:
    """Choices (..., T, k) -> (..., E, E), symmetric; the diagonal sums to k."""
    chosen = _chosen(experts, count)
    return chosen.mT @ chosen / experts.shape[-2]


def _chosen(experts: Tensor, count: int) -> Tensor:
    """(..., T, k) -> (..., T, E) fp32: 1 where chosen."""
    empty = torch.zeros(*experts.shape[:-1], count, device=experts.device)
    return empty.scatter(-1, experts, 1.0)
