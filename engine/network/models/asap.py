"""ASAP for inference: HAMMER with MGCA's map and another image branch."""

from __future__ import annotations

from torch import Tensor

from engine.network.blocks import CrossAttention, empty
from engine.network.branch import ImageBranch
from engine.network.models import hammer
from engine.network.released import Released, State, fold_cross, under
from engine.registry.config import FusionConfig, NetworkConfig


class _Branch(ImageBranch):
    """Self-attention first, the normalised image as residual, the box feature in the logits."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.own = CrossAttention(config.width, config.heads)
        self.share_real_fake, self.share_classes = empty(), empty()

    def forward(
        self, image: Tensor, text: Tensor, mask: Tensor, fused: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Box, real/fake logits and type logits."""
        x = self.norm(image)
        patches = x[:, 1:]
        key, value = self.cross.project(self.norm(text))
        attended = self.own(patches, *self.own.project(x))
        feature = self.pool(self.cross(attended, key, value, mask) + patches)
        real_fake = self.itm_head(fused + self.share_real_fake * feature)
        return self.locate(feature), real_fake, self.cls_head(fused + self.share_classes * feature)


class Model(hammer.Model):
    """ASAP."""

    image_branch = _Branch
    with_map = True


def fold(released: Released, config: FusionConfig, stacked: bool) -> State:
    """The tensors of `Model`."""
    own = {
        **under("cross", fold_cross(released, "it_cross_attn.crossatten")),
        **under("own", fold_cross(released, "it_cross_attn.selfatten")),
        "share_real_fake": released.tensor("UtilsB"),
        "share_classes": released.tensor("UtilsC"),
    }
    branch = hammer.fold_branch(released, config) | own
    return hammer.fold_encoders(released, config, stacked) | under("branch", branch)
