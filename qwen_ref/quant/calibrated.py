"""Four bits that know what they are multiplied with: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

Of a matrix W with inputs X the error that counts is |(W - Q) X|^2 = sum over rows of d H d^T, H = X X^T. Columns are
rounded one after the other, and what rounding one has cost is made good, as far as that goes, by the columns that are
still free: with U the upper Cholesky factor of H^-1, U^T U = H^-1, rounding column i with the error e adds
-e U[i, j] / U[i, i] to every column j > i (the paper's algorithm 1).

Columns are taken in the order of their weight in H, largest first, while as many as possible are left to make good; the
groups and their scales are those of the matrix before (what llm-compressor calls `actorder: static`), so that no file
has to say what the order was. A scale is the one of a few whose rounding error, weighted with H's diagonal, is least.

Layer by layer: every block sees the activations that the blocks before it, quantised already, make of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import RequestError
from ..layers import Experts, Linear
from . import rounding
from .format import matches
from .making import KEPT, Round, check, fitting, own, pack_head, quantize_module, rounder
from .packed import NIBBLE_ZERO, Int4, Packed, pack4
from .rounding import best_scale, finite, nibbles

DAMPING = 0.01  # of the mean of H's diagonal, added to it: the paper's
SHRINK = tuple(1 - 0.02 * i for i in range(16))  # candidates for a scale, as shares of amax / 7.5
COLUMNS = 128  # that are rounded before the rest of the matrix is brought up to date
LEAST_EXPERT_TOKENS = 32
WINDOW = 512
MOST_WINDOWS = 64
LEAST_TOKENS = 256


def gptq(weight: Tensor, hessian: Tensor, group: int, damping: float = DAMPING) -> Int4:
    """`rounding.int4` with error feedback: weight (N, K), hessian (K, K) fp32, the sum of x x^T over the inputs."""
    wide, columns = finite(weight).clone(), weight.shape[1]
    diagonal = hessian.diagonal()
    scale = best_scale(wide, group, weight.dtype, SHRINK, diagonal)
    steps = scale.float().repeat_interleave(group, 1)[:, :columns]  # (N, K)
    order = diagonal.argsort(descending=True, stable=True)
    factor = _factor(hessian[order][:, order], damping)
    wide, steps = wide[:, order], steps[:, order]
    codes = torch.empty(wide.shape, dtype=torch.uint8, device=wide.device)
    for start in range(0, columns, COLUMNS):
        end = min(start + COLUMNS, columns)
        errors = torch.empty_like(wide[:, start:end])
        for i in range(start, end):
            codes[:, i] = nibbles(wide[:, i], steps[:, i])
            rounded = (codes[:, i].float() - NIBBLE_ZERO) * steps[:, i]
            error = (wide[:, i] - rounded) / factor[i, i]
            wide[:, i:end] -= error[:, None] * factor[i, i:end]
            errors[:, i - start] = error
        wide[:, end:] -= errors @ factor[start:end, end:]
    return Int4(pack4(torch.empty_like(codes).index_copy(1, order, codes)), scale, None, group)


def _factor(hessian: Tensor, damping: float) -> Tensor:
    """U upper triangular with U^T U = (H + damping)^-1. More damping where H is too near singular for its dtype."""
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    for more in (1, 10, 100, 1000):
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * (mean * damping * more)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    return torch.eye(len(hessian), device=hessian.device)  # nothing is known of the inputs: plain rounding


# ------------------------------------------------------------------------------------------------- inputs


class Seen:
    """What the matrices of a block are multiplied with, gathered while it runs."""

    def __init__(self, block: nn.Module, path: str) -> None:
        self.hessians: dict[str, Tensor] = {}  # by the name of the first matrix with this input
        self.same: dict[str, str] = {}  # a matrix -> that first one: q, k and v have one input, and one Hessian
        self.routed: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}  # experts: x (M, H), weights and experts (M, k)
        self.notes: list[str] = []
        self._made: dict[str, Tensor] = {}
        self._before: tuple[Tensor | None, str] = (None, "")
        self._handles = []
        for name, module in block.named_modules(prefix=path):
            if isinstance(module, Experts):
                self._handles.append(module.register_forward_pre_hook(self._note_experts(name)))
            elif isinstance(module, Linear) and not matches(name, KEPT):
                self._handles.append(module.register_forward_pre_hook(self._note(name)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, first = self._before
            if name in self.same or x is args[0]:
                self.same.setdefault(name, first)
            else:
                self.hessians[name] = self.hessians.get(name, 0) + _gram(args[0])
                first = name
            self._before = (args[0], first)

        return hook

    def _note_experts(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            self.routed.setdefault(name, []).append(tuple(arg.detach() for arg in args))  # type: ignore[arg-type]

        return hook

    def rounder(self, group: int) -> Round:
        def to_bits(name: str, weight: Tensor) -> Packed:
            owner = name.removesuffix(".weight")
            first = self.same.get(owner, owner)
            if first in self.hessians:
                return gptq(weight, self.hessians[first], group)
            experts, e, projection = owner.rsplit(".", 2)
            x = self._inputs(experts, int(e), projection)
            if len(x) < LEAST_EXPERT_TOKENS:
                if projection == "gate_proj":
                    self.notes.append(f"{experts}.{e} got {len(x)} tokens of the calibration text: rounded to nearest")
                packed = rounding.int4(weight, group)
            else:
                packed = gptq(weight, _gram(x), group)
            self._made[projection] = packed.dequantize(torch.float32, weight.shape[1])
            return packed

        return to_bits

    def _inputs(self, experts: str, e: int, projection: str) -> Tensor:
        """The tokens an expert was chosen for; for `down_proj` what its quantised gate and up make of them. (m, K)

        Each is scaled by its routing weight, as the expert's output for it will be.
        """
        found = []
        for x, weights, chosen in self.routed.get(experts, []):
            token, slot = torch.where(chosen == e)
            h = x[token].float()
            if projection == "down_proj":
                h = ops.swiglu(F.linear(h, self._made["gate_proj"]), F.linear(h, self._made["up_proj"]))
            found.append(h * weights[token, slot, None].float())
        return torch.cat(found)


def _gram(x: Tensor) -> Tensor:
    """The sum of x x^T over all tokens: (..., K) -> (K, K) fp32."""
    flat = x.detach().flatten(0, -2).float()
    return flat.T @ flat


# ------------------------------------------------------------------------------------------------- layer by layer


class Calibration:
    """The residual stream of the calibration text, from block to block."""

    def __init__(self, model: Any, windows: Sequence[Sequence[int]]) -> None:
        """`model` has an embedding; its blocks need no memory yet."""
        self.model = model
        self.residuals: list[Tensor] = []  # per window, (1, T, H)
        self.given: list[list[tuple[tuple, dict]]] = []  # per window and block, its further arguments
        for ids in windows:
            with _noting(model.model) as calls:
                model.model(torch.tensor([ids], device=model.model.embed_tokens.weight.device))
            self.residuals.append(calls[0][0][0])
            self.given.append([(args[1:], kwargs) for args, kwargs in calls])

    @torch.no_grad()
    def look(self, i: int) -> Seen:
        """Run block i without going on, to see its inputs."""
        seen = Seen(self.model.model.layers[i], f"model.layers.{i}")
        try:
            for _ in self._run(i):
                pass
        finally:
            seen.close()
        return seen

    @torch.no_grad()
    def advance(self, i: int) -> None:
        """Run block i and go on with what it gives."""
        self.residuals = list(self._run(i))

    def _run(self, i: int) -> Iterator[Tensor]:
        for x, given in zip(self.residuals, self.given, strict=True):
            args, kwargs = given[i]
            yield self.model.model.layers[i](x, *args, **kwargs)


@contextmanager
def _noting(decoder: Any) -> Iterator[list[tuple[tuple, dict]]]:
    """Blocks that hand the residual stream on and note their arguments; a norm that does nothing."""
    calls: list[tuple[tuple, dict]] = []

    def note(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        return args[0]

    silenced = [*decoder.layers, decoder.norm]
    for block in decoder.layers:
        block.forward = note
    decoder.norm.forward = lambda x: x
    try:
        with torch.no_grad():
            yield calls
    finally:
        for module in silenced:
            del module.forward


def windows_of(ids: Sequence[int]) -> list[list[int]]:
    """At most 64 windows of 512 tokens. RequestError below 256, from which nothing can be learned about the inputs."""
    if len(ids) < LEAST_TOKENS:
        raise RequestError(f"the calibration text has {len(ids)} tokens; it must have at least {LEAST_TOKENS}, better 10,000")
    cut = [list(ids[i : i + WINDOW]) for i in range(0, min(len(ids), MOST_WINDOWS * WINDOW), WINDOW)]
    return [window for window in cut if len(window) >= min(WINDOW, LEAST_TOKENS)]


def quantize_model(model: Any, windows: Sequence[Sequence[int]], *, group: int = rounding.GROUP) -> tuple[Any, list[str]]:
    """`making.quantize_model` to int4 by GPTQ, of a model in memory; returns it and what a reader should know."""
    check(model)
    size, lend, notes = fitting(model, "int4", group), own(model), []
    calibration = Calibration(model, windows)
    for i, block in enumerate(model.model.layers):
        seen = calibration.look(i)
        quantize_module(block, f"model.layers.{i}", seen.rounder(size), lend)
        calibration.advance(i)
        notes += seen.notes
    pack_head(model, lend, rounder("int8"))
    return model, notes


__all__ = ["Calibration", "Seen", "gptq", "quantize_model", "windows_of"]
