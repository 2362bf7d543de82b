"""PMMD's refine for inference: HAMMER with the patches guided by a given box, and two passes of fusion."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.network.branch import Guidance, ImageBranch
from engine.network.model import InferenceModel
from engine.network.models import hammer
from engine.network.models.cals import fold_guidance
from engine.network.output import Output
from engine.network.released import Released, State, under
from engine.network.text import Text
from engine.network.vision import Vision
from engine.registry.pmmd_refine import RefineConfig


class Model(InferenceModel):
    """PMMD refine."""

    def __init__(self, config: RefineConfig, stacked: bool = True) -> None:
        super().__init__(config)
        self.vision = Vision(config)
        self.text = Text(config, stacked)
        self.guidance = Guidance(config.width, config.guidance_widths, config.image_size)
        self.branch = ImageBranch(config)

    def forward(  # type: ignore[override]
        self, image: Tensor, input_ids: Tensor, attention_mask: Tensor, box_given: Tensor
    ) -> Output:
        """As `InferenceModel.forward`, with the boxes [B, 4] (cx, cy, w, h in [0, 1]) to judge."""
        (plain,) = self.see(image)
        return self.answer(plain, input_ids, attention_mask, box_given)

    def see(self, image: Tensor) -> tuple[Tensor, ...]:
        """The image's tokens [B, 1+P, D]."""
        return self.vision(image.to(self.vision.dtype))[:1]

    def answer(self, plain: Tensor, input_ids: Tensor, attention_mask: Tensor, box_given: Tensor) -> Output:
        """Answer captions about boxes in images of which only the tokens are given."""
        mask = attention_mask.to(torch.int32)
        guided = torch.cat([plain[:, :1], plain[:, 1:] + self.guidance(box_given)], dim=1)
        text = self.text.encode(input_ids, mask)
        # Both passes of the fusion as one batch of 2B; the text layers before it run once (rewrite 11).
        streams = self.text.fuse(text.repeat(2, 1, 1), mask.repeat(2, 1), torch.cat([guided, plain]))[0]
        fused, words = streams.unflatten(0, (2, -1)).unbind(0)
        box, real_fake, classes = self.branch(guided, text, mask, fused[:, 0])
        tokens = self.text.classifier(words[:, 1:])
        return Output(real_fake, classes, box, tokens).widened()


def fold(released: Released, config: RefineConfig, stacked: bool) -> State:
    """The tensors of `Model`."""
    guidance = fold_guidance(released.at("gem.conv_net"))
    return hammer.fold(released, config, stacked) | under("guidance", guidance)
