"""The code that goes into TensorRT engines, launched as TensorRT does, against torch's operators and float64.

Same PTX, arguments and grid as the plugins' (export/trt/plugins), through the CUDA driver: what TensorRT
itself adds is left to a machine that has it. Outputs start as NaN between sentinel values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.driver import Driver
from benchmarks.kernels.bench import HEADS, PATCHES, WIDTH, draw
from export.trt.plugins.programs import ATTENTION, FUSION, Program, attend, fuse
from export.trt.plugins.ptx import Kernel, Target, compile_kernel, target_of
from kernels import attention, conv_fusion
from kernels.jit import DTYPES

SIZE = 256
RATIO = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # RMS of the error over RMS
GUARD, SENTINEL = 64, -77.0
CAPTIONS = ((1, 1), (2, 7), (7, 128), (64, 50), (64, 63))
BATCHES = (1, 7, 64)

Row = dict[str, Any]
Tensors = dict[str, Tensor]


def check(device: str = "cuda") -> Iterator[Row]:
    """A row for every operator, type, tactic and shape; RuntimeError at the end where one is wrong."""
    driver, (major, minor) = Driver(), torch.cuda.get_device_capability()
    target = target_of(10 * major + minor, driver.version())
    wrong = []
    for dtype in DTYPES:
        for row in (
            *_attention_rows(driver, target, dtype, device),
            *_fusion_rows(driver, target, dtype, device),
        ):
            wrong += [] if row["right"] else [str(row)]
            yield {"dtype": str(dtype), "isa": target.isa, **row}
    if wrong:
        raise RuntimeError("; ".join(wrong))


def run(driver: Driver, kernel: Kernel, program: Program, tensors: Tensors) -> Tensors:
    """Launch a compiled program on torch's stream; its outputs, of the shapes of those in `tensors`.

    Raises RuntimeError where the kernel writes outside them.
    """
    whole = {name: _fenced(tensors[name]) for name in program.outputs}
    outputs = {name: buffer[GUARD:-GUARD].view(tensors[name].shape) for name, buffer in whole.items()}
    values = {**tensors, **outputs, **program.scalars}
    function = driver.load(kernel.ptx, kernel.entry)
    stream = torch.cuda.current_stream().cuda_stream
    arguments = [values[name] for name in program.arguments]
    driver.launch(function, program.grid, kernel.threads, kernel.shared, stream, arguments)
    torch.cuda.synchronize()
    for name, buffer in whole.items():
        if not (buffer[:GUARD] == SENTINEL).all() or not (buffer[-GUARD:] == SENTINEL).all():
            raise RuntimeError(f"{kernel.entry} writes outside {name}")
    return outputs


def _fenced(like: Tensor) -> Tensor:
    buffer = like.new_full((like.numel() + 2 * GUARD,), SENTINEL)
    buffer[GUARD:-GUARD] = float("nan")
    return buffer


def _attention_rows(driver: Driver, target: Target, dtype: torch.dtype, device: str) -> Iterator[Row]:
    for batch, queries in CAPTIONS:
        query = draw(device, dtype, batch, queries, WIDTH)
        key, value = (draw(device, dtype, batch, PATCHES, WIDTH) for _ in range(2))
        torchs = attention.guided_attention(query, key, value, HEADS)
        exact = attention.attention_ref(query.double(), key.double(), value.double(), HEADS)
        tensors = {"query": query, "key": key, "value": value, "out": torchs[0], "guide": torchs[1]}
        for tactic, tiles in enumerate(attention.schedules(50, PATCHES, WIDTH // HEADS, dtype), start=1):
            program = attend(batch, queries, PATCHES, WIDTH, HEADS, dtype, tiles)
            facts = {"operator": ATTENTION, "tactic": tactic, "batch": batch, "queries": queries}
            yield facts | _judge(driver, target, program, tensors, exact)


def _fusion_rows(driver: Driver, target: Target, dtype: torch.dtype, device: str) -> Iterator[Row]:
    places = draw(device, dtype, WIDTH, 3, 5, 5, scale=0.1)
    pads = ((x, 1 - x, y, 1 - y) for y in (0, 1) for x in (0, 1))
    weight = torch.cat([torch.nn.functional.pad(places, pad) for pad in pads])
    bias = draw(device, dtype, WIDTH).repeat(4)
    for batch in BATCHES:
        image, tokens = draw(device, dtype, batch, 3, SIZE, SIZE), draw(device, dtype, batch, PATCHES, WIDTH)
        torchs = conv_fusion.conv_fusion(image, tokens, weight, bias)
        exact = conv_fusion.conv_fusion_ref(*(x.double() for x in (image, tokens, weight, bias)))
        packed = conv_fusion.pack(weight, bias, WIDTH)
        tensors = {"image": image, "tokens": tokens, "packed": packed, "out": torchs}
        for tactic, tiles in enumerate(conv_fusion.schedules(WIDTH, dtype), start=1):
            program = fuse(batch, PATCHES - 1, WIDTH, 1, dtype, dtype, tiles)
            facts = {"operator": FUSION, "tactic": tactic, "batch": batch}
            yield facts | _judge(driver, target, program, tensors, (exact,))


def _judge(
    driver: Driver, target: Target, program: Program, tensors: Tensors, exact: tuple[Tensor, ...]
) -> Row:
    """Errors of a tactic's outputs from float64, torch's operator beside it, where a plugin can launch it."""
    kernel = compile_kernel(program, target)
    if not kernel.fits:
        return {"right": True, "fits": False, "shared": kernel.shared}
    outputs = run(driver, kernel, program, tensors)
    limit = RATIO[tensors[program.inputs[1]].dtype]
    errors = {name: _error(outputs[name], want) for name, want in zip(program.outputs, exact, strict=True)}
    torchs = {name: _error(tensors[name], want) for name, want in zip(program.outputs, exact, strict=True)}
    right = all(error <= limit for error in errors.values())
    return {"right": right, "fits": True, "shared": kernel.shared, "errors": errors, "torch": torchs}


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())
