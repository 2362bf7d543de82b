"""CSCL: contextual and semantic consistency learning, as published.

Source: "Unleashing the Potential of Consistency Learning for Detecting and Grounding Multi-Modal Media
Manipulation" (CVPR 2025), https://github.com/liyih/CSCL. The published code gives a pair of a batch the
neighbours of other pairs, and fails on captions of fewer than eight words. Here a pair answers as it does
alone, and such a caption has all of its words as neighbours.
B batch, N tokens, n = N - 1 words, P patches, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dgm4.config import BERT_MASK, TORCH_EPS
from dgm4.layers import Head, PackedAttention, padding_bias
from dgm4.models.cscl_encoders import Meter
from engine.network.output import Output
from engine.registry.cscl import CsclConfig

FLOOR = 1e-6  # of a word's score, before its logarithm
PADDING_SCORE = 0.5  # of what is no word


def sinusoid(positions: Tensor, width: int) -> Tensor:
    """Sine (even channels) and cosine (odd) of 2 pi u / 10000^(2 floor(k/2) / D); [n] -> [n, D]."""
    channel = torch.arange(width, dtype=positions.dtype, device=positions.device)
    period = 10000 ** (2 * (channel / 2).floor() / width)
    angle = 2 * math.pi * positions[:, None] / period
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


class CorrelationLayer(nn.Module):
    """Post-norm transformer layer on features with their positions added."""

    def __init__(self, config: CsclConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.intra_hidden
        self.self_attn = PackedAttention(width, config.heads)
        self.FFN = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.norm1, self.norm2 = nn.LayerNorm(width, TORCH_EPS), nn.LayerNorm(width, TORCH_EPS)

    def forward(self, features: Tensor, positions: Tensor, bias: Tensor | None) -> Tensor:
        """[B, n, D] and [n, D] -> [B, n, D]."""
        z = features + positions
        attended = self.norm1(z + self.self_attn(z, z, bias))
        return self.norm2(attended + self.FFN(attended))


class Correlation(nn.Module):
    """The stack of layers."""

    def __init__(self, config: CsclConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CorrelationLayer(config) for _ in range(config.intra_depth))

    def forward(self, features: Tensor, positions: Tensor, bias: Tensor | None) -> Tensor:
        """[B, n, D] and [n, D] -> [B, n, D]."""
        for layer in self.layers:
            features = layer(features, positions, bias)
        return features


class ConsistencyEncoder(nn.Sequential):
    """The encoder whose normalised outputs are compared: similarity (e_i . e_j + 1) / 2 in [0, 1]."""

    def __init__(self, config: CsclConfig) -> None:
        one, two, three = config.consistency_widths
        super().__init__(
            nn.Linear(config.width, one),
            nn.LayerNorm(one, TORCH_EPS),
            nn.GELU(),
            nn.Linear(one, two),
            nn.LayerNorm(two, TORCH_EPS),
            nn.GELU(),
            nn.Linear(two, three),
        )

    def compare(self, features: Tensor, others: Tensor) -> Tensor:
        """[B, n, D] with [B, m, D] -> [B, n, m]."""
        encoded, against = (e / e.norm(dim=-1, keepdim=True) for e in (self(features), self(others)))
        return ((encoded @ against.transpose(1, 2) + 1) / 2).clamp(0, 1)


def choose(similarity: Tensor, valid: Tensor, count: int, largest: bool) -> Tensor:
    """Indices [..., k] of the `count` most or least alike of [..., m]; those that are not valid come last."""
    worst = -1.0 if largest else 2.0
    count = min(count, similarity.shape[-1])
    return similarity.masked_fill(~valid, worst).topk(count, dim=-1, largest=largest).indices


class Neighbours(nn.Module):
    """Attention to the alike and then to the unlike, each with a feed-forward; the base of both branches."""

    def __init__(self, config: CsclConfig) -> None:
        super().__init__()
        width, heads = config.width, config.neighbour_heads
        self.aggregator, self.aggregator_2 = PackedAttention(width, heads), PackedAttention(width, heads)
        self.aggregator_mlp, self.aggregator_mlp_2 = Head(width, width), Head(width, width)

    def read_alike(self, x: Tensor, memory: Tensor, chosen: Tensor) -> Tensor:
        """Let x [B, n, D] read memory [B, m, D] where `chosen` [B, n, m] is true."""
        return x + self.aggregator_mlp(self.aggregator(x, memory, _bias(chosen, x.dtype)))

    def read_unlike(self, x: Tensor, memory: Tensor, chosen: Tensor) -> Tensor:
        """The same with the second set of weights."""
        return x + self.aggregator_mlp_2(self.aggregator_2(x, memory, _bias(chosen, x.dtype)))


def _bias(chosen: Tensor, dtype: torch.dtype) -> Tensor:
    return padding_bias(chosen, BERT_MASK, dtype)[:, 0]


class Intra(Neighbours):
    """Consistency within one modality: contextual features that read their own neighbours."""

    def __init__(self, config: CsclConfig, count: int) -> None:
        super().__init__(config)
        self.count = count
        self.correlation_model = Correlation(config)
        self.consist_encoder = ConsistencyEncoder(config)

    def forward(self, features: Tensor, positions: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, n, D], positions [n, D] and valid [B, n] -> features, similarities [B, n, n]."""
        x = self.correlation_model(features, positions, padding_bias(valid, BERT_MASK, features.dtype))
        similarity = self.consist_encoder.compare(x, x)
        pairs = valid[:, :, None] & valid[:, None]
        itself = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        alike = choose(similarity - itself, pairs, self.count, largest=True)
        unlike = choose(similarity, pairs, self.count, largest=False)
        nothing = torch.zeros_like(pairs)
        x = self.read_alike(x, x, nothing.scatter(-1, alike, True) & pairs)
        return self.read_unlike(x, x, nothing.scatter(-1, unlike, True) & pairs), similarity


class Extra(Neighbours):
    """Consistency of one modality with the other: which of its tokens agree, and one feature of it."""

    def __init__(self, config: CsclConfig, count: int) -> None:
        super().__init__(config)
        width = config.width
        self.count = count
        self.cls_token_cross = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_token_feat = nn.Parameter(torch.zeros(1, 1, width))
        self.feat_encoder, self.cross_encoder = Head(width, width), Head(width, width)
        self.consist_encoder_feat = ConsistencyEncoder(config)
        self.aggregator_cross = PackedAttention(width, config.heads)
        self.aggregator_feat = PackedAttention(width, config.heads)
        self.norm_layer_cross = nn.LayerNorm(width, TORCH_EPS)
        self.norm_layer_feat = nn.LayerNorm(width, TORCH_EPS)

    def forward(
        self, own: Tensor, whole: Tensor, other: Tensor, valid: Tensor, other_valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, n, D], the [CLS] [B, D] of their stream, tokens [B, m, D] of the other, what is valid.

        Returns the feature [B, D] and the scores [B, n], 1 = agrees with the other modality.
        """
        own, other = self.feat_encoder(own), self.cross_encoder(other)
        about = _pool(self.aggregator_cross, self.norm_layer_cross, self.cls_token_cross, other, other_valid)
        scores = self.consist_encoder_feat.compare(own, about)[..., 0]
        tokens, present = (
            torch.cat([whole[:, None], own], dim=1),
            torch.cat([valid[:, :1] | True, valid], dim=1),
        )
        x = _pool(self.aggregator_feat, self.norm_layer_feat, self.cls_token_feat, tokens, present)
        x = self.read_alike(x, *_rows(own, valid, choose(scores, valid, self.count, largest=True)))
        x = self.read_unlike(x, *_rows(own, valid, choose(scores, valid, self.count, largest=False)))
        return x[:, 0], scores


def _pool(attend: nn.Module, norm: nn.Module, query: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
    """Let a learnt query [1, 1, D] read tokens [B, m, D]; [B, 1, D]."""
    query = norm(query).expand(len(tokens), -1, -1)
    pooled: Tensor = attend(query, norm(tokens), padding_bias(valid, BERT_MASK, tokens.dtype))
    return pooled


def _rows(tokens: Tensor, valid: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen rows [B, k, D] of tokens, and which of them are valid [B, 1, k]."""
    rows = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))
    return rows, valid.gather(1, chosen)[:, None]


class Trace(NamedTuple):
    """Everything on the way to the answer, image first: tokens, similarities, features and scores.

    tokens [B, 1+P, D] and [B, N, D] after fusion, pooled [B, 2D], cls [B, D]; similarity [B, P, P] and
    [B, n, n], intra [B, P, D] and [B, n, D], feature [B, D] each, scores [B, P] and [B, n]; box [B, 4] before
    the rule of the empty box.
    """

    tokens: tuple[Tensor, Tensor]
    pooled: Tensor
    cls: Tensor
    similarity: tuple[Tensor, Tensor]
    intra: tuple[Tensor, Tensor]
    feature: tuple[Tensor, Tensor]
    scores: tuple[Tensor, Tensor]
    box: Tensor
    output: Output


class Published(nn.Module):
    """CSCL under the names of its released weights."""

    def __init__(self, config: CsclConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.meter = Meter(config)
        self.fusion_head, self.itm_head = Head(2 * width, width), Head(width, 2)
        self.bbox_head, self.cls_head_img = Head(width, 4), Head(width, 2)
        self.cls_head_text = Head(width, 2)
        self.emb_img_pos = nn.Sequential(nn.Linear(2 * width, width), nn.LayerNorm(width, TORCH_EPS))
        self.emb_text_pos = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width, TORCH_EPS))
        self.img_intra_model = Intra(config, config.image_neighbours)
        self.text_intra_model = Intra(config, config.text_neighbours)
        self.img_extra_model = Extra(config, config.image_neighbours)
        self.text_extra_model = Extra(config, config.text_neighbours)

    def image_positions(self) -> Tensor:
        """[P, D], of the centres of the patches, y before x."""
        weight = cast(nn.Linear, self.emb_img_pos[0]).weight
        places = torch.arange(self.config.grid, dtype=weight.dtype, device=weight.device)
        code = sinusoid((places + 0.5) / self.config.grid, self.config.width)
        y, x = code[:, None].expand(-1, len(code), -1), code[None].expand(len(code), -1, -1)
        embedded: Tensor = self.emb_img_pos(torch.cat([y, x], dim=-1).flatten(0, 1))
        return embedded

    def text_positions(self, words: int) -> Tensor:
        """[n, D]."""
        weight = cast(nn.Linear, self.emb_text_pos[0]).weight
        places = torch.arange(words, dtype=weight.dtype, device=weight.device)
        embedded: Tensor = self.emb_text_pos(sinusoid(places, self.config.width))
        return embedded

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Output:
        """Judge normalised images [B, 3, S, S] with token ids and mask [B, N] (int64, no </s>), 2 <= N."""
        return self.trace(image, input_ids, attention_mask).output

    def trace(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Trace:
        """As `forward`, with the values in between."""
        x, text = self.meter(image, input_ids, attention_mask)
        pooled = self.meter.pool(x, text)
        cls = self.fusion_head(pooled)
        words = attention_mask[:, 1:] != 0
        patches = torch.ones_like(x[:, 1:, 0], dtype=torch.bool)
        seen, image_alike = self.img_intra_model(x[:, 1:], self.image_positions(), patches)
        read, text_alike = self.text_intra_model(text[:, 1:], self.text_positions(words.shape[1]), words)
        picture, image_scores = self.img_extra_model(seen, x[:, 0], read, patches, words)
        caption, text_scores = self.text_extra_model(read, text[:, 0], seen, words, patches)
        text_scores = text_scores.masked_fill(~words, PADDING_SCORE)
        faces = self.cls_head_img(picture)
        box = self.bbox_head(picture).sigmoid()
        output = Output(
            self.itm_head(cls),
            torch.cat([faces, self.cls_head_text(caption)], dim=-1),
            box * (faces >= 0.5).any(-1, keepdim=True),
            torch.stack([text_scores, 1 - text_scores], dim=-1).clamp(min=FLOOR).log(),
            patch_scores=image_scores,
        )
        return Trace(
            (x, text),
            pooled,
            cls,
            (image_alike, text_alike),
            (seen, read),
            (picture, caption),
            (image_scores, text_scores),
            box,
            output,
        )
