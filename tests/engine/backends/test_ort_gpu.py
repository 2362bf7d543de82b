"""ONNX Runtime's GPU providers, on its real sessions and bindings with the CPU in the place of "cuda"."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from helpers import draw_feeds

from engine import Bundle, Predictor, backends
from engine.backends import base, ort_gpu
from engine.errors import BackendError, BundleError

CUDA, TENSORRT, CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
FLAT = "model.flat.onnx"
SHAPES = "image:{0}x3x256x256,input_ids:{0}x{1},attention_mask:{0}x{1}"
REAL = onnxruntime.InferenceSession


feeds = partial(draw_feeds, vocabulary=70)


@pytest.fixture
def flat_copy(bundle_copy, manifest_template, write_manifest):
    """A function that makes a bundle with a flat graph, with fields over the manifest's."""

    def make(**fields):
        shutil.copyfile(bundle_copy / "model.onnx", bundle_copy / FLAT)
        write_manifest(bundle_copy, manifest_template() | fields)
        return bundle_copy

    return make


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """ONNX Runtime with GPU providers; what sessions were made with, and what bindings were asked for."""
    made = SimpleNamespace(providers=[], started=[CUDA, TENSORRT], log=[])

    class Binding:
        def __init__(self, real):
            self.real = real

        def __getattr__(self, name):
            made.log.append(name)
            return getattr(self.real, name)

        def bind_output(self, name, device_type, device_id):
            made.log.append(f"output on {device_type}:{device_id}")
            self.real.bind_output(name, "cpu", 0)

    class Session:
        def __init__(self, path_or_bytes, sess_options, providers, enable_fallback):
            assert enable_fallback == 0
            made.providers.append(providers)
            self.real = REAL(path_or_bytes, sess_options, providers=[CPU], enable_fallback=0)

        def __getattr__(self, name):
            return getattr(self.real, name)

        def get_providers(self):
            return [name for name, _ in made.providers[-1] if name in made.started] + [CPU]

        def io_binding(self):
            return Binding(self.real.io_binding())

        def run_with_iobinding(self, iobinding):
            made.log.append("run")
            self.real.run_with_iobinding(iobinding.real)

    place = onnxruntime.OrtValue.ortvalue_from_numpy

    def on_host(numpy_obj, device_type, device_id):
        made.log.append(f"input on {device_type}:{device_id}")
        return place(numpy_obj, "cpu", 0)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", on_host)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(backends, "_has_driver", lambda: True)
    monkeypatch.setattr(backends, "_has_part", lambda kind: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    return made


@pytest.mark.parametrize("name", ["ort-cuda", "ort-tensorrt"])
def test_answers_through_bindings(gpu, flat_copy, name):
    bundle = Bundle.open(flat_copy())
    backend = backends.create(name, bundle, "cuda:1", 1)
    assert (backend.name, backend.device) == (name, "cuda:1")
    plain = backends.create("ort-cuda", bundle, "cuda", 1)._network.real
    for batch, tokens in [(1, 2), (4, 50)]:
        inputs = feeds(batch, tokens)
        got = backend.run(inputs)
        for output, want in zip(plain.get_outputs(), plain.run(None, inputs), strict=True):
            np.testing.assert_array_equal(got[output.name], want)
    inputs, outputs = ["input on cuda:1", "bind_ortvalue_input"] * 3, ["output on cuda:1"] * 5
    order = ["synchronize_inputs", "run", "synchronize_outputs", "copy_outputs_to_cpu"]
    assert sorted(gpu.log[:6]) == sorted(inputs)
    assert gpu.log[6:15] == outputs + order
    backend.close()
    with pytest.raises(BackendError, match="was closed"):
        backend.run(feeds(1, 2))


def test_what_is_called_has_these_parameters():
    """The doubles above hide the real signatures where they stand in for them."""
    for owner, name, wanted in [
        (REAL, "__init__", ["path_or_bytes", "sess_options", "providers"]),
        (REAL, "run_with_iobinding", ["iobinding"]),
        (REAL, "io_binding", []),
        (onnxruntime.IOBinding, "bind_output", ["name", "device_type", "device_id"]),
        (onnxruntime.IOBinding, "bind_ortvalue_input", ["name", "ortvalue"]),
        (onnxruntime.OrtValue, "ortvalue_from_numpy", ["numpy_obj", "device_type", "device_id"]),
    ]:
        found = [p for p in inspect.signature(getattr(owner, name)).parameters if p != "self"]
        assert found[: len(wanted)] == wanted, name


def test_options_of_the_cuda_provider(gpu, flat_copy):
    backends.create("ort-cuda", Bundle.open(flat_copy(precision="fp16")), "auto", 1)
    ((name, options),) = gpu.providers[0]
    assert (name, options["device_id"], options["use_tf32"]) == (CUDA, "0", "0")
    assert all(isinstance(value, str) for value in options.values())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_options_of_the_tensorrt_provider(gpu, flat_copy, tmp_path, precision):
    backends.create("ort-tensorrt", Bundle.open(flat_copy(precision=precision)), "cuda:3", 1)
    (first, options), (second, _) = gpu.providers[0]
    assert (first, second) == (TENSORRT, CUDA)
    assert (options["device_id"], options["trt_fp16_enable"]) == ("3", "False")
    assert options["trt_int8_enable"] == str(precision == "int8")
    assert options["trt_profile_min_shapes"] == SHAPES.format(1, 2)
    assert options["trt_profile_opt_shapes"] == SHAPES.format(4, 50)
    assert options["trt_profile_max_shapes"] == SHAPES.format(4, 127)
    assert options["trt_engine_cache_path"].startswith(str(tmp_path / "cache" / "dgm4"))
    assert all(isinstance(value, str) for value in options.values())


def test_the_cache_is_the_users_own(gpu, flat_copy, tmp_path, caplog):
    bundle = Bundle.open(flat_copy())
    folder = ort_gpu.cache_folder(bundle)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert ort_gpu.cache_folder(bundle) is None
    assert "others may write in" in caplog.text
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file")
    assert ort_gpu.cache_folder(bundle) is None
    assert ort_gpu.tensorrt_options(bundle, 0, None)["trt_engine_cache_enable"] == "False"
    (tmp_path / "cache").unlink()


def test_float32_is_not_rounded_to_tf32(gpu, flat_copy, monkeypatch):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    path = flat_copy()
    with pytest.raises(
        BackendError, match="set NVIDIA_TF32_OVERRIDE=0 before Python starts, or use .*ort-cuda"
    ):
        Predictor(path, backend="ort-tensorrt")
    backends.create("ort-tensorrt", Bundle.open(flat_copy(precision="fp16")), "cuda", 1)


def test_a_provider_that_does_not_start_is_no_cpu_backend(gpu, flat_copy):
    gpu.started = [CUDA]
    with pytest.raises(
        BackendError, match=rf"needs {TENSORRT}, which ONNX Runtime \S+ here does not start \(it has {CUDA}, "
    ):
        Predictor(flat_copy(), backend="ort-tensorrt")


def test_onnx_runtime_for_the_cpu(gpu, flat_copy, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(BackendError, match=rf"needs {CUDA}, .*pip uninstall -y onnxruntime && .*dgm4.gpu"):
        Predictor(flat_copy(), backend="ort-cuda")


def test_here_it_says_what_is_missing(flat_copy, monkeypatch):
    monkeypatch.setattr(backends, "_has_driver", lambda: False)
    monkeypatch.setattr(backends, "_has_part", lambda kind: False)
    assert backends.describe()["ort-cuda"] == "onnxruntime-gpu and an NVIDIA driver"
    with pytest.raises(
        BackendError, match="'ort-cuda' needs onnxruntime-gpu and an NVIDIA driver, which are not"
    ):
        Predictor(flat_copy(), backend="ort-cuda")


def test_the_providers_file_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "_has_driver", lambda: True)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert backends.describe()["ort-cuda"] == "onnxruntime-gpu"
    (tmp_path / "capi").mkdir()
    (tmp_path / backends._BACKENDS["ort-cuda"].part).touch()
    assert "ort-cuda" in backends.available()
    assert "ort-tensorrt" not in backends.available()


def test_auto_takes_it_where_a_gpu_has_nothing_better(gpu, flat_copy, monkeypatch):
    monkeypatch.setattr(backends, "_found", lambda name: name == "onnxruntime")
    for device, expected in (("auto", "ort-cuda"), ("cuda", "ort-cuda"), ("cpu", "ort")):
        assert backends.create("auto", Bundle.open(flat_copy()), device, 1).name == expected


@pytest.mark.parametrize("name", ["ort-cuda", "ort-tensorrt"])
def test_the_cpu_is_refused(gpu, flat_copy, name):
    with pytest.raises(BackendError, match=f"'{name}' runs on device 'auto', 'cuda' or 'cuda:N', got 'cpu'"):
        Predictor(flat_copy(), backend=name, device="cpu")


def test_dynamic_int8_is_refused(gpu, bundle_dir):
    with pytest.raises(BackendError, match=r"needs model\.flat\.onnx; this fp32 bundle does not contain it"):
        Predictor(bundle_dir, backend="ort-cuda")


def test_failures_are_named(gpu, flat_copy, monkeypatch):
    path = flat_copy()
    backend = backends.create("ort-cuda", Bundle.open(path), "cuda", 1)
    with pytest.raises(BackendError, match="image: expected float32 of shape"):
        backend.run(feeds(1, 4) | {"image": np.zeros((1, 3, 8, 8), np.float32)})
    monkeypatch.setattr(base, "measure", lambda *_: {"batch": 1, "tokens": 4})
    with pytest.raises(BackendError, match=r"ONNX Runtime failed on inputs of shape .*\[1, 3, 8\]"):
        backend.run(feeds(1, 4) | {"image": np.zeros((1, 3, 8), np.float32)})
    bundle = Bundle.open(flat_copy())
    monkeypatch.setattr(Bundle, "held", lambda *_: contextlib.nullcontext())
    (path / FLAT).write_bytes(b"no graph")
    with pytest.raises(BundleError, match="cannot load it on a GPU"):
        ort_gpu.create_cuda(bundle, "cuda", 1)


def test_a_graph_that_is_replaced_while_it_is_loaded_is_refused(gpu, flat_copy, monkeypatch):
    path, load = flat_copy() / FLAT, ort_gpu._load

    def replaced(*arguments):
        session = load(*arguments)
        path.write_bytes(path.read_bytes())
        return session

    monkeypatch.setattr(ort_gpu, "_load", replaced)
    with pytest.raises(BundleError, match=r"model\.flat\.onnx: was replaced while it was loaded"):
        Predictor(path.parent, backend="ort-cuda")


def test_a_batch_that_does_not_fit_runs_in_halves(gpu, flat_copy, photo, monkeypatch):
    with Predictor(flat_copy(), backend="ort-cuda", device="cuda") as predictor:
        pairs = [(photo.rotate(i), "obama speaks") for i in range(4)]
        expected, session = predictor.predict_batch(pairs), predictor._backend._network
        run, errors = (
            session.run_with_iobinding,
            [RuntimeError("Failed to allocate memory for requested buffer")],
        )
        monkeypatch.setattr(
            session,
            "run_with_iobinding",
            lambda binding: fail(errors) if errors else run(binding),
            raising=False,
        )
        assert predictor.predict_batch(pairs) == expected
    assert gpu.log.count("run") == 3


def fail(errors):
    raise errors.pop()
