"""HAMMER: "Detecting and Grounding Multi-Modal Media Manipulation" (CVPR 2023)."""

from __future__ import annotations

from torch import Tensor

from dgm4.layers import PackedAttention
from dgm4.model import Branch, Detector
from engine.registry.config import FusionConfig


class Hammer(Detector):
    """HAMMER: the cross-attended image keeps the raw residual."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__(config)
        self.it_cross_attn = PackedAttention(config.width, config.heads)

    def branch(self, image: Tensor, text: Tensor, bias: Tensor, fused: Tensor) -> Branch:
        """Box from the image; both logits from the fused [CLS]."""
        crossed = image + self.cross(self.it_cross_attn, image, text, bias)
        feature = self.aggregate(self.cls_token_local, crossed)
        return Branch(self.locate(feature), self.itm_head(fused), self.cls_head(fused), crossed, feature)


Published = Hammer
