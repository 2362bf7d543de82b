"""The errors of each precision on the trained demo, pinned: an export's bounds only stop a broken network."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

import dgm4
from dgm4.data.make import make_sample_set
from dgm4.shipped import demo_checkpoint, demo_record
from dgm4.tokenizer import build_tokenizer, vocabulary_of
from engine.bundle import Bundle
from engine.inputs.text import CaptionTokenizer
from engine.layout import GRAPH
from export.graph.parity import onnx_outputs, relative_errors, torch_outputs
from export.graph.rewrite import rewrite, sharing
from export.graph.trace import export_onnx
from export.quantization.calibrate import CODES, calibrate
from export.quantization.dynamic_int8 import quantize_dynamic
from export.quantization.pairs import read_pairs
from export.quantization.qdq import lower, lowered_layers

# RMS of the difference from float32 over float32's RMS, of the worst output, in percent, as measured.
ERRORS = {
    ("hammer", "fp16"): 0.0349,
    ("hammer", "bf16"): 0.374,
    ("hammer", "int8 dynamic"): 0.594,
    ("hammer", "int8 static"): 1.15,
    ("hammer", "fp8"): 1.33,
    ("hammer", "fp8 static"): 1.56,
    ("asap", "fp16"): 0.0408,
    ("asap", "bf16"): 0.389,
    ("asap", "int8 dynamic"): 0.659,
    ("asap", "int8 static"): 1.46,
    ("asap", "fp8"): 2.54,
    ("asap", "fp8 static"): 2.78,
    ("cals", "fp16"): 0.0311,
    ("cals", "bf16"): 0.280,
    ("cals", "int8 dynamic"): 0.387,
    ("cals", "int8 static"): 0.665,
    ("cals", "fp8"): 1.21,
    ("cals", "fp8 static"): 0.822,
}


@pytest.fixture(scope="module")
def sample_set(tmp_path_factory):
    """Most of its test pairs have a manipulated face: without one a box is nearly 0, and any error large."""
    make_sample_set(folder := tmp_path_factory.mktemp("data") / "set", 52, seed=16)
    return folder


@pytest.fixture(scope="module")
def demo(sample_set, tmp_path_factory):
    """A trained network by name: .network in float32, .feeds of four test pairs, .outputs, .calibration."""

    @functools.cache
    def load(name):
        checkpoint = demo_checkpoint(name)
        network = rewrite(dgm4.load_checkpoint(checkpoint))
        pieces, file = network.config.vocabulary, tmp_path_factory.mktemp(name) / "tokenizer.json"
        file.write_text(build_tokenizer(vocabulary_of(checkpoint, pieces), pieces).to_str())
        tokenizer = CaptionTokenizer(file, 50, 127)

        def pairs(count, split):
            reader = read_pairs(sample_set, count, tokenizer, network.config.image_size, split)
            return [{key: torch.from_numpy(x) for key, x in batch.items()} for batch in reader.batches()]

        feeds = pairs(4, "test")
        outputs = torch_outputs(network, network.config, feeds=feeds)
        calibration = pairs(16, "train")
        return SimpleNamespace(network=network, feeds=feeds, outputs=outputs, calibration=calibration)

    return load


def lowered(demo, variant):
    """The demo's network in a precision, "static" with calibrated scales."""
    precision, _, static = variant.partition(" ")
    scales = None
    if static == "static":
        layers = lowered_layers(demo.network, precision)
        scales = calibrate(demo.network, layers, demo.calibration, CODES[precision])
    return lower(sharing(demo.network), precision, scales)


def worst_error(demo, outputs):
    """In percent, as in `ERRORS`."""
    return 100 * max(relative_errors(demo.outputs, outputs).values())


@pytest.mark.parametrize(("network", "variant"), ERRORS)
def test_the_error_of_a_precision_in_torch(network, variant, demo):
    trained = demo(network)
    model = lowered(trained, variant)
    error = worst_error(trained, torch_outputs(model, model.config, feeds=trained.feeds))
    assert ERRORS[network, variant] / 2 <= error <= 2 * ERRORS[network, variant]


@pytest.mark.parametrize("variant", ["fp16", "int8 dynamic", "int8 static"])
def test_the_error_of_a_precision_in_onnx_runtime(variant, demo, tmp_path):
    """At most twice torch's: it rounds less, since it keeps float32 between some nodes."""
    trained, graph = demo("asap"), tmp_path / "model.onnx"
    if variant == "int8 dynamic":
        export_onnx(sharing(trained.network), tmp_path / "float.onnx")
        quantize_dynamic(tmp_path / "float.onnx", graph)
    else:
        export_onnx(lowered(trained, variant), graph)
    feeds = [{name: x.numpy() for name, x in feed.items()} for feed in trained.feeds]
    outputs = onnx_outputs(graph, trained.network.config, feeds)
    assert 0 < worst_error(trained, outputs) <= 2 * ERRORS["asap", variant]
    if variant == "int8 dynamic":
        # The bundle that ships is what `python -m benchmarks.demo_bundle` makes today.
        shipped = Bundle.open("demo:asap")
        assert shipped.manifest.weights.sha256 == demo_record()["networks"]["asap"]["sha256"]
        ready = onnx_outputs(shipped.verified(GRAPH), trained.network.config, feeds)
        assert max(relative_errors(outputs, ready).values()) < 1e-4
