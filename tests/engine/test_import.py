from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import engine

ROOT = Path(engine.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))


def loaded_after(code: str) -> set[str]:
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*filter(sys.modules.get, sys.modules))"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_import_is_lean():
    """Time that no clock measures here: NumPy and Pillow, and no module of any other package."""
    added = loaded_after("import engine, engine.backends") - loaded_after("import numpy, PIL")
    packages = {name.partition(".")[0] for name in added} - sys.stdlib_module_names
    assert packages <= {"engine", "PIL"}
    assert len([name for name in added if not name.startswith("engine.registry.")]) < 90  # a record a network


def test_serving_needs_no_torch(bundle_dir):
    code = f"import engine; engine.Predictor({str(bundle_dir)!r}).warm_up()"
    loaded = loaded_after(code)
    assert "onnxruntime" in loaded
    assert not {"torch", "onnx", "transformers", "tensorrt", "triton"} & loaded


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_imports_point_one_way(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"dgm4", "export", "benchmarks", "tests"}


def test_torch_stays_where_it_runs():
    """Torch and the kernels, which import it: in the network and in the backend of that name alone."""
    importing = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {name.split(".")[0] for name in names} & {"torch", "kernels"}:
                importing.add(path.relative_to(ROOT).as_posix())
    network = {name for name in importing if name.startswith("network/")}
    assert importing - network == {"backends/torch.py", "backends/graphs.py", "backends/float32.py"}


def test_an_engine_is_served_without_torch(bundle_dir):
    """Asked for on a machine without TensorRT, a GPU or an engine, it still loads no more than it needs."""
    code = (
        "import engine, engine.backends.tensorrt, engine.backends.tensorrt_lane\n"
        f"try: engine.Predictor({str(bundle_dir)!r}, backend='tensorrt')\n"
        "except engine.Dgm4Error: pass"
    )
    assert not {"torch", "onnx", "onnxruntime", "tensorrt", "export"} & loaded_after(code)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) < 400
