"""The OpenVINO backend: the answers of ONNX Runtime, from several threads, and its own errors."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from helpers import differing, draw_feeds

from engine import Bundle, Predictor, backends
from engine.backends import base
from engine.errors import BackendError, BundleError
from export.graph.parity import FP16, INT8
from export.graph.rewrite import rewrite
from export.graph.trace import export_onnx, flatten
from export.quantization.calibrate import calibrate
from export.quantization.qdq import int8_layers, to_int8

pytest.importorskip("openvino")

from engine.backends import openvino as openvino_backend  # noqa: E402

FLAT = "model.flat.onnx"
EXACT = 2e-5  # float32 rounding, of answers around 1 and of the map's unbounded scores
CASES = [(1, 2), (3, 17), (4, 50)]


feeds = functools.partial(draw_feeds, vocabulary=100)


def relative(got, want):
    return float(np.sqrt(np.square(got - want).mean() / np.square(want).mean()))


@pytest.fixture
def flat_copy(bundle_copy, manifest_template, write_manifest):
    """The network by hand, in a bundle that OpenVINO takes and that the test may damage."""
    shutil.copyfile(bundle_copy / "model.onnx", bundle_copy / FLAT)
    write_manifest(bundle_copy, manifest_template())
    return bundle_copy


@pytest.fixture(scope="module")
def loaded(bundle):
    """A backend of a tiny exported bundle, by network, precision and backend."""

    @functools.cache
    def load(name, precision, backend):
        return backends.create(backend, Bundle.open(bundle(name, precision).path), "cpu", 1)

    return load


@pytest.fixture
def calibrated(bundle, tiny, tmp_path, write_manifest):
    """The bundle of a tiny network in calibrated int8."""
    source = bundle("cals", "fp32").path
    path = tmp_path / "bundle"
    path.mkdir()
    shutil.copyfile(source / "tokenizer.json", path / "tokenizer.json")
    model = rewrite(tiny("cals"))
    batches = [{k: torch.from_numpy(v) for k, v in feeds(4, 17, seed).items()} for seed in range(2)]
    scales = calibrate(model, int8_layers(model), batches, torch.int8)
    export_onnx(to_int8(model, scales), path / "model.onnx")
    flatten(path / "model.onnx", path / FLAT)
    manifest = json.loads((source / "manifest.json").read_text()) | {"precision": "int8", "files": {}}
    del manifest["sha256"]
    write_manifest(path, manifest)
    return path


@pytest.mark.parametrize(("batch", "tokens"), CASES)
def test_answers_are_those_of_onnx_runtime(loaded, name, batch, tokens):
    inputs = feeds(batch, tokens)
    got, want = (loaded(name, "fp32", backend).run(inputs) for backend in ("openvino", "ort"))
    assert got.keys() == want.keys()
    for key, array in got.items():
        assert (array.shape, array.dtype) == (want[key].shape, np.float32)
        assert np.abs(array - want[key]).max() <= EXACT, key


def test_half_weights_are_near_float32(loaded, name):
    inputs = feeds(3, 17)
    got, want = loaded(name, "fp16", "openvino").run(inputs), loaded(name, "fp32", "ort").run(inputs)
    assert max(relative(got[key], want[key]) for key in want) <= FP16.value


def test_calibrated_int8_is_near_float32(loaded, calibrated):
    backend = backends.create("openvino", Bundle.open(calibrated), "cpu", 1)
    inputs = feeds(4, 17)
    got, want = backend.run(inputs), loaded("cals", "fp32", "ort").run(inputs)
    ratios = [relative(got[key], want[key]) for key in want]
    assert max(ratios) <= INT8.value
    assert max(ratios) > 1e-3, "is not rounded at all"


def test_float32_stays_float32(flat_copy):
    """On a CPU with bfloat16 OpenVINO's own choice would be that."""
    backend = backends.create("openvino", Bundle.open(flat_copy), "cpu", 1)
    assert backend._network.model.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert backend._network.model.get_property("INFERENCE_NUM_THREADS") == 1


def test_auto_leaves_it_alone(bundle):
    with Predictor(bundle("asap", "fp32").path, device="cpu", threads=1) as predictor:
        assert predictor.model["backend"] == "ort"


def test_dynamic_int8_is_refused_with_what_to_do(bundle):
    with pytest.raises(
        BackendError, match=r"needs model\.flat\.onnx; this int8 bundle does not contain it; use 'ort'"
    ):
        Predictor(bundle("asap", "int8").path, backend="openvino")


def test_answers_by_hand(flat_copy, expected_outputs):
    backend = backends.create("openvino", Bundle.open(flat_copy), "auto", 1)
    assert (backend.name, backend.device) == ("openvino", "cpu")
    inputs = feeds(3, 7)
    got = backend.run(inputs)
    for i in range(3):
        for key, want in expected_outputs(inputs["image"][i], inputs["input_ids"][i]).items():
            np.testing.assert_allclose(got[key][i], want, atol=1e-5)


def test_a_graph_that_is_replaced_while_it_is_loaded_is_refused(flat_copy, monkeypatch):
    load = openvino_backend.load_model

    def replaced(path, threads):
        model = load(path, threads)
        path.write_bytes(path.read_bytes())
        return model

    monkeypatch.setattr(openvino_backend, "load_model", replaced)
    with pytest.raises(BundleError, match=r"model\.flat\.onnx: was replaced while it was loaded"):
        Predictor(flat_copy, backend="openvino")


def test_answers_are_the_callers_own(flat_copy):
    """A later call must not write into an earlier answer, nor may the caller's arrays be kept in use."""
    backend = backends.create("openvino", Bundle.open(flat_copy), "cpu", 1)
    inputs = feeds(2, 7)
    first = backend.run(inputs)
    kept = {key: array.copy() for key, array in first.items()}
    second = backend.run(feeds(2, 7, seed=1))
    assert all(np.array_equal(first[key], kept[key]) for key in kept)
    assert not np.array_equal(first["box"], second["box"])
    inputs["image"] += 1
    third = backend.run(inputs)
    assert not np.array_equal(first["box"], third["box"])


def test_threads_agree_bit_for_bit(loaded):
    backend = loaded("asap", "fp32", "openvino")
    cases = [feeds(batch, tokens, seed=batch) for batch, tokens in CASES]
    assert differing(backend.run, cases, threads=4, turns=3) == []
    assert 1 <= len(backend._network.idle) <= 4, "requests are used again"


@pytest.mark.parametrize(
    "change",
    [
        {"image": np.zeros((1, 3, 8), np.float32)},
        {"image": np.zeros((1, 3, 128, 128), np.float32)},
        {"stranger": np.zeros(1, np.float32)},
        {"input_ids": np.zeros((1, 9), np.int64)},
    ],
)
def test_a_failing_run_is_a_backend_error_and_the_next_one_works(flat_copy, change):
    backend = backends.create("openvino", Bundle.open(flat_copy), "cpu", 1)
    want = backend.run(feeds(1, 4))
    with pytest.raises(BackendError, match="expected"):
        backend.run(feeds(1, 4) | change)
    got = backend.run(feeds(1, 4))
    assert all(np.array_equal(got[key], want[key]) for key in want)


def test_a_request_that_failed_is_not_used_again(flat_copy, monkeypatch):
    backend = backends.create("openvino", Bundle.open(flat_copy), "cpu", 1)
    monkeypatch.setattr(base, "measure", lambda *_: {"batch": 1, "tokens": 4})
    want = backend.run(feeds(1, 4))
    with pytest.raises(BackendError, match=r"OpenVINO failed on inputs of shape .*\[1, 3, 8\]"):
        backend.run(feeds(1, 4) | {"image": np.zeros((1, 3, 8), np.float32)})
    assert backend._network.idle == []
    got = backend.run(feeds(1, 4))
    assert all(np.array_equal(got[key], want[key]) for key in want)


def test_ids_outside_the_vocabulary(loaded):
    inputs = feeds(1, 4)
    inputs["input_ids"][:] = 10**6
    with pytest.raises(BackendError, match=r"input_ids: expected 0 to \d+, the vocabulary, got 1000000"):
        loaded("asap", "fp32", "openvino").run(inputs)


def test_closed(flat_copy):
    backend = backends.create("openvino", Bundle.open(flat_copy), "cpu", 1)
    backend.run(feeds(1, 2))
    backend.close()
    with pytest.raises(BackendError, match="was closed"):
        backend.run(feeds(1, 2))


DROPPED = """
import os, signal, sys
from pathlib import Path
from engine.backends.openvino import load_model

signal.signal(signal.SIGUSR1, lambda *_: print("answered"))
first, second = (load_model(Path(sys.argv[1]), 1) for _ in range(2))
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_after_models_were_dropped(flat_copy):
    """With a Core for each model the second one to go left the thread a signal stack in unmapped memory."""
    command = [sys.executable, "-c", DROPPED, str(flat_copy / FLAT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "answered\n"), done.stderr


def test_a_device_that_it_lacks_is_refused(flat_copy):
    with pytest.raises(BackendError, match="device 'cpu' .* got 'cuda'"):
        Predictor(flat_copy, backend="openvino", device="cuda")


def test_damaged_graphs_raise_only_bundle_errors(
    network, flat_copy, manifest_template, write_manifest, capfd
):
    whole = network.SerializeToString()
    generator = np.random.default_rng(11)
    refused = 0
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(4):
            data[generator.integers(len(data))] = generator.integers(256)
        (flat_copy / FLAT).write_bytes(data)
        write_manifest(flat_copy, manifest_template())
        try:
            backends.create("openvino", Bundle.open(flat_copy), "cpu", 1).close()
        except BundleError:
            refused += 1
    assert refused > 30
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("file", [FLAT, "model.onnx.data"])
def test_altered_files_are_found_before_they_are_read(bundle, tmp_path, file):
    copy = shutil.copytree(bundle("asap", "fp32").path, tmp_path / "bundle")
    data = bytearray((copy / file).read_bytes())
    data[-1] ^= 128
    (copy / file).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{file}: expected SHA-256"):
        Predictor(copy, backend="openvino")


def test_a_graph_of_other_names_is_refused(network, flat_copy, manifest_template, write_manifest):
    other = onnx.ModelProto.FromString(network.SerializeToString())
    for node in other.graph.node:
        node.output[:] = ["bbox" if name == "box" else name for name in node.output]
    other.graph.output[2].name = "bbox"
    (flat_copy / FLAT).write_bytes(other.SerializeToString())
    write_manifest(flat_copy, manifest_template())
    with pytest.raises(BundleError, match="expected the outputs .*'box'.* got .*'bbox'"):
        Predictor(flat_copy, backend="openvino")
