"""PMMD for inference: locate finds a box in three steps, and refine judges the pair and that box."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engine.network.blocks import CrossAttention, Gelu, LatentPool, Norm, SelfAttention, dtype_of, empty
from engine.network.branch import Guidance
from engine.network.fold import (
    Affine,
    fold_latent_query,
    fold_relative_positions,
    fold_scale,
)
from engine.network.linear import LinearInput
from engine.network.model import InferenceModel
from engine.network.models import pmmd_refine
from engine.network.models.cals import fold_guidance
from engine.network.output import Output
from engine.network.parts import Part, linears
from engine.network.released import Released, State, fold_cross, fold_pool, fold_text_layers, renamed, under
from engine.network.text import TextEncoder
from engine.network.vision import Block, PatchEmbed, run_blocks
from engine.registry.config import TORCH_EPS, VIT_EPS
from engine.registry.pmmd import PmmdConfig
from kernels.attention import attention

_STEPS = ("cls_token_local", "cls_token_local_L", "cls_token_local_L_2")
_HEADS = ("bbox_head", "bbox_head_cross_step2", "bbox_head_cross_step3")
_HEAD = (0, 1, 3)  # the layers of a box head with parameters


class RelativeAttention(SelfAttention):
    """Self-attention with BEiT's bias of the scores by relative position, gathered once (rewrite 9)."""

    def __init__(self, config: PmmdConfig) -> None:
        super().__init__(config.width, config.heads)
        self.relative = empty(config.heads, config.image_tokens, config.image_tokens)

    def forward(self, x: LinearInput, mask: Tensor | None = None) -> Tensor:
        """[B, 1+P, D] -> [B, 1+P, D]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(attention(q, k, v, self.heads, mask, bias=self.relative))


class Beit(nn.Module):
    """BEiT v2: positions only in the attention; the patches' mean takes the place of [CLS]."""

    def __init__(self, config: PmmdConfig) -> None:
        super().__init__()
        width = config.width
        self.patch_embed = PatchEmbed(config)
        self.cls = empty(1, 1, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.locate_vision_depth))
        for block in self.blocks:
            block.attention = RelativeAttention(config)
        self.norm = Norm(width, VIT_EPS)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, 1+P, D]."""
        patches = self.patch_embed(image.to(self.cls.dtype))
        x = torch.cat([self.cls.expand(image.shape[0], -1, -1), patches], dim=1)
        x, delta = run_blocks(self.blocks, x)
        patches = self.norm(x[:, 1:], None if delta is None else delta[:, 1:])
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)


class DualFeature(Part):
    """What two learnt queries read from the two image encoders, mixed to one vector."""

    def __init__(self, config: PmmdConfig) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.modal = LatentPool(width, heads, normed=False)
        self.cross = LatentPool(width, heads, normed=False)
        self.mix = CrossAttention(width, heads)
        self.ffn = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def unquantised(self, precision: str) -> Iterator[nn.Linear]:
        """One row a pair; see `Part`."""
        return linears(self) if precision == "fp8" else iter(())

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        """Tokens [B, 1+P, D] of both encoders -> [B, D]."""
        modal = self.modal(other)
        both = torch.stack([modal, self.cross(image)], dim=1)
        # Only the first of the two rows is read (rewrite 8).
        return self.ffn(self.mix(modal[:, None], *self.mix.project(both))[:, 0])


class BoxHead(nn.Sequential, Part):
    """Linear(D, 2D) LN GELU Linear(2D, 4), in float32 in every precision: a box guides what comes next."""

    def __init__(self, width: int) -> None:
        hidden = 2 * width
        super().__init__(nn.Linear(width, hidden), Norm(hidden, TORCH_EPS), Gelu(), nn.Linear(hidden, 4))

    def float_parameters(self) -> Iterator[nn.Parameter]:
        """All; see `Part`."""
        return self.parameters()

    def unquantised(self, precision: str) -> Iterator[nn.Linear]:
        """All; see `Part`."""
        return linears(self)


class Locate(nn.Module):
    """PMMD's first stage: a box, and twice a finer one from the image that the last one guides."""

    def __init__(self, config: PmmdConfig) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.vision, self.other = Beit(config), Beit(config)
        self.text = TextEncoder(config, config.locate_text_depth)
        self.dual = DualFeature(config)
        self.guidance = Guidance(width, config.guidance_widths, config.image_size)
        self.norm = Norm(width, TORCH_EPS)
        self.cross = CrossAttention(width, heads)
        self.pools = nn.ModuleList(LatentPool(width, heads) for _ in _STEPS)
        first = self.pools[0]
        for pool in self.pools[1:]:  # one aggregator with three queries
            pool.norm, pool.out = first.norm, first.out
        self.heads = nn.ModuleList(BoxHead(width) for _ in _HEADS)

    def see(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The image's tokens [B, 1+P, D] by both encoders."""
        return self.vision(image), self.other(image)

    def answer(self, image: Tensor, other: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """The box [B, 4] (cx, cy, w, h in [0, 1]) that captions and images' tokens speak of."""
        # The caption's keys and values once for three passes (rewrite 7).
        text = self.cross.project(self.norm(self.text.encode(input_ids, mask)))
        patches = image[:, 1:]
        box = self._box(0, self._read(0, patches, text, mask))
        box = self._box(1, self._read(1, patches + self.guidance(box), text, mask))
        feature = self._read(2, patches + self.guidance(box), text, mask)
        return self._box(2, feature + self.dual(image, other))

    def _read(self, step: int, patches: Tensor, text: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """What the query of a step reads of patches [B, P, D] that have read the caption, [B, D]."""
        return self.pools[step](patches + self.cross(self.norm(patches), *text, mask))

    def _box(self, step: int, feature: Tensor) -> Tensor:
        """The box [B, 4] of a step from [B, D]."""
        head = self.heads[step]
        return head(feature.to(dtype_of(head))).sigmoid()


class Model(InferenceModel):
    """PMMD: both stages in one graph."""

    def __init__(self, config: PmmdConfig, stacked: bool = True) -> None:
        super().__init__(config)
        self.locate = Locate(config)
        self.refine = pmmd_refine.Model(config, stacked)

    def see(self, image: Tensor) -> tuple[Tensor, ...]:
        """The image's tokens [B, 1+P, D] by refine's encoder and locate's two."""
        return *self.refine.see(image), *self.locate.see(image)

    def answer(
        self, plain: Tensor, image: Tensor, other: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Output:
        """Answer captions about images of which only the tokens are given."""
        box = self.locate.answer(image, other, input_ids, attention_mask.to(torch.int32))
        return self.refine.answer(plain, input_ids, attention_mask, box)


def fold(released: Released, config: PmmdConfig, stacked: bool) -> State:
    """The tensors of `Model`."""
    return {
        **under("locate", fold_locate(released.at("locate"), config)),
        **under("refine", pmmd_refine.fold(released.at("refine"), config, stacked)),
    }


def fold_locate(released: Released, config: PmmdConfig) -> State:
    """The tensors of `Locate`."""
    folded = {
        **under("vision", _beit(released.at("vision_encoder"), config)),
        **under("other", _beit(released.at("vision_encoder_f"), config)),
        **under("text", fold_text_layers(released.at("text_encoder"), config.locate_text_depth)),
        **under("dual", _dual(released.at("dfp"), config)),
        **under("guidance", fold_guidance(released.at("gem.conv_net"))),
        **renamed(released, {"norm_layer_it_cross_atten": "norm"}),
        **under("cross", fold_cross(released, "it_cross_attn")),
    }
    for i, (query, head) in enumerate(zip(_STEPS, _HEADS, strict=True)):
        folded |= under(f"pools.{i}", fold_pool(released, query, config.heads))
        folded |= renamed(released, {f"{head}.{layer}": f"heads.{i}.{layer}" for layer in _HEAD})
    return folded


def _beit(released: Released, config: PmmdConfig) -> State:
    folded = renamed(released, {"patch_embed.proj": "patch_embed.proj", "fc_norm": "norm"})
    folded["cls"] = released.tensor("cls_token")
    for i in range(config.locate_vision_depth):
        folded |= under(f"blocks.{i}", _block(released.at(f"blocks.{i}"), config.grid))
    return folded


def _block(block: Released, grid: int) -> State:
    attn = block.at("attn")
    query, value = attn.tensor("q_bias"), attn.tensor("v_bias")
    bias = torch.cat([query, torch.zeros_like(query), value])  # a bias of the keys would cancel
    return {
        **renamed(block, {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1"}),
        **under("attention.qkv", Affine(attn.tensor("qkv.weight"), bias)),
        "attention.relative": fold_relative_positions(attn.tensor("relative_position_bias_table"), grid),
        **under("attention.out", fold_scale(attn.affine("proj"), block.tensor("gamma_1"))),
        **under("mlp.fc2", fold_scale(block.affine("mlp.fc2"), block.tensor("gamma_2"))),
    }


def _dual(released: Released, config: PmmdConfig) -> State:
    folded: State = {}
    for name in ("modal", "cross"):
        packed = released.packed(f"cross_attention_{name}")
        query = fold_latent_query(released.tensor(f"query_{name}"), None, packed, config.heads)
        folded |= under(name, query._asdict())
        folded |= under(f"{name}.out", released.affine(f"cross_attention_{name}.out_proj"))
    folded |= under("mix", fold_cross(released, "self_attention_cross"))
    return folded | renamed(released, {"ffn_cross.0": "ffn.0", "ffn_cross.2": "ffn.2"})
