"""ASAP's losses over patches: guided cross-attention (MGCA) and patch manipulation modelling (PMM).

P patches, a square grid in row-major order; N text tokens, [CLS] first; boxes [B, 4] as (cx, cy, w, h) in
[0, 1], zeros = no manipulated face. Source: ASAP, arXiv:2412.12718, and its code, without two slips of the
latter: fake tokens are marked in their own sample, not in the whole batch, and token labels, which leave out
[CLS], are shifted to the columns of the map, which has it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dgm4.losses.boxes import corners
from dgm4.losses.precision import upcast

TOUCH = 1e-5  # of a patch; a float32 box that ends on a patch border may overlap the next by less
OUTSIDE = -1.0  # label of a patch that PMM ignores


def patch_mask(box: Tensor, grid: int) -> Tensor:
    """True for each patch that overlaps the box; [B, 4] -> [B, grid^2], all False without a box."""
    low, high = (grid * corner[:, :, None] for corner in corners(upcast(box)))
    start = torch.arange(grid, device=box.device, dtype=low.dtype)
    overlap = (start + TOUCH < high) & (start + 1 - TOUCH > low)
    inside = overlap[:, 1, :, None] & overlap[:, 0, None, :]
    return inside.flatten(1) & (box[:, 2:] > 0).all(-1, keepdim=True)


def guidance_targets(box: Tensor, token_labels: Tensor, grid: int) -> Tensor:
    """G[p, t] = 1 if patch p overlaps the box or token t is manipulated, else 0; [B, P, N].

    box [B, 4], token_labels [B, N-1] (1 = manipulated; any other value is not). Column 0 is [CLS], which is
    never a manipulated token; columns of padded tokens carry the patches and are for the caller to leave out.
    """
    fake = F.pad(token_labels == 1, (1, 0))
    return (patch_mask(box, grid)[:, :, None] | fake[:, None, :]).to(torch.float32)


def mgca(scores: Tensor, box: Tensor, token_labels: Tensor, attention_mask: Tensor) -> Tensor:
    """Binary cross-entropy with logits of the cross-attention map against `guidance_targets`.

    scores [B, N, 1+P]: mean over the heads of the scaled scores before the softmax, the image's [CLS] first
    (`Output.attention_map`); box [B, 4], token_labels [B, N-1], attention_mask [B, N]. The mean goes over
    the patches of all valid tokens, [CLS] included; the published one counts padded tokens too. Zero if none
    is valid.
    """
    logits = upcast(scores[:, :, 1:]).transpose(1, 2)
    targets = guidance_targets(box, token_labels, math.isqrt(logits.shape[1])).to(logits.dtype)
    valid = (attention_mask != 0)[:, None].expand_as(logits)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return losses[valid].sum() / valid.sum().clamp(min=1)


def patch_labels(box: Tensor, grid: int) -> Tensor:
    """1 for patches that overlap the box, 0 for their 4-neighbours outside it, -1 elsewhere; [B, grid^2]."""
    inside = patch_mask(box, grid).unflatten(1, (grid, grid))
    above, below = F.pad(inside, (0, 0, 0, 1))[:, 1:], F.pad(inside, (0, 0, 1, 0))[:, :-1]
    left, right = F.pad(inside, (0, 1))[:, :, 1:], F.pad(inside, (1, 0))[:, :, :-1]
    labels = torch.full(inside.shape, OUTSIDE, device=box.device)
    return labels.masked_fill(above | below | left | right, 0.0).masked_fill(inside, 1.0).flatten(1)


def pmm(patch_logits: Tensor, box: Tensor) -> Tensor:
    """Binary cross-entropy with logits of the labelled patches, summed and divided by B * P.

    patch_logits [B, P] of `patch_head`, box [B, 4]. The published code divides so too: it sets the logits of
    ignored patches to 0, which adds log 2 for each of them and no gradient. Here that constant is left out.
    Zero for a batch without boxes.
    """
    logits = upcast(patch_logits)
    labels = patch_labels(box, math.isqrt(logits.shape[1])).to(logits.dtype)
    labelled = labels != OUTSIDE
    losses = F.binary_cross_entropy_with_logits(logits[labelled], labels[labelled], reduction="sum")
    return losses / logits.numel()
