"""Speculative decoding with the bundled hybrid's draft layer: same answers, accepted guesses, speed beside plain decoding.

    python tools/bench_speculation.py
    python tools/bench_speculation.py --fast        # the fused model, with backend.use("cpp")

Twelve prompts, greedy, 64 tokens at most, plain and speculative in turn. Speed is the median ratio of decoding times over
prompts whose answers are equally long; above 1: speculation is faster.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from golden import PROMPTS

import qwen_ref as qr

SUBJECTS = ("brave dog", "red ball", "little frog", "kind queen")
REQUESTS = [[{"role": "user", "content": f"Tell me a story about a {subject}."}] for subject in SUBJECTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true")
    fast = parser.parse_args().fast
    torch.set_num_threads(2)
    if fast:
        qr.backend.use("cpp")
    prompts: list[Any] = [*PROMPTS[:8], *REQUESTS]
    for dtype in ("float32", "bfloat16"):
        model, tokenizer = qr.load("tiny-hybrid", dtype=dtype)
        model = model.fuse() if fast else model
        for k in (1, 2, 3, 5):
            pairs = [[qr.generate(model, tokenizer, prompt, max_tokens=64, temperature=0, speculate=guesses)[0]
                      for guesses in (0, k)] for prompt in prompts]  # fmt: skip
            same = sum(plain.token_ids == drafted.token_ids for plain, drafted in pairs)
            accepted, guessed = (sum(getattr(drafted.usage, f"{what}_tokens") for _, drafted in pairs)
                                 for what in ("accepted", "drafted"))  # fmt: skip
            ratios = [plain.decode_seconds / drafted.decode_seconds for plain, drafted in pairs
                      if len(plain.token_ids) == len(drafted.token_ids)]  # fmt: skip
            print(f"{dtype} k = {k}: {same} of {len(pairs)} answers the same, {accepted / guessed:.0%} of guesses accepted, "
                  f"speed {statistics.median(ratios):.2f}", flush=True)


if __name__ == "__main__":
    main()
