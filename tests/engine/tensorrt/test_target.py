"""Which engine runs here, what is said where none does, and how one is built."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

import pytest

from engine import Bundle, Predictor, backends
from engine.backends import cuda, tensorrt_target
from engine.errors import BackendError, BundleError, EngineMismatchError

RTX = {
    "file": "model.rtx-sm80-sm86.engine",
    "library": "tensorrt_rtx",
    "version": "1.7.1.116",
    "compute_capabilities": ["8.0", "8.6"],
}


def chosen(path):
    return tensorrt_target.choose(Bundle.open(path), cuda.open_gpu(0)).file


def test_the_engine_of_this_machine_is_chosen(machine, engine_bundle, monkeypatch):
    machine()
    other = {"file": "model.trt-sm90.engine", "compute_capabilities": ["9.0"]}
    assert chosen(engine_bundle(other, {})) == "model.trt-sm89.engine"
    monkeypatch.setattr(
        tensorrt_target, "installed", lambda: {"tensorrt": "11.4.0.106", "tensorrt_rtx": "1.7.1.116"}
    )
    both = {**RTX, "compute_capabilities": ["8.9"]}
    assert chosen(engine_bundle(both, {})) == "model.trt-sm89.engine", "TensorRT before RTX"
    assert chosen(engine_bundle(both, other)) == RTX["file"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (RTX, r"needs tensorrt_rtx 1\.7\.1\.116, which is not installed"),
        ({"version": "10.13.0.35"}, r"was built by tensorrt 10\.13\.0\.35, and 11\.4\.0\.106 is installed"),
        (
            {"version": "11.5.0.1", "version_compatible": True},
            r"was built by tensorrt 11\.5\.0\.1 for it and later 11\.x, and 11\.4\.0\.106 is installed",
        ),
        (
            {"version": "10.13.0.35", "version_compatible": True},
            r"was built by tensorrt 10\.13\.0\.35 for it and later 10\.x, and 11\.4\.0\.106 is installed",
        ),
        ({"compute_capabilities": ["9.0"], "hardware": "same"}, r"is for compute capability 9\.0"),
        ({"compute_capabilities": ["9.0", "12.0"]}, r"is for compute capability 9\.0, 12\.0"),
        ({"onnx_sha256": "0" * 64}, "was built from a graph no longer in the bundle"),
    ],
)
def test_both_sides_and_the_command_are_named(machine, engine_bundle, fields, reason):
    world = machine()
    path = engine_bundle(fields)
    words = (
        rf"no engine of {path} is for this machine \(NVIDIA Double, compute capability 8\.9, "
        rf"tensorrt 11\.4\.0\.106\): model\S+engine {reason}; build one with: dgm4 rebuild {path}$"
    )
    with pytest.raises(EngineMismatchError, match=words):
        Predictor(path, backend="tensorrt")
    assert world.loaded == []


def test_ampere_and_later_is_none_of_before(machine, engine_bundle):
    machine(capability="7.5")
    path = engine_bundle({"compute_capabilities": ["9.0"], "hardware": "ampere"})
    with pytest.raises(EngineMismatchError, match=r"is for compute capability 8\.0 and later; build one"):
        Predictor(path, backend="tensorrt")


@pytest.mark.parametrize(
    "fields",
    [
        {"compute_capabilities": ["9.0"], "hardware": "ampere"},
        {"hardware": "same"},
        {"version": "11.0.0.1", "version_compatible": True},
        {"version": "11.4.0.99", "version_compatible": True},
    ],
)
def test_a_compatible_engine_is_taken(machine, engine_bundle, fields):
    machine()
    assert chosen(engine_bundle(fields)) == "model.trt-sm89.engine"


@pytest.mark.parametrize("given", [True, False])
def test_only_a_version_compatible_engine_brings_code(machine, engine_bundle, given):
    world = machine()
    with Predictor(engine_bundle({"version_compatible": given}), backend="tensorrt") as predictor:
        predictor.warm_up()
    assert world.trusted == [given]


def test_a_bundle_without_an_engine_says_how_to_build_one(machine, bundle_copy):
    machine()
    with pytest.raises(EngineMismatchError, match=r"the bundle has none; build one with: dgm4 rebuild \S+$"):
        Predictor(bundle_copy, backend="tensorrt")


def test_the_command_is_one_that_a_shell_takes():
    bundle = SimpleNamespace(path="/tmp/my bundle's")
    command = tensorrt_target.rebuild_command(bundle)
    words = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
    )
    assert words.stdout.splitlines() == ["dgm4", "rebuild", "/tmp/my bundle's"]


@pytest.mark.parametrize("damage", [b"an engin", b"an Engine"])
def test_a_truncated_or_altered_engine_is_not_read(machine, engine_bundle, damage):
    world = machine()
    path = engine_bundle()
    (path / "model.trt-sm89.engine").write_bytes(damage)
    with pytest.raises(BundleError, match=r"model\.trt-sm89\.engine: expected .*copy the bundle again"):
        Predictor(path, backend="tensorrt")
    assert world.loaded == []


def test_no_library(machine, engine_bundle, monkeypatch):
    machine()
    monkeypatch.setattr(tensorrt_target, "installed", dict)
    with pytest.raises(BackendError, match="needs TensorRT or TensorRT-RTX: .*dgm4.trt.*, or .*dgm4.rtx"):
        Predictor(engine_bundle(), backend="tensorrt")


def test_an_old_driver(machine, engine_bundle, monkeypatch):
    machine(version="11.4.0.106", capability="8.9")
    cuda.open_gpu.cache_clear()
    monkeypatch.setattr(cuda.Gpu, "__init__", _old_gpu)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"tensorrt_cu13": "11"}[name])
    words = r"built with CUDA 13, and this driver knows CUDA 12\.4 at most; update the NVIDIA driver, or "
    with pytest.raises(BackendError, match=words + "install tensorrt-cu12"):
        Predictor(engine_bundle(), backend="tensorrt")


def _old_gpu(self, driver, index):
    self.name, self.index, self.capability, self.cuda = "NVIDIA Double", index, "8.9", 12040


def test_no_driver(engine_bundle, monkeypatch):
    monkeypatch.setattr(backends, "_has_driver", lambda: False)
    monkeypatch.setattr(backends, "_found", lambda name: True)
    with pytest.raises(BackendError, match="'tensorrt' needs an NVIDIA driver, which is not installed"):
        Predictor(engine_bundle(), backend="tensorrt")
    assert "tensorrt" not in backends.available()
    assert backends.describe()["tensorrt"] == "an NVIDIA driver"


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda:2", r"device 'cuda:2': this machine shows 2 NVIDIA GPU\(s\), from cuda:0"),
        ("cpu", "runs on device 'auto', 'cuda' or 'cuda:N', got 'cpu'"),
    ],
)
def test_devices_that_it_lacks(machine, engine_bundle, device, words):
    machine(gpus=2)
    with pytest.raises(BackendError, match=words):
        Predictor(engine_bundle(), backend="tensorrt", device=device)
    assert Predictor(engine_bundle(), backend="tensorrt", device="cuda:1").model["device"] == "cuda:1"


def test_auto_takes_an_engine_of_this_gpu_first(machine, engine_bundle):
    machine()
    for fields, expected in (({}, "tensorrt"), ({"compute_capabilities": ["9.0"]}, "ort")):
        with Predictor(engine_bundle(fields), device="auto") as predictor:
            assert predictor.model["backend"] == expected
    with Predictor(engine_bundle(), device="cpu") as predictor:
        assert predictor.model["backend"] == "ort"


@pytest.fixture
def command(monkeypatch, engine_bundle):
    """Stands in for `dgm4 rebuild`: what it was called with, what it does."""
    calls = SimpleNamespace(made=[], environment=None, status=0, words="")

    def run(arguments, env, **options):
        calls.made.append(arguments)
        calls.environment = env
        if calls.status == 0:
            engine_bundle()
        return SimpleNamespace(returncode=calls.status, stderr=calls.words)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_a_rebuild_that_was_asked_for(machine, engine_bundle, command):
    machine(gpus=2)
    path = engine_bundle({"compute_capabilities": ["9.0"]})
    with Predictor(path, backend="tensorrt", device="cuda:1", rebuild=True) as predictor:
        predictor.warm_up()
    assert command.made == [[sys.executable, "-P", "-m", "export.cli", "rebuild", str(path)]]
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "1"
    with Predictor(path, rebuild=True) as predictor:
        assert predictor.model["backend"] == "tensorrt"
    assert len(command.made) == 1, "an engine that fits is left alone"


def test_a_rebuild_of_one_of_the_visible_gpus(machine, engine_bundle, command, monkeypatch):
    machine(gpus=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    backends.rebuilt("auto", Bundle.open(engine_bundle({"version": "9"})), "cuda:1")
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "5"


def test_a_rebuild_that_fails(machine, engine_bundle, command):
    machine()
    command.status, command.words = 4, "engine: 3/4\ndgm4: error: the disk is full\n"
    with pytest.raises(
        BackendError, match=r"for NVIDIA Double: the disk is full \(status 4 of: dgm4 rebuild"
    ):
        Predictor(engine_bundle({"version": "9"}), rebuild=True)


def test_a_rebuild_for_another_backend(engine_bundle):
    with pytest.raises(BackendError, match="rebuilt for the backend 'tensorrt' .* got 'ort'"):
        Predictor(engine_bundle(), backend="ort", rebuild=True)
