"""What a model remembers of the tokens it has read: one state per layer, and the positions they share."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import RequestError
from .memory import empty


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
        buffer, end = self.reserve(k), self.length + k.shape[2]
        buffer[0, :, :, self.length : end] = k
        buffer[1, :, :, self.length : end] = v
        self.extend(k.shape[2])
        return self.held()

    def reserve(self, like: Tensor) -> Tensor:
        """The buffer of keys and values, (2, B, K, capacity, D), with room behind `length` for tokens `like` these
        (B, K, T, D). Who writes them there himself says so by `extend`."""
        end = self.length + like.shape[2]
        if self._buffer is None or end > self._buffer.shape[3] or like.shape[0] != self._buffer.shape[1]:
            self._grow(like, end)
        return self._buffer  # type: ignore[return-value]

    def extend(self, count: int) -> None:
        """Count tokens that were written behind `length`."""
        self.length += count

    def held(self) -> tuple[Tensor, Tensor]:
        """All keys and values, (B, K, S, D) each: views, not to be written to."""
        held = self._buffer.narrow(3, 0, self.length)  # type: ignore[union-attr]
        return held[0], held[1]

    def _grow(self, like: Tensor, needed: int) -> None:
        batch, heads, _, dim = like.shape
        capacity = max(needed, 2 * self.length, 64)
        with torch.inference_mode(False):  # so that it can be written to in either mode
            buffer = empty((2, batch, heads, capacity, dim), like.dtype, like.device)
        if self.length:
            buffer[:, :, :, : self.length] = self._buffer[:, :, :, : self.length]  # type: ignore[index]
        self._buffer = buffer

    def reachable(self, length: int) -> int:
        """The most of the first `length` tokens that `truncate` can keep."""
        return min(length, self.length)

    def truncate(self, length: int) -> None:
        self.length = length

    def mark(self) -> None:
        """Make sure that `truncate` can come back to the present length. Keys and values always can."""

    def remember(self, count: int) -> None:
        """Make sure that `truncate` can take back the last `count` of the tokens to come. Keys and values always can."""

    def select(self, rows: Tensor) -> None:
        if self._buffer is not None:
            self._buffer = self._buffer[:, rows]

    def copy(self) -> KVCache:
        """The same tokens in memory of its own, no larger than they need."""
        other = copy.copy(self)
        other._buffer = None if self._buffer is None else self._buffer[:, :, :, : self.length].clone()
        return other

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

    def reachable(self, length: int) -> int:
        # The token after `length` needs the w - 1 keys before it.
        length = min(length, self.length)
        return length if self.start <= max(length - (self.window - 1), 0) else 0

    def truncate(self, length: int) -> None:
        if self._buffer is not None:
            self._buffer = self._buffer[:, :, :, : max(length - self.start, 0)] if length else None
        self.length = length

    def copy(self) -> SlidingKVCache:
        other = copy.copy(self)
        other._buffer = None if self._buffer is None else self._buffer.clone()
        return other


class IndexedKVCache(KVCache):
    """Keys and values, and the keys by which blocks of them are chosen: (B, S, d), before their norm and rotation."""

    def __init__(self) -> None:
        super().__init__()
        self._index: Tensor | None = None  # (B, capacity, d)

    def append_index(self, keys: Tensor) -> Tensor:
        """Add keys (B, T, d) of tokens that `append` has not seen yet; return all (B, S + T, d), a view."""
        end = self.length + keys.shape[1]
        if self._index is None or end > self._index.shape[1] or keys.shape[0] != self._index.shape[0]:
            with torch.inference_mode(False):
                buffer = keys.new_empty(keys.shape[0], max(end, 2 * self.length, 64), keys.shape[2])
            if self.length:
                buffer[:, : self.length] = self._index[:, : self.length]  # type: ignore[index]
            self._index = buffer
        self._index[:, self.length : end] = keys
        return self._index[:, :end]

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        if self._index is not None:
            self._index = self._index[rows]

    def copy(self) -> IndexedKVCache:
        other: Any = super().copy()
        other._index = None if self._index is None else self._index[:, : self.length].clone()
        return other

    def nbytes(self) -> int:
        return super().nbytes() + (0 if self._index is None else self._index.nbytes)


class RecurrentCache:
    """The state of a layer that keeps no keys: tensors (B, ...) that a pass replaces, or writes to memory of (see `ahead`).

    Going back is going back to a state that was remembered: by `mark`, or because it is one of the last `rewind` tokens' (then
    a pass of few tokens is made one by one, see `pieces`). That costs the memory of the state.
    """

    MARKS = 4  # the newest are kept: each holds a state of its own in memory

    def __init__(self, rewind: int = 0) -> None:
        self.length = 0
        self.state: tuple[Tensor, ...] | None = None  # None before the first token
        self.rewind = rewind
        self._own: tuple[Tensor, ...] | None = None  # the state, if it is nowhere else
        self._lent = False  # to a pass that writes over it: no longer that of `length`, until the pass has ended
        self._marks: dict[int, tuple[Tensor, ...] | None] = {}  # length -> the state there
        self._recent: dict[int, tuple[Tensor, ...] | None] = {}
        self._pool: list[tuple[Tensor, ...]] = []  # memory that `ahead` gives, again and again: some of the above are in it

    def pieces(self, count: int) -> Iterator[slice]:
        """The parts of a pass of `count` tokens after each of which `advance` is called."""
        step = 1 if count <= self.rewind else max(count, 1)
        return (slice(i, min(i + step, count)) for i in range(0, max(count, 1), step))

    def advance(self, count: int, *state: Tensor) -> None:
        """The state after `count` more tokens."""
        if self.rewind:
            self._recent[self.length] = self.state
        self.length += count
        self.state, self._lent = state, False
        self.remember(self.rewind)

    def ahead(self, count: int) -> list[tuple[Tensor, ...]]:
        """The state, and memory for those after each of the next `count` tokens, for who writes them there and then says so by
        `follow`. Of a single token that is not to be taken back both are the same: the state is in memory that is nowhere
        else, to be written over, and not to be come back to meanwhile. Else nothing remembered is written over, and what
        will be too far back to be remembered is forgotten at once. Empty before the first token.
        """
        if self.state is None:
            return []
        if not self.rewind and count == 1:
            if self.state is not self._own:
                self.state = self._own = tuple(x.clone(memory_format=torch.contiguous_format) for x in self.state)
            self._lent = True
            return [self.state, self.state]
        self._forget(self.length + count - self.rewind)
        return [self.state, *self._free(count)]

    def follow(self, states: Sequence[tuple[Tensor, ...]]) -> None:
        """Count the tokens whose states were written where `ahead` said."""
        for after in states[1:]:
            if self.rewind:
                self._recent[self.length] = self.state
            self.length += 1
            self.state, self._lent = after, False
        self.remember(self.rewind)

    def _free(self, count: int) -> list[tuple[Tensor, ...]]:
        """Memory for `count` states in which nothing is remembered."""
        like: tuple[Tensor, ...] = self.state  # type: ignore[assignment]
        if any(mine.shape != x.shape for memory in self._pool for mine, x in zip(memory, like, strict=True)):
            self._pool = []
        used = [id(state) for state in (like, *self._marks.values(), *self._recent.values())]
        free = [memory for memory in self._pool if id(memory) not in used][:count]
        with torch.inference_mode(False):  # so that it can be written to in either mode
            while len(free) < count:
                free.append(tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in like))
                self._pool.append(free[-1])
        return free

    def remember(self, count: int) -> None:
        if count < self.rewind:
            self._pool = []
        self.rewind = count
        self._forget(self.length - count)

    def _forget(self, before: int) -> None:
        self._recent = {at: state for at, state in self._recent.items() if before <= at < self.length}

    def mark(self) -> None:
        self._marks[self.length], self._own = self.state, None
        while len(self._marks) > self.MARKS:
            del self._marks[min(self._marks)]

    def reachable(self, length: int) -> int:
        held = () if self._lent else (self.length,)
        return max((at for at in (0, *held, *self._marks, *self._recent) if at <= length), default=0)

    def truncate(self, length: int) -> None:
        if length != self.length or self._lent:
            known = {0: None, **self._recent, **self._marks}
            self.state, self.length, self._lent = known[length], length, False
        self._marks = {at: state for at, state in self._marks.items() if at <= length}
        self._recent = {at: state for at, state in self._recent.items() if at < length}

    def select(self, rows: Tensor) -> None:
        def chosen(state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
            return None if state is None else tuple(x[rows] for x in state)

        self.state = chosen(self.state)
        self._marks, self._recent = ({at: chosen(s) for at, s in kept.items()} for kept in (self._marks, self._recent))
        self._pool = []

    def __getstate__(self) -> dict[str, Any]:
        """Without memory that holds nothing."""
        return {**vars(self), "_pool": []}

    def copy(self) -> RecurrentCache:
        self._own, self._pool = None, []  # what is held is the other's too
        other = copy.copy(self)
        other._marks, other._recent = dict(self._marks), dict(self._recent)
        return other

    def nbytes(self) -> int:
        """Of the states, those remembered and the memory for more included."""
        states = (self.state, *self._marks.values(), *self._recent.values(), *self._pool)
        return sum({x.data_ptr(): x.nbytes for state in states if state is not None for x in state}.values())


class JoinedCache:
    """A layer with two states, of its embedding and of its mixer, which have read the same tokens."""

    def __init__(self, embedding: RecurrentCache, mixer: RecurrentCache) -> None:
        self.embedding, self.mixer = embedding, mixer

    @property
    def length(self) -> int:
        return self.mixer.length

    def mark(self) -> None:
        self.embedding.mark()
        self.mixer.mark()

    def remember(self, count: int) -> None:
        self.embedding.remember(count)
        self.mixer.remember(count)

    def reachable(self, length: int) -> int:
        return min(self.embedding.reachable(length), self.mixer.reachable(length))

    def truncate(self, length: int) -> None:
        self.embedding.truncate(length)
        self.mixer.truncate(length)

    def select(self, rows: Tensor) -> None:
        self.embedding.select(rows)
        self.mixer.select(rows)

    def copy(self) -> JoinedCache:
        return JoinedCache(self.embedding.copy(), self.mixer.copy())

    def nbytes(self) -> int:
        return self.embedding.nbytes() + self.mixer.nbytes()


class Cache:
    """The states of all layers, and where their tokens stand.

    While every sequence holds the same positions 0, 1, 2, ... nothing is stored for them. Once a caller passes positions
    of its own (left padding, -1), they are kept per sequence: (B, S).
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.rows: int | None = None  # sequences, once something was read
        self._positions: Tensor | None = None  # (B, S), only once they are not simply 0..S-1
        self.expected: list[int] | None = None  # see `expect`
        self.steps: list[Any] = []  # what a fused model has recorded over these very buffers
        self.draft: Any = None  # what the draft layer has read of these tokens: a `speculative.Draft`

    def __getstate__(self) -> dict[str, Any]:
        """Without the records, for a copy has buffers of its own, and without the draft: neither decides a result, and a copy
        need not copy the model."""
        return {**vars(self), "steps": [], "draft": None}

    @property
    def length(self) -> int:
        """Tokens held, padding included."""
        return self.layers[0].length

    @property
    def contiguous(self) -> bool:
        """True while the keys are exactly the positions 0..length-1 of every sequence."""
        return self._positions is None

    def admit(self, rows: int) -> None:
        """RequestError for a pass over another number of sequences than are held, whose keys would be repeated for it."""
        if self.length and rows != self.rows:
            raise RequestError(f"the cache holds {self.rows} sequences and is given tokens of {rows}: `select` takes over rows "
                               "of it, a new one begins with any number")
        self.rows = rows

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

    def expect(self, lengths: Sequence[int]) -> None:
        """Say how many tokens each sequence will hold once its prompt is read, padding not counted, before it is.

        Qwen 1's rotary base and the length scaling of dual chunk attention depend on it, and so does what of the tokens held
        can serve (`reachable`). Without it they go by what the first call (Qwen 1) or every call (dual chunk) has seen; other
        models do not ask. Holds until `truncate`. RequestError if another number of sequences is held.
        """
        if self.length and len(lengths) != self.rows:
            raise RequestError(f"the cache holds {self.rows} sequences, and {len(lengths)} lengths are expected of them")
        self.expected = list(lengths)

    def key_positions(self, new: int, device: torch.device) -> Tensor:
        """Positions of all keys once `new` tokens that `extend` has noted are appended: (B or 1, S)."""
        return torch.arange(self.length + new, device=device)[None] if self._positions is None else self._positions

    def reachable(self, length: int) -> int:
        """The most of the first `length` tokens that `truncate` can keep: all of them where every layer keeps keys, else
        the last length that a layer without keys remembers."""
        length = max(length, 0)
        while (least := min(layer.reachable(length) for layer in self.layers)) < length:
            length = least
        return length

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens. RequestError if a layer no longer holds what that needs."""
        if not 0 <= length <= self.length or self.reachable(length) != length:
            raise RequestError(f"cannot cut a cache of {self.length} tokens back to {length}: "
                               f"keys or states already dropped; {self.reachable(length)} can be kept")
        for layer in self.layers:
            layer.truncate(length)
        if self.draft is not None:
            self.draft.truncate(length)
        self.expected = None
        if self._positions is not None:
            self._positions = self._positions[:, :length] if length else None

    def mark(self) -> None:
        """Remember the states of recurrent layers, so that `truncate` can come back to the present length.

        Costs the memory of one state per layer while it is remembered; the last `RecurrentCache.MARKS` are. A fused model
        writes over the state, and goes on with a copy.
        """
        for layer in self.layers:
            layer.mark()

    def remember(self, count: int) -> None:
        """Remember the states at each of the last `count` tokens from now on, as a cache of `make_cache(rewind=count)` does,
        and forget those further back that are not marked."""
        for layer in self.layers:
            layer.remember(count)

    def snapshot(self) -> Cache:
        """All that is held, in a cache of its own that later passes over this one do not touch."""
        other = copy.copy(self)
        other.layers = [layer.copy() for layer in self.layers]
        return other

    def restore(self, snapshot: Cache) -> None:
        """Hold exactly what `snapshot` does. It can be restored again, and into other caches of the same model."""
        vars(self).update(vars(snapshot.snapshot()))

    def select(self, rows: Tensor) -> None:
        """Keep only these sequences of the batch, in this order. `rows` (B',) int64."""
        for layer in self.layers:
            layer.select(rows)
        self.draft = None  # which is of one sequence
        self.rows = rows.numel()
        if self._positions is not None:
            self._positions = self._positions[rows]
        if self.expected is not None:
            self.expected = [self.expected[row] for row in rows.tolist()]

    def nbytes(self) -> int:
        """Bytes allocated for all layers."""
        return sum(layer.nbytes() for layer in self.layers)
