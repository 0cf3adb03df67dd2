"""The tool that keeps what a GPU said: which launches it tries, what it writes, and that it says why it cannot run."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("bench_kernels", ROOT / "tools" / "bench_kernels.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def test_a_launch_replaces_entries_of_its_own_kind_and_gives_them_back():
    table = {("any", 1): {"ROWS": 4}, ("any", 2): {"ROWS": 8}, ("any", "split"): {"BLOCK": 64, "num_warps": 4}}
    before = dict(table)
    with tool.replaced(table, {"ROWS": 8}):
        assert table == {("any", 1): {"ROWS": 8}, ("any", 2): {"ROWS": 8}, ("any", "split"): before["any", "split"]}
    assert table == before


def test_what_is_written_carries_the_device_the_versions_and_the_faults(tmp_path, monkeypatch):
    env = {"device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-24"}
    monkeypatch.setattr(tool, "environment", lambda device: env)
    tool.write(tmp_path / "results", ["table one"], [{"operation": "rope"}], ["rope, bf16: is off"])
    text = (tmp_path / "results" / "NVIDIA-H200-2026-11-24.md").read_text()
    assert "NVIDIA H200, 2026-11-24" in text and "triton 3.6.0" in text and "table one" in text and "- rope, bf16: is off" in text
    kept = json.loads((tmp_path / "results" / "NVIDIA-H200-2026-11-24.json").read_text())
    assert kept == {"environment": env, "wrong": ["rope, bf16: is off"], "benches": [{"operation": "rope"}]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_run_instead(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py"])
    assert tool.main() == 2
    assert "qwen-ref kernels compile" in capsys.readouterr().err
