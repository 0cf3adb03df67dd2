"""Products with matrices of few bits: every layout of `quant.packed`, as linear projections and as stacks of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from ...quant import packed
from ...quant.gguf_blocks import BLOCK, DEQUANTIZE, GRIDS, HALVES
from ...quant.packed import Code4, Fp8, Gguf, Int4, Int8, Packed
from ..shapes import Sizes
from .common import Case, Draw, Subject, bytes_of

NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
HALF = torch.float16
# Draws a matrix (*lead, N, K) of one layout whose numbers are about K^-0.5 large: (draw, *lead, n, k) -> packed.
Make = Callable[..., Packed]
Styles = Mapping[str, Make]
NONE: Styles = MappingProxyType({})


def int4(draw: Draw, *shape: int, group: int = 32, zero: bool = True, scale: torch.dtype = HALF) -> Int4:
    *lead, k = shape
    groups, size = -(-k // group), k**-0.5 / 4.6
    return Int4(
        draw.integers(0, 256, *lead, -(-k // 2)),
        draw.uniform(0.5 * size, 1.5 * size, *lead, groups, dtype=scale),
        draw.integers(0, 16, *lead, groups) if zero else None,
        group,
    )


def int8(draw: Draw, *shape: int, group: int = 0, zero: bool = False, scale: torch.dtype = HALF) -> Int8:
    """group 0: one for the whole row."""
    *lead, k = shape
    group = group or k
    groups, size = -(-k // group), k**-0.5 / 74
    return Int8(
        draw.integers(-128, 128, *shape, dtype=torch.int8),
        draw.uniform(0.5 * size, 1.5 * size, *lead, groups, dtype=scale),
        draw.integers(-128, 128, *lead, groups, dtype=torch.int8) if zero else None,
        group,
    )


def fp8(draw: Draw, *shape: int, block: tuple[int, int] = (128, 128), scale: torch.dtype = torch.float32) -> Fp8:
    """A block of 0 rows or columns is as large as the matrix."""
    *lead, n, k = shape
    high, wide = block[0] or n, block[1] or k
    codes = draw.uniform(-448, 448, *shape, dtype=torch.float32)
    size = k**-0.5 / 259
    scales = draw.uniform(0.5 * size, 1.5 * size, *lead, -(-n // high), -(-k // wide), dtype=scale)
    if codes.numel() and codes.device.type != "meta":
        codes[..., ::7] *= 2.0**-12  # also the numbers that float8_e4m3fn writes without a leading one
    return Fp8(codes.to(torch.float8_e4m3fn), scales, (high, wide))


def code4(
    draw: Draw, *shape: int, table: Sequence[float] = NF4, group: int = 64, scale: torch.dtype = torch.float32,
    own_tables: bool = False,
) -> Code4:  # fmt: skip
    """own_tables: every expert has one, twice, three times ... as large."""
    *lead, k = shape
    groups, values = -(-k // group), torch.tensor(table, device=draw.device)
    size = k**-0.5 / float(torch.tensor(table).square().mean().sqrt())
    if scale == torch.float8_e8m0fnu:
        power = round(torch.tensor(size).log2().item()) + 127
        scales = draw.integers(power - 1, power + 1, *lead, groups).view(scale)
    else:
        scales = draw.uniform(0.5 * size, 1.5 * size, *lead, groups, dtype=scale)
    if own_tables:
        values = values * torch.arange(1, lead[0] + 1, device=draw.device)[:, None]
    return Code4(draw.integers(0, 256, *lead, -(-k // 2)), scales, values, group)


def gguf(draw: Draw, *shape: int, kind: str = "Q4_K") -> Gguf:
    *lead, k = shape
    elements, size = BLOCK[kind]
    blocks = draw.integers(0, 256, *lead, k // elements, size)
    if blocks.device.type != "meta":
        # Random bits make fp16 numbers of any size, or none; what is left to chance here is the scales of scales.
        scale = k**-0.5 / _unscaled(kind)
        for at in HALVES[kind]:
            _put_half(kind, blocks, at, draw.uniform(0.5 * scale, 1.5 * scale, *lead, k // elements, 1, dtype=HALF))
    return Gguf(blocks.flatten(-2), kind)


@cache
def _unscaled(kind: str) -> float:
    """How large the numbers of random blocks are whose fp16 scales are one."""
    blocks = torch.randint(0, 256, (256, BLOCK[kind][1]), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for at in HALVES[kind]:
        _put_half(kind, blocks, at, torch.ones(256, 1, dtype=HALF))
    return float(DEQUANTIZE[kind](blocks).square().mean().sqrt())


def _put_half(kind: str, blocks: Tensor, at: int, scale: Tensor) -> None:
    """Of IQ1_M four bits in the upper halves of four bytes."""
    if kind != "IQ1_M":
        blocks[..., at : at + 2] = scale.view(torch.uint8)
        return
    nibbles = scale.view(torch.int16).int() >> torch.arange(0, 16, 4, device=scale.device) & 15  # (..., 4)
    blocks[..., at + 1 : at + 8 : 2] = (blocks[..., at + 1 : at + 8 : 2] & 15) | (nibbles << 4).to(torch.uint8)


# ------------------------------------------------------------------------------------------------- linear


def _case(name: str, draw: Draw, make: Make, shape: tuple[int, ...], n: int, bias: bool = False, scale: float = 1.0) -> Case:
    x = draw.normal(*shape, scale=scale)
    return Case(name, (x, make(draw, n, shape[-1]), draw.normal(n) if bias else None))


def _linear_cases(styles: Styles, k: int, odd: int, brief: Styles, s: Sizes, draw: Draw) -> Iterator[Case]:
    """Every style; k columns, or an odd number of them. The counts are those at which kernels change."""
    first, n = next(iter(styles.values())), s.kv_heads * s.head_dim
    for count in (1, 2, 3, 5, 16, 17, 40, 0):
        yield _case(f"{count} rows", draw, first, (count, k), n)
    yield _case("many rows", draw, first, (197, k), n, bias=True)
    yield _case("one vector", draw, first, (k,), n)
    yield _case("leading axes", draw, first, (2, 1, 3, k), n, bias=True)
    for count in (1, 6):
        for style, make in styles.items():
            yield _case(f"{count} rows, {style}", draw, make, (count, k), 37, bias=True)
            yield _case(f"{count} rows, {style}, odd sizes", draw, make, (count, odd), 21)
        yield _case(f"{count + 3} rows, one column", draw, first, (count + 3, k), 1, bias=True)
        yield _case(f"{count} rows, long sums", draw, first, (count, 16 * k), 20)
        yield _case(f"{count} rows, large", draw, first, (count, k), n, scale=draw.large)
        yield _case(f"{count} rows, zeros", draw, first, (count, k), n, scale=0.0)
        hidden, apart = draw.normal(count, 3, k), draw.normal(count, 2 * k + 1)
        weight, bias = first(draw, n, k), draw.normal(2 * n)[::2]
        yield Case(f"{count} rows, last of a sequence", (hidden[:, -1], weight, bias))
        yield Case(f"{count} rows, every second number", (apart[:, 1::2], weight, bias))
        yield Case(f"{count} rows, one row repeated", (apart[:1, 1 : k + 1].expand(count, -1), weight, None))
    for style, make in brief.items():
        yield _case(f"1 row, {style}", draw, make, (1, k), 21)
        yield _case(f"1 row, {style}, long sums", draw, make, (1, 10 * k), 5)
        yield _case(f"6 rows, {style}", draw, make, (6, k), 37, bias=True)
    stack = first(draw, 3, 4 * n, k)
    part = packed.rows(packed.expert(stack, 1), *_middle(stack, n))
    yield Case("5 rows, part of a stack", (draw.normal(5, k), part, None))
    yield Case("one row, part of a stack", (draw.normal(1, k), part, None))


def _middle(weight: Packed, n: int) -> tuple[int, int]:
    """Some rows in the middle, from where a block begins."""
    high = weight.block[0] if isinstance(weight, Fp8) else 1
    first = -(-n // high) * high
    return first, min(first + n, 4 * n)


def _linear_real(styles: Styles, brief: Styles, s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    """The first format on q, k and v, o, gate and up, down, each shape once; every other one on q.

    Those of `brief` only in bf16 for few tokens: they are decoded to the same fp32 numbers for all.
    """
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    shapes = [(q, s.hidden), (kv, s.hidden), (s.hidden, q)]
    if not s.experts:
        shapes += [(s.intermediate, s.hidden), (s.hidden, s.intermediate)]
    (first, make), *others = styles.items()
    for n, k in dict.fromkeys(shapes):
        yield _case(f"{tokens} x ({n}, {k}), {first}", draw, make, (tokens, k), n)
    for style, make in (*others, *(brief.items() if draw.dtype == torch.bfloat16 and tokens <= 64 else ())):
        yield _case(f"{tokens} x ({q}, {s.hidden}), {style}", draw, make, (tokens, s.hidden), q)


def _linear_flops(x: Tensor, weight: Packed, bias: Tensor | None = None) -> int:
    return 2 * prod(x.shape) * weight[0].shape[-2]


# ------------------------------------------------------------------------------------------------- experts


def _moe_case(
    name: str, draw: Draw, make: Make, s: Sizes, tokens: int, experts: Tensor | None = None, scale: float = 1.0
) -> Case:
    x = draw.normal(tokens, s.hidden)
    gate_up, down = make(draw, s.experts, 2 * s.intermediate, s.hidden), make(draw, s.experts, s.hidden, s.intermediate)
    chosen = draw.choices(tokens, s.experts, s.top_k) if experts is None else experts
    weights = draw.normal(*chosen.shape, scale=0.03 * scale, mean=scale / s.top_k)
    return Case(name, (x, gate_up, down, weights, chosen))


def _moe_cases(styles: Styles, k: int, odd: int, s: Sizes, draw: Draw) -> Iterator[Case]:
    small = replace(s, hidden=k, intermediate=24 if odd % 2 else odd, experts=5, top_k=2)  # or whole blocks
    first = next(iter(styles.values()))
    for tokens in (0, 1, 9):
        yield _moe_case(f"{tokens} tokens", draw, first, small, tokens)
    for style, make in styles.items():
        for tokens in (2, 6):
            yield _moe_case(f"{tokens} tokens, {style}", draw, make, replace(small, hidden=odd, top_k=3), tokens)
    yield _moe_case("30 rows an expert", draw, first, replace(small, experts=2), 30)
    yield _moe_case("many rows an expert", draw, first, replace(small, experts=2, top_k=1), 197)
    yield _moe_case("one expert", draw, first, replace(small, experts=1, top_k=1), 7)
    yield _moe_case("more experts than a tile", draw, first, replace(small, experts=70), 40)
    for tokens in (3, 11):
        # Empty experts before, between and after those in use, whose two slots come in either order.
        yield _moe_case(f"{tokens} tokens to two of five", draw, first, small, tokens, 1 + 2 * draw.choices(tokens, 2, 2))
        yield _moe_case(f"{tokens} tokens, large router weights", draw, first, small, tokens, scale=1e3)
        _, (_, gate_up, down, weights, experts) = _moe_case("", draw, first, small, tokens)
        apart = draw.normal(tokens, 2 * small.hidden)[:, ::2]
        turned = weights.t().contiguous().t(), experts.t().contiguous().t()
        yield Case(f"{tokens} tokens, strided", (apart, gate_up, down, *turned))


def _moe_real(styles: Styles, s: Sizes, tokens: int, draw: Draw) -> Iterator[Case]:
    """Only the first format: what the others change is in the linear projections too."""
    style, make = next(iter(styles.items()))
    yield _moe_case(f"{tokens} tokens, {s.top_k} of {s.experts}, {style}", draw, make, s, tokens)


def _moe_flops(x: Tensor, gate_up: Packed, down: Packed, weights: Tensor, experts: Tensor) -> int:
    return 3 * x.shape[1] * gate_up[0].shape[1] * weights.numel()


def _moe_bytes(x: Tensor, gate_up: Packed, down: Packed, weights: Tensor, experts: Tensor) -> int:
    """Only the chosen experts are read: all of them once the tokens are many, else as many as there are choices."""
    used = min(gate_up[0].shape[0], experts.numel())
    one = bytes_of(packed.expert(gate_up, 0), packed.expert(down, 0))
    return 2 * bytes_of(x) + bytes_of(weights, experts) + used * one


# ------------------------------------------------------------------------------------------------- the layouts

def _subjects(
    layout: str, awkward: Styles, real: Styles, k: int = 96, odd: int = 67, experts: Styles = NONE, brief: Styles = NONE
) -> tuple[Subject, Subject]:
    """linear_<layout> and moe_<layout>. Of `awkward` and `real`, the first is tried most.

    `experts`: more awkward styles of experts; `brief`: styles that only one row and some rows are tried with.
    """
    linear, moe = (getattr(packed, f"{what}_{layout}") for what in ("linear", "moe"))
    all_styles = {**awkward, **experts}
    return (
        Subject(linear, partial(_linear_cases, awkward, k, odd, brief), partial(_linear_real, real, brief), _linear_flops),
        Subject(
            moe, partial(_moe_cases, all_styles, k, odd), partial(_moe_real, real), _moe_flops, _moe_bytes, needs="experts"
        ),
    )


_E8M0, _E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
_BLOCKS: Styles = {
    "blocks": partial(fp8, block=(32, 32)),
    "blocks of 16 x 64": partial(fp8, block=(16, 64), scale=torch.bfloat16),
    "one scale": partial(fp8, block=(0, 0)),
    "a scale a row": partial(fp8, block=(1, 0), scale=HALF),
    "blocks of 3 x 5": partial(fp8, block=(3, 5)),
}
_DYNAMIC = Subject(
    packed.linear_fp8_dynamic,
    partial(_linear_cases, _BLOCKS, 96, 67, NONE),
    partial(_linear_real, {"128 x 128": fp8}, NONE),
    _linear_flops,
)
_OTHER_KINDS = ("Q5_K", "Q3_K", "Q2_K", "IQ4_XS", *GRIDS, "Q4_1", "Q5_1")
SUBJECTS: tuple[Subject, ...] = (
    *_subjects(
        "int4",
        {
            "groups": int4,
            "no zeros": partial(int4, group=16, zero=False, scale=torch.float32),
            "one group": partial(int4, group=4096, scale=torch.bfloat16),
            "groups of 20": partial(int4, group=20),
            "groups of 5": partial(int4, group=5),
        },
        {"g128": partial(int4, group=128), "g32": partial(int4, group=32, zero=False)},
    ),
    *_subjects(
        "int8",
        {
            "rows": int8,
            "groups": partial(int8, group=32, zero=True),
            "no zeros": partial(int8, group=16, scale=torch.float32),
            "rows with zeros": partial(int8, zero=True, scale=torch.bfloat16),
            "groups of 5": partial(int8, group=5),
        },
        {"rows": partial(int8, scale=torch.bfloat16), "g128": partial(int8, group=128, zero=True)},
    ),
    *_subjects("fp8", _BLOCKS, {"128 x 128": fp8, "a scale a row": partial(fp8, block=(1, 0))}),
    *_subjects(
        "code4",
        {
            "nf4": code4,
            "mxfp4": partial(code4, table=E2M1, group=32, scale=_E8M0),
            "nvfp4": partial(code4, table=E2M1, group=16, scale=_E4M3),
            "one group": partial(code4, group=4096, scale=HALF),
            "groups of 5": partial(code4, group=5),
        },
        {
            "nf4": code4,
            "mxfp4": partial(code4, table=E2M1, group=32, scale=_E8M0),
            "nvfp4": partial(code4, table=E2M1, group=16, scale=_E4M3),
        },
        experts={"a table an expert": partial(code4, own_tables=True)},
    ),
    *_subjects(
        "gguf",
        {kind: partial(gguf, kind=kind) for kind in ("Q4_K", "Q6_K")},
        {kind: partial(gguf, kind=kind) for kind in ("Q4_K", "Q6_K")},
        k=512, odd=256, brief={kind: partial(gguf, kind=kind) for kind in _OTHER_KINDS},
    ),
    _DYNAMIC,
)  # fmt: skip
