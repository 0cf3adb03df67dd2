"""Small modules shared by the generations. They take sizes, never a config; their formulas are in `ops`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor, nn

from . import backend, ops
from .cache import Cache, KVCache
from .config import Rope


class Linear(nn.Linear):
    """x weight^T + bias: `ops.linear`, so that the matrix product can be swapped like every other operation."""

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return backend.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Scales each vector to unit root mean square, then by a learned weight: `ops.rms_norm`."""

    operation = "rms_norm"

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., size) -> (..., size)
        return backend.rms_norm(x, self.weight, self.eps)


class ZeroCentredRMSNorm(nn.Module):
    """RMSNorm whose weight is stored as its distance from one: `ops.zero_centred_rms_norm`."""

    operation = "zero_centred_rms_norm"

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., size) -> (..., size)
        return backend.zero_centred_rms_norm(x, self.weight, self.eps)


class StreamRMSNorm(ZeroCentredRMSNorm):
    """ZeroCentredRMSNorm of each of n vectors by itself, every one with a weight of its own, all in one tensor."""

    def forward(self, x: Tensor) -> Tensor:  # (..., n, H) -> (..., n, H), size = n H
        return backend.zero_centred_rms_norm(x, self.weight.view(x.shape[-2:]), self.eps)


class GatedRMSNorm(nn.Module):
    """RMSNorm times the activation of a gate: `ops.gated_rms_norm`."""

    def __init__(self, size: int, eps: float, activation: str = "silu") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.activation = eps, activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # (..., size), (..., size) -> (..., size)
        return backend.gated_rms_norm(x, gate, self.weight, self.eps, self.activation)


class CausalConv1d(nn.Module):
    """silu of a causal convolution over time of every channel by itself: `ops.causal_conv1d`."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:  # (B, T, C), (B, C, W) -> the same two
        return backend.causal_conv1d(x, self.weight[:, 0], state)


class ShardedEmbedding(nn.Module):
    """Rows of a table that checkpoints store in shards, one below the other: (R, D).

    The largest has 51 billion numbers, of which a token reads some thousands. So where the shards lie in mapped files they
    stay there (`map`): views outside of `parameters()`, which no cast, move or count touches, and which only `forward`
    reads, row by row. Without them, the table is an ordinary parameter.
    """

    weight: nn.Parameter | None

    def __init__(self, rows: int, dim: int, parts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim))
        self.rows, self.dim, self.parts = rows, dim, parts
        self._views: list[Tensor] = []

    def map(self, shards: list[Tensor]) -> None:
        """Read these from now on: one (rows, D) tensor of the CPU per shard, of any float dtype."""
        self.weight, self._views = None, shards

    @property
    def mapped(self) -> bool:
        return self.weight is None

    def shards(self) -> dict[str, Tensor]:
        """The parts by their official names, as views."""
        parts = self._views if self.weight is None else self.weight.data.chunk(self.parts)
        return {f"shard_{i}.weight": part for i, part in enumerate(parts)}

    def forward(self, rows: Tensor) -> Tensor:  # (...) int64 -> (..., D) in the table's dtype
        if self.weight is not None:
            return nn.functional.embedding(rows, self.weight)
        flat = rows.flatten().cpu()
        height = self._views[0].shape[0]  # of every shard but the last, which may be lower
        dtype = reduce(torch.promote_types, (view.dtype for view in self._views))  # shards need not be of one
        out = torch.empty(flat.shape[0], self.dim, dtype=dtype)
        for i in (flat // height).unique().tolist():
            here = flat // height == i
            out[here] = self._views[i][flat[here] - i * height].to(dtype)
        return out.to(rows.device).view(*rows.shape, self.dim)

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.dim}, shards={self.parts}" + (", mapped" if self.mapped else "")


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias=False)
        self.up_proj = Linear(hidden, intermediate, bias=False)
        self.down_proj = Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., H) -> (..., H)
        return self.down_proj(backend.swiglu(self.gate_proj(x), self.up_proj(x)))


class Experts(nn.Module):
    """E SwiGLU feed-forwards in two stacked tensors; each token passes through its k chosen ones."""

    def __init__(self, experts: int, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate, hidden))  # gate rows, then up rows
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:  # (M, H), (M, k), (M, k) -> (M, H)
        return backend.moe_experts(x, self.gate_up_proj, self.down_proj, weights, experts)

    def named_parts(self) -> list[tuple[str, Tensor]]:
        """(official name, view) of every matrix: on disk each expert's three projections are tensors of their own."""
        stacks = (("gate_up_proj", self.gate_up_proj.data), ("down_proj", self.down_proj.data))
        return [part for name, stack in stacks for part in expert_parts(name, stack)]


def expert_parts(name: str, stack: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A stack (E, ...) of `Experts` as (official name, view) of each expert's matrices."""
    half = stack.shape[1] // 2
    for e in range(stack.shape[0]):
        if name == "down_proj":
            yield f"{e}.down_proj.weight", stack[e]
        else:
            yield f"{e}.gate_proj.weight", stack[e, :half]
            yield f"{e}.up_proj.weight", stack[e, half:]


class MultiTokenPrediction(nn.Module):
    """The draft layer of the hybrid models (MTP): from the trunk's final state at token t and token t + 1, a state whose
    logits are those of token t + 2 (DeepSeek-V3 Technical Report, arXiv 2412.19437, section 2.2)."""

    def __init__(self, hidden: int, eps: float, block: nn.Module) -> None:
        super().__init__()
        self.pre_fc_norm_embedding = ZeroCentredRMSNorm(hidden, eps)
        self.pre_fc_norm_hidden = ZeroCentredRMSNorm(hidden, eps)
        self.fc = Linear(2 * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([block])
        self.norm = ZeroCentredRMSNorm(hidden, eps)

    def forward(
        self, hidden: Tensor, embedded: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:  # hidden states of t and embeddings of t + 1, (B, T, H) each -> (B, T, H)
        x = self.fc(torch.cat((self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)), dim=-1))
        return self.norm(self.layers[0](x, rope, mask, cache))


class Rotary(nn.Module):
    """cos and sin tables of a set of positions. Holds no parameters and is not part of a checkpoint."""

    def __init__(self, head_dim: int, rope: Rope) -> None:
        super().__init__()
        self.scale = rope.attention_factor
        # A plain attribute, not a buffer: model.to(bfloat16) must not round the frequencies.
        self.frequencies = rope.frequencies(head_dim)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # (B, T) -> 2 x (B, T, D)
        return self.tables(positions, dtype)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`forward` of positions that are not the tokens', unseen by whoever watches the module."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        return ops.rope_tables(positions, self.frequencies, self.scale, dtype)


def note_positions(tokens: Tensor, positions: Tensor | None, cache: Cache | None) -> tuple[Tensor, Tensor, bool]:
    """Where the T new tokens stand, and all S tokens so far; the cache is changed, and knows it from now on. Arguments as for
    `positions_and_masks`.

    Returns: positions (B or 1, T); those of all keys (B or 1, S); whether these are simply 0..S-1.
    """
    count, device = tokens.shape[1], tokens.device
    if cache is not None:
        cache.admit(tokens.shape[0])
    contiguous = positions is None and (cache is None or cache.contiguous)
    if positions is None:
        positions = cache.next_positions(count, device) if cache is not None else torch.arange(count, device=device)[None]
    return positions, cache.extend(positions, contiguous) if cache is not None else positions, contiguous


def positions_and_masks(
    tokens: Tensor, positions: Tensor | None, cache: Cache | None, windows: set[int | None]
) -> tuple[Tensor, dict[int | None, Tensor | None]]:
    """Where the T new tokens stand, which the cache knows from now on, and what each kind of layer may see of all so far.

    Args:
        tokens: (B, T) ids or (B, T, H) embeddings, read for shape and device only.
        positions: (B, T) int64, -1 = padding; None = directly after the cached tokens.
        windows: the sliding windows in use, None standing for full attention.
    Returns: positions (B or 1, T), and per window a mask for `ops.attention`; None = plain causal.
    """
    count, past = tokens.shape[1], cache.length if cache is not None else 0
    positions, keys, contiguous = note_positions(tokens, positions, cache)
    masks: dict[int | None, Tensor | None] = {}
    for window in windows:
        held = past if window is None else min(past, window - 1)  # what SlidingKVCache keeps
        reach = held + count
        if contiguous and (window is None or reach <= window):
            masks[window] = None
        else:
            masks[window] = ops.visible(positions, keys[:, keys.shape[1] - reach :], window)
    return positions, masks
