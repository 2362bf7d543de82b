"""Channels that may be rescaled: what gives them takes the inverse factor, exactly and at no cost.

A norm, or the rows of a product, that give channel k are divided by its factor, and the columns that read it
are multiplied. Nothing else may read the channel, and between the two there may be only what passes a
positive factor on: an attention's mixing of values, ReLU, a sum of channels that are all rescaled alike. Not
so: GELU, the picture's last norm, a norm whose answer is a residual too (BERT's, CAFormer's, ASAP's picture).
Factors are powers of two: what lies between differs in exponents alone, and the answers do not differ.
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
    """Channels that `givers` give and `readers`, Linear layers by name, alone read.

    A giver is a module by name and the row of its answer that the first channel is.
    """

    givers: tuple[tuple[str, int], ...]
    readers: tuple[str, ...]

    @property
    def name(self) -> str:
        """The first reader, which no other seam has."""
        return self.readers[0]


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


def _seam(giver: str | tuple[str, int], *readers: str) -> Seam:
    return Seam(((giver, 0) if isinstance(giver, str) else giver,), readers)


def _branch_seams(model: InferenceModel) -> Iterator[Seam]:
    last = (f"text.fusion_layers.{len(model.text.fusion_layers) - 1}.output_norm", 0)
    heads = ("text.classifier.0", "branch.itm_head.0", "branch.cls_head.0")
    pools = ["branch.pool"]
    if isinstance(model.branch, AsapBranch):
        # The picture's feature is added to the fused [CLS], so both are rescaled alike.
        yield Seam((last, ("branch.pool.out", 0)), (*heads, "branch.bbox_head.0"))
        yield _seam("branch.own.out", "branch.cross.query")
    else:
        yield Seam((last,), heads)
        yield _seam("branch.norm", "branch.cross.query", "branch.cross.key_value")
    if isinstance(model.branch, CalsBranch):
        pools.append("branch.refined_pool")
    yield Seam(tuple((pool, 0) for pool in pools), ("branch.pool.out",))


def rescale(model: InferenceModel, shifts: Mapping[str, Sequence[int]]) -> InferenceModel:
    """Rescale the seams named in `shifts` by 2**shift, one a channel, in place; tensors stay as they are.

    Raises ValueError for a name that is no seam's, and for another number of channels.
    """
    known = {seam.name: seam for seam in seams(model)}
    for name, exponents in shifts.items():
        if name not in known:
            raise ValueError(f"{name}: no channels can be rescaled there")
        readers = [cast(nn.Linear, model.get_submodule(reader)) for reader in known[name].readers]
        if len(exponents) != readers[0].in_features:
            raise ValueError(f"{name}: expected {readers[0].in_features} shifts, got {len(exponents)}")
        factor = torch.tensor(exponents, dtype=readers[0].weight.dtype).exp2()
        for giver, start in known[name].givers:
            _divide(model.get_submodule(giver), start, factor)
        for reader in readers:
            reader.weight = _constant(reader.weight * factor)
    return model


def _divide(module: nn.Module, start: int, factor: Tensor) -> None:
    """Divide the channels that a module gives from row `start` of its answer."""
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
