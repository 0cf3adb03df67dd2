"""The notebooks: each runs on the bundled models, and the executed file beside it is in step and clean."""

from __future__ import annotations

import base64
import getpass
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
NAMES = ["01_token_to_logits", "02_rope_and_attention", "03_mixture_of_experts", "04_logit_lens_and_patching",
         "05_what_changed_between_generations", "06_hunt_a_mismatch", "07_write_a_kernel",
         "08_linear_attention_and_hybrids", "09_family_tree"]  # fmt: skip
ABSOLUTE_PATH = re.compile(r"(?<![\w./])(?:/[\w.+-]+){2,}|\b[A-Za-z]:\\\w|~/\w")
CPU_SECONDS = 60  # on one thread; the wall clock of a shared machine says nothing


def cells_of(script: str) -> list[tuple[str, str]]:
    """[(kind, source)] of a percent script, read here without jupytext, which wrote the other side."""
    cells: list[tuple[str, list[str]]] = []
    for line in script.splitlines():
        if line.startswith("# %%"):
            cells.append(("markdown" if "[markdown]" in line else "code", []))
        else:
            kind, lines = cells[-1]
            lines.append(re.sub("^# ?", "", line) if kind == "markdown" else line)
    return [(kind, "\n".join(lines).strip("\n")) for kind, lines in cells]


def executed(path: Path) -> dict:
    return json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def test_all_are_here():
    assert [path.stem for path in SOURCES] == NAMES
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.slow
def test_it_runs(path, tmp_path):
    """As a script, in a fresh process and an empty folder: its assertions hold on the bundled weights."""
    pytest.importorskip("matplotlib")
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    before = os.times()
    run = subprocess.run([sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True,
                         encoding="utf-8", timeout=20 * CPU_SECONDS)  # fmt: skip
    after = os.times()
    assert run.returncode == 0, run.stderr[-3000:]
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < CPU_SECONDS
    assert not list(tmp_path.iterdir()), "a notebook leaves nothing behind"


def test_the_executed_file_is_in_step(path):
    script = cells_of(path.read_text(encoding="utf-8"))
    notebook = [(cell["cell_type"], "".join(cell["source"])) for cell in executed(path)["cells"]]
    assert notebook == script, f"run python tools/notebooks.py: {path.stem}.ipynb is not what {path.name} says"


def test_every_cell_was_executed_in_order_and_none_failed(path):
    code = [cell for cell in executed(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(outputs) > len(code) / 2
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output["text"]  # warnings are not for readers


def test_figures_are_pictures(path):
    """A figure that only printed its name would be `<Figure size ...>` without an image beside it."""
    for cell in executed(path)["cells"]:
        for output in cell.get("outputs", []):
            if "<Figure" in str(output.get("text", "")) or "Figure size" in str(output.get("data", {}).get("text/plain", "")):
                picture = base64.b64decode(output["data"]["image/png"])
                assert picture.startswith(b"\x89PNG") and len(picture) > 2000


def test_it_says_nothing_about_the_machine(path):
    notebook = executed(path)
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    text = "\n".join(
        "".join(part)
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        for part in [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
    )
    assert not ABSOLUTE_PATH.findall(text)
    words = set(re.findall(r"[\w.-]+", text))
    if getpass.getuser() != "root":  # "root" is a word
        assert getpass.getuser() not in words
    assert os.uname().nodename not in words if hasattr(os, "uname") else True


def test_it_ends_with_how_to_run_it_on_a_real_model(path):
    kind, last = cells_of(path.read_text(encoding="utf-8"))[-1]
    assert kind == "markdown" and re.search(r"Qwen/Qwen3(-0\.6B|\.5-0\.8B)\b", last)
    assert re.search(r'^MODEL = "tiny(-moe|-hybrid)?"', path.read_text(encoding="utf-8"), re.MULTILINE)
