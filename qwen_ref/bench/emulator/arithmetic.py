"""What each instruction computes from its registers: a formula on arrays, by name and type.

Approximations (`ex2.approx`, `rsqrt.approx`, `div.full`) are computed in fp64 and rounded: a GPU's may be off by 2 units in
the last place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .numbers import SIGNED, UNSIGNED, Array, from_e4m3, halves, joined, read, to_e4m3, width, write
from .ptx import Instruction

if TYPE_CHECKING:
    from .machine import Machine

Step = Callable[["Machine"], None]
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
JOINS: dict[str, Callable[[Array, Array], Array]] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def step(instruction: Instruction) -> Step | None:
    """The function that runs an instruction on a machine; None if it is not known."""
    parts = instruction.parts
    builder = {"mov": _move, "setp": _compare, "selp": _select, "cvt": _convert, "cvta": _move, "shfl": _shuffle,
               "redux": _reduce, "vote": _vote, "activemask": _everyone}.get(parts[0])  # fmt: skip
    if builder:
        return builder(instruction)
    kind = parts[-1]
    if kind in ("bf16x2", "f16x2"):
        return _pairs(instruction, kind[:-2])
    formula = FORMULAS.get(parts[0])
    if formula is None:
        return None
    options = frozenset(parts[1:-1])
    target, *sources = instruction.operands
    kinds, result = _kinds(parts, kind, len(sources))

    def run(machine: Machine) -> None:
        values = [machine.get(source, kind) for source, kind in zip(sources, kinds, strict=True)]
        if "ftz" in options:
            values = [_flushed(v) for v in values]
        out = formula(options, *values)
        machine.put(target, _flushed(out) if "ftz" in options else out, result, machine.active(instruction))

    return run


def _kinds(parts: list[str], kind: str, count: int) -> tuple[list[str], str]:
    """The types of the sources and of the result."""
    if parts[0] in ("shl", "shr", "shf"):
        return [kind] * (count - 1) + ["u32"], kind
    if parts[0] in ("bfe", "bfi"):
        return [kind] * (count - 2) + ["u32", "u32"], kind
    if parts[0] in ("popc", "clz"):
        return [kind], "u32"
    if "wide" in parts:
        double = f"{kind[0]}{2 * width(kind)}"
        return [kind, kind, double][:count], double
    return [kind] * count, kind


def _flushed(values: Array) -> Array:
    """Without subnormal numbers."""
    if values.dtype.kind != "f":
        return values
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def _fused(_: frozenset[str], a: Array, b: Array, c: Array) -> Array:
    return a.astype(np.float64) * b + c


def _product(options: frozenset[str], a: Array, b: Array, c: Array | None = None) -> Array:
    if a.dtype.kind != "f" and "wide" in options:
        wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[a.dtype.itemsize * 16]
        a, b = a.astype(wide), b.astype(wide)
    result = _high(a, b) if "hi" in options else a * b
    return result if c is None else result + c


def _high(a: Array, b: Array) -> Array:
    """The upper half of a product of integers."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[2 * bits]
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)
    exact = np.frompyfunc(lambda x, y: (int(x) * int(y)) >> 64, 2, 1)
    return exact(a, b).astype(a.dtype)


def _quotient(_: frozenset[str], a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a.astype(np.float64) / b
    return _truncated(a, b)


def _truncated(a: Array, b: Array) -> Array:
    """Integers divide towards zero; by zero, all bits set."""
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    floor = a // safe
    if a.dtype.kind == "i":
        floor = floor + ((floor < 0) & (floor * safe != a)).astype(a.dtype)
    return np.where(b == 0, np.array(-1).astype(a.dtype), floor)


def _shift_left(_: frozenset[str], a: Array, count: Array) -> Array:
    bits = a.dtype.itemsize * 8
    return np.where(count < bits, a << (count & np.uint32(bits - 1)).astype(a.dtype), 0).astype(a.dtype)


def _shift_right(_: frozenset[str], a: Array, count: Array) -> Array:
    bits = a.dtype.itemsize * 8
    most = np.minimum(count, bits - 1).astype(a.dtype)
    shifted = a >> most
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, 0).astype(a.dtype)


def _funnel(options: frozenset[str], low: Array, high: Array, count: Array) -> Array:
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    count = (count & np.uint32(31) if "wrap" in options else np.minimum(count, 32)).astype(np.uint64)
    moved = (both << count) >> np.uint64(32) if "l" in options else both >> count
    return moved.astype(np.uint32)


def _extract(_: frozenset[str], a: Array, start: Array, length: Array) -> Array:
    """Bits start to start + length, extended by their highest if signed."""
    bits = a.dtype.itemsize * 8
    unsigned: Array = a.view(UNSIGNED[bits])
    start, length = (np.minimum(v & np.uint32(255), bits).astype(np.int64) for v in (start, length))
    length = np.minimum(length, bits - start)
    one = np.uint64(1)
    field = (unsigned.astype(np.uint64) >> start.astype(np.uint64)) & ((one << length.astype(np.uint64)) - one)
    if a.dtype.kind == "i":
        sign = (field >> np.maximum(length - 1, 0).astype(np.uint64)) & one
        field = np.where((sign == 1) & (length > 0), field - (one << length.astype(np.uint64)), field)
    return field.astype(UNSIGNED[bits]).view(a.dtype)


def _insert(_: frozenset[str], a: Array, b: Array, start: Array, length: Array) -> Array:
    bits = b.dtype.itemsize * 8
    one = np.uint64(1)
    mask = (((one << np.minimum(length, bits).astype(np.uint64)) - one) << start.astype(np.uint64)).astype(b.dtype)
    return (b & ~mask) | ((a << start.astype(b.dtype)) & mask)


def _permute(_: frozenset[str], a: Array, b: Array, selector: Array) -> Array:
    """Four bytes out of eight; a selector's fourth bit spreads the byte's sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out: Array = np.zeros_like(both)
    for i in range(4):
        choice = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        byte = np.where(choice > 7, np.where(byte > 127, np.uint64(255), np.uint64(0)), byte)
        out = out | byte << np.uint64(8 * i)
    return out.astype(np.uint32)


def _logic(_: frozenset[str], a: Array, b: Array, c: Array, table: Array) -> Array:
    """Any function of three bits: its table has bit 4 a + 2 b + c."""
    wanted, out = int(table.flat[0]), np.zeros_like(a)
    for i in range(8):
        if wanted >> i & 1:
            out = out | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _count(_: frozenset[str], a: Array) -> Array:
    return np.unpackbits(np.ascontiguousarray(a)[..., None].view(np.uint8), axis=-1).sum(-1).astype(np.uint32)


def _leading(_: frozenset[str], a: Array) -> Array:
    bits = np.unpackbits(np.ascontiguousarray(a)[..., None].view(np.uint8)[..., ::-1], axis=-1)
    return np.where(bits.any(-1), bits.argmax(-1), bits.shape[-1]).astype(np.uint32)


def _least(options: frozenset[str], a: Array, b: Array) -> Array:
    if a.dtype.kind != "f":
        return np.minimum(a, b)
    return np.minimum(a, b) if "NaN" in options else np.fmin(a, b)


def _most(options: frozenset[str], a: Array, b: Array) -> Array:
    if a.dtype.kind != "f":
        return np.maximum(a, b)
    return np.maximum(a, b) if "NaN" in options else np.fmax(a, b)


def _in_fp64(function: Callable[[Array], Array]) -> Callable[..., Array]:
    return lambda _, a: function(a.astype(np.float64))


FORMULAS: dict[str, Callable[..., Any]] = {
    "add": lambda _, a, b: a + b, "sub": lambda _, a, b: a - b, "mul": _product, "mad": _product, "fma": _fused,
    "div": _quotient, "rem": lambda _, a, b: a - _truncated(a, b) * b,
    "min": _least, "max": _most, "neg": lambda _, a: -a, "abs": lambda _, a: np.abs(a),
    "and": lambda _, a, b: a & b, "or": lambda _, a, b: a | b, "xor": lambda _, a, b: a ^ b, "not": lambda _, a: ~a,
    "shl": _shift_left, "shr": _shift_right, "shf": _funnel, "bfe": _extract, "bfi": _insert, "prmt": _permute,
    "lop3": _logic, "popc": _count, "clz": _leading,
    "ex2": _in_fp64(np.exp2), "lg2": _in_fp64(np.log2), "rsqrt": _in_fp64(lambda a: 1 / np.sqrt(a)), "sqrt": _in_fp64(np.sqrt),
    "rcp": _in_fp64(lambda a: 1 / a), "sin": _in_fp64(np.sin), "cos": _in_fp64(np.cos), "tanh": _in_fp64(np.tanh),
}  # fmt: skip


def _pairs(instruction: Instruction, kind: str) -> Step | None:
    """Two numbers of 16 bits in a register, each computed alone."""
    if instruction.parts[0] == "setp":
        return None
    formula, options = FORMULAS.get(instruction.parts[0]), frozenset(instruction.parts[1:-1])
    target, *sources = instruction.operands
    if formula is None:
        return None

    def run(machine: Machine) -> None:
        values = [halves(machine.get(source, "u32")) for source in sources]
        low, high = (write(formula(options, *(read(v[i], kind) for v in values)), kind, 16) for i in range(2))
        machine.put_bits(target, joined(low, high), machine.active(instruction))

    return run


def _move(instruction: Instruction) -> Step:
    """A copy; of a vector of registers, their bits side by side, lowest first, or the other way."""
    kind, (target, source) = instruction.parts[-1], instruction.operands

    def copy(machine: Machine) -> None:
        machine.put(target, machine.get(source, kind), kind, machine.active(instruction))

    def pack(machine: Machine) -> None:
        wide = UNSIGNED[width(kind)]
        bits: Array = np.zeros((1, 1), wide)
        at = 0
        for part in source:
            each = machine.program.width(part) if isinstance(part, str) else width(kind) // len(source)
            bits, at = bits | machine.get(part, f"u{each}").astype(wide) << wide(at), at + each
        machine.put_bits(target, bits, machine.active(instruction))

    def unpack(machine: Machine) -> None:
        bits, active, at = machine.get(source, f"u{width(kind)}"), machine.active(instruction), 0
        each = width(kind) // len(target)
        for part in target:
            machine.put_bits(part, (bits >> bits.dtype.type(at)).astype(UNSIGNED[each]), active)
            at += each

    if kind == "pred":
        return copy
    kind = f"u{width(kind)}"
    return unpack if isinstance(target, tuple) else pack if isinstance(source, tuple) else copy


def _compare(instruction: Instruction) -> Step | None:
    """setp.CMP[.JOIN].TYPE p[|q], a, b[, c]: q is the other answer, or of a pair the second number's."""
    comparison, kind = instruction.parts[1], instruction.parts[-1]
    join = next((JOINS[part] for part in instruction.parts[2:-1] if part in JOINS), None)
    targets = instruction.operands[: len(instruction.operands) - (3 if join else 2)]
    sources = instruction.operands[len(targets) :]

    def answer(a: Array, b: Array) -> Array:
        if comparison in ("num", "nan"):
            odd = np.isnan(a) | np.isnan(b)
            return odd if comparison == "nan" else ~odd
        if a.dtype.kind == "f" and comparison.endswith("u"):
            return COMPARISONS[comparison[:-1]](a, b) | np.isnan(a) | np.isnan(b)
        met = COMPARISONS[comparison](a, b)
        return met & ~(np.isnan(a) | np.isnan(b)) if a.dtype.kind == "f" else met  # "ne" is ordered too

    def run(machine: Machine) -> None:
        active = machine.active(instruction)
        if kind.endswith("x2"):
            a, b = (halves(machine.get(source, "u32")) for source in sources)
            answers = [answer(read(x, kind[:-2]), read(y, kind[:-2])) for x, y in zip(a, b, strict=True)]
        else:
            met = answer(machine.get(sources[0], kind), machine.get(sources[1], kind))
            answers = [met, ~met]
            if join:
                answers = [join(each, machine.get(sources[2], "pred")) for each in answers]
        for target, met in zip(targets, answers, strict=False):
            machine.put_bits(target, met, active)

    return run


def _select(instruction: Instruction) -> Step:
    kind = f"u{width(instruction.parts[-1])}"
    target, a, b, choice = instruction.operands

    def run(machine: Machine) -> None:
        chosen = np.where(machine.get(choice, "pred"), machine.get(a, kind), machine.get(b, kind))
        machine.put(target, chosen, kind, machine.active(instruction))

    return run


def _convert(instruction: Instruction) -> Step | None:
    """cvt[.rounding].TO.FROM: whole numbers saturate where they come from fractions."""
    to, source_kind = instruction.parts[-2:]
    options, (target, *sources) = frozenset(instruction.parts[1:-2]), instruction.operands

    def run(machine: Machine) -> None:
        active = machine.active(instruction)
        if to in ("bf16x2", "f16x2") and source_kind == "f32":  # the first source is the upper half
            high, low = (write(machine.get(source, "f32"), to[:-2], 16) for source in sources)
            machine.put_bits(target, joined(low, high), active)
        elif to == "e4m3x2":
            values = [machine.get(source, "f32") for source in sources]
            high, low = (to_e4m3(v).reshape(v.shape) for v in values)
            machine.put_bits(target, joined(low, high), active)
        elif source_kind == "e4m3x2":
            low, high = (from_e4m3(half).astype(np.float16).view(np.uint16) for half in halves(machine.get(sources[0], "u16")))
            machine.put_bits(target, joined(low, high), active)
        else:
            value = machine.get(sources[0], source_kind)
            machine.put(target, _converted(value, to, options), to, active)

    plain = all(kind.strip("0123456789") in ("u", "s", "f", "bf", "b") for kind in (to, source_kind))
    return run if plain or (to, source_kind) in PACKED else None


PACKED = {("bf16x2", "f32"), ("f16x2", "f32"), ("e4m3x2", "f32"), ("f16x2", "e4m3x2")}
ROUNDINGS: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _converted(value: Array, to: str, options: frozenset[str]) -> Array:
    if value.dtype.kind == "f":
        for name, function in ROUNDINGS.items():
            if name in options:
                value = function(value)
        if to[0] in "us":
            kind = (UNSIGNED if to[0] == "u" else SIGNED)[width(to)]
            held = np.iinfo(kind)
            exact = np.nan_to_num(value.astype(np.float64), nan=0.0, posinf=float(held.max), neginf=float(held.min))
            return np.where(exact >= float(held.max), held.max, np.clip(exact, held.min, held.max).astype(kind)).astype(kind)
        return np.clip(value, 0, 1) if "sat" in options else value
    return value.astype(np.float64) if to[0] in "bf" and to != "b32" and to != "b64" else value


def _shuffle(instruction: Instruction) -> Step:
    """shfl.sync: another lane's value; one that does not exist gives the lane's own. ISA, 9.7.9.6."""
    mode, (target, *rest) = instruction.parts[2], instruction.operands
    found = None
    if len(rest) == 5:
        found, *rest = rest
    source, offset, control, _ = rest

    def run(machine: Machine) -> None:
        values = np.broadcast_to(machine.get(source, "u32"), machine.shape)
        values = values.reshape(machine.shape[0], -1, 32)
        shape = (machine.shape[0], machine.threads)
        move, c = (np.broadcast_to(machine.get(part, "u32"), shape) for part in (offset, control))
        move, c = (v.reshape(values.shape).astype(np.int64) for v in (move, c))
        lane = np.arange(32)
        clamp, segment = c & 31, (c >> 8) & 31
        most, least = (lane & segment) | (clamp & ~segment & 31), lane & segment
        other = {"up": lane - move, "down": lane + move, "bfly": lane ^ move, "idx": least | (move & ~segment & 31)}[mode]
        there = other >= most if mode == "up" else other <= most
        taken = np.take_along_axis(values, np.where(there, other, lane) & 31, -1).reshape(shape)
        active = machine.active(instruction)
        machine.put_bits(target, taken, active)
        if found is not None:
            machine.put_bits(found, there.reshape(shape), active)

    return run


def _reduce(instruction: Instruction) -> Step:
    """redux.sync: one number from those of a warp's active lanes."""
    what, kind, (target, source, _) = instruction.parts[2], instruction.parts[-1], instruction.operands
    function, start = {
        "add": (np.add, 0), "min": (np.minimum, None), "max": (np.maximum, None), "and": (np.bitwise_and, -1),
        "or": (np.bitwise_or, 0), "xor": (np.bitwise_xor, 0),
    }[what]  # fmt: skip

    def run(machine: Machine) -> None:
        values, active = np.broadcast_to(machine.get(source, kind), machine.shape), machine.active(instruction)
        identity = start
        if identity is None:
            held = np.iinfo(values.dtype)
            identity = held.max if what == "min" else held.min
        lanes = np.where(True if active is None else active, values, np.array(identity).astype(values.dtype))
        one = function.reduce(lanes.reshape(machine.shape[0], -1, 32), -1, dtype=values.dtype, keepdims=True)
        machine.put(target, np.broadcast_to(one, (machine.shape[0], one.shape[1], 32)).reshape(machine.shape), kind, active)

    return run


def _vote(instruction: Instruction) -> Step:
    what, (target, source, _) = instruction.parts[2], instruction.operands

    def run(machine: Machine) -> None:
        met, active = np.broadcast_to(machine.get(source, "pred"), machine.shape), machine.active(instruction)
        asked = np.broadcast_to(True if active is None else active, machine.shape)
        warps = machine.shape[0], -1, 32
        if what == "ballot":
            bits = ((met & asked).reshape(warps).astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(-1, keepdims=True)
            answer = np.broadcast_to(bits.astype(np.uint32), (machine.shape[0], bits.shape[1], 32)).reshape(machine.shape)
        else:
            joined_by = {"any": (met & asked).reshape(warps).any(-1, keepdims=True),
                         "all": (met | ~asked).reshape(warps).all(-1, keepdims=True)}[what]  # fmt: skip
            answer = np.broadcast_to(joined_by, (machine.shape[0], joined_by.shape[1], 32)).reshape(machine.shape)
        machine.put_bits(target, answer, active)

    return run


def _everyone(instruction: Instruction) -> Step:
    all_lanes = np.full((1, 1), 0xFFFFFFFF, np.uint32)
    return lambda machine: machine.put_bits(instruction.operands[0], all_lanes, machine.active(instruction))
