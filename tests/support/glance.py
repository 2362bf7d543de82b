"""A network of eighty lines, as docs/add-a-network.md shows: the mean of the patches and of the words.

Its record, its form for inference and its published form, which a network of the project has in three files.
"""

from __future__ import annotations

from torch import nn

from engine.network.blocks import Head
from engine.network.model import InferenceModel
from engine.network.output import Output
from engine.network.released import Released, State, fold_head, renamed
from engine.network.vision import PatchEmbed
from engine.registry.config import TYPES, NetworkConfig
from engine.registry.record import Keys, Network

TINY = NetworkConfig(
    name="glance",
    size="tiny",
    width=32,
    heads=1,
    vision_depth=1,
    text_depth=1,
    mlp_ratio=1,
    image_size=64,
    patch_size=16,
    vocabulary=2048,
    positions=128,
)
NETWORK = Network(
    name="glance",
    title="Glance",
    source="the tests",
    licence="Apache-2.0",
    sizes={"tiny": TINY},
    keys=Keys(("glance.",), words="glance.words.weight", text_positions="none", width="glance.words.weight"),
    parameters={"tiny": 117_036},
    gflop=(0.1, 0.1),
    trainable=False,
    model=__name__,
    published=__name__,
)
ANSWERS = {"real_fake": 2, "classes": len(TYPES), "box": 4}


class Model(InferenceModel):
    def __init__(self, config: NetworkConfig, stacked: bool = True) -> None:
        super().__init__(config)
        self.patch_embed, self.words = PatchEmbed(config), nn.Embedding(config.vocabulary, config.width)
        self.heads = nn.ModuleDict({name: Head(config.width, out) for name, out in ANSWERS.items()})
        self.token_head = Head(config.width, 2)

    def see(self, image):
        return (self.patch_embed(image.to(self.words.weight.dtype)),)

    def answer(self, patches, input_ids, attention_mask):
        words = self.words(input_ids)
        mask = attention_mask[:, :, None].to(words.dtype)
        pair = patches.mean(1) + (words * mask).sum(1) / mask.sum(1)
        answers = {name: head(pair).float() for name, head in self.heads.items()}
        tokens = self.token_head(words[:, 1:] + pair[:, None]).float()
        return Output(answers["real_fake"], answers["classes"], answers["box"].sigmoid(), tokens)


def fold(released: Released, config: NetworkConfig, stacked: bool) -> State:
    own = released.at("glance")
    folded = renamed(own, {"patch_embed.proj": "patch_embed.proj"}) | fold_head(own, "token_head")
    for name in ANSWERS:
        folded |= fold_head(own, f"heads.{name}")
    return folded | {"words.weight": own.tensor("words.weight")}


class Published(nn.Module):
    """The same under the names of its checkpoints; a network whose released form differs writes it out."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config, self.glance = config, Model(config)

    def forward(self, image, input_ids, attention_mask):
        return self.glance(image, input_ids, attention_mask)
