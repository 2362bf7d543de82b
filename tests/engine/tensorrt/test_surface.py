"""The doubles and what the backend implements, held to the real bindings of TensorRT-RTX and to cuda.h."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import Bundle
from engine.backends import _has_driver, cuda
from engine.backends.tensorrt_engine import Engine, Model, error_log, make_allocator
from engine.errors import BackendError
from engine.manifest import EngineEntry
from export.trt.build import EngineSpec, build_engine

C_TYPES = {
    "unsigned int": ctypes.c_uint,
    "int": ctypes.c_int,
    "size_t": ctypes.c_size_t,
    "unsigned long long": ctypes.c_ulonglong,
    "char *": ctypes.c_char_p,
    "CUdeviceptr": ctypes.c_uint64,
    "CUdevice": ctypes.c_int,
    "CUdevice_attribute": ctypes.c_int,
    "CUstreamCaptureMode": ctypes.c_int,
    "CUresult": ctypes.c_int,
}
HANDLES = ("CUcontext", "CUstream", "CUgraph", "CUgraphExec", "CUmodule", "CUfunction", "void *")


RTX_ONLY = ("CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy", "IRuntimeConfig")


OWN = ("world", "engine", "logger")  # of the double alone
MADE_BY_US = ("Runtime", "Refitter", "OnnxParserRefitter")


@pytest.fixture(scope="module")
def trt():
    """The bindings that run in this process."""
    return pytest.importorskip("tensorrt_rtx")


@pytest.fixture(params=["tensorrt_rtx", "tensorrt"])
def library(request):
    return request.param


def members_of(double):
    """What a double has of the class that it stands for."""
    for name, member in vars(double).items():
        made = name == "__init__" and double.__name__ in MADE_BY_US
        if made or not (name.startswith("_") or name in OWN):
            yield name, member


def test_every_member_of_the_double_is_real(library, bindings, doubles):
    checked = 0
    for double in doubles:
        if double.__name__ in RTX_ONLY and library == "tensorrt":
            continue
        real = bindings(library)[double.__name__]["members"]
        for name, member in members_of(double):
            assert name in real, f"{double.__name__}.{name}"
            if inspect.isfunction(member):
                wanted = list(inspect.signature(member).parameters)[1:]
                assert wanted in real[name], f"{double.__name__}.{name}"
                checked += 1
    assert checked >= 20


def test_the_callbacks_have_the_parameters_that_the_library_names(library, bindings, trt):
    made = {"ILogger": error_log(trt), "IOutputAllocator": make_allocator(trt, None)}
    for name, methods in {
        "ILogger": ("log",),
        "IOutputAllocator": ("reallocate_output", "reallocate_output_async", "notify_shape"),
    }.items():
        for method in methods:
            (declared,) = re.findall(rf"def {method}\(self, ([^)]*)\)", bindings(library)[name]["doc"])
            ours = inspect.signature(getattr(made[name], method)).parameters
            assert list(ours) == declared.split(", ")


def test_a_real_logger_keeps_the_errors_of_each_thread(trt):
    log = error_log(trt)
    assert log is error_log(trt), "one for the life of the process"
    trt.Runtime(log)
    log.take()
    log.log(trt.ILogger.WARNING, "never mind")
    log.log(trt.ILogger.INTERNAL_ERROR, " first\n  line ")
    other = threading.Thread(target=lambda: log.log(trt.ILogger.ERROR, "of another thread"))
    other.start()
    other.join()
    assert (log.take(), log.take()) == (["first line"], [])


def test_a_real_allocator_takes_shapes(trt):
    allocator = make_allocator(trt, None)
    allocator.notify_shape("box", trt.Dims((3, 4)))
    assert allocator.shape == (3, 4)


@pytest.fixture(scope="module")
def built(bundle_dir, tmp_path_factory):
    """A real engine of the network by hand."""
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path_factory.mktemp("engine") / "model.engine"
    profile = {
        "image": ((1, 3, 256, 256), (2, 3, 256, 256), (4, 3, 256, 256)),
        "input_ids": ((1, 2), (2, 50), (4, 127)),
        "attention_mask": ((1, 2), (2, 50), (4, 127)),
    }
    spec = EngineSpec(bundle_dir / "model.onnx", [profile], ("8.6",), library="tensorrt_rtx")
    build_engine(spec, path)
    return path


@pytest.mark.skipif(_has_driver(), reason="the driver would load it")
@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (None, "CUDA driver version is insufficient"),
        (1000, "plan.header.size == blobSize failed"),
        (0, "empty memory buffer"),
    ],
)
def test_a_real_engine_without_a_driver_or_cut_short(built, bundle_dir, tmp_path, keep, words):
    path = tmp_path / "model.engine"
    path.write_bytes(built.read_bytes()[:keep])
    entry = EngineEntry(path.name, "tensorrt_rtx", "1", ("8.6",), "0" * 64, ())
    with pytest.raises(BackendError, match=rf"tensorrt_rtx \S+ could not load {path}: .*({words})"):
        Engine(entry, Model(path, path.read_bytes()), Bundle.open(bundle_dir).manifest)


def test_the_drivers_functions_are_those_of_its_header():
    declared = header()
    for name, types in (cuda.PROTOTYPES | cuda.LAUNCHING).items():
        plain = declared.aliases.get(name, name)
        ours = [kind.__name__ for kind in types]
        assert ours == [c_type(text).__name__ for text in declared.arguments[plain]], name


def header():
    """The declarations of the cuda.h that Triton ships."""
    spec = importlib.util.find_spec("triton")
    if spec is None:
        pytest.skip("Triton, which ships cuda.h, is not installed")
    text = (Path(spec.origin).parent / "backends" / "nvidia" / "include" / "cuda.h").read_text()
    aliases = re.findall(r"^#define (cu\w+) +(?:__CUDA_API_PT\w+\()?(cu\w+)\)?$", text, re.MULTILINE)
    found = re.findall(r"^CUresult CUDAAPI (\w+)\(([^)]*)\);", text, re.MULTILINE)
    return SimpleNamespace(
        aliases={exported: plain for plain, exported in aliases},
        arguments={name: split(types) for name, types in reversed(found)},
    )


def split(text):
    return [" ".join(part.split()) for part in text.split(",")]


def c_type(text):
    """The ctypes type of an argument's declaration, its name left out."""
    kind = re.sub(r"\s*\b\w+$", "", text.replace("const ", "")).strip()
    if kind in HANDLES:
        return ctypes.c_void_p
    if kind in C_TYPES:
        return C_TYPES[kind]
    assert kind.endswith("*"), text
    inner = kind[:-1].strip()
    return ctypes.POINTER(ctypes.c_void_p if inner in HANDLES else C_TYPES[inner])


def test_a_library_that_is_no_driver(monkeypatch):
    monkeypatch.setattr(cuda, "load_library", lambda: ctypes.CDLL(None))
    cuda.open_gpu.cache_clear()
    with pytest.raises(BackendError, match=r"too old \(.*cuInit\); update it"):
        cuda.open_gpu(0)
