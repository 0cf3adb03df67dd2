"""What a model remembers of the tokens it has read: one state per layer, and the positions they share."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import RequestError


class KVCache:
    """Keys (rotated) and values of one attention layer: (B, K, S, D) each, in a buffer that grows by doubling."""

    window: int | None = None

    def __init__(self) -> None:
        self._buffer: Tensor | None = None  # (2, B, K, capacity, D)
        self.length = 0

    @property
    def start(self) -> int:
        """The index of the first token still held."""
        return 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k, v (B, K, T, D); return all keys and values (B, K, S + T, D). The result is a view: do not write."""
        end = self.length + k.shape[2]
        if self._buffer is None or end > self._buffer.shape[3]:
            self._grow(k, end)
        buffer = self._buffer
        buffer[0, :, :, self.length : end] = k  # type: ignore[index]
        buffer[1, :, :, self.length : end] = v  # type: ignore[index]
        self.length = end
        return buffer[0, :, :, :end], buffer[1, :, :, :end]  # type: ignore[index]

    def _grow(self, like: Tensor, needed: int) -> None:
        batch, heads, _, dim = like.shape
        capacity = max(needed, 2 * self.length, 64)
        buffer = like.new_empty(2, batch, heads, capacity, dim)
        if self._buffer is not None:
            buffer[:, :, :, : self.length] = self._buffer[:, :, :, : self.length]
        self._buffer = buffer

    def can_truncate(self, length: int) -> bool:
        return 0 <= length <= self.length

    def truncate(self, length: int) -> None:
        self.length = length

    def select(self, rows: Tensor) -> None:
        if self._buffer is not None:
            self._buffer = self._buffer[:, rows]

    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes


class SlidingKVCache(KVCache):
    """A layer with a sliding window of w tokens: between calls only the last w - 1 keys and values are kept,
    since the next query is itself the w-th token of its window."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window: int = window

    @property
    def start(self) -> int:
        return self.length - (0 if self._buffer is None else self._buffer.shape[3])

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.stack((k, v))  # (2, B, K, T, D)
        if self._buffer is not None:
            kept = max(self._buffer.shape[3] - (self.window - 1), 0)
            new = torch.cat((self._buffer[:, :, :, kept:], new), dim=3)
        self._buffer = new
        self.length += k.shape[2]
        return new[0], new[1]

    def can_truncate(self, length: int) -> bool:
        # The token after `length` needs the w - 1 keys before it.
        return 0 <= length <= self.length and self.start <= max(length - (self.window - 1), 0)

    def truncate(self, length: int) -> None:
        if self._buffer is not None:
            self._buffer = self._buffer[:, :, :, : length - self.start]
        self.length = length


class Cache:
    """The states of all layers, and where their tokens stand.

    While every sequence holds the same positions 0, 1, 2, ... nothing is stored for them. Once a caller passes positions
    of its own (left padding, -1), they are kept per sequence: (B, S).
    """

    def __init__(self, layers: list[KVCache]) -> None:
        self.layers = layers
        self._positions: Tensor | None = None  # (B, S), only once they are not simply 0..S-1

    @property
    def length(self) -> int:
        """Tokens held, padding included."""
        return self.layers[0].length

    @property
    def contiguous(self) -> bool:
        """True while the keys are exactly the positions 0..length-1 of every sequence."""
        return self._positions is None

    def next_positions(self, count: int, device: torch.device) -> Tensor:
        """Positions of the `count` tokens that follow: (1, T), or (B, T) after padding."""
        ahead = torch.arange(count, device=device)
        if self._positions is None:
            return self.length + ahead[None]
        return self._positions[:, -1:] + 1 + ahead

    def extend(self, positions: Tensor, contiguous: bool) -> Tensor:
        """Note the positions (B or 1, T) of tokens about to be appended; return those of all keys (B or 1, S + T)."""
        if self._positions is None and contiguous:
            return torch.arange(self.length + positions.shape[1], device=positions.device)[None]
        before = self._positions
        if before is None:
            before = torch.arange(self.length, device=positions.device).expand(positions.shape[0], -1)
        self._positions = torch.cat((before, positions.expand(before.shape[0], -1)), dim=1)
        return self._positions

    def can_truncate(self, length: int) -> bool:
        return all(layer.can_truncate(length) for layer in self.layers)

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens. RequestError if a layer no longer holds what that needs."""
        if not self.can_truncate(length):
            raise RequestError(f"cannot cut a cache of {self.length} tokens back to {length}: keys already dropped")
        for layer in self.layers:
            layer.truncate(length)
        if self._positions is not None:
            self._positions = self._positions[:, :length]

    def select(self, rows: Tensor) -> None:
        """Keep only these sequences of the batch, in this order. `rows` (B',) int64."""
        for layer in self.layers:
            layer.select(rows)
        if self._positions is not None:
            self._positions = self._positions[rows]

    def nbytes(self) -> int:
        """Bytes allocated for all layers."""
        return sum(layer.nbytes() for layer in self.layers)
