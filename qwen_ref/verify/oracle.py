"""The oracle: transformers' model on the same weights, and the activations of both sides under one set of names.

Names are those of `hook_points`, and two of our own for the rotary tables. Ours are seen through `hooks`; transformers'
through PyTorch hooks on the modules of the same official paths, so nothing of our arithmetic takes part in its numbers.

This is the only module of the package that imports transformers, and only when it runs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend, hook_points, hooks
from ..errors import RequestError
from ..hook_points import Point
from ..models.common import LanguageModel

ROTARY = "model.rotary_emb"
_EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
# What transformers never has as a tensor of its own: masked scores, one head's share of o_proj, the inside of a norm.
_UNSEEN = ("hook_attn_scores", "hook_result", "hook_scale", "hook_normalized", "hook_router_probs", "hook_read",
           "hook_index_q", "hook_index_k", "hook_index_scores", "hook_index_blocks")
_DELTA = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")  # transformers' functions, by module


def require() -> Any:
    """The transformers module, its logging silenced. RequestError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise RequestError(
            "this compares with transformers, which is not installed: pip install transformers, or compare with an "
            "oracle file that was written where it is (verify --against FILE)"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def check_knows(model_type: str) -> None:
    """RequestError if transformers has no model of this type."""
    if model_type not in require().CONFIG_MAPPING:
        raise RequestError(f"transformers has no model of model_type {model_type!r} to compare with (its code came with the "
                           "checkpoints): L1 and L5 need no other side, levels=\"L1,L5\"")


def config_of(raw: dict[str, Any]) -> Any:
    """transformers' config object for the fields of a config.json."""
    fields = {key: value for key, value in raw.items() if key != "model_type"}
    return require().AutoConfig.for_model(raw["model_type"], **fields)


def build(
    source: LanguageModel | Path, ours: LanguageModel, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """transformers' model with eager attention and eager experts, evaluating.

    Args:
        source: a checkpoint folder, which transformers reads itself; or a model, whose weights are copied over.
        ours: the model it will be compared with; without a head, the oracle has none either.
    """
    auto, options = require().AutoModelForCausalLM, {**_EAGER, "dtype": dtype}
    if isinstance(source, LanguageModel):
        model = auto.from_config(config_of(source.config.to_json()), **options)
        weights = dict(source.named_weights())
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.data.copy_(weights[name])
            elif not (name == "lm_head.weight" and source.lm_head is None):
                raise RequestError(f"transformers' model has {name}, which ours does not: there is nothing to copy into it")
    else:
        model = auto.from_pretrained(source, local_files_only=True, **options)
    if ours.lm_head is None:
        model.lm_head = None
    return model.to(device).eval().requires_grad_(False)


def skeleton(folder: Path, ours: LanguageModel, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """transformers' model of a folder's config.json on the meta device: no weight has memory, the rotary table has."""
    transformers = require()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, **_EAGER, dtype=dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)  # the one buffer no file holds
    if ours.lm_head is None:
        model.lm_head = None
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------- what is compared


def points(model: nn.Module) -> dict[str, Point]:
    """The points both sides can show, in the order in which they are computed; `model` may be either side's."""
    found = {}
    for name, point in hook_points.points(model).items():
        inside_rule = point.place == "gated_delta_rule" and point.short in ("pattern", "state")
        if not name.endswith(_UNSEEN) and not inside_rule:
            found[name] = point
        if name == "hook_embed":
            found.update({f"rotary.hook_{table}": Point(f"rotary.hook_{table}", ROTARY, "output", "BTR", call=i)
                          for i, table in enumerate(("cos", "sin"))})
    return found


def meaning(name: str, model: nn.Module) -> str:
    """The official path of the module a name belongs to."""
    return points(model)[name].path


def capture_ours(model: LanguageModel, ids: Tensor, positions: Tensor | None = None) -> dict[str, Tensor]:
    """Our activations of ids (B, T) by name, every operation eager; positions as `model.forward` has them."""
    with recording_ours(model, points(model)) as acts, torch.no_grad():
        model(ids, positions)
    return in_order(acts, points(model))


def capture_theirs(model: nn.Module, ids: Tensor, positions: Tensor | None = None) -> dict[str, Tensor]:
    """transformers' activations of ids (B, T) by name, in the shapes of `capture_ours`."""
    placed = {} if positions is None else {
        "attention_mask": (positions >= 0).expand_as(ids).long(), "position_ids": positions.clamp_min(0)}
    run: Any = model if model.lm_head is not None else model.model
    with recording_theirs(model, points(model)) as acts, torch.no_grad():
        run(ids, use_cache=False, **placed)
    return in_order(acts, points(model))


def in_order(acts: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Activations in the order of their names, all of them; RequestError if one was never seen."""
    if absent := [name for name in names if name not in acts]:
        raise RequestError(
            f"{len(absent)} activations were not seen, first {absent[0]}: a module was replaced or never called, or this "
            "version of transformers computes it elsewhere; the tested ones are in constraints.txt"
        )
    return {name: acts[name] for name in names}


@contextmanager
def recording_ours(model: LanguageModel, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """While active, a dict that fills with copies of the activations our model computes."""
    acts: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Point) -> None:
        acts[hook.name] = value  # `hooks` gives a copy

    def keep_tables(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        acts["rotary.hook_cos"], acts["rotary.hook_sin"] = output

    inside = [name for name in names if not name.startswith("rotary.")]
    with ExitStack() as stack:
        stack.enter_context(backend.use("eager"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # that the pattern is computed eagerly is meant here
        stack.callback(model.model.rotary_emb.register_forward_hook(keep_tables).remove)
        if inside:
            stack.enter_context(hooks.active(model, [(inside, keep)]))
        yield acts


# ------------------------------------------------------------------------------------------------- transformers' side


@contextmanager
def recording_theirs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """While active, a dict that fills with copies of the activations transformers' model computes."""
    known = points(model)
    recorder = _Recorder([known[name] for name in names], model.config)
    with ExitStack() as stack:
        for path, hook in recorder.before():
            stack.callback(model.get_submodule(path).register_forward_pre_hook(hook).remove)
        for path, hook in recorder.after():
            stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        module = sys.modules[type(model).__module__]
        stack.enter_context(_replaced(module, "apply_rotary_pos_emb", recorder.on_rotation))
        for rule in (name for name in _DELTA if hasattr(module, name)):
            stack.enter_context(_replaced(module, rule, recorder.on_delta_rule))
        yield recorder.acts


class _Recorder:
    """Reads points off transformers' modules, in the shapes our hooks show."""

    def __init__(self, wanted: list[Point], config: Any) -> None:
        self.wanted, self.streams = wanted, getattr(config, "hc_count", 1)
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.acts: dict[str, Tensor] = {}
        self.layer, self.lead = "", torch.Size()  # the block that runs, and (B, T), which a mixture of experts flattens

    def before(self) -> Iterator[tuple[str, Callable[..., None]]]:
        for layer in dict.fromkeys(point.layer for point in self.wanted if point.layer is not None):
            yield f"model.layers.{layer}", self._enter(f"blocks.{layer}")
        for point in self.wanted:
            path, end, index = _source(point)
            if end == "input":
                yield path, self._on_input(point, index)

    def after(self) -> Iterator[tuple[str, Callable[..., None]]]:
        for point in self.wanted:
            path, end, index = _source(point)
            if end == "output":
                yield path, self._on_output(point, index)

    def on_rotation(self, rotate: Callable[..., tuple[Tensor, Tensor]], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rotated = rotate(*args, **kwargs)
        if isinstance(rotated, Tensor):  # an indexer's, one query at a time
            return rotated
        for point in self.wanted:
            if point.place == "rope" and point.name.startswith(f"{self.layer}."):
                self._keep(point, rotated[point.call].transpose(1, 2))  # (B, N, T, D) -> (B, T, N, D)
        return rotated

    def on_delta_rule(self, rule: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = rule(*args, **kwargs)
        q, k, v = args
        seen = {"q": q, "k": k, "v": v, "decay": kwargs["g"].exp(), "beta": kwargs["beta"], "out": out[0]}
        for point in self.wanted:
            if point.place == "gated_delta_rule" and point.name.startswith(f"{self.layer}."):
                self._keep(point, seen[point.short])
        return out

    def _enter(self, layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.layer, self.lead = layer, args[0].shape[:2]

        return hook

    def _on_input(self, point: Point, index: int) -> Callable[..., None]:
        return lambda module, args: self._keep(point, args[index])

    def _on_output(self, point: Point, index: int) -> Callable[..., None]:
        return lambda module, args, output: self._keep(point, output if isinstance(output, Tensor) else output[index])

    def _keep(self, point: Point, value: Tensor) -> None:
        if point.part is not None:
            value = point.part(value)
        elif point.dims in ("BTND", "BTKD") and value.dim() == 3:
            value = value.unflatten(-1, (-1, self.head_dim))
        elif point.dims == "BTsH" and value.dim() == 3:  # transformers keeps the streams side by side
            value = value.unflatten(-1, (self.streams, -1))
        elif point.path.endswith("linear_attn.norm"):  # transformers flattens the heads before this norm
            value = value.unflatten(0, (*self.lead, -1))
        elif value.dim() == 2:
            value = value.unflatten(0, self.lead)
        self.acts[point.name] = value.detach().clone()


def _source(point: Point) -> tuple[str, str, int]:
    """Where transformers shows a point: module, "input" or "output" or "rope", and which element of a tuple."""
    elsewhere = {
        "pattern": (point.path, "output", 1),  # attention returns (out, probabilities)
        "z": (f"{point.path}.o_proj", "input", 0) if point.place == "attention" else (point.path, point.place, 0),
        "gate": (point.path, "input", 1) if point.place == "gated_rms_norm" else (point.path, point.place, 0),
        "attn_inject": (f"{point.path}.attn_hyper_connection", "output", 2),  # which returns (mixture, streams, gains)
        "mlp_inject": (f"{point.path}.mlp_hyper_connection", "output", 2),
        "topk_weights": (f"{point.path}.gate", "output", 1),  # the router returns (logits, weights, indices)
        "topk_idx": (f"{point.path}.gate", "output", 2),
    }
    end = {"residual": "input"}.get(point.place, point.place)
    return elsewhere.get(point.short, (point.path, end, point.call))


@contextmanager
def _replaced(module: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """For a while, `module.name(...)` is `wrapper(the real one, ...)`."""
    real = getattr(module, name)
    setattr(module, name, partial(wrapper, real))
    try:
        yield
    finally:
        setattr(module, name, real)
