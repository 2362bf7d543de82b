"""Execute the notebooks and keep the outputs: `python docs/execute_notebooks.py [NAME ...]`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat

NOTEBOOKS = Path(__file__).resolve().parent / "notebooks"


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in `folder`; raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    # `dgm4` of this environment, activated or not.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    place = {"metadata": {"path": folder}}
    client = nbclient.NotebookClient(
        notebook, kernel_name="python3", resources=place, record_timing=False, coalesce_streams=True
    )
    executed = client.execute()
    executed.metadata.language_info = {"name": "python"}  # the version would change with every machine
    return executed


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            path = NOTEBOOKS / f"{name}.ipynb"
            nbformat.write(execute(path, Path(folder)), path)
