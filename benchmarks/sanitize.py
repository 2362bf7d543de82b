"""The compiled code under two sanitizers, of addresses and of undefined behaviour.

`python -m benchmarks.sanitize --out FILE`

Compiles engine/_native with both (GCC or Clang and pybind11 are needed), loads it into a Python whose malloc
is AddressSanitizer's, and calls it with drawn sizes, strides, bands and images of Pillow's, each array by
itself on the heap, and with absurd arguments. A read or write of a byte that is not the caller's, an overflow
or a bad shift ends the child; so does an answer other than Pillow's, and an error of an unexpected kind.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.results import ResultFile
from engine.inputs.network_input import _levels
from engine.inputs.preprocess import CLIP_MEAN, CLIP_STD, normalize_image, resize_image

SOURCES = Path(__file__).resolve().parent.parent / "engine" / "_native"
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1")
CASES, ABSURD, LARGEST, SEED = 4000, 40_000, 900, 0
REFUSALS = (ValueError, TypeError, BufferError)
# Leaks are Python's own; the rest is as strict as it gets.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=1"}


def compile_into(folder: Path, compiler: str) -> Path:
    """The extension with both sanitizers."""
    import pybind11

    made = folder / f"_resample{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    command = [compiler, "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
    sources = map(str, sorted(SOURCES.glob("*.cpp")))
    subprocess.run([*command, *FLAGS, *includes, *sources, "-o", str(made)], check=True)
    return made


def preloads(compiler: str) -> str:
    """The sanitizer's library, which must come before any other, and C++'s, whose throw it wraps."""
    paths = []
    for names in (("libasan.so", "libclang_rt.asan.so"), ("libstdc++.so.6",)):
        commands = [[compiler, f"-print-file-name={name}"] for name in names]
        found = [
            subprocess.run(x, capture_output=True, text=True, check=True).stdout.strip() for x in commands
        ]
        paths += [path for path in found if Path(path).is_absolute()][:1]
    return ":".join(paths)


def load(path: Path) -> Any:
    """The module in a file."""
    spec = importlib.util.spec_from_file_location("_resample", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} is no module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw_side(random: np.random.Generator) -> int:
    """One pixel up to LARGEST, small ones as often as large ones."""
    return int(np.exp(random.uniform(0, np.log(LARGEST))))


def draw_bands(random: np.random.Generator, pixels: np.ndarray) -> list[Any]:
    """The rows of a picture in one of the forms that are allowed."""
    height, width, _ = pixels.shape
    form = random.integers(6)
    if form == 0:
        return [Image.fromarray(pixels).__arrow_c_array__()]
    if form == 1:
        wide = np.empty((height, width + int(random.integers(1, 9)), 3), np.uint8)
        wide[:, -width:] = pixels
        return [wide[:, -width:]]
    if form == 2:
        return [pixels[::-1].copy()[::-1]]
    if form == 3:
        odd = np.empty(pixels.size + 1, np.uint8)[1:].reshape(pixels.shape)
        odd[...] = pixels
        return [odd]
    cuts = sorted(random.integers(0, height + 1, int(random.integers(0, 5))))
    bands = np.split(pixels, cuts)
    return [Image.fromarray(x).__arrow_c_array__() if form == 4 and len(x) else x.copy() for x in bands]


def right_cases(module: Any, random: np.random.Generator, count: int) -> Counter[str]:
    """Allowed calls; every answer must be Pillow's."""
    done: Counter[str] = Counter()
    for _ in range(count):
        width, height = draw_side(random), draw_side(random)
        size = int(random.choice([1, 2, 3, 5, 16, 31, 64, 224, 256]))
        dtype = np.dtype(random.choice(["float32", "float16"]))
        passes = str(random.choice(module.passes()))
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        out = np.empty((3, size, size), dtype)
        module.resample(
            draw_bands(random, pixels), width, height, _levels(CLIP_MEAN, CLIP_STD, dtype), out, passes=passes
        )
        if not np.array_equal(
            out, normalize_image(resize_image(Image.fromarray(pixels), size)).astype(dtype)
        ):
            raise RuntimeError(f"{width} x {height} to {size}, {passes}, {dtype}: other bits than Pillow's")
        done[passes] += 1
    return done


def bands_of(pixels: np.ndarray) -> list[Any]:
    """Bands that are right, and others."""
    image = Image.fromarray(pixels)
    capsules = image.__arrow_c_array__()
    strided = np.lib.stride_tricks.as_strided
    bands: list[Any] = [[pixels], [pixels[:4], pixels[4:]], [capsules], [pixels.data], iter([pixels])]
    bands += [[], [pixels[:3]], [pixels, pixels], [None], [1], [()], [(1, 2)], [("a", "b", "c")], [b"123"]]
    bands += [5, None, [pixels[:, ::2]], [pixels[:, ::-1]], [pixels[..., ::-1]], [pixels.astype(np.int32)]]
    bands += [
        [pixels[0]],
        [pixels.T],
        [pixels[:0]],
        [pixels[:, :0]],
        [bytearray(pixels.size)],
        [capsules[::-1]],
    ]
    bands += [[image.convert(mode).__arrow_c_array__()] for mode in ("L", "RGBA", "CMYK", "F", "I", "1")]
    bands += [[strided(pixels, pixels.shape, (0, 3, 1))], [strided(pixels[8:], pixels.shape, (-21, 3, 1))]]
    return bands


def tables_of(levels: np.ndarray) -> list[Any]:
    """Levels that are right, and others."""
    tables: list[Any] = [levels, levels.astype(np.float16), levels.astype(np.float64), levels.astype(">f4")]
    tables += [levels[:2], levels[:, :255], levels[:, ::2], levels.T, levels.ravel(), None, b"1" * 3072]
    return [*tables, np.lib.stride_tricks.as_strided(levels, levels.shape, (0, 0))]


def outs_of(out: np.ndarray) -> list[Any]:
    """Outputs that are right, and others."""
    frozen = out.copy()
    frozen.flags.writeable = False
    odd = np.zeros(out.nbytes + 1, np.uint8)[1:].view(out.dtype).reshape(out.shape)
    outs: list[Any] = [out, out.astype(np.float16), np.zeros((3, 1, 1), np.float32), frozen, odd, out[:2]]
    outs += [out[:, :7], out[..., ::2], out.transpose(2, 1, 0), out.astype(np.float64), out.astype(np.uint8)]
    outs += [out.astype(">f4"), out[None], out[0], out[:, :0, :0], bytearray(out.nbytes), None, 3]
    huge = np.empty((3, 2049, 2049), np.float32)
    return [*outs, np.lib.stride_tricks.as_strided(out, out.shape, (0, 0, 0)), huge]


def pools(random: np.random.Generator) -> dict[str, list[Any]]:
    """For each argument what is right (first), and what is wrong, or right beside certain others."""
    sides = [0, 1, -1, 2, 8, 63, 189, 65536, 65537, 2**31 - 1, -(2**31), 2**31, 2**63, 1.5, "7", None]
    return {
        "bands": bands_of(random.integers(0, 256, (9, 7, 3), dtype=np.uint8)),
        "width": [7, 9, *sides],
        "height": [9, 7, *sides],
        "levels": tables_of(np.zeros((3, 256), np.float32)),
        "out": outs_of(np.zeros((3, 8, 8), np.float32)),
        "passes": [None, "plain", "avx2", "sse4", "neon", "", "x" * 10_000, 1, b"avx2"],
    }


def absurd_cases(module: Any, random: np.random.Generator, count: int) -> Counter[str]:
    """Calls with some arguments drawn from the pools; what is refused must be so by a plain error."""
    found: Counter[str] = Counter()
    for index in range(count):
        if index % 1000 == 0:
            drawn = pools(random)
        call = {name: values[0] for name, values in drawn.items()}
        for name in random.choice(list(drawn), int(random.integers(1, 4)), replace=False):
            call[name] = drawn[name][random.integers(len(drawn[name]))]
        try:
            module.resample(**call)
            found["accepted"] += 1
        except REFUSALS as error:
            found[type(error).__name__] += 1
    return found


def child(path: Path, cases: int, absurd: int, seed: int) -> None:
    """What runs under the sanitizers; prints its counts."""
    module, random = load(path), np.random.default_rng(seed)
    right = right_cases(module, random, cases)
    print(json.dumps({"right": right, "absurd": absurd_cases(module, random, absurd)}))


def report_in(text: str) -> str:
    """What a sanitizer found and where, or the end of a traceback."""
    lines = text.splitlines()
    found = [i for i, line in enumerate(lines) if "Sanitizer" in line or "runtime error" in line]
    return "\n".join(lines[found[0] : found[0] + 12] if found else lines[-5:])[:3000]


def main() -> int:
    """Compile, run the child, write and print; 1 if a sanitizer or a check found something."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--cases", type=int, default=CASES, help="allowed calls (%(default)s)")
    parser.add_argument("--absurd", type=int, default=ABSURD, help="absurd calls (%(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="%(default)s")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child, options.cases, options.absurd, options.seed)
        return 0
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"
    result, started = ResultFile(options.out), time.perf_counter()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    record: dict[str, Any] = {"compiler": version.splitlines()[0], "flags": FLAGS, "seed": options.seed}
    with tempfile.TemporaryDirectory() as folder, result.case("sanitizers"):
        made = compile_into(Path(folder), compiler)
        numbers = [f"--{name}={getattr(options, name)}" for name in ("cases", "absurd", "seed")]
        command = [sys.executable, "-m", "benchmarks.sanitize", "--out=-", f"--child={made}", *numbers]
        environment = {**os.environ, **OPTIONS, "LD_PRELOAD": preloads(compiler)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {report_in(done.stderr)}")
        record |= json.loads(done.stdout.splitlines()[-1])
    record["seconds"] = round(time.perf_counter() - started, 1)
    result.save(record)
    print(json.dumps(record, indent=1))
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
