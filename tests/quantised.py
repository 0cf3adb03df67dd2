"""Quantised checkpoints for the tests, written by the library that defines the format, or after its published loops.

AWQ and GPTQ: their libraries need a GPU; the loops of their packers (AutoAWQ `WQLinear_GEMM.from_linear`, AutoGPTQ
`QuantLinear.pack`) stand here one element at a time. Everything else is written by compressed-tensors and bitsandbytes.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

# Widths that every format can hold (multiples of 32), and no two alike.
_SIZES = {
    "vocab_size": 211, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
_MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [1]}
CONFIGS = {
    "qwen2": {**_SIZES, "model_type": "qwen2", "hidden_size": 192},
    "qwen2_moe": {**_SIZES, **_MOE, "model_type": "qwen2_moe", "hidden_size": 192, "shared_expert_intermediate_size": 128},
    "qwen3": {**_SIZES, "model_type": "qwen3", "head_dim": 32},
    "qwen3_moe": {**_SIZES, **_MOE, "model_type": "qwen3_moe", "head_dim": 32, "norm_topk_prob": True},
}
_HYBRID = {
    **{name: value for name, value in _SIZES.items() if name != "rope_theta"}, "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 16, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}  # fmt: skip
_HYBRID_MOE = {**_MOE, "shared_expert_intermediate_size": 128}
_SECTIONS = {"rope_parameters": {**_HYBRID["rope_parameters"], "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]}}
HYBRIDS = {
    "qwen3_next": {**_HYBRID, **_HYBRID_MOE, "model_type": "qwen3_next"},
    "qwen3_5": {**_HYBRID, **_SECTIONS, "model_type": "qwen3_5_text"},
    "qwen3_5_moe": {**_HYBRID, **_HYBRID_MOE, **_SECTIONS, "model_type": "qwen3_5_moe_text"},
}
GROUP = 32
# What every format here leaves in full precision, as the official FP8 repositories do.
KEPT = ("lm_head", "mlp.gate", "shared_expert_gate", "conv1d", "in_proj_ba", "in_proj_a", "in_proj_b")


def checkpoint(folder: Path, model_type: str, format: str, **changes) -> dict[str, torch.Tensor]:
    """Write a quantised checkpoint with random weights; returns the dequantised weights, by official name."""
    return write_checkpoint(folder, model_type, lambda name: format, FORMATS[format][0], **changes)


def write_checkpoint(folder: Path, model_type: str, format_of, settings, *, multimodal=False, **changes) -> dict[str, torch.Tensor]:
    """The same with a format for each matrix, by official name; and as the official files of a multimodal model."""
    config = transformers.AutoConfig.for_model(**{**(CONFIGS | HYBRIDS)[model_type], **changes})
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():  # biases and norms too
        parameter.data = torch.randn_like(parameter) * (0.1 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    stored, dequantised = {}, {}
    for name, tensor in one_by_one(load_file(folder / "model.safetensors")).items():
        owner = name.removesuffix(".weight")
        if is_quantised(name):
            tensors, value = FORMATS[format_of(owner)][1](tensor)
            stored.update({f"{owner}.{key}": value.contiguous() for key, value in tensors.items()})
            dequantised[name] = value
        else:
            stored[name] = dequantised[name] = tensor
    raw = json.loads((folder / "config.json").read_text())
    if multimodal:
        stored = {spelled(name): tensor for name, tensor in stored.items()} | {"model.visual.blocks.0.attn.qkv.weight": torch.ones(6, 2)}
        raw = {"model_type": model_type, "tie_word_embeddings": False, "vision_config": {"depth": 1}, "text_config": raw}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": settings}))
    return dequantised


def spelled(name: str) -> str:
    """A name of the language model in a multimodal file."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def is_quantised(name: str) -> bool:
    """Whether the checkpoints here quantise this tensor, by its official name."""
    dotted = f".{name}"
    projection = name.endswith(("proj.weight", "in_proj_qkvz.weight", "in_proj_qkv.weight", "in_proj_z.weight"))
    return projection and not any(f".{kept}." in dotted for kept in KEPT)


def one_by_one(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacked experts, which Qwen3.5 has in plain files, as its quantised ones have them."""
    out = {}
    for name, tensor in weights.items():
        owner, _, part = name.rpartition(".")
        if part == "gate_up_proj":
            for e, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                out |= {f"{owner}.{e}.gate_proj.weight": gate.clone(), f"{owner}.{e}.up_proj.weight": up.clone()}
        elif part == "down_proj":
            out |= {f"{owner}.{e}.down_proj.weight": matrix.clone() for e, matrix in enumerate(tensor)}
        else:
            out[name] = tensor
    return out


def stacked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `one_by_one`."""
    out = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for owner in {name.split(".experts.")[0] + ".experts" for name in weights if ".experts." in name}:
        count = sum(name.startswith(f"{owner}.") and name.endswith("up_proj.weight") for name in weights)
        gate, up, down = ([weights[f"{owner}.{e}.{part}_proj.weight"] for e in range(count)] for part in ("gate", "up", "down"))
        out[f"{owner}.gate_up_proj"] = torch.stack([torch.cat(both) for both in zip(gate, up, strict=True)])
        out[f"{owner}.down_proj"] = torch.stack(down)
    return out


def oracle(folder: Path, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """transformers with these weights, in fp32."""
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    raw |= raw.pop("text_config", {})  # of a multimodal file, the language model
    plain = folder / "plain"
    plain.mkdir(exist_ok=True)
    (plain / "config.json").write_text(json.dumps(raw))
    weights = stacked(weights) if "qwen3_5" in raw["model_type"] else weights
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def _random() -> np.random.Generator:
    """Another one for every matrix, the same in every run."""
    return np.random.default_rng(int(torch.randint(0, 1 << 30, ())))


# AWQ


def awq(weight):
    n, k = weight.shape
    codes, zeros = _random().integers(0, 16, (2, k, n))
    zeros = zeros[: k // GROUP]
    scales = (torch.rand(k // GROUP, n) * 0.02 + 0.005).half()

    def packed(values):
        words = np.zeros((values.shape[0], n // 8), np.uint32)
        for column in range(n // 8):
            for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                words[:, column] |= values[:, 8 * column + place].astype(np.uint32) << (4 * i)
        return torch.from_numpy(words.view(np.int32))

    value = torch.empty(n, k)
    for i in range(k):
        difference = torch.from_numpy(codes[i] - zeros[i // GROUP])
        value[:, i] = difference.float() * scales[i // GROUP].float()
    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, value


# GPTQ


def gptq(bits, *, version=1, symmetric=True, act_order=False, group=GROUP):
    def write(weight):
        (n, k), random = weight.shape, _random()
        count, most, per_word = -(-k // group), (1 << bits) - 1, 32 // bits
        codes = random.integers(0, most + 1, (k, n))
        zeros = np.full((count, n), (most + 1) // 2) if symmetric else random.integers(0, most + 1, (count, n))
        scales = (torch.rand(count, n) * 0.02 + 0.005).half() * 8 / (1 << bits - 1)
        g_idx = np.arange(k) // group
        if act_order:
            random.shuffle(g_idx)
        words = np.zeros((k // per_word, n), np.uint32)
        for row in range(k // per_word):
            for i in range(per_word):
                words[row] |= codes[per_word * row + i].astype(np.uint32) << (bits * i)
        stored = (zeros - (1 if version == 1 else 0)) & most
        zero_words = np.zeros((count, n // per_word), np.uint32)
        for column in range(n // per_word):
            for i in range(per_word):
                zero_words[:, column] |= stored[:, per_word * column + i].astype(np.uint32) << (bits * i)
        value = torch.empty(n, k)
        for i in range(k):
            value[:, i] = torch.from_numpy(codes[i] - zeros[g_idx[i]]).float() * scales[g_idx[i]].float()
        return {
            "qweight": torch.from_numpy(words.view(np.int32)),
            "qzeros": torch.from_numpy(zero_words.view(np.int32)),
            "scales": scales,
            "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
        }, value

    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": act_order,
                "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}  # fmt: skip
    return settings, write


# FP8


def fp8_blocks(high=64, wide=48, scale_dtype=torch.float32):
    """Blocks that do not divide the matrices; dequantised one block at a time."""

    def write(weight):
        n, k = weight.shape
        scale = torch.empty(-(-n // high), -(-k // wide))
        codes, value = torch.empty(n, k, dtype=torch.float8_e4m3fn), torch.empty(n, k)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                block = np.s_[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
                scale[i, j] = (weight[block].abs().max() / 448).to(scale_dtype).float()
                codes[block] = (weight[block] / scale[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
                value[block] = codes[block].float() * scale[i, j]
        return {"weight": codes, "weight_scale_inv": scale.to(scale_dtype)}, value

    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [high, wide],
                "modules_to_not_convert": list(KEPT)}  # fmt: skip
    return settings, write


def fp8_tensor(weight):
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale, "activation_scale": torch.tensor(0.5)}, codes.float() * scale


# compressed-tensors


def compressed(encoding, *, symmetric=True, act_order=False, **arguments):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    args = QuantizationArgs(symmetric=symmetric, **arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(encoding)

    def write(weight):
        n, k = weight.shape
        state = {"weight": weight, "weight_zero_point": None}
        random = torch.Generator().manual_seed(int(torch.randint(0, 1 << 30, ())))
        shape = {"tensor": (1,), "channel": (n, 1), "group": (n, k // (args.group_size or 1)),
                 "tensor_group": (n, k // (args.group_size or 1)), "block": (-(-n // 32), -(-k // 32))}[args.strategy]  # fmt: skip
        if args.num_bits == 4 and args.type == "float":
            amax = weight.view(n, -1, args.group_size).abs().amax(-1)
            if args.group_size == 16:
                state["weight_global_scale"] = 448 * 6 / weight.abs().max()
                state["weight_scale"] = (state["weight_global_scale"] * amax / 6).to(torch.float8_e4m3fn).float()
            else:
                state["weight_scale"] = torch.exp2(torch.ceil(torch.log2(amax / 6)))
        else:
            most = 448 if args.type == "float" else 2 ** (args.num_bits - 1)
            state["weight_scale"] = weight.abs().max() / most * (torch.rand(shape, generator=random) * 0.5 + 0.75)
            if not symmetric:
                low, high = -(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1)
                state["weight_zero_point"] = torch.randint(low, high, shape, generator=random).to(torch.int8)
        state = {key: value for key, value in state.items() if value is not None}
        packed = compressor.compress(dict(state), scheme)
        if encoding.startswith("nvfp4"):  # its decompress computes in bf16: the same functions in fp32
            codes = unpack_fp4_from_uint8(packed["weight_packed"], n, k, dtype=torch.float32)
            value = dequantize(codes, packed["weight_scale"].float(), None, args, torch.float32, packed["weight_global_scale"])
        else:
            value = compressor.decompress(dict(packed), scheme)["weight"].float()
        return {key: v for key, v in packed.items() if isinstance(v, torch.Tensor)}, value

    weights = json.loads(args.model_dump_json())
    settings = {
        "quant_method": "compressed-tensors", "format": encoding, "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$", "re:.*in_proj_(ba|a|b)$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    return settings, write


# bitsandbytes


def dequantize_4bit(codes, state):
    """bitsandbytes' own, of the matrix as one row: its kernel for AVX-512 (0.49) lets a block of 64 begin wherever a row does,
    as only rows of whole blocks have it, and gives other numbers for rows of 96 than every other of its kernels."""
    from bitsandbytes import functional as bnb

    flat = copy.copy(state)
    flat.shape = torch.Size((1, state.shape.numel()))
    return bnb.dequantize_4bit(codes, flat).view(state.shape)


def bnb4(kind, nested):
    from bitsandbytes import functional as bnb

    def write(weight):
        codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
        value = dequantize_4bit(codes, state)
        return {"weight": codes, **{f"weight.{key}": v for key, v in state.as_dict(packed=True).items()}}, value

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind,
                "bnb_4bit_use_double_quant": nested, "llm_int8_skip_modules": list(KEPT)}  # fmt: skip
    return settings, write


def bnb8(weight):
    from bitsandbytes import functional as bnb

    codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
    value = bnb.int8_vectorwise_dequant(codes, scale)
    return {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}, value


# NVIDIA ModelOpt: the codes of compressed-tensors under other names, and a scale that multiplies


def modelopt(weight):
    tensors, value = compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)[1](weight)
    scale_2 = 1 / tensors["weight_global_scale"]
    scale = tensors["weight_scale"].float() * scale_2
    signs = torch.stack((tensors["weight_packed"] & 15, tensors["weight_packed"] >> 4), -1).flatten(-2)
    magnitude = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[(signs & 7).long()]
    value = torch.where(signs > 7, -magnitude, magnitude) * scale.repeat_interleave(16, 1)
    names = {"weight": tensors["weight_packed"], "weight_scale": tensors["weight_scale"], "weight_scale_2": scale_2.reshape(())}
    return {**names, "input_scale": torch.tensor(0.25)}, value


def modelopt_fp8(weight):
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, codes.float() * scale


FORMATS = {
    "awq": ({"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True,
             "modules_to_not_convert": None}, awq),
    "gptq-int4": gptq(4),
    "gptq-int4-zeros": gptq(4, symmetric=False),
    "gptq-int4-v2": gptq(4, version=2, symmetric=False),
    "gptq-int4-act-order": gptq(4, act_order=True),
    "gptq-int8": gptq(8),
    "gptq-int8-zeros": gptq(8, symmetric=False),
    "gptq-int8-act-order": gptq(8, act_order=True, version=2),
    "gptq-int4-partial-group": gptq(4, group=40, symmetric=False),
    "fp8": fp8_blocks(),
    "fp8-bf16-scales": fp8_blocks(32, 32, torch.bfloat16),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None,
                    "modules_to_not_convert": ["gate", *KEPT]}, fp8_tensor),
    "fp8-tensor-autofp8": ({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": list(KEPT)}, modelopt_fp8),
    "compressed-int4": compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    "compressed-int4-zeros": compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
    "compressed-int4-channel": compressed("pack-quantized", num_bits=4, type="int", strategy="channel"),
    "compressed-int4-tensor": compressed("pack-quantized", num_bits=4, type="int", strategy="tensor", symmetric=False),
    "compressed-int8-tensor": compressed("pack-quantized", num_bits=8, type="int", strategy="tensor", symmetric=False),
    "compressed-int8": compressed("pack-quantized", num_bits=8, type="int", strategy="group", group_size=32, symmetric=False),
    "compressed-int8-channel": compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    "compressed-fp8-channel": compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "compressed-fp8-tensor": compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "compressed-fp8-block": compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 32]),
    "compressed-mxfp4": compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    "compressed-nvfp4": compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    "modelopt-nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4",
                        "ignore": ["lm_head", "model.layers.*.mlp.gate", "*shared_expert_gate*", "*in_proj_a", "*in_proj_b*"]}, modelopt),
    "modelopt-fp8": ({"quant_method": "modelopt", "quant_algo": "FP8",
                      "ignore": ["lm_head", "*.mlp.gate", "*shared_expert_gate*", "*in_proj_a", "*in_proj_b*"]}, modelopt_fp8),
    "bnb-int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False,
                  "llm_int8_skip_modules": list(KEPT)}, bnb8),
    "bnb-nf4": bnb4("nf4", False),
    "bnb-nf4-nested": bnb4("nf4", True),
    "bnb-fp4": bnb4("fp4", False),
}  # fmt: skip
