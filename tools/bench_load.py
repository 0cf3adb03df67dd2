"""How long a checkpoint of few bits takes to load, beside reading its bytes and copying them once, in one process in turn.

    python tools/bench_load.py                      # Qwen3-1.7B's shape, random weights, files in the page cache
    python tools/bench_load.py --layers 4 --rounds 3
    python tools/bench_load.py --wide --layers 10   # matrices of Qwen3-8B's shape, four times as large

The limit is a load that reads the file into new memory and moves the weights once, at the speed of a copy: ratio 1.
The goal is 1.2. Medians (minimum to maximum) are printed, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwen_ref.loading import load_model
from qwen_ref.memory import empty

QWEN3_17B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "hidden_size": 2048,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": True,
    "torch_dtype": "float16", "vocab_size": 4096,
}  # fmt: skip  (few words: the embedding is not packed, and not what is measured)
QWEN3_8B = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32}  # what differs
GROUP = 128


def compressed_tensors(bits: int) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": ["lm_head"]}


KINDS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "gptq-int4": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "gptq-int8": {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "desc_act": False, "sym": True},
    "gptq-int4-act-order": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": True},
    "compressed-tensors-int4": compressed_tensors(bits=4),
    "compressed-tensors-int8": compressed_tensors(bits=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=QWEN3_17B["num_hidden_layers"])
    parser.add_argument("--wide", action="store_true", help="matrices of Qwen3-8B's shape")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    summary = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), kind, {**QWEN3_17B, **(QWEN3_8B if args.wide else {}), "num_hidden_layers": args.layers})
            summary[kind] = measure(Path(folder), kind, args.rounds)
    print(json.dumps({"torch": torch.__version__, **vars(args), **summary}))


def measure(folder: Path, kind: str, rounds: int) -> dict[str, Any]:
    file = folder / "model.safetensors"
    size = file.stat().st_size
    first, second = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    sides: dict[str, Callable[[], Any]] = {
        "read": lambda: read(file, size), "copy": lambda: second.copy_(first),
        "load": lambda: load_model(folder, device="cpu", progress=False),
    }  # fmt: skip
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + 1):  # the first warms up, and may compile
        for side, work in sides.items():
            back(2 * size)
            taken = timed(work)
            if turn:
                times[side].append(taken)
    ratios = [load / (r + c) for r, c, load in zip(*times.values(), strict=True)]
    ratio = statistics.median(ratios)
    shown = "  ".join(f"{side} {statistics.median(t):.3f} s ({min(t):.3f} to {max(t):.3f})" for side, t in times.items())
    print(f"{kind}, {size / 1e9:.2f} GB: {shown}; load / (read + copy): {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
          flush=True)  # fmt: skip
    return {"times": times, "ratio": ratio}


def back(size: int) -> None:
    """Touch and free so much new memory: a virtual machine gives free memory back to its host, whose time is not measured."""
    empty((size,), torch.uint8, torch.device("cpu")).fill_(1)


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    result = work()
    taken = time.perf_counter() - started
    del result  # giving memory back is not part of it
    return taken


def read(file: Path, size: int) -> torch.Tensor:
    """The file's bytes in new memory."""
    out = empty((size,), torch.uint8, torch.device("cpu"))
    with file.open("rb", buffering=0) as source:
        rest: Any = memoryview(out.numpy())  # type: ignore[arg-type]
        while count := source.readinto(rest):
            rest = rest[count:]
    return out


def write(folder: Path, kind: str, c: dict[str, Any]) -> None:
    """A checkpoint of random codes, as its kind's library names and shapes the tensors."""
    hidden, inner, dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    heads, kv = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim
    shapes = {"self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
              "self_attn.o_proj": (hidden, heads), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
              "mlp.down_proj": (hidden, inner)}  # fmt: skip
    tensors = {"model.embed_tokens.weight": torch.randn(c["vocab_size"], hidden).half(),
               "model.norm.weight": torch.ones(hidden).half()}  # fmt: skip
    for layer in range(c["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{base}.{name}.weight"] = torch.ones(hidden).half()
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            tensors[f"{base}.{name}.weight"] = torch.ones(dim).half()
        for name, (rows, columns) in shapes.items():
            tensors |= {f"{base}.{name}.{part}": t for part, t in packed(kind, rows, columns).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**c, "quantization_config": KINDS[kind]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def packed(kind: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    groups = columns // GROUP
    if kind.startswith("compressed-tensors"):
        bits = KINDS[kind]["config_groups"]["group_0"]["weights"]["num_bits"]
        return {"weight_packed": random_words(rows, columns * bits // 32), "weight_shape": torch.tensor([rows, columns]),
                "weight_scale": (torch.rand(rows, groups) * 0.01 + 0.001).half()}  # fmt: skip
    words = 32 // KINDS[kind]["bits"]
    shape = (columns, rows // words) if kind == "awq" else (columns // words, rows)
    parts = {"qweight": random_words(*shape), "qzeros": random_words(groups, rows // words),
             "scales": (torch.rand(groups, rows) * 0.01 + 0.001).half()}  # fmt: skip
    if kind != "awq":
        group_of = torch.arange(columns) // GROUP
        order = torch.randperm(columns) if KINDS[kind]["desc_act"] else torch.arange(columns)
        parts["g_idx"] = group_of[order].int()
    return parts


def random_words(*shape: int) -> torch.Tensor:
    return torch.randint(-(1 << 31), (1 << 31) - 1, shape, dtype=torch.int32)


if __name__ == "__main__":
    main()
