"""qwen-ref kernels list | check | bench | compile | tune. Exit status: 0 success, 1 a kernel is wrong, 2 an error."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import backend
from ..errors import RequestError
from ..loading import usable_device
from .shapes import MODELS

PLOTS = (".png", ".svg", ".pdf")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_commands(subparsers: Any) -> None:
    """Add `kernels` and its commands; each sets `run`, a function of the parsed arguments that returns the exit status."""
    text = "List, check, time and compile implementations of the operations."
    parser = subparsers.add_parser("kernels", help=text, description=text)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="machine-readable output")
        return sub

    lists = command("list", run_list, "What runs for each operation, and why the others do not.")
    check = command("check", run_check, "Is an implementation right, on awkward inputs in poisoned memory?")
    bench = command("bench", run_bench, "Time implementations on a model's shapes, as a share of the measured roofline.")
    compile = command("compile", run_compile, "Compile the Triton kernels ahead of time; needs no GPU.")
    tune = command("tune", run_tune, "Search launch parameters on this GPU, for a kernel's table.")
    for sub in (lists, check, bench, tune):
        sub.add_argument("--device", help="cuda if there is a GPU, otherwise cpu")
        sub.add_argument("--dtype", choices=DTYPES, default="float32" if sub is check else "bfloat16",
                         help="default float32" if sub is check else "default bfloat16")  # fmt: skip
    for sub in (check, bench, compile, tune):
        some = [name for name, op in backend.OPERATIONS.items() if sub in (check, bench) or "triton" in op.implementations]
        sub.add_argument("operation", metavar="OP", choices=some, help=", ".join(some))
    for sub in (check, bench):
        sub.add_argument("--file", help="Python code that registers an implementation")
    for sub in (bench, tune):
        sub.add_argument("--tokens", type=int, action="append", metavar="N", help="tokens in a call (repeatable)")
    for sub in (check, bench, tune):
        sub.add_argument("--model", help=f"whose shapes: {', '.join(['tiny', *MODELS])}")
    check.add_argument("--impl", required=True, metavar="NAME", help="the implementation's registered name")
    check.add_argument("--seeds", type=int, default=5, help="of the random inputs; default 5")
    check.add_argument("--emulate", choices=("sm_80", "sm_90"), help="compile the Triton kernel for it, run that on this CPU")
    check.add_argument("--nondeterministic", action="store_true", help="do not ask for the same bits twice")
    bench.add_argument("--impl", action="append", metavar="NAME", help="only these (repeatable); `compiled` is torch.compile")
    bench.add_argument("--plot", metavar="FILE", help="also draw the roofline: a .png, .svg or .pdf")
    compile.add_argument("--model", action="append", help="whose shapes (repeatable; default all); `others`: of no model here")
    compile.add_argument("--target", action="append", metavar="ARCH", help="sm_80, sm_90, gfx942 (repeatable; default all)")


def _device(args: argparse.Namespace) -> torch.device:
    """The one asked for, else the GPU if there is one. RequestError if it cannot be used."""
    return usable_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def run_list(args: argparse.Namespace) -> int:
    device, dtype = _device(args), DTYPES[args.dtype]
    if not args.json:
        print(f"on {device} in {args.dtype}:\n{backend.report(device, dtype)}")
        return 0
    rows = []
    for name, op in backend.OPERATIONS.items():
        refusals = {i.name: i.supports(device, dtype) for i in op.implementations.values()}
        rows.append({"operation": name, "runs": op.resolve(device, dtype).name, "implementations": refusals})
    print(json.dumps(rows))
    return 0


def run_check(args: argparse.Namespace) -> int:
    from .check import check
    from .emulator import emulate

    if args.seeds < 1:
        raise RequestError("--seeds must be at least 1")
    if args.emulate and args.device not in (None, "cpu"):
        raise RequestError(f"--emulate runs on the CPU, not on {args.device}")
    with emulate(args.emulate) if args.emulate else nullcontext():
        report = check(
            args.operation, args.impl, file=args.file, dtype=DTYPES[args.dtype],
            device="cpu" if args.emulate else _device(args), model=args.model, seeds=args.seeds,
            deterministic=not args.nondeterministic,
        )  # fmt: skip
    print(json.dumps(report.to_json()) if args.json else f"{report.table()}\n\n{report.verdict}")
    return 0 if report.ok else 1


def run_bench(args: argparse.Namespace) -> int:
    from .measure import bench

    if args.tokens and min(args.tokens) < 1:
        raise RequestError("--tokens must be at least 1")
    if args.plot and (Path(args.plot).suffix not in PLOTS or not Path(args.plot).absolute().parent.is_dir()):
        raise RequestError(f"--plot {args.plot}: name a file that ends in {', '.join(PLOTS)}, in a folder that exists")
    result = bench(
        args.operation, model=args.model, implementations=args.impl, file=args.file, dtype=DTYPES[args.dtype],
        device=_device(args), tokens=args.tokens,
    )  # fmt: skip
    if args.plot:
        result.figure().savefig(args.plot)
    print(json.dumps(result.to_json()) if args.json else result.table())
    if any(row.wrong for row in result.rows):
        return 1
    timed = {row.implementation for row in result.rows if row.refused is None}
    return 2 if set(args.impl or ()) - timed else 0  # what was asked for by name could not run


def run_tune(args: argparse.Namespace) -> int:
    from .tune import tune

    if args.tokens and min(args.tokens) < 1:
        raise RequestError("--tokens must be at least 1")
    found = tune(
        args.operation, model=args.model, tokens=args.tokens or (1, 16, 4096), dtype=DTYPES[args.dtype],
        device=args.device or "cuda",
    )  # fmt: skip
    print(json.dumps([asdict(row) for row in found]) if args.json else "\n".join(row.line for row in found))
    return 0


def run_compile(args: argparse.Namespace) -> int:
    from .compile import ALL, TARGETS, compile

    result = compile(args.operation, targets=args.target or tuple(TARGETS), models=args.model or ALL)
    print(json.dumps(result.to_json()) if args.json else result.table())
    return 0 if result.ok else 1
