"""The torch backend: the answers of ONNX Runtime, of the published networks, and the same in any bucket."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import differing, draw_feeds, in_threads

from engine import Bundle, Predictor, backends
from engine.backends import graphs
from engine.backends import torch as torch_backend
from engine.errors import BackendError, BundleError
from engine.manifest import manifest_digest
from export.graph.parity import FP16

# Float32 rounding, of answers around 1 and of the map's scores, which no softmax has bounded.
EXACT, EXACT_MAP = 1e-5, 2e-5
CPU = torch.device("cpu")
CASES = [(1, 2), (3, 17), (4, 50)]


@pytest.fixture(autouse=True)
def own_threads():
    """What a test does to torch's number of threads stays in it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check_same(got, want, bound=EXACT, map_bound=EXACT_MAP):
    """Same names, shapes and float32 values, up to rounding."""
    assert got.keys() == want.keys()
    for name, array in got.items():
        assert array.shape == want[name].shape
        assert array.dtype == np.float32
        assert np.abs(array - want[name]).max() <= (map_bound if name == "attention_map" else bound), name


def check_near(got, want):
    """As far apart as an export allows its half precision to be."""
    assert got.keys() == want.keys()
    for name, array in got.items():
        assert array.dtype == np.float32
        ratio = np.sqrt(np.square(array - want[name]).mean() / np.square(want[name]).mean())
        assert ratio <= FP16.value, name


@pytest.fixture(scope="module")
def loaded(bundle):
    """A backend of a tiny bundle, by network, precision and backend."""

    @functools.cache
    def load(name, precision="fp32", backend="torch"):
        return backends.create(backend, Bundle.open(bundle(name, precision).path), "cpu", 1)

    return load


@pytest.fixture
def copied(bundle, tmp_path):
    """A tiny bundle that the test may damage."""
    return Path(shutil.copytree(bundle("hammer", "fp32").path, tmp_path / "bundle"))


def rewrite_manifest(path, **changes):
    """Enter the files as they are, and these fields, into the manifest."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    del manifest["sha256"]
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))


def test_it_is_available_after_onnx_runtime():
    assert [name for name in backends.available() if name != "openvino"] == ["ort", "torch"]


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_it_says_what_it_is(bundle, device):
    backend = backends.create("torch", Bundle.open(bundle("hammer", "fp32").path), device, 1)
    gpu = device == "auto" and torch.cuda.is_available()
    expected = f"cuda:{torch.cuda.current_device()}" if gpu else "cpu"
    assert (backend.name, backend.device, backend.asynchronous) == ("torch", expected, gpu)


@pytest.mark.parametrize("shape", CASES)
def test_answers_are_onnx_runtimes(name, shape, loaded):
    inputs = draw_feeds(*shape)
    check_same(loaded(name).run(inputs), loaded(name, backend="ort").run(inputs))


def test_half_precision_is_near_onnx_runtimes(name, loaded):
    """The arithmetic here is float32, the weights are half's."""
    inputs = draw_feeds(4, 24)
    check_near(loaded(name, "fp16").run(inputs), loaded(name, "fp16", "ort").run(inputs))


def test_half_precision_bundles_run_in_float32_on_a_cpu(bundle):
    model = torch_backend.load_network(Bundle.open(bundle("cals", "fp16").path), CPU)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.base
def test_outputs_are_the_published_ones(base, outputs_apart, manifest_template, write_manifest, tmp_path):
    """Through a bundle of the base network that holds nothing but its weights."""
    safetensors.torch.save_file(base.model.state_dict(), tmp_path / "model.safetensors")
    manifest = manifest_template()
    manifest["model"] = {"name": base.name, "size": "base", "config": base.model.config.to_dict()}
    if base.name != "asap":
        manifest["outputs"] = manifest["outputs"][:4]
    write_manifest(tmp_path, manifest)
    backend = backends.create("torch", Bundle.open(tmp_path), "cpu", backends.usable_cores())
    worst = outputs_apart(backend.run(base.golden.inputs), base.golden)
    (tmp_path / "model.safetensors").unlink()  # a gigabyte
    assert max(worst.values()) <= 2e-5, worst


def test_threads_agree_bit_for_bit(loaded):
    cases = [draw_feeds(1, 5, seed) for seed in range(3)]
    assert differing(loaded("asap").run, cases, threads=4, turns=2) == []


def test_a_run_has_the_threads_given_and_the_process_its_own(loaded, monkeypatch):
    network, seen = graphs.outputs_of, []
    monkeypatch.setattr(graphs, "outputs_of", lambda *x: seen.append(torch.get_num_threads()) or network(*x))
    torch.set_num_threads(2)
    loaded("hammer").run(draw_feeds(1, 4))
    in_threads(lambda: loaded("hammer").run(draw_feeds(1, 4)), 4)
    assert seen == [1] * 5
    assert torch.get_num_threads() == 2


def test_a_hosts_precision_does_not_reach_the_network(loaded, monkeypatch):
    """Neither autocast, which torch keeps by thread, nor what it keeps for the process."""
    backend, inputs = loaded("asap"), draw_feeds(2, 9)
    want, seen = backend.run(inputs), []
    network = graphs.outputs_of
    matmul = torch.backends.mkldnn.matmul
    monkeypatch.setattr(graphs, "outputs_of", lambda *x: seen.append(matmul.fp32_precision) or network(*x))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            got = backend.run(inputs)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee"]
    check_same(got, want, 0, 0)


def test_predictor_serves_it(name, bundle):
    picture = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    caption = "A man speaks in front of the flag"
    scores = []
    for backend in ("torch", "ort"):
        with Predictor(bundle(name, "fp32").path, backend=backend, threads=1) as predictor:
            answer = predictor.predict(picture, caption)
            assert answer.model["backend"] == backend
            assert (answer.heatmap is not None) == (name == "asap")
            scores.append([answer.score, *answer.types.values(), *(word.score for word in answer.words)])
    assert np.abs(np.subtract(*scores)).max() <= EXACT


def test_read_only_inputs_are_read(loaded, recwarn):
    inputs = draw_feeds(1, 4)
    want = loaded("hammer").run(inputs)
    for array in inputs.values():
        array.setflags(write=False)
    check_same(loaded("hammer").run(inputs), want, 0, 0)
    assert not recwarn.list


def test_a_closed_backend_refuses(bundle):
    backend = backends.create("torch", Bundle.open(bundle("hammer", "fp32").path), "cpu", 1)
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="the backend was closed; create another Predictor"):
        backend.run(draw_feeds(1, 4))


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:0", "cuda:-1", "mps", ""])
def test_unknown_devices_are_refused(bundle, device):
    with pytest.raises(
        BackendError, match=f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got '{device}'"
    ):
        Predictor(bundle("hammer", "fp32").path, backend="torch", device=device)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(bundle, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        BackendError, match=f"device '{device}': torch .* finds no NVIDIA GPU; use device 'cpu'"
    ):
        Predictor(bundle("hammer", "fp32").path, backend="torch", device=device)


def test_a_gpu_beyond_the_last(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch_backend.jit, "triton", object())
    assert torch_backend.find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(BackendError, match="device 'cuda:2': expected cuda:0 to cuda:1"):
        torch_backend.find_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert torch_backend.find_device("auto") == torch_backend.find_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setattr(torch_backend.jit, "triton", None)
    assert torch_backend.find_device("auto") == CPU
    with pytest.raises(BackendError, match="device 'cuda:1' needs Triton, which is not installed"):
        torch_backend.find_device("cuda:1")


def test_int8_bundles_are_for_onnx_runtime(copied):
    rewrite_manifest(copied, precision="int8")
    with pytest.raises(
        BackendError, match="runs bundles in fp32, fp16, bf16, fp8, got int8; use the backend 'ort' on"
    ):
        Predictor(copied, backend="torch")


def test_altered_weights_are_found_before_they_are_parsed(copied):
    path = copied / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.safetensors: expected SHA-256"):
        Predictor(copied, backend="torch")


@pytest.mark.parametrize("damage", [lambda x: x[:-7], lambda x: b"", lambda x: b"\xff" * 64, lambda x: x[8:]])
def test_weights_that_are_no_safetensors(copied, damage):
    path = copied / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    rewrite_manifest(copied)
    with pytest.raises(BundleError, match=r"model\.safetensors: cannot be read as safetensors: .*export"):
        Predictor(copied, backend="torch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("itm_head.0.bias"), r"expected the tensor 'itm_head\.0\.bias'"),
        (lambda x: x.update(queue=torch.zeros(3)), "1 tensors are none of hammer's, the first is 'queue'"),
        (
            lambda x: x.update({"cls_head.6.bias": torch.zeros(9)}),
            r"(?s)do not fit.*branch\.cls_head\.6\.bias",
        ),
    ],
)
def test_weights_of_another_network(copied, change, message):
    path = copied / "model.safetensors"
    state = safetensors.torch.load_file(path)
    change(state)
    safetensors.torch.save_file({k: v.clone() for k, v in state.items()}, path)
    rewrite_manifest(copied)
    with pytest.raises(BundleError, match=message):
        Predictor(copied, backend="torch")


def test_a_bundle_without_weights(copied):
    (copied / "model.safetensors").unlink()
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["files"]["model.safetensors"]
    rewrite_manifest(copied, files=manifest["files"])
    with pytest.raises(
        BackendError, match=r"needs model\.safetensors; this fp32 bundle does not contain it; use 'ort' or"
    ):
        Predictor(copied, backend="torch")


def test_a_manifest_of_other_outputs(copied, bundle):
    rewrite_manifest(copied, outputs=bundle("asap", "fp32").manifest["outputs"])
    with pytest.raises(BundleError, match=r"outputs: expected \['logits_real_fake', .*'attention_map'\]"):
        Predictor(copied, backend="torch")


@pytest.mark.parametrize("ids", [2048, -1])
def test_ids_outside_the_vocabulary(loaded, ids):
    inputs = draw_feeds(1, 4)
    inputs["input_ids"][0, 1] = ids
    with pytest.raises(BackendError, match="input_ids: expected 0 to 2047, the vocabulary, got"):
        loaded("hammer").run(inputs)


def test_inputs_of_another_shape(loaded):
    with pytest.raises(
        BackendError, match=r"image: expected float32 of shape .*got float32 of shape \[1, 3, 8\]"
    ):
        loaded("hammer").run(draw_feeds(1, 4) | {"image": np.zeros((1, 3, 8), np.float32)})


def test_a_failing_run_is_a_backend_error(bundle, monkeypatch):
    backend = backends.create("torch", Bundle.open(bundle("hammer", "fp32").path), "cpu", 1)

    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(graphs, "outputs_of", fail)
    with pytest.raises(BackendError, match=r"torch failed on inputs of shape .*\[1, 4\].*: no room"):
        backend.run(draw_feeds(1, 4))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_captured_graphs_answer_as_the_cpu(name, precision, bundle, loaded):
    """Replayed with other inputs than they were captured with, in buckets of their own and together."""
    backend = backends.create("torch", Bundle.open(bundle(name, precision).path), "cuda", 1)
    assert backend.device.startswith("cuda:")
    for seed, shape in enumerate([*CASES, *CASES]):
        inputs = draw_feeds(*shape, seed)
        got, want = backend.run(inputs), loaded(name, precision).run(inputs)
        if precision == "fp32":
            check_same(got, want, 1e-4, 1e-4)
        else:
            check_near(got, want)


@needs_gpu
@pytest.mark.parametrize("interface", ["older", "newer"])
def test_captured_graphs_are_exact_whatever_the_host_set(name, bundle, interface):
    """TF32 has 10 bits of a factor where float32 has 23."""
    want = backends.create("torch", Bundle.open(bundle(name, "fp32").path), "cuda", 1).run(draw_feeds(4, 50))
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision
    try:
        if interface == "older":
            torch.set_float32_matmul_precision("high")
        else:
            torch.backends.cudnn.conv.fp32_precision = "ieee"
        got = backends.create("torch", Bundle.open(bundle(name, "fp32").path), "cuda", 1).run(
            draw_feeds(4, 50)
        )
    finally:
        torch.backends.cudnn.conv.fp32_precision = conv
        torch.set_float32_matmul_precision(matmul)
    check_same(got, want)


@needs_gpu
def test_batches_on_a_gpu_run_beside_each_other(name, bundle, network_input):
    """Decoded pictures, three batches started before the first is waited for, in any order of the buckets."""
    backend = backends.create("auto", Bundle.open(bundle(name, "fp32").path), "cuda", 1)
    random, cases, wanted = np.random.default_rng(3), [], []
    for seed, (batch, tokens) in enumerate([(4, 50), (1, 9), (4, 40)]):
        shapes = random.integers(20, 600, (batch, 2))
        pictures = [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
        text = draw_feeds(batch, tokens, seed)
        text["image"] = np.stack([network_input(x) for x in pictures])
        wanted.append(backend.run(text))
        del text["image"]
        cases.append((pictures, text))
    for order in ([0, 1, 2], [2, 0, 1], [1, 0, 2]):
        runs = [(index, backend.submit(*cases[index])) for index in order]
        for index, run in runs:
            check_same(run.result(), wanted[index], 0, 0)


@needs_gpu
def test_captured_graphs_agree_in_threads(name, bundle):
    backend = backends.create("torch", Bundle.open(bundle(name, "fp16").path), "cuda", 1)
    cases = [draw_feeds(1, 5), draw_feeds(1, 9, seed=1), draw_feeds(2, 20, seed=2)]
    assert differing(backend.run, cases, threads=4, turns=10) == []


def test_a_calibrated_bundle_without_its_scales(bundle, tmp_path):
    path = Path(shutil.copytree(bundle("hammer", "fp8").path, tmp_path / "bundle"))
    calibration = {"method": "minmax", "pairs": 8, "source": "drawn", "seed": 1}
    rewrite_manifest(path, calibration=calibration)
    with pytest.raises(BundleError, match=r"was calibrated but has no scales\.json; export it again"):
        Predictor(path, device="cpu")


@pytest.mark.parametrize("wrong", [{"device": 0}, {"device": None}, {"threads": True}, {"threads": 0}])
def test_devices_and_threads_that_are_none(copied, wrong):
    with pytest.raises(BackendError, match=r"device: expected 'auto'|expected 1 to \d+ threads"):
        Predictor(copied, **wrong)
