"""The configuration of a network, which training and serving share."""

from __future__ import annotations

import json

import pytest

import dgm4
from engine.errors import BundleError
from engine.registry import network_of
from engine.registry.config import NetworkConfig


@pytest.mark.parametrize("size", ["base", "tiny"])
def test_a_manifest_gives_the_config_of_the_trained_network(name, size):
    want = dgm4.model_config(name, size)
    got = NetworkConfig.from_fields(json.loads(json.dumps(want.to_dict())))
    assert got == want
    assert (got.grid, got.image_tokens) == (16, 257)
    assert (network_of(got).heatmap is not None) == (name == "asap")


def test_older_files_have_the_fields_of_every_network():
    old = dgm4.model_config("cals", "tiny").to_dict() | {"name": "asap"}
    assert NetworkConfig.from_fields(old) == dgm4.model_config("asap", "tiny")
    with pytest.raises(BundleError, match=r"model\.config\.surprise: expected no field of this name"):
        NetworkConfig.from_fields(old | {"surprise": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "resnet"}, r"model\.config\.name: expected one of hammer, asap, cals, .*got 'resnet'"),
        ({"width": "768"}, r"model\.config\.width: expected an integer from 1 to 16384, got '768'"),
        ({"heads": 5}, r"model\.config\.heads: expected a divisor of width 128, got 5"),
        ({"caformer_heads": 3}, r"model\.config\.caformer_heads: expected a divisor of width 128"),
        ({"patch_size": 15}, r"model\.config\.patch_size: expected a divisor of image_size 256"),
        ({"fusion_start": 4}, r"model\.config\.fusion_start: expected less than text_depth 4"),
        ({"caformer_start": 4}, r"model\.config\.caformer_start: expected less than vision_depth 4"),
        ({"guidance_widths": [1, 2]}, r"model\.config\.guidance_widths: expected a list of 3"),
        (
            {"guidance_widths": [1, 2, True]},
            r"model\.config\.guidance_widths\[2\]: expected an integer",
        ),
        ({"caformer_kernels": []}, r"model\.config\.caformer_kernels: expected at least one integer"),
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
