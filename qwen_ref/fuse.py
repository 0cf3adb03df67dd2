"""A loaded model in fewer and larger steps: the same weights, caches and logits, but for the rounding of larger products.

    fast = model.fuse()
    qr.generate(fast, tokenizer, "Once upon a time")

Reading one token costs as many calls as reading a thousand. So projections of one input become one product, a residual
sum goes with the norm that reads it, and the norms of q and k and their rotation with the write into the cache: what is
15 operations, two sums and two copies in a layer of Qwen3 is 9 operations here. What a Gated DeltaNet does with one token
between its projections is one operation, which writes the state where it was. Each is one of `backend`, so it runs on
whatever is chosen there; `backend.use("cpp")` and `backend.use("triton")` have all of them.

With cpp, a pass of one token for every sequence is also recorded, once for every cache, and from then on is one call: the
calls of `cpp.library`, made again with the same memory. What Python and PyTorch did between them took as long as a fast
product. So is a pass of a few tokens that a hybrid, or its draft layer, reads as guesses, for each number of them (up to 4
where there are experts). Another choice in `backend`, a hook, or a cache that has grown: it is recorded anew, or runs as ever.

The model itself goes on as it was, and nothing is held twice: where matrices are joined, its own become views of the
joined one. So it is the one to save and to hook (a fused pass does not pass by a hook in silence); and once it was moved
or converted, it has to be fused again. A fused model only runs, without gradients.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from . import backend, layers, memory
from .cache import Cache, KVCache, RecurrentCache
from .cpp.library import Tape
from .errors import RequestError
from .layers import Linear, RMSNorm, ZeroCentredRMSNorm, positions_and_masks
from .models import qwen2, qwen3, qwen3_5, qwen3_next
from .models.common import LanguageModel
from .quant.format import Matrix
from .quant.layers import PackedLinear, joined
from .quant.packed import Packed, rows

ATTENTIONS = (qwen2.Attention, qwen3.Attention, qwen3_next.Attention, qwen3_5.Attention)
DELTA_NETS = (qwen3_next.GatedDeltaNet, qwen3_5.GatedDeltaNet)
Held: TypeAlias = list[list[tuple[Tensor, ...]]]  # of every layer: the room for keys and values, or the states before and after
MOST_RECORDED = 8  # tokens of a pass
MOST_STEPS = 8  # records of a cache
MIXTURES = (qwen2.SparseMoE, qwen3_next.SparseMoE, qwen3_5.SparseMoE)


class Place(NamedTuple):
    """Where a pass of M = B T tokens stands in a layer of attention."""

    rope: tuple[Tensor, Tensor]  # cos, sin: (M, R)
    room: Tensor  # for keys and values: (2, B, K, capacity, D)
    slots: Tensor  # of each token in it, (M,)
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]  # q (M, N, D) and what is in the room -> (B, T, N, D) or (M, N, D)


class State(NamedTuple):
    """What a pass of T tokens finds in a layer of a Gated DeltaNet."""

    real: Tensor | None  # (B, T), False for padding; None = all are
    cache: RecurrentCache | None
    states: Sequence[tuple[Tensor, ...]] = ()  # of tokens whose cache is elsewhere: what its `ahead` has given

    def stepwise(self, count: int) -> bool:
        """Whether there is a state, and the cache takes so many tokens one by one."""
        return bool(self.states) or (self.cache is not None and self.cache.state is not None and _steps(self.cache, count))


class Together(nn.Module):
    """Projections of one input: one product where one matrix can hold them all, else one after the other."""

    def __init__(self, *projections: nn.Module) -> None:
        super().__init__()
        widths = [projection.out_features for projection in projections]
        self.spans = list(zip(accumulate(widths, initial=0), widths, strict=False))  # the last start is the end of all
        self.whole = _join(projections)
        self.parts = nn.ModuleList(projections if self.whole is None else ())

    def forward(self, x: Tensor) -> list[Tensor]:  # (..., H) -> (..., width) of each
        if self.whole is None:
            return [part(x) for part in self.parts]
        y = self.whole(x)
        return [y.narrow(-1, start, width) for start, width in self.spans]


class MLP(nn.Module):
    """`layers.MLP`: down(silu(gate(x)) * up(x))."""

    def __init__(self, mlp: layers.MLP) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = Together(mlp.gate_proj, mlp.up_proj), mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:  # (..., H) -> (..., H)
        return self.down_proj(backend.swiglu(*self.gate_up_proj(x)))


class SparseMoE(nn.Module):
    """Experts, and the one that every token passes."""

    def __init__(self, moe: Any) -> None:
        super().__init__()
        self.top_k, self.normalize, self.gate, self.experts = moe.top_k, moe.normalize, moe.gate, moe.experts
        self.shared_expert, self.shared_expert_gate = MLP(moe.shared_expert), moe.shared_expert_gate

    def forward(self, x: Tensor) -> Tensor:  # (B, T, H) -> (B, T, H)
        tokens = x.flatten(0, 1)  # (M, H)
        routed = self.experts(tokens, *backend.router_topk(self.gate(tokens), self.top_k, self.normalize))  # (M, H)
        return backend.sigmoid_gate(self.shared_expert(tokens), self.shared_expert_gate(tokens), routed).view_as(x)


class Attention(nn.Module):
    """Grouped-query attention, with the norms of queries and keys and the output gate where the generation has them."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.head_dim = attention.head_dim
        self.gated = isinstance(attention, qwen3_next.Attention | qwen3_5.Attention)
        self.qkv_proj = Together(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = attention.o_proj
        self.q_norm: Any = getattr(attention, "q_norm", None)
        self.k_norm: Any = getattr(attention, "k_norm", None)

    def forward(self, x: Tensor, place: Place) -> Tensor:  # (B, T, H) -> (B, T, H)
        q, k, v = (part.view(x.shape[:2].numel(), -1, self.head_dim) for part in self.qkv_proj(x))  # (M, N or K, D)
        if self.gated:
            q, gate = q.unflatten(1, (-1, 2)).unbind(2)  # (M, N, D) each: the rows of a head, then those of its gate
        norms = (None, None, 0.0) if self.q_norm is None else (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        keys, values = place.room.unbind()
        q = backend.norm_rope_write(q, k, v, *norms, *place.rope, keys, values, place.slots, self.gated)  # (M, N, D)
        out = place.attend(q, keys, values)
        if self.gated:
            out = backend.sigmoid_gate(out.reshape(q.shape), gate)
        return self.o_proj(out.reshape(*x.shape[:2], -1))  # (B, T, H)


class GatedDeltaNet(nn.Module):
    """One token in one operation between the projections, and so each of a few that the cache is to remember the state after;
    more of them, or with a hook on what that replaces, as the model has it."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self._orders: list[Tensor] = _orders(net) if isinstance(net, qwen3_next.GatedDeltaNet) else []  # of columns
        self._replaced = _hooks_of((net, net.conv1d, net.norm))

    def forward(self, x: Tensor, state: State) -> Tensor:  # (B, T, H) -> (B, T, H)
        net, count = self.net, x.shape[1]
        if any(self._replaced) or not state.stepwise(count):
            return net(x, state.real, state.cache)
        if state.real is not None:
            x = x * state.real[..., None]
        parts, states = self._project(x), state.states or state.cache.ahead(count)  # type: ignore[union-attr]
        outs = []
        for t, (before, after) in enumerate(pairwise(states)):
            if after is not before:
                for mine, last in zip(after, before, strict=True):
                    mine.copy_(last)
            outs.append(self._step(after, *(part[:, t] for part in parts)))  # (B, P Dv)
        if state.cache is not None:
            state.cache.follow(states)
        return net.out_proj(_side_by_side(outs))

    def _step(self, state: Sequence[Tensor], mixed: Tensor, z: Tensor, b: Tensor, a: Tensor) -> Tensor:
        """One token, (B, C), (B, P, Dv), (B, P) twice -> (B, P Dv); its state is written over the one before."""
        net, (window, memory) = self.net, state
        return backend.gated_delta_step(mixed, window, net.conv1d.weight[:, 0], a, b, net.A_log, net.dt_bias, z,
                                        net.norm.weight, net.norm.eps, memory, net.norm.activation)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:  # (B, T, H) -> (B, T, C), (B, T, P, Dv), (B, T, P) twice
        """`net.project`; where it puts columns in order, in one operation for each projection."""
        net = self.net
        if not self._orders:
            return net.project(x)
        of_rows, of_gates = self._orders
        mixed, z = backend.take_columns(net.in_proj_qkvz(x), of_rows).split([sum(net.parts), net.parts[2]], dim=-1)
        b, a = backend.take_columns(net.in_proj_ba(x), of_gates).chunk(2, dim=-1)
        return mixed, z.unflatten(-1, (-1, net.value_dim)), b, a


def _orders(net: qwen3_next.GatedDeltaNet) -> list[Tensor]:
    """Where the columns of q|k|v|z and of b|a stand in what the two projections give."""
    device = net.A_log.device
    qkvz, ba = (torch.arange(part.out_features, device=device) for part in (net.in_proj_qkvz, net.in_proj_ba))
    mixed, z, b, a = net.arrange(qkvz[None, None], ba[None, None])
    return [torch.cat((mixed.flatten(), z.flatten())), torch.cat((b.flatten(), a.flatten()))]


class Block(nn.Module):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`, each sum made together with the norm that reads it next."""

    def __init__(self, block: Any, following: RMSNorm | ZeroCentredRMSNorm) -> None:
        super().__init__()
        self.linear = isinstance(_mixer(block), DELTA_NETS)
        self.mixer = GatedDeltaNet(block.linear_attn) if self.linear else Attention(block.self_attn)
        self.post_attention_layernorm, mlp = block.post_attention_layernorm, block.mlp
        self.mlp = MLP(mlp) if isinstance(mlp, layers.MLP) else SparseMoE(mlp) if isinstance(mlp, MIXTURES) else mlp
        self.following = following  # of the next block, or the last of all

    def forward(self, x: Tensor, normed: Tensor, place: Place | State) -> tuple[Tensor, Tensor]:
        """The residual stream and its norm, (B, T, H) each -> the same two for the next block."""
        x, normed = _add_norm(self.mixer(normed, place), x, self.post_attention_layernorm)
        return _add_norm(self.mlp(normed), x, self.following)


class Stack(nn.Module):
    """Blocks, one after the other."""

    def __init__(self, blocks: Sequence[Any], last: RMSNorm | ZeroCentredRMSNorm, windows: Sequence[int | None]) -> None:
        super().__init__()
        self.windows = windows
        self.norm = blocks[0].input_layernorm
        self.layers = nn.ModuleList(map(Block, blocks, [*(block.input_layernorm for block in blocks[1:]), last]))
        attention = next((block.self_attn for block in blocks if hasattr(block, "self_attn")), None)
        self.head_dim = 1 if attention is None else attention.head_dim
        self.kv_heads = 1 if attention is None else attention.k_proj.out_features // self.head_dim
        self.guesses = any(block.linear for block in self.layers)  # whether passes of a few tokens come again and again

    def watch(self, replaced: nn.Module, *norms: nn.Module) -> None:
        """Mind the hooks of all modules here, and of those of `replaced` that are not called: of norms other than these only
        the weight is read, for they go with a sum or a rotation."""
        mine = set(self.modules())
        called = {module for module in mine if not isinstance(module, RMSNorm | ZeroCentredRMSNorm)}.union(norms)
        self._hooks = _hooks_of(mine)
        self._skipped = _hooks_of(module for module in replaced.modules() if module not in called)

    @torch.no_grad()
    def read(self, x: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], masks: Mapping[int | None, Tensor | None],
             cache: Cache | None) -> Tensor:  # fmt: skip
        """(B, T, H) -> (B, T, H), normed; positions, tables and masks as `layers.place` and `layers.Rotary` give them."""
        if any(self._skipped):
            raise RequestError("the model this one was made of has hooks on modules that a fused pass has not: run that model "
                               "itself while they are there")
        cos, sin = (table.expand(x.shape[0], -1, -1).flatten(0, 1) for table in rope)  # (M, R)
        if cache is not None and set(self.windows) == {None} and masks[None] is None and self._steps_through(x, cache):
            y = self._recorded(x, cos, sin, cache)
            if y is not None:
                return y
        real = None if masks[self.windows[0]] is None else positions >= 0  # (B, T)
        new = self._new_keys(x)
        slots = lru_cache(partial(_slots, x))  # which layers share

        def places() -> Iterator[Place | State]:
            for i, (block, window) in enumerate(zip(self.layers, self.windows, strict=True)):
                layer = cache.layers[i] if cache is not None else None
                if block.linear:
                    yield State(real, layer)
                else:
                    attend = partial(_attend, batch=x.shape[0], mask=masks[window], cache=layer)
                    if layer is not None and layer.window is None:
                        room, start = layer.reserve(new), layer.length
                    else:
                        room, start = new.new_empty(2, *new.shape), 0  # what slides has no room ahead
                    yield Place((cos, sin), room, slots(start, room.shape[3]), attend)

        return self._through(x, places())

    def _through(self, x: Tensor, places: Iterable[Place | State]) -> Tensor:  # (B, T, H) -> (B, T, H)
        normed = self.norm(x)
        for block, here in zip(self.layers, places, strict=True):
            x, normed = block(x, normed, here)
        return normed

    def _new_keys(self, x: Tensor) -> Tensor:  # (B, T, H) -> (B, K, T, D)
        """One layer's new keys, as to shape and type."""
        return x.new_empty(1).expand(x.shape[0], self.kv_heads, x.shape[1], self.head_dim)

    def _steps_through(self, x: Tensor, cache: Cache) -> bool:
        """Whether x (B, T, H) is a token of every sequence, or a few of one, as guesses are read, that leave a state each."""
        rows, count = x.shape[:2]
        states = [layer for block, layer in zip(self.layers, cache.layers, strict=True) if block.linear]
        if any(layer.state is None or not _steps(layer, count) for layer in states):
            return False
        return count == 1 or (rows == 1 and 1 < count <= MOST_RECORDED and self.guesses)

    def _recorded(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor | None:
        """The pass of such tokens, (B, T, H) -> (B, T, H), recorded the first time; None if it cannot be.

        All its shapes are those of the pass before. So where cpp has all the operations, they are made in one call, without
        what Python and PyTorch cost between them.
        """
        choices = backend.choices()
        if choices is None or any(self._hooks) or backend.attention_decode.resolve(x.device, x.dtype).name != "cpp":
            return None
        new, (rows, count) = self._new_keys(x), x.shape[:2]
        layers = list(zip(self.layers, cache.layers, strict=True))
        held: Held = [layer.ahead(count) if block.linear else [(layer.reserve(new),)] for block, layer in layers]
        rooms = [of[0][0] for (block, _), of in zip(layers, held, strict=True) if not block.linear]  # (2, B, K, capacity, D)
        states = [state for (block, _), of in zip(layers, held, strict=True) if block.linear for state in of]
        places = {(layer.length, layer.reserve(new).shape[3]) for block, layer in layers if not block.linear}
        if len(places) != 1:
            return None
        lengths = torch.arange(cache.length + 1, cache.length + 1 + count, dtype=torch.int32).repeat(rows)  # (M,)
        (place,), moving = places, [tensor for state in states for tensor in state]
        inputs = (x, cos, sin, _slots(x, *place), lengths)
        in_place = any(before is after for before, after in pairwise(states))
        step = next((step for step in cache.steps if step.serves(self, rooms, in_place, choices, x)), None)
        if step is None:
            tape = Tape(partial(self._decode, held), *inputs, movable=moving)
            step, y = Step(tape, self, rooms, in_place, choices, x.dtype, x.shape), tape.output()
        elif step.tape.whole:
            y = step.tape.replay(*inputs, movable=moving)
        else:
            return None
        if not cache.steps or cache.steps[-1] is not step:
            cache.steps = [*(other for other in cache.steps if other is not step and other.is_beside(step)), step][-MOST_STEPS:]
        for (block, layer), of in zip(layers, held, strict=True):
            layer.follow(of) if block.linear else layer.extend(count)
        return y

    def _decode(self, held: Held, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
        attend = partial(_attend_decoding, lengths=lengths)
        return self._through(x, (State(None, None, of) if block.linear else Place((cos, sin), of[0][0], slots, attend)
                                 for block, of in zip(self.layers, held, strict=True)))  # fmt: skip


class Step(NamedTuple):
    """What is recorded of a pass over a cache."""

    tape: Tape
    stack: Stack
    rooms: list[Tensor]  # for keys and values, of every layer that has them
    in_place: bool  # whether states are written over
    choices: tuple[Any, ...]
    dtype: torch.dtype
    shape: torch.Size

    def serves(self, stack: Stack, rooms: list[Tensor], in_place: bool, choices: tuple[Any, ...], x: Tensor) -> bool:
        """Whether it is of these blocks and this very memory, and the same operations would run. (States may move.)"""
        mine, others = (self.stack, self.in_place, self.dtype, self.shape), (stack, in_place, x.dtype, x.shape)
        return mine == others and self.choices == choices and all(a is b for a, b in zip(self.rooms, rooms, strict=True))

    def is_beside(self, other: Step) -> bool:
        """Whether it is of the same blocks, with keys in the same memory: else it would keep what nobody uses any more."""
        return self.stack is other.stack and all(a is b for a, b in zip(self.rooms, other.rooms, strict=True))


class Decoder(Stack):
    """Token ids to final hidden states."""

    def __init__(self, decoder: Any) -> None:
        blocks = list(decoder.layers)
        super().__init__(blocks, decoder.norm, getattr(decoder, "windows", [None] * len(blocks)))
        self.embed_tokens, self.rotary_emb = decoder.embed_tokens, decoder.rotary_emb
        self.watch(decoder, self.norm)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)  # (B, T, H)
        positions, masks = positions_and_masks(x, positions, cache, set(self.windows))  # (B or 1, T)
        return self.read(x, positions, self.rotary_emb(positions, x.dtype), masks, cache)


class MultiTokenPrediction(Stack):
    """The draft layer."""

    def __init__(self, mtp: layers.MultiTokenPrediction) -> None:
        super().__init__(list(mtp.layers), mtp.norm, [None])
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.fc = mtp.pre_fc_norm_embedding, mtp.pre_fc_norm_hidden, mtp.fc
        self.guesses = True
        self.watch(mtp, self.norm, self.pre_fc_norm_embedding, self.pre_fc_norm_hidden)

    def forward(self, hidden: Tensor, embedded: Tensor, *where: Any) -> Tensor:
        """States of t and embeddings of t + 1, (B, T, H) each, and what else `read` takes -> (B, T, H)."""
        x = torch.cat((self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)), dim=-1)  # (B, T, 2 H)
        return self.read(self.fc(x), *where)


class Fused(LanguageModel):
    """A model to be called, and given to `generate`, as the one it was made of."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model.config)
        self.model, self.lm_head, self.make_cache = Decoder(model.model), model.lm_head, model.make_cache  # type: ignore[method-assign]
        self.mtp = None if model.mtp is None else MultiTokenPrediction(model.mtp)
        self.raw_config, self.generation_config, self.extra_files = model.raw_config, model.generation_config, model.extra_files

    @torch.no_grad()
    def forward(self, input_ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Next-token logits of every position, as the model's own `forward` gives them, and without gradients."""
        return self.lm_head(self.model(input_ids, positions, cache))

    @torch.no_grad()
    def draft(
        self, hidden: Tensor, input_ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        if self.mtp is None:
            return super().draft(hidden, input_ids, positions, cache)  # which says so
        x = self.model.embed_tokens(input_ids)  # (B, T, H)
        positions, masks = positions_and_masks(x, positions, cache, {None})  # (B or 1, T)
        return self.mtp(hidden, x, positions, self.model.rotary_emb(positions, x.dtype), masks, cache)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        raise RequestError("a fused model's matrices are joined and have no official names; save the model it was made of")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise RequestError("a fused model shares its memory with the model it was made of; move or convert that one first, "
                           "then fuse it again")


def fuse(model: LanguageModel) -> Fused:
    """The model in fewer steps, see above. Plain or quantised, dense or mixture of experts, Qwen2 to Qwen3.6.

    RequestError for the other generations, and for dual chunk attention.
    """
    if not all(type(_mixer(block)) in ATTENTIONS + DELTA_NETS for block in model.model.layers):
        raise RequestError(f"{type(model).__module__.rpartition('.')[2]} cannot be fused: only models whose every layer has "
                           "the attention of Qwen2 to Qwen3.6, or their Gated DeltaNet, can")
    fused = Fused(model).eval()
    with suppress(OSError, AttributeError, TypeError):  # glibc keeps what was freed between what is held, until it is asked
        ctypes.CDLL(None).malloc_trim(0)
    return fused


def _hooks_of(modules: Iterable[nn.Module]) -> list[dict[int, Any]]:
    """What is empty as long as nobody watches one of these."""
    return [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def _mixer(block: Any) -> nn.Module | None:
    """What of a layer mixes tokens."""
    return getattr(block, "linear_attn", None) or getattr(block, "self_attn", None)


def _steps(cache: RecurrentCache, count: int) -> bool:
    """Whether so many tokens are taken one by one."""
    return all(piece.stop - piece.start == 1 for piece in cache.pieces(count))


def _side_by_side(tokens: list[Tensor]) -> Tensor:
    """T times (B, W) -> (B, T, W), by copies, which a tape holds."""
    if len(tokens) == 1:
        return tokens[0][:, None]
    out = tokens[0].new_empty(tokens[0].shape[0], len(tokens), tokens[0].shape[1])
    for t, token in enumerate(tokens):
        out[:, t].copy_(token)
    return out


def _slots(x: Tensor, start: int, capacity: int) -> Tensor:
    """The places of the tokens x (B, T, H) from `start` on in a buffer with `capacity` for each sequence, (B T,)."""
    tokens = torch.arange(start, start + x.shape[1], device=x.device)
    return (torch.arange(x.shape[0], device=x.device)[:, None] * capacity + tokens).flatten()


def _attend(q: Tensor, keys: Tensor, values: Tensor, batch: int, mask: Tensor | None, cache: KVCache | None) -> Tensor:
    """Of a chunk: q (M, N, D) -> (B, T, N, D). The new keys and values are in the cache, unless it slides."""
    q = q.unflatten(0, (batch, -1)).transpose(1, 2)  # (B, N, T, D)
    if cache is not None and cache.window is not None:
        keys, values = cache.append(keys, values)  # (B, K, S, D)
    elif cache is not None:
        cache.extend(q.shape[2])
        keys, values = cache.held()  # (B, K, S, D)
    return backend.attention(q, keys, values, mask).transpose(1, 2)


def _attend_decoding(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:  # (M, N, D) -> (M, N, D)
    """Every token as the last of a sequence; of one sequence, they share the room."""
    return backend.attention_decode(q, *(room.expand(len(q), -1, -1, -1) for room in (keys, values)), lengths)


def _add_norm(x: Tensor, residual: Tensor, norm: RMSNorm | ZeroCentredRMSNorm) -> tuple[Tensor, Tensor]:
    """The sum, and its norm."""
    return backend.add_rms_norm(x, residual, norm.weight, norm.eps, isinstance(norm, ZeroCentredRMSNorm))


def _join(projections: Sequence[Any]) -> nn.Module | None:
    """One projection that stands for all of them, whose weights become views of its; None if there can be none."""
    if any((p.bias is None) != (projections[0].bias is None) for p in projections):
        return None
    biased = projections[0].bias is not None
    bias = nn.Parameter(torch.cat([p.bias.data for p in projections]), requires_grad=False) if biased else None
    kinds = {type(p) for p in projections}
    join: Any = _join_plain if kinds == {Linear} else _join_packed if kinds == {PackedLinear} else None
    whole = None if join is None else join(projections, bias)
    if whole is not None and bias is not None:
        for projection, part in zip(projections, bias.data.split([p.out_features for p in projections]), strict=True):
            projection.bias.data = part
    return whole


def _join_plain(projections: Sequence[Linear], bias: nn.Parameter | None) -> Linear | None:
    if len({(p.weight.dtype, p.weight.device) for p in projections}) > 1:
        return None
    weight = memory.cat([p.weight.data for p in projections])  # (N, H)
    whole = Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    whole.weight, whole.bias = nn.Parameter(weight, requires_grad=False), bias  # type: ignore[assignment]
    for projection, part in zip(projections, weight.split([p.out_features for p in projections]), strict=True):
        projection.weight.data = part
    return whole


def _join_packed(projections: Sequence[PackedLinear], bias: nn.Parameter | None) -> PackedLinear | None:
    """Where all are in one layout; those of a GGUF file may not be, and act-order shuffles each in its own way."""
    first = projections[0]
    if any(p.order is not None or p.dynamic != first.dynamic for p in projections):
        return None
    packed: Packed | None = first.packed
    for p in projections[1:]:
        packed = None if packed is None else joined(packed, p.packed)
    if packed is None or not all(_same_form(packed, p.packed) for p in projections):
        return None
    whole = PackedLinear(Matrix(packed), (sum(p.out_features for p in projections), first.in_features), bias)
    whole.dynamic = first.dynamic
    start = 0
    for projection in projections:
        projection.packed = rows(packed, start, start + projection.out_features)
        start += projection.out_features
    return whole


def _same_form(whole: Packed, part: Packed) -> bool:
    """Whether rows of the one are the other, and not only equal to it, as where scales of other blocks or tables are."""
    for name, a in whole._asdict().items():
        b = getattr(part, name)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if name == "table" and not torch.equal(a, b):
                return False
        elif a != b:
            return False
    return True
