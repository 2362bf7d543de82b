"""Triton where it is installed, and what the kernels share.

Without Triton every module here still imports: its operators then take their composed torch form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.library
from torch import Tensor

from engine.errors import InputError

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:
    triton = tl = None

    def jit(kernel: Callable[..., Any]) -> Any:
        """Leave the kernel as it stands; nothing launches it."""
        return kernel


LOG2E = math.log2(math.e)
TARGETS = (80, 86, 89, 90, 100, 120)  # compute capabilities that the kernels are compiled and checked for
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALLEST_DOT = 16  # the least side of a tile that the matrix units take


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


def ceil_div(count: int, block: int) -> int:
    """Blocks that hold `count`; written in what TensorRT's shape expressions know too."""
    return (count + (block - 1)) // block


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two from `count` and `least` up."""
    return 1 << (max(count, least) - 1).bit_length()


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of tl.dot: float32 inputs are multiplied as float32, never as TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor, same_dtype: bool = True
) -> None:
    """Raise InputError where `tensor` has another shape, or another device or type than `like`."""
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name}: expected the shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise InputError(f"{name}: expected it on {like.device} as the rest, got {tensor.device}")
    if same_dtype and tensor.dtype != like.dtype:
        raise InputError(f"{name}: expected {like.dtype} as the rest, got {tensor.dtype}")
