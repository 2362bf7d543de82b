"""Precisions of a network: FP8 layers against their formula, what stays float, and calibrated scales."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.network.blocks import Gelu, Norm
from engine.network.linear import E4M3, Fp8Linear, output_codes
from engine.network.precision import float_layers, fp8_layers, half_layers, set_precision
from export.graph.rewrite import rewrite
from export.graph.trace import example_inputs
from export.quantization.calibrate import calibrate
from kernels.rows import RowOutput


def drawn(out, inner, bias=True):
    torch.manual_seed(out)
    return nn.Linear(inner, out, bias=bias).requires_grad_(False)


def rounded(values, scale):
    """Values after E4M3, in float64."""
    return (values.double() / scale).clamp(-448, 448).float().to(E4M3).double() * scale


@pytest.mark.parametrize("given", [None, 0.01])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 7), (1, 1)])
def test_fp8_is_its_formula(shape, bias, given):
    linear = drawn(48, 32, bias)
    x = torch.randn(*shape, 32) * torch.logspace(-2, 1, shape[-1])[:, None]
    scale = x.double().abs().amax(-1, keepdim=True) / 448 if given is None else given
    weight = rounded(linear.weight, linear.weight.double().abs().amax(1, keepdim=True) / 448)
    want = rounded(x, scale) @ weight.T + (linear.bias.double() if bias else 0)
    got = Fp8Linear(linear, torch.float32, given)(x)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (want - linear(x)).abs().max() > 1e-3 * want.abs().max(), "nothing was rounded"


@pytest.mark.parametrize("given", [None, 0.02])
def test_what_writes_codes_gives_what_a_pass_of_its_own_gives(given):
    """In float32, where the sum before the rounding is the same."""
    reader = Fp8Linear(drawn(32, 16), torch.float32, given)
    norm = Norm(16, 1e-5)
    norm.load_state_dict({"weight": torch.rand(16) + 0.5, "bias": torch.randn(16)}, assign=True)
    x, residual = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    total, codes = norm.add(x, residual, reader)
    assert isinstance(codes, RowOutput)
    assert torch.equal(total, x + residual)
    assert torch.equal(reader(codes), reader(norm(x, residual)))
    assert torch.equal(reader(Gelu()(x, reader)), reader(Gelu()(x)))
    assert norm.add(x, None, reader)[0] is x


def test_a_float_layer_reads_floats():
    assert output_codes(drawn(16, 16)) == output_codes(None) == {}


def test_what_fp8_means(tiny, name):
    """Every Linear over tokens: blocks, text layers, cross-attentions; no head, no reduction."""
    model = rewrite(tiny(name))
    names = {layer for layer, _ in fp8_layers(model)}
    assert {"vision.blocks.0.attention.qkv", "text.fusion_layers.0.cross.query", "branch.cross.out"} <= names
    assert not [x for x in names if "head" in x or "classifier" in x or "pool" in x or "faces" in x]
    assert ("vision.ffn.0" in names) == (name == "cals")
    before = model.vision.blocks[0].mlp.fc1.weight
    set_precision(model, "fp8")
    assert before.dtype == torch.float32, "the trained network's own"
    kinds = {key: type(module) for key, module in model.named_modules()}
    assert all(kinds[x] is Fp8Linear for x in names)
    assert model.vision.norm.weight.dtype == model.branch.bbox_head[0].weight.dtype == torch.float32
    assert model.branch.itm_head[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_answers_are_float32_and_near(tiny, name, precision):
    model = rewrite(tiny(name))
    inputs = example_inputs(model.config, 3, 50, seed=4)
    with torch.inference_mode():
        want = model(**inputs)
        got = set_precision(model, precision)(**inputs)
    for x, y in zip(got, want, strict=True):
        if y is not None:
            assert x.dtype == torch.float32
            assert 1e-5 < (x - y).norm() / y.norm() < {"bf16": 0.06, "fp8": 0.4}[precision]


def test_calibrated_scales_are_the_largest_that_was_read(tiny):
    model = rewrite(tiny("asap"))
    seen = []
    model.vision.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _, read: seen.append(read[0].abs().max()))
    batches = [example_inputs(model.config, 2, 9, seed=seed) for seed in (1, 2)]
    scales = calibrate(model, fp8_layers(model), batches, E4M3)
    assert len(seen) == 2
    assert scales.keys() == {x for x, _ in fp8_layers(model)}
    assert scales["vision.blocks.1.mlp.fc2"] == pytest.approx(float(max(seen)) / 448, rel=1e-6)
    layer = set_precision(model, "fp8", scales).vision.blocks[1].mlp.fc2
    assert layer.input_scale.item() == pytest.approx(scales["vision.blocks.1.mlp.fc2"], rel=2**-7)
    assert not [x for x in model.modules() if isinstance(x, nn.Linear) and x._forward_pre_hooks]


def test_scales_of_a_bfloat16_network_are_numbers_of_its_own():
    """Raised, so that no code lies above 448, and a graph in bfloat16 holds the same."""
    linear, given = drawn(48, 32), 0.0123
    layer = Fp8Linear(linear, torch.bfloat16, given)
    for scale, least in (
        (layer.weight_scale[0], linear.weight.abs().amax(1) / 448),
        (layer.input_scale, torch.tensor([given])),
    ):
        assert torch.equal(scale, scale.bfloat16().float())
        assert (scale >= least).all()
        assert (scale <= least * (1 + 2**-7)).all()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_kept_layers_stay_a_step_above(tiny, precision):
    inputs = example_inputs(tiny("cals").config, 2, 9)
    kept = "branch.pool.out" if precision != "fp8" else "vision.blocks.1.mlp.fc1"
    model = set_precision(rewrite(tiny("cals")), precision, None, [kept])
    layer = model.get_submodule(kept)
    assert layer.weight.dtype == (torch.bfloat16 if precision == "fp8" else torch.float32)
    assert (kept in float_layers(model)) == (precision != "fp8")
    if precision != "fp8":
        assert model.branch.refined_pool.out is model.branch.pool.out, "one aggregator with two queries"
    with torch.inference_mode():
        assert all(torch.isfinite(x).all() for x in model(**inputs) if x is not None)


def test_what_half_precision_means(tiny, name):
    model = rewrite(tiny(name))
    names = {layer for layer, _ in half_layers(model)}
    set_precision(model, "bf16")
    found = {x for x, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert names == found - set(float_layers(model))
    assert {"branch.bbox_head.0", "vision.norm"} <= set(float_layers(model))
    assert "branch.itm_head.0" in names
