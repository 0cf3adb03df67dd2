"""Gated DeltaNets in GGUF files, which llama.cpp's converter stores in another arrangement than the official checkpoints.

With G key heads, r value heads for each of them, P = r G, and their dimensions Dk and Dv:

    norms           w + 1, but for that of the DeltaNet's output
    A_log           -exp(A_log), as ssm_a
    conv1d          (C, 1, W) squeezed to (C, W)
    in_proj_qkvz    (qwen3next) rows that each key head has together: taken apart into q|k|v, attn_qkv, and z, attn_gate
    value heads     (qwen35, qwen35moe) the r of a key head stand apart, not together: (r, G) instead of (G, r), in the rows
                    of v, z, b, a, A, dt and the convolution, and in the columns of out_proj

github.com/ggml-org/llama.cpp, conversion/qwen.py. Rows are put back as they are stored, quantised or not. Columns of a
quantised matrix are not, whose blocks may span two heads: it keeps its order, and its inputs are brought into that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Fields
from ..errors import CheckpointError
from ..limits import LIMITS
from ..safetensors_file import SafetensorsFile, TensorInfo
from ..strict_json import quote
from .gguf_blocks import BLOCK, DEQUANTIZE

HYBRIDS = ("qwen3next", "qwen35", "qwen35moe")
DELTA = "linear_attn."
QKV, Z, QKVZ = (f"{DELTA}in_proj_{part}.weight" for part in ("qkv", "z", "qkvz"))
OUT, CONV, A_LOG = f"{DELTA}out_proj.weight", f"{DELTA}conv1d.weight", f"{DELTA}A_log"
PER_HEAD = (f"{DELTA}in_proj_a.weight", f"{DELTA}in_proj_b.weight", A_LOG, f"{DELTA}dt_bias")  # a row for each value head


@dataclass(frozen=True)
class Heads:
    """Sizes of the Gated DeltaNets of a model, and how its GGUF file arranges them."""

    groups: int  # G
    heads: int  # P
    key: int  # Dk
    value: int  # Dv
    tiled: bool  # value heads as (r, G); in_proj_qkvz is one matrix only where they are not

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], where: str) -> Heads | None:
        """None if the file is not of a hybrid model. ConfigError if a key is missing or does not fit the others."""
        arch = metadata.get("general.architecture")
        if arch not in HYBRIDS:
            return None
        f = Fields({key.removeprefix(f"{arch}."): value for key, value in metadata.items()}, f"{where}, {arch}")
        heads = f.integer("ssm.time_step_rank")
        groups, width = f.integer("ssm.group_count"), f.integer("ssm.inner_size")
        f.divides("ssm.group_count", groups, heads)
        f.divides("ssm.time_step_rank", heads, width)
        found = cls(groups, heads, f.integer("ssm.state_size"), width // heads, arch != "qwen3next")
        if sum(found.parts) > LIMITS.width:
            raise f.error("ssm.state_size", f"and ssm.inner_size make matrices of more than {LIMITS.width:,} rows")
        return found

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Heads | None:
        """The same of a config.json, which its generation's Config has read before."""
        model_type = str(config.get("model_type"))
        if not model_type.startswith(("qwen3_next", "qwen3_5")):
            return None
        defaults = {"num_key_heads": 16, "num_value_heads": 32, "key_head_dim": 128, "value_head_dim": 128}
        groups, heads, key, value = (int(config.get(f"linear_{name}", size)) for name, size in defaults.items())
        return cls(groups, heads, key, value, tiled=model_type != "qwen3_next")

    @property
    def parts(self) -> tuple[int, int]:
        """Rows of q|k|v and of z."""
        return 2 * self.groups * self.key + self.heads * self.value, self.heads * self.value

    def value_order(self, width: int) -> Tensor:
        """(P * width,) where each of `width` numbers per value head, in the official order, stands in the file."""
        return torch.arange(self.heads * width).view(-1, self.groups, width).transpose(0, 1).flatten()

    def row_order(self, name: str) -> Tensor | None:
        """Where each official row of a tensor stands in the file; None = all where they should."""
        keys = torch.arange(2 * self.groups * self.key)
        if name.endswith(QKVZ):
            qkv, z = torch.arange(sum(self.parts)).split(self.parts)
            q, k = qkv[: len(keys)].view(2, self.groups, self.key)
            v, z = qkv[len(keys) :].view(self.groups, -1), z.view(self.groups, -1)  # (G, r Dv)
            return torch.cat((q, k, v, z), dim=1).flatten()
        if not self.regrouped:
            return None
        if name.endswith((QKV, CONV)):
            return torch.cat((keys, len(keys) + self.value_order(self.value)))
        if name.endswith(Z):
            return self.value_order(self.value)
        return self.value_order(1) if name.endswith(PER_HEAD) else None

    def column_order(self, name: str) -> Tensor | None:
        """The same for columns."""
        return self.value_order(self.value) if self.regrouped and name.endswith(OUT) else None

    @property
    def regrouped(self) -> bool:
        return self.tiled and 1 < self.groups < self.heads


def is_shifted(name: str) -> bool:
    """Whether a tensor is a norm's weight that the file has as w + 1."""
    return name.endswith("norm.weight") and not name.endswith(f"{DELTA}norm.weight")


def to_file(name: str, official: Tensor, heads: Heads) -> Tensor:
    """A tensor as the file has it. `name`: official, but in_proj_qkv or in_proj_z for that part of in_proj_qkvz, which
    `official` then is."""
    if name.endswith((QKV, Z)) and not heads.tiled:
        order = heads.row_order(QKVZ)
        return official[_inverse(order)].split(heads.parts)[name.endswith(Z)]  # type: ignore[arg-type]
    if is_shifted(name):
        return official.float() + 1
    if name.endswith(A_LOG):
        official = -official.float().exp()
    if name.endswith(CONV):
        official = official.squeeze(1)
    rows, columns = heads.row_order(name), heads.column_order(name)
    official = official if rows is None else official[_inverse(rows)]
    return official if columns is None else official[:, _inverse(columns)]


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).index_copy(0, order, torch.arange(len(order)))


class _Made(NamedTuple):
    """A tensor that is not as it lies in a file."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor]


class OfficialTensors(SafetensorsFile):
    """The files of a hybrid model, read as one with the official tensors. As it is a view, closing the files closes it.

    `kinds` as in `GgufFile`. `orders`: of a quantised matrix whose columns are not in the official order, their order.
    `notes`: what a reader should know.
    """

    def __init__(self, files: Sequence[Any], heads: Heads, drafts: range) -> None:
        self.path: Path = files[0].path
        self.metadata = files[0].metadata
        self._heads = heads
        self._owner = {name: file for file in files for name in file.tensors if _layer(name) not in drafts}
        self.kinds = {name: file.kinds[name] for name, file in self._owner.items() if name in file.kinds}
        self.tensors: dict[str, TensorInfo] = {}
        self.orders: dict[str, Tensor] = {}
        self.notes: list[str] = []
        self._made: dict[str, _Made] = {}
        dropped = sum(len(file.tensors) for file in files) - len(self._owner)
        if dropped:  # loading the draft layer is not implemented for GGUF
            self.notes.append(f"left out: {dropped} tensors of the draft layer (MTP)")
        for name in self._owner:
            self._arrange(name)

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def read(self, name: str) -> Tensor:
        if name not in self._made:
            return self._owner[name].read(name)
        made = self._made[name]
        return made.make(*(self._owner[source].read(source) for source in made.sources)).contiguous()

    def read_into(self, name: str, out: Tensor) -> None:
        if name not in self._made:
            self._owner[name].read_into(name, out)
        else:
            out.copy_(self.read(name))

    def view(self, name: str) -> Tensor | None:
        return None if name in self._made else self._owner[name].view(name)

    def prefault(self, name: str) -> None:
        if name not in self._made:
            self._owner[name].prefault(name)

    def release(self, name: str) -> None:
        if name not in self._made:
            self._owner[name].release(name)

    def _arrange(self, name: str) -> None:
        """Note how the official tensor comes out of this one."""
        info = self._owner[name].tensors[name]
        if name.endswith((QKV, Z)) and not self._heads.tiled:
            if name.endswith(QKV):
                self._join(name)
            return
        rows, columns = self._heads.row_order(name) if DELTA in name else None, self._heads.column_order(name)
        if rows is not None and info.shape[0] != len(rows):
            raise CheckpointError(f"{self.path}: {quote(name)} has {info.shape[0]} rows, its metadata say {len(rows)}")
        if columns is not None and (count := self._columns(name)) != len(columns):
            raise CheckpointError(f"{self.path}: {quote(name)} has {count} columns, its metadata say {len(columns)}")
        if is_shifted(name):
            self._make(name, info._replace(dtype=torch.float32), lambda w: w.float() - 1)
        elif name.endswith(A_LOG):
            self._make(name, info._replace(dtype=torch.float32), lambda a: _taken(self._rates(name, a), rows).log())
        elif name.endswith(CONV):
            self._make(name, info._replace(shape=(info.shape[0], 1, *info.shape[1:])), lambda w: _taken(w, rows)[:, None])
        elif rows is not None:
            self._make(name, info, lambda w: _taken(w, rows))
        elif columns is not None and name not in self.kinds:
            self._make(name, info, lambda w: w[:, columns])
        else:
            self.tensors[name] = info
            if columns is not None:
                self.orders[name] = _inverse(columns)  # the official column of each that is stored

    def _rates(self, name: str, stored: Tensor) -> Tensor:
        """exp(A_log), which the file has negated."""
        rates = -stored.float()
        if not (rates.isfinite() & (rates >= 0)).all():
            raise CheckpointError(f"{self.path}: {quote(name)} holds what is not minus an exponential")
        return rates

    def _columns(self, name: str) -> int:
        width = self._owner[name].tensors[name].shape[-1]
        elements, size = BLOCK[self.kinds[name]] if name in self.kinds else (1, 1)
        return width // size * elements

    def _join(self, qkv: str) -> None:
        """in_proj_qkvz out of its two parts: as blocks where both are of one kind, else dequantised."""
        z, name = qkv.replace(QKV, Z), qkv.replace(QKV, QKVZ)
        if z not in self._owner:
            raise CheckpointError(f"{self.path}: {quote(qkv)} is there and {quote(z)} is missing")
        order, infos = self._heads.row_order(QKVZ), [self._owner[part].tensors[part] for part in (qkv, z)]
        if any(len(info.shape) != 2 for info in infos):
            raise CheckpointError(f"{self.path}: {quote(qkv)} and {quote(z)} are not both matrices")
        if [info.shape[0] for info in infos] != list(self._heads.parts) or self._columns(qkv) != self._columns(z):
            raise CheckpointError(f"{self.path}: {quote(qkv)} and {quote(z)} have other sizes than the metadata say")
        kinds = [self.kinds.pop(part, None) for part in (qkv, z)]
        first, columns = infos[0], infos[0].shape[-1]
        if kinds[0] == kinds[1] and infos[0].dtype == infos[1].dtype:
            if kinds[0] is not None:
                self.kinds[name] = kinds[0]
            values: list[Callable[[Tensor], Tensor]] = [lambda w: w] * 2
        else:
            self.notes.append(f"dequantised, for its parts are of different kinds: {name}")
            values = [DEQUANTIZE[kind] if kind is not None else lambda w: w.float() for kind in kinds]
            if kinds[0] is not None:
                columns = columns // BLOCK[kinds[0]][1] * BLOCK[kinds[0]][0]
            first = first._replace(dtype=torch.float32)
        end = first.end + infos[1].end - infos[1].start
        info = TensorInfo(first.dtype, (sum(self._heads.parts), columns), first.start, end)
        self._make(name, info, lambda a, b: torch.cat((values[0](a), values[1](b)))[order], (qkv, z))

    def _make(self, name: str, info: TensorInfo, make: Callable[..., Tensor], sources: tuple[str, ...] = ()) -> None:
        self.tensors[name] = info
        self._made[name] = _Made(sources or (name,), make)


def _taken(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _layer(name: str) -> int:
    """The index of a tensor's block; -1 outside of them."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1
