from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import dgm4
from dgm4.model import build
from engine.registry import NETWORKS, TRAINABLE
from export.bundle.licences import OWN, upstream


@pytest.mark.parametrize("entry", dgm4.list_models(), ids=lambda entry: f"{entry.name}-{entry.size}")
def test_parameters_are_those_of_the_network(entry):
    with torch.device("meta"):
        network = build(dgm4.model_config(entry.name, entry.size))
    assert entry.parameters == sum(parameter.numel() for parameter in network.parameters())


def test_every_network_is_listed_at_each_of_its_sizes():
    entries = {(entry.name, entry.size): entry for entry in dgm4.list_models()}
    assert set(entries) == {(name, size) for name, network in NETWORKS.items() for size in network.sizes}
    assert {key: entry.weights for key, entry in entries.items() if entry.weights} == {
        (name, "tiny"): "demo" if name in TRAINABLE else "drawn"
        for name, network in NETWORKS.items()
        if "tiny" in network.sizes
    }
    assert [entry.bundle for entry in entries.values() if entry.bundle] == ["demo:asap"]


def test_licences_are_those_that_cards_state():
    for entry in dgm4.list_models():
        theirs = upstream()[f"{NETWORKS[entry.name].title} (code, weights)"]
        assert entry.licence == (OWN if entry.weights else theirs)


def test_the_list_needs_no_torch():
    code = "import dgm4, sys; dgm4.list_models(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
