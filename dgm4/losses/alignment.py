"""CALS's cross-modal semantic alignment (CSAM): MAC, a divergence of the features, and a ranking term.

Features and queues as in `dgm4.losses.contrastive`. Source: CALS, "Multimodal Deepfake Detection via
Coarse-Aware Localization Refinement and Semantic Alignment" (Pattern Recognition 2025), and its released
code, which has the first two. Of the paper's dynamic boundary and hard negatives no formula is public.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgm4.losses.contrastive import ALPHA, TEMPERATURE, mac
from dgm4.losses.precision import upcast

MARGIN = 0.2


def feature_divergence(image: Tensor, text: Tensor) -> Tensor:
    """KL(V || T) + KL(T || V), V and T the softmax over the channels of image and text [B, P].

    That is the sum of (V - T) (log V - log T), over the channels and, as published, over the batch (the
    released configuration has 8 pairs). All pairs count, manipulated ones too. The published floor of 1e-8
    inside the logarithm is left out: with unit features no probability comes near it.
    """
    log_v, log_t = upcast(image).log_softmax(-1), upcast(text).log_softmax(-1)
    return ((log_v.exp() - log_t.exp()) * (log_v - log_t)).sum()


def _hinges(anchor: Tensor, other: Tensor, other_m: Tensor, margin: float, dynamic: bool) -> Tensor:
    """max(0, m_ij + anchor_i . other_j - anchor_i . other_i) for row i and negative j, [B, B].

    m_ij is `margin`, or if dynamic margin (1 - other_m_i . other_m_j) / 2, in [0, margin].
    """
    with torch.autocast(anchor.device.type, enabled=False):
        cosines = upcast(anchor) @ upcast(other).T
        with torch.no_grad():
            apart = (1 - upcast(other_m) @ upcast(other_m).T) / 2
    return ((margin * apart if dynamic else margin) + cosines - cosines.diagonal()[:, None]).clamp(min=0)


def ranking(
    image: Tensor,
    text: Tensor,
    image_m: Tensor,
    text_m: Tensor,
    pristine: Tensor,
    margin: float = MARGIN,
    *,
    dynamic_margin: bool = True,
    hard_negatives: bool = True,
) -> Tensor:
    """Hinge loss of pristine pairs against the other pairs of the batch, both directions added.

    This reading is ours, see the module: the ranking loss of VSE++ (arXiv:1707.05612), with the hardest
    negative of each row if `hard_negatives`, else the mean over its negatives; and with a margin that shrinks
    towards 0 as the negative comes to mean the same as the positive if `dynamic_margin`, else a constant one.
    Mean over the pristine pairs; zero if there are none, or no other pair. All of image, text, image_m,
    text_m [B, P], pristine [B] bool.
    """
    negative = ~torch.eye(len(image), dtype=torch.bool, device=image.device)
    total = upcast(image).new_zeros(())
    for anchor, other, other_m in ((image, text, text_m), (text, image, image_m)):
        hinges = _hinges(anchor, other, other_m, margin, dynamic_margin) * negative
        row = hinges.amax(-1) if hard_negatives else hinges.sum(-1) / negative.sum(-1).clamp(min=1)
        total = total + (row * pristine).sum() / pristine.sum().clamp(min=1)
    return total


def csam(
    image: Tensor,
    text: Tensor,
    image_m: Tensor,
    text_m: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    pristine: Tensor,
    temperature: float | Tensor = TEMPERATURE,
    alpha: float = ALPHA,
    *,
    dynamic_margin: bool = False,
    hard_negatives: bool = False,
) -> Tensor:
    """`mac` plus `feature_divergence`, as released; plus `ranking` if either option is on.

    The image features come from CALS's fused stream. Shapes as in `mac`; a scalar.
    """
    loss = mac(image, text, image_m, text_m, image_queue, text_queue, pristine, temperature, alpha)
    loss = loss + feature_divergence(image, text)
    if dynamic_margin or hard_negatives:
        options = {"dynamic_margin": dynamic_margin, "hard_negatives": hard_negatives}
        loss = loss + ranking(image, text, image_m, text_m, pristine, **options)
    return loss
