"""The notebooks: each runs on the bundled models, and the executed file beside it is in step and clean."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))


def code(source: str) -> str:
    """A percent script's or cell's code, blank lines aside."""
    return "\n".join(line.rstrip() for line in source.splitlines() if line.strip())


@pytest.mark.slow
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    pytest.importorskip("matplotlib", reason="the notebooks draw: pip install -e '.[plots]'")
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(FOLDER.parent)}
    environment["PYTHONWARNINGS"] = "ignore"
    run = subprocess.run([sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_executed_file_is_in_step(path):
    notebook = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    script = code("\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")))
    executed = code("\n".join(line for cell in cells for line in "".join(cell["source"]).splitlines() if not line.startswith("#")))
    assert executed == script, f"run tools/notebooks.py: {path.stem}.ipynb is not what {path.name} says"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    text = json.dumps(outputs)
    assert "site-packages" not in text and "/home/" not in text and "/root/" not in text


def test_there_are_six():
    assert [path.name[:2] for path in SOURCES] == ["01", "02", "03", "04", "05", "06"]
