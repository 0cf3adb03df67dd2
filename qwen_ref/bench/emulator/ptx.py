"""PTX text, as Triton writes it, to a list of instructions. Syntax: NVIDIA, "Parallel Thread Execution ISA", chapters 4, 5."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ...errors import RequestError

END = -1  # the place after the last instruction


@dataclass(frozen=True)
class Address:
    """[base + offset]; base is a register, a parameter, or the name of all shared memory."""

    base: str
    offset: int


@dataclass(frozen=True)
class Bits:
    """A constant: its bits, for whatever type the instruction has."""

    value: int
    float64: bool = False


# Bits, an Address, a str (a register, or a label), or a tuple of them (a vector of registers): as the instruction has it.
Operand = Any


@dataclass(frozen=True)
class Instruction:
    name: str  # mma.sync.aligned...
    operands: tuple[Operand, ...]
    guard: str | None  # the predicate by which a thread runs it
    negated: bool
    text: str

    @property
    def parts(self) -> list[str]:
        return self.name.split(".")


@dataclass(frozen=True, eq=False)
class Program:
    """One kernel. `jumps`: of a branch, its target; `meets`: where the two ways of a branch come together again."""

    name: str
    parameters: tuple[tuple[str, int], ...]  # name and bytes
    widths: dict[str, int]  # of registers by prefix: bits, 1 for a predicate
    code: tuple[Instruction, ...]
    jumps: dict[int, int] = field(default_factory=dict)
    meets: dict[int, int] = field(default_factory=dict)

    def width(self, register: str) -> int:
        return self.widths[register.rstrip("0123456789")]


def parse(text: str) -> Program:
    """The only kernel of a module. Raises RequestError where it has none, or several."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    entries = list(re.finditer(r"\.entry\s+(\w+)\s*\((.*?)\)[^{]*\{", text, flags=re.S))
    if len(entries) != 1:
        raise RequestError(f"the PTX has {len(entries)} kernels where it should have one")
    (entry,) = entries
    sizes = {"8": 1, "16": 2, "32": 4, "64": 8}
    parameters = tuple(
        (name, sizes[bits]) for bits, name in re.findall(r"\.param\s+\.[a-z]+(\d+)[^,]*?(\w+)\s*(?:,|$)", entry[2].strip())
    )
    body = _inside(text[entry.end() :])
    widths = {}
    for kind, names in re.findall(r"\.reg\s+\.(\w+)\s+([^;]+);", body):
        for name in names.split(","):
            widths[re.sub(r"<\d+>|\d+$", "", name.strip())] = 1 if kind == "pred" else int(re.sub(r"\D", "", kind))
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in re.split(r";|(?<=:)\s|[{}]\s*\n|\n\s*[{}]", _joined(body)):
        statement = " ".join(statement.split())
        if statement.endswith(":"):
            labels[statement[:-1]] = len(code)
        elif statement and not statement.startswith("."):
            code.append(_instruction(statement))
    program = Program(entry[1], parameters, widths, tuple(code))
    for place, instruction in enumerate(code):
        if instruction.parts[0] == "bra":
            target = labels[str(instruction.operands[0])]
            program.jumps[place] = END if target == len(code) else target
    program.meets.update(_meeting_places(program))
    return program


def _inside(text: str) -> str:
    """Up to the brace that closes the one before the text."""
    depth = 1
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    raise RequestError("the PTX ends within a kernel")


def _joined(body: str) -> str:
    """Directives about lines of source take no semicolon: they go."""
    return re.sub(r"^\s*\.(loc|pragma|file|section)\b[^\n]*$", "", body, flags=re.M)


def _instruction(statement: str) -> Instruction:
    guard, negated, rest = None, False, statement
    if match := re.match(r"@(!?)(%[\w$]+)\s+", statement):
        negated, guard, rest = bool(match[1]), match[2], statement[match.end() :]
    name, _, operands = rest.partition(" ")
    return Instruction(name, tuple(_operand(text) for text in _split(operands)), guard, negated, statement)


def _split(text: str) -> list[str]:
    """By the commas that are in no brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])|\|", text) if part.strip()]


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return tuple(_operand(part) for part in _split(text[1:-1]))
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").replace("+-", "-").partition("+")
        base, minus, below = base.partition("-")
        return Address(base, -int(below) if minus else int(offset or 0))
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Bits(int(text[2:], 16))
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Bits(int(text[2:], 16), float64=True)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return Bits(int(text.rstrip("U"), 0))
    return text


def _meeting_places(program: Program) -> dict[int, int]:
    """Of each branch with a guard, the first place that every way from it to the end passes (its immediate post-dominator)."""
    code, end = program.code, len(program.code)
    starts = sorted({0, end, *(end if t == END else t for t in program.jumps.values()),
                     *(i + 1 for i, instruction in enumerate(code) if instruction.parts[0] in ("bra", "ret"))})  # fmt: skip
    block_of = {start: i for i, start in enumerate(starts)}
    last = [stop - 1 for stop in starts[1:]]
    exit = len(starts) - 1
    following: list[set[int]] = []
    for place in last:
        instruction, ways = code[place], set()
        if instruction.parts[0] == "ret":
            ways.add(exit)
        if place in program.jumps:
            ways.add(exit if program.jumps[place] == END else block_of[program.jumps[place]])
        if instruction.parts[0] not in ("bra", "ret") or instruction.guard:
            ways.add(block_of[place + 1])
        following.append(ways)
    passed = [set(range(len(starts))) for _ in last] + [{exit}]  # the blocks on every way from each to the exit
    changed = True
    while changed:
        changed = False
        for block in reversed(range(exit)):
            now = {block} | set.intersection(*(passed[way] for way in following[block]))
            changed |= now != passed[block]
            passed[block] = now
    meets = {}
    for block, place in enumerate(last):
        if code[place].guard and code[place].parts[0] in ("bra", "ret"):
            common = passed[block] - {block}
            nearest = max(common, key=lambda other: len(passed[other]))  # all of them lie on one way: the first has the most
            meets[place] = END if nearest == exit else starts[nearest]
    return meets
