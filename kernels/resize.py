"""Images to the network's input on the device: Pillow's bicubic resize, then (level / 255 - mean) / std.

Bit for bit Pillow's arithmetic on 8-bit images. Along an axis of `length` pixels, r = max(length / S, 1),
the output at i is centred at c = (i + 0.5) length / S and reads the pixels j from trunc(c - 2r + 0.5) up to
trunc(c + 2r + 0.5), with the weights k((j - c + 0.5) / r), k the cubic kernel of a = -1/2, divided by their
sum and rounded to multiples of 2^-22. Sums are 32-bit integers; each pass rounds to a level in 0..255. The
rows are resized first, as in every Pillow before 13 (see engine/inputs/preprocess.py).

Images of a batch lie one behind the other in one buffer of bytes, so that a batch of any sizes is one copy
to the device and two launches; a loop would be two launches an image, which cost the host more than the
device works. Weights and the 3 x 256 normalised levels are made on the host: the levels by the division of
engine/inputs/preprocess.py, so that they too are equal bit for bit.

64 images of 640 x 480: 59 MB of pixels read, 24 MB between the passes written and read (less than the L2
cache), 50 MB written: 157 MB, 36 us at 4.3 TB/s. The passes are sums of 10 and 8 taps, 0.4 G products.
The copy of the pixels to the device costs more than that: 1 ms at 55 GB/s.
Source: Pillow, src/libImaging/Resample.c (its documented filter and precision); R. Keys, "Cubic convolution
interpolation for digital image processing", IEEE TASSP 29(6), 1981.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.library import wrap_triton

from kernels.jit import DTYPES, GRID_LIMITS, ceil_div, jit, launch_kernel, operator, power_of_two, tl, triton
from kernels.onnx import ops as onnx_ops
from kernels.resize_tables import (
    CHANNELS,
    FIELDS,
    LEVELS,
    PRECISION_BITS,
    Axis,
    Tables,
    axis_filter,
    make_tables,
    normalized_levels,
)

MAX_SIDE = 1 << 16  # bounds a table of weights at 1 MB for S = 256
MOST_SIZE = 1024


def check_images(images: Sequence[np.ndarray]) -> None:
    """Raise ValueError unless all are uint8 [H, W, 3] with sides of 1 to 65536 pixels."""
    for index, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != CHANNELS:
            raise ValueError(
                f"image {index}: expected uint8 of shape (height, width, {CHANNELS}), "
                f"got {image.dtype} of shape {image.shape}"
            )
    _check_sizes([image.shape[:2] for image in images])


def pack(images: Sequence[np.ndarray], pinned: bool = False) -> tuple[Tensor, list[tuple[int, int]]]:
    """Lay uint8 images [H, W, 3] one behind the other; the bytes and the (height, width) of each.

    In `pinned` memory a copy to a GPU runs beside the host. Raises ValueError as `check_images` does.
    """
    check_images(images)
    pixels = torch.empty(sum(x.size for x in images), dtype=torch.uint8, pin_memory=pinned)
    if images:
        np.concatenate([x.reshape(-1) for x in images], out=pixels.numpy())
    return pixels, [x.shape[:2] for x in images]


def resize_ref(
    pixels: Tensor,
    sizes: Sequence[tuple[int, int]],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Plain form, an image at a time: float32 [B, 3, S, S]."""
    levels = torch.from_numpy(normalized_levels(mean, std)).to(pixels.device)
    out = levels.new_empty(len(sizes), CHANNELS, size, size)
    start = 0
    for index, (height, width) in enumerate(sizes):
        end = start + CHANNELS * height * width
        planes = pixels[start:end].view(height, width, CHANNELS).permute(2, 0, 1)
        for _ in range(2):
            planes = _resample(planes, axis_filter(planes.shape[2], size)).transpose(1, 2)
        for channel in range(CHANNELS):
            out[index, channel] = levels[channel][planes[channel]]
        start = end
    return out


def _resample(planes: Tensor, axis: Axis) -> Tensor:
    """Resample the last axis of planes [3, N, length]; levels, int32 [3, N, S]."""
    first, weights = (torch.from_numpy(x).to(planes.device) for x in axis)
    total = planes.new_full((*planes.shape[:2], len(first)), 1 << (PRECISION_BITS - 1), dtype=torch.int32)
    for tap, weight in enumerate(weights):
        total += planes[..., (first + tap).clamp(max=planes.shape[-1] - 1)] * weight
    return (total >> PRECISION_BITS).clamp(0, LEVELS - 1)


@jit
def _level(b_sum: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Round a sum of weighted levels to a level. As b_sum"""
    return tl.minimum(tl.maximum((b_sum + (1 << (BITS - 1))) >> BITS, 0), 255)


@jit
def _line_kernel(
    pixels: tl.tensor,  # bytes, images [H, W, 3]
    plan: tl.tensor,  # [B, FIELDS]
    coefficients: tl.tensor,  # axes: [S] first pixels, [taps, S] weights
    middle: tl.tensor,  # bytes, images [3, lines, S]
    SIZE: tl.constexpr,
    FIELDS: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Programs: tiles of lines x tiles of outputs of a line x images; as many lines as the largest has."""
    plan += tl.program_id(2) * FIELDS
    lines, length = tl.load(plan + 2).to(tl.int32), tl.load(plan + 3).to(tl.int32)
    o_line = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_out = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * ROWS < lines:  # nothing to do in images with less lines than the largest
        m_tile = (o_line < lines)[:, None] & (o_out < SIZE)[None, :]
        p_line = pixels + tl.load(plan) + (o_line.to(tl.int64) * length * 3)[:, None]
        coefficients += tl.load(plan + 4)
        # Every line reads the same weights, as a (ROWS, BLOCK) tile: they come from the cache.
        b_first = tl.load(coefficients + o_out[None, :], mask=m_tile, other=0)  # (ROWS, BLOCK)
        # The three channels in one pass: their bytes are neighbours, and so lie in the same cache lines.
        b_red = tl.zeros((ROWS, BLOCK), tl.int32)  # (ROWS, BLOCK)
        b_green = tl.zeros((ROWS, BLOCK), tl.int32)  # (ROWS, BLOCK)
        b_blue = tl.zeros((ROWS, BLOCK), tl.int32)  # (ROWS, BLOCK)
        for i_tap in range(tl.load(plan + 5).to(tl.int32)):
            p_weight = coefficients + (1 + i_tap) * SIZE + o_out[None, :]
            b_weight = tl.load(p_weight, mask=m_tile, other=0)  # (ROWS, BLOCK)
            # A tap past the last pixel has no weight; it may read that pixel.
            p_tap = p_line + tl.minimum(b_first + i_tap, length - 1) * 3
            b_red += tl.load(p_tap, mask=m_tile, other=0).to(tl.int32) * b_weight
            b_green += tl.load(p_tap + 1, mask=m_tile, other=0).to(tl.int32) * b_weight
            b_blue += tl.load(p_tap + 2, mask=m_tile, other=0).to(tl.int32) * b_weight
        plane = lines.to(tl.int64) * SIZE
        p_out = middle + tl.load(plan + 1) * 3 * SIZE + o_line.to(tl.int64)[:, None] * SIZE + o_out[None, :]
        tl.store(p_out, _level(b_red, BITS).to(tl.uint8), mask=m_tile)
        tl.store(p_out + plane, _level(b_green, BITS).to(tl.uint8), mask=m_tile)
        tl.store(p_out + 2 * plane, _level(b_blue, BITS).to(tl.uint8), mask=m_tile)


@jit
def _cross_kernel(
    middle: tl.tensor,  # bytes, images [3, lines, S]
    plan: tl.tensor,  # [B, FIELDS]
    coefficients: tl.tensor,  # axes: [S] first pixels, [taps, S] weights
    levels: tl.tensor,  # [3, 256]
    out: tl.tensor,  # [B, 3, S, S], dense
    SIZE: tl.constexpr,
    FIELDS: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # S, up to a power of two
) -> None:
    """Programs: tiles of output lines x channels x images."""
    i_channel, i_image = tl.program_id(1), tl.program_id(2)
    plan += i_image * FIELDS
    o_line, o_out = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_line = o_line < SIZE
    m_tile = m_line[:, None] & (o_out < SIZE)[None, :]
    lines = tl.load(plan + 2).to(tl.int32)
    coefficients += tl.load(plan + 6)
    b_first = tl.load(coefficients + o_line, mask=m_line, other=0)  # (ROWS)
    p_plane = middle + (tl.load(plan + 1) * 3 + i_channel * lines.to(tl.int64)) * SIZE
    b_sum = tl.zeros((ROWS, BLOCK), tl.int32)  # (ROWS, BLOCK)
    for i_tap in range(tl.load(plan + 7).to(tl.int32)):
        b_weight = tl.load(coefficients + (1 + i_tap) * SIZE + o_line, mask=m_line, other=0)[
            :, None
        ]  # (ROWS, 1)
        # A tap past the last line has no weight; it may read that line.
        p_tap = p_plane + (tl.minimum(b_first + i_tap, lines - 1) * SIZE)[:, None] + o_out[None, :]
        b_sum += tl.load(p_tap, mask=m_tile, other=0).to(tl.int32) * b_weight
    # A table of 256 levels a channel: bit for bit the host's division, which the GPU's would not be.
    b_value = tl.load(levels + i_channel * LEVELS + _level(b_sum, BITS)).to(out.dtype.element_ty)
    out += (i_image.to(tl.int64) * 3 + i_channel) * SIZE * SIZE
    tl.store(out + o_line[:, None] * SIZE + o_out[None, :], b_value, mask=m_tile)


def launch_lines(
    kernel: Any,
    pixels: Tensor,
    tables: Tables,
    size: int,
    lines: int,
    most_lines: int,
    block_rows: int = 4,
) -> Tensor:
    """Launch the first pass, `_line_kernel` or its wrapping; bytes, 3 * size for each of all `lines`."""
    middle = pixels.new_empty(CHANNELS * lines * size)
    block = min(power_of_two(size), 128)
    launch_kernel(
        kernel,
        (ceil_div(most_lines, block_rows), ceil_div(size, block), len(tables.plan)),
        pixels,
        pixels=pixels,
        plan=tables.plan,
        coefficients=tables.coefficients,
        middle=middle,
        SIZE=size,
        FIELDS=FIELDS,
        BITS=PRECISION_BITS,
        ROWS=block_rows,
        BLOCK=block,
        num_warps=4,
        num_stages=1,
    )
    return middle


def launch_cross(
    kernel: Any, middle: Tensor, tables: Tables, size: int, out: Tensor, block_rows: int = 4
) -> Tensor:
    """Launch the second pass, `_cross_kernel` or its wrapping, into `out`, [B, 3, S, S]."""
    launch_kernel(
        kernel,
        (ceil_div(size, block_rows), CHANNELS, len(tables.plan)),
        middle,
        middle=middle,
        plan=tables.plan,
        coefficients=tables.coefficients,
        levels=tables.levels,
        out=out,
        SIZE=size,
        FIELDS=FIELDS,
        BITS=PRECISION_BITS,
        LEVELS=LEVELS,
        ROWS=block_rows,
        BLOCK=power_of_two(size),
        num_warps=4,
        num_stages=1,
    )
    return out


@operator("dgm4::resize")
def _resize_op(
    pixels: Tensor,
    plan: Tensor,
    coefficients: Tensor,
    levels: Tensor,
    size: int,
    lines: int,
    most_lines: int,
    dtype: torch.dtype,
) -> Tensor:
    tables = Tables(plan, coefficients, levels)
    middle = launch_lines(wrap_triton(_line_kernel), pixels, tables, size, lines, most_lines)
    out = levels.new_empty((len(plan), CHANNELS, size, size), dtype=dtype)
    return launch_cross(wrap_triton(_cross_kernel), middle, tables, size, out)


def resize(
    pixels: Tensor,
    sizes: Sequence[tuple[int, int]],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Resize and normalise packed RGB images, bytes [sum of 3 H W], to [B, 3, size, size] of `dtype`.

    `sizes` are (height, width), 1 to 65536 each; `mean` and `std` are of the three channels, for levels in
    [0, 1]. Raises ValueError for what does not go together.
    """
    _check(pixels, sizes, size, mean, std, dtype)
    if not _launches(pixels) or onnx_ops.exporting() or not sizes:
        return resize_ref(pixels, sizes, size, mean, std).to(dtype)
    tables = make_tables(sizes, size, mean, std)
    lines = [height for height, _ in sizes]
    sent = (x.to(pixels.device) for x in tables)
    return torch.ops.dgm4.resize(pixels.contiguous(), *sent, size, sum(lines), max(lines), dtype)


def resize_into(
    out: Tensor,
    pixels: Tensor,
    sizes: Sequence[tuple[int, int]],
    mean: Sequence[float],
    std: Sequence[float],
    tables: Tables,
) -> None:
    """The same into `out`, dense [B, 3, S, S], with `tables` that lie where the pixels do.

    Waits for nothing on the host. Raises ValueError for what does not go together.
    """
    size = out.shape[-1]
    _check(pixels, sizes, size, mean, std, out.dtype)
    if tuple(out.shape) != (len(sizes), CHANNELS, size, size) or not out.is_contiguous():
        raise ValueError(f"out: expected dense {(len(sizes), CHANNELS, size, size)}, got {tuple(out.shape)}")
    for name, tensor in {"out": out, **tables._asdict()}.items():
        if tensor.device != pixels.device or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected it dense on {pixels.device} as the pixels, got {tensor.device}"
            )
    if not _launches(pixels):
        out.copy_(resize_ref(pixels, sizes, size, mean, std))
        return
    lines = [height for height, _ in sizes]
    middle = launch_lines(_line_kernel, pixels.contiguous(), tables, size, sum(lines), max(lines))
    launch_cross(_cross_kernel, middle, tables, size, out)


def _launches(pixels: Tensor) -> bool:
    return triton is not None and pixels.is_cuda


def _check_sizes(sizes: Sequence[tuple[int, int]]) -> None:
    for index, (height, width) in enumerate(sizes):
        if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
            raise ValueError(
                f"image {index}: expected sides of 1 to {MAX_SIDE} pixels, got {height} x {width}"
            )


def _check(
    pixels: Tensor,
    sizes: Sequence[tuple[int, int]],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> None:
    _check_sizes(sizes)
    count = CHANNELS * sum(height * width for height, width in sizes)
    if pixels.dtype != torch.uint8 or tuple(pixels.shape) != (count,):
        raise ValueError(
            f"pixels: expected uint8 of shape ({count},) for {len(sizes)} images, "
            f"got {pixels.dtype} of shape {tuple(pixels.shape)}"
        )
    if not 1 <= size <= MOST_SIZE or len(sizes) > GRID_LIMITS[2]:
        raise ValueError(
            f"expected a size of 1 to {MOST_SIZE} and at most {GRID_LIMITS[2]} images, "
            f"got {size} and {len(sizes)}"
        )
    if len(mean) != CHANNELS or len(std) != CHANNELS or 0 in std:
        raise ValueError(f"expected three means and three deviations other than 0, got {mean} and {std}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
