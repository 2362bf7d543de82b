"""CAFormer's conv-attention fusion at the token grid.

Published: tokens as a GxG map, up to SxS bilinearly, plus ReLU(BN(conv5x5(image))), down to GxG
bilinearly. With S = 16 G the downsampling reads pixels 16i+7 and 16i+8 alone, so that

    out = blur(tokens) + mean over 4 of ReLU(conv6x6 stride 16 (image[5 : S-5, 5 : S-5]))

where the 6x6 kernels hold the folded 5x5 kernel at its four places (channels 4*D, place major), and blur
is [1/64, 31/32, 1/64] along both axes with replicated edges. The [CLS] token passes by. Saves the
[B, D, S, S] tensor: 201 MB an image in float32 at D = 768, S = 256.

Shapes: image [B, 3, S, S]; tokens [B, 1+G*G, D]; weight [R*4*D, 3, 6, 6]; bias [R*4*D], R branches.

The Triton kernel reads the 5x5 kernel of the first place (`pack`) and moves the window instead: a row of it
is 3 planes x 5 pixels, 15 taps, and the bias makes 16, the step of the matrix units. Four places then share
one kernel and twelve window tiles, read once a program, for 80 taps a place instead of 128. The blur is a
product too: (blur - 1) is exact in bf16, the token itself is added in float32.

Floor, B = 64, D = 768, bf16: the window rows 9.4 MB, tokens read and written 50 MB: 14 us at 4.3 TB/s. 8.1
GFLOP for the windows and 2.4 for the blur: 13 us at 790 TFLOP/s. By sm_90's code a tile of 64 patches x 64
channels is 649 instructions of a warp, 26 of them wgmma, and a program's start 1520: in all 14 us of what an
H200 issues. Kernels come from L2, 123 KB for 64 patches. Nothing has been measured on a GPU yet.
A NaN in a window makes its patch NaN, and one in a token all patches whose blur reads its tile, as in torch.
Source: the released network of CALS; derivation in engine/network/fold.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton
from torch.nn import functional as F

from kernels.jit import (
    LARGEST_OFFSET,
    SMALLEST_DOT,
    Tiles,
    ceil_div,
    check_axes,
    check_tensor,
    dot_precision,
    jit,
    launch_kernel,
    launchable,
    operator,
    power_of_two,
    tl,
)
from kernels.onnx import ops as onnx_ops

NAME, WIDTH = "ConvTokenFusion", "width"  # of the node, and of its attribute for D
STRIDE = 16
MARGIN = 5  # first pixel that any of the kernels reads
WINDOW = 6  # side of the folded kernels
POSITIONS = 4  # pixels (16i+7, 16i+8) x (16j+7, 16j+8)
BLUR = (1 / 64, 31 / 32, 1 / 64)
GROUPS = 3  # programs that share the channels of a patch tile: 768 at B = 64, two rounds of an H200


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
    """Plain form in the dtype of the inputs, [B, 1+G*G, D]."""
    size = image.shape[-1]
    grid, inner = size // STRIDE, slice(MARGIN, size - MARGIN)
    local = F.relu(F.conv2d(image[:, :, inner, inner], weight, bias, stride=STRIDE))
    local = local.unflatten(1, (-1, tokens.shape[-1])).sum(1).flatten(2).transpose(1, 2) / POSITIONS
    patches = _blur(tokens[:, 1:].unflatten(1, (grid, grid))).flatten(1, 2)
    return torch.cat([tokens[:, :1], patches + local], dim=1)


def packed_shape(width: int, branches: int = 1) -> tuple[int, int, int, int]:
    """Shape of the output of `pack`."""
    return branches, width, WINDOW - 1, SMALLEST_DOT


def pack(weight: Tensor, bias: Tensor, width: int) -> Tensor:
    """The 5x5 kernels and their bias as the matrix units read them, [R, D, 5, 16].

    Row i of a kernel in three planes, 15 values; then, in the first row, the bias. Read from the first of the
    four places of weight [R*4*D, 3, 6, 6] and bias [R*4*D]. Raises ValueError unless the other three hold the
    same kernel and bias; the comparison waits for the device, so pack once, when the weights are loaded.
    """
    side = WINDOW - 1
    places = weight.unflatten(0, (-1, POSITIONS, width))  # [R, 4, D, 3, 6, 6]
    kernels, biases = places[:, 0, :, :, :side, :side], bias.unflatten(0, (-1, POSITIONS, width))
    for index in range(POSITIONS):
        y, x = divmod(index, 2)
        placed = F.pad(kernels, (x, 1 - x, y, 1 - y))
        pairs = (places[:, index], placed), (biases[:, index], biases[:, 0])
        if not all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs):
            raise ValueError(
                f"weight, bias: expected the same 5x5 kernel and bias at four places, got others at {index}"
            )
    rows = kernels.transpose(2, 3).flatten(3)
    return torch.cat([rows, F.pad(biases[:, 0, :, None, None], (0, 0, 0, side - 1))], dim=-1)


@jit
def _blur_share(i_to: tl.tensor, i_from: tl.tensor, GRID: tl.constexpr, SIDE: tl.constexpr) -> tl.tensor:
    """The blur along one axis as a matrix, line i_from's share in line i_to; edges replicated."""
    b_middle = 1.0 - tl.where(i_to == 0, 1.0, 2.0) * SIDE + tl.where(i_to == GRID - 1, SIDE, 0.0)  # as i_to
    return tl.where(i_to == i_from, b_middle, tl.where(tl.abs(i_to - i_from) == 1, SIDE, 0.0))


@jit
def _blur_change(o_patch: tl.tensor, o_near: tl.tensor, GRID: tl.constexpr, SIDE: tl.constexpr) -> tl.tensor:
    """Four times the blur less the identity, (patches, near patches): seven bits, exact in every type."""
    o_patch, o_near = o_patch[:, None], o_near[None, :]
    b_blur = _blur_share(o_patch // GRID, o_near // GRID, GRID, SIDE)  # (patches, near patches)
    b_blur *= _blur_share(o_patch % GRID, o_near % GRID, GRID, SIDE)
    return 4.0 * (b_blur - tl.where(o_patch == o_near, 1.0, 0.0))


# Long because of its signature; what it could hand to a helper are the window tiles, which stay in registers.
@jit
def _fusion_kernel(
    image: tl.tensor,  # [B, 3, S, S], dense planes
    tokens: tl.tensor,  # [B, 1+G*G, D], dense
    packed: tl.tensor,  # [R, D, 5, 16], dense; R branches
    image_batch: tl.tensor,
    out: tl.tensor,  # [B, 1+G*G, D], dense
    GRID: tl.constexpr,
    WIDTH: tl.constexpr,
    BRANCHES: tl.constexpr,  # R
    BLOCK_M: tl.constexpr,  # patches
    BLOCK_N: tl.constexpr,  # channels
    TILES: tl.constexpr,  # of channels, of a program
    HALO: tl.constexpr,  # patches before and after a tile that its blur reads
    BLOCK_K: tl.constexpr,  # a row of the kernel in three planes, its bias, and up to what the units take
    STRIDE: tl.constexpr,
    MARGIN: tl.constexpr,
    WINDOW: tl.constexpr,
    SIDE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Programs: patch tiles x groups of channel tiles x batch."""
    # int32 within an image and its tokens, whose size the launcher bounds.
    i_batch = tl.program_id(2).to(tl.int64)
    o_patch = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_patch = o_patch < GRID * GRID
    i_row, i_col = o_patch // GRID, o_patch % GRID
    tokens += i_batch * (1 + GRID * GRID) * WIDTH
    out += i_batch * (1 + GRID * GRID) * WIDTH
    # The blur of a tile reads a line of patches more on either side: HALO / 2 before it, HALO / 2 behind.
    o_halo = tl.program_id(0) * BLOCK_M + tl.arange(0, HALO)
    o_halo += tl.where(tl.arange(0, HALO) < HALO // 2, -HALO // 2, BLOCK_M - HALO // 2)
    m_halo = (o_halo >= 0) & (o_halo < GRID * GRID)
    kind = tokens.dtype.element_ty
    b_inner_change = _blur_change(o_patch, o_patch, GRID, SIDE).to(kind)  # (BLOCK_M, BLOCK_M)
    b_halo_change = _blur_change(o_patch, o_halo, GRID, SIDE).to(kind)  # (BLOCK_M, HALO)

    KERNEL: tl.constexpr = WINDOW - 1
    TAPS: tl.constexpr = 3 * KERNEL
    SIZE: tl.constexpr = GRID * STRIDE
    o_tap = tl.arange(0, BLOCK_K)
    o_plane, o_pixel = o_tap // KERNEL, o_tap % KERNEL
    m_tap = o_tap < TAPS
    p_window = (i_row * SIZE + i_col)[:, None] * STRIDE + (o_plane * SIZE * SIZE + o_pixel)[None, :]
    p_window += image + i_batch * image_batch + MARGIN * (SIZE + 1)
    # Loaded once for all channels and all four places: place (y, x) reads row i of its window at i + y, x.
    b_windows: tl.tuple = ()  # 2 * WINDOW times (BLOCK_M, BLOCK_K), by the window's rows and two columns
    for i in tl.static_range(2 * WINDOW):
        # Past the taps stands the factor of the bias.
        p_pixel = p_window + (i // 2 * SIZE + i % 2)
        b_pixel = tl.load(p_pixel, mask=m_patch[:, None] & m_tap[None, :], other=1.0)  # (BLOCK_M, BLOCK_K)
        b_windows = b_windows + (b_pixel.to(packed.dtype.element_ty),)

    for i_tile in range(TILES):
        o_channel = (tl.program_id(1) * TILES + i_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_channel = o_channel < WIDTH
        b_local = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # (BLOCK_M, BLOCK_N)
        for i_branch in tl.static_range(BRANCHES):
            p_kernel = packed + (i_branch * WIDTH + o_channel)[None, :] * (KERNEL * BLOCK_K) + o_tap[:, None]
            b_kernel: tl.tuple = ()  # KERNEL times (BLOCK_K, BLOCK_N), by rows
            for i in tl.static_range(KERNEL):
                b_kernel = b_kernel + (tl.load(p_kernel + i * BLOCK_K, mask=m_channel[None, :], other=0.0),)
            for i_place in tl.static_range(4):
                b_conv = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # (BLOCK_M, BLOCK_N)
                for i in tl.static_range(KERNEL):
                    b_window = b_windows[2 * (i + i_place // 2) + i_place % 2]  # (BLOCK_M, BLOCK_K)
                    b_conv = tl.dot(b_window, b_kernel[i], b_conv, input_precision=PRECISION)
                # Unasked, a maximum drops NaN: a broken activation would leave as a finite output.
                b_local += tl.maximum(b_conv, 0.0, propagate_nan=tl.PropagateNan.ALL)
        o_inner = (1 + o_patch)[:, None] * WIDTH + o_channel[None, :]
        o_around = (1 + o_halo)[:, None] * WIDTH + o_channel[None, :]
        m_inner = m_patch[:, None] & m_channel[None, :]
        b_inner = tl.load(tokens + o_inner, mask=m_inner, other=0.0)  # (BLOCK_M, BLOCK_N)
        m_around = m_halo[:, None] & m_channel[None, :]
        b_around = tl.load(tokens + o_around, mask=m_around, other=0.0)  # (HALO, BLOCK_N)
        b_out = tl.dot(b_inner_change, b_inner, b_local, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        b_out = tl.dot(b_halo_change, b_around, b_out, input_precision=PRECISION)
        # The quarter is both the mean over places and what undoes the four of the blur's change.
        b_out = 0.25 * b_out + b_inner.to(tl.float32)
        tl.store(out + o_inner, b_out.to(out.dtype.element_ty), mask=m_inner)
        if tl.program_id(0) == 0:  # one of the programs copies [CLS]
            tl.store(out + o_channel, tl.load(tokens + o_channel, mask=m_channel), mask=m_channel)


def schedules(width: int, dtype: torch.dtype) -> tuple[Tiles, ...]:
    """Tiles of patches and channels of a launch: the first is the default, the best on paper for sm_90.

    Nothing chooses between them at run time: the others are for benchmarks/kernels, and tactics of the plugin
    that TensorRT times. No GPU has tuned them yet.
    """
    block_n = min(power_of_two(width, SMALLEST_DOT), 64)
    if dtype == torch.float32:  # multiplied by the scalar units, from registers
        return (Tiles(block_m=32, block_n=min(block_n, 32), warps=4, stages=1),)
    return (
        Tiles(block_m=64, block_n=block_n, warps=4, stages=1),  # 48 KiB, on sm_100 and 8 bytes
        Tiles(block_m=64, block_n=block_n, warps=4, stages=2),  # 80 KiB
        Tiles(block_m=64, block_n=min(block_n, 32), warps=4, stages=1),  # 42 KiB
    )


# Long because the formatter gives each of the kernel's arguments a line.
def launch(
    kernel: Any,
    image: Tensor,
    tokens: Tensor,
    packed: Tensor,
    schedule: Tiles | None = None,
    groups: int = GROUPS,
) -> Tensor:
    """Launch `kernel`, `_fusion_kernel` or its wrapping for torch.compile; packed as `pack` leaves it.

    Without a `schedule` it is the first of `schedules`.
    """
    batch, length, width = tokens.shape
    grid = image.shape[-1] // STRIDE
    if image.stride()[1:] != (image.shape[-1] ** 2, image.shape[-1], 1):
        image = image.contiguous()
    tokens, packed = tokens.contiguous(), packed.contiguous()
    out = torch.empty_like(tokens)
    if out.numel() == 0:
        return out
    schedule = schedule or schedules(width, packed.dtype)[0]
    patches, channels = ceil_div(grid * grid, schedule.block_m), ceil_div(width, schedule.block_n)
    groups = min(groups, channels)
    launch_kernel(
        kernel,
        (patches, groups, batch),
        tokens,
        image=image,
        tokens=tokens,
        packed=packed,
        out=out,
        image_batch=image.stride(0),
        GRID=grid,
        WIDTH=width,
        BRANCHES=len(packed),
        BLOCK_M=schedule.block_m,
        BLOCK_N=schedule.block_n,
        TILES=ceil_div(channels, groups),
        HALO=power_of_two(2 * (grid + (schedule.block_m % grid > 0)), SMALLEST_DOT),
        BLOCK_K=packed.shape[-1],
        STRIDE=STRIDE,
        MARGIN=MARGIN,
        WINDOW=WINDOW,
        SIDE=BLUR[0],
        PRECISION=dot_precision(packed.dtype),
        num_warps=schedule.warps,
        num_stages=schedule.stages,
    )
    return out


@operator("dgm4::conv_fusion")
def _fusion_op(image: Tensor, tokens: Tensor, packed: Tensor) -> Tensor:
    return launch(wrap_triton(_fusion_kernel), image, tokens, packed)


def conv_fusion(
    image: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, packed: Tensor | None = None
) -> Tensor:
    """Fuse the tokens [B, 1+G*G, D] with the local features of image [B, 3, S, S], S = 16 G.

    weight [R*4*D, 3, 6, 6] and bias [R*4*D] hold R convolution branches, whose features are added; the
    released network has one. In each the four kernels of a channel are one 5x5 kernel at its four places,
    with one bias: a GPU reads the first, or `packed`, which is `pack(weight, bias, D)` made beforehand and is
    trusted to be that. Raises ValueError for shapes or devices, TypeError for types, that do not go together.
    """
    if onnx_ops.exporting():
        inputs = (image, tokens, weight, bias)
        return onnx_ops.emit(NAME, inputs, [tokens.shape], [tokens.dtype], {WIDTH: [tokens.shape[-1]]})[0]
    _check(image, tokens, weight, bias, packed)
    if launchable(tokens):
        packed = pack(weight, bias, tokens.shape[-1]) if packed is None else packed
        return torch.ops.dgm4.conv_fusion(image, tokens, packed)
    return conv_fusion_ref(image.to(tokens.dtype), tokens, weight, bias)


def _check(image: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, packed: Tensor | None) -> None:
    for name, tensor, axes in (("image", image, "B, 3, S, S"), ("tokens", tokens, "B, 1 + G * G, D")):
        check_axes(name, tensor, axes)
    batch, length, width = tokens.shape
    if length < 2 or width < 1:
        raise ValueError(f"tokens: expected [B, 1 + G * G, D] with G and D from 1, got {tuple(tokens.shape)}")
    size = STRIDE * math.isqrt(length - 1)
    kernels = weight.shape[0]
    if kernels == 0 or kernels % (POSITIONS * width):
        raise ValueError(
            f"weight: expected a multiple of 4 * {width} kernels for {width} channels, got {kernels}"
        )
    if max(3 * size**2, length * width, kernels // POSITIONS * (WINDOW - 1) * SMALLEST_DOT) > LARGEST_OFFSET:
        raise ValueError(
            f"expected an image, its tokens and the kernels of less than 2^31 elements each, got images of "
            f"{size} x {size}, {length} tokens of {width} and {kernels} kernels"
        )
    check_tensor("image", image, (batch, 3, size, size), tokens, same_dtype=False)
    check_tensor("tokens", tokens, (batch, 1 + (size // STRIDE) ** 2, width), tokens)
    check_tensor("weight", weight, (kernels, 3, WINDOW, WINDOW), tokens)
    check_tensor("bias", bias, (kernels,), tokens)
    if packed is not None:
        check_tensor("packed", packed, packed_shape(width, kernels // (POSITIONS * width)), tokens)
