"""Visual encoder: ViT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.network.blocks import Gelu, Norm, SelfAttention, empty
from engine.network.linear import LinearInput
from engine.registry.config import VIT_EPS, NetworkConfig


class PatchEmbed(nn.Module):
    """Non-overlapping patches, [B, 3, S, S] -> [B, P, D], row-major."""

    def __init__(self, config: NetworkConfig, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        """Embed the patches of a normalised image."""
        return self.proj(image).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, width: int, hidden: int, activation: type[Gelu] = Gelu) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), activation(), nn.Linear(hidden, width)

    def forward(self, x: LinearInput) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.fc2(self.act(self.fc1(x), self.fc2))


class Block(nn.Module):
    """Pre-norm transformer block; its last residual sum is left to the next norm, which fuses it."""

    def __init__(self, config: NetworkConfig, eps: float = VIT_EPS, activation: type[Gelu] = Gelu) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = Norm(width, eps), Norm(width, eps)
        self.attention = SelfAttention(width, config.heads)
        self.mlp = Mlp(width, config.mlp_ratio * width, activation)

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, N, D] and a residual still to be added to it -> the same two."""
        x, y = self.norm1.add(x, delta, self.attention.qkv)
        x, y = self.norm2.add(x, self.attention(y), self.mlp.fc1)
        return x, self.mlp(y)


class Vision(nn.Module):
    """Visual encoder with one stream; `bias` is that of the patches' embedding."""

    def __init__(
        self,
        config: NetworkConfig,
        eps: float = VIT_EPS,
        activation: type[Gelu] = Gelu,
        bias: bool = True,
    ) -> None:
        super().__init__()
        width = config.width
        self.patch_embed = PatchEmbed(config, bias)
        self.cls = empty(1, 1, width)
        self.positions = empty(1, config.grid**2, width)
        self.blocks = nn.ModuleList(Block(config, eps, activation) for _ in range(config.vision_depth))
        self.norm = Norm(width, eps)

    @property
    def dtype(self) -> torch.dtype:
        """Of the stream."""
        return self.positions.dtype

    def embed(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, 1+P, D]."""
        patches = self.patch_embed(image) + self.positions
        return torch.cat([self.cls.expand(image.shape[0], -1, -1), patches], dim=1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens for the text branch and for the image branch, here the same."""
        x = self.norm(*run_blocks(self.blocks, self.embed(image)))
        return x, x


def run_blocks(blocks: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run x through the blocks; returns as a block does."""
    delta = None
    for block in blocks:
        x, delta = block(x, delta)
    return x, delta
