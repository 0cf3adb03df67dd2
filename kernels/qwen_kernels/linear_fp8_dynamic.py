"""linear_fp8_dynamic in Triton: x is rounded to float8_e4m3fn too, one scale for every token and group of columns.

A first kernel finds each group's largest number and rounds: by adding half of what the fp8 number cannot hold, to even, so
that a GPU without fp8 of its own gives the same bits. Then

Up to 4 rows, products of vectors as in `linear_fp8`, with what x was rounded to, in fp32.

More rows, tensor cores: a program multiplies codes with codes for one group of columns, and adds the product, times both
scales, to fp32 sums (DeepSeek-V3, section 3.3). The numbers of fp8 are numbers of 16 bits too, so what is multiplied is
exact in bf16 and fp16. On an H100 or H200 the codes are multiplied as they are, at twice the rate: the tensor cores of these
add fewer bits, but for no more than a group before fp32 takes over. Where N and M make too few programs K is split, as in
`linear`. Groups that no tile of 16 columns divides, which no format has, are left to the formula.

Bytes: N K for codes, M K twice for x. FLOPs: 2 M N K: memory bound up to some hundred rows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_ref.quant import packed
from qwen_ref.quant.packed import Fp8

from . import packed_linear
from .bits import e4m3, fetch, scale_at
from .launch import ANY, on, supports, tuned
from .linear import _add_splits
from .packed_linear import MOST_VECTORS
from .unpack import Operands, operands

__all__ = ["ORACLE", "TOLERANCE", "TUNED", "run", "supports"]

ORACLE = packed.linear_fp8_dynamic
TOLERANCE = 2.0
TOLERANCE_FP32 = 3.0  # sums in another order: twice is a matter of luck where they are of few numbers
MOST_GROUP = 1 << 15
# Besides the products of vectors: (device, rows of a tile) -> the tile, with at most 128 columns in one step; in fp32, 32.
_TILES: packed_linear.Table = {
    (ANY, 16): {"BLOCK_N": 64, "PROGRAMS": 264, "FP8": 0, "num_warps": 4, "num_stages": 4},
    (ANY, 32): {"BLOCK_N": 64, "PROGRAMS": 264, "FP8": 0, "num_warps": 4, "num_stages": 3},
    (ANY, 64): {"BLOCK_N": 64, "PROGRAMS": 264, "FP8": 0, "num_warps": 4, "num_stages": 3},
    (ANY, 128): {"BLOCK_N": 64, "PROGRAMS": 132, "FP8": 0, "num_warps": 8, "num_stages": 2},
}
_HOPPER = {rows: {**entry, "FP8": 1, "BLOCK_N": 128 if rows == 128 else 64} for (_, rows), entry in _TILES.items()}
TUNED: packed_linear.Table = {
    **{key: entry for key, entry in packed_linear.TUNED.items() if "CHUNKS" in entry},
    **_TILES, **{(ANY, (rows, "fp32")): {**entry, "num_warps": 8 if rows >= 64 else 4} for (_, rows), entry in _TILES.items()},
    **{(f"NVIDIA {name}", rows): entry for name in ("H100 80GB HBM3", "H200") for rows, entry in _HOPPER.items()},
}  # fmt: skip


def run(x: Tensor, weight: Fp8, bias: Tensor | None = None) -> Tensor:
    """x (..., K), any strides; weight (N, K); bias (N,) or None. Returns (..., N), contiguous."""
    packed_linear.check("linear_fp8_dynamic", x, weight, x.shape[-1], bias)
    columns, inner = weight.codes.shape
    count, group = math.prod(x.shape[:-1]), min(weight.block[1], inner)
    found = operands(weight, inner)
    if count == 0 or columns == 0 or group > MOST_GROUP or found is None:
        return packed.linear_fp8_dynamic(x, weight, bias)
    flat = x.reshape(count, inner).contiguous()
    with on(x.device):
        if count <= MOST_VECTORS:
            out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
            rounded = _rounded(flat, group, torch.float32, values=True)[0]
            packed_linear._by_vectors(TUNED, rounded, found, bias, out, columns, inner)
            return out
        block = math.gcd(found.group or 128, 128 if x.element_size() == 2 else 32)
        if block < 16:
            return packed.linear_fp8_dynamic(x, weight, bias)
        return _by_tiles(flat, found, bias, columns, group, block).view(*x.shape[:-1], columns)


def _rounded(x: Tensor, group: int, dtype: torch.dtype, values: bool = False) -> tuple[Tensor, Tensor]:
    """x (M, K) rounded: its fp8 codes in another dtype, or what they stand for; and the scales (M, G)."""
    count, inner = x.shape
    groups, block = triton.cdiv(inner, group), triton.next_power_of_2(group)
    codes = torch.empty(count, inner, dtype=dtype, device=x.device)
    scales = torch.empty(count, groups, dtype=torch.float32, device=x.device)
    several = max(1, 1024 // block)
    _round_rows[(count, triton.cdiv(groups, several))](
        x, codes, scales, inner, group, groups, VALUES=values, GROUPS=several, BLOCK=block,
        num_warps=max(4, min(8, block // 512)),
    )  # fmt: skip
    return codes, scales


def _by_tiles(x: Tensor, w: Operands, bias: Tensor | None, columns: int, group: int, block: int) -> Tensor:
    count, inner = x.shape
    rows = min(128, max(16, triton.next_power_of_2(count)))
    launch = {**tuned(TUNED, x.device, rows if x.element_size() == 2 else (rows, "fp32"))}
    launch["FP8"] &= block >= 32  # tl.dot of FP8 wants 32 columns, of 16 bits 16
    codes, scales = _rounded(x, group, torch.float8_e4m3fn if launch["FP8"] else x.dtype)
    tiles = triton.cdiv(columns, launch["BLOCK_N"]) * triton.cdiv(count, rows)
    splits = max(1, min(launch.pop("PROGRAMS") // tiles, inner // (4 * block)))
    steps = triton.cdiv(inner, splits * block)
    out = torch.empty(count, columns, dtype=x.dtype, device=x.device)
    sums = out if splits == 1 else torch.empty(splits, count, columns, dtype=torch.float32, device=x.device)
    step = 0 if bias is None else bias.stride(0)
    _scaled_tiles[(tiles, splits)](
        codes, w.codes, w.scale, scales, bias if splits == 1 else None, sums, count, columns, inner,
        *w.strides()[:2], scales.stride(0), step, steps, GROUP=w.group, HIGH=w.high, KIND=w.kind,
        EVEN=splits * steps * block == inner, ROWS=rows, BLOCK_K=block, **launch,
    )  # fmt: skip
    if splits > 1:
        size, grid = count * columns, (triton.cdiv(count * columns, 512),)
        _add_splits[grid](sums, bias, out, size, columns, step, SPLITS=splits, BLOCK=512, num_warps=4)
    return out


@triton.jit
def _round_rows(
    x, codes, scales, inner, group, groups,
    VALUES: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """VALUES: codes times scale, instead of codes."""
    row = tl.program_id(0).to(tl.int64)
    which, at = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS), tl.arange(0, BLOCK)
    k = which[:, None] * group + at[None, :]
    inside = (at < group)[None, :] & (k < inner)
    values = tl.load(x + row * inner + k, mask=inside, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(values), axis=1)
    scale = tl.where(most == 0.0, 1.0, tl.div_rn(most, tl.full((GROUPS,), 448.0, tl.float32)))
    code = nearest_e4m3(tl.div_rn(values, tl.zeros_like(values) + scale[:, None]))
    if VALUES:
        code *= scale[:, None]
    tl.store(codes + row * inner + k, code.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + row * groups + which, scale, mask=which < groups)


@triton.jit
def nearest_e4m3(value):
    """The nearest number of float8_e4m3fn, ties to even, of fp32 numbers up to 448."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = bits + 0x7FFFF + (bits >> 20 & 1) & 0xFFF00000  # three bits of the mantissa
    small = value + 24576.0 - 24576.0  # below 2^-6 the step is 2^-9: what fp32 rounds to between 2^14 and 2^15
    value = tl.where(tl.abs(value) < 0.015625, small, bits.to(tl.float32, bitcast=True))
    return tl.minimum(tl.maximum(value, -448.0), 448.0)


@triton.jit
def _scaled_tiles(
    x, codes, scale, scales, bias, out, count, columns, inner,
    c1, s1, t1, b0, steps,
    GROUP: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr, EVEN: tl.constexpr, FP8: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    down = tl.cdiv(count, ROWS)  # programs of the same rows of the weight are neighbours
    row = tl.program_id(0) % down * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) // down * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    line, token = tl.minimum(n, columns - 1).to(tl.int64), tl.minimum(row, count - 1).to(tl.int64)
    scale += (line // HIGH if HIGH > 0 else line * 0) * s1
    scales += token * t1
    codes += line[:, None] * c1
    x += token[None, :] * inner
    total = tl.zeros((BLOCK_N, ROWS), tl.float32)
    for step in range(steps):
        first = (split * steps + step) * BLOCK_K
        k = first + tl.arange(0, BLOCK_K)
        byte = fetch(codes + k[None, :], k[None, :] < inner, EVEN)
        values = fetch(x + k[:, None], k[:, None] < inner, EVEN)
        if FP8:
            part = tl.dot(byte.to(tl.float8e4nv, bitcast=True), values)
        else:
            part = tl.dot(e4m3(byte).to(x.dtype.element_ty), values, input_precision="ieee")
        group = first // GROUP if GROUP > 0 else 0
        inside = first < inner
        s, t = scale_at(scale + group, inside, KIND, EVEN), fetch(scales + group, inside, EVEN)
        total += part * s[:, None] * t[None, :]
    if bias is not None:
        total += tl.load(bias + n * b0, mask=n < columns, other=0.0).to(tl.float32)[:, None]
    inside = (row < count)[None, :] & (n < columns)[:, None]
    target = out + (split * count + row).to(tl.int64)[None, :] * columns + n[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)
