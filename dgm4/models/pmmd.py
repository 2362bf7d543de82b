"""PMMD as one network: *locate* finds a box, *refine* judges the pair and that box.

Source: the code of PMMD. There the two are separate programs, and the box travels in a file of annotations.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgm4.config import VIT_EPS
from dgm4.layers import PackedAttention, merge_heads
from dgm4.models.pmmd_refine import GuidedBranch
from dgm4.models.pmmd_refine import Published as Refine
from dgm4.text import Bert
from dgm4.vision import Mlp, PatchEmbed
from engine.network.output import Output
from engine.registry.pmmd import PmmdConfig


class RelativeAttention(nn.Module):
    """BEiT's self-attention: no bias of the keys, and one of the scores by relative position."""

    def __init__(self, config: PmmdConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.grid = config.heads, config.grid
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        offsets = (2 * config.grid - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3, config.heads))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1+P, D] -> [B, 1+P, D]."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = (
            F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        ).unbind(0)
        index = relative_index(self.grid).to(x.device)
        relative = self.relative_position_bias_table[index].permute(2, 0, 1)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + relative
        return self.proj(merge_heads(scores.softmax(-1) @ v))


@functools.cache
def relative_index(grid: int) -> Tensor:
    """Row of BEiT's table for each query and key of [CLS] and grid x grid patches, [1+P, 1+P] int64.

    Patches by the offset of query from key, (dy + grid - 1) * (2 grid - 1) + dx + grid - 1; then three rows
    for [CLS] as the query, as the key, and as both.
    """
    with torch.device("cpu"):
        y, x = torch.arange(grid).repeat_interleave(grid), torch.arange(grid).repeat(grid)
        side = 2 * grid - 1
        patches = (y[:, None] - y + grid - 1) * side + x[:, None] - x + grid - 1
        index = F.pad(patches, (1, 0, 1, 0))
        index[0], index[:, 0], index[0, 0] = side**2, side**2 + 1, side**2 + 2
    return index


class BeitBlock(nn.Module):
    """Pre-norm transformer block, each of its branches scaled by channel."""

    def __init__(self, config: PmmdConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=VIT_EPS), nn.LayerNorm(width, eps=VIT_EPS)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.attn = RelativeAttention(config)
        self.mlp = Mlp(width, config.mlp_ratio * width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1+P, D] -> [B, 1+P, D]."""
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class Beit(nn.Module):
    """BEiT v2: positions only in the attention; the patches' mean takes the place of [CLS]."""

    def __init__(self, config: PmmdConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(BeitBlock(config) for _ in range(config.locate_vision_depth))
        self.fc_norm = nn.LayerNorm(config.width, eps=VIT_EPS)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, 1+P, D]."""
        x = torch.cat([self.cls_token.expand(len(image), -1, -1), self.patch_embed(image)], dim=1)
        for block in self.blocks:
            x = block(x)
        patches = self.fc_norm(x[:, 1:])
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)


class DualFeature(nn.Module):
    """What two learnt queries read from the two image encoders, mixed to one vector."""

    def __init__(self, config: PmmdConfig) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.query_modal = nn.Parameter(torch.zeros(1, 1, width))
        self.query_cross = nn.Parameter(torch.zeros(1, 1, width))
        self.cross_attention_modal = PackedAttention(width, heads)
        self.cross_attention_cross = PackedAttention(width, heads)
        self.self_attention_cross = PackedAttention(width, heads)
        self.ffn_cross = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        """Tokens [B, 1+P, D] of both encoders -> [B, D]."""
        modal = self.cross_attention_modal(self.query_modal.expand(len(other), -1, -1), other)
        cross = self.cross_attention_cross(self.query_cross.expand(len(image), -1, -1), image)
        both = torch.cat([modal, cross], dim=1)
        return cast(Tensor, self.ffn_cross(self.self_attention_cross(both, both)[:, 0]))


def box_head(width: int) -> nn.Sequential:
    """Linear(D, 2D) LN GELU Linear(2D, 4)."""
    hidden = 2 * width
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, 4))


class LocateText(nn.Module):
    """BERT without its fusion layers, which locate never runs."""

    def __init__(self, config: PmmdConfig) -> None:
        super().__init__()
        depth = config.locate_text_depth
        self.bert = Bert(replace(config, text_depth=depth, fusion_start=depth))


class Locate(GuidedBranch):
    """PMMD's first stage, with the names of its checkpoint: the box in three steps, each guiding the next."""

    def __init__(self, config: PmmdConfig) -> None:
        super().__init__(config)
        width = config.width
        self.vision_encoder, self.vision_encoder_f = Beit(config), Beit(config)
        self.text_encoder = LocateText(config)
        self.dfp = DualFeature(config)
        self.cls_token_local_L = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_token_local_L_2 = nn.Parameter(torch.zeros(1, 1, width))
        self.bbox_head = box_head(width)
        self.bbox_head_cross_step2, self.bbox_head_cross_step3 = box_head(width), box_head(width)

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Find the box [B, 4] (cx, cy, w, h in [0, 1]) of images [B, 3, S, S] with ids and mask [B, N]."""
        plain, other = self.vision_encoder(image), self.vision_encoder_f(image)
        text, _ = self.text_encoder.bert.encode_text(input_ids, attention_mask)
        dual = self.dfp(plain, other)
        box = self.bbox_head(self.read(plain, text, attention_mask, self.cls_token_local)).sigmoid()
        feature = self.read(self.guide(plain, box), text, attention_mask, self.cls_token_local_L)
        box = self.bbox_head_cross_step2(feature).sigmoid()
        feature = self.read(self.guide(plain, box), text, attention_mask, self.cls_token_local_L_2)
        return cast(Tensor, self.bbox_head_cross_step3(feature + dual)).sigmoid()


class Published(nn.Module):
    """Both stages, the names of their checkpoints under `locate.` and `refine.`."""

    def __init__(self, config: PmmdConfig) -> None:
        super().__init__()
        self.config = config
        self.locate, self.refine = Locate(config), Refine(config)

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Output:
        """Judge normalised images [B, 3, S, S] with token ids and mask [B, N] (int64, no [SEP])."""
        box = self.locate(image, input_ids, attention_mask)
        return cast(Output, self.refine(image, input_ids, attention_mask, box))
