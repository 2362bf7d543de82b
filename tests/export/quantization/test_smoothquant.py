"""Peaks of channels moved into weights: by the formula, where it helps, and the same in graph and torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export.bundle.digest import sha256_of
from onnx import numpy_helper
from torch import nn

from engine import Bundle, Predictor
from engine.backends import create
from engine.backends.torch import read_scales
from engine.bundle import MANIFEST
from engine.errors import BundleError, InputError
from engine.manifest import manifest_digest
from engine.network.blocks import Norm
from engine.network.precision import set_precision
from engine.network.rescale import rescale
from export import cli
from export.graph.parity import INT8, check, compare, onnx_answers, relative_errors, torch_answers
from export.graph.rewrite import rewrite, sharing
from export.graph.trace import example_inputs
from export.options import ExportOptions, check_options
from export.pipeline import export_bundle
from export.quantization.calibrate import Calibrated, calibrate, output_error
from export.quantization.qdq import QdqLinear, int8_layers, lowered_layers, to_int8
from export.quantization.ranges import observe
from export.quantization.smoothquant import Channels, choose_shifts

# Large enough to hurt: E4M3 has an exponent for each value, so that what is 2**9 smaller is still not lost.
PLANTED = {"int8": 30.0, "fp8": 1e6}


@pytest.fixture(scope="module")
def batches(tiny):
    config = rewrite(tiny("hammer")).config
    return [example_inputs(config, 2, 9, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def data(annotated):
    folder = annotated(8)
    (folder / "metadata" / "test.json").rename(folder / "metadata" / "train.json")
    return folder


def plant(model, size=PLANTED["int8"]):
    """Outliers in some channels of the picture's norms, undone by what reads them."""
    for block in model.vision.blocks:
        for norm, reader in ((block.norm1, block.attention.qkv), (block.norm2, block.mlp.fc1)):
            factor = torch.ones_like(norm.weight)
            factor[::16] = size
            norm.weight, norm.bias = (nn.Parameter(x * factor, False) for x in (norm.weight, norm.bias))
            reader.weight = nn.Parameter(reader.weight / factor, False)
    return model


def test_shifts_by_hand(tiny):
    """By float64 and the formula, at one seam of two readers."""
    model = rewrite(tiny("hammer"))
    inputs = example_inputs(model.config, 2, 9)
    found = observe(model, int8_layers(model), [inputs], Channels)
    pair = ["branch.cross.query", "branch.cross.key_value"]
    chosen = choose_shifts(model, {name: found[name] for name in pair}, torch.int8, 0.75)
    x = np.maximum(*(found[name].peaks.double().numpy() for name in pair))
    weights = [model.get_submodule(name).weight.detach().double().numpy() for name in pair]
    w = np.abs(np.concatenate(weights)).max(0)
    exact = np.log2(x**0.75 / w**0.25)
    assert chosen == {pair[0]: np.round(exact - exact.mean()).astype(int).tolist()}


def test_peaks_are_the_channels(tiny, batches):
    seen = Channels()
    seen.add(torch.tensor([[1.0, -5.0], [2.0, 3.0]]))
    seen.add(torch.tensor([[[-4.0, 0.5]]]))
    assert seen.peaks.tolist() == [4, 5]
    assert seen.range("minmax") == 5
    assert seen.rows().tolist() == [[1, -5], [2, 3], [-4, 0.5]]


@pytest.mark.parametrize(("precision", "smooth"), [("int8", "auto"), ("int8", 0.5), ("fp8", "auto")])
def test_planted_outliers_cost_little_once_smoothed(precision, smooth, tiny, batches):
    sound, planted = rewrite(tiny("hammer")), plant(rewrite(tiny("hammer")), PLANTED[precision])
    before, after = (torch_answers(x, x.config, feeds=batches) for x in (sound, planted))
    assert max(relative_errors(before, after).values()) < 1e-5, "nothing in float32"
    found = calibrate(planted, precision, "minmax", smooth, lambda: batches)
    least = calibrate(sound, precision, "minmax", "off", lambda: batches)
    error = output_error(sound, precision, least, batches)
    assert found.smoothing.seams == len(found.shifts) > 0
    assert found.smoothing.smoothed == output_error(planted, precision, found, batches)
    assert found.smoothing.plain > 3 * error
    assert found.smoothing.smoothed < error + (found.smoothing.plain - error) / 4


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_scales_are_those_of_the_rescaled_network(method, tiny, batches):
    model = plant(rewrite(tiny("hammer")))
    found = calibrate(model, "int8", method, 0.5, lambda: batches)
    moved = rescale(sharing(model), found.shifts)
    want = calibrate(moved, "int8", method, "off", lambda: batches)
    assert want.shifts == {}
    assert found.scales == pytest.approx(want.scales, rel=1e-6)


def test_auto_leaves_a_network_that_loses(tiny, batches, monkeypatch):
    model = rewrite(tiny("hammer"))
    errors = iter([0.01, 0.02])
    monkeypatch.setattr("export.quantization.calibrate.output_error", lambda *_: next(errors))
    found = calibrate(model, "int8", "minmax", "auto", lambda: batches)
    assert found.shifts == {}
    assert found.scales == calibrate(model, "int8", "minmax", "off", lambda: batches).scales
    assert (found.smoothing.seams, found.smoothing.plain, found.smoothing.smoothed) == (0, 0.01, 0.02)


def test_a_smoothed_int8_graph_is_the_emulated_network(data, tiny, tmp_path, capsys):
    """Its codes, scales and norms to the last bit; its answers, by other sums, within a bound."""
    fields = {"calibration": data, "calibration_pairs": 4, "smooth": 0.5, "engine": False}
    out = tmp_path / "b"
    manifest = export_bundle(ExportOptions(out, "cals", size="tiny", precision="int8", **fields), [].append)
    scales = json.loads((out / "scales.json").read_text())
    found = Calibrated(scales, scales.pop("shifts"))
    model = to_int8(rescale(rewrite(tiny("cals")), found.shifts), found.scales)
    held = {numpy_helper.to_array(t).tobytes() for t in onnx.load_model(out / "model.onnx").graph.initializer}
    layers = [x for x in model.modules() if isinstance(x, QdqLinear)]
    assert all(y.numpy().tobytes() in held for x in layers for y in (x.codes, x.weight_scale, x.scale))
    norms = [x for x in model.modules() if isinstance(x, Norm)]
    assert all(x.weight.numpy().tobytes() in held for x in norms)
    plain = to_int8(rewrite(tiny("cals")), found.scales)
    assert any(x.codes.numpy().tobytes() not in held for x in plain.modules() if isinstance(x, QdqLinear))
    want, got = torch_answers(model, model.config), onnx_answers(out / "model.onnx", model.config)
    check(compare("int8", "emulated", want, got, INT8))
    record = manifest["calibration"]["smoothing"]
    assert (record["alpha"], record["seams"]) == ("0.5", len(found.shifts))
    assert vars(Bundle.open(out).manifest.calibration.smoothing) == record
    card = (out / "README.md").read_text()
    assert f"Channels are rescaled between layers in {record['seams']} places (SmoothQuant, alpha 0.5" in card
    assert "`branch.faces.gate`" in card
    assert {"vision.norm", "branch.faces.gate", "branch.bbox_head.0"} <= set(manifest["float32_layers"])
    assert not {"vision.blocks.0.mlp.fc1", "branch.pool.out"} & set(manifest["float32_layers"])
    assert cli.main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"rescaled   channels in {record['seams']} places (alpha 0.5)" in said
    assert "\nfloat32    " in said


def test_a_smoothed_fp8_bundle_is_the_same_network_in_torch(bundle, tiny, batches, tmp_path):
    """Another bundle's weights with scales and shifts beside them."""
    # As the bundle does: of the weights in float16.
    model = rewrite(tiny("hammer").half().float())
    found = calibrate(model, "fp8", "minmax", 0.5, lambda: batches)
    source = bundle("hammer", "fp8").path
    out = with_shifts(source, tmp_path / "b", {**found.scales, "shifts": found.shifts})
    opened = Bundle.open(out)
    names = [name for name, _ in lowered_layers(rewrite(tiny("hammer")), "fp8")]
    assert read_scales(opened, names) == found.scales
    want = set_precision(rescale(model, found.shifts), "fp8", found.scales)
    feeds = example_inputs(want.config, 2, 9)
    served = create("torch", opened, "cpu", 1).run({name: x.numpy() for name, x in feeds.items()})
    (answers,) = torch_answers(want, want.config, feeds=[feeds])
    assert all(np.array_equal(served[name], answers[name]) for name in answers)
    for shifts, message in (
        ({"text.key_values": [1]}, "text.key_values: no channels can be rescaled there"),
        ({"branch.cross.out": [1]}, "branch.cross.out: expected 128 shifts, got 1"),
        ({"branch.cross.out": [99]}, "whole numbers from -32 to 32"),
        ([1], "expected a list of shifts by layer"),
    ):
        copy = with_shifts(source, tmp_path / "copy", {**found.scales, "shifts": shifts})
        with pytest.raises(BundleError, match=message):
            Predictor(copy, backend="torch", device="cpu")


def with_shifts(source, path, scales):
    """A copy of the bundle with these scales, its hashes made right."""
    shutil.rmtree(path, ignore_errors=True)
    copy = Path(shutil.copytree(source, path))
    (copy / "scales.json").write_text(json.dumps(scales))
    manifest = json.loads((copy / MANIFEST).read_text())
    entry = {"sha256": sha256_of(copy / "scales.json"), "bytes": (copy / "scales.json").stat().st_size}
    manifest["files"]["scales.json"] = entry
    manifest["calibration"] = {"method": "minmax", "pairs": 6, "source": "drawn", "seed": 1}
    (copy / MANIFEST).write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))
    return copy


@pytest.mark.parametrize("smooth", ["on", 1.5, -0.1, float("nan")])
def test_smoothings_that_are_none(smooth, data, tmp_path):
    with pytest.raises(InputError, match="smooth: expected off, auto or a number from 0 to 1"):
        check_options(ExportOptions(tmp_path, precision="int8", calibration=data, smooth=smooth))


def test_smoothing_needs_pairs(tmp_path, capsys):
    with pytest.raises(InputError, match="smooth: expected calibration with it"):
        check_options(ExportOptions(tmp_path, precision="int8", smooth="auto"))
    for flags, message in (
        (["--smooth", "0.5"], "--smooth looks at the pairs of --calibration DIR: give that too"),
        (["--smooth", "2"], "expected off, auto or a number from 0 to 1, got '2'"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", "--precision", "int8", *flags])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
