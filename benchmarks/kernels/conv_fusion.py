"""CAFormer's conv-attention fusion."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.bench import OURS, WIDTH, Bench, Form, candidates, draw, grid, size
from kernels import conv_fusion

NAME = "conv-attention fusion"
TILES = grid((32, 64, 128), (32, 64, 128))


def _published(image: Tensor, tokens: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """CAFormer's fusion at the picture's resolution, BatchNorm folded."""
    side, patches = image.shape[-1], image.shape[-1] // conv_fusion.STRIDE
    field = tokens[:, 1:].transpose(1, 2).unflatten(2, (patches, patches))
    local = F.relu(F.conv2d(image, kernel, bias, padding=2))
    up = F.interpolate(field, size=(side, side), mode="bilinear", align_corners=False) + local
    down = F.interpolate(up, size=(patches, patches), mode="bilinear", align_corners=False)
    return torch.cat([tokens[:, :1], down.flatten(2).transpose(1, 2)], dim=1)


def _published_in_turns(image: Tensor, tokens: Tensor, *kernel: Tensor) -> Tensor:
    """At 64 pairs a tensor of it has 3.2e9 elements, which not every kernel of torch can index."""
    turns = zip(image.split(16), tokens.split(16), strict=True)
    return torch.cat([_published(*turn, *kernel) for turn in turns])


def _placed(kernel: Tensor) -> Tensor:
    """The 5x5 kernel at its four positions in a 6x6 one."""
    return torch.cat([F.pad(kernel, (x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1)])


def _exact(image: Tensor, tokens: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """At the token grid: the published form would hold 26 GB a tensor in float64 at a batch of 64."""
    return conv_fusion.conv_fusion_ref(image, tokens, _placed(kernel), bias.repeat(conv_fusion.POSITIONS))


def benches(device: str = "cuda", batch: int = 64, small: bool = False) -> Iterator[Bench]:
    """One case."""
    patches, width = (2, 32) if small else (16, WIDTH)
    dtype = torch.bfloat16
    image = draw(device, dtype, batch, 3, 16 * patches, 16 * patches)
    tokens = draw(device, dtype, batch, 1 + patches**2, width)
    kernel, bias = draw(device, dtype, width, 3, 5, 5, scale=0.1), draw(device, dtype, width)
    placed, repeated = _placed(kernel), bias.repeat(conv_fusion.POSITIONS)

    def schedule(tiles: Any) -> Form:
        launch: Any = partial(conv_fusion.launch, conv_fusion._fusion_kernel, schedule=tiles)
        pack = getattr(conv_fusion, "pack", None)
        given = (placed, repeated) if pack is None else (pack(placed, repeated, width),)
        return lambda image, tokens, *_: launch(image, tokens, *given)

    yield Bench(
        name=NAME,
        inputs=(image, tokens, kernel, bias),
        reference=_exact,
        forms={
            OURS: lambda image, tokens, *_: conv_fusion.conv_fusion(image, tokens, placed, repeated),
            "composed": lambda image, tokens, *_: conv_fusion.conv_fusion_ref(
                image, tokens, placed, repeated
            ),
            "published": _published,
            "published, 16 pairs at a time": _published_in_turns,
        },
        bytes=size(image) * 6 // 16 + 2 * size(tokens) + size(placed),
        flops=2 * batch * patches**2 * 108 * 4 * width,
        shape={"batch": batch, "grid": patches, "width": width},
        schedule=schedule,
        candidates=candidates(conv_fusion.schedules(width, dtype), TILES),
    )
