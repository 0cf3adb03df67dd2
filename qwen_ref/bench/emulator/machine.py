"""Runs a parsed kernel: all threads of some blocks in step, each register an array over (blocks, threads).

Where threads part at a branch, one side runs to the place where both meet, then the other. A value that is the same for
all threads, or all blocks, keeps a size of 1 there.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import EmulatorError, RequestError
from . import arithmetic, matrices
from .memory import Fault, Global, Shared
from .numbers import UNSIGNED, Array, read, width, write
from .ptx import END, Address, Bits, Instruction, Operand, Program

LANES = 1 << 14  # threads that run together: larger arrays leave the processor's cache
SHARED = 64 << 20  # bytes of shared memory at once


def run(program: Program, grid: tuple[int, int, int], threads: int, shared: int, arguments: Sequence[Any]) -> None:
    """Run every block of a grid. arguments: tensors and numbers, as many as parameters or fewer: the rest are zeros.

    Raises Fault for what a GPU would do wrongly, RequestError for an instruction that is not known here.
    """
    parameters = _parameters(program, arguments)
    memory = Global([a for a in arguments if isinstance(a, Tensor)])
    blocks = grid[0] * grid[1] * grid[2]
    size = max(-(-shared // 16) * 16, 16)
    together = max(1, min(LANES // threads, SHARED // size))
    for first in range(0, blocks, together):
        numbers = np.arange(first, min(first + together, blocks))
        Machine(program, grid, threads, Shared(len(numbers), size, threads), memory, parameters, numbers).run()


def _parameters(program: Program, arguments: Sequence[Any]) -> dict[str, bytes]:
    held = {}
    for i, (name, size) in enumerate(program.parameters):
        value = arguments[i] if i < len(arguments) else 0
        if isinstance(value, float):
            held[name] = struct.pack("<f", value)
        else:
            whole = value.data_ptr() if isinstance(value, Tensor) else int(value)
            held[name] = (whole & (1 << 8 * size) - 1).to_bytes(size, "little")
    return held


@dataclass
class Copy:
    """Bytes on their way to shared memory (cp.async), per lane the number of the group they belong to."""

    lanes: Array
    places: Array
    values: Array
    groups: Array


@dataclass
class Product:
    """A wgmma in flight: the registers it fills, the shared memory it reads, the groups of its warps.

    (The ISA forbids to write the left operand's registers before the wait, too. Triton 3.7 does where it splits such products
    in a loop, and the assembler takes it without a word: it is not held against a kernel here.)
    """

    registers: frozenset[str]
    lanes: Array  # the first lane of each warp group
    places: list[Array]  # (lanes, bytes) each
    groups: Array


class Machine:
    def __init__(
        self, program: Program, grid: tuple[int, int, int], threads: int, shared: Shared, memory: Global,
        parameters: dict[str, bytes], numbers: Array,
    ) -> None:  # fmt: skip
        self.program, self.shared, self.memory, self.parameters = program, shared, memory, parameters
        self.numbers, self.threads = numbers, threads
        self.shape = (len(numbers), threads)
        self.registers: dict[str, Array] = {}
        thread, block = np.arange(threads, dtype=np.uint32)[None], numbers.astype(np.uint32)[:, None]
        one, none = np.ones((1, 1), np.uint32), np.zeros((1, 1), np.uint32)
        self.special = {
            "%tid.x": thread, "%tid.y": none, "%tid.z": none, "%laneid": thread % 32, "%warpid": thread // 32,
            "%ntid.x": one * threads, "%ntid.y": one, "%ntid.z": one,
            "%ctaid.x": block % grid[0], "%ctaid.y": block // grid[0] % grid[1], "%ctaid.z": block // (grid[0] * grid[1]),
            "%nctaid.x": one * grid[0], "%nctaid.y": one * grid[1], "%nctaid.z": one * grid[2],
        }  # fmt: skip
        self.committed: dict[type, Array] = {kind: np.zeros(self.shape, np.int64) for kind in (Copy, Product)}
        self.flying: dict[type, list[Any]] = {Copy: [], Product: []}
        self.mask: Array | None = None  # the threads that run; None: all

    def run(self) -> None:
        steps = _steps(self.program)
        ways: list[tuple[int, int, Array | None]] = [(0, END, None)]  # where to go on, until where, who
        with np.errstate(all="ignore"):
            while ways:
                place, until, self.mask = ways.pop()
                while place != until:
                    step = steps[place]
                    if step is not None:
                        step(self)
                        place += 1
                        continue
                    instruction = self.program.code[place]
                    target = self.program.jumps.get(place, END)
                    who = self.who(instruction)
                    if who is None or who.all():
                        place = target
                    elif not who.any() or (self.mask is not None and not (who & self.mask).any()):
                        place += 1
                    elif self.mask is not None and (who | ~self.mask).all():
                        place = target
                    else:  # both ways: first the one, then the other, then all from where they meet
                        mask, who = self.everyone(), np.broadcast_to(who, self.shape)
                        meet = self.program.meets[place]
                        ways += [(meet, until, self.mask), (place + 1, meet, mask & ~who), (target, meet, mask & who)]
                        break

    def everyone(self) -> Array:
        return np.ones(self.shape, bool) if self.mask is None else self.mask

    def who(self, instruction: Instruction) -> Array | None:
        """The threads whose guard lets them run an instruction; None: all."""
        if instruction.guard is None:
            return None
        guard = self.registers[instruction.guard]
        return ~guard if instruction.negated else guard

    def active(self, instruction: Instruction) -> Array | None:
        guard = self.who(instruction)
        if guard is None:
            return self.mask
        if self.mask is not None:
            return guard & self.mask
        return None if guard.all() else guard

    def lanes(self, active: Array | None) -> Array:
        """The numbers of the active threads."""
        if active is None:
            return np.arange(self.shape[0] * self.threads)
        return np.flatnonzero(np.broadcast_to(active, self.shape))

    def get(self, operand: Operand, kind: str) -> Array:
        """An operand as numbers of a type: (blocks or 1, threads or 1)."""
        if isinstance(operand, Bits):
            value = operand.value
            if kind == "pred":
                return np.full((1, 1), value != 0)
            wide = UNSIGNED[width(kind)]
            return read(np.full((1, 1), value & int(np.iinfo(wide).max), wide), kind)
        bits = self.bits(operand)
        return read(bits, kind)

    def bits(self, operand: Operand) -> Array:
        if not isinstance(operand, str):
            raise RequestError(f"the operand {operand} is not a register")
        found = self.registers.get(operand)
        if found is None:
            found = self.special.get(operand)
        if found is None and operand[0] != "%":  # the name of shared memory is where it begins
            return np.zeros((1, 1), np.uint32)
        if found is None:
            return self.unset(operand)
        return found

    def unset(self, register: str) -> Array:
        """A register nobody wrote: all bits set, NaN among the numbers."""
        wide = self.program.width(register)
        return np.zeros((1, 1), bool) if wide == 1 else np.full((1, 1), np.iinfo(UNSIGNED[wide]).max, UNSIGNED[wide])

    def put(self, register: str, values: Array, kind: str, active: Array | None) -> None:
        self.put_bits(register, write(values, kind, self.program.width(register)), active)

    def put_bits(self, register: str, bits: Array, active: Array | None) -> None:
        if register == "_":
            return
        if active is not None:
            before = self.registers.get(register)
            bits = np.where(active, bits, self.unset(register) if before is None else before)
        self.registers[register] = bits

    def address(self, operand: Operand) -> Array:
        """(blocks or 1, threads or 1) int64."""
        if not isinstance(operand, Address):
            raise RequestError(f"the operand {operand} is not an address")
        return self.bits(operand.base).astype(np.int64) + operand.offset

    def of(self, values: Array, lanes: Array) -> Array:
        """The values of some lanes: (n)."""
        return np.broadcast_to(values, self.shape).reshape(-1)[lanes]

    def spread(self, values: Array, lanes: Array) -> Array:
        """Values (n) of some lanes as (blocks, threads); zeros elsewhere."""
        out = np.zeros(self.shape, values.dtype)
        out.reshape(-1)[lanes] = values
        return out

    def check_flying(self, instruction: Instruction) -> None:
        """No instruction may touch the registers of a product in flight, but the products that go on with it."""
        touched = _names(instruction)
        for product in self.flying[Product]:
            if product.registers & touched:
                raise Fault(f"touches the result of a matrix product in flight: {instruction.text[:80]}")

    def whole_blocks(self, active: Array | None) -> Array:
        """The blocks of the active threads, all of which must be active in each."""
        if active is None:
            return np.arange(self.shape[0])
        active = np.broadcast_to(active, self.shape)
        some, every = active.any(1), active.all(1)
        if (some != every).any():
            raise Fault("a barrier that some threads of a block do not reach")
        return np.flatnonzero(every)

    def commit(self, kind: type, active: Array | None) -> None:
        self.committed[kind] += np.ones(self.shape, bool) if active is None else active

    def landed(self, kind: type, left: int, active: Array | None) -> list[tuple[Any, Array]]:
        """What is complete once all but the last `left` groups were waited for, each with the choice of its lanes."""
        waiting = np.broadcast_to(np.ones((1, 1), bool) if active is None else active, self.shape).reshape(-1)
        limit, done = self.committed[kind].reshape(-1) - left, []
        for flight in self.flying[kind]:
            over = waiting[flight.lanes] & (flight.groups < limit[flight.lanes])
            if over.any():
                done.append((flight, over))
        return done


Step = Callable[[Machine], None]


def _names(instruction: Instruction) -> set[str]:
    found: set[str] = set()
    for operand in instruction.operands:
        for part in operand if isinstance(operand, tuple) else (operand,):
            found.add(part.base if isinstance(part, Address) else part if isinstance(part, str) else "")
    return found


@lru_cache(maxsize=256)
def _steps(program: Program) -> list[Step | None]:
    """One function an instruction; None for a branch."""
    return [_step(program, instruction) for instruction in program.code]


def _step(program: Program, instruction: Instruction) -> Step | None:
    head = instruction.parts[0]
    if head in ("bra", "ret"):
        return None
    build = BUILDERS.get(head)
    made = build(instruction) if build else arithmetic.step(instruction)
    if made is None:
        raise EmulatorError(f"the emulator does not know the instruction {instruction.text!r}")
    if head == "wgmma":
        return made

    def checked(machine: Machine) -> None:
        if machine.flying[Product]:
            machine.check_flying(instruction)
        made(machine)

    return checked


# Moving data


def _load(instruction: Instruction) -> Step:
    """ld.param, ld.global, ld.shared: one number or a vector, extended to the register."""
    parts, target = instruction.parts, instruction.operands[0]
    kind, where = parts[-1], instruction.operands[1]
    registers = target if isinstance(target, tuple) else (target,)
    each = width(kind) // 8

    def parameter(machine: Machine) -> None:
        held = machine.parameters[where.base][where.offset : where.offset + each]
        bits: Array = np.frombuffer(held.ljust(each, b"\0"), UNSIGNED[8 * each]).reshape(1, 1)
        machine.put(registers[0], read(bits, kind), kind, machine.active(instruction))

    def memory(machine: Machine) -> None:
        active = machine.active(instruction)
        lanes = machine.lanes(active)
        addresses = machine.of(machine.address(where), lanes)
        if parts[1] == "shared":
            raw = machine.shared.load(machine.shared.places(addresses, lanes, each * len(registers)), lanes)
        else:
            raw = machine.memory.load(addresses, each * len(registers), lanes // machine.threads + machine.numbers[0])
        values: Array = raw.view(UNSIGNED[8 * each])
        for i, register in enumerate(registers):
            machine.put(register, read(machine.spread(values[:, i], lanes), kind), kind, active)

    return parameter if parts[1] == "param" else memory


def _store(instruction: Instruction) -> Step:
    parts, source = instruction.parts, instruction.operands[1]
    kind, where = parts[-1], instruction.operands[0]
    registers = source if isinstance(source, tuple) else (source,)
    raw_kind = f"u{width(kind)}"

    def memory(machine: Machine) -> None:
        lanes = machine.lanes(machine.active(instruction))
        values = np.stack([machine.of(machine.get(register, raw_kind), lanes) for register in registers], 1).view(np.uint8)
        addresses = machine.of(machine.address(where), lanes)
        if parts[1] == "shared":
            machine.shared.store(machine.shared.places(addresses, lanes, values.shape[1]), values, lanes)
        else:
            machine.memory.store(addresses, values, lanes // machine.threads + machine.numbers[0])

    return memory


def _copy(instruction: Instruction) -> Step:
    """cp.async: from global to shared memory, bytes beyond the fourth operand zeros; and its groups."""
    what = instruction.parts[2]
    if what == "commit_group":
        return lambda machine: machine.commit(Copy, machine.active(instruction))
    if what in ("wait_group", "wait_all"):
        left = instruction.operands[0].value if what == "wait_group" else 0
        return lambda machine: _arrive(machine, left, machine.active(instruction))
    to, source, size, *given = instruction.operands

    def copy(machine: Machine) -> None:
        lanes = machine.lanes(machine.active(instruction))
        length = size.value
        places = machine.shared.places(machine.of(machine.address(to), lanes), lanes, length)
        reads = machine.of(machine.get(given[0], "u32"), lanes) if given else np.full(len(lanes), length)
        if not np.isin(reads, (0, length)).all():
            raise RequestError(f"the emulator copies all bytes or none: {instruction.text!r}")
        values = np.zeros((len(lanes), length), np.uint8)
        some = reads > 0
        addresses = machine.of(machine.address(source), lanes)[some]
        values[some] = machine.memory.load(addresses, length, (lanes // machine.threads + machine.numbers[0])[some])
        machine.shared.expect(places, lanes)
        machine.flying[Copy].append(Copy(lanes, places, values, machine.committed[Copy].reshape(-1)[lanes]))

    return copy


def _arrive(machine: Machine, left: int, active: Array | None) -> None:
    for copy, over in machine.landed(Copy, left, active):
        machine.shared.store(copy.places[over], copy.values[over], copy.lanes[over])
        copy.lanes, copy.places = copy.lanes[~over], copy.places[~over]
        copy.values, copy.groups = copy.values[~over], copy.groups[~over]
    machine.flying[Copy] = [copy for copy in machine.flying[Copy] if len(copy.lanes)]


def _barrier(instruction: Instruction) -> Step:
    if instruction.parts[1] == "warp":
        return lambda machine: None
    return lambda machine: machine.shared.barrier(machine.whole_blocks(machine.active(instruction)))


def _fence(instruction: Instruction) -> Step:
    if instruction.parts[1] != "proxy":
        return lambda machine: None
    return lambda machine: machine.shared.fence(machine.whole_blocks(machine.active(instruction)))


def _wgmma(instruction: Instruction) -> Step:
    what = instruction.parts[1]
    if what == "fence":
        return lambda machine: None
    if what == "commit_group":
        return lambda machine: machine.commit(Product, machine.active(instruction))
    if what == "wait_group":
        return lambda machine: _finish(machine, instruction.operands[0].value, machine.active(instruction))

    def multiply(machine: Machine) -> None:
        active = machine.active(instruction)
        registers, places = matrices.warp_group_product(machine, instruction, active)
        lanes = machine.lanes(active)
        lanes = lanes[lanes % 128 == 0]
        for held in places:
            machine.shared.multiply(held, lanes)
        groups = machine.committed[Product].reshape(-1)[lanes]
        machine.flying[Product].append(Product(frozenset(registers), lanes, places, groups))

    return multiply


def _finish(machine: Machine, left: int, active: Array | None) -> None:
    for product, over in machine.landed(Product, left, active):
        for places in product.places:
            machine.shared.multiplied_by(places[over], product.lanes[over])
        product.lanes, product.groups = product.lanes[~over], product.groups[~over]
        product.places = [places[~over] for places in product.places]
    machine.flying[Product] = [product for product in machine.flying[Product] if len(product.lanes)]


BUILDERS: dict[str, Callable[[Instruction], Step | None]] = {
    "ld": _load, "st": _store, "cp": _copy, "bar": _barrier, "barrier": _barrier, "fence": _fence, "wgmma": _wgmma,
    "ldmatrix": matrices.load, "stmatrix": matrices.store, "mma": matrices.product,
    "createpolicy": lambda instruction: lambda machine: None,
}  # fmt: skip
