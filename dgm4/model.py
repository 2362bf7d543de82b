"""What HAMMER and the networks built on it have in common; each has its own module in `dgm4.models`.

The computation is the published one; the token logits come from the fusion pass itself rather than from a
second run of BERT, which gives the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dgm4.config import TORCH_EPS, ModelConfig, model_config
from dgm4.layers import Head, PackedAttention, padding_bias
from dgm4.text import TextEncoder
from dgm4.vision import VisionTransformer
from engine.network.output import Output
from engine.registry import network_of
from engine.registry.config import FusionConfig


class Branch(NamedTuple):
    """What the image branch makes of B pairs.

    box [B, 4], real_fake [B, 2] and classes [B, 4] are as in `Output`; crossed [B, 1+P, D] the
    image that has read the caption (the first pass in CALS); feature [B, D] what the box was read from;
    coarse [B, 4] the box before refinement, which only CALS has.
    """

    box: Tensor
    real_fake: Tensor
    classes: Tensor
    crossed: Tensor
    feature: Tensor
    coarse: Tensor | None = None


class Trace(NamedTuple):
    """Everything that an objective reads: tokens of both encoders, the fusion's, and the outputs.

    for_text and for_image [B, 1+P, D] are the image as the two branches read it (one stream but in
    CALS), text and fused [B, N, D] the caption before and after fusion.
    """

    for_text: Tensor
    for_image: Tensor
    text: Tensor
    fused: Tensor
    branch: Branch
    output: Output


class Detector(nn.Module):
    """The skeleton; `cross_classes` is the number of types that `cls_head` has."""

    cross_classes = 4
    has_map = False
    encoder: type[VisionTransformer] = VisionTransformer

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.cls_token_local = nn.Parameter(torch.zeros(1, 1, width))
        self.visual_encoder = self.encoder(config)
        self.text_encoder = TextEncoder(config)
        self.itm_head = Head(width, 2)
        self.cls_head = Head(width, self.cross_classes)
        self.bbox_head = Head(width, 4)
        self.norm_layer_it_cross_atten = nn.LayerNorm(width, eps=TORCH_EPS)
        self.norm_layer_aggr = nn.LayerNorm(width, eps=TORCH_EPS)
        self.aggregator = PackedAttention(width, config.heads)
        nn.init.trunc_normal_(self.cls_token_local, std=0.02)

    def cross(self, attend: nn.Module, image: Tensor, text: Tensor, bias: Tensor) -> Tensor:
        """Normalise both streams with the one shared norm and let the image read the caption."""
        norm = self.norm_layer_it_cross_atten
        crossed: Tensor = attend(norm(image), norm(text), bias)
        return crossed

    def aggregate(self, query: Tensor, tokens: Tensor) -> Tensor:
        """Let the learnt query [1, 1, D] read the patches of tokens [B, 1+P, D]; returns [B, D]."""
        norm = self.norm_layer_aggr
        query = norm(query).expand(len(tokens), -1, -1)
        return self.aggregator(query, norm(tokens[:, 1:]))[:, 0]

    def locate(self, feature: Tensor) -> Tensor:
        """[B, D] -> box [B, 4]."""
        return self.bbox_head(feature).sigmoid()

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Output:
        """Judge normalised images [B, 3, S, S] with token ids and mask [B, N] (int64, no [SEP])."""
        return self.trace(image, input_ids, attention_mask).output

    def trace(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Trace:
        """As `forward`, with the values in between, for training."""
        for_text, for_image = self.visual_encoder(image)
        bert = self.text_encoder.bert
        text, bias = bert.encode_text(input_ids, attention_mask)
        fused, scores = bert.fuse(text, bias, for_text, self.has_map)
        key_bias = padding_bias(attention_mask, float("-inf"), text.dtype)
        branch = self.branch(for_image, text, key_bias, fused[:, 0])
        tokens = self.text_encoder.classifier(fused[:, 1:])
        output = Output(branch.real_fake, branch.classes, branch.box, tokens, scores)
        return Trace(for_text, for_image, text, fused, branch, output)

    def branch(self, image: Tensor, text: Tensor, bias: Tensor, fused: Tensor) -> Branch:
        """The image branch of this network; `fused` is the [CLS] row [B, D] of the fusion."""
        raise NotImplementedError


def build(config: ModelConfig) -> Detector:
    """Build the network of `config` with its own random initialisation, in training mode."""
    network: Detector = network_of(config).load_published().Published(config)
    return network


def create_model(name: str, size: str = "base") -> Detector:
    """Build a network, as "hammer", at size "base" (the papers' shapes) or "tiny".

    Raises ValueError for an unknown name or size.
    """
    return build(model_config(name, size))
