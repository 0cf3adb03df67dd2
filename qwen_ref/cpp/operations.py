"""The operations of library.cpp, as `backend.use("cpp")` chooses them together: what a CPU with AVX2 does in fewer steps.

Products with packed matrices are what they are made for, and the default there. What lies between the products costs a token
as much as int4's products do if it runs as many small calls. Each rounds where its formula does, except that attention rounds
only its result. What an operation has not (a mask, gradients, other types) goes to PyTorch.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .. import ops, torch_ops
from ..memory import empty, scratch
from ..quant import packed
from ..quant.blocked import linear_blocked
from ..quant.gguf_blocks import BLOCK, GRIDS, grid
from ..quant.packed import Code4, Fp8, Gguf, Int4, Int8, Packed
from .library import call, has_tiles, recording, why_not

COLUMNS, STEP = 256, 32  # what packed.h calls BLOCK and STEP
FEW = 16  # what numbers.h calls so
TILED = 8  # tokens from which tiles of 16 pay
TILE_COLUMNS, TILE_ROWS, CHUNK = 32, 32, 512  # what tiles.h calls DEEP and PANEL_ROWS, and packed.h CHUNK
TILE_KEYS = 128  # what tiled_attention.h calls AT_ONCE
FEW_ROUTED = 4  # tokens that rarely share an expert, so that each reads its own
MOST_DIM = 1024  # of a head, what rows.h calls MOST
LAYOUTS = (Fp8, Code4, Int4, Int8)  # and, behind them, ggml's blocks:
KINDS = ("Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", *GRIDS)  # in the order of stored.h
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALES = {**TYPES, torch.float8_e4m3fn: 3, torch.float8_e8m0fnu: 4}


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why x of this device and dtype cannot be taken; None if it can."""
    if device.type != "cpu":
        return "made for CPUs"
    return why_not() if dtype in TYPES else f"has no {dtype}"


def supports_rounding(device: torch.device, dtype: torch.dtype) -> str | None:
    """The same of the operations that round x to 16 bits."""
    if device.type == "cpu" and dtype == torch.float32:
        return "rounds x to 16 bits, which float32 is finer than"
    return supports(device, dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`ops.linear` of up to FEW tokens, summed in fp32; `torch_ops.linear` of more."""
    count = x.shape[:-1].numel()
    fits = (
        0 < count <= FEW and x.dtype == weight.dtype and weight.dim() == 2 and weight.shape[1] == x.shape[-1] > 0
        and weight.is_cpu and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype))
    )  # fmt: skip
    if not fits or any(_learns(t) for t in (x, weight, bias) if t is not None):
        return torch_ops.linear(x, weight, bias)
    out = _new(x, *x.shape[:-1], weight.shape[0])
    call("linear", weight.contiguous(), *weight.shape, x.contiguous(), TYPES[x.dtype], count,
         None if bias is None else bias.contiguous(), out)  # fmt: skip
    return out


def linear_int4(x: Tensor, weight: Int4, bias: Tensor | None = None) -> Tensor:
    """`packed.linear_int4` with x rounded to 16 bits for every 256 columns and everything else exact."""
    return _linear(x, weight, bias)


def linear_int8(x: Tensor, weight: Int8, bias: Tensor | None = None) -> Tensor:
    """`packed.linear_int8` with x rounded to 16 bits for every 256 columns and everything else exact."""
    return _linear(x, weight, bias)


def linear_stored(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """The product with any layout of `packed`. Of up to FEW tokens every row is made fp32 where it is multiplied. Of more, in
    bfloat16, on a CPU with a matrix unit, so many rows are made bfloat16 in its cache; on others `linear_blocked` multiplies
    a few MB at a time, which are rounded to x's dtype only where the CPU multiplies that."""
    (*lead, columns), rows, count = x.shape, weight[0].shape[0], x.shape[:-1].numel()
    cells = _stored(weight, columns) if x.dtype in TYPES and not _learns(x) else ()
    if not cells:
        return linear_blocked(x, weight, bias)
    tiled = _tiled(x.dtype, count)
    if not count or not (tiled or count <= FEW) or (bias is not None and not _adds(bias, rows, (x.dtype,))):
        return linear_blocked(x, weight, bias, partial(_rows_of, cells))
    out, bias = _new(x, *lead, rows), None if bias is None else bias.contiguous()
    if tiled:
        paired = _new(x, _whole(min(count, CHUNK), TILE_ROWS), _whole(columns, TILE_COLUMNS))
        call("linear_tiles", *cells, rows, columns, x.contiguous(), count, bias, paired, out)
    else:
        call("linear_stored", *cells, rows, columns, x.contiguous(), TYPES[x.dtype], count, bias, out)
    return out


def moe_stored(x: Tensor, gate_up: Packed, down: Packed, weights: Tensor, experts: Tensor) -> Tensor:
    """`packed.moe_packed`, every matrix through `linear_stored`."""
    return packed.moe_packed(x, gate_up, down, weights, experts, _linear_any)


def moe(x: Tensor, gate_up: Packed, down: Packed, weights: Tensor, experts: Tensor) -> Tensor:
    """`packed.moe_packed`. Of a few tokens the chosen experts are one call, of more each goes through `linear_int4` or
    `linear_int8`; both round x, and what is between the matrices, to 16 bits for every 256 columns."""
    if not _few(x, weights, experts) or not (whole := _stacks(gate_up, down, x.shape[1])):
        return packed.moe_packed(x, gate_up, down, weights, experts, _linear_any)
    return _experts("moe_packed", x, weights, experts, whole, gate_up[0].shape[:2])


def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """`ops.moe_experts`, in one call of a few tokens. Products are summed in fp32."""
    alike = x.dtype == gate_up.dtype == down.dtype and gate_up.is_contiguous() and down.is_contiguous()
    count, hidden, inner = down.shape
    shapes = gate_up.shape == (count, 2 * inner, hidden) and x.shape[1] == hidden
    if not (alike and shapes and _few(x, weights, experts)) or _learns(gate_up) or _learns(down):
        return ops.moe_experts(x, gate_up, down, weights, experts)
    return _experts("moe_experts", x, weights, experts, (gate_up, down), gate_up.shape[:2])


def router_topk(logits: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """`ops.router_topk`; of equal probabilities the lower index comes first."""
    tokens, experts = logits.shape
    if not 0 < k <= experts or _learns(logits):
        return ops.router_topk(logits, k, normalize)
    weights, chosen = logits.new_empty(tokens, k), logits.new_empty(tokens, k, dtype=torch.int64)
    call("router_topk", logits.contiguous(), TYPES[logits.dtype], tokens, experts, k, normalize, weights, chosen)
    return weights, chosen


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`ops.attention` in fp32 throughout, a kv head's keys and values read once for all the queries that share it.

    With a mask, or heads of other sizes than multiples of eight, PyTorch's runs.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if mask is not None or dim % 8 or not _alike(q, k, v) or not q.numel() or keys < queries or heads % kv_heads:
        return torch_ops.attention(q, k, v, mask)
    out = _new(q, batch, queries, heads, dim)  # as the projection behind it reads it
    numbers = (batch, heads, kv_heads, queries, keys, dim, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    if dim % TILE_COLUMNS == 0 and heads // kv_heads <= TILE_ROWS and _tiled(q.dtype, queries):
        paired = _new(q, 2, batch, kv_heads, _whole(keys, TILE_KEYS), dim)
        call("attention_tiles", q, k, v, *numbers, paired, out)
    else:
        call("attention", q, k, v, TYPES[q.dtype], *numbers, out)
    return out.transpose(1, 2)


def attention_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int | None = None) -> Tensor:
    """`ops.attention_decode` in fp32 throughout."""
    (batch, heads, dim), (kv_heads, room) = q.shape, k.shape[1:3]
    odd = dim % 8 or not q.numel() or heads % kv_heads or lengths.shape != (batch,) or lengths.dtype != torch.int32
    if odd or not _alike(q[:, :, None], k, v) or window == 0:
        return ops.attention_decode(q, k, v, lengths, window)
    out = _new(q, *q.shape)
    call("attention_decode", q, k, v, lengths.contiguous(), TYPES[q.dtype], batch, heads, kv_heads, room, dim, window,
         *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], out)  # fmt: skip
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`ops.swiglu` in one call."""
    if gate.dtype != up.dtype or gate.shape != up.shape or _learns(gate) or _learns(up):
        return ops.swiglu(gate, up)
    out = _new(gate, *gate.shape)
    rows, columns = 1, gate.numel()
    if not (gate.is_contiguous() and up.is_contiguous()):  # halves of one projection: rows with gaps between them
        rows, columns = gate.shape[:-1].numel(), gate.shape[-1]
        gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate.reshape(rows, columns), up.reshape(rows, columns)))
    call("swiglu", gate, up, TYPES[gate.dtype], rows, columns, *(x.stride(0) if rows > 1 else 0 for x in (gate, up)), out)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm` in one call: what it costs with one token is calls, not arithmetic."""
    if x.dtype != weight.dtype or weight.shape != x.shape[-1:] or _learns(x) or _learns(weight):
        return ops.rms_norm(x, weight, eps)
    x = x.contiguous()
    out = _new(x, *x.shape)
    call("rms_norm", x, weight.contiguous(), TYPES[x.dtype], float(eps), x.shape[:-1].numel(), x.shape[-1], out)
    return out


def zero_centred_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.zero_centred_rms_norm` in one call."""
    if x.dtype != weight.dtype or weight.shape not in (x.shape[-1:], x.shape[-2:]) or _learns(x) or _learns(weight):
        return ops.zero_centred_rms_norm(x, weight, eps)
    x, out = x.contiguous(), _new(x, *x.shape)
    call("zero_centred_rms_norm", x, weight.contiguous(), TYPES[x.dtype], float(eps), x.shape[:-1].numel(), x.shape[-1],
         weight.shape[:-1].numel(), out)  # fmt: skip
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, centred: bool = False
) -> tuple[Tensor, Tensor]:
    """`ops.add_rms_norm` in one call."""
    alike = x.shape == residual.shape and x.dtype == residual.dtype == weight.dtype and weight.shape == x.shape[-1:]
    if not alike or _learns(x) or _learns(residual) or _learns(weight):
        return ops.add_rms_norm(x, residual, weight, eps, centred)
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    total, out = _new(x, *x.shape), _new(x, *x.shape)
    call("add_rms_norm", x, residual, weight, TYPES[x.dtype], float(eps), centred, x.shape[:-1].numel(), x.shape[-1], total,
         out)  # fmt: skip
    return total, out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`ops.rope` in one call."""
    batch, heads, tokens, dim = x.shape
    tables = cos.shape == sin.shape and cos.shape in ((1, tokens, dim), (batch, tokens, dim)) and dim % 2 == 0
    if not tables or x.stride(-1) != 1 or not x.dtype == cos.dtype == sin.dtype or _learns(x):
        return ops.rope(x, cos, sin)
    out = _new(x, *x.shape)
    cos, sin = cos.contiguous(), sin.contiguous()
    table = tokens * dim if cos.shape[0] > 1 else 0
    call("rope", x, cos, sin, TYPES[x.dtype], batch, heads, tokens, dim, *x.stride()[:3], table, out)
    return out


def norm_rope_write(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, centred: bool = False,
) -> Tensor:  # fmt: skip
    """`ops.norm_rope_write` in one call."""
    (tokens, heads, dim), kv_heads, turned = q.shape, k.shape[1], cos.shape[-1]
    weights = [w for w in (q_weight, k_weight) if w is not None]
    fits = (
        k.shape == v.shape == (tokens, kv_heads, dim) and cos.shape == sin.shape == (tokens, turned)
        and slots.shape == (tokens,) and k_cache.shape == v_cache.shape
        and k_cache.shape[1] == kv_heads and k_cache.shape[3] == dim
        and turned % 2 == 0 and 0 < turned <= dim <= MOST_DIM and slots.dtype == torch.int64
        and q.dtype == k.dtype == v.dtype == cos.dtype == sin.dtype == k_cache.dtype == v_cache.dtype
        and q.stride(2) == k.stride(2) == v.stride(2) == k_cache.stride(3) == v_cache.stride(3) == 1
        and not (_learns(q) or _learns(k) or _learns(v))
    )  # fmt: skip
    if not fits or any(w.shape != (dim,) or w.dtype != q.dtype or w.stride(0) != 1 or _learns(w) for w in weights):
        return ops.norm_rope_write(q, k, v, q_weight, k_weight, eps, cos, sin, k_cache, v_cache, slots, centred)
    cos, sin, slots, out = cos.contiguous(), sin.contiguous(), slots.contiguous(), _new(q, *q.shape)
    outside = call("norm_rope_write", q, k, v, q_weight, k_weight, TYPES[q.dtype], float(eps), centred, turned, tokens,
                   heads, kv_heads, dim, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos, sin, slots,
                   *k_cache.shape[::2], *k_cache.stride()[:3], *v_cache.stride()[:3], k_cache, v_cache, out)  # fmt: skip
    if outside:
        raise IndexError(f"a slot lies outside the caches, which have {k_cache.shape[0]} x {k_cache.shape[2]}")
    return out


def take_columns(x: Tensor, order: Tensor) -> Tensor:
    """`ops.take_columns` in one call."""
    if not x.numel() or order.dim() != 1 or order.dtype != torch.int64 or not order.is_contiguous() or _learns(x):
        return ops.take_columns(x, order)
    out = _new(x, *x.shape[:-1], order.numel())
    if call("take_columns", x.contiguous(), TYPES[x.dtype], x.shape[:-1].numel(), x.shape[-1], order, order.numel(), out):
        raise IndexError(f"a column is named that does not exist; there are {x.shape[-1]}")
    return out


def sigmoid_gate(x: Tensor, gate: Tensor, residual: Tensor | None = None) -> Tensor:
    """`ops.sigmoid_gate` in one call."""
    shapes = gate.shape in (x.shape, (*x.shape[:-1], 1)) and (residual is None or residual.shape == x.shape) and x.numel()
    given = [t for t in (x, gate, residual) if t is not None]
    if not shapes or any(t.dtype != x.dtype or _learns(t) for t in given):
        return ops.sigmoid_gate(x, gate, residual)
    heads, dim, single = x.shape[-2] if x.dim() > 2 else 1, x.shape[-1], gate.shape[-1] == 1
    gate = gate.reshape(-1, heads, gate.shape[-1])
    gate = gate if single or gate.stride(2) == 1 else gate.contiguous()
    out = _new(x, *x.shape)
    call("sigmoid_gate", x.contiguous(), gate, None if residual is None else residual.contiguous(), TYPES[x.dtype],
         gate.shape[0], heads, dim, *gate.stride()[:2], not single, out)  # fmt: skip
    return out


def gated_delta_step(
    mixed: Tensor, window: Tensor, conv_weight: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor,
    z: Tensor, norm_weight: Tensor, eps: float, state: Tensor, activation: str = "silu",
) -> Tensor:  # fmt: skip
    """`ops.gated_delta_step` in one call."""
    (batch, heads, width), keys, (channels, taps) = z.shape, state.shape[2], conv_weight.shape
    alike = (mixed, window, conv_weight, a, b, a_log, dt_bias, z, norm_weight)
    both = channels - heads * width  # 2 G Dk
    fits = (
        all(t.dtype == mixed.dtype for t in alike) and state.dtype == torch.float32 and activation in ("silu", "sigmoid")
        and mixed.shape == (batch, channels) and window.shape == (batch, channels, taps)
        and a.shape == b.shape == (batch, heads) and a_log.shape == dt_bias.shape == (heads,) and norm_weight.shape == (width,)
        and state.shape == (batch, heads, keys, width) and 0 < keys <= MOST_DIM and 0 < width <= MOST_DIM
        and both > 0 and both % (2 * keys) == 0 and heads % (both // (2 * keys)) == 0 and taps > 0
        and window.is_contiguous() and state.is_contiguous() and all(t.stride(-1) == 1 for t in (mixed, a, b, z))
        and not any(_learns(t) for t in (*alike, state))
    )  # fmt: skip
    if not fits:
        return ops.gated_delta_step(
            mixed, window, conv_weight, a, b, a_log, dt_bias, z, norm_weight, eps, state, activation)  # fmt: skip
    out = _new(mixed, batch, heads * width)
    call("gated_delta_step", mixed, window, conv_weight.contiguous(), a, b, a_log.contiguous(), dt_bias.contiguous(), z,
         norm_weight.contiguous(), TYPES[mixed.dtype], float(eps), state, batch, channels, taps, heads, keys, width,
         mixed.stride(0), a.stride(0), b.stride(0), *z.stride()[:2], activation == "sigmoid", out)  # fmt: skip
    return out


def causal_conv1d(x: Tensor, weight: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`ops.causal_conv1d` in one call, summed in fp32."""
    (batch, tokens, channels), taps = x.shape, weight.shape[-1]
    given = [t for t in (x, weight, state) if t is not None]
    fits = (
        x.numel() and x.stride(2) == 1 and weight.shape == (channels, taps) and taps > 0
        and (state is None or state.shape == (batch, channels, taps))
        and not any(t.dtype != x.dtype or _learns(t) for t in given)
    )  # fmt: skip
    if not fits:
        return torch_ops.causal_conv1d(x, weight, state)
    out, after = _new(x, *x.shape), x.new_empty(batch, channels, taps)
    call("causal_conv1d", x, weight.contiguous(), None if state is None else state.contiguous(), TYPES[x.dtype], batch, tokens,
         channels, taps, *x.stride()[:2], after, out)  # fmt: skip
    return out, after


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ops.gated_delta_rule` as it is defined, token by token, in fp32."""
    (batch, tokens, groups, keys), (heads, width) = q.shape, v.shape[2:]
    fits = (
        v.numel() and q.shape == k.shape and v.shape[:2] == (batch, tokens) and 0 < keys <= MOST_DIM and heads % groups == 0
        and g.shape == beta.shape == (batch, tokens, heads) and q.dtype == k.dtype == v.dtype and g.dtype == torch.float32
        and q.stride(3) == k.stride(3) == v.stride(3) == 1 and beta.dtype in TYPES
        and (state is None or (state.dtype == torch.float32 and state.shape == (batch, heads, keys, width)))
        and not any(_learns(t) for t in (q, k, v, g, beta, *(() if state is None else (state,))))
    )  # fmt: skip
    if not fits:
        return torch_ops.gated_delta_rule(q, k, v, g, beta, state)
    shape = (batch, heads, keys, width)
    out, after = _new(v, *v.shape), g.new_zeros(shape) if state is None else g.new_empty(shape).copy_(state)
    call("gated_delta_rule", q, k, v, TYPES[v.dtype], g.contiguous(), beta.float().contiguous(), after, batch, tokens, groups,
         heads, keys, width, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], out)  # fmt: skip
    return out, after


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str = "silu") -> Tensor:
    """`ops.gated_rms_norm` in one call."""
    width = x.shape[-1]
    alike = x.shape == gate.shape and x.dtype == gate.dtype == weight.dtype and weight.shape == (width,)
    known = activation in ("silu", "sigmoid") and 0 < width <= MOST_DIM and x.numel()
    if not (alike and known) or _learns(x) or _learns(gate) or _learns(weight):
        return ops.gated_rms_norm(x, gate, weight, eps, activation)
    gate = gate.reshape(-1, x.shape[-2] if x.dim() > 2 else 1, width)
    gate, out = gate if gate.stride(2) == 1 else gate.contiguous(), _new(x, *x.shape)
    call("gated_rms_norm", x.contiguous(), gate, weight.contiguous(), TYPES[x.dtype], float(eps), *gate.shape,
         *gate.stride()[:2], activation == "sigmoid", out)  # fmt: skip
    return out


def _new(x: Tensor, *shape: int) -> Tensor:
    """Memory for a result of x's type. The C library's heap, which PyTorch takes from, keeps holes of what many tokens need."""
    return (empty if recording() else scratch)(shape, x.dtype, x.device)  # a tape keeps it


def _alike(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k and v are what attention.h reads: one type, last axes contiguous, keys and values of the same shape."""
    return (
        q.dtype == k.dtype == v.dtype and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
        and q.stride(3) == k.stride(3) == v.stride(3) == 1 and not (_learns(q) or _learns(k) or _learns(v))
    )  # fmt: skip


def _adds(bias: Tensor, rows: int, dtypes: tuple[torch.dtype, ...]) -> bool:
    return bias.shape == (rows,) and bias.dtype in dtypes and not _learns(bias)


def _learns(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _few(x: Tensor, weights: Tensor, experts: Tensor) -> bool:
    """Whether these are few tokens (M, H) and their chosen experts, as moe.h reads them."""
    return (
        0 < x.shape[0] <= FEW_ROUTED and weights.shape == experts.shape and weights.dtype == x.dtype and x.shape[1] > 0
        and experts.dtype == torch.int64 and experts.shape[0] == x.shape[0] and not (_learns(x) or _learns(weights))
    )  # fmt: skip


def _stacks(gate_up: Packed, down: Packed, hidden: int) -> tuple[Any, ...]:
    """Both stacks as moe.h takes them, which reads whole steps; none if it cannot."""
    inner = gate_up[0].shape[1] // 2
    shapes = gate_up[0].shape[:2] == (down[0].shape[0], 2 * inner) and down[0].shape[1] == hidden
    cells: tuple[Any, ...] = ()
    for stack, columns in ((gate_up, hidden), (down, inner)):
        step = 2 * STEP if isinstance(stack, Int4) else STEP
        if not (shapes and _reads(stack, columns) and stack[0].dim() == 3 and columns % step == 0):
            return ()
        cells += _cells(stack, columns)  # type: ignore[arg-type]
    return cells


def _experts(
    operation: str, x: Tensor, weights: Tensor, experts: Tensor, stacks: tuple[Any, ...], shape: tuple[int, ...]
) -> Tensor:  # the stack of gate_up is (E, 2I, ...)
    out = _new(x, *x.shape)
    outside = call(operation, *stacks, x.contiguous(), TYPES[x.dtype], *x.shape, shape[1] // 2, shape[0], experts.shape[1],
                   weights.contiguous(), experts.contiguous(), out)  # fmt: skip
    if outside:
        raise IndexError(f"an expert is chosen that does not exist; there are {shape[0]}")
    return out


def _linear_any(x: Tensor, weight: Packed) -> Tensor:
    return _linear(x, weight, None) if isinstance(weight, Int4 | Int8) else linear_stored(x, weight)


def _linear(x: Tensor, weight: Int4 | Int8, bias: Tensor | None) -> Tensor:
    (*lead, columns), rows = x.shape, weight.codes.shape[0]
    fits = _reads(weight, columns) and weight.codes.dim() == 2 and not _learns(x)
    fits = fits and (bias is None or _adds(bias, rows, tuple(TYPES)))
    if not fits or _tiled(x.dtype, x.shape[:-1].numel()):
        return linear_stored(x, weight, bias)
    out = _new(x, *lead, rows)
    bias_type, bias = (0, None) if bias is None else (TYPES[bias.dtype], bias.contiguous())
    call("linear_packed", *_cells(weight, columns), rows, columns, x.contiguous(), TYPES[x.dtype], x.shape[:-1].numel(), bias,
         bias_type, out)  # fmt: skip
    return out


def _tiled(dtype: torch.dtype, tokens: int) -> bool:
    """Whether a matrix unit multiplies so many tokens."""
    return dtype == torch.bfloat16 and tokens >= TILED and has_tiles()


def _whole(count: int, of: int) -> int:
    return -(-count // of) * of


def _reads(weight: Packed, columns: int) -> bool:
    """Whether packed.h has this length of groups, and all that it would read is there; what is not, PyTorch refuses."""
    if not isinstance(weight, Int4 | Int8):
        return False
    group, rows, groups = weight.group, weight.codes.shape[:-1], -(-columns // weight.group)
    known = group >= columns or group % COLUMNS == 0 or (COLUMNS % group == 0 and group % STEP == 0)
    width = -(-columns // 2) if isinstance(weight, Int4) else columns
    return (
        known and weight.codes.shape == (*rows, width) and weight.scale.shape == (*rows, groups) and weight.codes.is_cpu
        and weight.scale.dtype in TYPES and (weight.zero is None or weight.zero.shape == (*rows, groups))
    )  # fmt: skip


def _cells(weight: Int4 | Int8, columns: int) -> tuple[Tensor | int | None, ...]:
    """A matrix, or a stack of them, as packed.h takes it."""
    group = weight.group if weight.group < columns else max(COLUMNS, columns)
    zero = None if weight.zero is None else weight.zero.contiguous()
    bits = 4 if isinstance(weight, Int4) else 8
    return weight.codes.contiguous(), weight.scale.contiguous(), TYPES[weight.scale.dtype], zero, group, bits


def _stored(weight: Packed, columns: int) -> tuple[Any, ...]:
    """A matrix as stored.h takes it; none if it has not its layout."""
    if weight[0].dim() != 2 or not weight[0].is_cpu or not columns:
        return ()
    if isinstance(weight, Gguf):
        elements, size = BLOCK[weight.kind]
        if weight.kind not in KINDS or columns % elements or weight.blocks.shape[1] != columns // elements * size:
            return ()
        points = grid(weight.kind) if weight.kind in GRIDS else None
        return len(LAYOUTS) + KINDS.index(weight.kind), weight.blocks.contiguous(), None, 0, points, 1, 1
    high, wide = weight.block if isinstance(weight, Fp8) else (1, weight.group)
    rows, width = weight.codes.shape
    groups = (-(-rows // high), -(-columns // wide))
    if width != (-(-columns // 2) if isinstance(weight, Int4 | Code4) else columns) or weight.scale.shape != groups:
        return ()
    if isinstance(weight, Int4 | Int8):
        aside = weight.zero
        if aside is not None and aside.shape != groups:
            return ()
    else:
        aside = _fp8_values() if isinstance(weight, Fp8) else weight.table.float()
    if weight.scale.dtype not in SCALES:
        return ()
    return (LAYOUTS.index(type(weight)), weight.codes.contiguous(), weight.scale.contiguous(), SCALES[weight.scale.dtype],
            None if aside is None else aside.contiguous(), high, wide)  # fmt: skip


def _rows_of(cells: tuple[Any, ...], weight: Packed, first: int, last: int, columns: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(last - first, columns, dtype=dtype)
    call("rows_of_stored", *cells, weight[0].shape[0], columns, first, last, TYPES[dtype], out)
    return out


@cache
def _fp8_values() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
