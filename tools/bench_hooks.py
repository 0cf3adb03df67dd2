"""What the hooks cost: decode tokens per second before any was used, after, and with one that only looks.

    python tools/bench_hooks.py [--model tiny] [--tokens 32] [--turns 15]

Nothing is built into the models for hooks, so "after" must equal "before" within the noise of the machine. The three are
measured in turns, and the ratio is taken within each turn; median (quartiles).
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

import qwen_ref as qr


@torch.no_grad()
def decode(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Greedy tokens per second after the prompt."""
    cache = model.make_cache()
    token = model(prompt, cache=cache)[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(tokens):
        token = model(token, cache=cache)[:, -1:].argmax(-1)
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()

    fresh, tokenizer = qr.load(options.model, dtype=torch.float32)
    used, _ = qr.load(options.model, dtype=torch.float32)
    prompt = torch.tensor([tokenizer.encode("Once upon a time, there was a little girl named Lily.")])
    look = [(f"blocks.{len(used.model.layers) // 2}.hook_resid_post", lambda value, hook: None)]
    decode(fresh, prompt, 8)  # warm up
    runs: list[tuple[float, float, float]] = []
    for _ in range(options.turns):
        before = decode(fresh, prompt, options.tokens)  # `fresh` never meets a hook
        with qr.backend.use({"attention": "eager"}):
            used.run_with_cache(prompt, "*hook_*")
        after = decode(used, prompt, options.tokens)
        with used.hooks(look):
            looking = decode(used, prompt, options.tokens)
        runs.append((before, after, looking))
    for column, name in enumerate(("before any hook", "after hooks were used", "one function that looks")):
        speeds = [run[column] for run in runs]
        ratios = [run[column] / run[0] for run in runs]
        print(f"{name:24} {spread(speeds, '.0f')} tok/s   ratio {spread(ratios, '.3f')}")


def spread(values: list[float], form: str) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    main()
