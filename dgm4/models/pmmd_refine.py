"""PMMD's second stage, *refine*: a pair and the box of a suspected face in, the four answers out.

Source: the code of PMMD at the commit before its second stage was removed. The computation is the published
one: the guidance by the given box and the image branch as in CALS, the fusion by BERT twice, once over the
guided image for both logits, once over the plain one for the words.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgm4.config import TORCH_EPS
from dgm4.layers import Head, PackedAttention, padding_bias
from dgm4.models.cals import Guidance, gaussian_map
from dgm4.text import TextEncoder
from dgm4.vision import VisionTransformer
from engine.network.output import Output
from engine.registry.pmmd_refine import RefineConfig


class GuidedBranch(nn.Module):
    """What both stages do with an image: guide it by a box, and read a vector of it and the caption."""

    def __init__(self, config: RefineConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.gem = Guidance(width, config.guidance_widths)
        self.norm_layer_it_cross_atten = nn.LayerNorm(width, eps=TORCH_EPS)
        self.it_cross_attn = PackedAttention(width, config.heads)
        self.norm_layer_aggr = nn.LayerNorm(width, eps=TORCH_EPS)
        self.aggregator = PackedAttention(width, config.heads)
        self.cls_token_local = nn.Parameter(torch.zeros(1, 1, width))

    def guide(self, image: Tensor, box: Tensor) -> Tensor:
        """Add the encoded Gaussian of box [B, 4] to the patches of image [B, 1+P, D]."""
        guidance = self.gem(gaussian_map(box, self.config.image_size).to(image.dtype))
        return torch.cat([image[:, :1], image[:, 1:] + guidance], dim=1)

    def read(self, image: Tensor, text: Tensor, mask: Tensor, query: Tensor) -> Tensor:
        """Let image [B, 1+P, D] read text [B, N, D] with mask [B, N], and query [1, 1, D] the patches.

        Returns [B, D].
        """
        norm, bias = self.norm_layer_it_cross_atten, padding_bias(mask, float("-inf"), text.dtype)
        patches = (image + self.it_cross_attn(norm(image), norm(text), bias))[:, 1:]
        norm = self.norm_layer_aggr
        return self.aggregator(norm(query).expand(len(patches), -1, -1), norm(patches))[:, 0]


class Published(GuidedBranch):
    """PMMD refine, with the names of its checkpoint."""

    def __init__(self, config: RefineConfig) -> None:
        super().__init__(config)
        self.visual_encoder = VisionTransformer(config)
        self.text_encoder = TextEncoder(config)
        self.itm_head, self.cls_head = Head(config.width, 2), Head(config.width, 4)
        self.bbox_head = Head(config.width, 4)

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor, box_given: Tensor) -> Output:
        """Judge images [B, 3, S, S] with ids and mask [B, N] and a box [B, 4] (cx, cy, w, h in [0, 1])."""
        bert = self.text_encoder.bert
        plain, _ = self.visual_encoder(image)
        guided = self.guide(plain, box_given)
        text, bias = bert.encode_text(input_ids, attention_mask)
        fused = bert.fuse(text, bias, guided, False)[0][:, 0]
        # As published: the text layers run again for the words.
        words, bias = bert.encode_text(input_ids, attention_mask)
        words = bert.fuse(words, bias, plain, False)[0][:, 1:]
        refined = self.bbox_head(self.read(guided, text, attention_mask, self.cls_token_local)).sigmoid()
        return Output(
            self.itm_head(fused), self.cls_head(fused), refined, self.text_encoder.classifier(words)
        )
