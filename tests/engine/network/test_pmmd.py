"""PMMD's own rewrites against the published modules, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dgm4
from dgm4.layers import PackedAttention
from dgm4.models import pmmd as published
from engine.network.blocks import LatentPool
from engine.network.fold import Affine, fold_latent_query, fold_relative_positions, fold_scale
from engine.network.model import InferenceModel
from engine.network.models import pmmd
from engine.network.released import Released
from export.graph.trace import example_inputs

EXACT = 1e-10


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apart(got, want):
    return (got - want).abs().max().item()


@pytest.fixture(scope="module")
def network():
    return dgm4.seeded_model("pmmd", "tiny").double().requires_grad_(False)


def doubled(config, batch=3, tokens=11):
    inputs = example_inputs(config, batch, tokens)
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def test_a_scale_is_folded_into_the_product_before_it():
    linear, scale, x = nn.Linear(6, 5).double(), random(5), random(2, 3, 6)
    assert (
        apart(F.linear(x, *fold_scale(Affine(linear.weight, linear.bias), scale)), scale * linear(x)) <= EXACT
    )


@pytest.mark.parametrize("grid", [1, 3])
def test_relative_positions_are_spread_as_published(grid):
    """By offset of query from key, and the three of [CLS], whose rows no patch shares."""
    table = random((2 * grid - 1) ** 2 + 3, 2)
    want = table[published.relative_index(grid)].permute(2, 0, 1)
    assert torch.equal(fold_relative_positions(table, grid), want)
    offset = want[0, 1:, 1:]
    assert torch.equal(offset.diagonal(), offset[0, 0].expand(grid**2))


def test_a_query_without_norm_is_folded_too():
    attention = PackedAttention(24, 4).double().requires_grad_(False)
    attention.in_proj_bias.copy_(random(72))
    query, x = random(1, 1, 24, seed=1), random(3, 7, 24, seed=2)
    packed = Affine(attention.in_proj_weight, attention.in_proj_bias)
    pool = LatentPool(24, 4, normed=False)
    out = {f"out.{k}": v for k, v in attention.out_proj.state_dict().items()}
    pool.load_state_dict({**fold_latent_query(query, None, packed, 4)._asdict(), **out}, assign=True)
    assert apart(pool(x), attention(query.expand(3, -1, -1), x)[:, 0]) <= EXACT


@pytest.mark.parametrize("stage", ["vision_encoder", "dfp", "locate"])
def test_parts_of_locate(network, stage):
    """The bias gathered once, scales folded, one row of the mixing, keys of the caption projected once."""
    trained, inputs = network.locate, doubled(network.config)
    with torch.device("meta"):
        model = pmmd.Locate(network.config)
    model.load_state_dict(pmmd.fold_locate(Released(trained.state_dict()), network.config), assign=True)
    image, ids, mask = inputs["image"], inputs["input_ids"], inputs["attention_mask"]
    if stage == "vision_encoder":
        assert apart(model.vision(image), trained.vision_encoder(image)) <= EXACT
    elif stage == "dfp":
        one, other = random(3, 257, 128), random(3, 257, 128, seed=1)
        assert apart(model.dual(one, other), trained.dfp(one, other)) <= EXACT
    else:
        assert apart(model.answer(*model.see(image), ids, mask.int()), trained(image, ids, mask)) <= EXACT


@pytest.mark.parametrize("name", ["pmmd_refine", "pmmd"])
@pytest.mark.parametrize("stacked", [True, False])
def test_whole_networks(name, stacked, network):
    """Both fusion passes as one batch; a pair does not read the others."""
    trained = network if name == "pmmd" else network.refine
    trained.config = dgm4.model_config(name, "tiny")
    inputs = doubled(trained.config)
    model = InferenceModel.from_released(trained.state_dict(), trained.config, stacked)
    got = model(**inputs)
    for answer, want in zip(got[:4], trained(**inputs)[:4], strict=True):
        assert apart(answer, want) <= EXACT
    alone = model(**{key: tensor[:1] for key, tensor in inputs.items()})
    assert apart(alone.logits_tok, got.logits_tok[:1]) <= EXACT
