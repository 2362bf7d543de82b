"""Registers the operators with TensorRT: types, tactics and code. Importing this file imports TensorRT.

`use` names the GPU first. TensorRT reads these functions' annotations as they are, so this file must not
postpone them. Tactic n is the n-th schedule that the kernel's file lists; those that need more shared memory
than a plugin gets are not offered.
"""

from collections.abc import Sequence

import numpy as np
import tensorrt as trt
import tensorrt.plugin as trtp
import torch
from numpy.typing import NDArray

from engine.errors import BuildError
from export.trt.plugins.programs import ATTENTION, FUSION, OPEN, Extent, Program, attend, fuse
from export.trt.plugins.ptx import Target, compile_kernel
from kernels import attention, conv_fusion
from kernels.onnx.ops import DOMAIN

ATTENTION_ID, FUSION_ID = f"{DOMAIN}::{ATTENTION}", f"{DOMAIN}::{FUSION}"
DTYPES = {trt.float32: torch.float32, trt.float16: torch.float16, trt.bfloat16: torch.bfloat16}
NAMES = {trt.float32: "FP32", trt.float16: "FP16", trt.bfloat16: "BF16"}

Launched = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
_targets: list[Target] = []


def use(target: Target) -> None:
    """Name the GPU that the plugins are compiled for, before a network with them is built."""
    _targets[:] = [target]


@trtp.register(ATTENTION_ID)
def _describe_attention(
    query: trtp.TensorDesc, key: trtp.TensorDesc, value: trtp.TensorDesc, heads: NDArray[np.int32]
) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
    (batch, queries, _), keys = query.shape_expr, key.shape_expr[1]
    return query.like(), trtp.from_shape_expr((batch, queries, keys), trt.float32)


@trtp.autotune(ATTENTION_ID)
def _tune_attention(
    query: trtp.TensorDesc,
    key: trtp.TensorDesc,
    value: trtp.TensorDesc,
    heads: NDArray[np.int32],
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    return _offer((query, key, value, *outputs), _attention_programs(query, key, heads, OPEN, OPEN))


@trtp.aot_impl(ATTENTION_ID)
def _implement_attention(
    query: trtp.TensorDesc,
    key: trtp.TensorDesc,
    value: trtp.TensorDesc,
    heads: NDArray[np.int32],
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> Launched:
    batch, queries, _ = query.shape_expr
    return _launch(_attention_programs(query, key, heads, batch, queries), tactic)


@trtp.register(FUSION_ID)
def _describe_fusion(
    image: trtp.TensorDesc, tokens: trtp.TensorDesc, packed: trtp.TensorDesc
) -> trtp.TensorDesc:
    return tokens.like()


@trtp.autotune(FUSION_ID)
def _tune_fusion(
    image: trtp.TensorDesc,
    tokens: trtp.TensorDesc,
    packed: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    return _offer((image, tokens, packed, *outputs), _fusion_programs(image, tokens, packed, OPEN))


@trtp.aot_impl(FUSION_ID)
def _implement_fusion(
    image: trtp.TensorDesc,
    tokens: trtp.TensorDesc,
    packed: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> Launched:
    return _launch(_fusion_programs(image, tokens, packed, tokens.shape_expr[0]), tactic)


def _attention_programs(
    query: trtp.TensorDesc, key: trtp.TensorDesc, heads: NDArray[np.int32], batch: Extent, queries: Extent
) -> list[Program]:
    """A program for every schedule, in the order of the tactics."""
    keys, columns, count = _fixed("key", key, 1), _fixed("query", query, 2), int(heads[0])
    dtype = DTYPES[query.dtype]
    schedules = attention.schedules(_typical(query, 1), keys, columns // count, dtype)
    return [attend(batch, queries, keys, columns, count, dtype, tiles) for tiles in schedules]


def _fusion_programs(
    image: trtp.TensorDesc, tokens: trtp.TensorDesc, packed: trtp.TensorDesc, batch: Extent
) -> list[Program]:
    """A program for every schedule, in the order of the tactics."""
    patches, width = _fixed("tokens", tokens, 1) - 1, _fixed("tokens", tokens, 2)
    branches, dtypes = _fixed("packed", packed, 0), (DTYPES[image.dtype], DTYPES[tokens.dtype])
    schedules = conv_fusion.schedules(width, dtypes[1])
    return [fuse(batch, patches, width, branches, *dtypes, tiles) for tiles in schedules]


def _offer(tensors: Sequence[trtp.TensorDesc], programs: Sequence[Program]) -> list[trtp.AutoTuneCombination]:
    """The types of the network, which are fixed, and the tactics that a plugin can launch."""
    fits = [compile_kernel(program, _target()).fits for program in programs]
    tactics = [index for index, fit in enumerate(fits, start=1) if fit]
    if not tactics:
        raise BuildError("plugins: no schedule fits a plugin's shared memory; build with --plugins off")
    types = ",".join(NAMES[tensor.dtype] for tensor in tensors)
    return [trtp.AutoTuneCombination(types, "LINEAR", tactics)]


def _launch(programs: Sequence[Program], tactic: int) -> Launched:
    """Code and launch of one tactic; its extents are expressions of the inputs' shapes."""
    program = programs[tactic - 1]
    kernel = compile_kernel(program, _target())
    scalars = trtp.SymIntExprs(len(program.scalars))
    for index, extent in enumerate(program.scalars.values()):
        scalars[index] = trtp.SymInt32(extent)
    x, y, z = program.grid
    launch = trtp.KernelLaunchParams(x, y, z, block_x=kernel.threads, shared_mem=kernel.shared)
    return kernel.entry, kernel.ptx, launch, scalars


def _target() -> Target:
    if not _targets:
        raise BuildError("plugins: `use` was not called, so no GPU is known to compile for")
    return _targets[0]


def _fixed(name: str, tensor: trtp.TensorDesc, axis: int) -> int:
    extent = tensor.shape[axis]
    if extent < 1:
        raise BuildError(f"plugins: dimension {axis} of {name} is {extent}; expected one that does not vary")
    return int(extent)


def _typical(tensor: trtp.TensorDesc, axis: int) -> int:
    """An extent, for a dynamic one that of the profile's optimum."""
    return int((tensor.shape.opt if tensor.shape.is_dynamic else tensor.shape)[axis])
