"""CALS's alignment against loops in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from dgm4.losses import csam, mac
from dgm4.losses.alignment import feature_divergence, ranking

EXACT = 1e-11
PRISTINE = [True, False, True, True]


def unit(rows, seed, width=4):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def inputs(rows=4):
    return [*(unit(rows, seed) for seed in range(4)), unit(5, 10).T.contiguous(), unit(5, 11).T.contiguous()]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(row):
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def plain_divergence(image, text):
    total = 0.0
    for v, t in zip(image.tolist(), text.tolist(), strict=True):
        for p, q in ((softmax(v), softmax(t)), (softmax(t), softmax(v))):
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total


def plain_ranking(image, text, image_m, text_m, pristine, dynamic, hard, most=0.2):
    image, text, image_m, text_m = (x.tolist() for x in (image, text, image_m, text_m))
    total = 0.0
    for anchor, other, other_m in ((image, text, text_m), (text, image, image_m)):
        for i in range(len(anchor)):
            hinges = []
            for j in range(len(anchor)):
                margin = most * (1 - dot(other_m[i], other_m[j])) / 2 if dynamic else most
                if j != i:
                    hinges.append(max(0, margin + dot(anchor[i], other[j]) - dot(anchor[i], other[i])))
            if pristine[i] and hinges:
                total += max(hinges) if hard else sum(hinges) / len(hinges)
    return total / max(sum(pristine), 1)


@pytest.mark.parametrize("rows", [1, 4])
def test_divergence_is_the_formula(rows):
    image, text = unit(rows, 0), unit(rows, 1)
    assert abs(feature_divergence(image, text).item() - plain_divergence(image, text)) <= EXACT
    assert feature_divergence(image, image) == 0


def test_divergence_by_hand():
    """Softmax of (ln 3, 0) is (3/4, 1/4); against its mirror image each direction is ln(3)/2."""
    image = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    assert abs(feature_divergence(image, image.flip(1)).item() - math.log(3)) <= EXACT


@pytest.mark.parametrize("pristine", [PRISTINE, [True] * 4, [False] * 4, [True], [False]])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_ranking_is_the_formula(dynamic, hard, pristine):
    features = inputs(len(pristine))[:4]
    got = ranking(*features, torch.tensor(pristine), dynamic_margin=dynamic, hard_negatives=hard)
    assert abs(got.item() - plain_ranking(*features, pristine, dynamic, hard)) <= EXACT


def test_ranking_by_hand():
    """Pair 0 is pristine; its caption lies at cosine 0.6, that of pair 1 at 0.8 from the picture."""
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    text = torch.tensor([[0.6, 0.8], [0.8, 0.6]], dtype=torch.float64)
    pristine = torch.tensor([True, False])
    # From the picture 0.2 + 0.8 - 0.6, from the caption 0.2 + 0.8 - 0.6 again.
    constant = ranking(image, text, image, text, pristine, dynamic_margin=False)
    assert abs(constant.item() - 0.8) <= EXACT
    # The captions' cosine is 0.96 and the pictures' 0, so the margins are 0.2 * 0.02 and 0.2 * 0.5.
    dynamic = ranking(image, text, image, text, pristine)
    assert abs(dynamic.item() - (0.004 + 0.2 + 0.1 + 0.2)) <= EXACT


def test_csam_is_the_released_sum_unless_asked_for_more():
    features, pristine = inputs(), torch.tensor(PRISTINE)
    released = mac(*features, pristine, 0.2, 0.4).item() + plain_divergence(*features[:2])
    assert abs(csam(*features, pristine, 0.2, 0.4).item() - released) <= EXACT
    for dynamic, hard in ((True, False), (False, True), (True, True)):
        got = csam(*features, pristine, 0.2, 0.4, dynamic_margin=dynamic, hard_negatives=hard)
        extra = plain_ranking(*features[:4], PRISTINE, dynamic, hard)
        assert abs(got.item() - released - extra) <= EXACT


@pytest.mark.parametrize("options", [{}, {"dynamic_margin": True, "hard_negatives": True}])
def test_gradients(options):
    image, text, *rest = inputs()
    pristine = torch.tensor(PRISTINE)
    image.requires_grad_(), text.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, t: csam(v, t, *rest, pristine, 0.2, **options), (image, text))
    for tensor in rest:
        tensor.requires_grad_()
    csam(image, text, *rest, pristine, 0.2, **options).backward()
    assert all(tensor.grad is None for tensor in rest)


def test_half_inputs_are_computed_in_float32_under_autocast():
    features, pristine = [x.bfloat16() for x in inputs()], torch.tensor(PRISTINE)
    want = csam(*(x.double() for x in features), pristine, 0.2, dynamic_margin=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = csam(*features, pristine, 0.2, dynamic_margin=True)
    assert got.dtype == torch.float32
    assert abs(got.item() - want.item()) <= 1e-5
