"""CSCL from its exported graph to a Predictor, small and drawn."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import dgm4
from engine import InputError, Predictor
from engine.network.precision import float_layers, set_precision
from engine.registry.config import TYPES
from export.cli import main
from export.evaluation.running import RunOptions, run_bundle
from export.graph.choices import CLEAR, changed_choices, clear_inputs, margins
from export.graph.parity import case_inputs, relative_errors, torch_outputs
from export.graph.rewrite import rewrite, sharing
from export.graph.trace import outputs_of
from export.inference_server.ends import NetworkEnds
from export.inference_server.repository import write_repository
from export.quantization.qdq import int8_layers, to_int8

EXACT = 1e-4


@pytest.fixture(scope="module")
def network():
    return rewrite(dgm4.seeded_model("cscl", "tiny"))


@pytest.fixture(scope="module")
def predictor(bundle):
    with Predictor(bundle("cscl", "fp32").path, backend="ort", thumbnail=0) as made:
        yield made


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("batch", "tokens"), [(1, 9), (3, 9), (1, 12), (8, 12), (3, 50), (8, 50), (1, 128), (3, 128)]
)
def test_the_graph_is_the_network(network, bundle, session_of, batch, tokens):
    (inputs,), margin = clear_inputs(network, [(batch, tokens)])
    assert margin >= CLEAR
    names = outputs_of(network.config)
    assert names[-1] == "patch_scores"
    with torch.inference_mode():
        want = network(**inputs)
    session = session_of(bundle("cscl", "fp32").path / "model.onnx")
    got = session.run(list(names), {key: value.numpy() for key, value in inputs.items()})
    apart = {name: np.abs(x - getattr(want, name).numpy()).max() for name, x in zip(names, got, strict=True)}
    assert max(apart.values()) <= EXACT, apart


def test_pairs_near_a_tie_are_drawn_anew(network, bundle):
    cases = [(3, 128)]
    (drawn,), ((inputs,), margin) = case_inputs(network.config, cases), clear_inputs(network, cases)
    near = margins(network, drawn) < CLEAR
    assert near.any() and not near.all()
    assert margin >= CLEAR and margins(network, inputs).min() > CLEAR / 2
    for name, rows in inputs.items():
        assert torch.equal(rows[~near], drawn[name][~near])
    assert not torch.equal(inputs["image"][near], drawn["image"][near])
    stages = " ".join(stage.text for stage in bundle("cscl", "fp32").stages)
    assert float(re.search(r"choices of neighbours are clear by ([\d.e-]+)", stages)[1]) >= CLEAR


def test_int8_says_how_many_choices_changed(bundle):
    stages = " ".join(stage.text for stage in bundle("cscl", "int8").stages)
    assert re.search(r"; [1-9]\d* of 26032 choices of neighbours changed", stages)


@pytest.mark.parametrize(("precision", "most"), [("fp16", 0.02), ("bf16", 0.1)])
def test_half_precision(network, precision, most):
    """Within the bounds that an export holds it to, though some neighbours are others."""
    feeds = case_inputs(network.config)
    half = set_precision(sharing(network), precision)
    outputs = [torch_outputs(x, network.config, feeds=feeds) for x in (network, half)]
    assert max(relative_errors(*outputs).values()) <= most
    changed, total = changed_choices(network, half, feeds)
    assert 0 < changed < most * total


def test_what_is_compared_stays_float32(network):
    half = set_precision(sharing(network), "fp16")
    compared = [name for name, _ in network.named_modules() if name.endswith("consistency.layers.0")]
    assert len(compared) == 4
    assert set(compared) <= set(float_layers(half))
    assert not set(compared) & {name for name, _ in int8_layers(network)}
    rounded = to_int8(sharing(network), None)
    assert all(isinstance(rounded.get_submodule(name), torch.nn.Linear) for name in compared)


def test_a_prediction_has_the_heat_map_of_the_patches(predictor, pixels, network):
    found = predictor.predict(pixels, "A man in the 1990s paid $5.")
    assert [word.text for word in found.words] == ["A", "man", "in", "the", "1990s", "paid", "$5"]
    assert found.heatmap.shape == (16, 16)
    assert 0 <= found.heatmap.min() < found.heatmap.max() <= 1
    assert found.warnings == predictor.predict(pixels, "Obama").warnings


def test_a_pair_answers_as_alone(predictor, pixels):
    captions = ["Obama", "", "a man speaks to " + "his friends " * 15]
    together = predictor.predict_captions(pixels, captions)
    for caption, found in zip(captions, together, strict=True):
        alone = predictor.predict(pixels, caption)
        assert found.score == pytest.approx(alone.score, abs=1e-5)
        scores = [word.score for word in found.words]
        assert scores == pytest.approx([word.score for word in alone.words], abs=1e-5)


@pytest.mark.parametrize("caption", ["", "?!"])
def test_without_words_the_verdict_alone_is_answered(predictor, pixels, caption):
    found = predictor.predict(pixels, caption)
    assert 0 < found.score < 1
    assert (found.box, found.heatmap, found.words, found.detected) == (None, None, (), ())
    assert set(found.types.values()) == {None}
    assert [text.split(":")[0] for text in found.warnings] == ["untrained_weights", "no_words"]


@pytest.mark.parametrize("caption", ["?!", "Obama speaks"])
def test_both_ends_of_a_server_answer_so_too(predictor, pixels, session_of, tmp_path, caption):
    """Between them the graph that the server runs, with captions padded to its steps."""
    write_repository({"m": predictor.bundle}, tmp_path / "r")
    ends, session = NetworkEnds(tmp_path / "r" / "m"), session_of(tmp_path / "r" / "m" / "1" / "model.onnx")
    item = ends.prepare("", pixels, caption)
    names = outputs_of(predictor.manifest.model.config)
    outputs = dict(zip(names, session.run(list(names), ends.feeds([item])), strict=True))
    (found,), want = ends.answers([item], outputs, 0.0), predictor.predict(pixels, caption)
    assert found.score == pytest.approx(want.score, abs=1e-5)
    assert found.warnings == want.warnings
    assert [found.types[kind] is None for kind in TYPES] == [not want.words] * 4
    assert (found.box is None, len(found.words)) == (want.box is None, len(want.words))
    with pytest.raises(InputError, match="expected a caption, got none"):
        ends.prepare("", pixels, None)


def test_evaluation_leaves_captions_without_words_out(predictor, annotated):
    wordless = {"id": "wordless", "image": "DGM4/origin/0.jpg", "text": "?!", "fake_cls": "orig"}
    data = annotated(3, records=[wordless | {"fake_image_box": [], "fake_text_pos": []}])
    run = run_bundle(predictor.bundle, data, RunOptions(backend="ort"))
    assert (len(run.scored.samples), run.problems) == (3, {"caption_without_words": 1})
    with pytest.raises(InputError, match=r"^sample wordless: expected a caption with words, got '\?!'; "):
        run_bundle(predictor.bundle, data, RunOptions(backend="ort", on_bad="raise"))


def test_an_absent_caption_is_refused(predictor, pixels):
    with pytest.raises(InputError, match="expected a caption, got none"):
        predictor.predict(pixels, None)
    with pytest.raises(InputError, match="expected an image or a caption with words, got neither"):
        predictor.predict(None, "")
    assert predictor.predict(None, "Obama speaks").words


def test_predict_from_the_command_line(bundle, pixels, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(pixels).save(tmp_path / "a.png")
    command = ["predict", str(bundle("cscl", "fp32").path), str(tmp_path / "a.png"), "Obama speaks"]
    assert main(command) == 0
    assert "Obama" in capsys.readouterr().out
