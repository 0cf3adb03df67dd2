"""Matrix instructions: which thread holds which element (fragments), and how shared memory holds a matrix (descriptors).

Source: PTX ISA, 9.7.14 (mma, ldmatrix, stmatrix) and 9.7.15 (wgmma). Products are exact in fp32 and summed in fp32: a tensor
core sums in an order of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...errors import EmulatorError, RequestError
from .numbers import UNSIGNED, Array, from_e4m3, read, to_tf32
from .ptx import Bits, Instruction, Operand

if TYPE_CHECKING:
    from .machine import Machine

Step = Callable[["Machine"], None]
BYTES = {"bf16": 2, "f16": 2, "tf32": 4, "e4m3": 1}


def _elements(raw: Array, kind: str) -> Array:
    """raw (..., n) bytes -> (..., n / BYTES) fp32."""
    raw = np.ascontiguousarray(raw)
    if kind == "e4m3":
        return from_e4m3(raw)
    bits: Array = raw.view(UNSIGNED[8 * BYTES[kind]])
    return to_tf32(bits) if kind == "tf32" else read(bits, kind)


def _fragments(machine: Machine, registers: Sequence[Operand]) -> Array:
    """Registers as (blocks, warps, 8 groups, 4 threads, registers) uint32."""
    bits = np.stack([np.broadcast_to(machine.get(r, "u32"), machine.shape) for r in registers], -1)
    return bits.reshape(machine.shape[0], -1, 8, 4, len(registers))


def _left(machine: Machine, registers: Sequence[Operand], kind: str) -> Array:
    """The left matrix of a warp: 4 registers a thread -> (blocks, warps, 16, K). Registers: rows g, g + 8; then the other half
    of the columns. A register holds 4 bytes of a row."""
    held = _elements(_fragments(machine, registers)[..., None].view(np.uint8), kind)  # (B, W, 8, 4, 4, E)
    blocks, warps, each = held.shape[0], held.shape[1], held.shape[-1]
    held = held.reshape(blocks, warps, 8, 4, 2, 2, each)  # group, thread, half of K, half of rows, element
    return held.transpose(0, 1, 5, 2, 4, 3, 6).reshape(blocks, warps, 16, 8 * each)


def _right(machine: Machine, registers: Sequence[Operand], kind: str) -> Array:
    """The right matrix: 2 registers -> (blocks, warps, K, 8). A thread's group is its column."""
    held = _elements(_fragments(machine, registers)[..., None].view(np.uint8), kind)  # (B, W, 8 columns, 4, halves, E)
    blocks, warps, each = held.shape[0], held.shape[1], held.shape[-1]
    return held.transpose(0, 1, 4, 3, 5, 2).reshape(blocks, warps, 8 * each, 8)


def _sums(machine: Machine, registers: Sequence[Operand]) -> Array:
    """Accumulators: 4 registers for every 8 columns -> (blocks, warps, 16, N) fp32."""
    held = _fragments(machine, registers).view(np.float32)
    blocks, warps = held.shape[:2]
    held = held.reshape(blocks, warps, 8, 4, -1, 2, 2)  # group, thread, column block, half of rows, element
    return held.transpose(0, 1, 5, 2, 4, 3, 6).reshape(blocks, warps, 16, -1)


def _put_sums(machine: Machine, registers: Sequence[Operand], sums: Array, active: Array | None) -> None:
    blocks, warps = sums.shape[:2]
    held = sums.reshape(blocks, warps, 2, 8, -1, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6)
    held = np.ascontiguousarray(held).reshape(*machine.shape, len(registers))
    for i, register in enumerate(registers):
        machine.put(register, held[..., i], "f32", active)


def product(instruction: Instruction) -> Step | None:
    """mma.sync.aligned.m16n8kK.row.col.f32.A.B.f32 d, a, b, c"""
    parts = instruction.parts
    if not re.fullmatch(r"m16n8k\d+", parts[3]) or parts[4:7] != ["row", "col", "f32"] or parts[7] not in BYTES:
        return None
    d, a, b, c = instruction.operands
    kind = parts[7]
    if len(a) * 4 // BYTES[kind] * 2 != int(parts[3][6:]):  # half as much K, half as many registers: none of ours has it
        return None

    def run(machine: Machine) -> None:
        sums = _sums(machine, c) + _left(machine, a, kind) @ _right(machine, b, kind)
        _put_sums(machine, d, sums, machine.active(instruction))

    return run


def _rows(machine: Machine, instruction: Instruction, where: Operand, count: int) -> tuple[Array, Array]:
    """The places of `count` matrices of 8 rows of 16 bytes, whose addresses are held by threads 0-7, 8-15 ...:
    (warps, count, 8, 16) and the first lane of each warp."""
    active = machine.active(instruction)
    lanes = machine.lanes(active)
    first = lanes[lanes % 32 == 0]
    holders = first[:, None] + np.arange(8 * count)  # (warps, 8 count)
    addresses = np.broadcast_to(machine.address(where), machine.shape).reshape(-1)[holders]
    places = machine.shared.places(addresses.reshape(-1), holders.reshape(-1), 16)
    return places.reshape(len(first), count, 8, 16), first


def load(instruction: Instruction) -> Step | None:
    """ldmatrix.sync.aligned.m8n8.xN[.trans].shared.b16: thread 4 r + c gets elements 2 c, 2 c + 1 of row r; or column."""
    if "m8n8" not in instruction.parts or instruction.parts[-1] != "b16":
        return None
    registers, where = instruction.operands
    registers = registers if isinstance(registers, tuple) else (registers,)

    def run(machine: Machine) -> None:
        places, first = _rows(machine, instruction, where, len(registers))
        warps = (first % machine.threads // 32).astype(np.int8)
        machine.shared.note_read(places, warps[:, None, None, None])
        held: Array = machine.shared.bytes[places].view(np.uint16)  # (warps, N, 8, 8)
        if "trans" in instruction.parts:
            held = held.swapaxes(-1, -2)
        held = np.ascontiguousarray(held).view(np.uint32).reshape(len(first), len(registers), 32)
        active = machine.active(instruction)
        lanes = (first[:, None] + np.arange(32)).reshape(-1)
        for i, register in enumerate(registers):
            machine.put_bits(register, machine.spread(held[:, i].reshape(-1), lanes), active)

    return run


def store(instruction: Instruction) -> Step | None:
    """stmatrix: the other way."""
    if "m8n8" not in instruction.parts or instruction.parts[-1] != "b16":
        return None
    where, registers = instruction.operands
    registers = registers if isinstance(registers, tuple) else (registers,)

    def run(machine: Machine) -> None:
        places, first = _rows(machine, instruction, where, len(registers))
        lanes = first[:, None] + np.arange(32)
        values = np.stack([machine.of(machine.get(r, "u32"), lanes.reshape(-1)).reshape(lanes.shape) for r in registers], 1)
        held = values.view(np.uint16).reshape(len(first), len(registers), 8, 8)
        if "trans" in instruction.parts:
            held = held.swapaxes(-1, -2)
        raw = np.ascontiguousarray(held).view(np.uint8).reshape(-1, 16)
        holders = np.repeat(first, 8 * len(registers))
        machine.shared.store(places.reshape(-1, 16), raw, holders)

    return run


def warp_group_product(machine: Machine, instruction: Instruction, active: Array | None) -> tuple[list[str], list[Array]]:
    """wgmma.mma_async.sync.aligned.m64nNkK.f32.A.B d, a, b, scale-d, signs of a and b[, transposed a, b].

    a: four registers a thread, a quarter of the rows in each warp; or a descriptor, as b. Returns the registers it fills and
    the places in shared memory it reads, (groups of warps, bytes) each.
    """
    parts = instruction.parts
    if parts[5] != "f32" or parts[6] not in BYTES:
        raise EmulatorError(f"the emulator does not know the instruction {instruction.text[:80]!r}")
    columns, depth = (int(n) for n in re.findall(r"\d+", parts[4])[1:])
    kind = parts[6]
    d, a, b, scale, *rest = instruction.operands
    signs, turned = [_signed(bits) for bits in rest[:2]], [_signed(bits) != 0 for bits in rest[2:]]
    if signs != [1, 1]:
        raise EmulatorError("the emulator multiplies by 1 only")
    turned_a, turned_b = (turned[0] if isinstance(a, str) and turned else False), (turned[-1] if turned else False)
    lanes = machine.lanes(active)
    first = lanes[lanes % 128 == 0]
    read_places = []
    if isinstance(a, tuple):
        left = _left(machine, a, kind)
        left = left.reshape(-1, 64, left.shape[-1])[first // 128]
    else:
        left, places = _described(machine, a, first, 64, depth, kind, turned_a)
        read_places.append(places)
    right, places = _described(machine, b, first, columns, depth, kind, turned_b)
    read_places.append(places)
    sums = left @ right.swapaxes(-1, -2)  # (groups, 64, N)
    before = _sums(machine, d)
    whole = before.reshape(-1, 64, columns).copy()
    kept = np.broadcast_to(machine.get(scale, "pred"), machine.shape).reshape(-1)[first][:, None, None]
    whole[first // 128] = np.where(kept, whole[first // 128], 0) + sums
    _put_sums(machine, d, whole.reshape(before.shape), active)
    return [str(register) for register in d], read_places


def _signed(bits: Operand) -> int:
    if not isinstance(bits, Bits):
        raise RequestError(f"{bits} should be a constant")
    return bits.value


def _described(
    machine: Machine, descriptor: Operand, first: Array, rows: int, depth: int, kind: str, turned: bool
) -> tuple[Array, Array]:
    """A matrix in shared memory -> (groups, rows, depth) fp32, and the places of its bytes.

    A descriptor has the address, two strides and the swizzle: the bytes of a line (128, 64, 32 or, unswizzled, 16). Lines lie
    in atoms of 8. Along a line goes the depth, or the rows if the matrix is turned. A swizzle exchanges 16-byte pieces of a
    line by the number of the line: bits 4 to 6 of the address, exclusive or with bits 7 to 9.
    """
    bits = np.broadcast_to(machine.get(descriptor, "u64"), machine.shape).reshape(-1)[first]
    start, leading, stride, swizzle = ((bits >> np.uint64(at) & np.uint64(mask)).astype(np.int64) for at, mask in
                                       ((0, 0x3FFF), (16, 0x3FFF), (32, 0x3FFF), (62, 3)))  # fmt: skip
    if len(set(swizzle.tolist())) > 1:
        raise EmulatorError("the emulator reads matrices of one swizzle at a time")
    mode, each = int(swizzle[0]), BYTES[kind]
    line = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
    row, k = np.arange(rows)[:, None], np.arange(depth)[None]
    start, leading, stride = (16 * v[:, None, None] for v in (start, leading, stride))
    along, across = (row * each, k) if turned else (k * each, row)
    if mode == 0:  # without swizzle, pieces of 16 bytes
        far, near = (stride, leading) if turned else (leading, stride)
        offset = along % 16 + along // 16 * far + across % 8 * 16 + across // 8 * near
    elif turned:
        offset = along % line + along // line * leading + across % 8 * line + across // 8 * stride
    else:
        offset = along + across % 8 * line + across // 8 * stride
    address = start + offset
    address = address ^ ((address >> 7 & (line // 16 - 1)) << 4)
    places = machine.shared.places(address.reshape(-1), np.repeat(first, rows * depth), each)
    held = _elements(machine.shared.bytes[places].reshape(-1), kind).reshape(len(first), rows, depth)
    return held, places.reshape(len(first), -1)
