"""Rescales channels between a producer and its consumers by exact inverse factors, at no cost.

The norm or the rows of a product that produce channel k are divided by its factor, and the columns that
consume it are multiplied. Nothing else may read the channel, and in between there may only be operators that
pass a positive factor on: attention's mixing of values, ReLU, a sum of channels with equal factors. Not GELU,
the image's last norm, or a norm whose output is a residual too (BERT's, CAFormer's, ASAP's image).
Factors are powers of two: values in between differ in their exponents alone, and the outputs are the same.
Source: arXiv:2211.10438, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from engine.network.blocks import CrossAttention, LatentPool, Norm, SelfAttention
from engine.network.branch import AsapBranch, CalsBranch
from engine.network.model import InferenceModel
from engine.network.vision import CAFormer

MOST = 32  # bits that a channel may be shifted by


@dataclass(frozen=True)
class Seam:
    """Channels produced by `producers` and consumed only by `consumers`, Linear layers by name.

    A producer is a module by name, and the row of its output that is the first channel.
    """

    producers: tuple[tuple[str, int], ...]
    consumers: tuple[str, ...]

    @property
    def name(self) -> str:
        """The first consumer, which no other seam has."""
        return self.consumers[0]


def seams(model: InferenceModel) -> Iterator[Seam]:
    """Every seam of a network."""
    for name, module in model.named_modules():
        if isinstance(module, SelfAttention):
            yield _seam((f"{name}.qkv", 2 * module.out.in_features), f"{name}.out")
        elif isinstance(module, CrossAttention) and module.key_value is not None:
            yield _seam((f"{name}.key_value", module.out.in_features), f"{name}.out")
    for i in range(len(model.vision.blocks)):
        block = f"vision.blocks.{i}"
        yield _seam(f"{block}.norm1", f"{block}.attention.qkv")
        yield _seam(f"{block}.norm2", f"{block}.mlp.fc1")
    if isinstance(model.vision, CAFormer):
        yield _seam("vision.ffn.0", "vision.ffn.2")
    if model.text.key_values is not None:
        for i in range(len(model.text.fusion_layers)):
            yield _seam(
                ("text.key_values", (2 * i + 1) * model.config.width), f"text.fusion_layers.{i}.cross.out"
            )
    yield from _branch_seams(model)


def _seam(producer: str | tuple[str, int], *consumers: str) -> Seam:
    return Seam(((producer, 0) if isinstance(producer, str) else producer,), consumers)


def _branch_seams(model: InferenceModel) -> Iterator[Seam]:
    last = (f"text.fusion_layers.{len(model.text.fusion_layers) - 1}.output_norm", 0)
    heads = ("text.classifier.0", "branch.itm_head.0", "branch.cls_head.0")
    pools = ["branch.pool"]
    if isinstance(model.branch, AsapBranch):
        # The image's feature is added to the fused [CLS], so both are rescaled alike.
        yield Seam((last, ("branch.pool.out", 0)), (*heads, "branch.bbox_head.0"))
        yield _seam("branch.own.out", "branch.cross.query")
    else:
        yield Seam((last,), heads)
        yield _seam("branch.norm", "branch.cross.query", "branch.cross.key_value")
    if isinstance(model.branch, CalsBranch):
        pools.append("branch.refined_pool")
    yield Seam(tuple((pool, 0) for pool in pools), ("branch.pool.out",))


def rescale(model: InferenceModel, shifts: Mapping[str, Sequence[int]]) -> InferenceModel:
    """Rescale the seams named in `shifts` by 2**shift a channel, in place; original tensors are unchanged.

    Raises ValueError for an unknown seam and for another number of channels.
    """
    seams_by_name = {seam.name: seam for seam in seams(model)}
    for name, exponents in shifts.items():
        if name not in seams_by_name:
            raise ValueError(f"{name}: no channels can be rescaled there")
        seam = seams_by_name[name]
        consumers = [cast(nn.Linear, model.get_submodule(consumer)) for consumer in seam.consumers]
        if len(exponents) != consumers[0].in_features:
            raise ValueError(f"{name}: expected {consumers[0].in_features} shifts, got {len(exponents)}")
        factor = torch.tensor(exponents, dtype=consumers[0].weight.dtype).exp2()
        for producer, start in seam.producers:
            _divide(model.get_submodule(producer), start, factor)
        for consumer in consumers:
            consumer.weight = _constant(consumer.weight * factor)
    return model


def _divide(module: nn.Module, start: int, factor: Tensor) -> None:
    """Divide the channels that a module produces from row `start` of its output."""
    if isinstance(module, LatentPool):
        shape = module.bias.shape
        module.value = _constant(module.value / factor.reshape(shape)[:, None])
        module.bias = _constant(module.bias / factor.reshape(shape))
        return
    rows = cast(nn.Linear | Norm, module)
    whole = factor.new_ones(len(rows.weight))
    whole[start : start + len(factor)] = factor
    rows.weight = _constant(rows.weight / (whole[:, None] if rows.weight.dim() > 1 else whole))
    if rows.bias is not None:
        rows.bias = _constant(rows.bias / whole)


def _constant(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)
