"""Everything a GPU can say about the kernels, in one run: right first, then fast, then kept.

    python tools/bench_kernels.py                               # every operation, bf16; writes kernels/results/
    python tools/bench_kernels.py attention_decode linear       # some
    python tools/bench_kernels.py --only-check                  # no times

For every operation: the check of its Triton kernel in bf16, fp16 and fp32 on a real model's sizes; the same check for
every entry of its TUNED table, since an entry that is fast and wrong is the usual way a tuned kernel fails; and the bench
next to the formula, PyTorch's kernels and torch.compile, for the delta rule also flash-linear-attention's Triton if it is
installed (`pip install flash-linear-attention`). The table goes to OUT/<device>-<date>.md, all numbers to .json
beside it. Exit status 1 if anything was wrong. For out-of-bounds accesses that the poisoned memory cannot see:

    compute-sanitizer --tool memcheck python tools/bench_kernels.py --only-check --seeds 1
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from qwen_ref import backend
from qwen_ref.bench import bench, check
from qwen_ref.bench.measure import environment

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

KERNELS = [op.name for op in backend.OPERATIONS.values() if "triton" in op.implementations]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", metavar="OP", help=f"default: all of {', '.join(KERNELS)}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "kernels" / "results")
    parser.add_argument("--model", help="whose sizes; default Qwen3-8B, or what an operation needs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only-check", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: use TRITON_INTERPRET=1 qwen-ref kernels check, and qwen-ref kernels compile", file=sys.stderr)
        return 2
    register_peers()
    wrong: list[str] = []
    tables, results = [], []
    for operation in args.operations or KERNELS:
        wrong += checked(operation, args.model, args.seeds)
        if not args.only_check:
            result = bench(operation, model=args.model)
            print(result.table(), "\n", flush=True)
            wrong += [f"{operation}, {row.shape}, {row.implementation}: {row.refused}" for row in result.rows if row.wrong]
            tables.append(result.table())
            results.append(result.to_json())
    if not args.only_check:
        write(args.out, tables, results, wrong)
    print("\n".join(wrong) or "everything checked is right")
    return 1 if wrong else 0


def register_peers() -> None:
    """Other people's kernels, as implementations under their name; the bench judges them as it judges ours."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    except ImportError:
        return

    @backend.register("gated_delta_rule", "fla")
    def fla(q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any = None) -> tuple[Any, Any]:
        rule = chunk_gated_delta_rule if v.shape[1] > 64 else fused_recurrent_gated_delta_rule
        repeats = v.shape[2] // q.shape[2]
        q, k = (x.repeat_interleave(repeats, dim=2) for x in (q, k))
        return rule(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)


def checked(operation: str, model: str | None, seeds: int) -> list[str]:
    """The faults of the kernel in every dtype, with its own launch parameters and with every other entry of its table."""
    faults = []
    for dtype in DTYPES:
        report = check(operation, "triton", dtype=dtype, device="cuda", model=model, seeds=seeds)
        print(report.verdict, flush=True)
        faults += [f"{operation}, {dtype}: {fault}" for fault in report.faults]
    for launch in each_launch(operation):
        report = check(operation, "triton", dtype=torch.bfloat16, device="cuda", model=model, seeds=1)
        faults += [f"{operation}, launched with {launch}: {fault}" for fault in report.faults]
    return faults


def each_launch(operation: str) -> Iterator[dict[str, int]]:
    """Every different entry of the TUNED table, each in force for all shapes while it is yielded."""
    table = import_module(f"qwen_kernels.{operation}").TUNED
    for launch in {json.dumps(entry): entry for entry in table.values()}.values():
        with replaced(table, launch):
            yield launch


@contextmanager
def replaced(table: dict[Any, dict[str, int]], launch: dict[str, int]) -> Iterator[None]:
    before = dict(table)
    table.update({key: launch for key in before if set(before[key]) == set(launch)})
    try:
        yield
    finally:
        table.update(before)


def write(folder: Path, tables: list[str], results: list[dict[str, Any]], wrong: list[str]) -> None:
    env = environment(torch.device("cuda"))
    name = re.sub(r"[^\w.]+", "-", env["device"]).strip("-") + "-" + env["date"]
    folder.mkdir(parents=True, exist_ok=True)
    said = "\n".join(f"- {line}" for line in wrong) or "Every kernel passed its check in bf16, fp16 and fp32."
    versions = ", ".join(f"{key} {value}" for key, value in env.items() if key not in ("device", "date"))
    body = "\n\n".join(f"```\n{table}\n```" for table in tables)
    page = f"# {env['device']}, {env['date']}\n\n{versions}\n\n{said}\n\n{body}\n"
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps({"environment": env, "wrong": wrong, "benches": results}), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
