"""What every generation's `Model` has in common besides its computation: names on disk, saving, sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import Cache, KVCache
from ..checkpoint import LoadReport
from ..errors import CheckpointError, RequestError
from ..layers import (
    Experts,
    MultiTokenPrediction,
    RMSNorm,
    ShardedEmbedding,
    ZeroCentredRMSNorm,
    expert_parts,
    positions_and_masks,
)
from ..quant.layers import Holder, PackedExperts, PackedSeparately

DRAFT = "mtp."  # what the names of the draft layer's tensors begin with


class LanguageModel(nn.Module):
    """Base of the generations' models: `forward(input_ids, positions, cache) -> logits` is theirs.

    Parameters carry the official checkpoint's names. Where a checkpoint stores a parameter in parts (one tensor per
    expert), `checkpoint_tensors` names the parts; loading and saving are loops over it.
    """

    config: Any  # the generation's own Config
    model: Any  # the decoder: ids to final hidden states
    lm_head: Any  # nn.Linear; None for the files of an embedding model
    ignored: tuple[str, ...] = ()  # regular expressions of checkpoint names that are skipped on purpose

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.mtp: Any = None  # the draft layer, if the checkpoint has one: see `make_mtp`
        self.raw_config: dict[str, Any] = {}  # config.json and generation_config.json as they stood in the folder
        self.generation_config: dict[str, Any] = {}
        self.extra_files: dict[str, bytes] = {}  # the tokenizer and generation files it came with; `save` writes them
        self.load_report: LoadReport | None = None  # what `loading.load` found in the weight files

    def make_cache(self, rewind: int = 0) -> Cache:
        """An empty cache. `rewind`: how many of the last tokens `truncate` must be able to take back, see `RecurrentCache`;
        layers that keep keys always can."""
        raise NotImplementedError

    def make_mtp(self) -> MultiTokenPrediction | None:
        """A draft layer for this model, to be its `mtp`; None if the generation has none."""
        return None

    def __call__(self, *args: Any, **options: Any) -> Any:
        """`forward`, and its hooks. RequestError for the files of an embedding model, which make no logits."""
        if self.lm_head is None:
            raise RequestError("this is an embedding model without an output head, so there are no logits: use qwen_ref.embed, "
                               "or model.model(input_ids) for its states")
        return super().__call__(*args, **options)

    def draft(
        self, hidden: Tensor, input_ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """The draft layer's states, of which `lm_head` makes logits of the tokens after `input_ids`.

        Args:
            hidden: (B, T, H), `model.model`'s output at T tokens, or what this function returned for them.
            input_ids: (B, T) int64, the token that followed each. positions: (B, T), as for `forward`.
            cache: from `make_draft_cache`; holds what was read before.
        Returns: (B, T, H). RequestError if the model has no draft layer.
        """
        if self.mtp is None:
            raise RequestError("this model has no draft layer (MTP): its checkpoint has no tensors named mtp.*")
        x = self.model.embed_tokens(input_ids)
        positions, masks = positions_and_masks(x, positions, cache, {None})
        rope = self.model.rotary_emb(positions, x.dtype)
        return self.mtp(hidden, x, rope, masks[None], cache.layers[0] if cache is not None else None)

    def make_draft_cache(self) -> Cache:
        return Cache([KVCache()])

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations: a norm's, whatever the matrices are stored in."""
        return next(m.weight.dtype for m in self.modules() if isinstance(m, RMSNorm | ZeroCentredRMSNorm))

    @property
    def tied(self) -> dict[str, str]:
        """Checkpoint names that are another tensor again; a file may leave them out."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Official name -> the parameter, or the view of it, that holds this tensor. Packed matrices are not among them."""
        tensors = dict(self._by_official_name((name, parameter.data) for name, parameter in self.named_parameters()))
        for name, table in self.tables():
            tensors |= {f"{name}.{part}": shard for part, shard in table.shards().items()}
        return tensors

    @property
    def constants(self) -> dict[str, Tensor]:
        """Official name -> what a checkpoint repeats although the config determines it; a file must agree, or leave it out."""
        return {}

    def tables(self) -> Iterator[tuple[str, ShardedEmbedding]]:
        """(name, module) of tables of which only rows are read, and which may stay in their files."""
        return ((name, module) for name, module in self.named_modules() if isinstance(module, ShardedEmbedding))

    @property
    def row_read(self) -> set[str]:
        """Official names of the tables' shards."""
        return {f"{name}.{part}" for name, table in self.tables() for part in table.shards()}

    def map_tables(self, views: Mapping[str, Tensor]) -> None:
        """Leave every table in its files whose shards are all among these views of them."""
        for name, table in self.tables():
            names = [f"{name}.{part}" for part in table.shards()]
            if all(shard in views for shard in names):
                table.map([views[shard] for shard in names])

    def official_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(official name, tensor) of an unquantised checkpoint with these weights: `named_weights`, experts one by one."""
        return self._by_official_name(self.named_weights())

    def _by_official_name(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        kinds = (Experts, PackedExperts, PackedSeparately)
        experts = {name for name, module in self.named_modules() if isinstance(module, kinds)}
        tables = dict(self.tables())
        for name, tensor in weights:  # a tied head appears once, as the embedding
            owner, _, part = name.rpartition(".")
            if owner in experts:
                yield from ((f"{owner}.{matrix}", view) for matrix, view in expert_parts(part, tensor))
            elif owner in tables:
                yield from ((f"{owner}.{shard}", view) for shard, view in tables[owner].shards().items())
            else:
                yield name, tensor

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every weight as in an unquantised model: parameters, and packed matrices dequantised.

        Packed ones are made anew, one at a time, in the model's dtype. Without the draft layer, as transformers has it.
        """
        for name, parameter in self.named_parameters():
            if not name.startswith(DRAFT):
                yield name, parameter.data
        for owner, module in self.packed_modules():
            if not owner.startswith(DRAFT):
                for name, tensor in module.plain(self.dtype):
                    yield f"{owner}.{name}", tensor
        for owner, table in self.tables():
            if table.mapped:
                yield f"{owner}.weight", torch.cat(list(table.shards().values()))

    def packed_modules(self) -> Iterator[tuple[str, Holder]]:
        """(name, module) of what holds matrices of few bits, experts as a whole; of a tied pair, the embedding."""
        seen: set[int] = set()
        for name, module in self.named_modules():
            if isinstance(module, Holder) and not module.identity & seen:
                seen |= module.identity
                yield name, module

    def canonical_name(self, name: str) -> str:
        """The name this model knows a checkpoint tensor by. Embedding checkpoints leave out the `model.` prefix."""
        return f"model.{name}" if name.startswith(("embed_tokens.", "layers.", "norm.")) else name

    def disk_name(self, name: str) -> str:
        """The name `save` writes a tensor under: without head, as embedding checkpoints have it."""
        return name.removeprefix("model.") if self.lm_head is None else name

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """A packed embedding that is also the head stays one matrix when the model moves, as a tied parameter does."""
        head, embedding = getattr(self.lm_head, "packed", None), getattr(self.model.embed_tokens, "packed", None)
        super()._apply(fn, recurse)
        if head is not None and head is embedding:
            self.lm_head.packed = self.model.embed_tokens.packed
        return self

    def num_parameters(self) -> int:
        """Of the unquantised model without its draft layer, as transformers counts; a tied head counts once."""
        mapped = sum(table.rows * table.dim for _, table in self.tables() if table.mapped)
        return mapped + self._count(draft=False)

    def num_draft_parameters(self) -> int:
        """Of the draft layer (MTP), which shares embedding and head with the model; 0 if there is none."""
        return self._count(draft=True)

    def _count(self, *, draft: bool) -> int:
        plain = ((name, p.numel()) for name, p in self.named_parameters())
        packed = ((name, module.count) for name, module in self.packed_modules())
        return sum(count for name, count in (*plain, *packed) if name.startswith(DRAFT) == draft)

    def weight_bytes(self) -> int:
        """Bytes of memory that the weights take, mapped or not, as they are held."""
        mapped = sum(t.nbytes for _, table in self.tables() if table.mapped for t in table.shards().values())
        return mapped + sum(p.nbytes for p in self.parameters()) + sum(
            t.nbytes for _, m in self.packed_modules() for t in m.packed_tensors)  # fmt: skip

    def run_with_cache(self, input_ids: Tensor, names_filter: Any = None, **options: Any) -> tuple[Tensor, Any]:
        """(logits, activations by name): see `hooks.run_with_cache` for the options."""
        from .. import hooks

        names_filter = hooks.DEFAULT_FILTER if names_filter is None else names_filter
        return hooks.run_with_cache(self, input_ids, names_filter, **options)

    def run_with_hooks(self, input_ids: Tensor, fwd_hooks: Any, **options: Any) -> Tensor:
        """The logits with functions active at named points: see `hooks.run_with_hooks`."""
        from .. import hooks

        return hooks.run_with_hooks(self, input_ids, fwd_hooks, **options)

    def hooks(self, fwd_hooks: Any) -> Any:
        """A context in which [(name, function), ...] are active in every forward: see `hooks.active`."""
        from .. import hooks

        return hooks.active(self, fwd_hooks)

    def list_hooks(self) -> list[str]:
        """The names of all points, in the order in which they are computed; `hook_points.points` says what each is."""
        from ..hook_points import points

        return list(points(self))

    def fuse(self) -> LanguageModel:
        """The same model in fewer and larger steps, for speed: see `fuse.fuse`. This one goes on as it was."""
        from ..fuse import fuse

        return fuse(self)

    def save(self, folder: str | Path) -> None:
        """Write config.json, the weights and the tokenizer files to a new folder that transformers loads.

        CheckpointError if the model is quantised, or if the folder exists and is not empty; a failure leaves nothing behind.
        """
        from ..checkpoint import save_model

        if packed := [name for name, module in self.named_modules() if hasattr(module, "packed_tensors")]:
            raise CheckpointError(f"{packed[0]} is packed, and `save` writes plain weights: use `quantize` on the model it was "
                                  "made from, or `load_model(..., dequantize=True)` and save that")
        dtype = str(self.dtype).removeprefix("torch.")
        draft = {} if self.mtp is None else {"mtp_num_hidden_layers": 1}
        marks = {name: id for name, id in self.raw_config.items() if name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = {**self.config.to_json(), **marks, **draft, "dtype": dtype, "torch_dtype": dtype}
        save_model(self, config, Path(folder), extra=self.extra_files)
