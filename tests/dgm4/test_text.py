"""BERT against transformers' own, with the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import dgm4
from dgm4.seeded import draw
from dgm4.text import Bert, TextEncoder

EXACT = 1e-10
CONFIG = replace(
    dgm4.model_config("hammer", "tiny"),
    width=48,
    heads=3,
    text_depth=4,
    fusion_start=2,
    vocabulary=60,
    positions=20,
)


def drawn(module):
    state = {k: torch.from_numpy(draw(k, tuple(v.shape), 1)) for k, v in module.state_dict().items()}
    module.load_state_dict(state)
    return module.double().eval()


@pytest.fixture(scope="module")
def bert():
    return drawn(Bert(CONFIG))


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")

    def config(**fields):
        made = transformers.BertConfig(
            vocab_size=CONFIG.vocabulary,
            hidden_size=CONFIG.width,
            num_hidden_layers=CONFIG.fusion_start,
            num_attention_heads=CONFIG.heads,
            intermediate_size=CONFIG.mlp_ratio * CONFIG.width,
            max_position_embeddings=CONFIG.positions,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **fields,
        )
        made._attn_implementation = "eager"
        return made

    return config


@pytest.fixture(scope="module")
def caption():
    ids = torch.randint(1, 60, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(11)[None] < torch.tensor([[11], [6], [1]])).long()
    return ids * mask, mask


def test_defaults_of_transformers_are_berts(theirs):
    assert theirs().layer_norm_eps == 1e-12
    assert theirs().hidden_act == "gelu"


def test_text_layers_are_transformers(bert, theirs, caption):
    from transformers import BertModel

    other = BertModel(theirs(), add_pooling_layer=False).double().eval()
    ours = {
        k: v for k, v in bert.state_dict().items() if not k.startswith(("encoder.layer.2", "encoder.layer.3"))
    }
    other.load_state_dict(ours, strict=True)
    ids, mask = caption
    with torch.inference_mode():
        want = other(input_ids=ids, attention_mask=mask).last_hidden_state
        got, _ = bert.encode_text(ids, mask)
    valid = mask.bool()
    assert (got - want)[valid].abs().max() <= EXACT


def test_fusion_layer_is_transformers(bert, theirs, caption):
    """One layer with cross-attention, over a picture of another length."""
    from transformers.models.bert.modeling_bert import BertLayer

    other = BertLayer(theirs(is_decoder=True, add_cross_attention=True), layer_idx=0).double().eval()
    layer = bert.encoder.layer[2]
    other.load_state_dict(layer.state_dict(), strict=True)
    random = torch.Generator().manual_seed(3)
    text = torch.randn(3, 11, 48, generator=random, dtype=torch.float64)
    image = torch.randn(3, 17, 48, generator=random, dtype=torch.float64)
    _, mask = caption
    bias = torch.zeros(3, 1, 1, 11, dtype=torch.float64).masked_fill(mask[:, None, None] == 0, -10000.0)
    with torch.inference_mode():
        want = other(text, attention_mask=bias, encoder_hidden_states=image)
        want = want[0] if isinstance(want, tuple) else want
        x = layer.crossattention(layer.attention(text, text, bias), image)
        got = layer.feed_forward(x)
    assert (got - want).abs().max() <= EXACT


def test_a_fully_masked_caption_is_read_as_if_unmasked(bert, caption):
    """-10000 on every score cancels in the softmax; -inf would give NaN."""
    ids, mask = caption
    with torch.inference_mode():
        masked, bias = bert.encode_text(ids, torch.zeros_like(mask))
        plain, _ = bert.encode_text(ids, torch.ones_like(mask))
    assert (bias == -10000.0).all()
    assert (masked - plain).abs().max() <= EXACT


def test_padding_changes_no_valid_token(bert, caption):
    ids, mask = caption
    with torch.inference_mode():
        long, _ = bert.encode_text(ids[1:2], mask[1:2])
        short, _ = bert.encode_text(ids[1:2, :6], mask[1:2, :6])
    assert (long[:, :6] - short).abs().max() <= EXACT


def test_scores_are_the_mean_over_heads_before_the_softmax(bert):
    random = torch.Generator().manual_seed(3)
    text = torch.randn(2, 5, 48, generator=random, dtype=torch.float64)
    image = torch.randn(2, 17, 48, generator=random, dtype=torch.float64)
    cross = bert.encoder.layer[3].crossattention
    with torch.inference_mode():
        out, scores = cross.with_scores(text, image)
        query = F.linear(text, cross.self.query.weight, cross.self.query.bias).reshape(2, 5, 3, 16)
        key = F.linear(image, cross.self.key.weight, cross.self.key.bias).reshape(2, 17, 3, 16)
        want = torch.einsum("bnhd,bmhd->bnm", query, key) / 4 / 3
        assert (scores - want).abs().max() <= EXACT
        assert (out - cross(text, image)).abs().max() <= EXACT


def test_map_is_that_of_the_last_fusion_layer_and_changes_nothing(bert, caption):
    ids, mask = caption
    image = torch.randn(3, 17, 48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.inference_mode():
        text, bias = bert.encode_text(ids, mask)
        plain, none = bert.fuse(text, bias, image, with_scores=False)
        guided, scores = bert.fuse(text, bias, image, with_scores=True)
    assert none is None
    assert scores.shape == (3, 11, 17)
    assert (plain - guided).abs().max() <= EXACT


def test_classifier_answers_two_logits_a_token():
    encoder = TextEncoder(CONFIG)
    assert encoder.classifier(torch.zeros(2, 5, CONFIG.width)).shape == (2, 5, 2)
