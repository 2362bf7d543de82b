"""Image branches: box and manipulation-type heads on image features that attend to the caption."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from engine.network.blocks import CrossAttention, LatentPool, Norm, PatchClassifier, dtype_of, empty, head
from engine.network.config import TORCH_EPS, NetworkConfig
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
        self.bbox_head = head(width, 4)
        self.itm_head, self.cls_head = head(width, 2), head(width, self.classes)

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


class AsapBranch(ImageBranch):
    """ASAP's: self-attention first, the normalised image as residual, the box feature in the logits."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.own = CrossAttention(config.width, config.heads)
        self.share_real_fake, self.share_classes = empty(), empty()

    def forward(
        self, image: Tensor, text: Tensor, mask: Tensor, fused: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Box, real/fake logits and type logits."""
        x = self.norm(image)
        patches = x[:, 1:]
        key, value = self.cross.project(self.norm(text))
        attended = self.own(patches, *self.own.project(x))
        feature = self.pool(self.cross(attended, key, value, mask) + patches)
        real_fake = self.itm_head(fused + self.share_real_fake * feature)
        return self.locate(feature), real_fake, self.cls_head(fused + self.share_classes * feature)


class CalsBranch(ImageBranch):
    """CALS's: a coarse box guides a second pass over the same text keys (rewrite 7)."""

    classes = 2

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        one, two, three = config.guidance_widths
        self.size = config.image_size
        self.first = _conv(1, one)
        self.rest = nn.Sequential(
            _conv(one, two),
            nn.ReLU(),
            _conv(two, three),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(three, config.width, 1),
        )
        self.refined_pool = LatentPool(config.width, config.heads)
        # One aggregator with two queries.
        self.refined_pool.norm, self.refined_pool.out = self.pool.norm, self.pool.out
        self.faces = PatchClassifier(config.width)

    def forward(
        self, image: Tensor, text: Tensor, mask: Tensor, fused: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Box, real/fake logits and type logits."""
        key, value = self.cross.project(self.norm(text))
        crossed = image + self.cross(self.norm(image), key, value, mask)
        coarse = self.locate(self.pool(crossed[:, 1:]))
        encoded = self.rest(
            gaussian_guidance(coarse, self.first.weight, cast(Tensor, self.first.bias), self.size)
        )
        guided = image[:, 1:] + encoded.flatten(2).transpose(1, 2)
        refined = guided + self.cross(self.norm(guided), key, value, mask)
        wide = crossed.to(dtype_of(self.faces))
        faces = self.faces(wide[:, 1:], wide[:, 0]).to(fused.dtype)
        box = self.locate(self.refined_pool(refined))
        return box, self.itm_head(fused), torch.cat([faces, self.cls_head(fused)], dim=1)


def _conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, KERNEL, stride=STRIDE, padding=PADDING)


BRANCHES: dict[str, type[ImageBranch]] = {"hammer": ImageBranch, "asap": AsapBranch, "cals": CalsBranch}
