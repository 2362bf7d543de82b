"""CAFormer's conv-attention fusion at the token grid.

Published: tokens as a GxG map, up to SxS bilinearly, plus ReLU(BN(conv5x5(image))), down to GxG
bilinearly. With S = 16 G the way down reads pixels 16i+7 and 16i+8 alone, so that

    out = blur(tokens) + mean over 4 of ReLU(conv6x6 stride 16 (image[5 : S-5, 5 : S-5]))

where the 6x6 kernel holds the folded 5x5 kernel at its four positions (channels 4*D, position major),
and blur is [1/64, 31/32, 1/64] along both axes with replicated edges. The [CLS] token passes by.
Saves the [B, D, S, S] tensor: 201 MB a picture in float32 at D = 768, S = 256.

Shapes: image [B, 3, S, S]; tokens [B, 1+G*G, D]; weight [4*D, 3, 6, 6]; bias [4*D].
Source: the released network of CALS; derivation in engine/network/fold.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton
from torch.nn import functional as F

from engine.errors import InputError
from kernels import onnx_ops
from kernels.jit import (
    SMALLEST_DOT,
    Tiles,
    ceil_div,
    check_tensor,
    dot_precision,
    jit,
    launchable,
    operator,
    power_of_two,
    tl,
)

NAME = "ConvTokenFusion"
STRIDE = 16
MARGIN = 5  # first pixel that any of the kernels reads
WINDOW = 6  # side of the folded kernels
POSITIONS = 4  # pixels (16i+7, 16i+8) x (16j+7, 16j+8)
BLUR = (1 / 64, 31 / 32, 1 / 64)


def blur_matrix(grid: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The blur along one axis as a matrix [grid, grid], edges replicated."""
    side, middle, _ = BLUR
    matrix = torch.zeros(grid, grid, dtype=dtype)
    index = torch.arange(grid)
    matrix[index, index] = middle
    matrix[index, (index - 1).clamp(min=0)] += side
    matrix[index, (index + 1).clamp(max=grid - 1)] += side
    return matrix


def _blur(field: Tensor) -> Tensor:
    """Blur [B, G, G, D] along both grid axes."""
    matrix = blur_matrix(field.shape[1]).to(field)
    rows = (matrix @ field.flatten(2)).unflatten(2, field.shape[2:])
    return matrix @ rows


def conv_fusion_ref(image: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Plain form in the inputs' own dtype, [B, 1+G*G, D]."""
    size = image.shape[-1]
    grid, inner = size // STRIDE, slice(MARGIN, size - MARGIN)
    local = F.relu(F.conv2d(image[:, :, inner, inner], weight, bias, stride=STRIDE))
    local = local.unflatten(1, (-1, tokens.shape[-1])).sum(1).flatten(2).transpose(1, 2) / POSITIONS
    patches = _blur(tokens[:, 1:].unflatten(1, (grid, grid))).flatten(1, 2)
    return torch.cat([tokens[:, :1], patches + local], dim=1)


@jit
def _fusion_kernel(
    image: tl.tensor,  # [B, 3, S, S], dense planes
    tokens: tl.tensor,  # [B, 1+G*G, D], dense
    weight: tl.tensor,  # [R*4*D, 3*6*6], dense; R branches
    bias: tl.tensor,  # [R*4*D]
    out: tl.tensor,  # [B, 1+G*G, D], dense
    image_batch: tl.tensor,
    GRID: tl.constexpr,
    WIDTH: tl.constexpr,
    KERNELS: tl.constexpr,  # R*4
    BLOCK_M: tl.constexpr,  # patches
    BLOCK_N: tl.constexpr,  # channels
    BLOCK_K: tl.constexpr,  # taps, up to a power of two
    STRIDE: tl.constexpr,
    MARGIN: tl.constexpr,
    WINDOW: tl.constexpr,
    SIDE: tl.constexpr,
    MIDDLE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Programs: patch tiles x channel tiles x pairs."""
    i_batch = tl.program_id(2).to(tl.int64)
    o_patch = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_channel = o_channel < WIDTH
    m_tile = (o_patch < GRID * GRID)[:, None] & m_channel[None, :]
    i_row, i_col = o_patch // GRID, o_patch % GRID

    TAPS: tl.constexpr = 3 * WINDOW * WINDOW
    SIZE: tl.constexpr = GRID * STRIDE
    o_tap = tl.arange(0, BLOCK_K)
    o_plane = o_tap // (WINDOW * WINDOW) * SIZE * SIZE
    o_pixel = (MARGIN + o_tap // WINDOW % WINDOW) * SIZE + MARGIN + o_tap % WINDOW
    p_window = (i_row * SIZE + i_col)[:, None] * STRIDE + (o_plane + o_pixel)[None, :]
    m_window = (o_patch < GRID * GRID)[:, None] & (o_tap < TAPS)[None, :]
    b_window = tl.load(image + i_batch * image_batch + p_window, mask=m_window, other=0.0)
    b_window = b_window.to(weight.dtype.element_ty)  # (BLOCK_M, BLOCK_K)
    b_local = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_kernel in range(KERNELS):
        o_kernel = i_kernel * WIDTH + o_channel
        p_weight = weight + o_kernel[None, :] * TAPS + o_tap[:, None]
        b_weight = tl.load(p_weight, mask=(o_tap < TAPS)[:, None] & m_channel[None, :], other=0.0)
        b_conv = tl.dot(b_window, b_weight, input_precision=PRECISION)
        b_bias = tl.load(bias + o_kernel, mask=m_channel, other=0.0).to(tl.float32)
        b_local += tl.maximum(b_conv + b_bias[None, :], 0.0)

    tokens += i_batch * (1 + GRID * GRID) * WIDTH
    out += i_batch * (1 + GRID * GRID) * WIDTH
    b_blur = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_up in tl.static_range(-1, 2):
        i_near = tl.minimum(tl.maximum(i_row + i_up, 0), GRID - 1)
        for i_left in tl.static_range(-1, 2):
            o_near = i_near * GRID + tl.minimum(tl.maximum(i_col + i_left, 0), GRID - 1)
            b_near = tl.load(
                tokens + (1 + o_near)[:, None] * WIDTH + o_channel[None, :], mask=m_tile, other=0.0
            )
            share = (MIDDLE if i_up == 0 else SIDE) * (MIDDLE if i_left == 0 else SIDE)
            b_blur += share * b_near.to(tl.float32)
    b_out = b_blur + b_local / 4
    p_out = out + (1 + o_patch)[:, None] * WIDTH + o_channel[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_tile)
    if tl.program_id(0) == 0:
        tl.store(out + o_channel, tl.load(tokens + o_channel, mask=m_channel), mask=m_channel)


def tiles(width: int, dtype: torch.dtype) -> Tiles:
    """Block shapes: patches, channels. Chosen on paper for sm_90; no GPU has tuned them yet."""
    if dtype == torch.float32:  # multiplied by the scalar units, from registers
        return Tiles(block_m=32, block_n=min(power_of_two(width, SMALLEST_DOT), 32), warps=4, stages=2)
    return Tiles(block_m=64, block_n=min(power_of_two(width, SMALLEST_DOT), 64), warps=4, stages=2)


def launch(
    kernel: Any,
    image: Tensor,
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor,
    schedule: Tiles | None = None,
) -> Tensor:
    """Launch `kernel`, `_fusion_kernel` or its wrapping for torch.compile."""
    batch, length, width = tokens.shape
    grid = image.shape[-1] // STRIDE
    if image.stride()[1:] != (image.shape[-1] ** 2, image.shape[-1], 1):
        image = image.contiguous()
    tokens, weight, bias = tokens.contiguous(), weight.contiguous(), bias.contiguous()
    out = torch.empty_like(tokens)
    if out.numel() == 0:
        return out
    schedule = schedule or tiles(width, weight.dtype)
    patches, channels = ceil_div(grid * grid, schedule.block_m), ceil_div(width, schedule.block_n)
    side, middle, _ = BLUR
    kernel[(patches, channels, batch)](
        image=image,
        tokens=tokens,
        weight=weight,
        bias=bias,
        out=out,
        image_batch=image.stride(0),
        GRID=grid,
        WIDTH=width,
        KERNELS=weight.shape[0] // width,
        BLOCK_M=schedule.block_m,
        BLOCK_N=schedule.block_n,
        BLOCK_K=power_of_two(weight[0].numel(), SMALLEST_DOT),
        STRIDE=STRIDE,
        MARGIN=MARGIN,
        WINDOW=WINDOW,
        SIDE=side,
        MIDDLE=middle,
        PRECISION=dot_precision(weight.dtype),
        num_warps=schedule.warps,
        num_stages=schedule.stages,
    )
    return out


@operator("dgm4::conv_fusion")
def _fusion_op(image: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return launch(wrap_triton(_fusion_kernel), image, tokens, weight, bias)


def conv_fusion(image: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Fuse the tokens [B, 1+G*G, D] with the local features of image [B, 3, S, S], S = 16 G.

    weight [R*4*D, 3, 6, 6] and bias [R*4*D] hold R convolution branches, whose features are added; the
    released network has one. Raises InputError for shapes, types or devices that do not go together.
    """
    if onnx_ops.exporting():
        inputs = (image, tokens, weight, bias)
        return onnx_ops.emit(NAME, inputs, [tokens.shape], [tokens.dtype], {})[0]
    _check(image, tokens, weight, bias)
    if launchable(tokens):
        return torch.ops.dgm4.conv_fusion(image, tokens, weight, bias)
    return conv_fusion_ref(image, tokens, weight, bias)


def _check(image: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor) -> None:
    batch, length, width = tokens.shape
    size = STRIDE * math.isqrt(length - 1)
    kernels = weight.shape[0]
    if kernels == 0 or kernels % (POSITIONS * width):
        raise InputError(
            f"weight: expected a multiple of 4 * {width} kernels for {width} channels, got {kernels}"
        )
    check_tensor("image", image, (batch, 3, size, size), tokens, same_dtype=False)
    check_tensor("tokens", tokens, (batch, 1 + (size // STRIDE) ** 2, width), tokens)
    check_tensor("weight", weight, (kernels, 3, WINDOW, WINDOW), tokens)
    check_tensor("bias", bias, (kernels,), tokens)
