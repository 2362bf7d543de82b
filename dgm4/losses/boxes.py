"""Grounding of the manipulated face (IMG): L1 and generalised IoU of boxes (cx, cy, w, h) in [0, 1].

Source: HAMMER (CVPR 2023) after DETR; generalised IoU: Rezatofighi et al., CVPR 2019. The published code
leaves no pair out and divides by their number B: a pair without a manipulated face has the target
(0, 0, 0, 0), which the network learns to answer and the benchmark's IoU asks of it (all corners < 1e-4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgm4.losses.precision import upcast

EMPTY = 1e-12  # an area below this, of a square of side 1e-6, counts as none


def box_l1(box: Tensor, target: Tensor) -> Tensor:
    """Sum over the four coordinates of |box - target|, mean over the pairs.

    box, target [B, 4]; target zeros = no manipulated face, which counts like any other target.
    """
    return (upcast(box) - upcast(target)).abs().sum(-1).mean()


def corners(box: Tensor) -> tuple[Tensor, Tensor]:
    """(cx, cy, w, h) [B, 4] -> top left and bottom right corner, [B, 2] each."""
    centre, half = box[:, :2], box[:, 2:] / 2
    return centre - half, centre + half


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Divide areas; zero, without a gradient, where the whole is empty."""
    empty = whole < EMPTY
    return torch.where(empty, 0.0, part / torch.where(empty, 1.0, whole))


def generalised_iou(box: Tensor, target: Tensor) -> Tensor:
    """|A and B| / |A or B| - (|C| - |A or B|) / |C|, C the smallest box round both; [B] in [-1, 1].

    box, target [B, 4] as (cx, cy, w, h) with w, h >= 0. A quotient with an empty denominator is zero, so
    that two boxes shrunk to the same point give 0.
    """
    box, target = upcast(box), upcast(target)
    (low, high), (target_low, target_high) = corners(box), corners(target)
    overlap = (torch.min(high, target_high) - torch.max(low, target_low)).clamp(min=0).prod(-1)
    hull = (torch.max(high, target_high) - torch.min(low, target_low)).prod(-1)
    union = box[:, 2:].prod(-1) + target[:, 2:].prod(-1) - overlap
    return _ratio(overlap, union) - _ratio(hull - union, hull)


def box_giou(box: Tensor, target: Tensor) -> Tensor:
    """Mean over the pairs of 1 - generalised IoU; box, target [B, 4].

    Towards the empty target of a pair without a face it is 1 at best, when the box contains the origin.
    """
    return (1 - generalised_iou(box, target)).mean()
