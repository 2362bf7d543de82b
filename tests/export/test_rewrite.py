"""Every exact rewrite against the modules it replaces, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dgm4.layers import PackedAttention, padding_bias
from dgm4.text import BertAttention
from export.rewrite import (
    ConvFusion,
    CrossAttention,
    Norm,
    SelfAttention,
    fold_conv_fusion,
    fold_latent_query,
    linear,
    split_packed,
    stack_linears,
)

EXACT = 1e-10
WIDTH, HEADS = 24, 4


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(module):
    """The module in float64 with every parameter and running statistic drawn."""
    module = module.double().eval()
    with torch.no_grad():
        for i, tensor in enumerate([*module.parameters(), *module.buffers()]):
            if tensor.is_floating_point():
                tensor.copy_(random(*tensor.shape, seed=100 + i) * (0.3 if tensor.dim() > 1 else 1))
        for other in module.modules():
            if isinstance(other, nn.BatchNorm2d):
                other.running_var.abs_().add_(0.1)
    return module


def apart(got, want):
    return (got - want).abs().max().item()


MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)


@pytest.fixture
def packed():
    return shaken(PackedAttention(WIDTH, HEADS))


@pytest.fixture
def bert():
    from dataclasses import replace

    import dgm4

    return shaken(BertAttention(replace(dgm4.model_config("hammer", "tiny"), width=WIDTH, heads=HEADS)))


def infinite(mask):
    return padding_bias(mask, float("-inf"), torch.float64)


def test_linear_shares_its_parameters():
    weight, bias = random(5, 3), random(5)
    layer = linear(weight, bias)
    assert apart(layer(random(2, 3)), random(2, 3) @ weight.T + bias) <= EXACT
    assert layer.weight.data_ptr() == weight.data_ptr()
    assert not any(p.requires_grad for p in layer.parameters())


def test_stacked_linears_answer_side_by_side():
    layers = [shaken(nn.Linear(WIDTH, out)) for out in (5, 1, 7)]
    x = random(2, 3, WIDTH)
    assert apart(stack_linears(layers)(x), torch.cat([layer(x) for layer in layers], -1)) <= EXACT


def test_split_packed_is_a_view(packed):
    for part, layer in enumerate(split_packed(packed)):
        rows = slice(part * WIDTH, (part + 1) * WIDTH)
        assert torch.equal(layer.weight, packed.in_proj_weight[rows])
        assert torch.equal(layer.bias, packed.in_proj_bias[rows])
        assert layer.weight.untyped_storage().data_ptr() == packed.in_proj_weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-5])
def test_norm_keeps_its_eps_and_its_dtype(eps):
    norm = shaken(nn.LayerNorm(WIDTH, eps=eps))
    x = random(2, 3, WIDTH) * 1e-4
    assert Norm(norm).eps == eps
    assert apart(Norm(norm)(x), norm(x)) <= EXACT
    island = Norm(norm.float())
    half = island(x.half())
    assert half.dtype == torch.float16
    assert torch.equal(half, norm(x.half().float()).half())


@pytest.mark.parametrize("masked", [False, True])
def test_self_attention_is_the_packed_one(packed, masked):
    x = random(3, 7, WIDTH)
    mask = MASK if masked else None
    want = packed(x, x, infinite(MASK) if masked else None)
    assert apart(SelfAttention.from_packed(packed)(x, mask), want) <= EXACT


def test_self_attention_is_berts(bert):
    """One product for three; -10000 and leaving a key out give the same where any key is valid."""
    x = random(3, 7, WIDTH)
    fused = SelfAttention.from_projections(bert.self, bert.output.dense)
    want = bert(x, x, padding_bias(MASK, -10000.0, torch.float64))
    assert apart(bert.output.LayerNorm(fused(x, MASK) + x), want) <= EXACT
    assert fused.qkv.out_features == 3 * WIDTH


def test_cross_attention_is_the_packed_one(packed):
    """Also when its keys and values are read twice (rewrite 7)."""
    memory = random(3, 7, WIDTH, seed=1)
    cross = CrossAttention.from_packed(packed)
    key, value = cross.project(memory)
    for seed, queries in ((2, 9), (3, 1)):
        x = random(3, queries, WIDTH, seed=seed)
        assert apart(cross(x, key, value, MASK), packed(x, memory, infinite(MASK))) <= EXACT
        assert apart(cross(x, key, value), packed(x, memory)) <= EXACT


@pytest.mark.parametrize("stacked", [False, True])
def test_cross_attention_is_berts(bert, stacked):
    x, memory = random(3, 7, WIDTH), random(3, 17, WIDTH, seed=1)
    cross = CrossAttention.from_projections(bert.self, bert.output.dense, stacked)
    if stacked:
        key, value = stack_linears([bert.self.key, bert.self.value])(memory).chunk(2, -1)
    else:
        key, value = cross.project(memory)
    want, scores = bert.with_scores(x, memory)
    norm = bert.output.LayerNorm
    assert apart(norm(cross(x, key, value) + x), want) <= EXACT
    guided, guide = cross.guided(x, key, value)
    assert apart(norm(guided + x), want) <= EXACT
    assert apart(guide, scores) <= EXACT


def test_stacked_cross_attention_has_no_product_of_its_own(bert):
    cross = CrossAttention.from_projections(bert.self, bert.output.dense, stacked=True)
    with pytest.raises(ValueError, match="stacked product"):
        cross.project(random(1, 2, WIDTH))


def test_conv_fusion_is_the_published_fusion(tiny):
    """With running statistics far from those of a fresh BatchNorm."""
    vision = shaken(tiny("cals").visual_encoder)
    image, x = random(2, 3, 256, 256), random(2, 257, 128, seed=1)
    with torch.no_grad():
        fold = fold_conv_fusion(vision)
        want = vision.fuse(x, image)
        got = fold(image, vision.MHA2(x))
    assert isinstance(fold, ConvFusion)
    assert fold.weight.shape == (4 * 128, 3, 6, 6)
    assert apart(got, want) <= EXACT


def test_conv_fusion_is_folded_in_float64_and_cast_back(tiny):
    vision = tiny("cals").visual_encoder
    fold = fold_conv_fusion(vision)
    exact = fold_conv_fusion(copy.deepcopy(vision).double())
    assert fold.weight.dtype == torch.float32
    assert torch.equal(fold.weight, exact.weight.float())
    assert torch.equal(fold.bias, exact.bias.float())


def test_conv_fusion_refuses_what_it_cannot_fold(tiny):
    from dataclasses import replace

    import dgm4
    from dgm4.vision import CAFormer

    vision = tiny("cals").visual_encoder
    vision.Conv.bn2 = nn.BatchNorm2d(128, track_running_stats=False)
    with pytest.raises(ValueError, match="no running statistics"):
        fold_conv_fusion(vision)
    with pytest.raises(ValueError, match="expected a 5x5 convolution to fold, got"):
        fold_conv_fusion(CAFormer(replace(dgm4.model_config("cals", "tiny"), caformer_kernel=3)))


@pytest.mark.parametrize("query", ["cls_token_local", "cls_token_local_e"])
def test_latent_query_is_the_published_aggregation(tiny, query):
    model = shaken(tiny("cals"))
    tokens = random(3, 257, 128)
    latent = getattr(model, query)
    pool = fold_latent_query(latent, model.norm_layer_aggr, model.aggregator)
    assert pool.query.shape == (2, 128)
    with torch.no_grad():
        assert apart(pool(tokens[:, 1:]), model.aggregate(latent, tokens)) <= EXACT


def test_latent_query_is_folded_in_float64_and_cast_back(tiny):
    model = tiny("hammer")
    exact = copy.deepcopy(model).double()
    pools = [fold_latent_query(m.cls_token_local, m.norm_layer_aggr, m.aggregator) for m in (model, exact)]
    for key in ("query", "value", "bias"):
        small, large = (getattr(pool, key) for pool in pools)
        assert small.dtype == torch.float32
        assert torch.equal(small, large.float())


def test_the_modules_given_stay_as_they_are(tiny):
    model = tiny("cals")
    before = copy.deepcopy(model.state_dict())
    fold_conv_fusion(model.visual_encoder)
    fold_latent_query(model.cls_token_local, model.norm_layer_aggr, model.aggregator)
    CrossAttention.from_packed(model.it_cross_attn)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
