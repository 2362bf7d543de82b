"""The branches of the three networks against formulas written out, and one step of training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dgm4
from dgm4.layers import padding_bias
from dgm4.models.cals import Guidance, PatchClassifier, gaussian_map
from dgm4.seeded import draw

EXACT = 1e-10


def inputs(batch=2, tokens=7, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 2000, (batch, tokens), generator=random)
    lengths = torch.tensor([tokens, *([max(tokens // 2, 2)] * (batch - 1))])
    mask = (torch.arange(tokens)[None] < lengths[:, None]).long()
    return torch.randn(batch, 3, 256, 256, generator=random, dtype=dtype), ids * mask, mask


def drawn(module):
    module.load_state_dict(
        {k: torch.from_numpy(draw(k, tuple(v.shape), 1)) for k, v in module.state_dict().items()}
    )
    return module.double().eval()


def test_shapes_of_the_answers(name, tiny):
    with torch.inference_mode():
        out = tiny(name)(*inputs(3, 9, torch.float32))
    assert out.logits_real_fake.shape == (3, 2)
    assert out.logits_multicls.shape == (3, 4)
    assert out.box.shape == (3, 4)
    assert ((out.box >= 0) & (out.box <= 1)).all()
    assert out.logits_tok.shape == (3, 8, 2)
    assert (out.attention_map is None) == (name != "asap")
    if out.attention_map is not None:
        assert out.attention_map.shape == (3, 9, 257)


def test_trimming_padded_text_changes_nothing(name, tiny):
    model = tiny(name, torch.float64)
    image, ids, mask = inputs(2, 12)
    with torch.inference_mode():
        padded = model(image[1:], ids[1:], mask[1:])
        trimmed = model(image[1:], ids[1:, :6], mask[1:, :6])
    for key in ("logits_real_fake", "logits_multicls", "box"):
        assert (getattr(padded, key) - getattr(trimmed, key)).abs().max() <= 1e-12
    assert (padded.logits_tok[:, :5] - trimmed.logits_tok).abs().max() <= 1e-12


def test_pairs_of_a_batch_do_not_meet(name, tiny):
    model = tiny(name, torch.float64)
    image, ids, mask = inputs(3, 6)
    with torch.inference_mode():
        together = model(image, ids, mask)
        alone = model(image[1:2], ids[1:2], mask[1:2])
    for whole, single in zip(together, alone, strict=True):
        assert whole is None or (whole[1:2] - single).abs().max() <= EXACT


def gaussian(box, size):
    """One pixel after another, in float64."""
    cx, cy, w, h = (size * float(value) for value in box)
    variance = (h / 2) ** 2 + (w / 2) ** 2
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    return np.clip(np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * variance + 1e-8)), 0, 1)


BOXES = [[0.5, 0.5, 0.2, 0.4], [0.1, 0.9, 0.05, 0.01], [1, 1, 1, 1], [0, 0, 1e-3, 0], [0.5, 0.25, 0, 0]]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("size", [256, 7])
def test_gaussian_map_is_the_formula(box, size):
    got = gaussian_map(torch.tensor([box], dtype=torch.float64), size)
    assert got.shape == (1, 1, size, size)
    assert np.abs(got[0, 0].numpy() - gaussian(box, size)).max() <= EXACT


def test_gaussian_map_stands_on_whole_pixels_with_x_along_columns():
    field = gaussian_map(torch.tensor([[0.25, 0.75, 0.1, 0.1]]), 256)[0, 0]
    assert divmod(int(field.argmax()), 256) == (192, 64)
    assert field[192, 64] == 1.0


def test_gaussian_map_of_half_precision_is_float32_and_finite():
    field = gaussian_map(torch.tensor([[0.5, 0.5, 0, 0]], dtype=torch.float16), 16)
    assert field.dtype == torch.float32
    assert field.isfinite().all()
    assert field.sum() == 1.0


def test_guidance_is_row_major():
    """A Gaussian in one corner moves the patch of that corner most."""
    config = dgm4.model_config("cals", "tiny")
    guidance = drawn(Guidance(config.width, config.guidance_widths))
    with torch.inference_mode():
        empty = guidance(torch.zeros(1, 1, 256, 256, dtype=torch.float64))
        field = torch.zeros(1, 1, 256, 256, dtype=torch.float64)
        field[..., 48:64, 224:240] = 1  # row 3, column 14 of the patches
        moved = (guidance(field) - empty).abs().sum(-1)[0]
    assert moved.shape == (256,)
    assert divmod(int(moved.argmax()), 16) == (3, 14)


def test_guidance_layers_are_the_published_ones():
    convs = [m for m in Guidance(768, (64, 128, 256)).conv_net if isinstance(m, torch.nn.Conv2d)]
    shapes = [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0]) for c in convs]
    assert shapes == [(1, 64, 4, 2, 1), (64, 128, 4, 2, 1), (128, 256, 4, 2, 1), (256, 768, 1, 1, 0)]


def test_face_classes_are_the_formula():
    """The gate of class k over every patch and channel, then the mean over both."""
    head = drawn(PatchClassifier(12))
    random = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 256, 12, generator=random, dtype=torch.float64)
    cls = torch.randn(2, 12, generator=random, dtype=torch.float64)
    want = cls @ head.fc_global.weight.T + head.fc_global.bias
    for k, conv in enumerate(head.conv_attention):
        gate = conv(patches.transpose(1, 2).unflatten(2, (16, 16))).sigmoid()
        field = gate * patches.transpose(1, 2).unflatten(2, (16, 16))
        want[:, k] += head.lambda_param * field.mean((1, 2, 3))
    assert (head(patches, cls) - want).abs().max() <= EXACT


def parts(model):
    """A picture's and a caption's tokens, with the last two caption tokens padded."""
    random = torch.Generator().manual_seed(4)
    image = torch.randn(2, 257, model.config.width, generator=random, dtype=torch.float64)
    text = torch.randn(2, 6, model.config.width, generator=random, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    fused = torch.randn(2, model.config.width, generator=random, dtype=torch.float64)
    return image, text, padding_bias(mask, float("-inf"), torch.float64), mask, fused


def torch_attention(packed, x, memory, mask=None):
    width = packed.out_proj.in_features
    other = torch.nn.MultiheadAttention(width, packed.heads, batch_first=True).double()
    other.load_state_dict(packed.state_dict())
    return other(x, memory, memory, key_padding_mask=None if mask is None else mask == 0)[0]


def pooled(model, query, tokens):
    norm = model.norm_layer_aggr
    return torch_attention(model.aggregator, norm(query).expand(2, -1, -1), norm(tokens[:, 1:]))[:, 0]


def test_hammer_answers_by_the_formula(tiny):
    model = tiny("hammer", torch.float64)
    image, text, bias, mask, fused = parts(model)
    norm = model.norm_layer_it_cross_atten
    with torch.no_grad():
        c = image + torch_attention(model.it_cross_attn, norm(image), norm(text), mask)
        want = (model.bbox_head(pooled(model, model.cls_token_local, c)).sigmoid(),)
        want += (model.itm_head(fused), model.cls_head(fused))
        got = model.branch(image, text, bias, fused)[:3]
    assert max((a - b).abs().max() for a, b in zip(got, want, strict=True)) <= EXACT


def test_asap_answers_by_the_formula(tiny):
    """The residual is the normalised picture; the logits read the box feature."""
    model = tiny("asap", torch.float64)
    image, text, bias, mask, fused = parts(model)
    norm, attend = model.norm_layer_it_cross_atten, model.it_cross_attn
    with torch.no_grad():
        x = norm(image)
        s = torch_attention(attend.selfatten, x, x)
        a = pooled(model, model.cls_token_local, torch_attention(attend.crossatten, s, norm(text), mask) + x)
        want = (model.bbox_head(a).sigmoid(), model.itm_head(fused + model.UtilsB * a))
        want += (model.cls_head(fused + model.UtilsC * a),)
        got = model.branch(image, text, bias, fused)[:3]
    assert max((a - b).abs().max() for a, b in zip(got, want, strict=True)) <= EXACT


def test_cals_answers_by_the_formula(tiny):
    model = tiny("cals", torch.float64)
    image, text, bias, mask, fused = parts(model)
    norm = model.norm_layer_it_cross_atten
    with torch.no_grad():
        c = image + torch_attention(model.it_cross_attn, norm(image), norm(text), mask)
        box = model.bbox_head(pooled(model, model.cls_token_local, c)).sigmoid()
        maps = torch.from_numpy(np.stack([gaussian(b, 256) for b in box]))[:, None]
        guided = image.clone()
        guided[:, 1:] += model.LIG.conv_net(maps).flatten(2).transpose(1, 2)
        refined = guided + torch_attention(model.it_cross_attn, norm(guided), norm(text), mask)
        want = model.bbox_head(pooled(model, model.cls_token_local_e, refined)).sigmoid()
        got, real_fake, classes = model.branch(image, text, bias, fused)[:3]
        assert (got - want).abs().max() <= EXACT
        assert torch.equal(real_fake, model.itm_head(fused))
        assert (classes[:, :2] - model.fch(c[:, 1:], c[:, 0])).abs().max() <= EXACT, (
            "face classes of the first pass"
        )
        assert torch.equal(classes[:, 2:], model.cls_head(fused))


def toy_loss(out):
    """Every answer towards index 1, the box towards the left upper corner, the map towards zero."""
    cross_entropy = torch.nn.functional.cross_entropy
    target = torch.ones(len(out.box), dtype=torch.long)
    loss = cross_entropy(out.logits_real_fake, target) + out.logits_multicls.square().mean()
    loss = loss + (out.box - 0.25).abs().mean()
    loss = loss + cross_entropy(
        out.logits_tok.flatten(0, 1), torch.ones(out.logits_tok[..., 0].numel()).long()
    )
    return loss if out.attention_map is None else loss + out.attention_map.square().mean()


def test_one_step_of_training(name):
    """From torch's own initialisation, training: every parameter has a gradient, the loss falls."""
    torch.manual_seed(0)
    model = dgm4.create_model(name, "tiny")
    assert model.training
    batch = inputs(2, 6, torch.float32)
    before = toy_loss(model(*batch))
    before.backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    assert [key for key, gradient in gradients.items() if gradient is None] == []
    assert [key for key, gradient in gradients.items() if not gradient.isfinite().all()] == []
    silent = {key for key, gradient in gradients.items() if not gradient.any()}
    assert silent <= silent_at_start(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
    assert toy_loss(model(*batch)) < before


def silent_at_start(name):
    """Keys' biases cancel in the softmax; rounding alone decides whether their gradient is exactly zero."""
    return {key for key, _ in dgm4.create_model(name, "tiny").named_parameters() if key.endswith(".key.bias")}


def test_batch_norm_learns_in_training():
    model = dgm4.create_model("cals", "tiny")
    before = model.visual_encoder.Conv.bn2.running_mean.clone()
    model(*inputs(1, 3, torch.float32))
    assert not torch.equal(model.visual_encoder.Conv.bn2.running_mean, before)
    assert model.visual_encoder.Conv.bn2.num_batches_tracked == 1
