"""Tables of a resize, made on the host from the sizes of the images: weights and levels.

See kernels/resize.py for the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHANNELS, LEVELS = 3, 256
SUPPORT, CUBIC = 2.0, -0.5  # half the kernel's width, and its parameter a
PRECISION_BITS = 32 - 8 - 2  # of a weight, beside a level and two bits for the sum
CACHED_AXES = 64
# Fields of an image's plan: where it starts, in bytes and in lines, its lines and the pixels of one, offset
# and taps of the axis along a line, and of that across.
FIELDS = 8


class Axis(NamedTuple):
    """Resampling of one axis: the first pixel of every output, int32 [S], and weights, int32 [taps, S]."""

    first: np.ndarray
    weights: np.ndarray


class Tables(NamedTuple):
    """Inputs of the kernels beside the pixels.

    plan: int64 [B, FIELDS]; coefficients: int32, the axes one behind the other; levels: float32 [3, 256].
    """

    plan: Tensor
    coefficients: Tensor
    levels: Tensor


@lru_cache(maxsize=CACHED_AXES)
def axis_filter(length: int, size: int) -> Axis:
    """Weights that take `length` pixels to `size`, in multiples of 2^-22."""
    scale = length / size
    stretch = max(scale, 1.0)
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - SUPPORT * stretch + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + SUPPORT * stretch + 0.5).astype(np.int64), length)
    position = first + np.arange((end - first).max())[:, None]
    weights = np.where(position < end, _cubic((position - centre + 0.5) * (1.0 / stretch)), 0.0)
    weights /= np.cumsum(weights, axis=0)[-1]  # one after another, as Pillow adds them
    fixed = np.trunc(weights * (1 << PRECISION_BITS) + np.copysign(0.5, weights))
    return Axis(first.astype(np.int32), fixed.astype(np.int32))


def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = ((CUBIC + 2.0) * x - (CUBIC + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * CUBIC
    return np.where(x < 1, near, np.where(x < SUPPORT, far, 0.0))


def normalized_levels(mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Every level normalised, float32 [3, 256]."""
    levels = np.arange(LEVELS, dtype=np.float32) / np.float32(LEVELS - 1)
    return (levels - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]


def make_tables(
    sizes: Sequence[tuple[int, int]], size: int, mean: Sequence[float], std: Sequence[float]
) -> Tables:
    """Tables for images of `sizes`, (height, width), on the host."""
    axes: dict[int, tuple[int, int]] = {}  # length: offset and taps
    blocks, end = [np.empty(0, np.int32)], 0
    for length in sorted({length for pair in sizes for length in pair}):
        axis = axis_filter(length, size)
        blocks += [axis.first, axis.weights.reshape(-1)]
        axes[length] = end, len(axis.weights)
        end += axis.first.size + axis.weights.size
    coefficients = torch.from_numpy(np.concatenate(blocks))
    return Tables(_plan(sizes, axes), coefficients, torch.from_numpy(normalized_levels(mean, std)))


def _plan(sizes: Sequence[tuple[int, int]], axes: dict[int, tuple[int, int]]) -> Tensor:
    plan, start, line = [], 0, 0
    for height, width in sizes:
        plan.append((start, line, height, width, *axes[width], *axes[height]))
        start += CHANNELS * height * width
        line += height
    return torch.tensor(plan, dtype=torch.int64).reshape(-1, FIELDS)
