"""Patch targets against drawings and exact fractions; their losses against loops in plain Python."""

from __future__ import annotations

import math
import random as pyrandom
from fractions import Fraction

import pytest
import torch
from torch.nn import functional as F

from dgm4.losses import guidance_targets, mgca, patch_labels, pmm
from dgm4.losses.maps import patch_mask

EXACT = 1e-12
PADDED = -100
NOTHING = (0.0, 0.0, 0.0, 0.0)
# Boxes on a 4 x 4 grid and their labels: # inside, o the ring outside, . ignored.
DRAWINGS = {
    "exactly two patches": ((0.5, 0.375, 0.5, 0.25), ".oo.\no##o\n.oo.\n...."),
    "a little more": ((0.5, 0.375, 0.51, 0.25), "oooo\n####\noooo\n...."),
    "within one patch": ((0.9, 0.9, 0.05, 0.05), "....\n....\n...o\n..o#"),
    "the whole picture": ((0.5, 0.5, 1.0, 1.0), "####\n####\n####\n####"),
    "a corner, past the edge": ((0.0, 0.0, 0.6, 0.2), "##o.\noo..\n....\n...."),
    "a column": ((0.375, 0.5, 0.2, 1.0), "o#o.\no#o.\no#o.\no#o."),
    "no face": (NOTHING, "....\n....\n....\n...."),
    "a line": ((0.4, 0.4, 0.0, 0.4), "....\n....\n....\n...."),
}
VALUES = {"#": 1, "o": 0, ".": -1}


def drawn(drawing):
    return [VALUES[mark] for mark in drawing.replace("\n", "")]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def entropy(logit, target):
    return math.log(1 + math.exp(-logit if target else logit))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_patch_labels_are_as_drawn(dtype):
    box = torch.tensor([box for box, _ in DRAWINGS.values()], dtype=dtype)
    want = [drawn(drawing) for _, drawing in DRAWINGS.values()]
    assert patch_labels(box, 4).tolist() == want
    assert patch_mask(box, 4).tolist() == [[value == 1 for value in row] for row in want]


@pytest.mark.parametrize("grid", [16, 36])
def test_pixel_boxes_overlap_the_patches_that_exact_arithmetic_names(grid):
    """Boxes in whole pixels, some on patch borders, that went through float32."""
    draw, boxes, want = pyrandom.Random(0), [], []
    for index in range(60):
        width, height = (16 * draw.randint(4, 60), 16 * draw.randint(4, 60))
        width, height = (width, height) if index % 2 else (width + 1, height + 3)
        step = 16 if index % 2 else 1
        x0, y0 = step * draw.randint(0, width // step - 2), step * draw.randint(0, height // step - 2)
        x1 = step * draw.randint(x0 // step + 1, width // step)
        y1 = step * draw.randint(y0 // step + 1, height // step)
        boxes.append(((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height))
        columns, rows = (
            [Fraction(i, grid) * size < high and Fraction(i + 1, grid) * size > low for i in range(grid)]
            for size, low, high in ((width, x0, x1), (height, y0, y1))
        )
        want.append([column and row for row in rows for column in columns])
    assert patch_mask(torch.tensor(boxes, dtype=torch.float32), grid).tolist() == want


BOXES = torch.tensor([DRAWINGS["exactly two patches"][0], NOTHING, NOTHING], dtype=torch.float64)
TOKENS = torch.tensor([[0, 1, PADDED], [1, PADDED, PADDED], [0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
# Columns of tokens that are manipulated: labels leave out [CLS], so label t is column t + 1.
FAKE = [{2}, {1}, set()]


def test_guidance_marks_the_patches_and_the_tokens_of_each_pair_alone():
    inside = {5, 6}
    got = guidance_targets(BOXES, TOKENS, 4)
    assert got.shape == (3, 16, 4)
    for b, columns in enumerate(FAKE):
        for p in range(16):
            for t in range(4):
                assert got[b, p, t] == float((b == 0 and p in inside) or t in columns), (b, p, t)


def plain_mgca(scores):
    losses = []
    for b, columns in enumerate(FAKE):
        for t in range(4):
            for p in range(16):
                if MASK[b, t]:
                    target = (b == 0 and p in {5, 6}) or t in columns
                    losses.append(entropy(scores[b, t, 1 + p].item(), target))
    return sum(losses) / len(losses)


def test_mgca_is_the_formula():
    scores = random(3, 4, 17)
    assert abs(mgca(scores, BOXES, TOKENS, MASK).item() - plain_mgca(scores)) <= EXACT


def test_mgca_reads_neither_padding_nor_the_picture_token():
    scores = random(3, 4, 17)
    want = mgca(scores, BOXES, TOKENS, MASK)
    scores[:, :, 0] = float("nan")
    scores[MASK == 0] = float("nan")
    assert mgca(scores, BOXES, TOKENS, MASK) == want


def test_pmm_is_the_formula_with_the_published_gradient():
    """The published form masks logits and labels by multiplication and takes the mean over everything."""
    boxes = torch.tensor([box for box, _ in DRAWINGS.values()], dtype=torch.float64)
    labels = [drawn(drawing) for _, drawing in DRAWINGS.values()]
    logits = random(len(labels), 16).requires_grad_()
    pairs = zip(logits.flatten().tolist(), sum(labels, []), strict=True)
    want = sum(entropy(logit, label) for logit, label in pairs if label >= 0) / logits.numel()
    loss = pmm(logits, boxes)
    assert abs(loss.item() - want) <= EXACT

    target = torch.tensor(labels, dtype=torch.float64)
    labelled = (target >= 0).double()
    published = F.binary_cross_entropy_with_logits(logits * labelled, target * labelled)
    assert abs((published - loss).item() - math.log(2) * (1 - labelled.mean().item())) <= EXACT
    (ours,) = torch.autograd.grad(loss, logits)
    (theirs,) = torch.autograd.grad(published, logits)
    assert (ours - theirs).abs().max() <= EXACT


def test_gradients():
    scores, logits = random(3, 4, 17).requires_grad_(), random(3, 16).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mgca(x, BOXES, TOKENS, MASK), scores)
    assert torch.autograd.gradcheck(lambda x: pmm(x, BOXES), logits)


def test_nothing_to_learn_from_gives_zero_with_a_zero_gradient():
    scores, logits = random(3, 4, 17).requires_grad_(), random(3, 16).requires_grad_()
    loss = mgca(scores, BOXES, TOKENS, torch.zeros_like(MASK)) + pmm(logits, torch.zeros(3, 4))
    loss.backward()
    assert loss == 0
    assert not scores.grad.any()
    assert not logits.grad.any()


def test_a_caption_of_cls_alone():
    scores = random(1, 1, 17)
    got = mgca(scores, BOXES[:1], torch.zeros(1, 0, dtype=torch.int64), torch.ones(1, 1))
    want = sum(entropy(scores[0, 0, 1 + p].item(), p in {5, 6}) for p in range(16)) / 16
    assert abs(got.item() - want) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    scores, logits = random(3, 4, 17).to(dtype), random(3, 16).to(dtype)
    for got, want in (
        (mgca(scores, BOXES, TOKENS, MASK), mgca(scores.double(), BOXES, TOKENS, MASK)),
        (pmm(logits, BOXES.to(dtype)), pmm(logits.double(), BOXES)),
    ):
        assert got.dtype == torch.float32
        assert abs(got.item() - want.item()) <= 1e-6
