"""Prefill, decode and memory of quantised weights on a CPU, beside llama.cpp, in one run. Ratios above 1: we are faster.

    python tools/bench_quantized.py --llama ENV/bin/python       # Qwen3-0.6B's shape, random weights, int8 and int4
    python tools/bench_quantized.py --layers 4 --rounds 2        # a quick look, without llama.cpp

`--llama` names an interpreter that has llama-cpp-python; the `gguf` package writes its files. First comes the gate: in bf16
the logits through the fast products may be off by no more than twice what the formulas lose. Then the sides take turns, each
in a fresh process, `--rounds` times; medians and the spread (minimum to maximum) are printed, and one JSON object as the
last line. The head is quantised as the other matrices are, on all sides. Ours is fused, and runs with `backend.use("cpp")`.
With `--no-amx` ours leaves a CPU's matrix unit out; a llama.cpp to go with it has to be built without, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QWEN3_06B: dict[str, Any] = {
    "model_type": "qwen3", "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "tie_word_embeddings": True, "vocab_size": 151936,
}  # fmt: skip
QWEN35_08B: dict[str, Any] = {
    "model_type": "qwen3_5_text", "head_dim": 256, "hidden_size": 1024, "intermediate_size": 3584,
    "num_attention_heads": 8, "num_hidden_layers": 24, "num_key_value_heads": 2, "linear_num_value_heads": 16,
    "tie_word_embeddings": True, "vocab_size": 248320,
}  # fmt: skip
RIVAL = {"int8": "q8_0", "int4": "q4_0"}
GOALS = {"int8 decode": 1.0, "int4 decode": 1.1, "int8 prefill": 1.5, "int4 prefill": 1.5}
WARM, LIKE = 16, 2.0  # tokens before decoding; how many times the formulas' own error in bf16 the fast products may have

LLAMA = """
import json, sys, time
from llama_cpp import Llama
path, threads, prompt, tokens, warm = sys.argv[1], *map(int, sys.argv[2:])
model = Llama(path, n_ctx=prompt + 64, n_batch=prompt, n_ubatch=prompt, n_threads=threads, n_threads_batch=threads,
              verbose=False)
def timed(ids):
    start = time.perf_counter(); model.eval(ids); return time.perf_counter() - start
ids = [i * 7919 % 150000 for i in range(prompt)]
timed(ids); model.reset()
prefill = min(timed(ids), (model.reset(), timed(ids))[1]); model.reset()
timed(ids[:warm]); steps = sorted(timed([i]) for i in ids[:tokens])
print(json.dumps({"prefill": prompt / prefill, "decode": 1 / steps[len(steps) // 2],
                  "memory": int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", metavar="PYTHON", help="an interpreter that can import llama_cpp")
    parser.add_argument("--layers", type=int, default=QWEN3_06B["num_hidden_layers"])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of prefill")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of decode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=tuple(RIVAL), help="measure one width")
    parser.add_argument("--beside", type=int, default=0, metavar="N", help="with so many processes that want a core each")
    parser.add_argument("--no-amx", action="store_true", help="leave out the CPU's matrix unit")
    parser.add_argument("--worker", choices=tuple(RIVAL), help=argparse.SUPPRESS)
    parser.add_argument("--gate", choices=tuple(RIVAL), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker or args.gate:
        print(json.dumps(measure(args.worker, args) if args.worker else gate(args.gate, args)))
        return
    widths = [args.only] if args.only else list(RIVAL)
    own = ["--layers", args.layers, "--prompt", args.prompt, "--tokens", args.tokens, "--threads", args.threads]
    if args.no_amx:
        own += ["--no-amx"]
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"  # for PyTorch's products, in the processes to come
    for width in widths:
        error = child([sys.executable, __file__, "--gate", width, *own])["error"]
        if not error < LIKE:
            raise SystemExit(f"{width}: the logits are off by {error:.2g} times what the formulas lose; nothing was timed")
        print(f"{width}: logits off by {error:.2f} of what the formulas lose in bf16")
    with tempfile.TemporaryDirectory() as folder:
        commands = {width: [sys.executable, __file__, "--worker", width, *own] for width in widths}
        for width in widths if args.llama else ():
            path = Path(folder) / f"{RIVAL[width]}.gguf"
            write_gguf(path, RIVAL[width], args.layers)
            commands[RIVAL[width]] = [args.llama, "-c", LLAMA, path, args.threads, args.prompt, args.tokens, WARM]
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in commands}
        with busy(args.beside):
            for _ in range(args.rounds):
                for side, command in commands.items():
                    runs[side].append(child(command))
    report(runs, widths)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that do nothing, all the time."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def child(command: list[Any]) -> dict[str, Any]:
    out = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if out.returncode:
        raise SystemExit(f"{command[:4]} failed:\n{out.stderr[-2000:]}")
    return json.loads(out.stdout.strip().splitlines()[-1])


def report(runs: dict[str, list[dict[str, Any]]], widths: list[str]) -> None:
    summary: dict[str, Any] = {}
    print(f"{'':8}" + "".join(f"{name:>26}" for name in ("prefill tok/s", "decode tok/s", "memory MB")))
    for side, results in runs.items():
        cells = {name: [r[name] for r in results] for name in ("prefill", "decode", "memory")}
        summary[side] = {name: statistics.median(values) for name, values in cells.items()} | results[-1].get("also", {})
        shown = (f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})" for values in cells.values())
        print(f"{side:8}" + "".join(f"{text:>26}" for text in shown))
    for width in widths:
        ours = summary[width]
        held = ours["packed"] + ours["cache"]
        ours["rest"] = (ours["memory"] - ours["import"] - held) / held
        print(f"{width}: memory {ours['memory']:.0f} MB, of which {ours['import']:.0f} importing torch, {ours['packed']:.0f} "
              f"packed, {ours['cache']:.0f} cache; the rest is {ours['rest']:.0%} of packed and cache "
              f"(goal: at most 15%)")
        for name in ("prefill", "decode") if RIVAL[width] in runs else ():
            turns = [a[name] / b[name] for a, b in zip(runs[width], runs[RIVAL[width]], strict=True)]
            ratio = statistics.median(turns)
            print(f"{width} {name}: {ratio:.2f} of {RIVAL[width]} ({min(turns):.2f} to {max(turns):.2f}); "
                  f"goal {GOALS[f'{width} {name}']}")
            summary[width][f"{name} ratio"] = ratio
    print(json.dumps(summary))


# ------------------------------------------------------------------------------------------------- ours


def measure(width: str, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    imported = peak()
    from qwen_ref import backend

    set_up(args)
    backend.use("cpp")
    with torch.inference_mode():
        model = random_model(width, args.layers)
        packed = sum(t.nbytes for _, m in model.packed_modules() for t in m.packed_tensors)
        model = model.fuse()
        ids = torch.tensor([[i * 7919 % 150000 for i in range(args.prompt)]])

        def timed(chunk: torch.Tensor, cache: Any) -> float:
            start = time.perf_counter()
            step(model, chunk, cache)
            return time.perf_counter() - start

        cache = model.make_cache()
        timed(ids, cache)  # the kernel may be compiled here
        held, prefill = cache.nbytes(), math.inf
        for _ in range(2):
            cache.truncate(0)  # llama.cpp's is made once, too
            prefill = min(prefill, timed(ids, cache))
        cache.truncate(0)
        timed(ids[:, :WARM], cache)
        decode = statistics.median(timed(ids[:, i : i + 1], cache) for i in range(args.tokens))
    mb = 2**20
    also = {"import": imported, "packed": packed / mb, "cache": held / mb}
    return {"prefill": args.prompt / prefill, "decode": 1 / decode, "memory": peak(), "also": also}


def gate(width: str, args: argparse.Namespace) -> dict[str, float]:
    """The error of the fast products' logits in bf16 over that of the formulas', both against the formulas in fp32."""
    import torch

    from qwen_ref import backend

    set_up(args)
    with torch.inference_mode():
        model = random_model(width, min(args.layers, 2))
        prompts = [torch.tensor([[i * 7919 % 150000 for i in range(count)]]) for count in (1, 7)]
        with backend.use("cpp"):
            fast = [step(model.fuse(), ids, model.make_cache()).float() for ids in prompts]
        with backend.use("eager"):
            plain = [step(model, ids, model.make_cache()).float() for ids in prompts]
            model.float()
            exact = [step(model, ids, model.make_cache()) for ids in prompts]
    errors = [max(float((y - e).norm() / e.norm()) for y, e in zip(side, exact, strict=True)) for side in (fast, plain)]
    return {"error": errors[0] / errors[1]}


def set_up(args: argparse.Namespace) -> None:
    """How many threads, and what of the CPU cpp may use."""
    import torch

    from qwen_ref.cpp import library

    torch.set_num_threads(args.threads)
    if args.no_amx:
        library.BEYOND.pop("amx_bf16", None)


def step(model: Any, ids: Any, cache: Any) -> Any:
    """Logits of the last token, as `generate` has them computed."""
    return model.lm_head(model.model(ids, None, cache)[:, -1:])


def peak() -> float:
    """MB; ru_maxrss would count what the parent had when it started this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def random_model(width: str, layers: int, shape: dict[str, Any] = QWEN3_06B) -> Any:
    """A model with every matrix packed, in such memory as `load` takes: nothing is ever held unpacked."""
    import torch

    from qwen_ref import layers as plain
    from qwen_ref.loading import _NoInitialValues
    from qwen_ref.memory import empty
    from qwen_ref.models import qwen3, qwen3_5
    from qwen_ref.quant.format import Matrix
    from qwen_ref.quant.layers import PackedEmbedding, PackedLinear
    from qwen_ref.quant.packed import Int4, Int8, Packed

    torch.manual_seed(0)
    cpu = torch.device("cpu")

    def matrix(rows: int, columns: int) -> Packed:
        if width == "int8":
            codes = empty((rows, columns), torch.int8, cpu).random_(-127, 128)
            return Int8(codes, torch.rand(rows, 1).add(0.5).mul(0.02 / 73), None, columns)
        codes = empty((rows, columns // 2), torch.uint8, cpu).random_(0, 256)
        return Int4(codes, torch.rand(rows, columns // 128).add(0.5).mul(0.02 / 4.6), None, 128)

    with torch.device("meta"), _NoInitialValues():
        generation = qwen3 if shape["model_type"] == "qwen3" else qwen3_5
        model = generation.Model(generation.Config.from_json({**shape, "num_hidden_layers": layers}))
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, plain.Linear):
                rows, columns = child.weight.shape
                setattr(parent, name, PackedLinear(Matrix(matrix(rows, columns)), (rows, columns)))
    size = (shape["vocab_size"], shape["hidden_size"])
    head = matrix(*size)
    model.model.embed_tokens = PackedEmbedding(head, size, torch.bfloat16)
    model.lm_head = PackedLinear(Matrix(head), size)
    for module in list(model.modules()):
        for name, left in list(module.named_parameters(recurse=False)):  # norms, and what a Gated DeltaNet has besides matrices
            values = torch.rand(left.shape) if isinstance(module, plain.CausalConv1d) else torch.ones(left.shape)
            setattr(module, name, torch.nn.Parameter(values.bfloat16(), requires_grad=False))
    model.model.rotary_emb = plain.Rotary(shape["head_dim"], model.config.rope)
    return model.eval()


# ------------------------------------------------------------------------------------------------- theirs


def write_gguf(path: Path, kind: str, layers: int) -> None:
    """The same shape for llama.cpp: random matrices, every one of this type."""
    import gguf
    import numpy as np

    c = QWEN3_06B
    hidden, inner, dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    heads, kv = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim
    quant = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_vocab_size(c["vocab_size"])
    writer.add_tokenizer_model("none")
    random = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = gguf.quants.quantize(random.standard_normal((rows, columns), dtype=np.float32) * 0.02, quant)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=quant)

    def ones(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    matrix("token_embd", c["vocab_size"], hidden)
    ones("output_norm", hidden)
    for i in range(layers):
        for name, rows, columns in (
            ("attn_q", heads, hidden), ("attn_k", kv, hidden), ("attn_v", kv, hidden), ("attn_output", hidden, heads),
            ("ffn_gate", inner, hidden), ("ffn_up", inner, hidden), ("ffn_down", hidden, inner),
        ):  # fmt: skip
            matrix(f"blk.{i}.{name}", rows, columns)
        for name, size in (("attn_norm", hidden), ("ffn_norm", hidden), ("attn_q_norm", dim), ("attn_k_norm", dim)):
            ones(f"blk.{i}.{name}", size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
