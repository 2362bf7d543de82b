"""Linear layers: in FP8, and in float32 within a network of lower precision.

FP8: y = (codes of x) (codes of weight)^T * (scale of the row of x) * (scale of the weight's row) + bias.
Codes are E4M3; a weight's row, an output channel, has its largest magnitude at 448. The activation's scale is
one a row, taken as it comes, or one for all, calibrated. The product is torch._scaled_mm: the matrix units of
a GPU from compute capability 8.9 on, float32 from the same codes on a CPU.
Source: arXiv:2209.05433.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.network.parts import Part
from kernels.quantize import quantize_rows
from kernels.rows import RowOutput, quantize_ref

E4M3 = torch.float8_e4m3fn
SIDE = 16  # divides both sides of a product in eight bits

LinearInput = Any  # Tensor | RowOutput of codes; Any, since nn.Linear is typed for a Tensor alone


class Fp8Linear(nn.Module):
    """A Linear in E4M3, made from a float one, with outputs in `dtype`, which must be bf16 on a GPU.

    weight [N, K] codes, weight_scale [1, N], bias [N] or None, input_scale [1] or None for one a row.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, input_scale: float | None = None) -> None:
        super().__init__()
        weight, bias = linear.weight.detach().float(), linear.bias
        scale = round_up(quantize_ref(weight, E4M3)[1], dtype)
        codes, _ = quantize_ref(weight, E4M3, scale)
        given = None if input_scale is None else round_up(torch.tensor([input_scale]), dtype)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", scale[None])
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))
        self.register_buffer("input_scale", given)
        self.dtype = dtype

    def forward(self, x: Tensor | RowOutput) -> Tensor:
        """[..., K], or its codes, -> [..., N]."""
        codes = x if isinstance(x, RowOutput) else quantize_rows(x, E4M3, self.input_scale)
        rows = codes.out.flatten(0, -2)
        # Scaling by rows needs a scale for each row, so a calibrated one is repeated: a small launch.
        # A copy kept for the next call would be state, which neither export nor captured graphs allow.
        scale = cast(Tensor, codes.scale).reshape(-1, 1).expand(len(rows), 1).contiguous()
        y = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=self.dtype,
            # The usual choice for inference: Hopper then adds products in about 14 bits (arXiv:2412.19437,
            # section 3.3.2), where E4M3 has 4. A CPU adds in float32, so accuracies measured there do not
            # include this error.
            use_fast_accum=True,
        )
        return y.unflatten(0, codes.out.shape[:-1])


class FloatLinear(Part):
    """A Linear that stays float32 in a network of lower precision."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def float_parameters(self) -> Iterator[nn.Parameter]:
        """All: see `Part`."""
        return self.parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the dtype of x."""
        return F.linear(x.float(), self.weight, self.bias).to(x.dtype)


def takes_fp8(linear: nn.Linear) -> bool:
    """Whether both sides of the product suit eight bits."""
    return linear.in_features % SIDE == 0 and linear.out_features % SIDE == 0


def round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 scales raised to the next value of `dtype`, in which a graph holds them."""
    near = scale.to(dtype)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.float() < scale, above, near).float()


def output_codes(consumer: nn.Module | None) -> dict[str, Any]:
    """Arguments `dtype` and `scale` of a kernel whose output only `consumer` reads; none if that is float."""
    return {"dtype": E4M3, "scale": consumer.input_scale} if isinstance(consumer, Fp8Linear) else {}
