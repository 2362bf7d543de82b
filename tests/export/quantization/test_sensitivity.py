"""The error of each layer finds the one that hurts, and an export that keeps it passes its checks."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

from dgm4.data.make import make_sample_set
from dgm4.shipped import demo_checkpoint
from engine.bundle import Bundle
from engine.errors import InputError
from export import cli, lowering, source
from export.calibration import plans
from export.graph.parity import Tolerance
from export.graph.rewrite import rewrite
from export.graph.trace import example_inputs
from export.options import ExportOptions
from export.pipeline import export_bundle
from export.quantization.calibrate import calibrate
from export.quantization.qdq import int8_layers, lower
from export.quantization.sensitivity import bundle_errors, layer_errors

BROKEN = "text.text_layers.0.down"
SPIKE = 3e4
HARMED, MILD = "vision.blocks.0.mlp.fc2", 400.0  # on the demo: within the export's checks, beyond its gate


def break_layer(model, name=BROKEN, spike=SPIKE):
    """Give the layer one channel whose input is huge and whose weight undoes it: nothing in float32."""
    layer = model.get_submodule(name)
    up = model.get_submodule(name.replace("down", "up").replace("fc2", "fc1"))
    up.bias[0] += spike
    layer.bias -= spike * layer.weight[:, 0]
    return model


@pytest.fixture(scope="module")
def inputs(tiny):
    return example_inputs(tiny("hammer").config, 3, 12, seed=5)


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_the_broken_layer_is_found(precision, tiny, inputs):
    reference = break_layer(rewrite(tiny("hammer")))
    scales = None
    if precision == "int8":
        scales = calibrate(reference, int8_layers(reference), [inputs], torch.int8)
    lowered = lower(break_layer(rewrite(tiny("hammer"))), precision, scales)
    errors = layer_errors(reference, lowered, precision, [inputs])
    assert errors[0].name == BROKEN
    assert errors[0].own > 3 * errors[1].own
    assert errors[0].accumulated > 0.1
    kept = lower(break_layer(rewrite(tiny("hammer"))), precision, scales, [BROKEN])
    again = {x.name: x for x in layer_errors(reference, kept, precision, [inputs], [BROKEN])}
    assert again[BROKEN].kept
    assert again[BROKEN].own < errors[0].own / 3


def test_errors_by_hand(tiny, inputs):
    """Own error of bf16 from the layer's true input, in float64."""
    reference, lowered = rewrite(tiny("hammer")), lower(rewrite(tiny("hammer")), "bf16", None)
    read = []
    name = "vision.blocks.0.mlp.fc1"
    layer = reference.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, x: read.append(x[0]))
    with torch.inference_mode():
        reference(**inputs)
    handle.remove()
    (found,) = (x for x in layer_errors(reference, lowered, "bf16", [inputs]) if x.name == name)
    weight, bias = (x.bfloat16().double() for x in (layer.weight, layer.bias))
    want = read[0].double() @ layer.weight.double().T + layer.bias.double()
    got = (read[0].bfloat16().double() @ weight.T + bias).bfloat16().double()
    assert found.own == pytest.approx(float((got - want).norm() / want.norm()), rel=0.02)
    assert found.accumulated >= found.own / 2


def test_a_bundle_tells_its_layers_errors(bundle, capsys):
    path = bundle("hammer", "bf16").path
    layers = bundle_errors(Bundle.open(path))
    assert [x.own for x in layers] == sorted((x.own for x in layers), reverse=True)
    assert all(0 < x.own < 0.1 for x in layers)
    assert cli.main(["inspect", str(path), "--layers"]) == 0
    assert f"\n{layers[0].name} " in capsys.readouterr().out
    assert cli.main(["inspect", str(path), "--layers", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["layers"][0]
    assert first == asdict(layers[0])
    assert bundle_errors(Bundle.open(bundle("hammer", "fp32").path)) == []


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Forty training pairs that the demo knows."""
    make_sample_set(folder := tmp_path_factory.mktemp("data") / "set", 52, seed=7)
    return folder


@pytest.fixture
def broken(tmp_path, monkeypatch, sample):
    """Options of an int8 export of the demo, whose box suffers as one layer is broken."""
    right = source.rewrite
    monkeypatch.setattr(source, "rewrite", lambda model: break_layer(right(model), HARMED, MILD))
    for module in (source, lowering):  # float32 too loses digits beside the spike
        monkeypatch.setattr(module, "EXACT", Tolerance("max", 0.1))

    fields = {"checkpoint": demo_checkpoint("hammer"), "engine": False, "data": sample, "split": "train"}
    return ExportOptions(tmp_path / "b", precision="int8", keep_layers="auto", **fields)


def test_the_worst_layer_is_kept_so_that_the_gate_passes(broken, tmp_path, capsys):
    stages = []
    manifest = export_bundle(broken, stages.append)
    assert manifest["kept_layers"] == [HARMED]
    done = [x.name for x in stages if x.name in ("quantise", "accuracy", "layers")]
    assert done == ["quantise", "layers", "quantise", "accuracy"], "the gate stopped the first"
    assert [x["stage"] for x in manifest["verification"]].count("int8") == 1
    (judged,) = manifest["accuracy"]
    assert abs(judged["metrics"]["IoUmean"] - judged["reference"]["IoUmean"]) < 0.01
    assert Bundle.open(tmp_path / "b").manifest.kept_layers == (HARMED,)
    assert HARMED in manifest["float32_layers"]
    assert f"Layers kept a step above the precision: `{HARMED}`." in (tmp_path / "b/README.md").read_text()
    assert cli.main(["inspect", str(tmp_path / "b")]) == 0
    assert f"\nkept       a step above int8: {HARMED}\n" in capsys.readouterr().out


def test_layers_need_data_to_be_ranked(tmp_path):
    for fields in ({"precision": "fp8", "keep_layers": 2}, {"precision": "fp32", "keep_layers": 2}):
        with pytest.raises(InputError, match="keep_layers"):
            export_bundle(ExportOptions(tmp_path / "b", model="hammer", **fields), lambda stage: None)


def test_a_layer_is_a_linear(tiny):
    assert all(isinstance(layer, nn.Linear) for _, layer in int8_layers(rewrite(tiny("asap"))))


@pytest.mark.parametrize(
    ("keep", "layers", "attempts", "ranked"),
    [
        (0, 5, [()], 0),
        (2, 5, [("a", "b")], 1),
        ("auto", 5, [(), ("a",), ("a", "b"), ("a", "b", "c", "d"), ("a", "b", "c", "d", "e")], 1),
        ("auto", 1, [(), ("a",)], 1),
        ("auto", 0, [()], 1),
    ],
)
def test_the_attempts_of_an_export(keep, layers, attempts, ranked):
    """Layers are ranked only where it is needed: an attempt that passes asks for no further one."""
    calls = []
    made = plans(keep, lambda: calls.append(1) or list("abcde"[:layers]))
    assert next(made) == attempts[0]
    assert len(calls) == (ranked if keep != "auto" else 0)
    assert list(made) == attempts[1:]
    assert len(calls) == ranked
