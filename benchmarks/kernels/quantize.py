"""Rounding of rows to E4M3, a scale a row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernels.bench import OURS, PATCHES, RIGHT_E4M3, WIDTH, Bench, compiled, decoded, draw, size
from kernels.quantize import quantize_rows
from kernels.rows import quantize_ref

E4M3 = torch.float8_e4m3fn


def _composed(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_ref(x, E4M3)


def benches(device: str = "cuda", batch: int = 64, small: bool = False) -> Iterator[Bench]:
    """One case, at the width of an attention's answer."""
    patches, width = (5, 64) if small else (PATCHES, WIDTH)
    x = draw(device, torch.bfloat16, batch, patches, width)
    yield Bench(
        name="rows to E4M3",
        inputs=(x,),
        reference=lambda x: x,
        forms={
            OURS: lambda x: tuple(quantize_rows(x, E4M3)),
            "composed": _composed,
            "torch.compile": compiled(_composed),
        },
        bytes=3 * size(x) // 2,
        flops=0,
        shape={"batch": batch, "rows": patches, "width": width},
        right=RIGHT_E4M3,
        values=decoded,
    )
