"""Every exact rewrite against the modules it replaces, in float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import dgm4
from dgm4.layers import PackedAttention, padding_bias
from dgm4.models.cals import PatchClassifier as TrainedClassifier
from dgm4.text import BertAttention
from engine.errors import CheckpointError
from engine.network.blocks import (
    ConvFusion,
    CrossAttention,
    LatentPool,
    Norm,
    SelfAttention,
)
from engine.network.fold import (
    Affine,
    Statistics,
    fold_cls,
    fold_conv_fusion,
    fold_latent_query,
    fold_places,
    split_packed,
    stack,
    stack_gates,
)
from engine.network.models.cals import PatchClassifier
from kernels.conv_fusion import pack

EXACT = 1e-10
WIDTH, HEADS = 24, 4


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(module):
    """The module in float64 with every parameter and running statistic drawn."""
    module = module.double().eval().requires_grad_(False)
    for i, tensor in enumerate([*module.parameters(), *module.buffers()]):
        if tensor.is_floating_point():
            tensor.copy_(random(*tensor.shape, seed=100 + i) * (0.3 if tensor.dim() > 1 else 1))
    for other in module.modules():
        if isinstance(other, nn.BatchNorm2d):
            other.running_var.abs_().add_(0.1)
    return module


def apart(got, want):
    return (got - want).abs().max().item()


def affine(layer):
    return Affine(layer.weight, layer.bias)


def packed_of(attention):
    return Affine(attention.in_proj_weight, attention.in_proj_bias)


def filled(module, **layers):
    """A block of the inference network with these layers and tensors, and no others."""
    state = {}
    for name, value in layers.items():
        named = value._asdict() if hasattr(value, "_asdict") else {"": value}
        state |= {f"{name}.{key}".rstrip("."): tensor for key, tensor in named.items()}
    module.load_state_dict(state, assign=True)
    return module


def self_attention(qkv, out):
    return filled(SelfAttention(WIDTH, HEADS), qkv=qkv, out=affine(out))


def cross_attention(query, key_value, out):
    layers = {"query": query, "out": affine(out)}
    if key_value is not None:
        layers["key_value"] = key_value
    return filled(CrossAttention(WIDTH, HEADS, stacked=key_value is None), **layers)


def conv_fusion_of(vision):
    branch = vision.Conv
    statistics = Statistics(branch.bn2.running_mean, branch.bn2.running_var)
    return fold_conv_fusion(branch.conv.weight, affine(branch.bn2), statistics)


def query_of(model, query="cls_token_local"):
    packed = packed_of(model.aggregator)
    return fold_latent_query(getattr(model, query), affine(model.norm_layer_aggr), packed, model.config.heads)


MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)


@pytest.fixture
def packed():
    return shaken(PackedAttention(WIDTH, HEADS))


@pytest.fixture
def bert():
    return shaken(BertAttention(replace(dgm4.model_config("hammer", "tiny"), width=WIDTH, heads=HEADS)))


def infinite(mask):
    return padding_bias(mask, float("-inf"), torch.float64)


def test_stacked_linears_answer_side_by_side():
    layers = [shaken(nn.Linear(WIDTH, out)) for out in (5, 1, 7)]
    x = random(2, 3, WIDTH)
    stacked = stack([affine(layer) for layer in layers])
    assert apart(nn.functional.linear(x, *stacked), torch.cat([layer(x) for layer in layers], -1)) <= EXACT


def test_split_packed_is_a_view(packed):
    for part, layer in enumerate(split_packed(packed_of(packed))):
        rows = slice(part * WIDTH, (part + 1) * WIDTH)
        assert torch.equal(layer.weight, packed.in_proj_weight[rows])
        assert torch.equal(layer.bias, packed.in_proj_bias[rows])
        assert layer.weight.untyped_storage().data_ptr() == packed.in_proj_weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-5])
def test_norm_keeps_its_eps_and_its_dtype(eps):
    norm = shaken(nn.LayerNorm(WIDTH, eps=eps))
    x = random(2, 3, WIDTH) * 1e-4
    own = filled(Norm(WIDTH, eps), weight=norm.weight, bias=norm.bias)
    assert apart(own(x), norm(x)) <= EXACT
    half = own.float()(x.half())
    assert half.dtype == torch.float16
    assert torch.equal(half, norm.float()(x.half().float()).half())


@pytest.mark.parametrize("masked", [False, True])
def test_self_attention_is_the_packed_one(packed, masked):
    x = random(3, 7, WIDTH)
    mask = MASK if masked else None
    want = packed(x, x, infinite(MASK) if masked else None)
    assert apart(self_attention(packed_of(packed), packed.out_proj)(x, mask), want) <= EXACT


def test_self_attention_is_berts(bert):
    """One product for three; -10000 and leaving a key out give the same where any key is valid."""
    x = random(3, 7, WIDTH)
    qkv = stack([affine(layer) for layer in (bert.self.query, bert.self.key, bert.self.value)])
    fused = self_attention(qkv, bert.output.dense)
    want = bert(x, x, padding_bias(MASK, -10000.0, torch.float64))
    assert apart(bert.output.LayerNorm(fused(x, MASK) + x), want) <= EXACT
    assert fused.qkv.weight.shape == (3 * WIDTH, WIDTH)


def test_cross_attention_is_the_packed_one(packed):
    """Also when its keys and values are read twice (rewrite 7)."""
    memory = random(3, 7, WIDTH, seed=1)
    query, *key_value = split_packed(packed_of(packed))
    cross = cross_attention(query, stack(key_value), packed.out_proj)
    key, value = cross.project(memory)
    for seed, queries in ((2, 9), (3, 1)):
        x = random(3, queries, WIDTH, seed=seed)
        assert apart(cross(x, key, value, MASK), packed(x, memory, infinite(MASK))) <= EXACT
        assert apart(cross(x, key, value), packed(x, memory)) <= EXACT


@pytest.mark.parametrize("stacked", [False, True])
def test_cross_attention_is_berts(bert, stacked):
    x, memory = random(3, 7, WIDTH), random(3, 17, WIDTH, seed=1)
    product = stack([affine(bert.self.key), affine(bert.self.value)])
    cross = cross_attention(affine(bert.self.query), None if stacked else product, bert.output.dense)
    key, value = nn.functional.linear(memory, *product).chunk(2, -1) if stacked else cross.project(memory)
    want, scores = bert.with_scores(x, memory)
    norm = bert.output.LayerNorm
    assert apart(norm(cross(x, key, value) + x), want) <= EXACT
    guided, guide = cross.guided(x, key, value)
    assert apart(norm(guided + x), want) <= EXACT
    assert apart(guide, scores) <= EXACT


def test_stacked_cross_attention_has_no_product_of_its_own():
    cross = CrossAttention(WIDTH, HEADS, stacked=True)
    with pytest.raises(ValueError, match="stacked product"):
        cross.project(random(1, 2, WIDTH))


def test_conv_fusion_is_the_published_fusion(tiny):
    """With running statistics far from those of a fresh BatchNorm."""
    vision = shaken(tiny("cals").visual_encoder)
    image, x = random(2, 3, 256, 256), random(2, 257, 128, seed=1)
    fold = conv_fusion_of(vision)
    want = vision.fuse(x, image)
    got = filled(ConvFusion(128), **fold._asdict(), packed=pack(*fold, 128))(image, vision.MHA2(x))
    assert fold.weight.shape == (4 * 128, 3, 6, 6)
    assert apart(got, want) <= EXACT


def test_conv_fusion_is_folded_in_float64_and_cast_back(tiny):
    vision = tiny("cals").visual_encoder
    fold = conv_fusion_of(vision)
    exact = conv_fusion_of(copy.deepcopy(vision).double())
    assert fold.weight.dtype == torch.float32
    assert torch.equal(fold.weight, exact.weight.float())
    assert torch.equal(fold.bias, exact.bias.float())


def test_conv_fusion_refuses_what_it_cannot_fold(tiny):
    vision = tiny("cals").visual_encoder
    vision.Conv.conv = nn.Conv2d(3, 128, 7, padding=3, bias=False)
    with pytest.raises(CheckpointError, match=r"expected a convolution of side 1, 3, 5 .*, got \(7, 7\)"):
        conv_fusion_of(vision)


@pytest.mark.parametrize("query", ["cls_token_local", "cls_token_local_e"])
def test_latent_query_is_the_published_aggregation(tiny, query):
    model = shaken(tiny("cals"))
    tokens = random(3, 257, 128)
    fold = query_of(model, query)
    assert fold.query.shape == (2, 128)
    norm, out = affine(model.norm_layer_aggr), affine(model.aggregator.out_proj)
    pool = filled(LatentPool(128, 2), norm=norm, out=out, **fold._asdict())
    assert apart(pool(tokens[:, 1:]), model.aggregate(getattr(model, query), tokens)) <= EXACT


def test_latent_query_is_folded_in_float64_and_cast_back(tiny):
    model = tiny("hammer")
    for small, large in zip(query_of(model), query_of(copy.deepcopy(model).double()), strict=True):
        assert small.dtype == torch.float32
        assert torch.equal(small, large.float())


def test_stacked_gates_are_the_face_classes():
    trained = shaken(TrainedClassifier(WIDTH, 3))
    patches, cls = random(2, 5, WIDTH), random(2, WIDTH, seed=1)
    faces = filled(
        PatchClassifier(WIDTH, 3),
        lambda_param=trained.lambda_param,
        gate=stack_gates([affine(conv) for conv in trained.conv_attention]),
        fc_global=affine(trained.fc_global),
    )
    assert apart(faces(patches, cls), trained(patches, cls)) <= EXACT


def test_constants_of_the_embeddings_are_added_once(tiny):
    """Against the trained modules, which add them for every input."""
    model = shaken(tiny("hammer"))
    vision, embeddings = model.visual_encoder, model.text_encoder.bert.embeddings
    image = random(2, 3, 256, 256)
    cls, positions = fold_cls(vision.cls_token, vision.pos_embed)
    got = torch.cat([cls.expand(2, -1, -1), vision.patch_embed(image) + positions], dim=1)
    assert apart(got, vision.embed(image)) <= EXACT
    assert positions.untyped_storage().data_ptr() == vision.pos_embed.untyped_storage().data_ptr()
    ids = torch.tensor([[5, 9, 2]])
    places = fold_places(embeddings.position_embeddings.weight, embeddings.token_type_embeddings.weight)
    got = embeddings.LayerNorm(embeddings.word_embeddings(ids) + places[:3])
    assert apart(got, embeddings(ids)) <= EXACT


def test_the_tensors_given_stay_as_they_are(tiny):
    model = tiny("cals")
    before = copy.deepcopy(model.state_dict())
    conv_fusion_of(model.visual_encoder)
    query_of(model)
    stack(split_packed(packed_of(model.it_cross_attn)))
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
