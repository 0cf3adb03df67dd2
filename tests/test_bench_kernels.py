"""The tool that keeps what a GPU said: which launches it tries, what it writes, and that it says why it cannot run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qwen_ref.bench import entries

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("bench_kernels", ROOT / "tools" / "bench_kernels.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
ENVIRONMENT = {"device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-24"}


def test_an_entry_replaces_those_of_its_own_kind_and_gives_them_back():
    table = {("any", 1): {"ROWS": 4}, ("any", 2): {"ROWS": 8}, ("any", "split"): {"BLOCK": 64, "num_warps": 4}}
    before = dict(table)
    with entries.in_force(table, {"ROWS": 8}):
        assert table == {("any", 1): {"ROWS": 8}, ("any", 2): {"ROWS": 8}, ("any", "split"): before["any", "split"]}
    assert table == before


def test_every_answer_is_kept_at_once_and_another_run_adds_to_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "environment", lambda device: dict(ENVIRONMENT))
    kept = tool.Kept(tmp_path / "results")
    kept.add("rope", {"checks": ["rope is right"], "wrong": []})
    kept.add("linear", {"checks": [], "wrong": ["linear, bf16: is off"]})
    again = tool.Kept(tmp_path / "results")
    again.add("rope", {"table": "table one", "bench": {"operation": "rope"}, "wrong": []})
    text = (tmp_path / "results" / "NVIDIA-H200-2026-11-24.md").read_text()
    for said in ("NVIDIA H200, 2026-11-24", "triton 3.6.0", "- rope is right", "table one", "- linear, bf16: is off"):
        assert said in text
    held = json.loads((tmp_path / "results" / "NVIDIA-H200-2026-11-24.json").read_text())
    assert held["environment"] == ENVIRONMENT and again.wrong == ["linear, bf16: is off"]
    assert held["operations"]["rope"] == {
        "checks": ["rope is right"], "wrong": [], "table": "table one", "bench": {"operation": "rope"}
    }
    assert sorted(path.suffix for path in (tmp_path / "results").iterdir()) == [".json", ".md"]


@pytest.mark.parametrize("code, said", [
    ("print('noise'); print('{\"wrong\": [\"is off\"]}')", "is off"),
    ("import os; print('half'); os.kill(os.getpid(), 11)", "rope: its check ended with status -11"),
    ("raise RuntimeError('an illegal memory access')", "status 1: .*an illegal memory access"),
])  # fmt: skip
def test_a_process_that_dies_is_a_fault_of_its_operation(monkeypatch, code, said):
    run = subprocess.run
    monkeypatch.setattr(tool.subprocess, "run", lambda command, **kwargs: run([sys.executable, "-c", code], **kwargs))
    args = argparse.Namespace(seeds=1, model=None, every_entry=False, emulate=None, compile=None)
    (line,) = tool.ask("rope", "check", args, time.monotonic() + 60)["wrong"]
    assert re.search(said, line, flags=re.S)
    assert "no time was left" in tool.ask("rope", "check", args, time.monotonic() - 1)["wrong"][0]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: nothing to emulate")
def test_it_checks_on_an_emulated_gpu_what_it_would_check_on_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "swiglu", "--emulate", "sm_80", "--seeds", "1", "--every-entry", "--out", str(tmp_path)])
    assert tool.main() == 0
    assert "everything checked is right" in capsys.readouterr().out
    (page,) = tmp_path.glob("sm_80-emulated-*.md")
    said = [line for line in page.read_text().splitlines() if line.startswith("- swiglu by triton in")]
    assert [line.split()[5] for line in said] == ["bfloat16", "float16", "float32", "bfloat16"] and "launched with" in said[3]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: nothing to compile")
def test_it_says_what_the_compiler_makes_of_every_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "router_topk", "--compile", "sm_90", "--out", str(tmp_path)])
    assert tool.main() == 0
    (page,) = tmp_path.glob("sm_90-compiled-*.md")
    (said,) = re.findall(r"- router_topk, (\w+): (\d+) configurations, 0 on tensor cores, up to (\d+) registers", page.read_text())
    assert said[0] == "router_topk" and int(said[1]) > 2 and 8 < int(said[2]) < 256
    assert "Nothing was wrong." in page.read_text() and "## Times" not in page.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_run_instead(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py"])
    assert tool.main() == 2
    assert "--emulate sm_90" in capsys.readouterr().err
