"""The forms in which attention leaves for ONNX: a node each, named by what it reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.onnx import ops

MASKED_SCORE = -10000.0  # exp() of it is zero in float32, and it is representable in float16


class Operands(NamedTuple):
    """What a node reads after query, key and value, in this order, and whether it gives the map too.

    mask: its dimensions, 0 where there is none.
    """

    mask: int = 0
    bias: bool = False
    guided: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The node's inputs."""
        return ("query", "key", "value", *["mask"] * bool(self.mask), *["bias"] * self.bias)


PLAIN, MASKED, GUIDED = "HeadAttention", "MaskedHeadAttention", "GuidedHeadAttention"
NODES = {
    PLAIN: Operands(),
    MASKED: Operands(mask=2),
    "PairMaskedHeadAttention": Operands(mask=3),
    "BiasedHeadAttention": Operands(bias=True),
    "BiasedMaskedHeadAttention": Operands(mask=2, bias=True),
    "BiasedPairMaskedHeadAttention": Operands(mask=3, bias=True),
    GUIDED: Operands(guided=True),
}  # how each form of attention is called in the ONNX graph
_NAMES = {operands: name for name, operands in NODES.items()}


def emit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    guided: bool = False,
) -> list[Tensor]:
    """Leave a node in the traced graph: its output, and the map of a guided one."""
    name = _NAMES[Operands(0 if mask is None else mask.dim(), bias is not None, guided)]
    inputs = [query, key, value, *(x for x in (mask, bias) if x is not None)]
    shapes, dtypes = [query.shape], [query.dtype]
    if guided:
        shapes.append(torch.Size((*query.shape[:2], key.shape[1])))
        dtypes.append(torch.float32)
    scale = (query.shape[-1] // heads) ** -0.5
    return list(ops.emit(name, inputs, shapes, dtypes, {"heads": [heads], "scale": scale}))
