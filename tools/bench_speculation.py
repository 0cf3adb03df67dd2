"""Speculative decoding with the bundled hybrid's draft layer: same answers, accepted guesses, speed beside plain decoding.

    python tools/bench_speculation.py
    python tools/bench_speculation.py --fast        # the fused model, with backend.use("cpp")
    python tools/bench_speculation.py --rounds 15   # what a round costs at Qwen3.5-0.8B's shape, fused, random bf16 weights

Twelve prompts, greedy, 64 tokens at most, plain and speculative in turn. Speed is the median ratio of decoding times over
prompts whose answers are equally long; above 1: speculation is faster.

A round is the k guesses and the pass that reads them. Random weights guess nothing, so its cost is printed in passes of one
token, made in turn with it, and the share of guesses that must be right for it to be worth that.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from bench_quantized import QWEN35_08B
from golden import PROMPTS

import qwen_ref as qr
from qwen_ref.layers import Rotary
from qwen_ref.models import qwen3_5
from qwen_ref.speculative import Speculator

SUBJECTS = ("brave dog", "red ball", "little frog", "kind queen")
REQUESTS = [[{"role": "user", "content": f"Tell me a story about a {subject}."}] for subject in SUBJECTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--rounds", type=int, help="of every number of guesses; measures their cost only")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.rounds:
        rounds(args.rounds)
    else:
        answers(args.fast)


def answers(fast: bool) -> None:
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


def rounds(count: int) -> None:
    model, ids = random_model(), torch.randint(0, 1000, (1, 16))
    with qr.backend.use("cpp"), torch.inference_mode():
        for k in (1, 2, 3):
            cache, reader, ratios = model.make_cache(), Speculator(model, k), []
            model(ids, None, cache)
            reader.read(ids)
            for turn in range(count + 3):  # the first ones are recorded
                plain = seconds(lambda cache=cache: model(ids[:, :1], None, cache))
                reader._guesses = []  # as if all had been right
                taken = seconds(lambda reader=reader: reader.step(ids[:, :1]))
                ratios += [taken / plain] if turn > 2 else []
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"k = {k}: a round takes {middle:.2f} times as long as a token (quartiles {low:.2f} to {high:.2f}), "
                  f"and pays if more than {(middle - 1) / k:.0%} of the guesses are right", flush=True)


def seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def random_model() -> Any:
    """Qwen3.5-0.8B's shape with a draft layer, fused."""
    with torch.device("meta"):
        model = qwen3_5.Model(qwen3_5.Config.from_json(QWEN35_08B))
        model.mtp = model.make_mtp()
    model = model.bfloat16().to_empty(device="cpu").eval().requires_grad_(False)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = Rotary(model.config.head_dim, model.config.rope)  # its numbers are no weights
    for weight in model.parameters():
        weight.data.uniform_(-0.02, 0.02)
    return model.fuse()


if __name__ == "__main__":
    main()
