"""What the compiler says of every plugin's tactics: `python -m export.trt.plugins`, a JSON record a line.

At the base networks' shapes; registers, stack (spills) and instructions are read from the trimmed PTX,
assembled as on the GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator

import torch
import triton

from export.trt.plugins.programs import ATTENTION, FUSION, Program, attend, fuse
from export.trt.plugins.ptx import Target, assemble, compile_kernel
from kernels import attention, conv_fusion
from kernels.jit import DTYPES, TARGETS
from kernels.tools.aot import TYPES

BATCH, TEXT, PATCHES, WIDTH, HEADS = 64, 50, 257, 768, 12
OLDEST = {80: 82, 86: 82, 89: 82, 90: 82, 100: 87, 120: 87}  # PTX of the oldest drivers that are served


def base_programs(dtype: torch.dtype) -> Iterator[tuple[str, int, Program]]:
    """Operator, tactic and program of every schedule, for the base networks."""
    schedules = attention.schedules(TEXT, PATCHES, WIDTH // HEADS, dtype)
    for tactic, tiles in enumerate(schedules, start=1):
        yield ATTENTION, tactic, attend(BATCH, TEXT, PATCHES, WIDTH, HEADS, dtype, tiles)
    for tactic, tiles in enumerate(conv_fusion.schedules(WIDTH, dtype), start=1):
        yield FUSION, tactic, fuse(BATCH, PATCHES - 1, WIDTH, 1, dtype, dtype, tiles)


def main() -> None:
    """Print the records."""
    parser = argparse.ArgumentParser(prog="python -m export.trt.plugins", description=__doc__)
    parser.add_argument("--targets", type=int, nargs="+", choices=TARGETS, default=TARGETS)
    names = {TYPES[dtype]: dtype for dtype in DTYPES}
    parser.add_argument("--dtypes", nargs="+", choices=tuple(names), default=tuple(names))
    parser.add_argument("--tactics", type=int, nargs="+", help="all by default")
    options = parser.parse_args()
    for capability in options.targets:
        for name in options.dtypes:
            for operator, tactic, program in base_programs(names[name]):
                if options.tactics is None or tactic in options.tactics:
                    sys.stdout.write(json.dumps(_row(operator, name, tactic, program, capability)) + "\n")
                    sys.stdout.flush()


def _row(operator: str, dtype: str, tactic: int, program: Program, capability: int) -> dict[str, object]:
    kernel = compile_kernel(program, Target(capability, OLDEST[capability]))
    registers, stack, instructions = assemble(kernel, capability)
    return {
        "operator": operator,
        "dtype": dtype,
        "tactic": tactic,
        "capability": capability,
        "arguments": program.arguments,
        "parameters": re.findall(r"^\s*\.param \.(\w+)", kernel.ptx, re.MULTILINE),
        "threads": kernel.threads,
        "shared": kernel.shared,
        "fits": kernel.fits,
        "registers": registers,
        "stack": stack,
        "instructions": instructions,
        "triton": triton.__version__,
    }


if __name__ == "__main__":
    main()
