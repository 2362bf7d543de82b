"""A network of sixty lines, as docs/add-a-network.md shows: the mean of the patches and of the words.

Its record and its form for inference. That is its published form too: its checkpoints have the same names.
"""

from __future__ import annotations

from torch import Tensor, nn

from engine.network.blocks import Head
from engine.network.model import InferenceModel
from engine.network.output import Output
from engine.network.released import unchanged
from engine.network.vision import PatchEmbed
from engine.registry.config import TINY_SHAPE, TYPES, NetworkConfig
from engine.registry.record import Keys, Network

NETWORK = Network(
    name="glance",
    title="Glance",
    source="the tests",
    licence="Apache-2.0",
    sizes={"tiny": NetworkConfig.like(TINY_SHAPE, name="glance", width=32)},
    keys=Keys(marks=("words.",), words="words.weight", width="words.weight"),
    parameters={"tiny": 117_036},
    gflop=(0.0129, 0.0132),
    module=__name__,
)


class Model(InferenceModel):
    """A head for each answer, on the sum of both means; a word's reads the word as well."""

    def __init__(self, config: NetworkConfig, stacked: bool = True) -> None:
        super().__init__(config)
        self.patch_embed, self.words = PatchEmbed(config), nn.Embedding(config.vocabulary, config.width)
        self.real_fake, self.classes = Head(config.width, 2), Head(config.width, len(TYPES))
        self.box, self.tokens = Head(config.width, 4), Head(config.width, 2)

    def see(self, image: Tensor) -> tuple[Tensor, ...]:
        """The embedded patches [B, P, D]."""
        return (self.patch_embed(image.to(self.words.weight.dtype)),)

    def answer(self, patches: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Output:
        """Answer captions about images of which only the patches are given."""
        words = self.words(input_ids)
        mask = attention_mask[:, :, None].to(words.dtype)
        pair = patches.mean(1) + (words * mask).sum(1) / mask.sum(1)
        box, tokens = self.box(pair).sigmoid(), self.tokens(words[:, 1:] + pair[:, None])
        return Output(self.real_fake(pair), self.classes(pair), box, tokens).widened()


fold = unchanged
Published = Model
