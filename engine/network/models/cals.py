"""CALS for inference: HAMMER with CAFormer, a refined box and face classes from the patches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engine.network.blocks import ConvFusion, LatentPool, Norm, SelfAttention, dtype_of, empty
from engine.network.branch import Guidance, ImageBranch
from engine.network.fold import Affine, Statistics, fold_conv_fusion, stack, stack_gates
from engine.network.models import hammer
from engine.network.parts import Part
from engine.network.released import Released, State, fold_cross, fold_pool, renamed, under
from engine.network.vision import Vision, run_blocks
from engine.registry.cals import CalsConfig
from engine.registry.config import TORCH_EPS
from kernels.conv_fusion import pack

_POST_NORM = {"layer_norm1": "norm1", "layer_norm2": "norm2", "ffn.0": "ffn.0", "ffn.2": "ffn.2"}
_GUIDANCE = {"0": "first", "2": "rest.0", "4": "rest.2", "7": "rest.5"}


class CAFormer(Vision):
    """Both streams run through the last blocks as one batch of 2B (rewrite 4)."""

    def __init__(self, config: CalsConfig) -> None:
        super().__init__(config)
        width, hidden = config.width, config.mlp_ratio * config.width
        self.start = config.caformer_start
        self.attention = SelfAttention(width, config.caformer_heads)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.norm1, self.norm2 = Norm(width, TORCH_EPS), Norm(width, TORCH_EPS)
        self.fusion = ConvFusion(width, len(config.caformer_kernels))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The fused tokens for the text branch, the plain ones for the image branch."""
        x, delta = run_blocks(self.blocks[: self.start], self.embed(image))
        x = x if delta is None else x + delta
        tokens = self.norm1(self.attention(x), x)
        tokens = self.norm2(self.ffn(tokens), tokens)
        streams = torch.cat([self.fusion(image, tokens), x])
        streams = self.norm(*run_blocks(self.blocks[self.start :], streams))
        fused, plain = streams.unflatten(0, (2, -1)).unbind(0)
        return fused, plain


class PatchClassifier(Part):
    """Face classes: Linear([CLS]) + lambda * mean(sigmoid(Linear(patches)) * patches) per class."""

    def __init__(self, width: int, classes: int = 2) -> None:
        super().__init__()
        self.lambda_param = empty()
        self.gate = nn.Linear(width, classes)
        self.fc_global = nn.Linear(width, classes)

    def float_parameters(self) -> Iterator[nn.Parameter]:
        """All, for it adds up every patch; see `Part`."""
        return self.parameters()

    def unquantised(self, precision: str) -> Iterator[nn.Linear]:
        """The gate, which weighs every patch; in FP8 both, which have two rows of output. See `Part`."""
        yield self.gate
        if precision == "fp8":
            yield self.fc_global

    def forward(self, patches: Tensor, cls: Tensor) -> Tensor:
        """patches [B, P, D], cls [B, D] -> [B, classes]."""
        gate = self.gate(patches).sigmoid()
        # The gate is the same for every channel, so the mean over channels can come first.
        pooled = (gate * patches.mean(-1, keepdim=True)).mean(1)
        return self.fc_global(cls) + self.lambda_param * pooled


class _Branch(ImageBranch):
    """A coarse box guides a second pass over the same text keys (rewrite 7)."""

    classes = 2

    def __init__(self, config: CalsConfig) -> None:
        super().__init__(config)
        self.guidance = Guidance(config.width, config.guidance_widths, config.image_size)
        self.refined_pool = LatentPool(config.width, config.heads)
        # One aggregator with two queries.
        self.refined_pool.norm, self.refined_pool.out = self.pool.norm, self.pool.out
        self.faces = PatchClassifier(config.width)

    def forward(
        self, image: Tensor, text: Tensor, mask: Tensor, fused: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Box, real/fake logits and type logits."""
        key, value = self.cross.project(self.norm(text))
        crossed = image + self.cross(self.norm(image), key, value, mask)
        coarse = self.locate(self.pool(crossed[:, 1:]))
        guided = image[:, 1:] + self.guidance(coarse)
        refined = guided + self.cross(self.norm(guided), key, value, mask)
        wide = crossed.to(dtype_of(self.faces))
        faces = self.faces(wide[:, 1:], wide[:, 0]).to(fused.dtype)
        box = self.locate(self.refined_pool(refined))
        return box, self.itm_head(fused), torch.cat([faces, self.cls_head(fused)], dim=1)


class Model(hammer.Model):
    """CALS."""

    encoder = CAFormer
    image_branch = _Branch


def fold(released: Released, config: CalsConfig, stacked: bool) -> State:
    """The tensors of `Model`."""
    own = {
        **under("cross", fold_cross(released, "it_cross_attn")),
        **under("guidance", fold_guidance(released.at("LIG.conv_net"))),
        **under("refined_pool", fold_pool(released, "cls_token_local_e", config.heads)),
        **under("faces", _faces(released.at("fch"))),
    }
    return {
        **hammer.fold_encoders(released, config, stacked),
        **under("vision", _caformer(released.at("visual_encoder"), config)),
        **under("branch", hammer.fold_branch(released, config) | own),
    }


def fold_guidance(released: Released) -> State:
    """The convolutions of `Guidance`."""
    return renamed(released, _GUIDANCE)


def _faces(released: Released) -> State:
    gates = stack_gates([released.affine(f"conv_attention.{i}") for i in range(2)])
    return {
        "lambda_param": released.tensor("lambda_param"),
        **under("gate", gates),
        **under("fc_global", released.affine("fc_global")),
    }


def _caformer(released: Released, config: CalsConfig) -> State:
    block = released.at("MHA2")
    branches = ["Conv", *(f"Scales.{i}" for i in range(len(config.caformer_kernels) - 1))]
    fusion = stack([_conv_branch(released.at(name)) for name in branches])
    return {
        **renamed(block, _POST_NORM),
        **under("attention.qkv", block.packed("mha")),
        **under("attention.out", block.affine("mha.out_proj")),
        **under("fusion", fusion),
        "fusion.packed": pack(*fusion, config.width),
    }


def _conv_branch(conv: Released) -> Affine:
    """One convolution of CAFormer with its BatchNorm, at the pixels that count."""
    statistics = Statistics(conv.tensor("bn2.running_mean"), conv.tensor("bn2.running_var"))
    return fold_conv_fusion(conv.tensor("conv.weight"), conv.affine("bn2"), statistics)
