"""Named activations: capture them, edit them.

    logits, acts = model.run_with_cache(ids, names_filter="blocks.*.hook_resid_post")
    with model.hooks([("blocks.3.attn.hook_pattern", ablate)]):
        generate(model, tokenizer, "Once upon a time")

A name is TransformerLens's where it has one (`list_hooks` prints them all), or the official path of a module, which
stands for its output. A function gets the activation and `hook=` (its `Point`), and may return a replacement of the
same shape, dtype and device; None, or a change in place, is understood too. What is captured is what the official
model computes: no weight is folded, centred or changed.

Nothing is built into the models for this. While functions are active, PyTorch's own hooks are on the modules they ask
for, and the operations of `backend` are wrapped, because what happens between two modules (the rotation, the pattern)
happens in an operation. With none active not a line of this file runs.
"""

from __future__ import annotations

import difflib
import operator
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from . import backend, ops
from .cache import Cache
from .errors import RequestError
from .hook_points import Point, letter_sizes, points

Function = Callable[..., Tensor | None]  # fn(activation, hook=point)
Filter = str | Sequence[str] | Callable[[str], bool]

DEFAULT_FILTER = ("hook_embed", "blocks.*.hook_resid_post", "ln_final.hook_out")
MAX_BYTES = 2 << 30


# ------------------------------------------------------------------------------------------------- what users call


class Activations(dict[str, Tensor]):
    """Captured tensors by name; acts["pattern", 3] is short for acts["blocks.3.attn.hook_pattern"]."""

    def __missing__(self, key: Any) -> Tensor:
        if isinstance(key, tuple) and len(key) in (2, 3):  # (short name, layer), (short name, layer, "ln1")
            start, end = f"blocks.{key[1]}.{key[2] + '.' if len(key) == 3 else ''}", f"hook_{key[0]}"
            for name, value in self.items():
                if name.startswith(start) and name.rpartition(".")[2] == end:
                    return value
        raise RequestError(f"{key!r} was not captured; near: {_near(str(key), self)}")

    def stack(self, short: str) -> Tensor:
        """One activation of all layers: stack("resid_post") is (L, B, T, H)."""
        chosen = [value for name, value in self.items() if name.rpartition(".")[2] == f"hook_{short}"]
        if not chosen:
            raise RequestError(f"hook_{short} was captured in no layer; captured: {_near(short, self)}")
        if len(shapes := {tuple(value.shape) for value in chosen}) > 1:
            shown = ", ".join(map(str, sorted(shapes)))
            raise RequestError(f"hook_{short} is of layers of different kinds, {shown}: take each by its name")
        return torch.stack(chosen)


def run_with_cache(
    model: Any,
    input_ids: Tensor,
    names_filter: Filter = DEFAULT_FILTER,
    *,
    positions: Tensor | None = None,
    cache: Cache | None = None,
    stop_at_layer: int | None = None,
    pos_slice: slice | int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    max_bytes: int = MAX_BYTES,
) -> tuple[Tensor, Activations]:
    """One forward pass; returns (logits, Activations).

    Args:
        input_ids, positions, cache: as `model.forward` has them.
        names_filter: a name, a pattern with *, several of them, or a function of the name. Default: the residual stream.
        stop_at_layer: leave before this block (-1 the last); the residual stream there is returned instead of logits.
        pos_slice: keep only these query positions, of every named point that has positions (not of a recurrent state).
        device, dtype: where and as what captured tensors are kept; default as they are.
        max_bytes: refuse, before anything runs, to keep more than this.
    Raises: RequestError: unknown name (near ones are given), too many bytes, stop_at_layer out of range, ids that are none,
        an embedding model (which has no logits) without stop_at_layer.
    """
    _check_ids(model, input_ids)
    known = points(model)
    chosen = select(model, names_filter)
    positions_kept = _positions_kept(pos_slice, input_ids.shape[1], [name for name in chosen if name not in known])
    _guard_bytes(model, [known.get(name) for name in chosen], input_ids, cache, positions_kept, dtype, max_bytes)
    acts = Activations()

    def keep(value: Tensor, hook: Point) -> None:
        if positions_kept is not None and "T" in hook.dims:
            index = [slice(None)] * hook.dims.index("T") + [positions_kept]
            value = value[tuple(index)]
        as_dtype = dtype if value.is_floating_point() else None
        acts[hook.name] = value.detach().to(device or value.device, as_dtype or value.dtype, copy=True)

    stop = None if stop_at_layer is None else _block_index(model, stop_at_layer)
    if stop is None:
        _check_head(model)
    if stop is not None and cache is not None:
        raise RequestError("stop_at_layer would leave the cache with the first layers' keys only; leave one of them out")
    with _active(model, [(name, _Reader(keep)) for name in chosen]), ExitStack() as stack:
        if stop is not None:
            stack.enter_context(_stopping_before(model.model.layers[stop]))
        try:
            run = model if stop is None else model.model  # which an embedding model has too
            return run(input_ids, positions, cache), acts
        except _Stop as stopped:
            return stopped.residual, acts


def run_with_hooks(
    model: Any,
    input_ids: Tensor,
    fwd_hooks: Iterable[tuple[Filter, Function]],
    *,
    positions: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """`model(input_ids, positions, cache)` with functions active: the logits they lead to."""
    _check_ids(model, input_ids)
    _check_head(model)
    with active(model, fwd_hooks):
        return model(input_ids, positions, cache)


@contextmanager
def active(model: Any, fwd_hooks: Iterable[tuple[Filter, Function]]) -> Iterator[None]:
    """Functions at points, for a while, in every forward of the model: prefill, cached decode, `generate`.

    `fwd_hooks` pairs a name (or pattern, or several, or a function of the name) with a function. Blocks nest: at a point the
    outermost block's functions run first, and each sees what the one before it made. As with `torch.no_grad`, they are active
    in the thread that opened the block.
    """
    with _active(model, [(name, fn) for names, fn in fwd_hooks for name in select(model, names)]):
        yield


def select(model: nn.Module, names: Filter) -> list[str]:
    """The names of points (or paths of modules) a filter means. RequestError, with near names, if one means nothing."""
    if callable(names):
        by_function = [name for name in points(model) if names(name)]
        if not by_function:
            raise RequestError("the function of names chose none of them; model.list_hooks() has all")
        return by_function
    if not isinstance(names, Iterable):
        raise RequestError(f"names of hooks are a pattern, a list of them or a function of a name, not {type(names).__name__}")
    called = (path for path, module in model.named_modules() if path and not isinstance(module, nn.ModuleList))
    known, chosen = [*points(model), *called], dict[str, None]()
    for pattern in [names] if isinstance(names, str) else names:
        matches = [name for name in known if name == pattern or fnmatchcase(name, pattern)]
        if not matches:
            raise RequestError(f"there is no hook {pattern!r}; near: {_near(pattern, known)}. model.list_hooks() has all")
        chosen.update(dict.fromkeys(matches))
    return list(chosen)


# ------------------------------------------------------------------------------------------------- how it works


class _Reader:
    """A function that only looks: it is given the activation itself, others a copy they may change."""

    def __init__(self, read: Callable[[Tensor, Point], None]) -> None:
        self.read = read

    def __call__(self, value: Tensor, hook: Point) -> None:
        self.read(value, hook)


@dataclass
class _Frame:
    """A module whose forward is running: operations called now are its own."""

    path: str
    lead: torch.Size  # (B, T) of its input, which a mixture of experts flattens
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))


# One of each model and thread, while it has functions: another thread may run the same model without them.
_sessions: dict[tuple[nn.Module, int], _Session] = {}


@contextmanager
def _active(model: nn.Module, functions: list[tuple[str, Function]]) -> Iterator[None]:
    if not functions:
        yield
        return
    key = model, threading.get_ident()
    session = _sessions.setdefault(key, _Session(model))
    try:
        session.say_what_runs_eagerly(name for name, _ in functions)
        session.install([*session.blocks, functions])
        yield
    finally:
        session.install([block for block in session.blocks if block is not functions])
        if not session.blocks:
            _sessions.pop(key, None)


class _Session:
    """All functions that a thread has active on a model, and the PyTorch hooks that call them.

    Nested blocks share it, for what happens inside an operation can be computed once only: there every function, those of
    the outermost block first, sees what the one before it made.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.widths, self.thread = model, _widths(model.config), threading.get_ident()
        self.blocks: list[list[tuple[str, Function]]] = []
        self.frames: list[_Frame] = []  # modules whose forward is running, innermost last
        self.installed = ExitStack()

    def install(self, blocks: list[list[tuple[str, Function]]]) -> None:
        """Take these blocks of functions in place of those before, outermost first."""
        self.installed.close()
        self.blocks, self.functions = blocks, defaultdict(list)
        for name, fn in chain.from_iterable(blocks):
            self.functions[name].append(fn)
        self.points = _points_of(self.model, self.functions)
        self.by_place = {(point.path, point.short): point for point in self.points.values()}
        modules = dict(self.model.named_modules())
        for operation in self.operations():
            self.installed.enter_context(backend.intercept(operation, self.on_operation(operation)))
        for path in self.framed():
            self._register(modules[path].register_forward_pre_hook, self.enter(path))
            self._register(partial(modules[path].register_forward_hook, always_call=True), self.leave)
        # What heads write is summed anew if it is edited, so it comes before what reads that sum.
        for point in sorted(self.points.values(), key=lambda point: point.place != "heads"):
            if point.place in ("input", "residual"):
                self._register(modules[point.path].register_forward_pre_hook, self.on_input(point))
            elif point.place in ("output", "heads"):
                self._register(modules[point.path].register_forward_hook, self.on_output(point))

    def _register(self, register: Callable[..., Any], hook: Callable[..., Any]) -> None:
        def in_this_thread(*args: Any) -> Any:
            return hook(*args) if threading.get_ident() == self.thread else None

        self.installed.callback(register(in_this_thread).remove)

    # which modules and operations are concerned

    def operations(self) -> set[str]:
        places = {point.place for point in self.points.values() if point.place in backend.OPERATIONS}
        others = {"dual_chunk_attention", "sparse_block_attention"}  # which a model calls in its place
        return places | (others if "attention" in places else set())

    def framed(self) -> set[str]:
        inside = {point.path for point in self.points.values() if point.place in backend.OPERATIONS}
        flattened = {p.path.rpartition(".")[0] for p in self.points.values() if ".mlp." in p.path and p.dims}
        return inside | flattened

    def say_what_runs_eagerly(self, names: Iterable[str]) -> None:
        asked = _points_of(self.model, names).values()
        layers = sorted({p.layer for p in asked if p.place == "attention" and p.short in ("pattern", "attn_scores")}, key=str)
        parameter = next(self.model.parameters())
        implementation = backend.attention.resolve(parameter.device, parameter.dtype).name
        if layers and implementation != "eager":
            where = ", ".join(map(str, layers[:8])) + (" ..." if len(layers) > 8 else "")
            warnings.warn(f"attention of layer {where} runs eagerly instead of by {implementation!r} while its scores or "
                          "pattern are asked for: the fused kernel never has them", stacklevel=6)

    # a value passes a point

    def passes(self, point: Point | None, value: Tensor) -> Tensor:
        """The value, or what the point's functions make of it; the same object where they leave it alone."""
        if point is None:
            return value
        for fn in self.functions[point.name]:
            if isinstance(fn, _Reader):
                fn(value, point)
                continue
            given = value.clone()
            result = fn(given, hook=point)
            edited = given if result is None else result
            _check_edit(point, value, edited)
            if _alike(edited, value) and (edited is given or not edited.requires_grad):
                continue  # nothing changed: the model goes on with its own tensor, and rounds as ever
            if not point.editable:
                raise RequestError(f"{point.name} can be read but not edited; edit {point.instead} instead")
            value = edited
        return value

    def wants(self, path: str, short: str) -> Point | None:
        return self.by_place.get((path, short))

    # PyTorch's hooks

    def enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.frames.append(_Frame(path, args[0].shape[:-1]))

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.frames:
            self.frames.pop()

    def on_input(self, point: Point) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
            x = self._shown(point, args[0])
            edited = self.passes(point, x)
            if edited is x:
                return None
            if point.place == "residual":
                # The norm and the residual sum read one tensor, made by the block a line before: changed in place,
                # both see the edit, and exactly.
                args[0].copy_(edited)
                return None
            return (edited.reshape(args[0].shape), *args[1:])

        return hook

    def on_output(self, point: Point) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            if first is None:  # an indexer that had nothing to choose
                return None
            if point.place == "heads":
                return self._heads_output(point, module, args[0])
            if point.part is not None:
                return self._part_of_output(point, point.part, first)
            x = self._shown(point, first)
            edited = self.passes(point, x)
            if edited is x:
                return None
            edited = edited.reshape(first.shape)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    def _shown(self, point: Point, x: Tensor) -> Tensor:
        """As the point's dims say: heads apart, and tokens in rows where a mixture of experts flattened them."""
        if point.dims == "BTV" and x.dim() == 2:  # of the last position alone, as `generate` asks the head
            return x.unsqueeze(1)
        if point.dims in ("BTND", "BTKD") and x.dim() == 3:
            return x.unflatten(-1, (-1, self.widths["N"]))
        if point.dims and x.dim() == 2 and self.frames:
            return x.unflatten(0, self.frames[-1].lead)
        return x

    def _part_of_output(self, point: Point, part: Callable[[Tensor], Tensor], output: Tensor) -> Tensor | None:
        x = part(output)
        edited = self.passes(point, x)
        if edited is x:
            return None
        output = output.clone()
        part(output).copy_(edited)
        return output

    def _heads_output(self, point: Point, o_proj: Any, z: Tensor) -> Tensor | None:
        """What each head adds to the residual stream: z_n W_n^T, with W_n the head's columns of o_proj's weight."""
        width = self.widths[point.dims[2]]
        weight = o_proj.weight.to(z.dtype).unflatten(1, (-1, width))  # (H, N, D); a packed one comes in fp32
        result = torch.einsum("btnd,hnd->btnh", z.unflatten(-1, (-1, width)), weight)  # (B, T, N, H)
        edited = self.passes(point, result)
        if edited is result:
            return None
        return edited.sum(2) + (o_proj.bias if o_proj.bias is not None else 0)

    # operations

    def on_operation(self, operation: str) -> Callable[..., Any]:
        handles: dict[str, Callable[..., Any]] = {
            "rms_norm": self._rms_norm, "zero_centred_rms_norm": self._zero_centred, "gated_rms_norm": self._gated_rms_norm,
            "rope": self._rope, "attention": partial(self._attention, ops.attention_scores),
            "dual_chunk_attention": partial(self._attention, ops.dual_chunk_scores),
            "sparse_block_attention": partial(self._attention, ops.sparse_block_scores),
            "block_scores": self._block_scores, "gated_delta_rule": self._gated_delta_rule, "router_topk": self._router_topk,
            "stream_mix": self._stream_mix, "stream_write": self._stream_write,
        }  # fmt: skip
        handle = handles[operation]

        def wrapper(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            frame = self.frames[-1] if self.frames and threading.get_ident() == self.thread else None
            return handle(frame, run, *args, **kwargs) if frame else run(*args, **kwargs)

        return wrapper

    def _rms_norm(self, frame: _Frame, run: Callable, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        edited = self._normalized(frame, x, eps, x.dtype)
        return run(x, weight, eps) if edited is None else weight * edited

    def _zero_centred(self, frame: _Frame, run: Callable, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        edited = self._normalized(frame, x, eps, torch.promote_types(x.dtype, torch.float32))
        return run(x, weight, eps) if edited is None else (edited * (1 + weight.to(edited.dtype))).to(x.dtype)

    def _normalized(self, frame: _Frame, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor | None:
        """What a norm multiplies by its weight, in `dtype`, if it or the scale was edited."""
        scale_point, normalized_point = self.wants(frame.path, "scale"), self.wants(frame.path, "normalized")
        if scale_point is None and normalized_point is None:
            return None
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        scale = 1 / inverse
        edited = self.passes(scale_point, scale)
        # Unedited, the product of the official formula; dividing by the scale would round otherwise.
        normalized = (wide * inverse if edited is scale else wide / edited).to(dtype)
        result = self.passes(normalized_point, normalized)
        return None if edited is scale and result is normalized else result

    def _gated_rms_norm(self, frame: _Frame, run: Callable, x: Tensor, gate: Tensor, *args: Any) -> Tensor:
        return run(x, self.passes(self.wants(frame.path, "gate"), gate), *args)

    def _gated_delta_rule(
        self, frame: _Frame, run: Callable, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        def passes(short: str, value: Tensor) -> Tensor:
            return self.passes(self.wants(frame.path, short), value)

        q, k, v = passes("q", q), passes("k", k), passes("v", v)
        if self.wants(frame.path, "decay"):
            decay = g.exp()
            edited = passes("decay", decay)
            g = g if edited is decay else edited.log()
        beta = passes("beta", beta)
        if self.wants(frame.path, "pattern"):
            passes("pattern", ops.gated_delta_pattern(q, k, g, beta))
        out, state = run(q, k, v, g, beta, state)
        return passes("out", out), passes("state", state)

    def _rope(self, frame: _Frame, run: Callable, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # Every Attention rotates q, then k, then those of its indexer; dual chunk attention q again, for older chunks.
        point = self.wants(frame.path, ("rot_q", "rot_k", "index_q", "index_k")[frame.calls["rope"]])
        frame.calls["rope"] += 1
        rotated = run(x, cos, sin)  # (B, N, T, D)
        shown = rotated.transpose(1, 2)
        edited = self.passes(point, shown)
        return rotated if edited is shown else edited.transpose(1, 2)

    def _attention(
        self, scores_of: Callable[..., Tensor], frame: _Frame, run: Callable, q: Tensor, k: Tensor, v: Tensor, *seen: Any
    ) -> Tensor:
        scores_point, pattern_point = self.wants(frame.path, "attn_scores"), self.wants(frame.path, "pattern")
        if scores_point is None and pattern_point is None:
            out = run(q, k, v, *seen)  # (B, N, T, D)
        else:
            scores = self.passes(scores_point, scores_of(q, k, *seen))  # (B, N, T, S)
            pattern = self.passes(pattern_point, ops.attention_softmax(scores))
            out = pattern @ ops.repeat_kv(v, q.shape[1])
        shown = out.transpose(1, 2)
        edited = self.passes(self.wants(frame.path, "z"), shown)
        return out if edited is shown else edited.transpose(1, 2)

    def _block_scores(self, frame: _Frame, run: Callable, q: Tensor, keys: Tensor) -> Tensor:
        return self.passes(self.wants(frame.path, "index_scores"), run(q, keys))

    def _stream_mix(self, frame: _Frame, run: Callable, normed: Tensor, logits: Tensor) -> Tensor:
        if (point := self.wants(frame.path, "read")) is None:
            return run(normed, logits)
        weights = torch.sigmoid(logits)
        edited = self.passes(point, weights)
        return run(normed, logits) if edited is weights else (edited * normed).mean(dim=-2)

    def _stream_write(self, frame: _Frame, run: Callable, x: Tensor, out: Tensor, logits: Tensor) -> Tensor:
        point = self.wants(frame.path, ("attn_inject", "mlp_inject")[frame.calls["stream_write"]])
        frame.calls["stream_write"] += 1
        if point is None:
            return run(x, out, logits)
        gain = ops.stream_gain(logits)
        edited = self.passes(point, gain)
        return run(x, out, logits) if edited is gain else x + edited[..., None] * out[..., None, :]

    def _router_topk(self, frame: _Frame, run: Callable, logits: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
        def passes(short: str, value: Tensor) -> Tensor:
            return self.passes(self.wants(frame.path, short), value.unflatten(0, frame.lead)).flatten(0, 1)

        if self.wants(frame.path, "router_probs"):
            passes("router_probs", logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)))
        weights, experts = run(logits, k, normalize)
        return passes("topk_weights", weights), passes("topk_idx", experts)


# ------------------------------------------------------------------------------------------------- guards


class _Stop(Exception):
    def __init__(self, residual: Tensor) -> None:
        self.residual = residual


@contextmanager
def _stopping_before(block: nn.Module) -> Iterator[None]:
    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Stop(args[0])

    handle = block.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def _points_of(model: nn.Module, names: Iterable[str]) -> dict[str, Point]:
    """By name; a module's path is a point that stands for its output."""
    known = points(model)
    return {name: known.get(name, Point(name, name, "output", "")) for name in names}


def _widths(config: Any) -> dict[str, int]:
    """Numbers per head, for each kind of head."""
    return {"N": config.head_dim, "P": getattr(config, "linear_value_head_dim", 0)}


def _check_ids(model: Any, ids: Any) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        got = f"{ids.dtype} of shape {list(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise RequestError(f"input_ids must be (B, T) int64, as torch.tensor([tokenizer.encode(text)]); this is {got}")
    last = model.config.vocab_size - 1
    if ids.numel() and not ids.is_meta and (int(ids.min()) < 0 or int(ids.max()) > last):
        raise RequestError(f"ids must be within 0..{last}; these go from {int(ids.min())} to {int(ids.max())}")


def _check_head(model: Any) -> None:
    if model.lm_head is None:
        raise RequestError("this is an embedding model without an output head, so a pass of it has no logits: call model.model "
                           "inside model.hooks(...), or give stop_at_layer")


def _block_index(model: Any, layer: int) -> int:
    count = len(model.model.layers)
    if not -count <= layer < count:
        raise RequestError(f"stop_at_layer is {layer}; the model has {count} blocks")
    return layer % count


def _alike(edited: Tensor, value: Tensor) -> bool:
    """Whether all numbers are the same, NaN among them."""
    if torch.equal(edited, value):
        return True
    return value.is_floating_point() and bool(((edited == value) | (edited.isnan() & value.isnan())).all())


def _positions_kept(kept: Any, tokens: int, paths: Sequence[str]) -> slice | None:
    """The slice that `pos_slice` means. RequestError for positions that there are not, and for modules by their path."""
    if kept is None:
        return None
    if paths:
        raise RequestError(f"pos_slice is for named points, whose axes are known, and {paths[0]} is a module: leave one of "
                           "them out")
    if isinstance(kept, slice):
        try:
            positions = range(tokens)[kept]
        except (TypeError, ValueError) as problem:
            raise RequestError(f"pos_slice is {kept}: {problem}") from problem
        if positions.step < 0 or not positions:
            raise RequestError(f"pos_slice is {kept}, which keeps none of {tokens} positions in their order")
        return kept
    try:
        position = operator.index(kept)
    except TypeError as problem:
        raise RequestError(f"pos_slice is {kept!r}; it must be a position or a slice of them") from problem
    if not -tokens <= position < tokens:
        raise RequestError(f"pos_slice is {position}; there are {tokens} positions")
    return slice(position, position + 1 or None)


def _check_edit(point: Point, value: Tensor, edited: Any) -> None:
    if not isinstance(edited, Tensor):
        raise RequestError(f"the function at {point.name} returned a {type(edited).__name__}; return a tensor or None")
    for what in ("shape", "dtype", "device"):
        wanted, got = getattr(value, what), getattr(edited, what)
        if wanted != got:
            wanted, got = (list(wanted), list(got)) if what == "shape" else (wanted, got)
            raise RequestError(f"the function at {point.name} returned {what} {got}; the model goes on with {wanted}")


def _guard_bytes(model: Any, chosen: Sequence[Point | None], ids: Tensor, cache: Cache | None,
                 kept: slice | None, dtype: torch.dtype | None, max_bytes: int) -> None:
    tokens, past = ids.shape[1], cache.length if cache is not None else 0
    sizes = letter_sizes(model.config) | {
        "B": ids.shape[0], "T": len(range(tokens)[kept]) if kept else tokens, "S": tokens + past,
        "p": (tokens + past) // (getattr(model.config, "indexer_compress_ratio", 0) or 1),
    }  # fmt: skip
    total = 0
    for point in chosen:
        elements = 1
        for letter in point.dims if point and point.dims else "BTH":  # a module by its path: about the hidden size
            elements *= sizes[letter]
        total += elements * _itemsize(point, model.dtype, dtype)
    if total > max_bytes:
        raise RequestError(
            f"these {len(chosen)} activations of {ids.shape[0]} x {tokens} tokens take about {total:,} bytes, over "
            f"max_bytes={max_bytes:,}: name fewer, use pos_slice or stop_at_layer, or raise max_bytes"
        )


def _itemsize(point: Point | None, model_dtype: torch.dtype, kept_as: torch.dtype | None) -> int:
    if point and point.short in ("topk_idx", "rows", "index_blocks"):
        return torch.int64.itemsize
    # Never rounded to half precision in the model:
    if point and point.short in ("scale", "router_probs", "decay", "state", "index_scores"):
        model_dtype = torch.promote_types(model_dtype, torch.float32)
    return (kept_as or model_dtype).itemsize


def _near(name: str, known: Iterable[str]) -> str:
    known = list(dict.fromkeys(known))
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]) or "none"
