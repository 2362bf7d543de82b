"""The network's products in E4M3 (torch._scaled_mm) beside bf16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.bench import OURS, PATCHES, RIGHT_E4M3, WIDTH, Bench, Form, draw, size
from kernels.rows import TOPS, quantize_ref

E4M3 = torch.float8_e4m3fn
LAYERS = {"qkv": (1, 3), "projection": (1, 1), "first of the MLP": (1, 4), "second of the MLP": (4, 1)}


def _product(fast: bool) -> Form:
    """Scales [M] and [N] are a row's and a channel's, scales [] are the tensors'."""

    def run(
        x: Tensor, weight: Tensor, bias: Tensor, codes: Tensor, scale: Tensor, channels: Tensor, each: Tensor
    ) -> Tensor:
        if scale.dim():
            scale, each = scale[:, None], each[None]
        columns = channels.t()
        return torch._scaled_mm(
            codes, columns, scale, each, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    return run


def _rounded(x: Tensor, weight: Tensor, bias: Tensor, *codes: Tensor) -> Tensor:
    """With the rounding of x, as a layer that no kernel of ours precedes has it."""
    from kernels.quantize import quantize_rows

    rows = quantize_rows(x, E4M3)
    return _product(True)(x, weight, bias, rows.out, rows.scale, *codes[2:])


def _bf16(x: Tensor, weight: Tensor, bias: Tensor, *codes: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def _codes(x: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    peak = x.abs().amax().float() / TOPS[E4M3] if whole else None
    return quantize_ref(x, E4M3, peak)


def _bench(name: str, inputs: tuple[Tensor, ...], forms: dict[str, Form]) -> Bench:
    x, weight, _, codes, _, channels, _ = inputs
    rows, inside, outside = *x.shape, len(weight)
    return Bench(
        name=name,
        inputs=inputs,
        reference=_bf16,
        forms=forms,
        bytes=size(codes, channels) + 2 * rows * outside,
        flops=2 * rows * inside * outside,
        shape={"rows": rows, "in": inside, "out": outside},
        right=RIGHT_E4M3,
        unit="fp8",
    )


def benches(device: str = "cuda", batch: int = 64, small: bool = False) -> Iterator[Bench]:
    """Four layers, by row and by tensor."""
    rows, width = (batch * 8, 32) if small else (batch * PATCHES, WIDTH)
    exact, fast = _product(False), _product(True)
    by_row = {OURS: fast, "exact sums": exact, "rounding and product": _rounded, "bf16": _bf16}
    for name, (wide_in, wide_out) in LAYERS.items():
        inside, outside = wide_in * width, wide_out * width
        x = draw(device, torch.bfloat16, rows, inside)
        weight = draw(device, torch.bfloat16, outside, inside, scale=inside**-0.5)
        given = (x, weight, draw(device, torch.bfloat16, outside))
        for label, forms, whole in (
            (f"linear, {name}", by_row, False),
            (f"linear, {name}, a scale a tensor", {OURS: fast, "exact sums": exact}, True),
        ):
            yield _bench(label, (*given, *_codes(x, whole), *_codes(weight, whole)), forms)
