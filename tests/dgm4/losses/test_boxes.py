"""Box losses against areas worked out by hand and, for random boxes, in plain Python."""

from __future__ import annotations

import pytest
import torch

from dgm4.losses import box_giou, box_l1
from dgm4.losses.boxes import generalised_iou

EXACT = 1e-12
WHOLE = (0.5, 0.5, 1.0, 1.0)
# box, target, IoU - (hull - union) / hull, by hand.
CASES = {
    "identical": ((0.5, 0.5, 0.2, 0.4), (0.5, 0.5, 0.2, 0.4), 1.0),
    # Two unit-height strips [0, 1/4] and [3/4, 1]: union 1/2, hull 1.
    "disjoint": ((0.125, 0.5, 0.25, 1.0), (0.875, 0.5, 0.25, 1.0), 0 - 0.5),
    # Squares of side 1/4 in opposite corners: union 1/8, hull 1.
    "corners": ((0.125, 0.125, 0.25, 0.25), (0.875, 0.875, 0.25, 0.25), 0 - 7 / 8),
    "contained": ((0.5, 0.5, 0.5, 0.5), WHOLE, 0.25 - 0),
    "containing": (WHOLE, (0.25, 0.75, 0.5, 0.25), 0.125 - 0),
    # Halves that share an edge: no overlap, and the hull is their union.
    "touching": ((0.25, 0.5, 0.5, 1.0), (0.75, 0.5, 0.5, 1.0), 0.0),
    # [0, 1/2]^2 and [1/4, 3/4]^2: overlap 1/16, union 7/16, hull 9/16.
    "overlapping": ((0.25, 0.25, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5), 1 / 7 - 2 / 9),
    # No face: [1/4, 1/2]^2 against the origin; union 1/16, hull 1/4.
    "no face": ((0.375, 0.375, 0.25, 0.25), (0.0, 0.0, 0.0, 0.0), 0 - 3 / 4),
    "no face, box over the origin": ((0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.0, 0.0), 0.0),
    "nothing twice": ((0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0), 0.0),
    "the same point": ((0.3, 0.7, 0.0, 0.0), (0.3, 0.7, 0.0, 0.0), 0.0),
    "a point inside": ((0.5, 0.5, 0.0, 0.0), WHOLE, 0.0),
    # A line of height 1/2 at x = 1/4 against the origin: union 0, hull 1/8.
    "a line and a point": ((0.25, 0.25, 0.0, 0.5), (0.0, 0.0, 0.0, 0.0), -1.0),
}


def tensors(*boxes, dtype=torch.float64):
    return [torch.tensor([box], dtype=dtype) for box in boxes]


def plain_giou(a, b):
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (
        (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) for cx, cy, w, h in (a, b)
    )
    overlap = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    union = a[2] * a[3] + b[2] * b[3] - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return overlap / union - (hull - union) / hull


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, 1e-6)])
def test_generalised_iou_by_hand(case, dtype, tolerance):
    box, target, want = CASES[case]
    box, target = tensors(box, target, dtype=dtype)
    assert abs(generalised_iou(box, target).item() - want) <= tolerance
    assert abs(generalised_iou(target, box).item() - want) <= tolerance
    assert abs(box_giou(box, target).item() - (1 - want)) <= tolerance


def test_every_pair_counts_those_without_a_face_too():
    """Distances 0.1 + 0.2 + 0.3 + 0.1 and, towards no face, 0.5 + 0.5 + 0.25 + 0.25; three pairs."""
    box = torch.tensor(
        [[0.4, 0.4, 0.5, 0.3], [0.5, 0.5, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64
    )
    target = torch.zeros_like(box)
    target[0] = torch.tensor([0.5, 0.6, 0.2, 0.2], dtype=torch.float64)
    assert abs(box_l1(box, target).item() - (0.7 + 1.5 + 0) / 3) <= EXACT
    want = sum(1 - plain_giou(*pair) for pair in zip(box[:2].tolist(), target[:2].tolist(), strict=True))
    assert abs(box_giou(box, target).item() - (want + 1) / 3) <= EXACT


def test_random_boxes_are_the_formula():
    generator = torch.Generator().manual_seed(0)
    box, target = torch.rand(2, 200, 4, generator=generator, dtype=torch.float64)
    want = [plain_giou(*pair) for pair in zip(box.tolist(), target.tolist(), strict=True)]
    assert (generalised_iou(box, target) - torch.tensor(want, dtype=torch.float64)).abs().max() <= EXACT


def test_gradients():
    generator = torch.Generator().manual_seed(1)
    box, target = torch.rand(2, 20, 4, generator=generator, dtype=torch.float64)
    target[::4] = 0
    box.requires_grad_()
    assert torch.autograd.gradcheck(lambda b: box_giou(b, target), box)
    assert torch.autograd.gradcheck(lambda b: box_l1(b, target), box)


@pytest.mark.parametrize("target", [(0.0, 0.0, 0.0, 0.0), (0.3, 0.7, 0.1, 0.1), WHOLE])
@pytest.mark.parametrize(
    "box", [(0.0, 0.0, 0.0, 0.0), (0.3, 0.7, 0.0, 0.0), (0.3, 0.7, 0.0, 0.4), (1e-8,) * 4]
)
def test_degenerate_boxes_give_finite_gradients(box, target):
    box, target = tensors(box, target, dtype=torch.float32)
    box.requires_grad_()
    (box_giou(box, target) + box_l1(box, target)).backward()
    assert box.grad.isfinite().all()


def test_descent_brings_the_box_to_its_target():
    logits = torch.zeros(2, 4, requires_grad=True)
    target = torch.tensor([[0.3, 0.6, 0.2, 0.4], [0.0, 0.0, 0.0, 0.0]])
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        (box_giou(logits.sigmoid(), target) + box_l1(logits.sigmoid(), target)).backward()
        optimizer.step()
    assert (logits.sigmoid() - target).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    """The area of a box of side 2^-13 underflows in float16."""
    box, target = tensors((0.0, 0.0, 2.0**-13, 2.0**-13), (0.0, 0.0, 2.0**-12, 2.0**-12), dtype=dtype)
    got = box_giou(box, target)
    assert got.dtype == box_l1(box, target).dtype == torch.float32
    assert abs(got.item() - 0.75) <= 1e-6
