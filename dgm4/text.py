"""Text encoder: BERT with the key names of transformers, cross-attention in its upper layers."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from dgm4.config import BERT_EPS, BERT_MASK
from dgm4.layers import Head, attention, merge_heads, padding_bias, split_heads
from engine.registry.config import FusionConfig, NetworkConfig


class Projections(nn.Module):
    """Query, key and value projections of one attention."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [B, N, D] and memory [B, M, D] to heads [B, H, ., d]."""
        q, k, v = self.query(x), self.key(memory), self.value(memory)
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)


class AddNorm(nn.Module):
    """LayerNorm(residual + dropout(Linear(x)))."""

    def __init__(self, width: int, hidden: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.dense = nn.Linear(hidden, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """[B, N, hidden] and [B, N, D] -> [B, N, D]."""
        return self.LayerNorm(F.dropout(self.dense(x), self.dropout, self.training) + residual)


class BertAttention(nn.Module):
    """Post-norm attention of `x` over `memory` (itself where None is given)."""

    def __init__(self, config: NetworkConfig, eps: float = BERT_EPS, dropout: float = 0.0) -> None:
        super().__init__()
        self.self = Projections(config)
        self.output = AddNorm(config.width, config.width, eps, dropout)
        self.dropout = dropout

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B, N, D], [B, M, D] -> [B, N, D]."""
        q, k, v = self.self(x, memory)
        dropout = self.dropout if self.training else 0.0
        return self.output(merge_heads(attention(q, k, v, bias, dropout)), x)

    def with_scores(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the mean over heads of the scaled scores before the softmax, [B, N, M] (MGCA)."""
        q, k, v = self.self(x, memory)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        return self.output(merge_heads(weights @ v), x), scores.mean(1)


class Intermediate(nn.Module):
    """Linear and erf GELU."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.mlp_ratio * config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, 4D]."""
        return F.gelu(self.dense(x))


class BertLayer(nn.Module):
    """Self-attention, cross-attention to the other stream in fusion layers, feed-forward."""

    def __init__(
        self, config: NetworkConfig, fusion: bool, eps: float = BERT_EPS, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attention = BertAttention(config, eps, dropout)
        if fusion:
            self.crossattention = BertAttention(config, eps, dropout)
        self.intermediate = Intermediate(config)
        self.output = AddNorm(config.width, config.mlp_ratio * config.width, eps, dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.output(self.intermediate(x), x)


class Embeddings(nn.Module):
    """Words, positions and the one token type of a caption."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.word_embeddings = nn.Embedding(config.vocabulary, config.width)
        self.position_embeddings = nn.Embedding(config.positions, config.width)
        self.token_type_embeddings = nn.Embedding(2, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=BERT_EPS)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, N] -> [B, N, D]."""
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        x = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0] + positions
        return F.dropout(self.LayerNorm(x), self.dropout, self.training)


class Encoder(nn.Module):
    """The stack of layers; holds no computation of its own."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            BertLayer(config, fusion=i >= config.fusion_start) for i in range(config.text_depth)
        )

    def layers(self) -> list[BertLayer]:
        """The layers with their type, which a ModuleList does not keep."""
        return [cast(BertLayer, layer) for layer in self.layer]


class Bert(nn.Module):
    """Text layers, then fusion layers."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.fusion_start = config.fusion_start
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the text layers on [B, N]; return the tokens [B, N, D] and the bias of their padding."""
        x = self.embeddings(input_ids)
        bias = padding_bias(attention_mask, BERT_MASK, x.dtype)
        for layer in self.encoder.layers()[: self.fusion_start]:
            x = layer.feed_forward(layer.attention(x, x, bias))
        return x, bias

    def fuse(
        self, text: Tensor, bias: Tensor, image: Tensor, with_scores: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run the fusion layers of text [B, N, D] over image [B, M, D]; the last one's scores if asked."""
        scores = None
        layers = self.encoder.layers()[self.fusion_start :]
        for i, layer in enumerate(layers):
            text = layer.attention(text, text, bias)
            if with_scores and i == len(layers) - 1:
                text, scores = layer.crossattention.with_scores(text, image)
            else:
                text = layer.crossattention(text, image)
            text = layer.feed_forward(text)
        return text, scores


class TextEncoder(nn.Module):
    """BERT and the classifier of its tokens."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.bert = Bert(config)
        self.classifier = Head(config.width, 2)
