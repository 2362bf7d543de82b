"""What a plugin launches: arguments, grid and constants, taken from the launcher that torch uses.

The launcher is called with tensors without data and a recorder in the kernel's place
(kernels/tools/aot.py). What depends on the batch or the caption stays an argument or an extent of the grid;
all else is compiled in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import BuildError
from kernels import attention, conv_fusion
from kernels.conv_fusion import STRIDE, packed_shape
from kernels.jit import Tiles
from kernels.onnx.attention import GUIDED
from kernels.tools.aot import Launch, compile_arguments, record

ATTENTION, FUSION = GUIDED, conv_fusion.NAME
OPEN = 3  # stands for an extent that stays open: odd, so that the compiler learns of no divisor
OUTPUTS = ("out", "guide")  # pointers that a kernel writes

Extent = Any  # an int, or TensorRT's expression for one, of which +, * and // are used


@dataclass(frozen=True)
class Program:
    """One launch: what the launcher recorded, and what varies, by ints or by shape expressions.

    scalars: int32 arguments by name. grid: programs along x, y and z.
    """

    launch: Launch
    scalars: dict[str, Extent]
    grid: tuple[Extent, Extent, Extent]

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of what the compiled kernel takes, in its order."""
        values = self.launch.arguments
        names = self.launch.kernel.arg_names
        return tuple(name for name in names if isinstance(values[name], Tensor) or name in self.scalars)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Pointers that the kernel reads, in its order."""
        return tuple(name for name in self.arguments if name not in (*self.scalars, *OUTPUTS))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Pointers that the kernel writes, in its order."""
        return tuple(name for name in self.arguments if name in OUTPUTS)

    def compile(self, capability: int, **options: Any) -> Any:
        """Triton's compiled kernel for a compute capability, 90 for 9.0.

        Raises BuildError where its arguments are not inputs, int32 scalars and outputs in this order, which
        is how a plugin passes them.
        """
        passed = (*self.inputs, *self.scalars, *self.outputs)
        if self.arguments != passed:
            raise BuildError(f"a plugin passes {passed}, and the kernel takes {self.arguments}")
        return compile_arguments(self.launch, capability, self.scalars, **options)


def attend(
    batch: Extent, queries: Extent, keys: int, columns: int, heads: int, dtype: torch.dtype, tiles: Tiles
) -> Program:
    """MGCA: query [batch, queries, columns] over key and value [batch, keys, columns], with the map."""
    query, key = (_empty(OPEN, rows, columns, dtype=dtype) for rows in (OPEN, keys))
    kernel, options = attention._attention_kernel, {"guided": True, "schedule": tiles}
    launch = record(attention.launch, kernel, query, key, key, heads, **options)
    scalars = {"n_queries": queries, "query_batch": queries * columns}
    return Program(launch, scalars, attention.grid(batch, queries, keys, heads, True, tiles))


def fuse(
    batch: Extent,
    patches: int,
    width: int,
    branches: int,
    image: torch.dtype,
    dtype: torch.dtype,
    tiles: Tiles,
) -> Program:
    """CAFormer's fusion at G * G patches: image [batch, 3, 16 G, 16 G], tokens [batch, 1 + G * G, width]."""
    size = STRIDE * math.isqrt(patches)
    launch = record(
        conv_fusion.launch,
        conv_fusion._fusion_kernel,
        _empty(OPEN, 3, size, size, dtype=image),
        _empty(OPEN, 1 + patches, width, dtype=dtype),
        _empty(*packed_shape(width, branches), dtype=dtype),
        tiles,
    )
    return Program(launch, {}, (*launch.grid[:2], batch))


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
