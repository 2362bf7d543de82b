"""Visual encoder: ViT with timm's key names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgm4.config import VIT_EPS, ModelConfig
from dgm4.layers import attention, merge_heads


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
