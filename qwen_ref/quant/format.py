"""What a format is: which matrices of a checkpoint are quantised, by which tensors, and what those stand for."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import Fields
from ..errors import CheckpointError
from .packed import Packed

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# A config may hold expressions, which are matched against all names of a model: a hostile one must not run for ever.
MOST_PATTERN = 200
MOST_STEPS = 10**6  # of one expression for one name, see `steps`
_NAME = 64  # characters a module's name has at most
_GROUP_QUANTIFIER = re.compile(r"\)[*+?{]")
_QUANTIFIER = re.compile(r"(?<!\()[*+?{]\??")
SHELL = "shell:"  # before a pattern in the style of `fnmatch`


class Slot(NamedTuple):
    """One tensor of a quantised matrix: the shape it must have and the dtypes it may have."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


class Matrix(NamedTuple):
    """What a scheme makes of its tensors to run them."""

    weight: Packed
    order: Tensor | None = None  # (K,) int64: the input columns in the order in which `weight` has them


class Scheme:
    """How one matrix (N outputs, K inputs) is stored. `tensors` are named by what follows the module's own name."""

    marker: ClassVar[str]  # the tensor that shows that a matrix is stored in this way

    def stores(self, found: Mapping[str, Any]) -> bool:
        """Whether a matrix with these tensors in its file is quantised, and not left in full precision."""
        return self.marker in found or "weight" not in found

    def slots(self, rows: int, columns: int, found: Mapping[str, Any]) -> dict[str, Slot]:
        """All tensors of a matrix; `found` are those of the file, for what is optional."""
        raise NotImplementedError

    def check(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> None:
        """Raises CheckpointError for tensors that no matrix can be made of. `pack` asks by itself."""
        raise NotImplementedError

    def dequantize(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """The matrix, (N, K) fp32, as the format's definition has it."""
        raise NotImplementedError

    def pack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Matrix:
        """The same matrix in one of the layouts of `packed`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Format:
    """A checkpoint's `quantization_config`: which scheme each matrix has. Subclasses read it with `from_json`."""

    scheme: Scheme
    skipped: tuple[str, ...] = ()  # patterns of module names that stay in full precision

    @property
    def patterns(self) -> tuple[str, ...]:
        """All that a name is compared with."""
        return self.skipped

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of the module with this official name; None = full precision."""
        return None if matches(name, self.skipped) else self.scheme

    def embedding_scheme_of(self, name: str) -> Scheme | None:
        """The scheme of an embedding's (V, H) matrix: full precision in all formats but GGUF."""
        return None


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module is meant by one of these: a part of its path ("mlp.gate", "lm_head"), or a "re:" expression.

    Multimodal files spell "model.layers.3" as "model.language_model.layers.3", so that is tried too.
    """
    parts, expressions = _compiled(tuple(patterns))
    return any(any(part in f".{spelling}." for part in parts) or any(match(spelling) for match in expressions)
               for spelling in spellings(name))  # fmt: skip


def steps(patterns: Iterable[str]) -> int:
    """How many steps of its matcher it takes at most to find that a name is meant by none of these.

    Every quantifier may end anywhere in the name, and every alternation multiplies what there is to try. `fnmatch` makes
    expressions that need not try twice.
    """
    total = 0
    for pattern in patterns:
        if not pattern.startswith("re:"):
            total += _NAME if pattern.startswith(SHELL) else _NAME // 4
            continue
        quantifiers, bars = len(_QUANTIFIER.findall(pattern)), pattern.count("|")
        groups = max(1, min(bars, pattern.count("(")))
        total += math.comb(_NAME + quantifiers, quantifiers) * math.ceil((1 + bars / groups) ** groups)
    return total


def spellings(name: str) -> tuple[str, ...]:
    """A module's name, and the one it has in a multimodal file."""
    return (name, name.replace("model.", "model.language_model.", 1)) if name.startswith("model.") else (name,)


@lru_cache(maxsize=1024)
def _compiled(patterns: tuple[str, ...]) -> tuple[list[str], list[Callable[[str], Any]]]:
    """A config may have hundreds of them, for tens of thousands of experts."""
    written = [pattern.removeprefix("re:") for pattern in patterns if pattern.startswith("re:")]
    if shell := [fnmatch.translate(pattern.removeprefix(SHELL)) for pattern in patterns if pattern.startswith(SHELL)]:
        written.append("|".join(shell))
    expressions: list[Callable[[str], Any]] = [re.compile(pattern).match for pattern in written]
    return [f".{pattern}." for pattern in patterns if not pattern.startswith(("re:", SHELL))], expressions


def patterns(fields: Fields, key: str, default: Sequence[str] = ()) -> tuple[str, ...]:
    """A config's list of module names, as `trusted`."""
    return trusted(fields, key, fields.array(key, list(default)))


def trusted(fields: Fields, key: str, found: Sequence[Any]) -> tuple[str, ...]:
    """Module names and expressions from the field `key`. ConfigError on anything but text, and on what does not compile."""
    for pattern in found:
        if not isinstance(pattern, str) or len(pattern) > MOST_PATTERN:
            raise fields.error(key, f"holds {str(pattern)[:80]!r}, not the name of a module")
        if pattern.startswith("re:"):
            if _GROUP_QUANTIFIER.search(pattern) or steps([pattern]) > MOST_STEPS:
                raise fields.error(key, f"holds {pattern!r}, an expression too complex to be trusted")
            try:
                re.compile(pattern[3:])
            except (re.error, OverflowError) as problem:
                raise fields.error(key, f"holds {pattern!r}, which is no regular expression: {problem}") from problem
    return tuple(found)


def group_size(fields: Fields, key: str, default: int) -> int | None:
    """Columns that share a scale; None (-1 in the file) = a whole row."""
    value = fields.integer(key, default, low=-1)
    if value == 0:
        raise fields.error(key, "is 0; it must be positive, or -1 for whole rows")
    return None if value == -1 else value


def groups(columns: int, group: int, *, partial: bool = False) -> int:
    """How many groups a row has. CheckpointError where the group size does not divide it and the format wants that."""
    if columns % group and not partial:
        raise CheckpointError(f"the group size {group} does not divide the {columns} columns of a quantised matrix")
    return -(-columns // group)


def ordered(group_of: Tensor, group: int) -> tuple[Tensor | None, bool]:
    """The order of inputs in which groups of `group` follow each other (None = as they stand), and whether there is one.

    `group_of` (K,) int64: the group of every input. There is none if the groups differ in size.
    """
    regular = torch.arange(group_of.numel()) // group
    if torch.equal(group_of, regular):
        return None, True
    short = group_of.numpy().astype(np.uint16 if group_of.numel() <= 1 << 16 else np.int64)
    order = torch.from_numpy(np.argsort(short, kind="stable"))  # of 16 bits by their digits: a ninth of PyTorch's time
    return order, torch.equal(group_of[order], regular)


def check_scales(scale: Tensor, what: str) -> None:
    """Raises CheckpointError if a scale is NaN or infinite: whatever it scales would be too."""
    ordered = scale if scale.dtype in FLOATS else scale.float()
    if scale.numel() and not all(math.isfinite(bound) for bound in ordered.aminmax()):  # in one pass; NaN is both bounds
        raise CheckpointError(f"{what} holds NaN or infinity")
