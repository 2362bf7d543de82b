"""What is said where a package is absent: the command that installs it."""

from __future__ import annotations

import importlib.metadata

import pytest

from engine import backends
from engine.errors import BackendError
from engine.packages import find_conflict, install_command, lacking, require


def test_the_command_names_the_extras():
    assert install_command("cpu", "export") == 'pip install "dgm4[cpu,export]"'


def test_what_is_absent_is_named(libraries):
    require("this", "onnxruntime")
    libraries(torch=False, onnx=False, onnxruntime=False)
    with pytest.raises(BackendError) as caught:
        require("dgm4 export", "torch", "onnx", "onnxruntime")
    assert str(caught.value) == ('dgm4 export needs torch, onnx, onnxruntime: pip install "dgm4[export,cpu]"')


def test_a_failed_import_is_told_as_well():
    assert str(lacking("this", ModuleNotFoundError("", name="sklearn.metrics"))) == (
        'this needs scikit-learn: pip install "dgm4[evaluate]"'
    )
    error = lacking("dgm4 train", ModuleNotFoundError("", name="safetensors.torch"))
    assert str(error) == 'dgm4 train needs safetensors: pip install "dgm4[export]"'
    ours = ModuleNotFoundError("No module named 'engine.absent'", name="engine.absent")
    with pytest.raises(ModuleNotFoundError, match=r"engine\.absent"):
        lacking("dgm4 train", ours)


@pytest.fixture
def installed(monkeypatch):
    """Only the distributions that are named are installed; for a GPU, with a driver."""

    def install(*names):
        def version(name):
            if name not in names:
                raise importlib.metadata.PackageNotFoundError
            return "1.32.0"

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(backends, "_found", lambda name: bool(names))
        monkeypatch.setattr(backends, "_has_part", lambda kind: names == ("onnxruntime-gpu",))
        monkeypatch.setattr(backends, "_has_driver", lambda: True)

    return install


@pytest.mark.parametrize(
    ("names", "cpu", "gpu"),
    [
        ((), 'pip install "dgm4[cpu]"', 'pip install "dgm4[gpu]"'),
        (("onnxruntime",), None, 'pip uninstall -y onnxruntime && pip install "dgm4[gpu]"'),
        (("onnxruntime-gpu",), None, None),
    ],
)
def test_the_remedy_of_a_backend(installed, names, cpu, gpu):
    installed(*names)
    assert (backends.remedy("ort"), backends.remedy("ort-cuda")) == (cpu, gpu)
    assert find_conflict() is None


def test_both_builds_of_onnx_runtime(installed):
    installed("onnxruntime", "onnxruntime-gpu")
    assert backends.remedy("ort-cuda") == find_conflict()
    assert "both installed and overwrite each other: pip uninstall -y onnxruntime onnx" in find_conflict()
