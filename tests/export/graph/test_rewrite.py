"""The rewritten network as a whole against the trained one."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import nn

import dgm4
from dgm4.layers import padding_bias
from dgm4.model import build
from engine import Bundle, backends
from engine.network.precision import to_precision
from export.graph.rewrite import rewrite
from export.graph.trace import example_inputs
from export.options import ExportOptions
from export.pipeline import export_bundle

EXACT = 1e-10
ISLANDS = (
    r".*norm\d?\.(weight|bias)",
    r".*(classifier|_head)\.[14]\.(weight|bias)",
    r"branch\.\w*pool\.query",
    r"branch\.bbox_head\..*",
    r"branch\.faces\..*",
)


def padded(config, dtype=torch.float64, tokens=9):
    inputs = example_inputs(config, 3, tokens)
    inputs["attention_mask"] = (torch.arange(tokens)[None] < torch.tensor([[tokens], [5], [2]])).long()
    return {**inputs, "image": inputs["image"].to(dtype)}


def apart(got, want):
    pairs = [(x, y) for x, y in zip(got, want, strict=True) if x is not None]
    return max((x - y).abs().max().item() for x, y in pairs)


@pytest.mark.parametrize("stacked", [True, False])
def test_answers_are_those_of_the_trained_network(name, stacked, tiny):
    model = tiny(name, torch.float64)
    inputs = padded(model.config)
    with torch.inference_mode():
        want = model(**inputs)
        got = rewrite(model, stacked)(**inputs)
    assert (got.attention_map is None) == (name != "asap")
    assert {x.dtype for x in got if x is not None} == {torch.float64}
    assert apart(got, want) <= EXACT


@pytest.fixture(scope="module")
def scales():
    """CALS with three convolution branches instead of one, every statistic drawn."""
    torch.manual_seed(0)
    config = replace(dgm4.model_config("cals", "tiny"), caformer_kernels=(5, 3, 1))
    model = build(config).eval().requires_grad_(False)
    for branch in (model.visual_encoder.Conv, *model.visual_encoder.Scales):
        branch.bn2.running_mean.normal_()
        branch.bn2.running_var.uniform_(0.5, 2.0)
    return model


def test_several_scales_fold_into_one_product(scales):
    model = copy.deepcopy(scales).double()
    inputs = padded(model.config)
    with torch.inference_mode():
        got, want = rewrite(model), model(**inputs)
        assert apart(got(**inputs), want) <= EXACT
        assert got.vision.fusion.weight.shape == (3 * 4 * 128, 3, 6, 6)
        model.visual_encoder.Scales[1].conv.weight.zero_()
        assert apart(rewrite(model)(**inputs), want) > 1e-6


def test_several_scales_sampled_are_the_same(scales):
    vision = copy.deepcopy(scales).double().visual_encoder
    image = torch.randn(2, 3, 256, 256, dtype=torch.float64)
    with torch.inference_mode():
        want = vision(image)
        vision.sampled = True
        assert apart(vision(image), want) <= EXACT


def test_several_scales_through_a_bundle(scales, tmp_path):
    """Saved, recognised by its keys, exported, and answered by both backends."""
    path, out = tmp_path / "scales.safetensors", tmp_path / "bundle"
    safetensors.torch.save_file(scales.state_dict(), path)
    assert dgm4.load_checkpoint(path).config == scales.config
    export_bundle(ExportOptions(out=out, checkpoint=path, engine=False), lambda stage: None)
    inputs = padded(scales.config, torch.float32)
    with torch.inference_mode():
        want = scales(**inputs)
    for backend in ("ort", "torch"):
        found = backends.create(backend, Bundle.open(out)).run({k: v.numpy() for k, v in inputs.items()})
        for key, value in found.items():
            assert abs(value - getattr(want, key).numpy()).max() <= 1e-4


def test_float32_answers_stay_near(name, tiny):
    model = tiny(name)
    inputs = padded(model.config, torch.float32, 50)
    with torch.inference_mode():
        assert apart(rewrite(model)(**inputs), model(**inputs)) <= 2e-5


def test_both_streams_as_one_batch(tiny):
    """Rewrite 4, with the fold of rewrite 2."""
    model = tiny("cals", torch.float64)
    image = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.inference_mode():
        fused, plain = rewrite(model).vision(image)
        want = model.visual_encoder(image)
    assert apart((fused, plain), want) <= EXACT
    assert (fused - plain).abs().max() > 0.1, "the streams differ, or the test proves nothing"


def test_image_branch_without_the_cls_query(name, tiny):
    """Rewrites 3, 7 and 8 on tokens of their own."""
    model = tiny(name, torch.float64)
    random = torch.Generator().manual_seed(0)
    image, text, fused = (
        torch.randn(*shape, 128, generator=random, dtype=torch.float64) for shape in ((3, 257), (3, 6), (3,))
    )
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    with torch.inference_mode():
        want = model.branch(image, text, padding_bias(mask, float("-inf"), torch.float64), fused)[:3]
        got = rewrite(model).branch(image, text, mask, fused)
    assert apart(got, want) <= EXACT


def test_the_cls_row_asks_only_in_cals(name, tiny):
    """Queries of the picture over the caption: 256 where nothing reads [CLS], 257 in CALS's first pass."""
    inference = rewrite(tiny(name))
    lengths = []
    inference.branch.cross.query.register_forward_hook(lambda _m, x, _y: lengths.append(x[0].shape[1]))
    with torch.inference_mode():
        inference(**padded(inference.config, torch.float32))
    assert lengths == ([257, 256] if name == "cals" else [256])


def test_cals_projects_the_caption_once(tiny):
    inference = rewrite(tiny("cals"))
    calls = []
    inference.branch.cross.key_value.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        inference(**padded(inference.config, torch.float32))
    assert len(calls) == 1


def test_cals_has_one_aggregator_for_two_queries(tiny):
    branch = to_precision(rewrite(tiny("cals")), torch.float16).branch
    assert branch.refined_pool.norm is branch.pool.norm
    assert branch.refined_pool.out is branch.pool.out
    assert not torch.equal(branch.refined_pool.query, branch.pool.query)


def test_fusion_layers_share_one_product_when_stacked(name, tiny):
    model = tiny(name)
    stacked, single = rewrite(model, True).text, rewrite(model, False).text
    assert stacked.key_values.out_features == 2 * 2 * 128
    assert all(layer.cross.key_value is None for layer in stacked.fusion_layers)
    assert single.key_values is None


@pytest.mark.parametrize("training", [True, False])
def test_the_trained_network_stays_as_it_is(name, training, tiny):
    """Values, mode, dtype and gradients; a cast of the rewritten one does not reach it either."""
    model = tiny(name).train(training)
    before = copy.deepcopy(model.state_dict())
    addresses = {key: p.data_ptr() for key, p in model.named_parameters()}
    to_precision(rewrite(model), torch.float16)
    assert {module.training for module in model.modules()} == {training}
    assert all(p.requires_grad for p in model.parameters())
    assert {key: p.data_ptr() for key, p in model.named_parameters()} == addresses
    after = model.state_dict()
    assert all(
        torch.equal(value, after[key]) and value.dtype == after[key].dtype for key, value in before.items()
    )


def test_unchanged_weights_are_shared(name, tiny):
    """What no rewrite changes is not held twice."""
    model = tiny(name)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    inference = rewrite(model)
    fresh = sum(p.numel() for p in inference.parameters() if p.untyped_storage().data_ptr() not in own)
    assert fresh < 0.25 * sum(p.numel() for p in model.parameters())
    assert not any(p.requires_grad for p in inference.parameters())
    assert not any(module.training for module in inference.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_islands_stay_float32(name, dtype, tiny):
    model = to_precision(rewrite(tiny(name)), dtype)
    wrong = {
        key: parameter.dtype
        for key, parameter in model.named_parameters()
        if parameter.dtype != (torch.float32 if any(re.fullmatch(i, key) for i in ISLANDS) else dtype)
    }
    assert wrong == {}
    assert not list(model.buffers())


def test_every_norm_keeps_its_eps(name, tiny):
    """Found by the parameters that the two networks share."""
    model = tiny(name)
    eps = {m.weight.data_ptr(): m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}
    inference = rewrite(model)
    found = {m.weight.data_ptr(): m.eps for m in inference.modules() if type(m).__name__ == "Norm"}
    assert found == eps
    assert {inference.branch.pool.norm.eps} == {1e-5}


def test_half_precision_answers_in_float32(name, tiny):
    model = tiny(name)
    inputs = padded(model.config, torch.float32, 24)
    with torch.inference_mode():
        want = model(**inputs)
        got = to_precision(rewrite(model), torch.float16)(**inputs)
    assert {x.dtype for x in got if x is not None} == {torch.float32}
    for x, y in zip(got, want, strict=True):
        if x is not None:
            ratio = (x - y).square().mean().sqrt() / y.square().mean().sqrt()
            assert ratio <= 2e-2


def test_a_fully_masked_caption_gives_no_nan(name, tiny):
    model = tiny(name)
    inputs = padded(model.config, torch.float32)
    inputs["attention_mask"][1] = 0
    with torch.inference_mode():
        got = rewrite(model)(**inputs)
    assert all(x.isfinite().all() for x in got if x is not None)
