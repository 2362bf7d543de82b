from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import engine

SOURCES = sorted(Path(engine.__file__).parent.rglob("*.py"))


def loaded_after(code: str) -> set[str]:
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_import_is_lean():
    loaded = loaded_after("import engine, engine.backends")
    for heavy in ("torch", "onnxruntime", "onnx", "tokenizers", "transformers", "tensorrt", "triton"):
        assert heavy not in loaded


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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) < 400
