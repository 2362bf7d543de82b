"""Residual sum and LayerNorm: the norm alone, the sum beside it, and codes of E4M3 with a scale a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.bench import (
    OURS,
    PATCHES,
    RIGHT,
    RIGHT_E4M3,
    WIDTH,
    Bench,
    Form,
    compiled,
    decoded,
    draw,
    size,
)
from kernels.residual_norm import residual_norm, residual_norm_ref
from kernels.rows import quantize_ref

EPS = 1e-6
E4M3 = torch.float8_e4m3fn


def _ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return residual_norm(x, residual, weight, bias, EPS).out


def _ours_summed(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return residual_norm(x, residual, weight, bias, EPS, summed=True)[:2]


def _ours_codes(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return residual_norm(x, residual, weight, bias, EPS, dtype=E4M3)[::2]


def _torch_summed(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    out, total = residual_norm_ref(x, residual, weight, bias, EPS)
    return out.to(x.dtype), total


def _torch(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _torch_summed(x, residual, weight, bias)[0]


def _torch_codes(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_ref(_torch(x, residual, weight, bias), E4M3)


def benches(device: str = "cuda", batch: int = 64, small: bool = False) -> Iterator[Bench]:
    """Three cases; the norm's parameters are float32, as in the network."""
    patches, width = (5, 64) if small else (PATCHES, WIDTH)
    x, residual = (draw(device, torch.bfloat16, batch, patches, width) for _ in range(2))
    weight, bias = (draw(device, torch.float32, width) for _ in range(2))
    cases: tuple[tuple[str, Form, Form, Form, int, Callable[[Any], Any] | None], ...] = (
        ("residual norm", _ours, _torch, _torch, 3 * size(x), None),
        ("residual norm and sum", _ours_summed, _torch_summed, _torch_summed, 4 * size(x), None),
        ("residual norm to E4M3", _ours_codes, _torch_codes, _torch, 5 * size(x) // 2, decoded),
    )
    for name, ours, plain, exact, moved, values in cases:
        yield Bench(
            name=name,
            inputs=(x, residual, weight, bias),
            reference=exact,
            forms={OURS: ours, "composed": plain, "torch.compile": compiled(plain)},
            bytes=moved,
            flops=0,
            shape={"batch": batch, "rows": patches, "width": width},
            right=RIGHT if values is None else RIGHT_E4M3,
            values=values or (lambda answer: answer),
        )
