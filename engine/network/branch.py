"""Image branch: box and manipulation-type heads on image features that attend to the caption."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from engine.network.blocks import CrossAttention, Head, LatentPool, Norm, dtype_of
from engine.registry.config import TORCH_EPS, NetworkConfig
from kernels.gaussian_guidance import KERNEL, PADDING, STRIDE, gaussian_guidance


class ImageBranch(nn.Module):
    """HAMMER's: patches attend to the caption, the learnt query pools them, a head predicts the box.

    Nothing uses the [CLS] row afterwards, so it has no query (rewrite 8). `classes` is the number of types
    predicted from the fused [CLS].
    """

    classes = 4

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.norm = Norm(width, TORCH_EPS)
        self.cross = CrossAttention(width, heads)
        self.pool = LatentPool(width, heads)
        self.bbox_head = Head(width, 4, exact=True)
        self.itm_head, self.cls_head = Head(width, 2), Head(width, self.classes)

    def locate(self, feature: Tensor) -> Tensor:
        """[B, D] -> box [B, 4], in the dtype of the box head, at least float32."""
        return self.bbox_head(feature.to(dtype_of(self.bbox_head))).sigmoid()

    def forward(
        self, image: Tensor, text: Tensor, mask: Tensor, fused: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Box, real/fake logits and type logits."""
        patches = image[:, 1:]
        key, value = self.cross.project(self.norm(text))
        feature = self.pool(patches + self.cross(self.norm(patches), key, value, mask))
        return self.locate(feature), self.itm_head(fused), self.cls_head(fused)


class Guidance(nn.Module):
    """Encodes the Gaussian of a box on the image as one vector a patch: CALS's LIG."""

    def __init__(self, width: int, widths: tuple[int, int, int], image_size: int) -> None:
        super().__init__()
        one, two, three = widths
        self.size = image_size
        self.first = _conv(1, one)
        self.rest = nn.Sequential(
            _conv(one, two),
            nn.ReLU(),
            _conv(two, three),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(three, width, 1),
        )

    def forward(self, box: Tensor) -> Tensor:
        """Box [B, 4] as (cx, cy, w, h) in [0, 1] -> [B, P, D]."""
        first = gaussian_guidance(box, self.first.weight, cast(Tensor, self.first.bias), self.size)
        return self.rest(first).flatten(2).transpose(1, 2)


def _conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, KERNEL, stride=STRIDE, padding=PADDING)
