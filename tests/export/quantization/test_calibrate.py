"""Scales by hand, values without a range, and bundles of an older version that rescaled channels."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

from engine import Bundle, Predictor
from engine.backends.torch import load_network, read_scales
from engine.bundle import MANIFEST
from engine.errors import BundleError, NumericalError
from engine.files import sha256_of
from engine.manifest import manifest_digest
from engine.network.linear import E4M3, Fp8Linear
from export.graph.rewrite import rewrite
from export.graph.trace import example_inputs
from export.quantization.calibrate import calibrate
from export.quantization.qdq import lowered_layers

LAYERS = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).requires_grad_(False)


def scales_of(batches, codes=torch.int8):
    LAYERS[0].weight[:] = torch.tensor([[2.0, 0.0], [0.0, -3.0]])
    feeds = [{"input": torch.tensor([values])} for values in batches]
    return calibrate(LAYERS, [("0", LAYERS[0]), ("1", LAYERS[1])], feeds, codes)


def test_scales_are_the_largest_magnitudes_at_the_largest_code():
    batches = [[1.0, 1.0], [-2.0, 1.5]]
    assert scales_of(batches) == {"0": 2 / 127, "1": pytest.approx(4.5 / 127)}
    assert scales_of(batches, torch.float8_e4m3fn)["0"] == 2 / 448
    assert not LAYERS[0]._forward_pre_hooks


def test_zeros_have_a_scale():
    assert all(scale > 0 for scale in scales_of([[0.0, 0.0]]).values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_without_a_range_is_an_error(value):
    """max() would keep the peak seen before a NaN."""
    with pytest.raises(NumericalError, match=f"0: the float32 network reads {value} there"):
        scales_of([[1.0, 1.0], [value, 1.0]])
    assert not LAYERS[0]._forward_pre_hooks


@pytest.fixture
def calibrated(bundle, tiny, tmp_path):
    """Make a copy of an fp8 bundle with `more` in its scales.json, and those scales."""
    model = rewrite(tiny("hammer").half().float())  # as the bundle holds the weights
    batches = [example_inputs(model.config, 2, 9, seed) for seed in range(2)]
    scales = calibrate(model, lowered_layers(model, "fp8"), batches, E4M3)

    def make(**more):
        copy = tmp_path / "bundle"
        shutil.copytree(bundle("hammer", "fp8").path, copy)
        file = copy / "scales.json"
        file.write_text(json.dumps({**scales, **more}))
        manifest = json.loads((copy / MANIFEST).read_text())
        manifest["files"][file.name] = {"sha256": sha256_of(file), "bytes": file.stat().st_size}
        manifest["calibration"] = {"method": "minmax", "pairs": 2, "source": "drawn", "seed": 1}
        (copy / MANIFEST).write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))
        return copy, scales

    return make


def test_torch_serves_a_bundle_with_its_scales(calibrated):
    path, scales = calibrated()
    opened = Bundle.open(path)
    assert read_scales(opened, list(scales)) == scales
    network = load_network(opened, torch.device("cpu"))
    for name, scale in scales.items():
        layer = network.get_submodule(name)
        assert isinstance(layer, Fp8Linear)
        assert layer.input_scale.unique().tolist() == [pytest.approx(scale, rel=2**-7)]  # a bfloat16 number


def test_a_bundle_of_rescaled_channels_is_refused(calibrated):
    """Its scales are for another network than the one that its weights make today."""
    path, _ = calibrated(shifts={"branch.cross.out": [1] * 128})
    expected = r"scales\.json: written with --smooth, which is no longer supported; export the bundle again"
    with pytest.raises(BundleError, match=expected):
        Predictor(path, backend="torch", device="cpu")
