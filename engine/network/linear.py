"""Linear layers in eight bits.

FP8: y = (codes of x) @ (codes of weight)^T * (scale of the row of x) * (scale of the weight's row) + bias,
codes E4M3, the weight's scales one an output channel, |w| at most / 448. The activation's scale is one a row,
taken as it comes, or one for all, calibrated. On a GPU from compute capability 8.9 on the product is
torch._scaled_mm, cuBLAS' or CUTLASS' own; elsewhere it is computed in float32 from the same codes.
Source: arXiv:2209.05433.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.quantize import quantize_rows
from kernels.rows import RowAnswer, quantize_ref, rounds_e4m3

E4M3 = torch.float8_e4m3fn
SIDE = 16  # of what divides both sides of a product in eight bits

Reads = Any  # what a Linear reads: a tensor, or a RowAnswer of codes


class Fp8Linear(nn.Module):
    """A Linear in E4M3, made of a float one, that answers in `dtype`, which is bf16 on a GPU.

    weight [N, K] codes, weight_scale [N], bias [N] or None, input_scale [1] or None for one a row.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, input_scale: float | None = None) -> None:
        super().__init__()
        codes, scale = quantize_ref(linear.weight.detach().float(), E4M3)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(dtype))
        given = None if input_scale is None else torch.tensor([input_scale], device=codes.device)
        self.register_buffer("input_scale", given)
        self.dtype = dtype

    def forward(self, x: Tensor | RowAnswer) -> Tensor:
        """[..., K], or its codes, -> [..., N]."""
        found = x if isinstance(x, RowAnswer) else quantize_rows(x, E4M3, self.input_scale)
        codes, scale = found.out, cast(Tensor, found.scale)
        if rounds_e4m3(codes):
            return self._product(codes.flatten(0, -2), scale).unflatten(0, codes.shape[:-1])
        weight_scale = self.weight_scale * (scale[..., None] if scale.dim() == codes.dim() - 1 else scale)
        y = F.linear(codes.float(), self.weight.float()) * weight_scale
        return (y if self.bias is None else y + self.bias).to(self.dtype)

    def _product(self, codes: Tensor, scale: Tensor) -> Tensor:
        """[M, K] -> [M, N] on the matrix units; both scales are vectors there."""
        rows = scale.reshape(-1, 1).expand(len(codes), 1).contiguous()
        return torch._scaled_mm(
            codes,
            self.weight.t(),
            scale_a=rows,
            scale_b=self.weight_scale[None],
            bias=self.bias,
            out_dtype=self.dtype,
            use_fast_accum=True,
        )


def takes_fp8(linear: nn.Linear) -> bool:
    """Whether both sides of the product suit eight bits."""
    return linear.in_features % SIDE == 0 and linear.out_features % SIDE == 0


def reading(reader: nn.Module | None) -> dict[str, Any]:
    """How a kernel is to leave what `reader` alone reads: the arguments `dtype` and `scale`, or none."""
    return {"dtype": E4M3, "scale": reader.input_scale} if isinstance(reader, Fp8Linear) else {}
