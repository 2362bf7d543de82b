"""GLRM's Gaussian and first convolution."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.kernels.bench import OURS, Bench, compiled, draw
from kernels.gaussian_guidance import gaussian_guidance, gaussian_guidance_ref


def benches(device: str = "cuda", batch: int = 64, small: bool = False) -> Iterator[Bench]:
    """One case."""
    side, channels = (32, 4) if small else (256, 64)
    weight, bias = (draw(device, torch.bfloat16, channels, *rest) for rest in ((1, 4, 4), ()))
    written = batch * channels * (side // 2) ** 2
    composed = partial(gaussian_guidance_ref, size=side)
    yield Bench(
        name="gaussian guidance",
        inputs=(torch.rand(batch, 4, device=device), weight, bias),
        reference=composed,
        forms={
            OURS: partial(gaussian_guidance, size=side),
            "composed": composed,
            "torch.compile": compiled(composed),
        },
        bytes=written * weight.element_size(),
        flops=2 * 4 * written,
        shape={"batch": batch, "size": side, "channels": channels},
    )
