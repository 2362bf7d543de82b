"""PMMD's bundles: graphs against torch, every precision, a box for refine, engines built for real."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine import Batcher, Bundle, InputError, Predictor, backends
from engine.registry import NETWORKS
from export.cli import main
from export.evaluation.calibrate import CalibrateOptions, calibrate
from export.evaluation.evaluate import evaluate
from export.evaluation.running import RunOptions, run_bundle
from export.graph.trace import example_inputs
from export.inference_server.repository import write_repository
from export.trt import build
from export.trt.engine_file import build_into
from export.trt.options import EngineOptions
from export.trt.profiles import Shapes

EXACT = 1e-4
NAMES = ("pmmd_refine", "pmmd")
SIZE = 120, 90  # width and height
BOX = (30, 20, 80, 70)
CAPTION = "A man speaks in front of the flag"
# At most twice the error of the worst output, as for the other networks.
RATIOS = {"fp16": 6e-3, "bf16": 1.2e-1, "int8": 1.5e-1}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def path(bundle):
    return bundle("pmmd_refine", "fp32").path


@pytest.fixture(scope="module")
def predictor(path):
    with Predictor(path, backend="ort") as predictor:
        yield predictor


def test_graphs_are_the_network(name, bundle, tiny, session_of):
    session, model = session_of(bundle(name, "fp32").path / "model.onnx"), tiny(name)
    for batch, tokens in ((1, 2), (3, 12), (8, 50), (1, 128)):
        inputs = example_inputs(model.config, batch, tokens, seed=tokens)
        with torch.inference_mode():
            want = model(**inputs)
        got = session.run(None, {key: tensor.numpy() for key, tensor in inputs.items()})
        for answer, exact in zip(got, want, strict=False):
            assert np.abs(answer - exact.numpy()).max() <= EXACT, (batch, tokens)


@pytest.mark.parametrize(
    ("name", "precision"),
    [("pmmd", "fp16"), ("pmmd", "int8"), ("pmmd_refine", "bf16"), ("pmmd_refine", "int8")],
)
def test_lower_precisions(name, precision, bundle, tiny):
    """Through the backend that serves them."""
    model = tiny(name)
    inputs = example_inputs(model.config, 4, 17, seed=99)
    opened = Bundle.open(bundle(name, precision).path)
    got = backends.create("auto", opened).run({k: v.numpy() for k, v in inputs.items()})
    with torch.inference_mode():
        want = model(**inputs)
    for key, value in got.items():
        reference = getattr(want, key).numpy()
        ratio = np.sqrt(((value - reference) ** 2).mean() / (reference**2).mean())
        assert 0 < ratio <= RATIOS[precision], key


def test_boxes_stay_float32(bundle):
    kept = bundle("pmmd", "fp16").manifest["float32_layers"]
    assert {"refine.branch.bbox_head.6", *(f"locate.heads.{i}.3" for i in range(3))} <= {*kept}


def test_the_manifest_has_the_box(name, bundle):
    inputs = bundle(name, "fp32").manifest["inputs"]
    given = {"name": "box_given", "dtype": "float32", "shape": ["batch", 4]}
    assert (given in inputs) == (name == "pmmd_refine")
    card = (bundle(name, "fp32").path / "README.md").read_text()
    assert ("box=(" in card) == (name == "pmmd_refine")


@pytest.mark.parametrize("backend", ["torch", "ort", "openvino"])
def test_a_box_is_judged(backend, path, picture, predictor):
    """By every backend alike, alone and in a batch; another box gives another answer."""
    if backend == "openvino":
        pytest.importorskip("openvino")
    others = (0, 0, *SIZE)
    with Predictor(path, backend=backend) as other:
        pairs = [{"image": picture, "caption": CAPTION, "box": BOX}, (picture, "Flag", others)]
        alone, whole = other.predict_batch(pairs)
        shared = other.predict_captions(picture, [CAPTION, "Flag"], box=BOX)
    want = predictor.predict(picture, CAPTION, box=BOX)
    assert alone.score == pytest.approx(want.score, abs=EXACT)
    assert shared[0].score == pytest.approx(want.score, abs=EXACT)
    assert (alone.box_given, whole.box_given) == (want.box_given, others) and want.box_given == BOX
    assert [want.to_row()[f"given_{corner}"] for corner in ("x1", "y1", "x2", "y2")] == list(BOX)
    assert abs(shared[1].score - whole.score) > EXACT


def test_a_batcher_takes_boxes(predictor, picture):
    with Batcher(predictor) as batcher:
        answer = batcher.predict(picture, CAPTION, BOX)
    assert answer.score == pytest.approx(predictor.predict(picture, CAPTION, BOX).score, abs=EXACT)


@pytest.mark.parametrize(
    ("box", "message"), [(None, "got none"), ((0, 0, 121, 5), "x2 <= 120"), ((5, 5, 5, 9), "x1 < x2")]
)
def test_a_box_that_cannot_be_judged(predictor, picture, box, message):
    with pytest.raises(InputError, match=f"^box: expected.*{message}"):
        predictor.predict(picture, CAPTION, box)
    pair = {"image": picture, "caption": CAPTION, "box": box}
    good, bad = predictor.predict_batch([{**pair, "box": BOX}, pair], on_error="return")
    assert good.score > 0
    assert str(bad).startswith("item 1: box: expected")


def test_other_networks_take_no_box(bundle, picture):
    """But a mapping may have other names, as an answer has that is read again."""
    with Predictor(bundle("hammer", "fp32").path, backend="ort") as predictor:
        for pair in [(picture, CAPTION, BOX)]:
            with pytest.raises(InputError, match="box: expected none"):
                predictor.predict(*pair)
            with pytest.raises(InputError, match="item 0: box: expected none"):
                predictor.predict_batch([pair])
        assert predictor.predict_batch([{"image": picture, "caption": CAPTION, "box": BOX}])[0].score > 0


def test_on_the_command_line(path, picture, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(picture).save(tmp_path / "photo.png")
    photo = str(tmp_path / "photo.png")
    assert main(["predict", str(path), photo, CAPTION, "--box", "30,20,80,70"]) == 0
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert record["box_given"] == [30, 20, 80, 70]
    assert main(["predict", str(path), photo, CAPTION, "--box", "10,20,10.01,20.01"]) == 0
    assert json.loads(capsys.readouterr().out)["box_given"] == [10, 20, 10.01, 20.01]
    for box in ("-5,0,50,50", "0,0,121,50"):  # as detectors give them
        assert main(["predict", str(path), photo, CAPTION, "--box", box]) == 1
        assert "box: expected (x1, y1, x2, y2)" in (told := capsys.readouterr().err)
        assert "got [-5.0, 0.0, 50.0, 50.0]" in told or "121.0" in told
        assert told.endswith("; clip it to the image\n")
    (tmp_path / "pairs.jsonl").write_text(
        '{"image": "photo.png", "caption": "A flag", "box": [30, 20, 80, 70]}\n'
        '{"image": "photo.png", "caption": "A flag"}\n'
    )
    assert main(["predict", str(path), "--list", str(tmp_path / "pairs.jsonl")]) == 1
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[0])["box_given"] == [30, 20, 80, 70]
    assert "line 2: box: expected" in out[1]
    for given, message in (
        (["--box", "30,20,80"], "expected X1,Y1,X2,Y2 in pixels, got '30,20,80'"),
        (["--box", "30,20,80,x"], "expected X1,Y1,X2,Y2 in pixels, got '30,20,80,x'"),
        (["--box", "30,20,80,70", "--box", "0,0,9,9"], "--box is given 2 times: expected one for a pair"),
        ([], "--box X1,Y1,X2,Y2 is missing: this network judges a given box"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["predict", str(path), photo, CAPTION, *given])
        assert left.value.code == 2 and message in capsys.readouterr().err


def test_answers_are_a_list_of_the_boxes_that_were_given(path, picture, predictor, tmp_path, capsys):
    """And not of the network's own, be they read from a file or asked again as mappings."""
    from PIL import Image

    Image.fromarray(picture).save(tmp_path / "photo.png")
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({"image": "photo.png", "caption": CAPTION, "box": BOX}) + "\n"
    )
    answers = []
    for name in ("pairs.jsonl", "answers.jsonl"):
        assert main(["predict", str(path), "--list", str(tmp_path / name)]) == 0
        answers.append(json.loads(capsys.readouterr().out))
        (tmp_path / "answers.jsonl").write_text(json.dumps(answers[-1]))
    first, second = answers
    assert first["box_given"] == second["box_given"] == list(BOX) != first["box"]
    assert first["score"] == second["score"]
    (again,) = predictor.predict_batch([{**first, "image": picture}])
    assert again.box_given == BOX


def test_where_pairs_bring_no_box(path, annotated, tmp_path):
    opened = Bundle.open(path)
    with pytest.raises(InputError, match="pmmd_refine judges a box that each pair brings"):
        run_bundle(opened, annotated(), RunOptions())
    with pytest.raises(InputError, match="brings, .* serve it with dgm4 serve, dgm4 predict or engine"):
        write_repository({"refine": opened}, tmp_path / "models")
    nowhere = tmp_path / "nowhere"  # asked before the pairs are read
    with pytest.raises(InputError, match="annotations do not have; calibrate a network that finds it itself"):
        calibrate(path, nowhere, tmp_path / "out", CalibrateOptions(split="test", false_alarms=0.01))
    with pytest.raises(InputError, match="annotations do not have; evaluate a network that finds it itself"):
        evaluate(path, nowhere)


@pytest.mark.parametrize(("name", "precision"), [("pmmd", "fp16"), ("pmmd_refine", "fp32")])
def test_engines_are_built(name, precision, bundle):
    pytest.importorskip("tensorrt_rtx")
    graph = bundle(name, precision).path / "model.onnx"
    rtx = next(info for info in build.describe_builders() if info.library == "tensorrt_rtx")
    network = NETWORKS[name]
    shapes = Shapes(2, 2, 16, 24, 256, network.further(network.sizes["tiny"]))
    writer = SimpleNamespace(path=lambda file: graph.parent / file)
    entry, _ = build_into(writer, rtx, ("8.9",), shapes, EngineOptions(), precision)
    (graph.parent / entry.file).unlink()
    (profile,) = entry.profiles
    assert profile["input_ids"].max == (2, 24)
    assert (name == "pmmd_refine") == ("box_given" in profile)
