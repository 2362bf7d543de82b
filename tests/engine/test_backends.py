from __future__ import annotations

import ctypes
import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from helpers import differing

from engine import Bundle, Predictor, backends
from engine.backends import base, ort
from engine.backends import torch as torch_backend
from engine.backends.cores import visible_cores
from engine.errors import BackendError, BundleError, InputError


def feeds(batch: int, tokens: int) -> dict[str, np.ndarray]:
    return {
        "image": np.zeros((batch, 3, 256, 256), np.float32),
        "input_ids": np.ones((batch, tokens), np.int64),
        "attention_mask": np.ones((batch, tokens), np.int64),
    }


def test_onnx_runtime_is_available():
    assert "ort" in backends.available()


@pytest.mark.parametrize(("name", "device"), [("auto", "auto"), ("ort", "auto"), ("ort", "cpu")])
def test_a_backend_runs_any_batch(bundle_dir, name, device):
    backend = backends.create(name, Bundle.open(bundle_dir), device, threads=1)
    assert (backend.name, backend.device) == ("ort", "cpu")
    for batch, tokens in [(1, 2), (3, 7), (4, 127)]:
        outputs = backend.run(feeds(batch, tokens))
        assert outputs["logits_tok"].shape == (batch, tokens - 1, 2)
        assert outputs["attention_map"].shape == (batch, tokens, 257)
    backend.close()
    with pytest.raises(BackendError, match="was closed"):
        backend.run(feeds(1, 2))


def test_unknown_names_are_answered_with_the_known_ones(bundle_dir):
    with pytest.raises(BackendError, match="unknown backend 'tensorflow'; known are auto, .*ort"):
        Predictor(bundle_dir, backend="tensorflow")


def test_devices_that_it_lacks_are_refused(bundle_dir):
    with pytest.raises(BackendError, match="device 'cpu' .* got 'cuda'"):
        Predictor(bundle_dir, backend="ort", device="cuda")


@pytest.fixture
def machine(bundle_dir, monkeypatch):
    """Ask for "auto" on a machine with a driver and a GPU, or without; the backend that would be loaded."""

    def ask(device, driver=True, gpu=True, precision="fp16", weights=True):
        files = {"model.onnx": None} | ({"model.safetensors": None} if weights else {})
        manifest = Bundle.open(bundle_dir).manifest
        found = SimpleNamespace(manifest=dataclasses.replace(manifest, precision=precision, files=files))
        monkeypatch.setattr(backends, "_has_driver", lambda: driver)
        monkeypatch.setattr(
            torch_backend, "find_device", lambda _: SimpleNamespace(type="cuda" if gpu else "cpu")
        )
        monkeypatch.setattr(torch_backend, "create", lambda *_: SimpleNamespace(name="torch"))
        monkeypatch.setattr(ort, "create", lambda *_: SimpleNamespace(name="ort"))
        return backends.create("auto", found, device, 1).name

    return ask


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        ("auto", {}, "torch"),
        ("auto", {"driver": False}, "ort"),
        ("auto", {"gpu": False}, "ort"),
        ("auto", {"precision": "int8"}, "ort"),
        ("auto", {"weights": False}, "ort"),
        ("cuda", {}, "torch"),
        ("cuda", {"precision": "int8"}, "torch"),
        ("cpu", {}, "ort"),
    ],
)
def test_auto_is_torch_on_a_gpu(machine, device, options, expected):
    assert machine(device, **options) == expected


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize("options", [{}, {"precision": "int8", "weights": False}])
def test_a_gpu_that_is_not_here(machine, device, options):
    expected = f"^device '{device}': no CUDA GPU is here, as no NVIDIA driver is installed; use device 'cpu'"
    with pytest.raises(BackendError, match=expected):
        machine(device, driver=False, gpu=False, **options)


def test_a_bundle_that_nothing_serves_on_the_gpu(machine, monkeypatch):
    monkeypatch.setattr(backends, "open_gpu", lambda index: None)
    with pytest.raises(BackendError, match="^device 'cuda': no installed backend serves this int8 bundle on"):
        machine("cuda", precision="int8", weights=False)


def test_a_gpu_that_is_asked_for_needs_torch(machine, monkeypatch):
    monkeypatch.setattr(backends, "available", lambda: ["ort"])
    with pytest.raises(BackendError, match="the backend 'torch' needs torch and safetensors, which are not"):
        machine("cuda")


def test_the_driver_is_looked_for_without_a_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", asked.append)
    assert backends._has_driver()
    assert len(asked) == 1
    monkeypatch.setattr(ctypes, "CDLL", lambda name: ctypes.PyDLL("lib-that-is-nowhere.so"))
    assert not backends._has_driver()


def test_no_library(bundle_dir, monkeypatch):
    monkeypatch.setattr(backends, "available", list)
    with pytest.raises(BackendError, match="no backend is installed that serves this bundle; .*onnxruntime"):
        Predictor(bundle_dir)
    with pytest.raises(BackendError, match="needs onnxruntime, which is not installed"):
        Predictor(bundle_dir, backend="ort")


def test_a_library_beside_torch_is_named(bundle_dir, libraries):
    libraries(safetensors=False)
    assert [name for name in backends.available() if name != "openvino"] == ["ort"]
    with pytest.raises(BackendError, match="the backend 'torch' needs safetensors, which is not installed"):
        Predictor(bundle_dir, backend="torch")


def test_threads_must_be_positive(bundle_dir):
    for threads in (0, visible_cores() + 1, 99_999, True, 1.0):
        with pytest.raises(BackendError, match=r"expected 1 to \d+ threads .* got"):
            Predictor(bundle_dir, threads=threads)
    Predictor(bundle_dir, threads=np.int64(1)).close()


@pytest.mark.parametrize("backend", ["auto", "ort", "torch"])
@pytest.mark.parametrize("device", ["tpu", "CUDA", "cuda:", 0, "x" * 5000])
def test_a_device_that_nobody_knows(bundle_dir, backend, device):
    with pytest.raises(
        BackendError, match="^device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got"
    ) as caught:
        Predictor(bundle_dir, backend=backend, device=device)
    assert len(str(caught.value)) < 200


def test_what_was_probably_meant(bundle_dir, libraries):
    with pytest.raises(BackendError, match="; did you mean cuda?"):
        Predictor(bundle_dir, device="cudaa")
    with pytest.raises(BackendError, match="; did you mean openvino?"):
        Predictor(bundle_dir, backend="openvion")
    with pytest.raises(InputError, match="; did you mean manipulated?"):
        Predictor(bundle_dir, thresholds={"manipulate": 0.5})
    libraries(torch=False, safetensors=False)
    with pytest.raises(BackendError, match="needs torch and safetensors, which are not installed"):
        Predictor(bundle_dir, backend="torch")


@pytest.mark.parametrize("backend", [None, ["ort"], "ort" * 1000])
def test_a_backend_that_nobody_knows(bundle_dir, backend):
    with pytest.raises(BackendError, match="^unknown backend .*; known are auto") as caught:
        Predictor(bundle_dir, backend=backend)
    assert len(str(caught.value)) < 300


def test_weights_beside_the_model_are_found_and_verified(
    network, bundle_copy, manifest_template, write_manifest
):
    onnx.save(
        onnx.ModelProto.FromString(network.SerializeToString()),
        bundle_copy / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=1000,
    )
    write_manifest(bundle_copy, manifest_template())
    with Predictor(bundle_copy, threads=1) as predictor:
        predictor.warm_up()
    path = bundle_copy / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[-1] ^= 128
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx\.data: expected SHA-256"):
        Predictor(bundle_copy)


def test_damaged_models_raise_only_bundle_errors(
    network, bundle_copy, manifest_template, write_manifest, capfd
):
    whole = network.SerializeToString()
    generator = np.random.default_rng(11)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(4):
            data[generator.integers(len(data))] = generator.integers(256)
        (bundle_copy / "model.onnx").write_bytes(data)
        write_manifest(bundle_copy, manifest_template())
        try:
            backends.create("ort", Bundle.open(bundle_copy), "cpu", 1).close()
        except BundleError:
            refused += 1
    assert refused > 50
    assert capfd.readouterr().out == ""


def test_a_model_of_other_names_is_refused(network, bundle_copy, manifest_template, write_manifest):
    manifest = manifest_template()
    manifest["outputs"] = manifest["outputs"][:4]
    write_manifest(bundle_copy, manifest)
    with pytest.raises(BundleError, match="expected the outputs .* got .*attention_map"):
        Predictor(bundle_copy)


def test_a_failing_run_is_a_backend_error(bundle_dir, monkeypatch):
    backend = backends.create("ort", Bundle.open(bundle_dir), "cpu", 1)
    wrong = feeds(1, 4) | {"image": np.zeros((1, 3, 8), np.float32)}
    with pytest.raises(BackendError, match=r"image: expected float32 of shape .* of shape \[1, 3, 8\]"):
        backend.run(wrong)
    monkeypatch.setattr(base, "measure", lambda *_: {"batch": 1, "tokens": 4})
    with pytest.raises(BackendError, match=r"ONNX Runtime failed on inputs of shape .*\[1, 3, 8\]"):
        backend.run(wrong)


def test_threads_agree_bit_for_bit(bundle_dir):
    backend = backends.create("ort", Bundle.open(bundle_dir), "cpu", 1)
    generator = np.random.default_rng(2)
    cases = [feeds(1, 5) | {"image": generator.random((1, 3, 256, 256), np.float32)} for _ in range(4)]
    assert differing(backend.run, cases, threads=8, turns=20) == []


def test_a_cpu_backend_has_run_when_it_is_submitted(bundle_dir, photo, network_input):
    """The outputs are those of `run` on the same images."""
    backend = backends.create("ort", Bundle.open(bundle_dir), "cpu", 1)
    assert not (backend.asynchronous or backend.resizes)
    text = {name: array for name, array in feeds(2, 5).items() if name != "image"}
    images = [network_input(photo), network_input(np.zeros((256, 256, 3), np.uint8))]
    submitted = backend.submit(images, text)
    backend.close()
    outputs = submitted.result()
    wanted = backends.create("ort", Bundle.open(bundle_dir), "cpu", 1).run(
        {"image": np.stack(images), **text}
    )
    assert all(np.array_equal(outputs[name], wanted[name]) for name in wanted)
    with pytest.raises(BackendError, match="was closed"):
        backend.submit(images, text)


@pytest.mark.parametrize("name", ["ort", "torch"])
def test_what_is_loaded_is_what_was_hashed(bundle, name, monkeypatch, tmp_path):
    """Files that are replaced as soon as they were read: the bytes in memory count."""
    path = Path(shutil.copytree(bundle("hammer", "fp32").path, tmp_path / "bundle"))
    wanted = backends.create(name, Bundle.open(path), "cpu", 1).run(feeds(1, 4))
    read = Bundle.read

    def replaced(bundle, file):
        content = read(bundle, file)
        (path / file).write_bytes(b"another")
        return content

    monkeypatch.setattr(Bundle, "read", replaced)
    with Predictor(path, backend=name, device="cpu", threads=1) as predictor:
        outputs = predictor._backend.run(feeds(1, 4))
        assert predictor.predict(np.zeros((9, 9, 3), np.uint8), "a man").score >= 0
    assert all(np.array_equal(outputs[key], wanted[key]) for key in wanted)
