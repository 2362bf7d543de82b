"""HAMMER for inference: image encoder, text encoder whose upper layers read the image, image branch."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.network.branch import ImageBranch
from engine.network.model import InferenceModel
from engine.network.output import Output
from engine.network.released import (
    Released,
    State,
    fold_cross,
    fold_head,
    fold_pool,
    fold_text,
    fold_vision,
    renamed,
    under,
)
from engine.network.text import Text
from engine.network.vision import Vision
from engine.registry.config import FusionConfig, NetworkConfig


class Model(InferenceModel):
    """HAMMER; the networks that are built on it name their own encoder and branch."""

    encoder: type[Vision] = Vision
    image_branch: type[ImageBranch] = ImageBranch
    with_map = False

    def __init__(self, config: FusionConfig, stacked: bool = True) -> None:
        super().__init__(config)
        self.vision = self.encoder(config)
        self.text = Text(config, stacked, self.with_map)
        self.branch = self.image_branch(config)

    def see(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image features [B, 1+P, D] for the text branch and for the image branch."""
        return self.vision(image.to(self.vision.dtype))

    def answer(
        self, for_text: Tensor, for_image: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Output:
        """Answer captions about images of which only the features are given."""
        mask = attention_mask.to(torch.int32)
        text = self.text.encode(input_ids, mask)
        fused, guide = self.text.fuse(text, mask, for_text)
        box, real_fake, classes = self.branch(for_image, text, mask, fused[:, 0])
        tokens = self.text.classifier(fused[:, 1:])
        return Output(real_fake, classes, box, tokens, guide).widened()


def fold(released: Released, config: FusionConfig, stacked: bool) -> State:
    """The tensors of `Model`."""
    branch = fold_branch(released, config) | under("cross", fold_cross(released, "it_cross_attn"))
    return fold_encoders(released, config, stacked) | under("branch", branch)


def fold_encoders(released: Released, config: FusionConfig, stacked: bool) -> State:
    """Both encoders."""
    return {
        **under("vision", fold_vision(released.at("visual_encoder"), config)),
        **under("text", fold_text(released.at("text_encoder"), config, stacked)),
    }


def fold_branch(released: Released, config: NetworkConfig) -> State:
    """What every image branch on HAMMER's has: norm, pool and heads."""
    folded = renamed(released, {"norm_layer_it_cross_atten": "norm"})
    for name in ("bbox_head", "itm_head", "cls_head"):
        folded |= fold_head(released, name)
    return folded | under("pool", fold_pool(released, "cls_token_local", config.heads))
