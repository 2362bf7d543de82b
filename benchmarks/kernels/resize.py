"""Pictures of 640 x 480 to the network's input, beside torch's antialiased bicubic interpolation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.bench import OURS, Bench
from engine.inputs.preprocess import CLIP_MEAN, CLIP_STD
from kernels.resize import resize, resize_ref
from kernels.resize_tables import make_tables

SIDE = 256


def photographs(device: str, batch: int, height: int, width: int) -> Tensor:
    """Smooth pictures with some noise, bytes [B, H, W, 3]."""
    coarse = torch.rand(batch, 3, 12, 16, device=device)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    noisy = 255 * smooth + 8 * torch.randn(smooth.shape, device=device)
    return noisy.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def prepared(
    batch: int, height: int, width: int, size: int, dtype: torch.dtype, device: str
) -> Callable[[Tensor], Tensor]:
    """The kernels alone, their tables already on the device; without a GPU the plain form."""
    sizes = [(height, width)] * batch
    if device == "cpu":
        return lambda pixels: resize(pixels.flatten(), sizes, size, CLIP_MEAN, CLIP_STD, dtype=dtype)
    tables = [x.to(device) for x in make_tables(sizes, size, CLIP_MEAN, CLIP_STD)]
    extent = (size, batch * height, height, dtype)  # lines of all pictures, and of the tallest
    return lambda pixels: torch.ops.dgm4.resize(pixels.flatten(), *tables, *extent)


def _interpolated(size: int, device: str) -> Callable[[Tensor], Tensor]:
    """torch's own filter in float32, without the levels in between."""
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))

    def run(pixels: Tensor) -> Tensor:
        planes = pixels.permute(0, 3, 1, 2).float() / 255
        small = F.interpolate(planes, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
        return ((small.clamp(0, 1) - mean) / std).to(torch.bfloat16)

    return run


def benches(device: str = "cuda", batch: int = 64, small: bool = False) -> Iterator[Bench]:
    """One case; `ours, tables too` makes and sends the tables at every call."""
    height, width, size = (24, 32, 16) if small else (480, 640, SIDE)
    sizes = [(height, width)] * batch
    pixels = photographs(device, batch, height, width)
    written = 2 * batch * 3 * size * size
    whole = partial(resize, sizes=sizes, size=size, mean=CLIP_MEAN, std=CLIP_STD, dtype=torch.bfloat16)
    yield Bench(
        name="resize",
        inputs=(pixels,),
        reference=lambda x: resize_ref(x.flatten(), sizes, size, CLIP_MEAN, CLIP_STD),
        forms={
            OURS: prepared(batch, height, width, size, torch.bfloat16, device),
            "torch": _interpolated(size, device),
            "ours, tables too": lambda x: whole(x.flatten()),
        },
        eager=("ours, tables too",),
        bytes=pixels.numel() + 2 * batch * 3 * height * size + written,
        flops=0,
        shape={"batch": batch, "height": height, "width": width, "size": size},
    )
