"""The README does what it says: its Python runs, its commands print what is shown, and what it links to is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_kernels import needs_triton

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "CHANGELOG.md", "tools/SPEED.md", "qwen_ref/assets/QUANTISED.md")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def run(*command: str, **environment: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))), **environment}
    out = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=ROOT, timeout=600)
    assert out.returncode in (0, 1), out.stderr[-2000:]
    return out.stdout


def shown(command: str) -> str:
    """What stands below a command."""
    (block,) = [block for block in blocks("console") if command in block.splitlines()[0]]
    return block.split("\n", 1)[1]


def test_its_python_runs_from_top_to_bottom():
    said = run("-c", "\n".join(blocks("python")), PYTHONWARNINGS="ignore")
    report = {line.split()[0]: line.split()[1] for line in said.splitlines() if "also: " in line}
    assert report["rms_norm"] == "mine" and report["swiglu"] != "mine"


def test_the_story_is_told_as_shown():
    told = run("-m", "qwen_ref", "generate", "Once upon a time", "--seed", "1", "--dtype", "float32")
    assert told == shown("qwen-ref generate").split("\n", 1)[1]  # but for who answers, which is on stderr


def test_verify_prints_what_is_shown():
    said = run("-m", "qwen_ref", "verify", "tiny-moe", "--levels", "L0-L2").splitlines()
    for line in shown("qwen-ref verify").splitlines():
        if line and line != "..." and not line.startswith("L1 "):  # whose nearest check and versions may be others
            assert re.sub(r"transformers [\d.]+", "", line) in [re.sub(r"transformers [\d.]+", "", x) for x in said], line


@needs_triton
def test_the_check_of_a_kernel_prints_what_is_shown():
    said = run("-m", "qwen_ref", "kernels", "check", "swiglu", "--impl", "no_mask", "--file", "tests/no_mask.py", TRITON_INTERPRET="1")
    assert re.sub(r"[\d.]+e-\d\d", "#", said).strip() == re.sub(r"[\d.]+e-\d\d", "#", shown("kernels check")).strip()


@pytest.mark.parametrize("page", PAGES)
def test_what_is_linked_is_there(page):
    text, folder = (ROOT / page).read_text(encoding="utf-8"), (ROOT / page).parent
    headings = {re.sub(r"[^\w\- ]", "", line.lstrip("# ")).strip().lower().replace(" ", "-") for line in text.splitlines() if line[:1] == "#"}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        assert target.startswith("https://") or (folder / path).exists(), target
        assert not heading or path or heading in headings, target
