"""The network as it is exported: the trained modules, rewritten and joined.

Nothing here is trained and nothing is copied that a rewrite does not change: the inference model shares
its parameters with the trained one it is made from.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgm4.layers import PackedAttention
from dgm4.model import Asap, Cals, Detector, Output
from dgm4.text import BertLayer, TextEncoder
from dgm4.vision import Block, CAFormer, VisionTransformer
from export.rewrite import (
    CrossAttention,
    LatentPool,
    Norm,
    SelfAttention,
    fold_conv_fusion,
    fold_latent_query,
    stack_linears,
)
from kernels.gaussian_guidance import gaussian_guidance


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module whose parameters have one."""
    return next(module.parameters()).dtype


def inference_head(head: nn.Sequential) -> nn.Sequential:
    """A head whose norms keep their own dtype."""
    return nn.Sequential(*(Norm(x) if isinstance(x, nn.LayerNorm) else x for x in head))


class InferenceBlock(nn.Module):
    """Pre-norm block over the fused attention."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(block.norm1), Norm(block.norm2)
        self.attention = SelfAttention(block.attn.qkv, block.attn.proj, block.attn.heads)
        self.mlp = block.mlp

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class InferenceVision(nn.Module):
    """Visual encoder with one stream."""

    def __init__(self, vision: VisionTransformer) -> None:
        super().__init__()
        self.patch_embed = vision.patch_embed
        self.cls = nn.Parameter((vision.cls_token + vision.pos_embed[:, :1]).detach(), requires_grad=False)
        self.positions = nn.Parameter(vision.pos_embed[:, 1:].detach(), requires_grad=False)
        self.blocks = nn.ModuleList(InferenceBlock(cast(Block, block)) for block in vision.blocks)
        self.norm = Norm(vision.norm)

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


class InferenceCAFormer(InferenceVision):
    """Visual encoder of CALS: both streams run through the last blocks as one batch of 2B (rewrite 4)."""

    def __init__(self, vision: CAFormer) -> None:
        super().__init__(vision)
        self.start = vision.start
        self.attention = SelfAttention.from_packed(vision.MHA2.mha)
        self.ffn = vision.MHA2.ffn
        self.norm1, self.norm2 = Norm(vision.MHA2.layer_norm1), Norm(vision.MHA2.layer_norm2)
        self.fusion = fold_conv_fusion(vision)

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


class InferenceLayer(nn.Module):
    """One BERT layer; `stacked` tells that its cross-attention gets keys and values from outside."""

    def __init__(self, layer: BertLayer, fusion: bool, stacked: bool) -> None:
        super().__init__()
        own = layer.attention
        self.attention = SelfAttention.from_projections(own.self, own.output.dense)
        self.attention_norm = Norm(own.output.LayerNorm)
        if fusion:
            cross = layer.crossattention
            self.cross = CrossAttention.from_projections(cross.self, cross.output.dense, stacked)
            self.cross_norm = Norm(cross.output.LayerNorm)
        self.up, self.down = layer.intermediate.dense, layer.output.dense
        self.output_norm = Norm(layer.output.LayerNorm)

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, N, D] and its mask [B, N] -> [B, N, D]."""
        return self.attention_norm(self.attention(x, mask) + x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.output_norm(self.down(F.gelu(self.up(x))) + x)


class InferenceText(nn.Module):
    """Text encoder; `stacked` projects keys and values of all fusion layers in one product (rewrite 5)."""

    def __init__(self, encoder: TextEncoder, with_map: bool, stacked: bool) -> None:
        super().__init__()
        bert = encoder.bert
        start = bert.fusion_start
        layers = bert.encoder.layers()
        embeddings = bert.embeddings
        self.with_map = with_map
        self.words = embeddings.word_embeddings
        places = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
        self.places = nn.Parameter(places.detach(), requires_grad=False)
        self.norm = Norm(embeddings.LayerNorm)
        self.text_layers = nn.ModuleList(InferenceLayer(x, False, False) for x in layers[:start])
        self.fusion_layers = nn.ModuleList(InferenceLayer(x, True, stacked) for x in layers[start:])
        crossed = [layer.crossattention.self for layer in layers[start:]]
        products = [product for x in crossed for product in (x.key, x.value)]
        self.key_values = stack_linears(products) if stacked else None
        self.classifier = inference_head(encoder.classifier)

    def _layers(self, layers: nn.ModuleList) -> list[InferenceLayer]:
        return [cast(InferenceLayer, layer) for layer in layers]

    def encode(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask [B, N] -> [B, N, D]."""
        x = self.norm(self.words(input_ids) + self.places[: input_ids.shape[1]])
        for layer in self._layers(self.text_layers):
            x = layer.feed_forward(layer.attend(x, mask))
        return x

    def _keys_and_values(self, image: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        if self.key_values is None:
            return [layer.cross.project(image) for layer in self._layers(self.fusion_layers)]
        parts = self.key_values(image).chunk(2 * len(self.fusion_layers), dim=-1)
        return list(zip(parts[::2], parts[1::2], strict=True))

    def fuse(self, x: Tensor, mask: Tensor, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the fusion layers of x [B, N, D] over image [B, M, D]; the map of the last one, or None."""
        guide = None
        layers = self._layers(self.fusion_layers)
        for layer, (key, value) in zip(layers, self._keys_and_values(image), strict=True):
            x = layer.attend(x, mask)
            if self.with_map and layer is layers[-1]:
                crossed, guide = layer.cross.guided(x, key, value)
            else:
                crossed = layer.cross(x, key, value)
            x = layer.feed_forward(layer.cross_norm(crossed + x))
        return x, guide


class ImageBranch(nn.Module):
    """HAMMER's: the picture reads the caption, the learnt query pools it, the head places the box.

    Nothing reads the [CLS] row afterwards, so it asks nothing (rewrite 8).
    """

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.norm = Norm(model.norm_layer_it_cross_atten)
        attend = self.cross_of(model)
        self.cross = CrossAttention.from_packed(attend)
        self.pool = self.pool_of(model, model.cls_token_local)
        self.bbox_head = inference_head(model.bbox_head)
        self.itm_head, self.cls_head = inference_head(model.itm_head), inference_head(model.cls_head)

    @staticmethod
    def cross_of(model: Detector) -> PackedAttention:
        """The attention of the picture over the caption."""
        return cast(PackedAttention, model.it_cross_attn)

    @staticmethod
    def pool_of(model: Detector, query: Tensor) -> LatentPool:
        """The shared aggregator, folded with one learnt query."""
        return fold_latent_query(query, model.norm_layer_aggr, model.aggregator)

    def locate(self, feature: Tensor) -> Tensor:
        """[B, D] -> box [B, 4], in the dtype of the box head, at least float32."""
        return self.bbox_head(feature.to(dtype_of(self.bbox_head))).sigmoid()

    def forward(
        self, image: Tensor, text: Tensor, mask: Tensor, fused: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Box, real/fake logits and type logits."""
        patches = image[:, 1:]
        key, value = self.cross.project(self.norm(text))
        feature = self.pool(patches + self.cross(self.norm(patches), key, value, mask))
        return self.locate(feature), self.itm_head(fused), self.cls_head(fused)


class AsapBranch(ImageBranch):
    """ASAP's: self-attention first, the normalised picture as residual, the logits read the box feature."""

    def __init__(self, model: Asap) -> None:
        super().__init__(model)
        self.own = CrossAttention.from_packed(model.it_cross_attn.selfatten)
        self.share_real_fake, self.share_classes = model.UtilsB, model.UtilsC

    @staticmethod
    def cross_of(model: Detector) -> PackedAttention:
        """The attention of the picture over the caption."""
        return cast(Asap, model).it_cross_attn.crossatten

    def forward(
        self, image: Tensor, text: Tensor, mask: Tensor, fused: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Box, real/fake logits and type logits."""
        x = self.norm(image)
        patches = x[:, 1:]
        key, value = self.cross.project(self.norm(text))
        own = self.own(patches, *self.own.project(x))
        feature = self.pool(self.cross(own, key, value, mask) + patches)
        real_fake = self.itm_head(fused + self.share_real_fake * feature)
        return self.locate(feature), real_fake, self.cls_head(fused + self.share_classes * feature)


class CalsBranch(ImageBranch):
    """CALS's: a coarse box guides a second pass, which reads the same text keys (rewrite 7)."""

    def __init__(self, model: Cals) -> None:
        super().__init__(model)
        self.size = model.config.image_size
        first, _, *rest = model.LIG.conv_net
        self.first = cast(nn.Conv2d, first)
        self.rest = nn.Sequential(*rest)
        self.refined_pool = self.pool_of(model, model.cls_token_local_e)
        self.faces = model.fch

    def forward(
        self, image: Tensor, text: Tensor, mask: Tensor, fused: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Box, real/fake logits and type logits."""
        key, value = self.cross.project(self.norm(text))
        crossed = image + self.cross(self.norm(image), key, value, mask)
        coarse = self.locate(self.pool(crossed[:, 1:]))
        encoded = self.rest(
            gaussian_guidance(coarse, self.first.weight, cast(Tensor, self.first.bias), self.size)
        )
        guided = image[:, 1:] + encoded.flatten(2).transpose(1, 2)
        refined = guided + self.cross(self.norm(guided), key, value, mask)
        wide = crossed.to(dtype_of(self.faces))
        faces = self.faces(wide[:, 1:], wide[:, 0]).to(fused.dtype)
        box = self.locate(self.refined_pool(refined))
        return box, self.itm_head(fused), torch.cat([faces, self.cls_head(fused)], dim=1)


_BRANCHES = {"hammer": ImageBranch, "asap": AsapBranch, "cals": CalsBranch}


class InferenceModel(nn.Module):
    """A detector for answering only, in any one floating dtype with float32 islands.

    Answers are float32 (float64 in a float64 network) whatever the inner dtype.
    """

    def __init__(self, model: Detector, stacked: bool = True) -> None:
        super().__init__()
        vision = model.visual_encoder
        self.config = model.config
        self.vision = InferenceCAFormer(vision) if isinstance(vision, CAFormer) else InferenceVision(vision)
        self.text = InferenceText(model.text_encoder, model.has_map, stacked)
        self.branch = _BRANCHES[model.config.name](model)
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Output:
        """Judge normalised pictures float [B, 3, S, S] with token ids and mask int64 [B, N], 2 <= N."""
        mask = attention_mask.to(torch.int32)
        for_text, for_image = self.vision(image.to(self.vision.positions.dtype))
        text = self.text.encode(input_ids, mask)
        fused, guide = self.text.fuse(text, mask, for_text)
        box, real_fake, classes = self.branch(for_image, text, mask, fused[:, 0])
        tokens = self.text.classifier(fused[:, 1:])
        out = torch.promote_types(real_fake.dtype, torch.float32)
        return Output(real_fake.to(out), classes.to(out), box.to(out), tokens.to(out), guide)


def _islands(model: InferenceModel) -> Iterator[nn.Parameter]:
    """Parameters that stay float32: norms, the box head, the pooled scores, CALS's patch reductions."""
    for module in model.modules():
        if isinstance(module, Norm):
            yield from module.parameters()
        if isinstance(module, LatentPool):
            yield module.query
    yield from model.branch.bbox_head.parameters()
    if isinstance(model.branch, CalsBranch):
        yield from model.branch.faces.parameters()


def to_precision(model: InferenceModel, dtype: torch.dtype) -> InferenceModel:
    """Cast everything but the float32 islands to `dtype`, in place; the trained model stays as it is."""
    islands = {id(p) for p in _islands(model)}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in islands:
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
    return model


def _alias(model: Detector) -> Detector:
    """The same network over the same storage; mode, gradients and dtype of the first stay its own."""
    shared: dict[int, Tensor] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    shared |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, shared)


def rewrite(model: Detector, stacked: bool = True) -> InferenceModel:
    """Compose the exact rewrites over a trained model, which stays as it is; unchanged weights are shared.

    `stacked` projects the image's keys and values for all fusion layers in one product.
    """
    return InferenceModel(_alias(model).eval(), stacked)
