"""CSCL's rewrites against the published modules, in float64; and that a pair does not read its batch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import dgm4
from dgm4.models.cscl import sinusoid
from engine.network.blocks import Choice, LatentPool
from engine.network.fold import Affine, fold_latent_query, fold_positions, fold_type, position_codes
from engine.network.model import InferenceModel
from engine.network.models.cscl import image_places, text_places
from export.graph.choices import changed_choices, clear_inputs, margins
from export.graph.parity import case_inputs
from export.graph.trace import example_inputs

EXACT = 1e-10


def apart(got, want):
    return (got - want).abs().max().item()


def doubled(config, batch, tokens):
    inputs = example_inputs(config, batch, tokens)
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.fixture(scope="module")
def published():
    return dgm4.seeded_model("cscl", "tiny").double().requires_grad_(False)


@pytest.fixture(scope="module")
def network(published):
    return InferenceModel.from_released(published.state_dict(), published.config)


def of(layer):
    return Affine(layer.weight, layer.bias)


def test_codes_of_places_are_the_published_ones():
    places = torch.arange(7, dtype=torch.float64)
    assert apart(position_codes(places, 12), sinusoid(places, 12)) <= EXACT


def test_tables_of_positions(published):
    """For patches, y before x, and for words."""
    config = published.config
    image = fold_positions(image_places(config), *map(of, published.emb_img_pos))
    text = fold_positions(text_places(config), *map(of, published.emb_text_pos))
    assert apart(image, published.image_positions()) <= EXACT
    assert apart(text[:9], published.text_positions(9)) <= EXACT


def test_the_type_of_a_stream_is_part_of_the_bias(published):
    linear, row = published.meter.cross_modal_image_transform, published.meter.token_type_embeddings.weight[1]
    x = published.meter.vit_model.visual.positional_embedding
    assert apart(F.linear(x, *fold_type(of(linear), row)), linear(x) + row) <= EXACT


def test_a_latent_query_over_padding(published):
    """The bias of the keys cancels with a mask, too."""
    extra, heads = published.text_extra_model, published.config.heads
    attention, norm = extra.aggregator_feat, extra.norm_layer_feat
    packed = Affine(attention.in_proj_weight, attention.in_proj_bias)
    folded = fold_latent_query(extra.cls_token_feat, of(norm), packed, heads)
    layers = {"norm": of(norm), "out": of(attention.out_proj)}
    state = {f"{name}.{k}": v for name, layer in layers.items() for k, v in layer._asdict().items()}
    pool = LatentPool(published.config.width, heads)
    pool.load_state_dict(state | folded._asdict(), assign=True)
    tokens = torch.randn(3, 9, published.config.width, dtype=torch.float64)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).int()
    query = norm(extra.cls_token_feat).expand(3, -1, -1)
    bias = torch.zeros(3, 1, 1, 9).masked_fill(mask[:, None, None] == 0, float("-inf")).double()
    assert apart(pool(tokens, mask), attention(query, norm(tokens), bias)[:, 0]) <= EXACT


@pytest.mark.parametrize("tokens", [9, 14])
def test_whole_network(published, network, tokens):
    inputs = doubled(published.config, 3, tokens)
    for answer, want in zip(network(**inputs), published(**inputs), strict=True):
        assert (answer is None and want is None) or apart(answer, want) <= EXACT


@pytest.mark.parametrize("words", [1, 3, 8])
def test_a_pair_answers_as_alone(published, network, words):
    """Beside a longer caption and padding; trimmed to its words, which may be fewer than neighbours."""
    inputs = doubled(published.config, 2, 20)
    inputs["attention_mask"][1] = torch.arange(20) <= words
    inputs["input_ids"] *= inputs["attention_mask"]
    together = network(**inputs)
    trimmed = {k: v[1:] if k == "image" else v[1:, : words + 1] for k, v in inputs.items()}
    alone = published(**trimmed)
    for name in ("logits_real_fake", "logits_multicls", "box", "patch_scores"):
        assert apart(getattr(together, name)[1:], getattr(alone, name)) <= EXACT, name
    assert apart(together.logits_tok[1:, :words], alone.logits_tok) <= EXACT


def test_a_caption_without_words_keeps_the_verdict_finite(published, network):
    inputs = doubled(published.config, 2, 12)
    inputs["attention_mask"][1, 1:] = 0
    answer, whole = network(**inputs), published(**inputs)
    assert all(x.isfinite().all() for x in answer if x is not None)
    assert apart(answer.logits_real_fake, whole.logits_real_fake) <= EXACT


def test_the_box_is_empty_where_no_face_type_is_seen(published, network):
    inputs = doubled(published.config, 1, 12)
    bias = network.image_classes[-1].bias
    kept = bias.clone()
    boxes = []
    for logit in (-100.0, 100.0):
        bias.copy_(torch.tensor([logit, -100.0]))
        boxes.append(network(**inputs).box)
    bias.copy_(kept)
    assert not boxes[0].any()
    assert boxes[1].all()


def test_choices():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    high, low = Choice(2)(scores, scores)
    assert (high.tolist(), low.tolist()) == ([[1, 3]], [[0, 2]])
    high, low = Choice(2)(scores, scores, torch.tensor([[0, 0, 1, 1]]))
    assert (high.tolist(), low.tolist()) == ([[3, 2]], [[2, 3]])


def test_margins_are_those_of_the_nearest_choice():
    class Chooser(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.choice = Choice(2)

        def forward(self, high, low, valid=None):
            self.choice(high, low, valid)

    high = torch.tensor([[0.1, 0.9, 0.5, 0.8], [0.2, 0.2, 0.4, 0.6]])
    low = torch.tensor([[0.0, 0.2, 0.3, 0.9], [0.1, 0.3, 0.3, 0.5]])
    inputs = {"high": high, "low": low}
    assert margins(Chooser(), inputs).tolist() == pytest.approx([0.1, 0.0])
    valid = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])  # of the second pair both are taken
    assert margins(Chooser(), {**inputs, "valid": valid}).tolist() == pytest.approx([0.7, float("inf")])
    assert margins(torch.nn.Identity(), {"input": high}).tolist() == [float("inf")] * 2


def test_a_network_that_chooses_nothing_has_the_inputs_of_all(tiny):
    model = InferenceModel.from_released(tiny("asap").state_dict(), tiny("asap").config)
    inputs, margin = clear_inputs(model)
    assert margin == float("inf")
    for got, want in zip(inputs, case_inputs(model.config), strict=True):
        assert all(torch.equal(got[name], x) for name, x in want.items())


def test_changed_choices_are_counted(network, tiny):
    inputs = [doubled(network.config, 2, 12)]
    same, total = changed_choices(network, network, inputs)
    patches, words = 2 * (256 + 1) * 2 * 16, (11 + 6) * (8 + 6)
    assert same == 0
    assert patches < total < patches + 2 * words + 64
    weights = tiny("cscl", torch.float64, seed=2).state_dict()
    other = InferenceModel.from_released(weights, network.config)
    assert 0 < changed_choices(network, other, inputs)[0] < total
    assert changed_choices(torch.nn.Linear(2, 2), other, inputs) == (0, 0)
