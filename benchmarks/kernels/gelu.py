"""Bias and GELU, and the same to codes of E4M3 with a scale a row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernels.bench import OURS, PATCHES, RIGHT_E4M3, WIDTH, Bench, compiled, decoded, draw, size
from kernels.gelu import gelu, gelu_ref
from kernels.rows import quantize_ref

E4M3 = torch.float8_e4m3fn


def _composed_codes(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_ref(gelu_ref(x, bias), E4M3)


def benches(device: str = "cuda", batch: int = 64, small: bool = False) -> Iterator[Bench]:
    """Two cases, at the hidden layer of the vision blocks."""
    patches, width = (5, 64) if small else (PATCHES, 4 * WIDTH)
    x, bias = draw(device, torch.bfloat16, batch, patches, width), draw(device, torch.bfloat16, width)
    shape = {"batch": batch, "rows": patches, "width": width}
    yield Bench(
        name="bias and gelu",
        inputs=(x, bias),
        reference=gelu_ref,
        forms={
            OURS: lambda x, bias: gelu(x, bias).out,
            "composed": gelu_ref,
            "torch.compile": compiled(gelu_ref),
        },
        bytes=2 * size(x),
        flops=0,
        shape=shape,
    )
    yield Bench(
        name="bias and gelu to E4M3",
        inputs=(x, bias),
        reference=gelu_ref,
        forms={
            OURS: lambda x, bias: tuple(gelu(x, bias, dtype=E4M3)),
            "composed": _composed_codes,
            "torch.compile": compiled(_composed_codes),
        },
        bytes=3 * size(x) // 2,
        flops=0,
        shape=shape,
        right=RIGHT_E4M3,
        values=decoded,
    )
