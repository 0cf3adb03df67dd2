"""Execute the notebooks: every notebooks/*.py (jupytext's percent format) into the .ipynb beside it.

    python tools/notebooks.py                        # all of them, after a change of text, code or bundled weights
    python tools/notebooks.py 02 05                  # those whose names start so
    python tools/notebooks.py --check                # execute, write nothing; exit 1 on an error or a stale .ipynb

Each runs in a fresh kernel of this interpreter, with the package of this tree, on one thread. What is written holds the
source and its outputs and nothing about the machine: no times, no paths, cells numbered in order.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
CELL_SECONDS = 300
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="starts of names; default all")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if an .ipynb is not its .py's")
    args = parser.parse_args()
    sources = sorted(path for path in FOLDER.glob("*.py") if path.name.startswith(tuple(args.names or [""])))
    if not sources:
        print(f"no notebook starts with {', '.join(args.names)}", file=sys.stderr)
        return 1
    return sum([process(path, args.check) for path in sources]) and 1


def process(path: Path, check: bool) -> int:
    """Execute one; returns 1 if it failed. The .ipynb is written only after every cell has run."""
    notebook, start = read(path), time.perf_counter()
    stale = check and sources_of(written(path)) != sources_of(notebook)
    try:
        execute(notebook)
    except CellExecutionError as error:
        print(f"{path.name}: failed\n{error}", file=sys.stderr)
        return 1
    if not check:
        nbformat.write(notebook, path.with_suffix(".ipynb"))
    message = f"{path.stem}.ipynb is missing or stale: run python tools/notebooks.py" if stale else "ok"
    print(f"{path.name:40} {time.perf_counter() - start:5.1f} s  {message}", flush=True)
    return int(stale)


def read(path: Path) -> Any:
    """The notebook of a percent file, no cell executed. Cell ids are numbers, so that a rerun changes only outputs."""
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", nbformat.from_dict({})
    return notebook


def written(path: Path) -> Any:
    path = path.with_suffix(".ipynb")
    return nbformat.read(path, as_version=4) if path.exists() else nbformat.v4.new_notebook()


def sources_of(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def execute(notebook: Any) -> None:
    # PYTHONPATH for a tree that is not installed; one thread, so that sums are taken in the same order everywhere.
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", MPLBACKEND="module://matplotlib_inline.backend_inline",
                      PYTHONWARNINGS="ignore:IProgress")  # tqdm's advice to install widgets
    client = NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", record_timing=False, coalesce_streams=True,
                            resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    notebook.metadata = nbformat.from_dict(METADATA)  # nbclient adds the interpreter's version


if __name__ == "__main__":
    raise SystemExit(main())
