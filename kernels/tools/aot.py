"""Ahead-of-time compilation of the kernels, on any machine: `python -m kernels.tools.aot [--json]`.

A launcher is called with tensors without data and with a recorder in the kernel's place; what it would have
launched is compiled for each compute capability, and the assembler's report is read: registers, stack
(spills), shared memory. With `--json` and the Triton that torch requires (the extra `test`) it makes
benchmarks/results/kernels-aot.jsonl.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import (
    attention,
    conv_fusion,
    gaussian_guidance,
    gelu,
    latent_pool,
    quantize,
    residual_norm,
    resize,
)
from kernels.jit import DTYPES, TARGETS
from kernels.resize_tables import FIELDS, Tables
from kernels.rows import E4M3_CAPABILITY, TOPS

WARP = 32
ALIGNMENT = 16  # bytes of a pointer, and the divisor of an integer, that the compiler is told of
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)", re.MULTILINE)
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int8: "i8",
    torch.float8_e4m3fn: "e4m3",
}


@dataclass(frozen=True)
class Launch:
    """A recorded launch: its grid, and the arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class Recorder:
    """Stands where a launcher expects a kernel."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[Launch] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Record instead of launching."""
        return lambda **arguments: self.launches.append(Launch(self.kernel, grid, arguments))


def record(launcher: Callable[..., Any], kernel: Any, *arguments: Any, **options: Any) -> Launch:
    """The one launch of `launcher`, whose tensors may be without data (device "meta")."""
    recorder = Recorder(kernel)
    launcher(recorder, *arguments, **options)
    (launch,) = recorder.launches
    return launch


REPORTED = ("name", "capability", "registers", "stack", "shared", "instructions")  # of the report


@dataclass(frozen=True)
class Built:
    """One compiled kernel: its names, its code, and the assembler's report; stack and shared are in bytes."""

    name: str
    capability: int
    registers: int
    stack: int
    shared: int
    instructions: int
    entry: str
    ptx: str


def compile_launch(name: str, launch: Launch, capability: int) -> Built:
    """Compile a recorded launch for `capability`, 90 for 9.0."""
    arguments = launch.arguments
    if "NATIVE" in arguments:
        arguments = arguments | {"NATIVE": (capability // 10, capability % 10) >= E4M3_CAPABILITY}
    compiled = compile_arguments(replace(launch, arguments=arguments), capability)
    registers, stack, instructions = resources(compiled.asm["cubin"])
    return Built(
        name,
        capability,
        registers,
        stack,
        compiled.metadata.shared,
        instructions,
        compiled.metadata.name,
        compiled.asm["ptx"],
    )


def compile_arguments(
    launch: Launch, capability: int, scalars: Collection[str] | None = None, **options: Any
) -> Any:
    """Triton's compiled kernel of a launch; `scalars` names the only numbers that stay arguments.

    None leaves all that torch's launch would leave. An argument's recorded value tells what divides it.
    """
    options |= {k: v for k, v in launch.arguments.items() if k in ("num_warps", "num_stages")}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or _compiled_in(parameter.name, value, scalars):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = type_of(value)
        if isinstance(value, Tensor) or (type(value) is int and value % ALIGNMENT == 0):
            attributes[(index,)] = [["tt.divisibility", ALIGNMENT]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)


def _compiled_in(name: str, value: Any, scalars: Collection[str] | None) -> bool:
    if value is None or isinstance(value, Tensor):
        return value is None
    return name not in scalars if scalars is not None else type(value) is int and value == 1


def type_of(value: Any) -> str:
    """Triton's name of an argument's type."""
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers a thread, bytes of stack and local memory, and instructions, by NVIDIA's disassembler."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if usage is None:
        raise ValueError(f"expected REG, STACK and LOCAL in the report, got {report[:200]!r}")
    registers, stack, local = map(int, usage.groups())
    instructions = INSTRUCTION.findall(report)
    return registers, stack + local, len(instructions) - instructions.count("NOP")


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases(dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[tuple[str, Launch]]:
    """Every kernel at the shapes of the base networks, B = 64, 50 tokens."""
    for dtype in dtypes:
        yield from ((f"{name}-{TYPES[dtype]}", launch) for name, launch in _cases(dtype))


def _cases(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    image, text = (_empty(64, length, 768, dtype=dtype) for length in (257, 50))
    yield from _attention_cases(image, text)
    packed = _empty(1, 768, 5, 16, dtype=dtype)
    pixels = _empty(64, 3, 256, 256, dtype=dtype)
    kernel = conv_fusion._fusion_kernel
    yield "conv-fusion", record(conv_fusion.launch, kernel, pixels, image, packed)
    box, norm = _empty(64, 4, dtype=torch.float32), _empty(768, dtype=torch.float32)
    first, first_bias = _empty(64, 1, 4, 4, dtype=dtype), _empty(64, dtype=dtype)
    kernel = gaussian_guidance._guidance_kernel
    yield "gaussian-guidance", record(gaussian_guidance.launch, kernel, box, first, first_bias, 256)
    query, kernel = _empty(12, 768, dtype=torch.float32), latent_pool._pool_kernel
    yield "latent-pool", record(latent_pool.launch, kernel, image[:, 1:], norm, norm, query)
    yield from _row_cases(image)
    yield from _resize_cases(dtype)


def _attention_cases(image: Tensor, text: Tensor) -> Iterator[tuple[str, Launch]]:
    """With and without masks, map and bias; heads of 192 are those of neighbours, 16 of 256 patches each."""
    mask, pairs = _empty(64, 50, dtype=torch.int64), _empty(64, 256, 256, dtype=torch.bool)
    kernel = attention._attention_kernel
    yield "attention-257x257", record(attention.launch, kernel, image, image, image, 12)
    yield "attention-257x257-d96", record(attention.launch, kernel, image, image, image, 8)
    yield "attention-50x257", record(attention.launch, kernel, text, image, image, 12)
    yield "attention-257x50-mask", record(attention.launch, kernel, image, text, text, 12, mask)
    yield "attention-50x257-map", record(attention.launch, kernel, text, image, image, 12, guided=True)
    bias = _empty(12, 257, 257, dtype=image.dtype)
    yield "attention-257x257-bias", record(attention.launch, kernel, image, image, image, 12, bias=bias)
    patches, few = image[:, 1:], _empty(64, 16, 768, dtype=image.dtype)
    yield (
        "attention-256x256-pairs-d192",
        record(attention.launch, kernel, patches, patches, patches, 4, pairs),
    )
    one, chosen = few[:, :1], _empty(64, 16, dtype=torch.bool)
    yield "attention-1x16-mask-d192", record(attention.launch, kernel, one, few, few, 4, chosen)


def _row_cases(x: Tensor) -> Iterator[tuple[str, Launch]]:
    """Norms of the base and the tiny width and of the widest, activations, and their codes."""
    for width in (128, 768, 4096):
        row, vector = _empty(64, 257, width, dtype=x.dtype), _empty(width, dtype=torch.float32)
        arguments = (residual_norm._norm_kernel, row, row, vector, vector, 1e-6, vector)
        yield f"norm-{width}", record(residual_norm.launch, *arguments, summed=True)
    vector, scale = _empty(768, dtype=torch.float32), _empty(1, dtype=torch.float32)
    norm = (residual_norm._norm_kernel, x, x, vector, vector, 1e-6)
    yield "norm-768-post", record(residual_norm.launch, *norm)
    active = (gelu._gelu_kernel, _empty(64, 257, 3072, dtype=x.dtype), _empty(3072, dtype=x.dtype))
    yield "gelu-3072", record(gelu.launch, *active)
    for codes in TOPS:
        for suffix, given in (("own", None), ("given", scale)):
            name = f"{TYPES[codes]}-{suffix}"
            options = {"dtype": codes, "scale": given}
            yield f"norm-768-{name}", record(residual_norm.launch, *norm, summed=True, **options)
            yield f"gelu-3072-{name}", record(gelu.launch, *active, **options)
            yield f"quantize-768-{name}", record(quantize.launch, quantize._quantize_kernel, x, **options)


def _resize_cases(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """Images of 640 x 480."""
    pixels = _empty(64 * 480 * 640 * 3, dtype=torch.uint8)
    tables = Tables(
        _empty(64, FIELDS, dtype=torch.int64),
        _empty(22 * 256, dtype=torch.int32),
        _empty(3, 256, dtype=torch.float32),
    )
    middle = _empty(64 * 480 * 3 * 256, dtype=torch.uint8)
    if dtype == torch.float16:  # once: the first pass knows bytes alone
        lines = (resize._line_kernel, pixels, tables, 256, 64 * 480, 480)
        yield "resize-lines", record(resize.launch_lines, *lines)
    out = _empty(64, 3, 256, 256, dtype=dtype)
    yield "resize-cross", record(resize.launch_cross, resize._cross_kernel, middle, tables, 256, out)


def build(
    targets: Iterable[int], dtypes: Sequence[torch.dtype], only: Sequence[str] = ("",)
) -> Iterator[Built]:
    """Compile every case whose name starts with one of `only`, for every target."""
    selected = [case for case in cases(dtypes) if case[0].startswith(tuple(only))]
    for capability in targets:
        for name, launch in selected:
            yield compile_launch(name, launch, capability)


def main() -> None:
    """Print the table or the records."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.tools.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one record a line")
    parser.add_argument(
        "--targets",
        type=int,
        nargs="+",
        choices=TARGETS,
        default=TARGETS,
        metavar="CC",
        help="compute capabilities, 89 for 8.9: %(default)s",
    )
    names = {TYPES[dtype]: dtype for dtype in DTYPES}
    parser.add_argument("--dtypes", choices=tuple(names), nargs="+", default=tuple(names), help="%(default)s")
    parser.add_argument("--only", nargs="+", default=("",), help="how the names of the kernels start")
    options = parser.parse_args()
    available = [name for name, _ in cases([names[name] for name in options.dtypes])]
    if not any(name.startswith(tuple(options.only)) for name in available):
        parser.error(f"--only: no kernel's name starts so; expected one of {', '.join(available)}")
    if not options.json:
        sys.stdout.write("  ".join(f"{field:>24}" for field in (*REPORTED, "triton")) + "\n")
    for built in build(options.targets, [names[name] for name in options.dtypes], options.only):
        values = {field: getattr(built, field) for field in REPORTED}
        values["triton"] = triton.__version__
        line = json.dumps(values) if options.json else "  ".join(f"{v!s:>24}" for v in values.values())
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
