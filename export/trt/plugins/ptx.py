"""A program's PTX as TensorRT and the CUDA driver take it: no hidden parameters, no newer than the driver.

Triton ends a kernel's parameters with pointers to scratch memory of its own, which no plugin passes; where
nothing reads them they go. So does the debug information, which names files of the building machine.
"""

from __future__ import annotations

import logging
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton.backends.nvidia.compiler import get_ptxas, ptx_get_version

from engine.errors import BuildError
from engine.files import unfinished
from export.trt.plugins.programs import Program
from kernels.jit import TARGETS
from kernels.tools.aot import WARP, resources

logger = logging.getLogger(__name__)

SHARED_LIMIT = 48 * 1024  # bytes a block gets without asking the driver for more
_LINES = re.compile(r"^\s*\.(?:loc|file)\s.*\n", re.MULTILINE)
_SECTIONS = re.compile(r"^\s*\.section\s+\.debug_\w+\s*\{[^}]*\}\n?", re.MULTILINE)
_OLDEST_ISA = {100: 86, 120: 87}  # that knows these GPUs
_OLDEST = 80  # what Triton writes for the others
_DRIVER_STEP = 1000  # a driver's version is 1000 * major + 10 * minor


@dataclass(frozen=True)
class Target:
    """A GPU: its compute capability, 90 for 9.0, and the newest PTX that its driver reads, 87 for 8.7."""

    capability: int
    isa: int


@dataclass(frozen=True)
class Kernel:
    """Code of one tactic and what its launch needs: threads a block, bytes of shared memory."""

    entry: str
    ptx: str
    threads: int
    shared: int

    @property
    def fits(self) -> bool:
        """Whether a plugin can launch it."""
        return self.shared <= SHARED_LIMIT


def target_of(capability: int, driver: int) -> Target:
    """The target of a GPU whose driver reports the CUDA version `driver`, 13000 for 13.0.

    Raises BuildError for a GPU that the kernels are not compiled for, and for a driver too old for it.
    """
    if capability not in TARGETS:
        expected = ", ".join(f"{c / 10:.1f}" for c in TARGETS)
        raise BuildError(
            f"plugins: expected a GPU of compute capability {expected}, got {capability / 10:.1f}"
        )
    version = f"{driver // _DRIVER_STEP}.{driver % _DRIVER_STEP // 10}"
    oldest, read = _OLDEST_ISA.get(capability, _OLDEST), ptx_get_version(version)
    if read < oldest:
        raise BuildError(
            f"plugins: this GPU needs PTX {oldest / 10} and its driver (CUDA {version}) reads {read / 10}; "
            "update the driver, or build with --plugins off"
        )
    return Target(capability, min(read, ptx_get_version(get_ptxas(capability).version)))


def compile_kernel(program: Program, target: Target) -> Kernel:
    """Compile a program and trim its PTX.

    Raises BuildError where the code needs memory or parameters that no plugin provides, or newer PTX.
    """
    compiled = program.compile(target.capability, ptx_version=target.isa)
    about = compiled.metadata
    ptx = trim(compiled.asm["ptx"], about.name, len(program.arguments))
    version = re.search(r"^\.version (\d+)\.(\d+)$", ptx, re.MULTILINE)
    if version is None or int(version[1] + version[2]) > target.isa:
        raise BuildError(f"{about.name}: expected PTX up to {target.isa / 10}, got {version and version[0]}")
    if about.shared > SHARED_LIMIT:
        logger.info(
            "%s, %d warps, %d stages: no tactic: it needs %d bytes of shared memory and a plugin gets %d",
            *(about.name, about.num_warps, about.num_stages, about.shared, SHARED_LIMIT),
        )
    return Kernel(about.name, ptx, WARP * about.num_warps, about.shared)


def trim(ptx: str, entry: str, count: int) -> str:
    """The PTX with `count` parameters of its entry left, and without debug information.

    Raises BuildError where the code reads a parameter past them: a kernel with scratch memory is no plugin.
    """
    plain = _SECTIONS.sub("", _LINES.sub("", ptx))
    parameters = re.search(rf"(?<=\.entry {re.escape(entry)}\(\n).*?(?=\n\))", plain, re.DOTALL)
    declared = [] if parameters is None else parameters[0].split(",\n")
    if parameters is None or len(declared) < count:
        raise BuildError(f"{entry}: expected {count} parameters in its PTX, got {len(declared)}")
    body = plain[parameters.end() :]
    for parameter in declared[count:]:
        name = parameter.split()[-1]
        if re.search(rf"\b{name}\b", body):
            raise BuildError(f"{entry} reads its hidden parameter {name}: it needs scratch memory")
    return plain[: parameters.start()] + ",\n".join(declared[:count]) + body


def assemble(kernel: Kernel, capability: int) -> tuple[int, int, int]:
    """Registers a thread, bytes of stack and instructions of the trimmed PTX, by NVIDIA's assembler.

    Raises BuildError where it refuses the code.
    """
    with tempfile.TemporaryDirectory() as folder, unfinished(Path(folder)):
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(kernel.ptx)
        architecture = re.search(r"^\.target (\w+)", kernel.ptx, re.MULTILINE)
        command = [get_ptxas(capability).path, f"-arch={architecture and architecture[1]}"]
        done = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(f"{kernel.entry}: the assembler refuses the code: {done.stderr[:500]}")
        return resources(cubin.read_bytes())
