"""ASAP: arXiv:2412.12718 (CVPR 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgm4.layers import PackedAttention
from dgm4.model import Branch, Detector
from engine.registry.config import FusionConfig


class SelfCrossAttention(nn.Module):
    """ASAP's image branch: s = self(x); cross(s, text) + x, where x is the normalised image."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.selfatten = PackedAttention(config.width, config.heads)
        self.crossatten = PackedAttention(config.width, config.heads)

    def forward(self, image: Tensor, text: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B, 1+P, D], [B, N, D] -> [B, 1+P, D]."""
        return self.crossatten(self.selfatten(image, image), text, bias) + image


class Asap(Detector):
    """ASAP: both logits also read the box feature, and the last fusion layer yields the MGCA map."""

    has_map = True

    def __init__(self, config: FusionConfig) -> None:
        super().__init__(config)
        self.it_cross_attn = SelfCrossAttention(config)
        self.UtilsB = nn.Parameter(torch.zeros(()))
        self.UtilsC = nn.Parameter(torch.zeros(()))

    def branch(self, image: Tensor, text: Tensor, bias: Tensor, fused: Tensor) -> Branch:
        """Box from the image; the logits from the fused [CLS] plus a learnt share of the box feature."""
        crossed = self.cross(self.it_cross_attn, image, text, bias)
        feature = self.aggregate(self.cls_token_local, crossed)
        real_fake = self.itm_head(fused + self.UtilsB * feature)
        classes = self.cls_head(fused + self.UtilsC * feature)
        return Branch(self.locate(feature), real_fake, classes, crossed, feature)


Published = Asap
