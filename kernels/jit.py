"""Triton where it is installed, and what all kernels share: launches, tiles of columns, checks.

Without Triton every module here still imports: its operators then take their composed torch form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.library
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:
    triton = tl = None

    def jit(kernel: Callable[..., Any]) -> Any:
        """Return the kernel unchanged; nothing launches it."""
        return kernel


# The oldest and the newest Triton that the kernels are tested with. torch 2.13 for CUDA requires 3.7.1, with
# which benchmarks/results is compiled. The interpreter of 3.6, though not its compiler, needs NumPy < 2.4
# (triton-lang/triton#9171); tests/conftest.py mends that.
OLDEST_TRITON, NEWEST_TRITON = (3, 6), (3, 9)

LOG2E = math.log2(math.e)
TARGETS = (80, 86, 89, 90, 100, 120)  # compute capabilities that the kernels are compiled and checked for
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALLEST_DOT = 16  # the smallest side of a tile that the matrix units take
GRID_LIMITS = (2**31 - 1, 65535, 65535)  # programs along x, y and z on every NVIDIA GPU
LARGEST_OFFSET = 2**31 - 1  # of an element, where a kernel counts in int32


class Tiles(NamedTuple):
    """Block shapes and schedule of one launch."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def operator(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a launcher as torch's operator `name`, which torch.compile and torch.export see through.

    Without Triton the function stays as it is: nothing calls it.
    """
    if triton is None:
        return lambda function: function
    return torch.library.triton_op(name, mutates_args={})


def launchable(tensor: Tensor) -> bool:
    """Whether a kernel can run on `tensor`: Triton is there, it lies on a GPU, and its type has a kernel."""
    return triton is not None and tensor.is_cuda and tensor.dtype in DTYPES


def launch_kernel(kernel: Any, grid: tuple[int, ...], like: Tensor, **arguments: Any) -> None:
    """Launch `kernel` over `grid` on the GPU of `like`.

    Raises ValueError for a grid beyond the hardware's limits.
    """
    for axis, count, limit in zip("xyz", grid, GRID_LIMITS, strict=False):
        if count > limit:
            raise ValueError(
                f"grid: expected at most {limit} programs along {axis}, got {count}: split the batch"
            )
    # Triton launches on the current GPU, wherever its pointers lie. Tensors without data need no GPU.
    guarded = like.is_cuda and torch.cuda.is_initialized()
    with torch.cuda.device(like.device) if guarded else nullcontext():
        kernel[grid](**arguments)


def dense_columns(tensor: Tensor) -> Tensor:
    """`tensor` with a last axis of stride 1, as the kernels read it: a copy where it has another."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def ceil_div(count: int, block: int) -> int:
    """Blocks that hold `count`; written with operators that TensorRT's shape expressions have too."""
    return (count + (block - 1)) // block


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least `count` and `least`."""
    return 1 << (max(count, least) - 1).bit_length()


def column_parts(width: int) -> tuple[int, int]:
    """Columns of a part, a power of two, and parts that hold `width`: 64 is 1 part of 64, 96 is 3 of 32."""
    padded = max(ceil_div(width, 32) * 32, 32) if width > SMALLEST_DOT else SMALLEST_DOT
    part = padded & -padded
    return part, padded // part


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of tl.dot: float32 inputs are multiplied as float32, never as TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor, same_dtype: bool = True
) -> None:
    """Raise ValueError for another shape than `shape` or device than `like`, TypeError for another type."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected the shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected it on {like.device} as the rest, got {tensor.device}")
    if same_dtype and tensor.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype} as the rest, got {tensor.dtype}")


def check_axes(name: str, tensor: Tensor, axes: str) -> None:
    """Raise ValueError unless `tensor` has `axes`, as "B, N, D", and TypeError unless it is floating."""
    if tensor.dim() != axes.count(",") + 1:
        raise ValueError(f"{name}: expected [{axes}], got the shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected floating point, got {tensor.dtype}")


@jit
def load_tile(
    start: tl.tensor,
    o_row: tl.tensor,  # (rows)
    o_col: tl.tensor,  # (columns)
    row_stride: tl.tensor,
    n_rows: tl.tensor,  # None where all rows exist
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Load rows o_row and columns o_col of a matrix; zeros outside. (rows, columns)"""
    m_tile = (o_col < COLUMNS)[None, :]
    if n_rows is not None:
        m_tile = m_tile & (o_row < n_rows)[:, None]
    # int64: rows far apart, as those of a view are, may lie 2^31 elements away.
    p_row = start + o_row.to(tl.int64)[:, None] * row_stride
    return tl.load(p_row + o_col[None, :], mask=m_tile, other=0.0)
