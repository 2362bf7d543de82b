"""The configuration of a network from a manifest."""

from __future__ import annotations

import pytest

import dgm4
from dgm4 import config as trained
from engine.errors import BundleError
from engine.network import config
from engine.network.config import NetworkConfig


@pytest.mark.parametrize("size", ["base", "tiny"])
def test_fields_are_those_of_the_trained_network(name, size):
    want = dgm4.model_config(name, size)
    got = NetworkConfig.from_fields(want.to_dict())
    for field in NetworkConfig.__dataclass_fields__:
        assert getattr(got, field) == getattr(want, field)
    assert (got.grid, got.image_tokens) == (want.grid, want.image_tokens) == (16, 257)
    assert got.has_map == (name == "asap")


def test_constants_are_those_of_the_trained_network():
    for constant in ("BERT_EPS", "VIT_EPS", "TORCH_EPS"):
        assert getattr(config, constant) == getattr(trained, constant)
    assert config.NAMES == trained.MODEL_NAMES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "resnet"}, r"model\.config\.name: expected one of hammer, asap, cals, got 'resnet'"),
        ({"width": "768"}, r"model\.config\.width: expected an integer >= 1, got '768'"),
        ({"heads": 5}, r"model\.config\.heads: expected a divisor of width 128, got 5"),
        ({"caformer_heads": 3}, r"model\.config\.caformer_heads: expected a divisor of width 128"),
        ({"patch_size": 15}, r"model\.config\.patch_size: expected a divisor of image_size 256"),
        ({"fusion_start": 4}, r"model\.config\.fusion_start: expected less than text_depth 4"),
        ({"caformer_start": 4}, r"model\.config\.caformer_start: expected less than vision_depth 4"),
        ({"guidance_widths": [1, 2]}, r"model\.config\.guidance_widths: expected a list of three integers"),
        ({"guidance_widths": [1, 2, True]}, r"model\.config\.guidance_widths: expected a list of three"),
    ],
)
def test_fields_that_do_not_fit(change, message):
    with pytest.raises(BundleError, match=message):
        NetworkConfig.from_fields({**dgm4.model_config("cals", "tiny").to_dict(), **change})


def test_a_missing_field_is_named():
    fields = dgm4.model_config("asap", "tiny").to_dict()
    del fields["positions"]
    with pytest.raises(BundleError, match=r"model\.config\.positions: .* got nothing"):
        NetworkConfig.from_fields(fields)
