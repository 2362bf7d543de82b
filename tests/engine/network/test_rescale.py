"""Rescaled channels: the network answers the same to the last bit, and its layers read what was meant."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.network.precision import fp8_layers
from engine.network.rescale import rescale, seams
from export.graph.rewrite import rewrite
from export.graph.trace import example_inputs
from export.quantization.qdq import int8_layers


def drawn_shifts(model, names=None):
    generator = torch.Generator().manual_seed(3)
    return {
        seam.name: torch.randint(-5, 6, (width_of(model, seam),), generator=generator).tolist()
        for seam in seams(model)
        if names is None or seam.name in names
    }


def width_of(model, seam):
    return model.get_submodule(seam.name).in_features


def answer(model, inputs):
    with torch.inference_mode():
        return [x for x in model(**inputs) if x is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_answers_are_the_same_to_the_last_bit(name, dtype, tiny):
    model = rewrite(tiny(name, dtype))
    inputs = example_inputs(model.config, 2, 9)
    before = answer(model, inputs)
    weights = {id(p): p.clone() for p in model.parameters()}
    kept = list(model.parameters())
    after = answer(rescale(model, drawn_shifts(model)), inputs)
    assert len(before) == (5 if name == "asap" else 4)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert all(torch.equal(p, weights[id(p)]) for p in kept), "the tensors it was made of stay"


def test_the_layers_read_the_channels_divided(name, tiny):
    """Every reader of every seam, and no other layer."""
    plain, rescaled = rewrite(tiny(name, torch.float64)), rewrite(tiny(name, torch.float64))
    shifts = drawn_shifts(rescaled)
    rescale(rescaled, shifts)
    factor = {r: torch.tensor(shifts[s.name]).exp2() for s in seams(plain) for r in s.consumers}
    inputs = example_inputs(plain.config, 1, 6)
    read = [watched(model, inputs) for model in (plain, rescaled)]
    assert read[0].keys() == read[1].keys()
    for key, calls in read[0].items():
        for x, y in zip(calls, read[1][key], strict=True):
            assert torch.equal(y * factor.get(key, 1), x), key


def watched(model, inputs):
    """What each Linear reads, by its first name."""
    read, handles = {}, []
    for key, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            keep = lambda _, x, key=key: read.setdefault(key, []).append(x[0])  # noqa: E731
            handles.append(layer.register_forward_pre_hook(keep))
    answer(model, inputs)
    for handle in handles:
        handle.remove()
    return read


def test_which_layers_can_be_smoothed(name, tiny):
    model = rewrite(tiny(name))
    names = [seam.name for seam in seams(model)]
    readers = [reader for seam in seams(model) for reader in seam.consumers]
    assert len(names) == {"hammer": 22, "asap": 23, "cals": 24}[name]
    assert len(set(readers)) == len(readers), "a layer's columns are rescaled once"
    eight = {key for key, _ in int8_layers(model)}
    float8 = {key for key, _ in fp8_layers(model)}
    assert len(eight & {*readers}) == {"hammer": 25, "asap": 25, "cals": 27}[name]
    assert len(float8 & {*readers}) == {"hammer": 21, "asap": 21, "cals": 23}[name]
    residual = {"text.text_layers.0.up", "text.text_layers.0.attention.qkv", "text.key_values"}
    gelu = {"vision.blocks.0.mlp.fc2", "text.text_layers.0.down", "text.classifier.3"}
    assert not (residual | gelu) & {*readers}


def test_what_cannot_be_rescaled(tiny):
    model = rewrite(tiny("hammer"))
    with pytest.raises(ValueError, match=r"text\.text_layers\.0\.up: no channels can be rescaled there"):
        rescale(model, {"text.text_layers.0.up": [0] * 128})
    with pytest.raises(ValueError, match=r"branch\.cross\.out: expected \d+ shifts, got 3"):
        rescale(model, {"branch.cross.out": [1, 2, 3]})
