"""Global and shared memory that see every access: outside an allocation, misaligned, or racing with another thread's.

Lanes are all threads of all blocks that run together, counted block after block.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from torch import Tensor

from ...errors import QwenRefError
from .numbers import Array

NOBODY, SEVERAL = -1, 127
MANY = -2  # blocks
# Of memory that is more than its tensor, the address where it begins -> the tensor's first byte and the one behind its last.
INSIDE: dict[int, tuple[int, int]] = {}


class Fault(QwenRefError):
    """What a GPU would do wrongly, or not at all: an access or a race that the program must not have."""


@dataclass
class Allocation:
    start: int
    end: int
    bytes: Array  # of the memory itself
    writers: Array  # the block that last wrote each byte in this launch, or NOBODY
    readers: Array  # the block that has read each byte in this launch, NOBODY or MANY


class Global:
    """The memory behind the tensors that a kernel was given."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        storages = {(s.data_ptr(), s.nbytes()) for s in (t.untyped_storage() for t in tensors if t.numel())}
        spans = sorted(INSIDE.get(start, (start, start + size)) for start, size in storages)
        self.allocations = [_allocation(start, end - start) for start, end in spans]
        self.starts = [a.start for a in self.allocations]

    def load(self, addresses: Array, size: int, blocks: Array) -> Array:
        """addresses (n) -> (n, size) bytes."""
        out = np.empty((len(addresses), size), np.uint8)
        for chosen, held, places in self._found(addresses, size, "reads"):
            writers = held.writers[places]
            if ((writers != NOBODY) & (writers != blocks[chosen, None])).any():
                raise Fault(f"reads what another block wrote in the same launch, {_place(addresses[chosen], held)}")
            out[chosen] = held.bytes[places]
            readers, mine = held.readers[places], blocks[chosen, None]
            held.readers[places] = np.where((readers == NOBODY) | (readers == mine), mine, MANY)
        return out

    def store(self, addresses: Array, values: Array, blocks: Array) -> None:
        """values (n, size) bytes."""
        for chosen, held, places in self._found(addresses, values.shape[1], "writes"):
            writers, mine = held.writers[places], blocks[chosen, None]
            if ((writers != NOBODY) & (writers != mine) & (held.bytes[places] != values[chosen])).any():
                where = _place(addresses[chosen], held)
                raise Fault(f"writes other bytes than another block wrote in the same launch, {where}")
            readers = held.readers[places]
            if ((readers != NOBODY) & (readers != mine) & (held.bytes[places] != values[chosen])).any():
                where = _place(addresses[chosen], held)
                raise Fault(f"writes other bytes where another block has read in the same launch, {where}")
            held.bytes[places] = values[chosen]
            held.writers[places] = mine
            if (held.bytes[places] != values[chosen]).any():
                raise Fault(f"two threads write different bytes to one address, {_place(addresses[chosen], held)}")

    def _found(self, addresses: Array, size: int, what: str):
        """Per allocation: which accesses fall into it, it, and the places (n, size) of their bytes in it."""
        if len(addresses) == 0:
            return
        if (addresses % size).any():
            raise Fault(f"{what} {size} bytes at an address that is no multiple of {size}")
        rest = np.ones(len(addresses), bool)
        while rest.any():
            address = int(addresses[rest.argmax()])
            i = bisect_right(self.starts, address) - 1
            held = self.allocations[i] if i >= 0 else None
            if held is None or address + size > held.end:
                self._outside(address, size, what)
            chosen = rest & (addresses >= held.start) & (addresses + size <= held.end)
            yield chosen, held, (addresses[chosen] - held.start)[:, None] + np.arange(size)
            rest &= ~chosen

    def _outside(self, address: int, size: int, what: str) -> NoReturn:
        gaps = [(max(a.start - address, address - a.end), a) for a in self.allocations]
        near = ""
        if gaps:
            _, held = min(gaps, key=lambda gap: gap[0])
            near = f": {_place(np.array([address]), held)}"
        raise Fault(f"{what} {size} bytes outside every tensor it was given{near}")


def _allocation(start: int, size: int) -> Allocation:
    memory = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(start))
    return Allocation(start, start + size, memory, *(np.full(size, NOBODY, np.int32) for _ in range(2)))


def _place(addresses: Array, held: Allocation) -> str:
    offset = int(addresses[0]) - held.start
    return f"byte {offset} of an allocation of {held.end - held.start}"


class Shared:
    """Shared memory of `blocks` blocks. Between two barriers, what one warp writes no other may touch.

    Copies in flight (cp.async) arrive when their thread waits for them; until then the place holds NaN. What a matrix product
    in flight (wgmma) reads must not be written; what it reads must have been fenced (fence.proxy.async) after it was written.
    Writing what is there already is no race: layouts that several warps hold are written by each. Of the threads of one warp
    that write one place at once the last wins, for sums over a warp may differ in their last bit from thread to thread.
    """

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self.size, self.threads = size, threads
        self.bytes = np.full(blocks * size, 255, np.uint8)
        self.writer = np.full(blocks * size, NOBODY, np.int8)  # a warp, since the last barrier
        self.reader = np.full(blocks * size, NOBODY, np.int8)
        self.multiplied = np.zeros(blocks * size, np.int16)  # products in flight that read it
        self.unfenced = np.zeros(blocks * size, bool)

    def places(self, addresses: Array, lanes: Array, size: int) -> Array:
        """addresses (n) within the block of each lane (n) -> places (n, size) in `bytes`."""
        if len(addresses) and ((addresses % size).any() or int(addresses.max()) + size > self.size):
            bad = int(addresses[(addresses % size != 0) | (addresses + size > self.size)][0])
            raise Fault(f"{size} bytes at {bad} of {self.size} bytes of shared memory: outside it, or misaligned")
        return (addresses.astype(np.int64) + lanes // self.threads * self.size)[:, None] + np.arange(size)

    def load(self, places: Array, lanes: Array) -> Array:
        """places (n, size), lanes (n) -> (n, size) bytes."""
        self.note_read(places, self._warps(lanes))
        return self.bytes[places]

    def note_read(self, places: Array, warps: Array) -> None:
        writer = self.writer[places]
        if ((writer != NOBODY) & (writer != warps)).any():
            raise Fault("reads shared memory that another warp wrote, without a barrier between")
        reader = self.reader[places]
        self.reader[places] = np.where((reader == NOBODY) | (reader == warps), warps, SEVERAL)
        self.reader[places[self.reader[places] != warps]] = SEVERAL

    def store(self, places: Array, values: Array, lanes: Array) -> None:
        """values (n, size) bytes."""
        warps = self._warps(lanes)
        self._may_write(places, self.bytes[places] != values, warps)
        self.bytes[places] = values
        self.writer[places] = warps
        self.unfenced[places] = True
        if ((self.bytes[places] != values) & (self.writer[places] != warps)).any():
            raise Fault("two warps write different bytes to one place of shared memory at once")

    def expect(self, places: Array, lanes: Array) -> None:
        """A copy sets out to here: nobody may be reading, and nobody can read it yet."""
        self._may_write(places, np.ones(places.shape, bool), self._warps(lanes))
        self.bytes[places] = 255

    def _may_write(self, places: Array, changes: Array, warps: Array) -> None:
        if self.multiplied[places].any():
            raise Fault("writes shared memory that a matrix product in flight reads")
        for who, did in ((self.writer, "wrote"), (self.reader, "read")):
            other = who[places]
            if ((other != NOBODY) & (other != warps) & changes).any():
                raise Fault(f"writes shared memory that another warp {did}, without a barrier between")

    def barrier(self, blocks: Array) -> None:
        """All warps of these blocks have met."""
        for since in (self.writer, self.reader):
            since.reshape(-1, self.size)[blocks] = NOBODY

    def fence(self, blocks: Array) -> None:
        self.unfenced.reshape(-1, self.size)[blocks] = False

    def multiply(self, places: Array, lanes: Array) -> None:
        """A product sets out to read these places (groups of warps, bytes); lanes (groups): the first of each."""
        if (self.writer[places] != NOBODY).any():
            raise Fault("multiplies shared memory that was written without a barrier between")
        if self.unfenced[places].any():
            raise Fault("multiplies shared memory that was written without fence.proxy.async between")
        self._count(places, lanes, 1)

    def multiplied_by(self, places: Array, lanes: Array) -> None:
        """It is done: until the next barrier its warps count as having just read."""
        self._count(places, lanes, -1)
        self.note_read(places, self._warps(lanes))

    def _count(self, places: Array, lanes: Array, by: int) -> None:
        group = lanes % self.threads // 128  # those of one number read different bytes, each byte once
        for number in np.unique(group):
            self.multiplied[places[group == number]] += by

    def _warps(self, lanes: Array) -> Array:
        return (lanes % self.threads // 32).astype(np.int8)[:, None]
