"""CALS: "Multimodal Deepfake Detection via Coarse-Aware Localization Refinement and Semantic Alignment".

Pattern Recognition, 2025.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgm4.layers import PackedAttention
from dgm4.model import Branch, Detector
from dgm4.vision import CAFormer
from engine.registry.cals import CalsConfig

GAUSSIAN_FLOOR = 1e-8  # keeps the exponent finite for an empty box


class PatchClassifier(nn.Module):
    """CALS's face classes: Linear([CLS]) + lambda * mean(sigmoid(conv1x1(patches)) * patches) per class."""

    def __init__(self, width: int, classes: int = 2) -> None:
        super().__init__()
        self.lambda_param = nn.Parameter(torch.full((), 0.5))
        self.conv_attention = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in range(classes))
        self.fc_global = nn.Linear(width, classes)

    def forward(self, patches: Tensor, cls: Tensor) -> Tensor:
        """patches [B, P, D], cls [B, D] -> [B, classes]."""
        convs = [cast(nn.Conv2d, conv) for conv in self.conv_attention]
        weight = torch.cat([conv.weight.flatten(1) for conv in convs])
        bias = torch.cat([cast(Tensor, conv.bias) for conv in convs])
        gate = F.linear(patches, weight, bias).sigmoid()
        # The gate is the same for every channel, so the mean over channels can come first.
        pooled = (gate * patches.mean(-1, keepdim=True)).mean(1)
        return self.fc_global(cls) + self.lambda_param * pooled


class Guidance(nn.Module):
    """CALS's LIG: a Gaussian map of the coarse box [B, 1, S, S] -> one vector a patch, [B, P, D]."""

    def __init__(self, config: CalsConfig) -> None:
        super().__init__()
        one, two, three = config.guidance_widths
        self.conv_net = nn.Sequential(
            nn.Conv2d(1, one, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(one, two, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(two, three, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(three, config.width, 1),
        )

    def forward(self, gaussian: Tensor) -> Tensor:
        """Encode the map."""
        return self.conv_net(gaussian).flatten(2).transpose(1, 2)


def gaussian_map(box: Tensor, size: int) -> Tensor:
    """Gaussian of box [B, 4] (cx, cy, w, h in [0, 1]) on a size x size pixel grid, [B, 1, size, size].

    exp(-((x - size cx)^2 + (y - size cy)^2) / (2 s^2 + 1e-8)), s^2 = (size h / 2)^2 + (size w / 2)^2, pixel
    positions 0..size-1. At least float32, since 1e-8 underflows in half precision.
    """
    box = box.to(torch.promote_types(box.dtype, torch.float32))
    grid = torch.arange(size, device=box.device, dtype=box.dtype)
    cx, cy, w, h = (size * box)[:, :, None, None].unbind(1)
    spread = 2 * ((h / 2) ** 2 + (w / 2) ** 2) + GAUSSIAN_FLOOR
    distance = (grid[None, None, :] - cx) ** 2 + (grid[None, :, None] - cy) ** 2
    return torch.exp(-distance / spread).clamp(0, 1)[:, None]


class Cals(Detector):
    """CALS: CAFormer, guided refinement of the box (GLRM), face classes from the patches."""

    cross_classes = 2
    encoder = CAFormer

    def __init__(self, config: CalsConfig) -> None:
        super().__init__(config)
        self.it_cross_attn = PackedAttention(config.width, config.heads)
        self.cls_token_local_e = nn.Parameter(torch.zeros(1, 1, config.width))
        self.LIG = Guidance(config)
        self.fch = PatchClassifier(config.width)
        nn.init.trunc_normal_(self.cls_token_local_e, std=0.02)

    def guide(self, image: Tensor, coarse: Tensor) -> Tensor:
        """Add the encoded Gaussian of the coarse box [B, 4] to the patches of image [B, 1+P, D]."""
        guidance = self.LIG(gaussian_map(coarse, self.config.image_size).to(image.dtype))
        return torch.cat([image[:, :1], image[:, 1:] + guidance], dim=1)

    def branch(self, image: Tensor, text: Tensor, bias: Tensor, fused: Tensor) -> Branch:
        """Coarse box, refined box from the guided image, and the logits."""
        crossed = image + self.cross(self.it_cross_attn, image, text, bias)
        coarse = self.locate(self.aggregate(self.cls_token_local, crossed))
        guided = self.guide(image, coarse)
        refined = guided + self.cross(self.it_cross_attn, guided, text, bias)
        feature = self.aggregate(self.cls_token_local_e, refined)
        classes = torch.cat([self.fch(crossed[:, 1:], crossed[:, 0]), self.cls_head(fused)], dim=1)
        return Branch(self.locate(feature), self.itm_head(fused), classes, crossed, feature, coarse)


Published = Cals
