"""CALS: "Multimodal Deepfake Detection via Coarse-Aware Localization Refinement and Semantic Alignment".

Pattern Recognition, 2025.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgm4.config import TORCH_EPS
from dgm4.layers import PackedAttention
from dgm4.model import Branch, Detector
from dgm4.vision import VisionTransformer
from engine.registry.cals import CalsConfig

GAUSSIAN_FLOOR = 1e-8  # keeps the exponent finite for an empty box


class ConvBranch(nn.Module):
    """Conv, BatchNorm, ReLU at full resolution, [B, 3, S, S] -> [B, D, S, S]."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, kernel, padding=kernel // 2, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps=TORCH_EPS)

    def forward(self, image: Tensor) -> Tensor:
        """Local features of every pixel."""
        return F.relu(self.bn2(self.conv(image)))

    def sample(self, image: Tensor, grid: int) -> Tensor:
        """Mean over the four pixels in the middle of each patch, [B, D, G, G]."""
        patch = image.shape[-1] // grid
        first = patch // 2 - 1 - self.conv.kernel_size[0] // 2
        pixels = [
            F.conv2d(image[:, :, y:, x:], self.conv.weight, stride=patch)[:, :, :grid, :grid]
            for y in (first, first + 1)
            for x in (first, first + 1)
        ]
        return F.relu(self.bn2(torch.cat(pixels, dim=2))).unflatten(2, (4, -1)).mean(2)


class PostNormBlock(nn.Module):
    """LN(x + MHA(x)), then LN(. + FFN(.)) with ReLU; eps 1e-5."""

    def __init__(self, config: CalsConfig) -> None:
        super().__init__()
        hidden = config.mlp_ratio * config.width
        self.mha = PackedAttention(config.width, config.caformer_heads)
        self.layer_norm1 = nn.LayerNorm(config.width, eps=TORCH_EPS)
        self.ffn = nn.Sequential(nn.Linear(config.width, hidden), nn.ReLU(), nn.Linear(hidden, config.width))
        self.layer_norm2 = nn.LayerNorm(config.width, eps=TORCH_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = self.layer_norm1(x + self.mha(x, x))
        return self.layer_norm2(x + self.ffn(x))


class CAFormer(VisionTransformer):
    """The visual encoder of CALS: a convolution branch fused into the tokens after `caformer_start` blocks.

    The fusion happens at the image's own resolution, as published: tokens up, local features added,
    the sum down again, [B, D, S, S] floats each time. With `sampled` only the four pixels of each patch
    that the way down reads are computed: the same values, 64 times less work; while training, the batch
    norm then takes its statistics over these pixels alone.
    """

    sampled = False

    def __init__(self, config: CalsConfig) -> None:
        super().__init__(config)
        self.start = config.caformer_start
        self.grid, self.image_size = config.grid, config.image_size
        first, *others = config.caformer_kernels
        self.Conv = ConvBranch(config.width, first)
        self.Scales = nn.ModuleList(ConvBranch(config.width, kernel) for kernel in others)
        self.MHA2 = PostNormBlock(config)

    def fuse(self, x: Tensor, image: Tensor) -> Tensor:
        """Fuse tokens [B, 1+P, D] with the local features of `image` [B, 3, S, S]."""
        tokens = self.MHA2(x)
        cls, patches = tokens[:, :1], tokens[:, 1:]
        field = patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        if self.sampled:
            field = self._blur(self._blur(field, 2), 3)
            field = sum((branch.sample(image, self.grid) for branch in self._branches()), field)
            return torch.cat([cls, field.flatten(2).transpose(1, 2)], dim=1)
        field = F.interpolate(field, size=image.shape[-2:], mode="bilinear", align_corners=False)
        field = sum((branch(image) for branch in self._branches()), field)
        field = F.interpolate(field, size=(self.grid, self.grid), mode="bilinear")
        return torch.cat([cls, field.flatten(2).transpose(1, 2)], dim=1)

    def _branches(self) -> list[ConvBranch]:
        return [self.Conv, *cast("list[ConvBranch]", list(self.Scales))]

    def _blur(self, field: Tensor, dim: int) -> Tensor:
        """What is left of the way up and down: a blur [1/4p, 1 - 1/2p, 1/4p], patches of p pixels."""
        last = field.shape[dim] - 1
        before = torch.cat([field.narrow(dim, 0, 1), field.narrow(dim, 0, last)], dim)
        after = torch.cat([field.narrow(dim, 1, last), field.narrow(dim, last, 1)], dim)
        side = self.grid / (4 * self.image_size)
        return (1 - 2 * side) * field + side * (before + after)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the fused tokens, for the text branch, and the plain ones, for the image branch."""
        x = self.embed(image)
        for block in self.blocks[: self.start]:
            x = block(x)
        fused = self.fuse(x, image)
        for block in self.blocks[self.start :]:
            x, fused = block(x), block(fused)
        return self.norm(fused), self.norm(x)


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

    def __init__(self, width: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        one, two, three = widths
        self.conv_net = nn.Sequential(
            nn.Conv2d(1, one, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(one, two, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(two, three, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(three, width, 1),
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
        self.LIG = Guidance(config.width, config.guidance_widths)
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
