"""Products with packed matrices on a CPU, in place of the formulas in `packed`, which dequantise the whole matrix first.

`linear_int4` and `linear_int8` are compiled from `cpu.cpp` when they are first chosen, if there is a C++ compiler and
the CPU has AVX2: the library is kept in the user's cache folder, and loading it again takes no time. `linear_blocked`
needs nothing and takes every layout: a few rows are dequantised and multiplied at a time.

What lies between the products costs a token as much as int4's products do if it runs as many small calls. The same
library has the operations there, which `backend.use("cpp")` chooses together: each rounds where its formula does, except
that attention rounds only its result.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, torch_ops
from . import packed
from .packed import Int4, Int8, Packed

BLOCK_BYTES = 2 << 20  # of dequantised rows: they stay in the second- or third-level cache until they are multiplied
COMPILED_ROWS = 64  # above that, a CPU that multiplies bf16 natively is faster with `linear_blocked`

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-O3", "-ffp-contract=off", "-std=c++17", "-mavx2", "-mfma", "-mf16c", "-fopenmp", "-fPIC", "-shared")
COMPILE_SECONDS = 120
COLUMNS, STEP = 256, 32  # what cpu.cpp calls BLOCK and STEP
MOST_DIM = 1024  # of a head, what cpu.cpp calls MOST
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_ARGUMENTS = {
    "linear": (_POINTER, _POINTER, _INT, _POINTER, _LONG, _LONG, _LONG, _INT, _POINTER, _INT, _LONG, _POINTER, _INT, _POINTER),
    "attention": (_POINTER, _POINTER, _POINTER, _INT, *15 * (_LONG,), _POINTER),
    "rms_norm": (_POINTER, _POINTER, _INT, ctypes.c_float, _LONG, _LONG, _POINTER),
    "add_rms_norm": (*3 * (_POINTER,), _INT, ctypes.c_float, _LONG, _LONG, _POINTER, _POINTER),
    "rope": (_POINTER, _POINTER, _POINTER, _INT, *8 * (_LONG,), _POINTER),
    "norm_rope_write": (
        *5 * (_POINTER,), _INT, ctypes.c_float, *10 * (_LONG,), *3 * (_POINTER,), *8 * (_LONG,), *3 * (_POINTER,)
    ),
    "swiglu": (_POINTER, _POINTER, _INT, *4 * (_LONG,), _POINTER),
}
_RESULTS = {"norm_rope_write": _INT}


# ------------------------------------------------------------------------------------------------- a block at a time


def supports_blocked(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cpu" else "made for CPUs"


def linear_blocked(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias of any layout, holding BLOCK_BYTES of dequantised rows instead of a whole matrix.

    x (..., K), weight (N, K), bias (N,) -> (..., N) in x's dtype. Products are summed in at least fp32; without native
    bf16 the factors are not rounded below fp32 either.
    """
    rows, columns = weight[0].shape[-2], x.shape[-1]
    high = weight.block[0] if isinstance(weight, packed.Fp8) else 1
    dtype = x.dtype if _native(x.dtype) else torch.promote_types(x.dtype, torch.float32)
    step = max(BLOCK_BYTES // (columns * dtype.itemsize) // high, 1) * high
    wide = x.to(dtype)
    blocks = []
    for first in range(0, rows, step):
        block = packed.rows(weight, first, min(first + step, rows)).dequantize(dtype, columns)  # (n, K)
        blocks.append(F.linear(wide, block).to(x.dtype if bias is None else dtype))
    y = torch.cat(blocks, dim=-1)  # (..., N)
    return y if bias is None else (y + bias).to(x.dtype)


def moe_blocked(x: Tensor, gate_up: Packed, down: Packed, weights: Tensor, experts: Tensor) -> Tensor:
    """`packed.moe_packed`, every matrix through `linear_blocked`."""
    return packed.moe_packed(x, gate_up, down, weights, experts, linear_blocked)


@cache
def _native(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies this type as fast as fp32 or faster."""
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # PyTorch 2.9 has none
    bf16 = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return dtype.itemsize >= 4 or (dtype is torch.bfloat16 and bf16)


# ------------------------------------------------------------------------------------------------- compiled


def supports_compiled(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return "made for CPUs"
    if dtype == torch.float32:
        return "rounds x to 16 bits, which float32 is finer than"
    if dtype not in TYPES:
        return f"has no {dtype}"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "needs AVX2"
    library = _library()
    return library if isinstance(library, str) else None


def linear_int4(x: Tensor, weight: Int4, bias: Tensor | None = None) -> Tensor:
    """`packed.linear_int4` with x rounded to 16 bits for every 256 columns and everything else exact."""
    return _linear(x, weight, bias)


def linear_int8(x: Tensor, weight: Int8, bias: Tensor | None = None) -> Tensor:
    """`packed.linear_int8` with x rounded to 16 bits for every 256 columns and everything else exact."""
    return _linear(x, weight, bias)


def moe_compiled(x: Tensor, gate_up: Packed, down: Packed, weights: Tensor, experts: Tensor) -> Tensor:
    """`packed.moe_packed`, the matrices of 4- and 8-bit codes through `linear_int4` and `linear_int8`."""
    return packed.moe_packed(x, gate_up, down, weights, experts, _linear_any)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`ops.attention` in fp32 throughout, a kv head's keys and values read once for all the queries that share it.

    With a mask, or heads of other sizes than multiples of eight, PyTorch's runs.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if mask is not None or dim % 8 or not _alike(q, k, v) or not q.numel() or keys < queries or heads % kv_heads:
        return torch_ops.attention(q, k, v, mask)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _functions().attention(q.data_ptr(), k.data_ptr(), v.data_ptr(), TYPES[q.dtype], batch, heads, kv_heads, queries, keys, dim,
                           *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], out.data_ptr())  # fmt: skip
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`ops.swiglu` in one call."""
    if gate.dtype != up.dtype or gate.shape != up.shape or _learns(gate) or _learns(up):
        return ops.swiglu(gate, up)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    rows, columns = 1, gate.numel()
    if not (gate.is_contiguous() and up.is_contiguous()):  # halves of one projection: rows with gaps between them
        rows, columns = gate.shape[:-1].numel(), gate.shape[-1]
        gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate.reshape(rows, columns), up.reshape(rows, columns)))
    _functions().swiglu(gate.data_ptr(), up.data_ptr(), TYPES[gate.dtype], rows, columns, gate.stride(0) if rows > 1 else 0,
                        up.stride(0) if rows > 1 else 0, out.data_ptr())  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm` in one call: what it costs with one token is calls, not arithmetic."""
    if x.dtype != weight.dtype or weight.shape != x.shape[-1:] or _learns(x) or _learns(weight):
        return ops.rms_norm(x, weight, eps)
    x, library = x.contiguous(), _functions()
    out = torch.empty_like(x)
    columns = x.shape[-1]
    library.rms_norm(
        x.data_ptr(), weight.contiguous().data_ptr(), TYPES[x.dtype], eps, x.shape[:-1].numel(), columns, out.data_ptr()
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`ops.add_rms_norm` in one call."""
    alike = x.shape == residual.shape and x.dtype == residual.dtype == weight.dtype and weight.shape == x.shape[-1:]
    if not alike or _learns(x) or _learns(residual) or _learns(weight):
        return ops.add_rms_norm(x, residual, weight, eps)
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    _functions().add_rms_norm(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), TYPES[x.dtype], eps, x.shape[:-1].numel(),
                              x.shape[-1], total.data_ptr(), out.data_ptr())  # fmt: skip
    return total, out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`ops.rope` in one call."""
    batch, heads, tokens, dim = x.shape
    tables = cos.shape == sin.shape and cos.shape in ((1, tokens, dim), (batch, tokens, dim)) and dim % 2 == 0
    if not tables or x.stride(-1) != 1 or not x.dtype == cos.dtype == sin.dtype or _learns(x):
        return ops.rope(x, cos, sin)
    out = x.new_empty(x.shape)
    cos, sin = cos.contiguous(), sin.contiguous()
    table = tokens * dim if cos.shape[0] > 1 else 0
    _functions().rope(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), TYPES[x.dtype], batch, heads, tokens, dim,
                      x.stride(0), x.stride(1), x.stride(2), table, out.data_ptr())  # fmt: skip
    return out


def norm_rope_write(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """`ops.norm_rope_write` in one call."""
    (tokens, heads, dim), kv_heads = q.shape, k.shape[1]
    weights = [w for w in (q_weight, k_weight) if w is not None]
    fits = (
        k.shape == v.shape == (tokens, kv_heads, dim) and cos.shape == sin.shape == (tokens, dim) and slots.shape == (tokens,)
        and k_cache.shape == v_cache.shape and k_cache.shape[1] == kv_heads and k_cache.shape[3] == dim
        and dim % 2 == 0 and 0 < dim <= MOST_DIM and slots.dtype == torch.int64
        and q.dtype == k.dtype == v.dtype == cos.dtype == sin.dtype == k_cache.dtype == v_cache.dtype
        and q.stride(2) == k.stride(2) == v.stride(2) == k_cache.stride(3) == v_cache.stride(3) == 1
        and not (_learns(q) or _learns(k) or _learns(v))
    )  # fmt: skip
    if not fits or any(w.shape != (dim,) or w.dtype != q.dtype or w.stride(0) != 1 or _learns(w) for w in weights):
        return ops.norm_rope_write(q, k, v, q_weight, k_weight, eps, cos, sin, k_cache, v_cache, slots)
    cos, sin, slots, out = cos.contiguous(), sin.contiguous(), slots.contiguous(), q.new_empty(q.shape)
    outside = _functions().norm_rope_write(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), _pointer(q_weight), _pointer(k_weight), TYPES[q.dtype], eps, tokens, heads,
        kv_heads, dim, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.data_ptr(), sin.data_ptr(), slots.data_ptr(),
        *k_cache.shape[::2], *k_cache.stride()[:3], *v_cache.stride()[:3], k_cache.data_ptr(), v_cache.data_ptr(),
        out.data_ptr(),
    )  # fmt: skip
    if outside:
        raise IndexError(f"a slot lies outside the caches, which have {k_cache.shape[0]} x {k_cache.shape[2]}")
    return out


def _alike(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k and v are what cpu.cpp reads: one type, last axes contiguous, keys and values of the same shape."""
    return (
        q.dtype == k.dtype == v.dtype and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
        and q.stride(3) == k.stride(3) == v.stride(3) == 1 and not (_learns(q) or _learns(k) or _learns(v))
    )  # fmt: skip


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _learns(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _linear_any(x: Tensor, weight: Packed) -> Tensor:
    return _linear(x, weight, None) if isinstance(weight, Int4 | Int8) else linear_blocked(x, weight)


def _linear(x: Tensor, weight: Int4 | Int8, bias: Tensor | None) -> Tensor:
    count, columns = x.shape[:-1].numel(), x.shape[-1]
    if not _reads(x, weight, bias) or _learns(x) or (count > COMPILED_ROWS and _native(torch.bfloat16)):
        return linear_blocked(x, weight, bias)
    bits = 4 if isinstance(weight, Int4) else 8
    group = weight.group if weight.group < columns else max(COLUMNS, columns)
    codes, scale, zero, x = weight.codes.contiguous(), weight.scale.contiguous(), weight.zero, x.contiguous()
    zero = None if zero is None else zero.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], codes.shape[0])
    _functions().linear(
        codes.data_ptr(), scale.data_ptr(), TYPES[scale.dtype], _pointer(zero), codes.shape[0],
        columns, group, bits, x.data_ptr(), TYPES[x.dtype], count, _pointer(bias),
        0 if bias is None else TYPES[bias.dtype], out.data_ptr(),
    )  # fmt: skip
    return out


def _reads(x: Tensor, weight: Int4 | Int8, bias: Tensor | None) -> bool:
    """Whether cpu.cpp has this length of groups, and all that it would read is there; what is not, PyTorch refuses."""
    columns, group = x.shape[-1], weight.group
    known = group >= columns or group % COLUMNS == 0 or (COLUMNS % group == 0 and group % STEP == 0)
    rows, groups = weight.codes.shape[0], -(-columns // group)
    width = -(-columns // 2) if isinstance(weight, Int4) else columns
    return (
        known and weight.codes.shape == (rows, width) and weight.scale.shape == (rows, groups) and weight.codes.is_cpu
        and weight.scale.dtype in TYPES and (weight.zero is None or weight.zero.shape == (rows, groups))
        and (bias is None or (bias.shape == (rows,) and bias.dtype in TYPES))
    )  # fmt: skip


@cache
def _library() -> ctypes.CDLL | str:
    """cpu.cpp compiled, or the reason why it cannot be."""
    compiler = _compiler()
    if not compiler:
        return "needs a C++ compiler: install g++ or clang++, or name one in the environment variable CXX"
    try:
        library = ctypes.CDLL(str(_compile(compiler)))
    except subprocess.CalledProcessError as error:
        return f"{compiler[0]} failed: {error.stderr.strip().splitlines()[0] if error.stderr.strip() else error}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"compiling failed: {error}"
    for name, types in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, _RESULTS.get(name)
    return library


def _functions() -> Any:
    """The library, for callers whom `supports_compiled` has let through."""
    return _library()


def _compiler() -> list[str]:
    """The command that CXX names, or the first compiler found; empty if there is none."""
    named = os.environ.get("CXX", "").split()
    return named or [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))][:1]


def _compile(compiler: list[str]) -> Path:
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=COMPILE_SECONDS).stdout
    key = hashlib.sha256(b"\0".join((SOURCE.read_bytes(), " ".join((*compiler, *FLAGS)).encode(), version))).hexdigest()
    path = _folder() / f"cpu-{key[:24]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # complete before it has its name
            made = Path(folder) / path.name
            command = [*compiler, *FLAGS, str(SOURCE), "-o", str(made)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_SECONDS)
            made.replace(path)
    return path


def _folder() -> Path:
    """The user's cache folder for what was compiled; one that others may write to is not trusted."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen-ref"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        if os.access(folder, os.W_OK) and not (state.st_mode & 0o022) and state.st_uid == os.getuid():
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="qwen-ref-"))
