"""Everything a GPU can say about the kernels: right first, then fast, then kept.

    python tools/bench_kernels.py                               # every operation, bf16; writes kernels/results/
    python tools/bench_kernels.py attention_decode linear       # some
    python tools/bench_kernels.py --only check                  # no times
    python tools/bench_kernels.py --only time --minutes 9       # no checks but the bench's own
    python tools/bench_kernels.py --emulate sm_90               # without a GPU: the checks, on emulated machine code
    python tools/bench_kernels.py --compile gfx942              # without a GPU: what the compiler makes of every configuration

For every operation: the check of its Triton kernel in bf16, fp16 and fp32 on a real model's sizes; and the bench next to
the formula, PyTorch's kernels and torch.compile, for the delta rule also flash-linear-attention's Triton if it is installed
(`pip install flash-linear-attention`). `--every-entry` repeats the check in bf16 with every entry of its TUNED table in force.

Each operation has a process of its own, for an access outside memory ends the process; checks run side by side, since most
of their time the compiler takes, times one after the other. The table goes to OUT/<device>-<date>.md, all numbers to .json
beside it, after every operation; another run on the same day adds to them. Exit status 1 if anything was wrong. For
out-of-bounds accesses that the poisoned memory cannot see:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes all \\
        python tools/bench_kernels.py --only check --seeds 1
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from qwen_ref import backend
from qwen_ref.bench import bench, check, compile
from qwen_ref.bench.compile import TARGETS
from qwen_ref.bench.emulator import emulate
from qwen_ref.bench.entries import each_entry
from qwen_ref.bench.measure import Bench, environment

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Those with a figure to reach come first: a run may end before the others.
FIRST = ("attention_prefill", "attention_decode", "linear", "rms_norm", "norm_rope_write", "swiglu", "moe_experts",
         "linear_int4", "linear_fp8", "linear_code4", "gated_delta_rule", "gated_delta_step")  # fmt: skip
KERNELS = [op.name for op in backend.OPERATIONS.values() if "triton" in op.implementations]
KERNELS.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
Answer = dict[str, Any]  # of one process: the lines it said, the faults it found, a table, the numbers of a bench


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", metavar="OP", help=f"default: all of {', '.join(KERNELS)}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "kernels" / "results")
    parser.add_argument("--model", help="whose sizes; default Qwen3-8B, or what an operation needs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=("check", "time"), help="half of the work")
    parser.add_argument("--emulate", choices=("sm_80", "sm_90"), help="check on this CPU what is compiled for it")
    parser.add_argument("--compile", choices=tuple(TARGETS), help="compile for it, and run nothing")
    parser.add_argument("--every-entry", action="store_true", help="check every entry of the tuned tables")
    parser.add_argument("--minutes", type=float, default=600, help="start nothing more after them")
    parser.add_argument("--alone", choices=tuple(WORK), help=argparse.SUPPRESS)  # in this process, for the one operation
    args = parser.parse_args()
    if args.emulate or args.compile:
        args.only = "check" if args.emulate else "compile"
    elif not torch.cuda.is_available():
        print("no GPU: use --emulate sm_90, and --compile sm_90", file=sys.stderr)
        return 2
    if args.alone:
        print(json.dumps(WORK[args.alone](args)))
        return 0
    return lead(args)


def lead(args: argparse.Namespace) -> int:
    """Hand the operations to processes, and keep what each says."""
    operations, until = args.operations or KERNELS, time.monotonic() + 60 * args.minutes
    kept = Kept(args.out, f"{args.emulate} emulated" if args.emulate else f"{args.compile} compiled" if args.compile else None)
    first = "compile" if args.compile else "check"
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        side_by_side = operations if args.only != "time" else []
        for operation, answer in zip(side_by_side, pool.map(lambda op: ask(op, first, args, until), side_by_side), strict=True):
            kept.add(operation, answer)
    for operation in operations if args.only in (None, "time") else []:
        kept.add(operation, ask(operation, "time", args, until))
    wrong = kept.wrong
    print("\n".join(wrong) or "everything checked is right")
    return 1 if wrong else 0


def ask(operation: str, what: str, args: argparse.Namespace, until: float) -> Answer:
    """What a process of its own says of one operation; that it died, or had no time, is a fault."""
    left = until - time.monotonic()
    if left <= 0:
        return {"wrong": [f"{operation}: no time was left to {what} it"]}
    command = [sys.executable, __file__, operation, "--alone", what, "--seeds", str(args.seeds)]
    command += ["--model", args.model] if args.model else []
    command += ["--every-entry"] if args.every_entry else []
    command += ["--emulate", args.emulate] if args.emulate else ["--compile", args.compile] if args.compile else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left + 60)
        answer: Answer = json.loads(done.stdout.splitlines()[-1])
        return answer
    except subprocess.TimeoutExpired:
        return {"wrong": [f"{operation}: its {what} did not end in time"]}
    except (ValueError, IndexError):
        return {"wrong": [f"{operation}: its {what} ended with status {done.returncode}: {done.stderr.strip()[-500:]}"]}


def checked(args: argparse.Namespace) -> Answer:
    """The faults of a kernel in every dtype with its own launch parameters, and with every other entry of its table."""
    (operation,) = args.operations
    said: list[str] = []
    wrong: list[str] = []

    def look(dtype: torch.dtype, seeds: int, launch: str = "") -> None:
        report = check(operation, "triton", dtype=dtype, device="cpu" if args.emulate else "cuda", model=args.model,
                       seeds=seeds, deterministic=not args.emulate)  # fmt: skip
        said.append(report.verdict + launch)
        wrong.extend(f"{operation}, {dtype}{launch}: {fault}" for fault in report.faults)

    with emulate(args.emulate) if args.emulate else nullcontext():
        for dtype in DTYPES:
            look(dtype, args.seeds)
        for entry in each_entry(operation) if args.every_entry else ():
            look(torch.bfloat16, 1, f", launched with {entry}")
    return {"checks": said, "wrong": wrong}


def compiled(args: argparse.Namespace) -> Answer:
    """What the compiler makes of each kernel, over all that official models launch in any dtype; spills are no fault."""
    (operation,) = args.operations
    rows = compile(operation, targets=(args.compile,)).rows
    said = []
    for kernel in dict.fromkeys(row.kernel for row in rows):
        mine = [row for row in rows if row.kernel == kernel]
        cores, spilling = sum(row.tensor_cores for row in mine), sum(bool(row.spills) for row in mine)
        most = {what: max(getattr(row, what) or 0 for row in mine) for what in ("registers", "spills", "shared")}
        spilled = f"; up to {most['spills']} bytes spilled in {spilling}" if spilling else ""
        said.append(f"{operation}, {kernel}: {len(mine)} configurations, {cores} on tensor cores, up to {most['registers']} "
                    f"registers and {most['shared'] / 1024:.0f} KiB of shared memory{spilled}")
    return {"checks": said, "wrong": [f"{operation}, {row.kernel} {row.launch}: {row.fault}" for row in rows if row.fault]}


def timed(args: argparse.Namespace) -> Answer:
    register_peers()
    result = bench(args.operations[0], model=args.model)
    return {"table": result.table(), "bench": result.to_json(), "wrong": wrong_rows(result)}


WORK = {"check": checked, "compile": compiled, "time": timed}


def wrong_rows(result: Bench) -> list[str]:
    return [f"{result.operation}, {row.shape}, {row.implementation}: {row.refused}" for row in result.rows if row.wrong]


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


class Kept:
    """OUT/<device>-<date>.json and the page beside it, written anew with every answer."""

    def __init__(self, folder: Path, device: str | None = None) -> None:
        """`device`: the name of one that is not here."""
        self.environment = environment(torch.device("cpu" if device else "cuda"))
        if device:
            self.environment["device"] = device
        name = re.sub(r"[^\w.]+", "-", self.environment["device"]).strip("-") + "-" + self.environment["date"]
        folder.mkdir(parents=True, exist_ok=True)
        self.page, self.numbers = folder / f"{name}.md", folder / f"{name}.json"
        held = json.loads(self.numbers.read_text(encoding="utf-8")) if self.numbers.exists() else {}
        self.operations: dict[str, Answer] = held.get("operations", {})

    @property
    def wrong(self) -> list[str]:
        return [line for answer in self.operations.values() for line in answer["wrong"]]

    def add(self, operation: str, answer: Answer) -> None:
        held = self.operations.setdefault(operation, {"wrong": []})
        faults = [*held["wrong"], *answer["wrong"]]
        held |= {**answer, "wrong": list(dict.fromkeys(faults))}
        print("\n".join([*answer.get("checks", ()), answer.get("table", ""), *answer["wrong"]]).strip(), flush=True)
        whole = {"environment": self.environment, "operations": self.operations}
        for path, text in ((self.numbers, json.dumps(whole)), (self.page, self.text())):
            path.with_suffix(path.suffix + ".new").write_text(text, encoding="utf-8")
            path.with_suffix(path.suffix + ".new").replace(path)

    def text(self) -> str:
        env = self.environment
        versions = ", ".join(f"{key} {value}" for key, value in env.items() if key not in ("device", "date"))
        checks = "\n".join(f"- {line}" for answer in self.operations.values() for line in answer.get("checks", ()))
        wrong = "\n".join(f"- {line}" for line in self.wrong) or "Nothing was wrong."
        tables = "\n\n".join(f"```\n{answer['table']}\n```" for answer in self.operations.values() if "table" in answer)
        timed = f"\n## Times\n\n{tables}\n" if tables else ""
        return f"# {env['device']}, {env['date']}\n\n{versions}\n\n## Checks\n\n{checks}\n\n{wrong}\n{timed}"


if __name__ == "__main__":
    raise SystemExit(main())
