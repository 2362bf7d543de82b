"""When plugins go into an engine, what the builder is then given, and what the bundle says of it."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import onnx
import pytest

from engine.errors import BackendError, BuildError, InputError
from engine.manifest import EngineEntry
from export.engine_stage import write_engine
from export.options import ExportOptions, check_options
from export.trt import build
from export.trt.options import _CAPABILITIES, EngineOptions
from kernels.jit import TARGETS

FULL = build.BuilderInfo("tensorrt", "11.4", True, "GPU of compute capability 9.0", "9.0")
RTX = build.BuilderInfo("tensorrt_rtx", "1.7.1", True, "builds without a GPU")
OLD = build.BuilderInfo("tensorrt", "11.4", True, "GPU of compute capability 7.5", "7.5")


@pytest.fixture
def options(tmp_path):
    return lambda plugins: ExportOptions(out=tmp_path / "bundle", building=EngineOptions(plugins))


@pytest.fixture
def triton_found(libraries):
    libraries(triton=True)


@pytest.mark.parametrize(
    ("plugins", "builder", "fit"),
    [
        ("auto", FULL, True),
        ("on", FULL, True),
        ("off", FULL, False),
        ("auto", RTX, False),
        ("off", RTX, False),
        ("auto", OLD, False),
    ],
)
def test_where_they_go(triton_found, plugins, builder, fit):
    assert EngineOptions(plugins).takes_plugins(builder) is fit


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (RTX, "--plugins on: tensorrt_rtx has no plugins; pip install .dgm4"),
        (OLD, "--plugins on: the kernels are for compute capability 8.0, .* and this GPU's is 7.5"),
    ],
)
def test_what_was_asked_for_and_cannot_be_is_refused(triton_found, builder, message):
    with pytest.raises(BackendError, match=message):
        EngineOptions("on").takes_plugins(builder)


def test_without_triton_there_are_none(libraries):
    libraries(triton=False, torch=False, onnx=False)
    assert not EngineOptions("auto").takes_plugins(FULL)
    with pytest.raises(BackendError, match="is not installed: pip install triton torch onnx"):
        EngineOptions("on").takes_plugins(FULL)


def test_they_are_for_the_gpus_that_the_kernels_are_checked_for():
    assert tuple(f"{target / 10}" for target in TARGETS) == _CAPABILITIES


def test_an_unknown_choice_is_refused(options):
    with pytest.raises(InputError, match="plugins: expected one of auto, on, off, got 'maybe'"):
        check_options(options("maybe"))


@pytest.mark.parametrize("plugins", ["on", "off"])
def test_the_builder_gets_the_graph_for_them(options, triton_found, exported, monkeypatch, plugins):
    """And the record says what is inside; the rewritten graph is gone afterwards."""
    graph = exported("asap")
    folder, given = graph.path.parent, []

    def build_engine(spec, out):
        bodies = {f.name for f in onnx.load_model(spec.onnx, load_external_data=False).functions}
        given.append((spec.onnx.name, spec.plugins, "GuidedHeadAttention" in bodies))
        out.write_bytes(b"engine")
        return SimpleNamespace(
            library="tensorrt",
            version="11.4",
            compute_capabilities=("9.0",),
            engine_bytes=6,
            peak_memory_mb=1.0,
            seconds=2.0,
        )

    monkeypatch.setattr(build, "build_engine", build_engine)
    writer = SimpleNamespace(path=lambda name: folder / name)
    entry, line = write_engine(options(plugins), graph.model.config, FULL, writer)
    (count,) = entry.plugins.values() or (0,)
    if plugins == "on":
        assert given == [("plugins.model.onnx", True, False)]
        assert list(entry.plugins) == ["GuidedHeadAttention"]
        assert f"{count} nodes with our kernels" in line
    else:
        assert given == [("model.onnx", False, True)]
        assert entry.plugins == {}
        assert "our kernels" not in line
    assert not (folder / "plugins.model.onnx").exists()
    written = entry.to_dict()
    assert EngineEntry.from_dict(written) == entry
    assert EngineEntry.from_dict({k: v for k, v in written.items() if k != "plugins"}).plugins == {}


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_the_worker_refuses_them_for_rtx(exported, tmp_path):
    """An ONNX node that is a registered plugin would abort that library's process."""
    spec = build.EngineSpec(exported("asap").path, [], library="tensorrt_rtx", plugins=True)
    with pytest.raises(BuildError, match="tensorrt_rtx has no plugins; export with --plugins off"):
        build.build_engine(spec, tmp_path / "model.engine")


def test_the_worker_refuses_them_without_a_gpu(exported, tmp_path, monkeypatch):
    from export.trt import worker

    monkeypatch.setattr(worker, "probe_driver", lambda: {"compute_capability": None})
    with pytest.raises(worker.RefusedError, match="this machine shows none"):
        worker._use_plugins("tensorrt")
