"""What numbers do not show at 2e-5: eps, heads, masks; and the names and shapes of released checkpoints."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

import dgm4
from dgm4 import checkpoint, config
from dgm4.models.cals import Cals
from engine.errors import InputError
from engine.registry import NETWORKS

PARAMETERS = {"hammer": 227.9, "asap": 230.2, "cals": 235.9}  # millions, live at inference

EPS = (
    (r"text_encoder\.bert\..*", 1e-12),
    (r"visual_encoder\.(blocks\.\d+\.norm[12]|norm)", 1e-6),
    (r"visual_encoder\.MHA2\.layer_norm[12]", 1e-5),
    (r"visual_encoder\.Conv\.bn2", 1e-5),
    (r"norm_layer_(it_cross_atten|aggr)", 1e-5),
    (r"(text_encoder\.classifier|itm_head|cls_head|bbox_head)\.[14]", 1e-5),
)


def on_meta(name, size="base"):
    with torch.device("meta"):
        return dgm4.create_model(name, size)


@pytest.mark.parametrize("size", dgm4.SIZES)
def test_every_norm_has_the_published_eps(name, size):
    norms = {
        key: module.eps
        for key, module in on_meta(name, size).named_modules()
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d)
    }
    expected = {key: next(eps for pattern, eps in EPS if re.fullmatch(pattern, key)) for key in norms}
    assert norms == expected
    assert set(norms.values()) == {1e-12, 1e-6, 1e-5}


def test_base_shape(name):
    model = on_meta(name)
    shape = model.config
    assert (shape.width, shape.heads, shape.head_width, shape.grid, shape.image_tokens) == (
        768,
        12,
        64,
        16,
        257,
    )
    assert (shape.vision_depth, shape.text_depth, shape.fusion_start) == (12, 12, 6)
    assert {block.attn.heads for block in model.visual_encoder.blocks} == {12}
    for i, layer in enumerate(model.text_encoder.bert.encoder.layer):
        assert layer.attention.self.heads == 12
        assert hasattr(layer, "crossattention") == (i >= 6)
    assert model.aggregator.heads == 12
    assert model.has_map == (name == "asap")


def test_heads_of_the_image_branch():
    attend = on_meta("asap").it_cross_attn
    assert (attend.selfatten.heads, attend.crossatten.heads) == (12, 12)
    assert on_meta("hammer").it_cross_attn.heads == 12
    cals = on_meta("cals")
    assert cals.it_cross_attn.heads == 12
    assert cals.visual_encoder.MHA2.mha.heads == 8, "8 heads of 96"
    assert cals.visual_encoder.start == 8
    assert isinstance(cals.visual_encoder.MHA2.ffn[1], nn.ReLU)


@pytest.mark.parametrize(("name", "classes"), [("hammer", 4), ("asap", 4), ("cals", 2)])
def test_outputs_of_the_heads(name, classes):
    model = on_meta(name)
    heads = (model.itm_head, model.cls_head, model.bbox_head, model.text_encoder.classifier)
    assert [head[-1].out_features for head in heads] == [2, classes, 4, 2]
    for head in heads:
        assert [type(layer) for layer in head] == [
            *(nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear)
        ]
        assert {layer.approximate for layer in head if isinstance(layer, nn.GELU)} == {"none"}


def test_masked_scores_are_those_of_the_published_code():
    assert config.BERT_MASK == -10000.0


def test_bert_adds_its_mask_and_the_image_branch_removes(name, tiny, monkeypatch):
    """-10000 in BERT, -inf in the picture's attention over the caption."""
    import dgm4.model
    import dgm4.text
    from dgm4.layers import padding_bias

    seen = []

    def spy(mask, value, dtype):
        seen.append(value)
        return padding_bias(mask, value, dtype)

    monkeypatch.setattr(dgm4.model, "padding_bias", spy)
    monkeypatch.setattr(dgm4.text, "padding_bias", spy)
    ids = torch.tensor([[2, 1000, 0]])
    with torch.inference_mode():
        tiny(name)(torch.zeros(1, 3, 256, 256), ids, (ids != 0).long())
    assert seen == [-10000.0, float("-inf")]


def test_parameter_counts_are_the_published_ones(name):
    millions = sum(p.numel() for p in on_meta(name).parameters()) / 1e6
    assert millions == pytest.approx(PARAMETERS[name], abs=0.05)


def test_live_keys_are_those_of_the_released_checkpoint(name, golden_keys):
    """Every key that the loader does not call dead is a parameter or a buffer of the same shape, and back."""
    dead = NETWORKS[name].keys.dead
    live = {key: shape for key, shape in golden_keys(name) if not checkpoint._is_dead(key, dead)}
    state = {k: tuple(v.shape) for k, v in on_meta(name).state_dict().items()}
    assert live == {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def test_dead_keys_are_the_ones_that_inference_never_reads(name, golden_keys):
    """By first names, from the notes on the released files; nothing else may be dropped in silence."""
    dead = NETWORKS[name].keys.dead
    dropped = {key for key, _ in golden_keys(name) if checkpoint._is_dead(key, dead)}
    firsts = {key.split(".", 1)[0] for key in dropped}
    allowed = {"temp", "vision_proj", "text_proj", "patch_head", "itm_head_m", "queue_ptr"}
    towers = {first for first in firsts if first.endswith(("_m", "_queue"))}
    assert firsts - towers - allowed <= {"visual_encoder", "text_encoder"}
    unused = (
        r"visual_encoder\.(CoordConv|usam_pre|MHA1|MHA3|fl1_mlp|fl2_mlp|Conv\.bn2\.num_batches_tracked)\b.*"
    )
    for key in dropped:
        if key.startswith("visual_encoder."):
            assert re.fullmatch(unused, key), key
        if key.startswith("text_encoder."):
            assert key.endswith("position_ids"), key


@pytest.mark.parametrize("size", dgm4.SIZES)
def test_config_survives_json(name, size):
    shape = dgm4.model_config(name, size)
    assert config.ModelConfig.from_dict(json.loads(json.dumps(shape.to_dict()))) == shape


@pytest.mark.parametrize(
    ("name", "size", "expected"), [("hamer", "base", "hammer, asap"), ("asap", "large", "tiny")]
)
def test_unknown_name_or_size(name, size, expected):
    with pytest.raises(InputError, match=expected):
        dgm4.create_model(name, size)


def test_networks_by_name():
    assert isinstance(on_meta("cals", "tiny"), Cals)
    assert dgm4.TYPES == ("face_swap", "face_attribute", "text_swap", "text_attribute")
