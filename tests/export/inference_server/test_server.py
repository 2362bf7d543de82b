"""Repositories on a genuine Triton Inference Server, driven by its own clients over HTTP and gRPC.

Without a server these tests are skipped; `.ci/run` installs one. See benchmarks/tritonserver.py.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import time

import numpy as np
import onnxruntime
import pytest

from benchmarks.tritonserver import INSTALL, VARIABLE, TritonServer, server_folder
from engine import Bundle, Prediction, Predictor
from engine.registry.config import TYPES
from export.inference_server import network_client
from export.inference_server.config import ServerOptions
from export.inference_server.repository import write_repository

CAPTION = b"The defeat at the park brings pleasure to Laura Cook"
# Runs a network in the place of the server's ONNX Runtime, which the wheel does not have.
STAND_IN = """
import os, sys
from pathlib import Path
sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
import triton_python_backend_utils as triton
from engine.backends.ort import load_session

class TritonPythonModel:
    def initialize(self, args):
        self.session = load_session(Path(args["model_repository"], "1", "model.onnx"), 1)

    def execute(self, requests):
        return [self.run(request) for request in requests]

    def run(self, request):
        feeds = {x.name: triton.get_input_tensor_by_name(request, x.name) for x in self.session.get_inputs()}
        names = [x.name for x in self.session.get_outputs()]
        outputs = self.session.run(names, {name: tensor.as_numpy() for name, tensor in feeds.items()})
        return triton.InferenceResponse([triton.Tensor(*x) for x in zip(names, outputs)])
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start a server over these repositories that loads what it is told to."""
    folder = server_folder()
    if folder is None:
        pytest.skip(f"needs a Triton Inference Server: {INSTALL}, then {VARIABLE}=FOLDER")

    def make(*repositories, more=()):
        arguments = [f"--model-repository={place}" for place in repositories]
        arguments += ["--model-control-mode=explicit", *more]
        return TritonServer(folder, tmp_path_factory.mktemp("work"), *arguments)

    return make


@pytest.fixture(scope="module")
def repositories(start, bundle, with_engine, tmp_path_factory):
    """Folders by name: a Predictor of the shipped demo, an ensemble around a stand-in, two bare networks."""
    place = tmp_path_factory.mktemp("repositories")
    # A batch of 8 goes at once, a smaller one never: a test says what shares a batch.
    batched = ServerOptions(form="python", kind="cpu", preferred=(8,), queue_delay_us=60_000_000)
    write_repository({"batched": Bundle.open("demo:asap")}, place / "batched", batched)
    write_repository({"demo": Bundle.open("demo:asap")}, place / "demo", ServerOptions(form="python"))
    asap = Bundle.open(bundle("asap", "fp32").path)
    write_repository({"asap": asap}, place / "ensemble", ServerOptions(form="ensemble"))
    write_repository({"onnx": asap}, place / "onnx", ServerOptions(kind="cpu", threads=1))
    write_repository({"plan": with_engine("tensorrt")}, place / "plan", ServerOptions(plan=True))
    network = place / "ensemble" / "asap-network"
    config = (network / "config.pbtxt").read_text()
    runtime = 'platform: "onnxruntime_onnx"\ndefault_model_filename: "model.onnx"\n'
    assert config.count(runtime) == 1
    (network / "config.pbtxt").write_text(config.replace(runtime, 'backend: "python"\n'))
    (network / "1" / "model.py").write_text(STAND_IN)
    return place


@pytest.fixture(scope="module")
def server(start, repositories):
    """A server that has loaded the demo and the ensemble, and adds nothing to their configurations."""
    whole = ["--disable-auto-complete-config"]
    with start(*sorted(repositories.iterdir()), more=whole) as server, http(server) as client:
        for model in ("demo", "batched", "asap"):
            client.load_model(model)
        yield server


@pytest.fixture(scope="module")
def predictor(server):
    with Predictor("demo:asap", thumbnail=0) as predictor:
        yield predictor


def http(server):
    import tritonclient.http as triton

    return triton.InferenceServerClient(server.http, concurrency=16)


def grpc(server):
    import tritonclient.grpc as triton

    return triton.InferenceServerClient(server.grpc)


def tensors(client, **columns):
    """The inputs of a request by name, for a client of either protocol; None leaves one out."""
    import tritonclient.grpc
    import tritonclient.http

    package = tritonclient.http if "http" in type(client).__module__ else tritonclient.grpc
    types = {np.dtype(object): "BYTES", np.dtype(np.float32): "FP32", np.dtype(np.int64): "INT64"}
    inputs = []
    for name, values in columns.items():
        if values is None:
            continue
        array = values if isinstance(values, np.ndarray) else np.array([[x] for x in values], dtype=object)
        tensor = package.InferInput(name, list(array.shape), types[array.dtype])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def ask(client, model, image, caption):
    """The answer to one pair."""
    pair = {"image": None if image is None else [image], "caption": None if caption is None else [caption]}
    return client.infer(model, tensors(client, **pair))


def read(answer):
    return Prediction.from_json(answer.as_numpy("prediction")[0, 0])


def counts(client, model):
    """How many pairs, and how many batches of them, a model has run."""
    (model,) = client.get_inference_statistics(model)["model_stats"]
    return np.array([model["inference_count"], model["execution_count"]])


PAIRS = {
    "whole": (1, CAPTION),
    "no caption": (2, None),
    "no image": (None, CAPTION),
    "empty caption": (3, b""),
    "not UTF-8": (4, b"\xff\xfe caf\xc3\xa9"),
    "two scripts": (5, "Ελλάδα and 東京, one word: naïve".encode()),
}


@pytest.mark.parametrize("protocol", [http, grpc])
@pytest.mark.parametrize("case", PAIRS)
def test_an_answer_is_the_predictors(server, predictor, jpeg, protocol, case):
    seed, caption = PAIRS[case]
    image = None if seed is None else jpeg(seed)
    expected = predictor.predict(image, caption)
    with protocol(server) as client:
        answer = ask(client, "demo", image, caption)
    assert read(answer) == expected
    assert "demo_weights" in expected.warnings[0]
    maps = (read(answer).heatmap, expected.heatmap)
    assert maps == (None, None) if expected.heatmap is None else np.array_equal(*maps)
    score, types, box, spans, scores = (
        answer.as_numpy(name)[0].tolist() for name in ("score", "types", "box", "words", "word_scores")
    )
    assert score == pytest.approx([-1 if expected.score is None else expected.score])
    assert types == pytest.approx([-1 if x is None else x for x in (expected.types[kind] for kind in TYPES)])
    assert box == pytest.approx(expected.box or [-1] * 4)
    assert [expected.caption[start:end] for start, end in spans] == [word.text for word in expected.words]
    assert scores == pytest.approx([word.score for word in expected.words])


def test_requests_share_a_batch_and_a_broken_picture_fails_alone(server, predictor, jpeg):
    pictures = [jpeg(seed) for seed in range(8)]
    pictures[2], pictures[5] = b"", pictures[5][:200]
    with http(server) as client:
        before = counts(client, "batched")
        sent = [
            client.async_infer("batched", tensors(client, image=[picture], caption=[CAPTION]))
            for picture in pictures
        ]
        answers = []
        for request in sent:
            try:
                answers.append(read(request.get_result()))
            except Exception as error:
                answers.append((error.status(), error.message()))
        after = counts(client, "batched")
    assert answers[2] == ("400", "the pair: the file is empty")
    assert answers[5][0] == "400"
    assert answers[5][1].startswith("the pair: cannot be read as an image: ")
    expected = predictor.predict_batch(pictures, [CAPTION] * 8, on_error="return")
    for number in {0, 1, 3, 4, 6, 7}:
        agree(answers[number], expected[number])
    assert (after - before).tolist() == [8, 1]


def test_a_request_of_several_pairs(server, predictor, jpeg):
    captions, pictures = [CAPTION, b"Two words", b""], [jpeg(seed) for seed in range(3)]
    with grpc(server) as client:
        answer = client.infer("demo", tensors(client, image=pictures, caption=captions))
        with pytest.raises(Exception, match="pair 1: not an image of a supported format"):
            client.infer("demo", tensors(client, image=[pictures[0], b"text"], caption=captions[:2]))
    expected = predictor.predict_batch(pictures, captions)
    assert answer.as_numpy("score")[:, 0] == pytest.approx([x.score for x in expected], abs=1e-5)
    most = len(expected[0].words)
    assert answer.as_numpy("words").shape == (3, most, 2)
    assert answer.as_numpy("words")[1].tolist() == [[0, 3], [4, 9]] + [[-1, -1]] * (most - 2)
    assert (answer.as_numpy("word_scores")[2] == -1).all()


@pytest.mark.parametrize("protocol", [http, grpc])
def test_what_the_server_refuses(server, jpeg, protocol):
    with protocol(server) as client:
        for wrong, message in (
            ({}, "0 inputs"),
            ({"image": [jpeg(1)] * 33}, "inference request batch-size must be <= 32"),
            ({"image": np.array([jpeg(1)], object)}, "unexpected shape for input 'image'"),
            ({"image": np.empty((0, 1), object)}, "expected 1 string elements .*, got 0"),
            ({"image": np.zeros((1, 1), np.float32)}, "data-type"),
            ({"image": [jpeg(1)] * 2, "caption": [CAPTION]}, "batch"),
            ({"picture": [jpeg(1)]}, "picture"),
        ):
            with pytest.raises(Exception, match=message):
                client.infer("demo", tensors(client, **wrong))
        assert client.is_model_ready("demo")


def test_metrics_count(server, jpeg):
    def count():
        metrics = server.scrape()
        failed = 'dgm4_failed_requests{error="InputError",model="demo",version="1"}'
        return metrics['nv_inference_count{model="demo",version="1"}'], metrics.get(failed, 0)

    before = count()
    with http(server) as client:
        ask(client, "demo", jpeg(1), CAPTION)
        with pytest.raises(Exception, match="file is empty"):
            ask(client, "demo", b"", CAPTION)
    assert np.subtract(count(), before).tolist() == [2, 1]


def test_a_model_is_unloaded_and_loaded_with_another_bundle(server, repositories, asap, jpeg):
    with http(server) as client:
        client.unload_model("demo")
        while client.is_model_ready("demo"):
            time.sleep(0.05)
        with pytest.raises(Exception, match="demo"):
            ask(client, "demo", jpeg(1), CAPTION)
        for precision, bundle in (("fp32", asap), ("int8", Bundle.open("demo:asap"))):
            write_repository({"demo": bundle}, repositories / "demo", ServerOptions(form="python"))
            client.load_model("demo")
            assert read(ask(client, "demo", jpeg(1), CAPTION)).model["precision"] == precision


def test_an_altered_bundle_is_not_loaded_and_the_old_one_stays(server, repositories, jpeg):
    graph = repositories / "demo" / "demo" / "1" / "bundle" / "model.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    os.utime(repositories / "demo" / "demo" / "config.pbtxt")  # the server loads what has changed
    with http(server) as client:
        with pytest.raises(Exception, match="expected SHA-256 .* the file was altered"):
            client.load_model("demo")
        graph.write_bytes(content)
        assert read(ask(client, "demo", jpeg(1), CAPTION)).model["precision"] == "int8"


@pytest.mark.parametrize(("model", "backend"), [("onnx", "onnxruntime"), ("plan", "tensorrt")])
def test_the_configuration_of_a_bare_network_is_read(server, repositories, model, backend):
    """The server lacks the backend, and looks for it only once it has found the configuration right."""
    path = repositories / model / model / "config.pbtxt"
    right = path.read_text()
    with http(server) as client:
        for change in (
            lambda text: text,
            lambda text: text.replace("max_batch_size: 32", "max_batch_size: 33"),
        ):
            path.write_text(change(right))
            with pytest.raises(Exception, match=f"unable to find backend library for backend '{backend}'"):
                client.load_model(model)
        for wrong in (
            right + "no_such_field: 1\n",
            right.replace("KIND_CPU", "KIND_TPU").replace("KIND_GPU", "KIND_TPU"),
            right.replace("preferred_batch_size: [8, 32]", "preferred_batch_size: [8, 64]"),
            right.replace("TYPE_INT64", "TYPE_NONE"),
        ):
            assert wrong != right
            path.write_text(wrong)
            with pytest.raises(Exception, match="failed to poll|failed to load") as caught:
                client.load_model(model)
            assert "unable to find backend library" not in str(caught.value)


@pytest.mark.parametrize("protocol", [http, grpc])
@pytest.mark.parametrize("case", PAIRS)
def test_an_ensemble_answers_as_the_predictor(server, asap, jpeg, protocol, case):
    seed, caption = PAIRS[case]
    image = None if seed is None else jpeg(seed)
    with protocol(server) as client:
        answer = read(ask(client, "asap", image, caption))
    with Predictor(asap, backend="ort", thumbnail=0) as predictor:
        agree(answer, predictor.predict(image, caption))
    assert answer.model["backend"] == "tritonserver"
    assert answer.timing["total"] == pytest.approx(sum(x for n, x in answer.timing.items() if n != "total"))


def agree(answer, expected):
    """Equal but for the rounding of another shape of batch, the backend and the times."""
    assert answer.score == pytest.approx(expected.score, abs=1e-5)
    assert answer.types == pytest.approx(expected.types, abs=1e-5)
    assert answer.box == pytest.approx(expected.box, abs=1e-2)
    assert [(w.text, w.start, w.end) for w in answer.words] == [
        (w.text, w.start, w.end) for w in expected.words
    ]
    assert [w.score for w in answer.words] == pytest.approx([w.score for w in expected.words], abs=1e-5)
    assert (answer.heatmap is None) == (expected.heatmap is None)
    assert expected.heatmap is None or answer.heatmap == pytest.approx(expected.heatmap, abs=1e-5)
    same = ("caption", "size", "warnings", "thresholds", "detected", "manipulated")
    assert [getattr(answer, name) for name in same] == [getattr(expected, name) for name in same]


def test_both_ends_around_our_own_runtime(server, asap, jpeg):
    """The two models asked by themselves, a network of ours between them."""
    session = onnxruntime.InferenceSession(asap.path / "model.flat.onnx")
    pairs = {"image": [jpeg(1), jpeg(2)], "caption": [CAPTION, b"Two words"]}
    with grpc(server) as client:
        before = client.infer("asap-pre", tensors(client, **pairs))
        feeds = {name: before.as_numpy(name) for name in ("input_ids", "attention_mask")}
        assert feeds["input_ids"].shape == (2, 16)  # padded, for requests that share a batch
        names = [node.name for node in session.get_outputs()]
        outputs = session.run(names, {"image": before.as_numpy("pixels"), **feeds})
        rest = {"picture": before.as_numpy("picture"), "caption": pairs["caption"]}
        after = client.infer("asap-post", tensors(client, **dict(zip(names, outputs, strict=True)), **rest))
    with Predictor(asap, backend="ort", thumbnail=0) as predictor:
        expected = predictor.predict_batch(pairs["image"], pairs["caption"])
    for text, prediction in zip(after.as_numpy("prediction")[:, 0], expected, strict=True):
        agree(Prediction.from_json(text), prediction)


def test_a_broken_picture_fails_alone_in_an_ensemble(server, jpeg):
    pictures = [b"text" if seed == 3 else jpeg(seed) for seed in range(8)]
    with http(server) as client:
        sent = [
            client.async_infer("asap", tensors(client, image=[picture], caption=[CAPTION]))
            for picture in pictures
        ]
        with pytest.raises(Exception, match="the pair: not an image of a supported format") as caught:
            sent.pop(3).get_result()
        assert caught.value.status() == "400"
        assert all(0 < read(request.get_result()).score < 1 for request in sent)


def test_a_stranger_asks_the_model_after_the_network(server, asap):
    """What only the ensemble sends, from someone who sends other things; the model lives on."""
    shapes = {"logits_real_fake": (2,), "logits_multicls": (4,), "box": (4,), "logits_tok": (1, 2)}
    shapes["attention_map"] = (2, 257)
    right = {"size": [10, 10], "warnings": [], "timing": {}, "prepared": 0.0}
    notes = (
        (b"{", "picture: expected JSON"),
        (b"\xff", "picture: expected JSON"),
        (b"[" * 100_000, "picture: expected JSON"),
        (b"[]", "picture: the document: expected an object"),
        ({**right, "size": [0, 1]}, r"picture: size\[0\]: expected a number of pixels, got 0"),
        ({**right, "size": [1, 10**400]}, r"picture: size\[1\]: expected a number of pixels, got 1000"),
        ({**right, "prepared": -1e308}, "picture: prepared: expected a finite number"),
        ({**right, "timing": {"decode": 1e308}}, "picture: timing.decode: expected a finite number"),
        (right, "logits_tok: expected the rows of 1[0-9] tokens, got 1"),
        ({**right, "size": None}, "expected an image or a caption"),
    )
    with grpc(server) as client:
        for note, message in notes:
            outputs = {name: np.zeros((1, *shape), np.float32) for name, shape in shapes.items()}
            text = note if isinstance(note, bytes) else json.dumps(note).encode()
            caption = None if "an image or a caption" in message else [CAPTION]
            with pytest.raises(Exception, match=message):
                client.infer("asap-post", tensors(client, **outputs, picture=[text], caption=caption))
        assert client.is_model_ready("asap-post")


def test_the_clients_that_a_repository_holds(server, repositories, predictor, asap, jpeg, tmp_path):
    import tritonclient.http as triton

    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    command = [sys.executable, str(repositories / "demo" / "client.py"), "demo"]

    def run(picture):
        arguments = [str(tmp_path / picture), CAPTION.decode(), "--url", server.http]
        return subprocess.run([*command, *arguments], capture_output=True, text=True)

    done = run("a.jpg")
    assert (done.returncode, done.stderr) == (0, "")
    assert Prediction.from_json(done.stdout) == predictor.predict(jpeg(1), CAPTION)
    (tmp_path / "a.jpg").write_bytes(b"")
    done = run("a.jpg")
    assert (done.returncode, done.stderr) == (1, "client: error: [400] the pair: the file is empty\n")
    model = network_client.Model(repositories / "ensemble" / "asap-pre")
    model.name = "asap-network"  # which would stand with its record in a repository of its own
    with http(server) as client, Predictor(asap, backend="ort", thumbnail=0) as own:
        agree(model.ask(triton, client, jpeg(1), CAPTION.decode()), own.predict(jpeg(1), CAPTION))


def test_a_server_that_is_told_to_end_answers_what_it_took(start, jpeg, tmp_path):
    waiting = ServerOptions(form="python", queue_delay_us=2_000_000)
    write_repository({"demo": Bundle.open("demo:asap")}, tmp_path / "r", waiting)
    with start(tmp_path / "r") as server, grpc(server) as client:
        client.load_model("demo")
        done = queue.Queue()
        inputs = tensors(client, image=[jpeg(1)], caption=[CAPTION])
        for _ in range(4):
            client.async_infer("demo", inputs, callback=lambda result, error: done.put((result, error)))
        while server.scrape()['nv_inference_pending_request_count{model="demo",version="1"}'] < 4:
            time.sleep(0.05)
        server.process.terminate()
        for _ in range(4):
            answer, error = done.get(timeout=20)
            assert error is None
            assert 0 < read(answer).score < 1
        assert server.process.wait(20) == 0
