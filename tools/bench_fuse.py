"""What `model.fuse()` gains in decoding: both models on the same weights, token by token in turn, in one process.

    python tools/bench_fuse.py --width int4         # Qwen3-0.6B's shape, random packed weights, backend.use("cpp")
    python tools/bench_fuse.py --shape qwen3.5      # Qwen3.5-0.8B's: 18 of 24 layers are Gated DeltaNets

Then a prompt: the model as it is, as PyTorch's default runs it, beside the fused one with cpp. Then the fused model alone:
several sequences at once, and several tokens of one in a pass, as guesses are read, the state after each of which is kept.

The gate: the fused model's logits are as near to those in fp32 as the model's own. Then the median time of each, and of the
ratio of neighbours, with its quartiles; above 1: fused is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from bench_quantized import QWEN3_06B, QWEN35_08B, RIVAL, random_model, step

from qwen_ref import backend

SEVERAL = (2, 3, 4, 8)
ALIKE = 1.25  # times the model's own error in bf16
SHAPES = {"qwen3": QWEN3_06B, "qwen3.5": QWEN35_08B}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", choices=tuple(RIVAL), default="int4")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen3")
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ids = torch.tensor([[i * 7919 % 150000 for i in range(16 + args.tokens)]])
    times: tuple[list[float], list[float]] = ([], [])
    logits: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    with torch.inference_mode():
        shape = SHAPES[args.shape]
        model = random_model(args.width, args.layers or shape["num_hidden_layers"], shape)
        with backend.use("cpp"):
            sides = [(side, side.make_cache()) for side in (model, model.fuse())]
            for side, cache in sides:
                step(side, ids[:, :16], cache)
            for i in range(16, ids.shape[1]):
                for taken, said, (side, cache) in zip(times, logits, sides, strict=True):
                    start = time.perf_counter()
                    y = step(side, ids[:, i : i + 1], cache)
                    taken.append(time.perf_counter() - start)
                    said.append(y.flatten().float())
        prompts = prompt_times(model, torch.tensor([[i * 7919 % 150000 for i in range(args.prompt)]]))
        with backend.use("cpp"):
            wide = {count: pass_time(model.fuse(), ids[:, : args.tokens].expand(count, -1), 1) for count in (1, *SEVERAL)}
            deep = {count: pass_time(model.fuse(), ids[:, : args.tokens], count) for count in SEVERAL}
        model.float()
        exact = model.lm_head(model.model(ids)[0, 16:])  # (tokens, V)
    apart_error, fused_error = (float((torch.stack(said) - exact).norm() / exact.norm()) for said in logits)
    if not fused_error < ALIKE * apart_error:
        raise SystemExit(f"the fused model's logits are off by {fused_error:.2g}, the model's by {apart_error:.2g}: "
                         "nothing is reported")
    low, middle, high = statistics.quantiles((a / b for a, b in zip(*times, strict=True)), n=4)
    apart_ms, fused_ms = (statistics.median(taken) * 1e3 for taken in times)
    print(f"{args.shape} {args.width}: apart {apart_ms:.1f} ms, fused {fused_ms:.1f} ms a token, "
          f"ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f}); "
          f"logits off by {fused_error / apart_error:.2f} of the model's own error in bf16")
    plain, fused = (statistics.median(args.prompt / taken for taken in side) for side in prompts)
    ratios = sorted(a / b for a, b in zip(*prompts, strict=True))
    print(f"prompt of {args.prompt}: apart, without cpp {plain:.0f} tokens/s, fused {fused:.0f}, "
          f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    print("sequences at once, tokens/s: " + ", ".join(f"{count}: {count / taken:.0f}" for count, taken in wide.items()))
    print("tokens of one in a pass, ms: " + ", ".join(f"{count}: {taken * 1e3:.0f}" for count, taken in deep.items()))


def pass_time(model: Any, ids: torch.Tensor, count: int) -> float:
    """The median time of passes of `count` tokens of each sequence (B, T), behind sixteen of them."""
    cache, times = model.make_cache(rewind=count if count > 1 else 0), []
    model.model(ids[:, :16], None, cache)
    for i in range(16, ids.shape[1] - count, count):
        start = time.perf_counter()
        model.lm_head(model.model(ids[:, i : i + count], None, cache))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def prompt_times(model: Any, ids: torch.Tensor, rounds: int = 4) -> tuple[list[float], list[float]]:
    """Seconds that the model takes without cpp, and fused with it, in turn; the first round is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    fused = model.fuse()
    for turn in range(rounds):
        for taken, side, choice in ((times[0], model, "torch"), (times[1], fused, "cpp")):
            with backend.use(choice):
                start = time.perf_counter()
                step(side, ids, side.make_cache())
                if turn:
                    taken.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
