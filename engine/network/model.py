"""The inference network: image encoder, text encoder, fusion and heads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.network.branch import BRANCHES
from engine.network.config import NetworkConfig
from engine.network.output import Output
from engine.network.released import fold_network
from engine.network.text import Text
from engine.network.vision import build_vision


class InferenceModel(nn.Module):
    """A detector for inference only, in one floating dtype with float32 islands.

    Outputs are float32 (float64 in a float64 network) whatever the inner dtype.
    """

    def __init__(self, config: NetworkConfig, stacked: bool = True) -> None:
        super().__init__()
        self.config = config
        self.vision = build_vision(config)
        self.text = Text(config, stacked)
        self.branch = BRANCHES[config.name](config)
        self.eval().requires_grad_(False)

    @classmethod
    def from_released(
        cls, state: Mapping[str, Tensor], config: NetworkConfig, stacked: bool = True
    ) -> InferenceModel:
        """Build from tensors by their released names; those that no rewrite changes are shared, not copied.

        `stacked` projects the image's keys and values for all fusion layers in one product. Raises
        CheckpointError where the tensors are not those of the network that `config` describes.
        """
        with torch.device("meta"):
            model = cls(config, stacked)
        try:
            model.load_state_dict(fold_network(state, config, stacked), assign=True)
        except RuntimeError as error:  # torch raises this for any shape that does not fit
            raise CheckpointError(f"the tensors do not fit {config.name}'s configuration: {error}") from error
        return model

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Output:
        """Run normalised images float [B, 3, S, S] with token ids and mask int64 [B, N], 2 <= N."""
        return self.answer(*self.see(image), input_ids, attention_mask)

    def see(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image features [B, 1+P, D] for the text branch and for the image branch."""
        return self.vision(image.to(self.vision.positions.dtype))

    def answer(
        self, for_text: Tensor, for_image: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Output:
        """Answer captions about images of which only the features are given."""
        mask = attention_mask.to(torch.int32)
        text = self.text.encode(input_ids, mask)
        fused, guide = self.text.fuse(text, mask, for_text)
        box, real_fake, classes = self.branch(for_image, text, mask, fused[:, 0])
        tokens = self.text.classifier(fused[:, 1:])
        out = torch.promote_types(real_fake.dtype, torch.float32)
        return Output(real_fake.to(out), classes.to(out), box.to(out), tokens.to(out), guide)
