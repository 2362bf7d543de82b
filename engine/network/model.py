"""The inference network: what all have in common. Each has its own module in `engine.network.models`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.network.output import Output
from engine.network.released import fold_network
from engine.registry import network_of
from engine.registry.config import NetworkConfig


class InferenceModel(nn.Module):
    """A detector for inference only, in one floating dtype with float32 islands.

    Outputs are float32 (float64 in a float64 network) whatever the inner dtype.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_released(
        cls, state: Mapping[str, Tensor], config: NetworkConfig, stacked: bool = True
    ) -> InferenceModel:
        """Build from tensors by their released names; those that no rewrite changes are shared, not copied.

        `stacked` projects the image's keys and values for all fusion layers in one product. Raises
        CheckpointError where the tensors are not those of the network that `config` describes.
        """
        with torch.device("meta"):
            model = build_model(config, stacked)
        try:
            model.load_state_dict(fold_network(state, config, stacked), assign=True)
        except RuntimeError as error:  # torch raises this for any shape that does not fit
            raise CheckpointError(f"the tensors do not fit {config.name}'s configuration: {error}") from error
        return model

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Output:
        """Run normalised images float [B, 3, S, S] with token ids and mask int64 [B, N], 2 <= N."""
        return self.answer(*self.see(image), input_ids, attention_mask)

    def see(self, image: Tensor) -> tuple[Tensor, ...]:
        """What depends on the image alone, [B, ...] each."""
        raise NotImplementedError

    def answer(self, *seen: Any, **inputs: Any) -> Output:
        """Answer captions about images of which only what `see` gives is given, and the other inputs."""
        raise NotImplementedError


def build_model(config: NetworkConfig, stacked: bool = True) -> InferenceModel:
    """The network that `config` is the shape of, its tensors not yet filled, in evaluation mode."""
    model: InferenceModel = network_of(config).load_model().Model(config, stacked)
    return model.eval().requires_grad_(False)
