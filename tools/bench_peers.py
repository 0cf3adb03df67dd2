"""Import, load, prefill and decode beside transformers, in one run on one machine. Ratios above 1: we are faster.

    python tools/bench_peers.py                       # Qwen3-0.6B's shape, random bf16 weights, CPU
    python tools/bench_peers.py --layers 4            # a quick look

Loading comes first, then a gate: all sides must choose the same greedy tokens, or no speed is reported. The sides (ours
with mapped weights, with `mapped=False`, and fused with `backend.use("cpp")`, and transformers) take turns, `--repeats`
times each, in decoding token by token; medians and the spread (minimum to maximum) are printed, and one JSON object as
the last line.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from qwen_ref import backend
from qwen_ref.generate import Reader
from qwen_ref.loading import load_model

QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "hidden_size": 1024,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "vocab_size": 151936,
}  # fmt: skip

OURS, READ, FUSED, THEIRS = "qwen_ref", "mapped=False", "fused, cpp", "transformers"
FRESH = {
    OURS: "from qwen_ref.loading import load_model; load_model(Path(folder), device='cpu', progress=False)",
    READ: "from qwen_ref.loading import load_model; load_model(Path(folder), device='cpu', mapped=False, progress=False)",
    THEIRS: "import transformers; transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=QWEN3_06B["num_hidden_layers"])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of prefill")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of decode")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", action="append", metavar="ROW", help="measure only this row (repeatable)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder), {**QWEN3_06B, "num_hidden_layers": args.layers})
        load = {OURS: lambda: load_ours(folder), READ: lambda: load_ours(folder, mapped=False),
                THEIRS: lambda: load_theirs(folder)}
        step = {OURS: step_ours, READ: step_ours, THEIRS: step_theirs}
        table = Table(args.repeats, args.only)
        table.row("import", turn({OURS: lambda: import_seconds("torch, qwen_ref"),
                                  THEIRS: lambda: import_seconds("torch, transformers")}))
        table.row("fresh load", turn({side: partial(fresh_seconds, side, folder) for side in load}))
        table.row("load", turn({side: partial(timed, load[side]) for side in load}))
        table.row("first token", turn({side: partial(first_token, load[side], step[side]) for side in load}))
        models = {side: step[side](load[side]()) for side in load} | {FUSED: step_fused(load_ours(folder).fuse())}
        ids = torch.randint(0, 151643, (1, args.prompt), generator=torch.Generator().manual_seed(0))
        gate(models, ids)
        table.row("prefill", turn({side: partial(prefill, models[side], ids) for side in models}), "tok/s")
        table.row("decode", partial(decode, models, ids, args.tokens), "tok/s")
    machine = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": args.threads,
               "machine": platform.processor() or platform.machine(), "layers": args.layers, "dtype": "bfloat16"}
    print(json.dumps({**machine, "repeats": args.repeats, **table.summary}))


def write_random_model(folder: Path, config: dict[str, Any]) -> None:
    raw = dict(config)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(raw.pop("model_type"), **raw), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def load_ours(folder: str, mapped: bool = True) -> Any:
    return load_model(Path(folder), device="cpu", mapped=mapped, progress=False)


def load_theirs(folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def step_ours(model: Any) -> Callable[[], Callable[[torch.Tensor], torch.Tensor]]:
    """A function that makes a fresh cache and returns: ids (1, T) -> logits of the last position (1, V)."""

    def fresh() -> Callable[[torch.Tensor], torch.Tensor]:
        return Reader(model, model.make_cache()).step

    return fresh


def step_fused(model: Any) -> Callable[[], Callable[[torch.Tensor], torch.Tensor]]:
    def fresh() -> Callable[[torch.Tensor], torch.Tensor]:
        read = Reader(model, model.make_cache()).step

        def step(ids: torch.Tensor) -> torch.Tensor:
            with backend.use("cpp"):
                return read(ids)

        return step

    return fresh


def step_theirs(model: Any) -> Callable[[], Callable[[torch.Tensor], torch.Tensor]]:
    def fresh() -> Callable[[torch.Tensor], torch.Tensor]:
        cache = transformers.DynamicCache(config=model.config)

        def step(ids: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

        return step

    return fresh


def gate(models: dict[str, Callable], ids: torch.Tensor) -> None:
    steps = {side: fresh() for side, fresh in models.items()}
    logits = {side: step(ids) for side, step in steps.items()}
    for _ in range(8):
        reference = logits[THEIRS]
        margin = float(reference.float().topk(2).values.diff().abs())
        for mine in logits.values():
            if int(mine.argmax()) != int(reference.argmax()) and margin > 2 * float((mine - reference).abs().max()):
                sys.exit("the sides choose different tokens: no speed is reported")
        token = reference.argmax(-1, keepdim=True)
        logits = {side: step(token) for side, step in steps.items()}


def first_token(load: Callable[[], Any], step: Callable) -> float:
    """Seconds from a folder to the first logits, where weights that are mapped lazily are paid for."""
    return timed(lambda: step(load())()(torch.tensor([[9707]])))


def prefill(fresh: Callable, ids: torch.Tensor) -> float:
    """Tokens per second."""
    step = fresh()
    return ids.shape[1] / timed(lambda: step(ids))


def decode(models: dict[str, Callable], ids: torch.Tensor, count: int) -> dict[str, float]:
    """Tokens per second after the prompt, each side its own token in turn, forwards and backwards."""
    steps = {side: fresh() for side, fresh in models.items()}
    tokens = {side: step(ids).argmax(-1, keepdim=True) for side, step in steps.items()}
    seconds = dict.fromkeys(steps, 0.0)
    order = list(steps)
    for _ in range(count):
        for side in order:
            started = time.perf_counter()
            tokens[side] = steps[side](tokens[side]).argmax(-1, keepdim=True)
            seconds[side] += time.perf_counter() - started
        order.reverse()
    return {side: count / total for side, total in seconds.items()}


def import_seconds(names: str) -> float:
    """Seconds that importing the last of `names` adds to importing the first, in a process of its own."""
    first, last = names.split(", ")
    code = f"import {first}, time; t = time.perf_counter(); import {last}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def fresh_seconds(side: str, folder: str) -> float:
    """Seconds that importing and loading take in a new process, beyond importing torch."""
    code = f"import sys, time, torch; from pathlib import Path; folder = sys.argv[1]; t = time.perf_counter(); {FRESH[side]}\n"
    command = [sys.executable, "-c", code + "print(time.perf_counter() - t)", folder]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Table:
    """Prints each row as soon as it is measured: a run takes minutes, and may be cut short."""

    def __init__(self, repeats: int, only: list[str] | None) -> None:
        self.repeats, self.only = repeats, only
        self.summary: dict[str, Any] = {}
        print(f"{'':12} {'side':>13} {'median (min to max)':>34}   ratio to transformers, above 1: we are faster")

    def row(self, name: str, once: Callable[[], dict[str, float]], unit: str = "s") -> None:
        """`once` measures every side; it is called once to warm up, then `repeats` times."""
        if self.only and name not in self.only:
            return
        once()
        rounds = [once() for _ in range(self.repeats)]
        values = {side: [one[side] for one in rounds] for side in rounds[0]}
        medians = {side: statistics.median(found) for side, found in values.items()}
        ratios = {side: m / medians[THEIRS] if unit == "tok/s" else medians[THEIRS] / m for side, m in medians.items()}
        for side, found in values.items():
            cell = f"{medians[side]:.3g} ({min(found):.3g} to {max(found):.3g}) {unit}"
            print(f"{name:12} {side:>13} {cell:>34}   {ratios[side]:.2f}", flush=True)
        self.summary[name] = {"values": values, "ratios": ratios}


def turn(sides: dict[str, Callable[[], float]]) -> Callable[[], dict[str, float]]:
    """All sides after each other, so that what else the machine does falls on all."""
    return lambda: {side: measure() for side, measure in sides.items()}


if __name__ == "__main__":
    main()
