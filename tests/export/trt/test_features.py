"""Engines without weights, for later versions, for other GPUs: what is set, recorded and refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import BackendError, BuildError, InputError
from engine.manifest import EngineEntry
from export.engine_stage import write_engine
from export.options import ExportOptions, check_options
from export.trt import build, engine_file, worker
from export.trt.features import Features, check_features, refusal, set_features
from export.trt.options import EngineOptions
from export.trt.profiles import Shapes

STRIPPED, VERSION = Features(strip_weights=True), Features(version_compatible=True)
AMPERE, SAME = Features(hardware="ampere"), Features(hardware="same")
FULL = build.BuilderInfo("tensorrt", "11.4.0.106", True, "GPU", "9.0", "NVIDIA H100")
RTX = build.BuilderInfo("tensorrt_rtx", "1.7.1", True, "builds without a GPU")
# What export/trt/worker.py, export/trt/timing_cache.py and export/trt/features.py use of the bindings.
USED = {
    "BuilderFlag": {"STRIP_PLAN": None, "REFIT_IDENTICAL": None, "VERSION_COMPATIBLE": None},
    "HardwareCompatibilityLevel": {"AMPERE_PLUS": None, "SAME_COMPUTE_CAPABILITY": None},
    "MemoryPoolType": {"WORKSPACE": None},
    "NetworkDefinitionCreationFlag": {},
    "Builder": {
        "__init__": ["logger"],
        "create_network": ["flags"],
        "create_builder_config": [],
        "create_optimization_profile": [],
        "build_serialized_network": ["network", "config"],
    },
    "IBuilderConfig": {
        "set_flag": ["flag"],
        "hardware_compatibility_level": None,
        "progress_monitor": None,
        "set_memory_pool_limit": ["pool", "pool_size"],
        "add_optimization_profile": ["profile"],
        "create_timing_cache": ["serialized_timing_cache"],
        "set_timing_cache": ["cache", "ignore_mismatch"],
    },
    "ITimingCache": {"serialize": []},
    "IOptimizationProfile": {"set_shape": ["input", "min", "opt", "max"]},
    "INetworkDefinition": {
        "num_inputs": None,
        "num_outputs": None,
        "get_input": ["index"],
        "get_output": ["index"],
    },
    "ITensor": {"name": None, "shape": None, "dtype": None, "is_shape_tensor": None},
    "OnnxParser": {
        "__init__": ["network", "logger"],
        "parse_from_file": ["model"],
        "num_errors": None,
        "get_error": ["index"],
    },
    "ParserError": {"desc": [], "code": [], "node": [], "node_name": [], "node_operator": []},
    "IHostMemory": {"nbytes": None},
}


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
def test_the_bindings_have_what_the_builder_uses(library, bindings):
    for kind, members in USED.items():
        real = bindings(library)[kind]["members"]
        for name, wanted in members.items():
            assert name in real, f"{kind}.{name}"
            assert wanted is None or wanted in real[name], f"{kind}.{name}: {real[name]}"


@pytest.mark.parametrize(
    ("features", "flags", "level"),
    [
        (Features(), (), "NONE"),
        (STRIPPED, ("STRIP_PLAN", "REFIT_IDENTICAL"), "NONE"),
        (VERSION, ("VERSION_COMPATIBLE",), "NONE"),
        (AMPERE, (), "AMPERE_PLUS"),
        (SAME, (), "SAME_COMPUTE_CAPABILITY"),
    ],
)
def test_a_real_configuration_takes_the_flags(features, flags, level):
    """RTX's own, which has those of TensorRT; it does not keep a level, so that goes to a double."""
    rtx = pytest.importorskip("tensorrt_rtx")
    logger = worker._make_logger(rtx, SimpleNamespace(send=lambda *_, **__: None))
    builder = rtx.Builder(logger)
    config = builder.create_builder_config()
    plain = config.flags
    set_features(rtx, config, features)
    assert config.flags == plain | sum(1 << int(getattr(rtx.BuilderFlag, name)) for name in flags)
    double = SimpleNamespace(set_flag=lambda flag: None, hardware_compatibility_level=None)
    set_features(rtx, double, features)
    found = double.hardware_compatibility_level
    assert found == (None if level == "NONE" else getattr(rtx.HardwareCompatibilityLevel, level))


def test_an_old_library_says_what_it_lacks():
    old = SimpleNamespace(
        __name__="tensorrt",
        __version__="10.13.0",
        HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS=1),
    )
    with pytest.raises(BuildError, match=r"tensorrt 10\.13\.0 has no Hard.*\.SAME_COMPUTE_CAPABILITY; inst"):
        set_features(old, SimpleNamespace(), SAME)


@pytest.mark.parametrize(
    ("features", "library", "capability", "words"),
    [
        (Features(), "tensorrt_rtx", None, None),
        (STRIPPED, "tensorrt_rtx", "8.6", None),
        (
            STRIPPED,
            "tensorrt_rtx",
            None,
            "--strip-weights: tensorrt_rtx needs a GPU for it, and this machine",
        ),
        (VERSION, "tensorrt_rtx", "8.6", "--version-compatible: each release of tensorrt_rtx runs its own"),
        (SAME, "tensorrt_rtx", "8.6", "--hardware-compatible: tensorrt_rtx builds for .* --target instead"),
        (STRIPPED, "tensorrt", "9.0", None),
        (VERSION, "tensorrt", "9.0", None),
        (AMPERE, "tensorrt", "8.0", None),
        (SAME, "tensorrt", "7.5", None),
        (AMPERE, "tensorrt", "7.5", "ampere: needs compute capability 8.0 or later, this GPU's is 7.5"),
    ],
)
def test_who_has_them(features, library, capability, words, monkeypatch):
    builder = build.BuilderInfo(library, "1", True, "", capability)
    monkeypatch.setattr(build, "gpu_capability", lambda: capability)
    options = EngineOptions(features=features)
    if words is None:
        assert refusal(features, library, capability) is None
        options.check_builder(builder)
    else:
        with pytest.raises(BackendError, match=words):
            options.check_builder(builder)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (STRIPPED, "tensorrt_rtx needs a GPU for it, and this machine shows none"),
        (VERSION, "each release of tensorrt_rtx runs its own engines alone"),
        (AMPERE, "builds for the compute capabilities of --target instead"),
    ],
)
def test_the_worker_refuses_them_for_rtx(tmp_path, features, words):
    """For whoever builds without the command line; a builder that was let go on fails without a reason."""
    pytest.importorskip("tensorrt_rtx")
    if build.gpu_capability() is not None and features == STRIPPED:
        pytest.skip("a GPU is here")
    graph = tmp_path / "model.onnx"
    graph.write_bytes(b"not even read")
    spec = build.EngineSpec(graph, [], library="tensorrt_rtx", features=features)
    with pytest.raises(BuildError, match=words):
        build.build_engine(spec, tmp_path / "model.engine")
    assert list(tmp_path.iterdir()) == [graph]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (Features(strip_weights=True, version_compatible=True), "the lean runtime, .* cannot refit"),
        (Features(hardware="hopper"), "expected one of ampere, same, got 'hopper'"),
    ],
)
def test_what_does_not_go_together(features, message):
    with pytest.raises(InputError, match=message):
        check_features(features)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"profiles": ((1, 128),)}, "expected one for the bundle's limits, 32x128"),
        ({"timing_cache": Path("/")}, "timing_cache: expected a file in a folder that exists, got /"),
        ({"timing_cache": Path("/nowhere/t.cache")}, "in a folder that exists, got /nowhere/t.cache"),
        ({"limit_s": 0.0}, "limit_s: expected seconds above 0, a day at most, got 0"),
        ({"workspace_mb": 0}, "workspace_mb: expected 1 to 1048576 MiB, got 0"),
        ({"workspace_mb": 10**14}, "workspace_mb: expected 1 to 1048576 MiB"),
        ({"features": Features(hardware="")}, "expected one of ampere, same, got ''"),
    ],
)
def test_options_that_do_not_fit(tmp_path, fields, message):
    options = ExportOptions(out=tmp_path / "b", building=EngineOptions(**fields))
    with pytest.raises(InputError, match=message):
        check_options(options)


@pytest.mark.parametrize(
    ("features", "why"),
    [
        (STRIPPED, "the bundle's own graph, which has no plugins"),
        (VERSION, "no operators beyond the lean runtime's"),
        (AMPERE, "compiled for one compute capability, not for ampere and later"),
        (SAME, None),
    ],
)
def test_our_kernels_and_such_engines(tmp_path, libraries, features, why):
    libraries(triton=True)

    auto, on = (EngineOptions(plugins, features=features) for plugins in ("auto", "on"))
    assert auto.takes_plugins(FULL) is (why is None)
    if why is None:
        assert on.takes_plugins(FULL)
        return
    with pytest.raises(BackendError, match=why):
        on.takes_plugins(FULL)
    with pytest.raises(InputError, match=f"plugins: 'on' does not go with such an engine: .*{why}"):
        check_options(ExportOptions(tmp_path / "b", building=on))


@pytest.fixture
def built(monkeypatch):
    """The native builder's place: the specs it was given."""
    specs = []

    def write_engine_file(spec, out):
        specs.append(spec)
        Path(out).write_bytes(b"engine")
        return build.EngineReport(spec.library, "11.4.0.106", 1.0, 1.0, 6, ("9.0",), (), (), ())

    monkeypatch.setattr(engine_file.trt, "build_engine", write_engine_file)
    return specs


def test_everything_reaches_the_builder_and_the_record(tmp_path, built, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"graph")
    writer = SimpleNamespace(path=lambda name: tmp_path / name)
    options = EngineOptions("auto", ((1, 32), (4, 64)), tmp_path / "t.cache", 60.0, 512, STRIPPED)
    shapes = Shapes(4, 2, 50, 64, 256)
    entry, line = engine_file.build_into(writer, FULL, (), shapes, options, "fp16")
    (spec,) = built
    assert (spec.timing_cache, spec.time_limit_s, spec.workspace_mb) == (tmp_path / "t.cache", 60.0, 512)
    assert (spec.features, spec.library) == (STRIPPED, "tensorrt")
    assert EngineEntry.from_dict(entry.to_dict(), "engines[0]") == entry
    assert [profile["input_ids"].max for profile in entry.profiles] == [(1, 32), (4, 64)]
    assert vars(entry.profiles[1]["image"]) == {
        "min": (1, 3, 256, 256),
        "opt": (4, 3, 256, 256),
        "max": (4, 3, 256, 256),
    }
    assert (entry.stripped, entry.version_compatible, entry.hardware) == (True, False, None)
    assert line.startswith("model.trt-sm90.engine: tensorrt 11.4.0.106 for 9.0, 2 profiles, weights stripped")


@pytest.mark.parametrize(
    ("features", "file"), [(AMPERE, "model.trt-sm80plus.engine"), (SAME, "model.trt-sm90.engine")]
)
def test_hardware_is_recorded(tmp_path, built, features, file):
    (tmp_path / "model.onnx").write_bytes(b"graph")
    writer = SimpleNamespace(path=lambda name: tmp_path / name)
    shapes = Shapes(4, 2, 50, 64, 256)
    options = EngineOptions("off", features=features)
    entry, _ = engine_file.build_into(writer, FULL, (), shapes, options, "fp32")
    assert (entry.file, entry.hardware) == (file, features.hardware)


def test_the_timing_cache_is_the_users_own_but_for_none(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shapes = Shapes(4, 2, 50, 64, 256)

    def cache(builder, **fields):
        return EngineOptions(**fields).spec(tmp_path, builder, (), shapes, False).timing_cache

    assert cache(FULL).parent == tmp_path / "dgm4" / "timing"
    assert cache(FULL, timing_cache=None) is None
    assert cache(RTX) is None


def test_a_line_says_that_our_kernels_stay_out(tmp_path, built, exported, monkeypatch):
    graph = exported("asap")
    writer = SimpleNamespace(path=lambda name: graph.path.parent / name)
    options = ExportOptions(tmp_path / "b", building=EngineOptions(features=STRIPPED))
    entry, line = write_engine(options, graph.model.config, FULL, writer)
    assert line.endswith(
        "; without our kernels: weights are refitted from the bundle's own graph, which has no plugins"
    )
    assert (entry.plugins, built[0].plugins) == ({}, False)
    (graph.path.parent / entry.file).unlink()


def test_a_record_of_before():
    """Bundles whose engines had one profile are read as they are."""
    ranges = {"input_ids": {"min": [1, 2], "opt": [8, 50], "max": [32, 128]}}
    old = {
        "file": "model.rtx.engine",
        "library": "tensorrt_rtx",
        "version": "1",
        "compute_capabilities": ["8.6"],
        "onnx_sha256": "0" * 64,
        "profile": ranges,
    }
    entry = EngineEntry.from_dict(old, "engines[0]")
    assert entry.to_dict()["profiles"] == [ranges]
    assert (entry.stripped, entry.version_compatible, entry.hardware) == (False, False, None)
