"""Pooling by the learnt query."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernels.bench import HEADS, OURS, PATCHES, WIDTH, Bench, compiled, draw, size
from kernels.latent_pool import latent_pool, latent_pool_ref


def _composed(*tensors: Tensor) -> Tensor:
    return latent_pool_ref(*(x.float() for x in tensors))


def benches(device: str = "cuda", batch: int = 64, small: bool = False) -> Iterator[Bench]:
    """One case."""
    patches, heads, width = (9, 2, 32) if small else (PATCHES - 1, HEADS, WIDTH)
    tokens = draw(device, torch.bfloat16, batch, patches, width)
    weight, bias = (draw(device, torch.float32, width) for _ in range(2))
    query = draw(device, torch.float32, heads, width, scale=width**-0.5)
    yield Bench(
        name="latent pooling",
        inputs=(tokens, weight, bias, query),
        reference=latent_pool_ref,
        forms={OURS: latent_pool, "composed": _composed, "torch.compile": compiled(_composed)},
        bytes=size(tokens) + batch * heads * width * tokens.element_size(),
        flops=4 * batch * patches * heads * width,
        shape={"batch": batch, "patches": patches, "width": width},
    )
