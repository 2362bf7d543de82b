"""The model card, which is made of the manifest alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

import dgm4
from engine.inputs.preprocess import CLIP_MEAN, CLIP_STD
from engine.manifest import (
    TYPES,
    EngineEntry,
    Limits,
    Manifest,
    ModelInfo,
    Preprocess,
    TensorSpec,
    Thresholds,
    Verification,
    Weights,
)
from engine.registry import NETWORKS
from engine.registry.record import PAIR
from export.bundle.card import largest_text, model_card
from export.bundle.licences import licence_of

MANIFEST = Manifest(
    created="2026-11-28T00:00:00+00:00",
    model=ModelInfo("asap", "tiny", dgm4.model_config("asap", "tiny")),
    weights=Weights(kind="drawn", source="drawn from seed 1", sha256=None),
    precision="fp16",
    preprocess=Preprocess(
        256, 16, "bicubic", CLIP_MEAN, CLIP_STD, max_words=50, max_tokens=127, min_tokens=2
    ),
    inputs=(TensorSpec("image", "float32", ("batch", 3, 256, 256)),),
    outputs=(TensorSpec("logits_tok", "float32", ("batch", "tokens - 1", 2)),),
    limits=Limits(max_batch=32, max_tokens=127),
    types=TYPES,
    thresholds=Thresholds(0.5, 0.5, 0.5, 0.5, 0.5, 0.5),
    engines=(),
    versions={"dgm4": "0.1.0"},
    verification=(Verification(stage="onnx", against="torch fp32", max=2.5e-6, rms=1e-7, tolerance=1e-4),),
    files={},
)
ENGINE = EngineEntry(
    file="model.rtx.engine",
    library="tensorrt_rtx",
    version="1.7.1.116",
    compute_capabilities=("8.0", "8.6"),
    onnx_sha256="0" * 64,
    profiles=({"input_ids": {"min": [1, 2], "opt": [8, 50], "max": [32, 128]}},),
)


def test_card_tells_what_the_manifest_holds():
    card = model_card(replace(MANIFEST, engines=(ENGINE,)))
    assert "\n\n# ASAP (tiny, fp16)\n" in card
    for part in (
        "| input | `image` | float32 | batch x 3 x 256 x 256 |",
        "| output | `logits_tok` | float32 | batch x (tokens - 1) x 2 |",
        "| onnx | torch fp32 | 2.5e-06 | 1e-07 | 0.0001 |",
        "256 x 256 pixels",
        "at most 32 pairs",
        "| `model.rtx.engine` | tensorrt_rtx 1.7.1.116 | 8.0, 8.6 | 32x128 |",
        "from engine import Predictor",
    ):
        assert part in card
    assert not [line for line in card.splitlines() if line != line.rstrip()]


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("drawn", "> **These weights are not trained** (some source)."),
        ("demo", "> **A demo, not a detector.** Its weights were trained on made images."),
        ("trained", "# ASAP (tiny, fp16)"),
    ],
)
def test_the_first_line_says_whether_the_weights_are_a_detectors(kind, first):
    weights = Weights(kind=kind, source="some source", sha256=None)
    assert model_card(replace(MANIFEST, weights=weights)).splitlines()[0].startswith(first)


def test_card_of_trained_weights_without_engines():
    weights = Weights(kind="trained", source="checkpoint best.pth", sha256="ab" * 32)
    card = model_card(replace(MANIFEST, weights=weights, verification=()))
    assert "not trained" not in card
    assert "checkpoint best.pth" in card
    assert "ab" * 32 in card
    assert "No engine is in this bundle" in card
    assert "No stage was verified" in card


def test_card_cannot_break_its_tables():
    odd = Verification(stage="a|b\nc", against="torch", max=0.0, rms=0.0, tolerance=1.0)
    assert "| a\\|b c | torch |" in model_card(replace(MANIFEST, verification=(odd,)))


def test_the_largest_shapes_of_profiles():
    assert largest_text([{"input_ids": {"max": [1, 32]}}, {"input_ids": {"max": [8, 64]}}]) == "1x32, 8x64"
    assert largest_text([{}]) == ""


def test_card_tells_the_licence():
    drawn = model_card(MANIFEST)
    assert "\n## Licence\n\nWeights: not stated. Code of `dgm4`: Apache-2.0.\n" in drawn
    trained = replace(MANIFEST.weights, kind="trained")
    card = model_card(replace(MANIFEST, weights=trained))
    assert "Published HAMMER weights are for non-commercial use only" in card
    assert "- HAMMER (code, weights): S-Lab License 1.0, non-commercial\n" in card
    stated = model_card(replace(MANIFEST, weights=replace(trained, licence="CC-BY-4.0")))
    assert "Weights: CC-BY-4.0." in stated
    assert "HAMMER (code" not in stated


@pytest.mark.parametrize(
    ("kind", "stated", "licence"),
    [
        ("demo", None, "Apache-2.0"),
        ("drawn", None, "Apache-2.0"),
        ("trained", None, "not stated"),
        ("trained", "MIT", "MIT"),
    ],
)
def test_the_licence_of_an_export(kind, stated, licence):
    assert licence_of(kind, stated) == licence


@pytest.mark.parametrize("name", NETWORKS)
def test_card_explains_the_tensors_and_the_padding_of_each_network(name):
    network, config = NETWORKS[name], dgm4.model_config(name, "tiny")
    sides = {
        side: tuple(TensorSpec(x.name, x.dtype, x.shape_of(config)) for x in tensors)
        for side, tensors in (("inputs", network.inputs), ("outputs", network.outputs))
    }
    spec = replace(MANIFEST.preprocess, min_tokens=network.tokenizer.min_tokens)
    card = model_card(replace(MANIFEST, model=ModelInfo(name, "tiny", config), preprocess=spec, **sides))
    assert f"\n# {network.title} (tiny, fp16)\n" in card
    for tensor in (*network.inputs, *network.outputs):
        assert tensor in PAIR or f"\n- `{tensor.name}`: {tensor.meaning}.\n" in card
    padding = "Shorter captions have id 0 and attention mask 0 at the end, up to the longest of the batch"
    assert f"{padding} and to {network.tokenizer.min_tokens} tokens at least." in card
