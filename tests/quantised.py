"""Quantised checkpoints for the tests, written by the library that defines the format, or after its published loops.

AWQ and GPTQ: their libraries need a GPU; the loops of their packers (AutoAWQ `WQLinear_GEMM.from_linear`, AutoGPTQ
`QuantLinear.pack`) stand here one element at a time. Everything else is written by compressed-tensors and bitsandbytes.
"""

from __future__ import annotations

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
GROUP = 32
KEPT = ("lm_head", "mlp.gate", "shared_expert_gate")  # what every format here leaves in full precision


def checkpoint(folder: Path, model_type: str, format: str, **changes) -> dict[str, torch.Tensor]:
    """Write a quantised checkpoint with random weights; returns the dequantised weights, by official name."""
    config = transformers.AutoConfig.for_model(**{**CONFIGS[model_type], **changes})
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():  # biases and norms too
        parameter.data = torch.randn_like(parameter) * (0.1 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    plain = load_file(folder / "model.safetensors")
    settings, write = FORMATS[format]
    stored, dequantised = {}, {}
    for name, tensor in plain.items():
        owner = name.removesuffix(".weight")
        if tensor.dim() == 2 and "proj" in name and not any(f".{kept}." in f".{name}" for kept in KEPT):
            tensors, value = write(tensor)
            stored.update({f"{owner}.{key}": value.contiguous() for key, value in tensors.items()})
            dequantised[name] = value
        else:
            stored[name] = dequantised[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": settings}))
    return dequantised


def oracle(folder: Path, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """transformers with these weights, in fp32."""
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    plain = folder / "plain"
    plain.mkdir(exist_ok=True)
    (plain / "config.json").write_text(json.dumps(raw))
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


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
                "modules_to_not_convert": ["lm_head", "mlp.gate", "shared_expert_gate"]}  # fmt: skip
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
        "quant_method": "compressed-tensors", "format": encoding, "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    return settings, write


# bitsandbytes


def bnb4(kind, nested):
    from bitsandbytes import functional as bnb

    def write(weight):
        codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
        value = bnb.dequantize_4bit(codes, state)
        return {"weight": codes, **{f"weight.{key}": v for key, v in state.as_dict(packed=True).items()}}, value

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind,
                "bnb_4bit_use_double_quant": nested, "llm_int8_skip_modules": ["lm_head", "mlp.gate", "shared_expert_gate"]}  # fmt: skip
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
                    "modules_to_not_convert": ["lm_head", "gate", "shared_expert_gate"]}, fp8_tensor),
    "compressed-int4": compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    "compressed-int4-zeros": compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
    "compressed-int4-channel": compressed("pack-quantized", num_bits=4, type="int", strategy="channel"),
    "compressed-int8": compressed("pack-quantized", num_bits=8, type="int", strategy="group", group_size=32, symmetric=False),
    "compressed-int8-channel": compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    "compressed-fp8-channel": compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "compressed-fp8-tensor": compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "compressed-fp8-block": compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 32]),
    "compressed-mxfp4": compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    "compressed-nvfp4": compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    "modelopt-nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4",
                        "ignore": ["lm_head", "model.layers.*.mlp.gate", "*shared_expert_gate*"]}, modelopt),
    "bnb-int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False,
                  "llm_int8_skip_modules": ["lm_head", "mlp.gate", "shared_expert_gate"]}, bnb8),
    "bnb-nf4": bnb4("nf4", False),
    "bnb-nf4-nested": bnb4("nf4", True),
    "bnb-fp4": bnb4("fp4", False),
}  # fmt: skip
