"""Visual encoders: ViT, and CALS's CAFormer with both of its streams."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.network.blocks import ConvFusion, Norm, SelfAttention, empty
from engine.network.config import TORCH_EPS, VIT_EPS, NetworkConfig


class PatchEmbed(nn.Module):
    """Non-overlapping patches, [B, 3, S, S] -> [B, P, D], row-major."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """Embed the patches of a normalised picture."""
        return self.proj(image).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, erf GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = Norm(width, VIT_EPS), Norm(width, VIT_EPS)
        self.attention = SelfAttention(width, config.heads)
        self.mlp = Mlp(width, config.mlp_ratio * width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vision(nn.Module):
    """Visual encoder with one stream."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.width
        self.patch_embed = PatchEmbed(config)
        self.cls = empty(1, 1, width)
        self.positions = empty(1, config.grid**2, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.vision_depth))
        self.norm = Norm(width, VIT_EPS)

    def embed(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, 1+P, D]."""
        patches = self.patch_embed(image) + self.positions
        return torch.cat([self.cls.expand(image.shape[0], -1, -1), patches], dim=1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens for the text branch and for the image branch, here the same."""
        x = self.embed(image)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x, x


class CAFormer(Vision):
    """Visual encoder of CALS: both streams run through the last blocks as one batch of 2B (rewrite 4)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        width, hidden = config.width, config.mlp_ratio * config.width
        self.start = config.caformer_start
        self.attention = SelfAttention(width, config.caformer_heads)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.norm1, self.norm2 = Norm(width, TORCH_EPS), Norm(width, TORCH_EPS)
        self.fusion = ConvFusion(width)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The fused tokens for the text branch, the plain ones for the image branch."""
        x = self.embed(image)
        for block in self.blocks[: self.start]:
            x = block(x)
        tokens = self.norm1(x + self.attention(x))
        tokens = self.norm2(tokens + self.ffn(tokens))
        streams = torch.cat([self.fusion(image, tokens), x])
        for block in self.blocks[self.start :]:
            streams = block(streams)
        fused, plain = self.norm(streams).unflatten(0, (2, -1)).unbind(0)
        return fused, plain


def build_vision(config: NetworkConfig) -> Vision:
    """The visual encoder of the network `config` names."""
    return CAFormer(config) if config.name == "cals" else Vision(config)
