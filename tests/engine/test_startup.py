"""What importing the engine sets in a process: no library sends or stores usage data."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from engine import Predictor
from engine.errors import BackendError

CHILD = """
import multiprocessing
import engine

def load(bundle):
    import onnxruntime
    engine.Predictor(bundle).warm_up()

if __name__ == "__main__":
    load({bundle!r})
    process = multiprocessing.get_context("spawn").Process(target=load, args=({bundle!r},))
    process.start()
    process.join()
    assert process.exitcode == 0
"""
# What `openvino` does on import, and its telemetry for a user without a home folder.
OPENVINO = """
try:
    import openvino_telemetry
except ImportError:
    pass

class Core:
    def set_property(self, properties):
        pass
"""
TELEMETRY = "raise RuntimeError('Could not determine home directory.')"


def run_python(*arguments, **variables):
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_TELEMETRY")}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    inherited.pop("XDG_CACHE_HOME", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env={**inherited, **variables}, check=True, capture_output=True, text=True)


def test_onnx_runtime_leaves_nothing_in_the_home_folder(bundle_dir, tmp_path):
    """From 1.29 on it keeps a device id and a store of events there, unless it is told before its import."""
    home, program = tmp_path / "home", tmp_path / "program.py"
    home.mkdir()
    program.write_text(CHILD.format(bundle=str(bundle_dir)))
    run_python(program, HOME=str(home))
    assert list(home.rglob("*")) == []


def test_what_the_user_set_stays():
    names = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
    code = f"import os, engine; print(*map(os.environ.get, {names}))"
    assert run_python("-c", code).stdout.split() == ["1", "1"]
    assert run_python("-c", code, ORT_DISABLE_TELEMETRY="0").stdout.split() == ["0", "1"]


def test_openvino_is_imported_without_its_telemetry(tmp_path):
    for name, text in (("openvino", OPENVINO), ("openvino_telemetry", TELEMETRY)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    run_python("-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import engine.backends.openvino")


def test_a_library_that_does_not_import_is_a_backend_error(bundle_dir, monkeypatch):
    def fail(name):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(
        BackendError, match="'ort' cannot be imported: RuntimeError: Could not determine home"
    ):
        Predictor(bundle_dir, backend="ort")
