"""HAMMER, ASAP and CALS: forward pass of an image and its caption.

Sources: HAMMER, "Detecting and Grounding Multi-Modal Media Manipulation" (CVPR 2023); ASAP,
arXiv:2412.12718; CALS, "Multimodal Deepfake Detection via Coarse-Aware Localization Refinement and
Semantic Alignment" (Pattern Recognition 2025). The computation is the published one; the token
logits come from the fusion pass itself rather than from a second run of BERT, which gives the same.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgm4.config import TORCH_EPS, ModelConfig, model_config
from dgm4.layers import Head, PackedAttention, padding_bias
from dgm4.text import TextEncoder
from dgm4.vision import CAFormer, VisionTransformer
from engine.network.output import Output

GAUSSIAN_FLOOR = 1e-8  # keeps the exponent finite for an empty box


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
    """What the three networks have in common; `cross_classes` is the number of types that `cls_head` has."""

    cross_classes = 4
    has_map = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.cls_token_local = nn.Parameter(torch.zeros(1, 1, width))
        self.visual_encoder = self.build_vision(config)
        self.text_encoder = TextEncoder(config)
        self.itm_head = Head(width, 2)
        self.cls_head = Head(width, self.cross_classes)
        self.bbox_head = Head(width, 4)
        self.norm_layer_it_cross_atten = nn.LayerNorm(width, eps=TORCH_EPS)
        self.norm_layer_aggr = nn.LayerNorm(width, eps=TORCH_EPS)
        self.aggregator = PackedAttention(width, config.heads)
        nn.init.trunc_normal_(self.cls_token_local, std=0.02)

    def build_vision(self, config: ModelConfig) -> VisionTransformer:
        """Return the visual encoder of this network."""
        return VisionTransformer(config)

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


class Hammer(Detector):
    """HAMMER: the cross-attended image keeps the raw residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.it_cross_attn = PackedAttention(config.width, config.heads)

    def branch(self, image: Tensor, text: Tensor, bias: Tensor, fused: Tensor) -> Branch:
        """Box from the image; both logits from the fused [CLS]."""
        crossed = image + self.cross(self.it_cross_attn, image, text, bias)
        feature = self.aggregate(self.cls_token_local, crossed)
        return Branch(self.locate(feature), self.itm_head(fused), self.cls_head(fused), crossed, feature)


class SelfCrossAttention(nn.Module):
    """ASAP's image branch: s = self(x); cross(s, text) + x, where x is the normalised image."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.selfatten = PackedAttention(config.width, config.heads)
        self.crossatten = PackedAttention(config.width, config.heads)

    def forward(self, image: Tensor, text: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B, 1+P, D], [B, N, D] -> [B, 1+P, D]."""
        return self.crossatten(self.selfatten(image, image), text, bias) + image


class Asap(Detector):
    """ASAP: both logits also read the box feature, and the last fusion layer yields the MGCA map."""

    has_map = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.it_cross_attn = SelfCrossAttention(config)
        self.UtilsB = nn.Parameter(torch.zeros(()))
        self.UtilsC = nn.Parameter(torch.zeros(()))

    def branch(self, image: Tensor, text: Tensor, bias: Tensor, fused: Tensor) -> Branch:
        """Box from the image; the logits from the fused [CLS] plus a learnt share of the box feature."""
        crossed = self.cross(self.it_cross_attn, image, text, bias)
        feature = self.aggregate(self.cls_token_local, crossed)
        real_fake = self.itm_head(fused + self.UtilsB * feature)
        classes = self.cls_head(fused + self.UtilsC * feature)
        return Branch(self.locate(feature), real_fake, classes, crossed, feature)


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

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        one, two, three = config.guidance_widths
        self.conv_net = nn.Sequential(
            nn.Conv2d(1, one, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(one, two, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(two, three, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(three, config.width, 1),
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

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.it_cross_attn = PackedAttention(config.width, config.heads)
        self.cls_token_local_e = nn.Parameter(torch.zeros(1, 1, config.width))
        self.LIG = Guidance(config)
        self.fch = PatchClassifier(config.width)
        nn.init.trunc_normal_(self.cls_token_local_e, std=0.02)

    def build_vision(self, config: ModelConfig) -> VisionTransformer:
        """Return the visual encoder with the convolution branch."""
        return CAFormer(config)

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


NETWORKS: dict[str, type[Detector]] = {"hammer": Hammer, "asap": Asap, "cals": Cals}


def build(config: ModelConfig) -> Detector:
    """Build the network of `config` with its own random initialisation, in training mode."""
    return NETWORKS[config.name](config)


def create_model(name: str, size: str = "base") -> Detector:
    """Build "hammer", "asap" or "cals" at size "base" (the papers' shapes) or "tiny".

    Raises ValueError for an unknown name or size.
    """
    return build(model_config(name, size))
