"""GLRM's first step: the Gaussian of a coarse box, its first convolution and ReLU.

    map = clamp(exp(-((x - S cx)^2 + (y - S cy)^2) / (2 s^2 + 1e-8)), 0, 1),  s^2 = (S h / 2)^2 + (S w / 2)^2
    out = ReLU(conv4x4 stride 2 pad 1 (map))

with x, y the pixel positions 0..S-1. The map is float32, since 1e-8 underflows in half precision.
Shapes: box [B, 4] as (cx, cy, w, h) in [0, 1]; weight [C, 1, 4, 4]; bias [C]; output [B, C, S/2, S/2].
A NaN in a box makes its whole output NaN, as in torch. The map needs no clamp: exp2 of what is not positive
lies in [0, 1].
Source: the released network of CALS.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton
from torch.nn import functional as F

from kernels.jit import (
    LOG2E,
    ceil_div,
    check_axes,
    check_tensor,
    jit,
    launch_kernel,
    launchable,
    operator,
    power_of_two,
    tl,
)
from kernels.onnx import ops as onnx_ops

NAME = "GaussianGuidance"
FLOOR = 1e-8
KERNEL, STRIDE, PADDING = 4, 2, 1


def gaussian_guidance_ref(box: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """Plain form; at least float32 inside, the output in the dtype of the weight."""
    box = box.to(torch.promote_types(box.dtype, torch.float32))
    pixels = torch.arange(size, device=box.device, dtype=box.dtype)
    centre, extent = size * box[:, :2], size * box[:, 2:] / 2
    spread = 2 * extent.square().sum(1, keepdim=True) + FLOOR
    # The Gaussian is the product of one along x and one along y.
    across, along = torch.exp(-((pixels[None, :, None] - centre[:, None]) ** 2) / spread[:, None]).unbind(-1)
    gaussian = (along[:, :, None] * across[:, None, :]).clamp(0, 1)[:, None]
    return F.relu(F.conv2d(gaussian.to(weight.dtype), weight, bias, stride=STRIDE, padding=PADDING))


@jit
def _guidance_kernel(
    box: tl.tensor,  # [B, 4], dense, (cx, cy, w, h)
    weight: tl.tensor,  # [C, 4, 4], dense
    bias: tl.tensor,  # [C]
    out: tl.tensor,  # [B, C, S/2, S/2], dense
    channels: tl.tensor,
    SIZE: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FLOOR: tl.constexpr,
    LOG2E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,  # S/2, up to a power of two
) -> None:
    """Programs: output rows x channel tiles x batch."""
    i_row, i_batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_channel = o_channel < channels
    box += 4 * i_batch
    centre_x, centre_y = SIZE * tl.load(box).to(tl.float32), SIZE * tl.load(box + 1).to(tl.float32)
    half_w, half_h = SIZE * tl.load(box + 2).to(tl.float32) / 2, SIZE * tl.load(box + 3).to(tl.float32) / 2
    # In float32: FLOOR is below what half precision holds, and an empty box would divide by zero.
    rate = -LOG2E / (2 * (half_w * half_w + half_h * half_h) + FLOOR)
    SIDE: tl.constexpr = SIZE // STRIDE
    o_x = tl.arange(0, BLOCK_X)
    b_out = tl.zeros((BLOCK_C, BLOCK_X), tl.float32)  # (BLOCK_C, BLOCK_X)
    b_out += tl.load(bias + o_channel, mask=m_channel, other=0.0).to(tl.float32)[:, None]
    # The map is a product of one Gaussian along x and one along y, so it is never
    # made: the taps along y come down to one share a channel, with which a whole row is scaled.
    for i_x in tl.static_range(KERNEL):
        x = STRIDE * o_x - PADDING + i_x
        b_across = tl.exp2((x - centre_x) * (x - centre_x) * rate)  # (BLOCK_X)
        b_across = tl.where((x >= 0) & (x < SIZE), b_across, 0.0)  # the convolution's padding
        b_share = tl.zeros((BLOCK_C,), tl.float32)  # (BLOCK_C)
        for i_y in tl.static_range(KERNEL):
            y = STRIDE * i_row - PADDING + i_y
            along = tl.where((y >= 0) & (y < SIZE), tl.exp2((y - centre_y) * (y - centre_y) * rate), 0.0)
            p_weight = weight + (o_channel * KERNEL + i_y) * KERNEL + i_x
            b_share += along * tl.load(p_weight, mask=m_channel, other=0.0).to(tl.float32)
        b_out += b_share[:, None] * b_across[None, :]
    p_out = out + ((i_batch * channels + o_channel) * SIDE + i_row)[:, None] * SIDE + o_x[None, :]
    # Unasked, a maximum drops NaN: a broken box would leave as a finite output.
    b_out = tl.maximum(b_out, 0.0, propagate_nan=tl.PropagateNan.ALL).to(out.dtype.element_ty)
    tl.store(p_out, b_out, mask=m_channel[:, None] & (o_x < SIDE)[None, :])


def launch(kernel: Any, box: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """Launch `kernel`, `_guidance_kernel` or its wrapping for torch.compile."""
    batch, channels, side = box.shape[0], weight.shape[0], size // STRIDE
    out = weight.new_empty(batch, channels, side, side)
    if out.numel() == 0:
        return out
    block = min(power_of_two(channels), 64)
    launch_kernel(
        kernel,
        (side, ceil_div(channels, block), batch),
        weight,
        box=box.contiguous(),
        weight=weight.contiguous(),
        bias=bias.contiguous(),
        out=out,
        channels=channels,
        SIZE=size,
        KERNEL=KERNEL,
        STRIDE=STRIDE,
        PADDING=PADDING,
        FLOOR=FLOOR,
        LOG2E=LOG2E,
        BLOCK_C=block,
        BLOCK_X=power_of_two(side),
        num_warps=8,
        num_stages=1,
    )
    return out


@operator("dgm4::gaussian_guidance")
def _guidance_op(box: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    return launch(wrap_triton(_guidance_kernel), box, weight, bias, size)


def gaussian_guidance(box: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """Encode box [B, 4] on a size x size grid to [B, C, size/2, size/2]; see the module's formula.

    The output has the dtype of weight and bias; box may have another. Raises ValueError for shapes or
    devices, TypeError for types, that do not go together.
    """
    if onnx_ops.exporting():
        side = size // STRIDE
        out = (box.shape[0], weight.shape[0], side, side)
        return onnx_ops.emit(NAME, (box, weight, bias), [out], [weight.dtype], {"size": [size]})[0]
    channels = weight.shape[0]
    check_axes("box", box, "B, 4")
    check_axes("weight", weight, "C, 1, 3, 3")
    check_tensor("box", box, (len(box), 4), box)
    check_tensor("weight", weight, (channels, 1, KERNEL, KERNEL), box, same_dtype=False)
    check_tensor("bias", bias, (channels,), weight)
    if size < STRIDE or size % STRIDE:
        raise ValueError(f"size: expected an even number of pixels, got {size}")
    if launchable(box):
        return torch.ops.dgm4.gaussian_guidance(box, weight, bias, size)
    return gaussian_guidance_ref(box, weight, bias, size)
