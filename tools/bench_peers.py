"""Import, load, prefill and decode beside transformers, in one run on one machine. Ratios above 1: we are faster.

    python tools/bench_peers.py                       # Qwen3-0.6B's shape, random bf16 weights, CPU
    python tools/bench_peers.py --layers 4            # a quick look

First a gate: both sides must choose the same greedy tokens, or no speed is reported. Then the two sides take turns,
`--repeats` times each; medians and the spread (minimum to maximum) are printed, and one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from qwen_ref.generate import _step
from qwen_ref.loading import build, load_weights, materialize, pick_dtype, read_config

QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "hidden_size": 1024,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "vocab_size": 151936,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=QWEN3_06B["num_hidden_layers"])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of prefill")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of decode")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder), {**QWEN3_06B, "num_hidden_layers": args.layers})
        results = {"import": turns(args.repeats, lambda: import_seconds("torch, qwen_ref"),
                                   lambda: import_seconds("torch, transformers"))}
        results["load"] = turns(args.repeats, lambda: timed(lambda: load_ours(folder)),
                                lambda: timed(lambda: load_theirs(folder)))
        results["first token"] = turns(args.repeats, lambda: first_token(lambda: step_ours(load_ours(folder))),
                                       lambda: first_token(lambda: step_theirs(load_theirs(folder))))
        ours, theirs = load_ours(folder), load_theirs(folder)
    ids = torch.randint(0, 151643, (1, args.prompt), generator=torch.Generator().manual_seed(0))
    gate(ours, theirs, ids)
    results["prefill"] = turns(args.repeats, lambda: prefill(step_ours(ours), ids),
                               lambda: prefill(step_theirs(theirs), ids))
    results["decode"] = turns(args.repeats, lambda: decode(step_ours(ours), ids, args.tokens),
                              lambda: decode(step_theirs(theirs), ids, args.tokens))
    report(results, args)


def write_random_model(folder: Path, config: dict[str, Any]) -> None:
    raw = dict(config)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(raw.pop("model_type"), **raw), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def load_ours(folder: str) -> Any:
    raw = read_config(Path(folder))
    model = build(raw)
    materialize(model, torch.device("cpu"), pick_dtype(None, raw))
    load_weights(model, Path(folder), progress=False)
    return model.eval()


def load_theirs(folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def step_ours(model: Any) -> Callable[[], Callable[[torch.Tensor], torch.Tensor]]:
    """A function that makes a fresh cache and returns: ids (1, T) -> logits of the last position (1, V)."""

    def fresh() -> Callable[[torch.Tensor], torch.Tensor]:
        cache = model.make_cache()
        return lambda ids: _step(model, ids, None, cache)

    return fresh


def step_theirs(model: Any) -> Callable[[], Callable[[torch.Tensor], torch.Tensor]]:
    def fresh() -> Callable[[torch.Tensor], torch.Tensor]:
        cache = transformers.DynamicCache(config=model.config)

        def step(ids: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

        return step

    return fresh


def gate(ours: Any, theirs: Any, ids: torch.Tensor) -> None:
    mine, reference = step_ours(ours)(), step_theirs(theirs)()
    a, b = mine(ids), reference(ids)
    for _ in range(8):
        margin = float(b.float().topk(2).values.diff().abs())
        if int(a.argmax()) != int(b.argmax()) and margin > 2 * float((a - b).abs().max()):
            sys.exit("the two sides choose different tokens: no speed is reported")
        token = b.argmax(-1, keepdim=True)
        a, b = mine(token), reference(token)


def first_token(load: Callable[[], Callable]) -> float:
    """Seconds from a folder to the first logits: transformers maps the file and reads a weight when it is first used."""
    return timed(lambda: load()()(torch.tensor([[9707]])))


def prefill(fresh: Callable, ids: torch.Tensor) -> float:
    """Tokens per second."""
    step = fresh()
    return ids.shape[1] / timed(lambda: step(ids))


def decode(fresh: Callable, ids: torch.Tensor, count: int) -> float:
    """Tokens per second after the prompt."""
    step = fresh()
    token = step(ids).argmax(-1, keepdim=True)
    started = time.perf_counter()
    for _ in range(count):
        token = step(token).argmax(-1, keepdim=True)
    return count / (time.perf_counter() - started)


def import_seconds(names: str) -> float:
    """Seconds that importing the last of `names` adds to importing the first, in a process of its own."""
    first, last = names.split(", ")
    code = f"import {first}, time; t = time.perf_counter(); import {last}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def turns(repeats: int, ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[list[float], list[float]]:
    """One warm-up each, then alternately, so that what else the machine does falls on both."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def report(results: dict[str, tuple[list[float], list[float]]], args: argparse.Namespace) -> None:
    units = {"import": "s", "load": "s", "first token": "s", "prefill": "tok/s", "decode": "tok/s"}
    summary: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__,
                               "machine": platform.processor() or platform.machine(), "threads": args.threads,
                               "layers": args.layers, "dtype": "bfloat16", "repeats": args.repeats}
    print(f"{'':12} {'qwen_ref':>28} {'transformers':>28}   ratio")
    for name, (ours, theirs) in results.items():
        a, b = statistics.median(ours), statistics.median(theirs)
        ratio = b / a if units[name] == "s" else a / b
        cells = [f"{m:.3g} ({min(x):.3g} to {max(x):.3g}) {units[name]}" for m, x in ((a, ours), (b, theirs))]
        print(f"{name:12} {cells[0]:>28} {cells[1]:>28}   {ratio:.2f}")
        summary[name] = {"ours": ours, "theirs": theirs, "ratio": ratio}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
