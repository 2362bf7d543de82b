"""Visual encoder: ViT with timm's key names, and CALS's CAFormer inside it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgm4.config import TORCH_EPS, VIT_EPS, ModelConfig
from dgm4.layers import PackedAttention, attention, merge_heads
from engine.registry.cals import CalsConfig


class SelfAttention(nn.Module):
    """Self-attention with one packed projection, [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the tokens of `x`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(merge_heads(attention(q, k, v)))


class Mlp(nn.Module):
    """Linear, erf GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=VIT_EPS)
        self.attn = SelfAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=VIT_EPS)
        self.mlp = Mlp(config.width, config.mlp_ratio * config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Non-overlapping patches, [B, 3, S, S] -> [B, P, D], row-major."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """Embed the patches of a normalised image."""
        return self.proj(image).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViT over [CLS] and patches; the final LayerNorm covers every token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.image_tokens, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.vision_depth))
        self.norm = nn.LayerNorm(config.width, eps=VIT_EPS)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, 1+P, D], positions added."""
        patches = self.patch_embed(image)
        cls = self.cls_token.expand(len(image), -1, -1)
        return torch.cat([cls, patches], dim=1) + self.pos_embed

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens twice: what the text branch reads and what the image branch reads."""
        x = self.embed(image)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x, x


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
