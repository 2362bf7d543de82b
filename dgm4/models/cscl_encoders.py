"""METER's encoders and fusion as CSCL has them: CLIP's ViT and RoBERTa, which read each other in six layers.

Parameters have the released names.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from dgm4.config import BERT_EPS, BERT_MASK, TORCH_EPS
from dgm4.layers import PackedAttention, padding_bias
from dgm4.text import BertLayer
from engine.registry.cscl import FIRST_POSITION, CsclConfig


class QuickGelu(nn.Module):
    """z sigmoid(1.702 z), CLIP's activation."""

    def forward(self, z: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return z * torch.sigmoid(1.702 * z)


class ClipMlp(nn.Module):
    """Linear, QuickGELU, Linear, under CLIP's names."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = nn.Linear(width, hidden), QuickGelu(), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.c_proj(self.gelu(self.c_fc(x)))


class ClipBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: CsclConfig) -> None:
        super().__init__()
        width = config.width
        self.attn = PackedAttention(width, config.heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width, TORCH_EPS), nn.LayerNorm(width, TORCH_EPS)
        self.mlp = ClipMlp(width, config.mlp_ratio * width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1+P, D] -> [B, 1+P, D]."""
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed)
        return x + self.mlp(self.ln_2(x))


class ClipVision(nn.Module):
    """CLIP's ViT without its last block and its projection."""

    def __init__(self, config: CsclConfig) -> None:
        super().__init__()
        width = config.width
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(config.image_tokens, width))
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width, TORCH_EPS), nn.LayerNorm(width, TORCH_EPS)
        blocks = nn.ModuleList(ClipBlock(config) for _ in range(config.vision_depth))
        self.transformer = nn.ModuleDict({"resblocks": blocks})

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, 1+P, D]."""
        patches = self.conv1(image).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(len(image), 1, -1)
        x = self.ln_pre(torch.cat([cls, patches], dim=1) + self.positional_embedding)
        for block in cast(nn.ModuleList, self.transformer["resblocks"]):
            x = block(x)
        return self.ln_post(x)


class RobertaEmbeddings(nn.Module):
    """Words, positions from 2 on, and the one token type."""

    def __init__(self, config: CsclConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocabulary, config.width)
        self.position_embeddings = nn.Embedding(FIRST_POSITION + config.positions, config.width)
        self.token_type_embeddings = nn.Embedding(1, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, TORCH_EPS)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, N] -> [B, N, D]."""
        positions = self.position_embeddings.weight[FIRST_POSITION : FIRST_POSITION + input_ids.shape[1]]
        return self.LayerNorm(
            self.word_embeddings(input_ids) + positions + self.token_type_embeddings.weight[0]
        )


class Roberta(nn.Module):
    """RoBERTa's encoder."""

    def __init__(self, config: CsclConfig) -> None:
        super().__init__()
        self.embeddings = RobertaEmbeddings(config)
        layers = nn.ModuleList(BertLayer(config, False, TORCH_EPS) for _ in range(config.text_depth))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, input_ids: Tensor, bias: Tensor) -> Tensor:
        """Ids [B, N] and the bias of their padding [B, 1, 1, N] -> [B, N, D]."""
        x = self.embeddings(input_ids)
        for layer in _bert_layers(self.encoder["layer"]):
            x = layer.feed_forward(layer.attention(x, x, bias))
        return x


class Pooler(nn.Module):
    """tanh of a Linear of the first token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, D]."""
        return torch.tanh(self.dense(x[:, 0]))


class Meter(nn.Module):
    """METER: both encoders, and six pairs of fusion layers in which both streams read the old pair."""

    def __init__(self, config: CsclConfig) -> None:
        super().__init__()
        width = config.width
        self.vit_model = nn.ModuleDict({"visual": ClipVision(config)})
        self.text_transformer = Roberta(config)
        self.cross_modal_text_transform = nn.Linear(width, width)
        self.cross_modal_image_transform = nn.Linear(width, width)
        self.token_type_embeddings = nn.Embedding(2, width)  # 0 caption, 1 image
        self.cross_modal_image_layers = nn.ModuleList(
            BertLayer(config, True, BERT_EPS) for _ in range(config.fusion_depth)
        )
        self.cross_modal_text_layers = nn.ModuleList(
            BertLayer(config, True, BERT_EPS) for _ in range(config.fusion_depth)
        )
        self.cross_modal_image_pooler, self.cross_modal_text_pooler = Pooler(width), Pooler(width)

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens [B, 1+P, D] and text tokens [B, N, D] after fusion."""
        bias = padding_bias(attention_mask, BERT_MASK, image.dtype)
        caption_type, image_type = self.token_type_embeddings.weight
        text = self.cross_modal_text_transform(self.text_transformer(input_ids, bias)) + caption_type
        x = self.cross_modal_image_transform(self.vit_model["visual"](image)) + image_type
        layers = (_bert_layers(self.cross_modal_text_layers), _bert_layers(self.cross_modal_image_layers))
        for text_layer, image_layer in zip(*layers, strict=True):
            text, x = _fuse(text_layer, text, bias, x, None), _fuse(image_layer, x, None, text, bias)
        return x, text

    def pool(self, image: Tensor, text: Tensor) -> Tensor:
        """[B, 2D], the caption first."""
        return torch.cat([self.cross_modal_text_pooler(text), self.cross_modal_image_pooler(image)], dim=-1)


def _bert_layers(layers: nn.Module) -> list[BertLayer]:
    """The layers with their type, which a ModuleList does not keep."""
    return [cast(BertLayer, layer) for layer in cast(nn.ModuleList, layers)]


def _fuse(
    layer: BertLayer, x: Tensor, bias: Tensor | None, memory: Tensor, memory_bias: Tensor | None
) -> Tensor:
    """One stream's fusion layer over the other stream."""
    return layer.feed_forward(layer.crossattention(layer.attention(x, x, bias), memory, memory_bias))
