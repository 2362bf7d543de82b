"""GLRM's first step: the Gaussian of a coarse box, its first convolution and ReLU.

    map = clamp(exp(-((x - S cx)^2 + (y - S cy)^2) / (2 s^2 + 1e-8)), 0, 1),  s^2 = (S h / 2)^2 + (S w / 2)^2
    out = ReLU(conv4x4 stride 2 pad 1 (map))

with x, y the pixel positions 0..S-1. The map is float32, since 1e-8 underflows in half precision.
Shapes: box [B, 4] as (cx, cy, w, h) in [0, 1]; weight [C, 1, 4, 4]; bias [C]; answer [B, C, S/2, S/2].
Source: the released network of CALS.
"""

from __future__ import annotations

import onnx
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import onnx_ops

NAME = "GaussianGuidance"
FLOOR = 1e-8
STRIDE, PADDING = 2, 1


def gaussian_guidance_ref(box: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """Plain form; at least float32 inside, the answer in the weight's dtype."""
    box = box.to(torch.promote_types(box.dtype, torch.float32))
    pixels = torch.arange(size, device=box.device, dtype=box.dtype)
    centre, extent = size * box[:, :2], size * box[:, 2:] / 2
    spread = 2 * extent.square().sum(1, keepdim=True) + FLOOR
    # The Gaussian is the product of one along x and one along y.
    across, along = torch.exp(-((pixels[None, :, None] - centre[:, None]) ** 2) / spread[:, None]).unbind(-1)
    gaussian = (along[:, :, None] * across[:, None, :]).clamp(0, 1)[:, None]
    return F.relu(F.conv2d(gaussian.to(weight.dtype), weight, bias, stride=STRIDE, padding=PADDING))


def _body() -> onnx.FunctionProto:
    """Write the standard-operator form."""
    pads = ", ".join([str(PADDING)] * 4)
    return onnx_ops.body(f"""
    {NAME} <size> (box, weight, bias) => (out)
    {{
        box_float = Cast <to = {onnx.TensorProto.FLOAT}> (box)
        size_ints = Constant <value_ints: ints = @size> ()
        size_float = Cast <to = {onnx.TensorProto.FLOAT}> (size_ints)
        pixel_box = Mul (box_float, size_float)
        pair = Constant <value_ints = [2, 2]> ()
        centre, extent = Split <axis = 1> (pixel_box, pair)
        two = Constant <value_float = 2.0> ()
        half_extent = Div (extent, two)
        squared = Mul (half_extent, half_extent)
        last_axis = Constant <value_ints = [1]> ()
        axis_two = Constant <value_ints = [2]> ()
        axis_three = Constant <value_ints = [3]> ()
        variance = ReduceSum <keepdims = 1> (squared, last_axis)
        doubled = Mul (variance, two)
        floor = Constant <value_float = {FLOOR}> ()
        spread = Add (doubled, floor)
        zero = Constant <value_int = 0> ()
        unit = Constant <value_int = 1> ()
        first = Constant <value_ints = [0]> ()
        limit = Squeeze (size_ints, first)
        positions = Range (zero, limit, unit)
        pixels = Cast <to = {onnx.TensorProto.FLOAT}> (positions)
        spread_column = Unsqueeze (spread, last_axis)
        centre_column = Unsqueeze (centre, axis_two)
        offset = Sub (pixels, centre_column)
        distance = Mul (offset, offset)
        ratio = Div (distance, spread_column)
        negative = Neg (ratio)
        profile = Exp (negative)
        ones = Constant <value_ints = [1, 1]> ()
        across, along = Split <axis = 1> (profile, ones)
        across_row = Unsqueeze (across, axis_two)
        along_column = Unsqueeze (along, axis_three)
        product = Mul (along_column, across_row)
        low = Constant <value_float = 0.0> ()
        high = Constant <value_float = 1.0> ()
        clamped = Clip (product, low, high)
        gaussian = CastLike (clamped, weight)
        convolved = Conv <strides = [{STRIDE}, {STRIDE}], pads = [{pads}]> (gaussian, weight, bias)
        out = Relu (convolved)
    }}""")


onnx_ops.register_body(NAME, _body)


def gaussian_guidance(box: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """Encode box [B, 4] on a size x size grid to [B, C, size/2, size/2]; see the module's formula."""
    if onnx_ops.exporting():
        side = size // STRIDE
        shape = (box.shape[0], weight.shape[0], side, side)
        return onnx_ops.emit(NAME, (box, weight, bias), [shape], [weight.dtype], {"size": [size]})[0]
    return gaussian_guidance_ref(box, weight, bias, size)
