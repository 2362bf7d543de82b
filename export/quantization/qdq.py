"""Linear layers in eight bits, as the Q/DQ nodes that runtimes build integer and E4M3 products from.

INT8: every Linear that its part does not keep out (`engine.network.parts`). E4M3: the layers of
`engine.network.precision.fp8_layers`. Never norms, softmax, residual sums or the products inside attention.
Source: arXiv:2004.09602 (symmetric int8, weights by channel), arXiv:2209.05433 (E4M3).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.network.linear import Fp8Linear
from engine.network.model import InferenceModel
from engine.network.precision import fp8_layers, half_layers, set_precision, unquantised
from kernels.onnx import ops as onnx_ops
from kernels.rows import quantize_ref

_UNSIGNED_TOP = 255


class QdqLinear(nn.Module):
    """A Linear that reads its activation and its weight through eight bits: y = [x / s] s ([W / t] t) + bias.

    codes [K, N] of the weight, int8 or E4M3, weight_scale t [N], scale s [], bias [N] or None. Without a
    scale the activation is rounded as dynamic int8 does, to unsigned codes of its range.
    """

    codes: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    scale: Tensor | None
    zero: Tensor
    zeros: Tensor

    def __init__(
        self, codes: Tensor, weight_scale: Tensor, bias: Tensor | None, scale: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros((), dtype=codes.dtype))
        self.register_buffer("zeros", torch.zeros(codes.shape[1], dtype=codes.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]; nodes where torch is tracing for ONNX, else float32 products of the codes."""
        if onnx_ops.exporting() and self.scale is not None:
            scales = self.weight_scale.to(x.dtype), self.zeros
            y = onnx_ops.emit_linear(x, self.scale.to(x.dtype), self.zero, self.codes, *scales)
            return y if self.bias is None else y + self.bias.to(x.dtype)
        weight = self.codes.float() * self.weight_scale.float()
        bias = None if self.bias is None else self.bias.float()
        return F.linear(self._rounded(x.float()), weight.t(), bias).to(x.dtype)

    def _rounded(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return _rounded_to_own_range(x)
        codes, scale = quantize_ref(x, self.codes.dtype, self.scale.float())
        return codes.float() * scale


def _rounded_to_own_range(x: Tensor) -> Tensor:
    """As ONNX's DynamicQuantizeLinear: 256 steps from min(x, 0) to max(x, 0)."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = ((high - low) / _UNSIGNED_TOP).clamp(min=torch.finfo(x.dtype).tiny)
    zero = (-low / scale).round()
    return ((x / scale).round().add(zero).clamp(0, _UNSIGNED_TOP) - zero) * scale


def lowered_layers(model: InferenceModel, precision: str) -> list[tuple[str, nn.Linear]]:
    """The Linear layers that `precision` rounds, by name, in a network that is still float32."""
    layers = {"fp16": half_layers, "bf16": half_layers, "int8": int8_layers, "fp8": fp8_layers}
    return list(layers[precision](model)) if precision in layers else []


def lower(
    model: InferenceModel, precision: str, scales: Mapping[str, float] | None, keep: Collection[str] = ()
) -> InferenceModel:
    """Bring a float32 network to any precision, in place, as torch computes it; see `set_precision`."""
    if precision == "int8":
        return to_int8(model, scales, keep)
    return set_precision(model, precision, scales, keep)


def int8_layers(model: InferenceModel) -> Iterator[tuple[str, nn.Linear]]:
    """The Linear layers that int8 rounds, by name."""
    kept = unquantised(model, "int8")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) not in kept:
            yield name, module


def to_int8(
    model: InferenceModel, scales: Mapping[str, float] | None, keep: Collection[str] = ()
) -> InferenceModel:
    """Round `int8_layers` but those in `keep`, in place; without `scales` as dynamic int8 does."""
    made: dict[int, QdqLinear] = {}
    for name, layer in int8_layers(model):
        if name not in keep:
            codes, weight_scale = quantize_ref(layer.weight.detach().float(), torch.int8)
            scale = None if scales is None else torch.tensor(scales[name])
            bias = None if layer.bias is None else layer.bias.detach()
            made[id(layer)] = QdqLinear(codes.t().contiguous(), weight_scale, bias, scale)
    # By every name: CALS's two pools share a layer.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in made:
            model.set_submodule(name, made[id(module)])
    return model


def fp8_as_nodes(model: InferenceModel) -> InferenceModel:
    """Replace the calibrated E4M3 layers by Q/DQ layers, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Fp8Linear) and layer.input_scale is not None:
            codes = layer.weight.t().contiguous()
            scales = layer.weight_scale[0], layer.bias, layer.input_scale[0]
            model.set_submodule(name, QdqLinear(codes, *scales))
    return model
