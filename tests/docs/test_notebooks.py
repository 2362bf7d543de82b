"""The notebooks run from the first cell to the last, and hold the outputs of such a run."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
LARGEST = 300_000  # bytes with its outputs


def outputs(notebook):
    """The kinds of output of each cell of code."""
    return [{o.output_type for o in cell.outputs} for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    monkeypatch.setenv("PATH", os.environ["PATH"])  # which `execute` changes
    execute = runpy.run_path(str(ROOT / "docs" / "execute_notebooks.py"))["execute"]
    stored = nbformat.read(path, as_version=4)
    assert path.stat().st_size < LARGEST
    assert outputs(execute(path, tmp_path)) == outputs(stored), "run: python docs/execute_notebooks.py"
