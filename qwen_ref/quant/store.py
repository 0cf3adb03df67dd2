"""Packed matrices as checkpoints store them: the tensors of each, and the `quantization_config` that names the format.

The inverse of what `compressed_tensors`, `bitsandbytes` and `fp8` read; their docstrings say where each format is defined.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bitsandbytes import STATE
from .format import matches
from .packed import Code4, Fp8, Int4, Int8, pack4, unpack4
from .rounding import NF4_BLOCK

# Names of tensors end in a dot or nothing: "weight" + "_packed", "weight" + ".absmax". KEPT: as `making.KEPT`.
KEPT = (r"re:.*mlp\.gate$", r"re:.*shared_expert_gate$", r"re:.*in_proj_(ba|a|b)$", r"re:^mtp\.")


class Store(NamedTuple):
    """How one kind is written."""

    tensors: Callable[[Any, int, torch.dtype], dict[str, Tensor]]  # layout, columns, the model's dtype -> by last name
    config: Callable[[Any, list[str], torch.dtype], dict[str, Any]]  # `making.fitting`, what is kept by name, the model's dtype


def int4_tensors(weight: Int4, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """pack-quantized: eight codes in an int32, the first in the lowest bits."""
    return _words(weight.codes, weight.scale, columns)


def int8_tensors(weight: Int8, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """pack-quantized too: vLLM reads 8 bits without quantised activations in no other encoding."""
    return _words(weight.codes.view(torch.uint8) ^ 128, weight.scale, columns)


def _words(codes: Tensor, scale: Tensor, columns: int) -> dict[str, Tensor]:
    codes = F.pad(codes, (0, -codes.shape[-1] % 4)).contiguous()
    return {
        "weight_packed": codes.view(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor([codes.shape[0], columns]),
    }


def compressed_config(bits: int) -> Callable[[Any, list[str], torch.dtype], dict[str, Any]]:
    def config(group: Any, kept: list[str], dtype: torch.dtype) -> dict[str, Any]:
        grouped = {"strategy": "group", "group_size": group} if bits == 4 else {"strategy": "channel", "group_size": None}
        weights = {"num_bits": bits, "type": "int", "symmetric": True, **grouped, "dynamic": False, "actorder": None}
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None,
                  "format": "pack-quantized"}  # fmt: skip
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": ["lm_head", *(pattern for pattern in KEPT if any(matches(name, (pattern,)) for name in kept))],
            "kv_cache_scheme": None,
        }

    return config


def nf4_tensors(weight: Code4, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """bitsandbytes: the matrix row after row, the first of two codes in the high bits; no double quantisation."""
    codes = unpack4(weight.codes)[:, :columns]
    flat = pack4(codes.flatten()[None])[0]
    state = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": str(dtype).removeprefix("torch."),
             "shape": [codes.shape[0], columns]}  # fmt: skip
    return {
        "weight": (flat << 4 | flat >> 4)[:, None],
        "weight.absmax": weight.scale.flatten()[:: NF4_BLOCK // weight.group].contiguous(),
        "weight.quant_map": weight.table,
        f"{STATE}nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def nf4_config(size: Any, kept: list[str], dtype: torch.dtype) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", *kept],
    }


def fp8_tensors(weight: Fp8, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight": weight.codes, "weight_scale_inv": weight.scale}


def fp8_config(size: Any, kept: list[str], dtype: torch.dtype) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": list(size),
        "modules_to_not_convert": ["lm_head", *kept],
    }


STORES: dict[str, Store] = {
    "int8": Store(int8_tensors, compressed_config(8)),
    "int4": Store(int4_tensors, compressed_config(4)),
    "nf4": Store(nf4_tensors, nf4_config),
    "fp8": Store(fp8_tensors, fp8_config),
}
