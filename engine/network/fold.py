"""The exact rewrites: each takes tensors of the trained network and returns ones that give the same for less.

Every fold is computed in float64 and cast back, and none changes the tensors it is given. Each docstring
states what the fold saves. `engine.network.released` composes them. By the numbers used in comments:

1. token logits from the fusion pass rather than from a second run of BERT (`dgm4` computes them so)
2. CAFormer's fusion at the token grid: `fold_conv_fusion`
3. the learnt query folded with the key projection: `fold_latent_query`
4. the last blocks of CALS on both streams as one batch (order of calls in `engine.network.vision`)
5. keys and values of all fusion layers as one product: `stack`
6. query, key and value of a BERT layer as one product: `stack`
7. all passes of a guided image branch share the text's keys and values (`CrossAttention.project`)
8. no [CLS] query where its output is unused (order of calls in `engine.network.branch`)
9. BEiT's bias by relative position gathered once, not for every image: `fold_relative_positions`
10. BEiT's scales of a branch folded into its last product: `fold_scale`
11. both fusion passes of PMMD's refine as one batch, after one run of the text layers
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.errors import CheckpointError
from engine.registry.config import TORCH_EPS
from kernels.conv_fusion import POSITIONS

KERNELS = (1, 3, 5)  # sides of CAFormer's convolutions: the window of kernels/conv_fusion.py holds them


class Affine(NamedTuple):
    """Weight and bias of a Linear ([out, in], [out]), a convolution or a norm ([D], [D])."""

    weight: Tensor
    bias: Tensor


class Statistics(NamedTuple):
    """Running mean and variance [D] of a BatchNorm."""

    mean: Tensor
    variance: Tensor


class Query(NamedTuple):
    """A folded latent query: query [H, D], value [H, D, d] and bias [H, d] of H heads of d."""

    query: Tensor
    value: Tensor
    bias: Tensor


def stack(layers: Sequence[Affine]) -> Affine:
    """Several Linears of one input as a single product, outputs side by side (rewrites 5 and 6).

    Saves a launch and a read of the input for each but the first.
    """
    return Affine(torch.cat([x.weight for x in layers]), torch.cat([x.bias for x in layers]))


def split_packed(packed: Affine) -> tuple[Affine, Affine, Affine]:
    """The query, key and value projections of a packed attention, [3D, D] and [3D], as views."""
    query, key, value = map(Affine, packed.weight.chunk(3), packed.bias.chunk(3))
    return query, key, value


def stack_gates(gates: Sequence[Affine]) -> Affine:
    """The one-channel 1x1 convolutions [1, D, 1, 1] of CALS's face classes as one Linear [classes, D]."""
    return stack([Affine(gate.weight.flatten(1), gate.bias) for gate in gates])


def fold_cls(cls: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """[CLS] [1, 1, D] with its position added, and the positions [1, P, D] of the patches, a view.

    The sum is the same for every image.
    """
    return cls + positions[:, :1], positions[:, 1:]


def fold_places(positions: Tensor, types: Tensor) -> Tensor:
    """Position embeddings [L, D] with the one token type of captions, row 0 of types [2, D], added."""
    return positions + types[0]


def fold_type(linear: Affine, row: Tensor) -> Affine:
    """A Linear with a constant [D] added to its output, as the type of a stream is."""
    return Affine(linear.weight, linear.bias + row)


def position_codes(places: Tensor, width: int) -> Tensor:
    """Sine (even channels) and cosine (odd) of 2 pi u / 10000^(2 floor(k/2) / D), float64; [n] -> [n, D]."""
    channel = torch.arange(width, dtype=torch.float64)
    period = 10000 ** (2 * (channel / 2).floor() / width)
    angle = 2 * math.pi * places.double()[:, None] / period
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


def fold_positions(codes: Tensor, linear: Affine, norm: Affine) -> Tensor:
    """Embed codes [n, C] of places, LN(Linear(.)), once for all images and captions; [n, D].

    Saves 4 P D^2 multiplications for codes of two axes: 0.6 GFLOP at base size.
    """
    embedded = F.linear(codes, linear.weight.double(), linear.bias.double())
    embedded = F.layer_norm(
        embedded, embedded.shape[-1:], norm.weight.double(), norm.bias.double(), TORCH_EPS
    )
    return embedded.to(linear.weight.dtype)


def fold_conv_fusion(conv: Tensor, norm: Affine, statistics: Statistics) -> Affine:
    """Fold BatchNorm into the kernel and place it at the four pixels that the downsampling reads (rewrite 2).

    Output i of the bilinear downsampling from 16 G to G lies at 16i + 7.5: the mean of pixels 16i+7 and
    16i+8, which see 16i+5 .. 16i+10, a 6x6 window at stride 16. Saves 201 MB an image and 255/256 of
    the convolution. conv [D, 3, k, k] -> [4D, 3, 6, 6] and [4D]. Raises CheckpointError for another k.
    """
    side = conv.shape[-1]
    if conv.shape[2:] != (side, side) or side not in KERNELS:
        raise CheckpointError(
            f"CAFormer: expected a convolution of side {', '.join(map(str, KERNELS))} to fold, "
            f"got {tuple(conv.shape[2:])}"
        )
    gain = norm.weight.double() / (statistics.variance.double() + TORCH_EPS).sqrt()
    kernel = conv.double() * gain[:, None, None, None]
    bias = norm.bias.double() - statistics.mean.double() * gain
    margin = (KERNELS[-1] - side) // 2
    kernel = F.pad(kernel, (margin,) * 4)
    placed = [F.pad(kernel, (x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1)]
    return Affine(torch.cat(placed).to(conv.dtype), bias.repeat(POSITIONS).to(conv.dtype))


def fold_latent_query(query: Tensor, norm: Affine | None, packed: Affine, heads: int) -> Query:
    """Fold the constant query [1, 1, D] and the key projection into one matrix [H, D] (rewrite 3).

    scores_h = ((LN(q) Wq + bq)_h / sqrt(d)) . (Wk_h x + bk_h): the part with bk is the same for every
    patch and cancels in the softmax. The values are projected after the weighted mean, H vectors
    instead of P. Saves 2 P D^2 multiplications: 0.6 GFLOP of 61 at base size. A `norm` of None is no norm.
    """
    width = query.shape[-1]
    w_query, w_key, w_value = packed.weight.double().chunk(3)
    b_query, _, b_value = packed.bias.double().chunk(3)
    normed = query[0, 0].double()
    if norm is not None:
        normed = F.layer_norm(normed, (width,), norm.weight.double(), norm.bias.double(), TORCH_EPS)
    projected = (w_query @ normed + b_query).unflatten(0, (heads, -1)) * (width // heads) ** -0.5
    folded = torch.einsum("hd,hdw->hw", projected, w_key.unflatten(0, (heads, -1)))
    value = w_value.unflatten(0, (heads, -1)).transpose(1, 2).contiguous()
    parts = (folded, value, b_value.unflatten(0, (heads, -1)))
    return Query(*(x.to(packed.weight.dtype) for x in parts))


def fold_scale(linear: Affine, scale: Tensor) -> Affine:
    """A Linear whose outputs are scaled by channel, [D], as one (rewrite 10).

    Saves a product of every element, and the float32 island that the scales would be.
    """
    weight, bias = (x.double() for x in linear)
    folded = weight * scale.double()[:, None], bias * scale.double()
    return Affine(*(x.to(linear.weight.dtype) for x in folded))


def fold_relative_positions(table: Tensor, grid: int) -> Tensor:
    """BEiT's table of biases [(2G-1)^2 + 3, H], spread over queries and keys: [H, 1+P, 1+P] (rewrite 9).

    Rows of the table: offsets of query from key (dy, dx), row-major, from -(G-1) on; then [CLS] as the query,
    as the key, and as both. Saves the gather, 3.2 MB in float32 at base size, for every block and run.
    """
    steps = torch.arange(grid)
    offsets = steps[:, None] - steps + grid - 1  # [query, key]
    plane = table[:-3].unflatten(0, (2 * grid - 1, -1))
    patches = plane[offsets[:, :, None, None], offsets]  # [y of query, y of key, x of query, x of key, H]
    spread = F.pad(patches.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2), (1, 0, 1, 0))
    of_query, of_key, of_both = table[-3:].unsqueeze(-1)
    spread[:, 0], spread[:, :, 0], spread[:, 0, :1] = of_query, of_key, of_both
    return spread
