"""What is checked on the GPU itself: the machine's rates, every kernel once, the tests, the sanitizers."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.bench import Bench, error, measure, sweep
from benchmarks.timing import rates

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = tuple(
    sorted(p.stem for p in (ROOT / "benchmarks/kernels").glob("*.py") if p.stem not in ("__init__", "bench"))
)
CHECKED = "float16 and not bfloat16 and not base and not long"  # tests under a sanitizer: small shapes
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
COMPILERS = 12
WORKERS, NOTHING_SELECTED = "6", 5  # of pytest: processes, and an exit code
SANITIZER_ERROR = "9"  # exit code, unlike any of pytest's
SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"

Row = dict[str, Any]


def gpu_state() -> Row:
    """Name, driver and clocks, as nvidia-smi tells them now; why not, where it does not."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as failure:
        return {"failed": str(failure)}
    return dict(
        zip(QUERY.split(","), (x.strip() for x in done.stdout.splitlines()[0].split(",")), strict=False)
    )


def machine() -> Iterator[Row]:
    """The GPU as torch sees it, versions, and the measured rates."""
    import triton

    about = torch.cuda.get_device_properties(0)
    yield {
        "gpu": about.name,
        "capability": [about.major, about.minor],
        "memory_gb": about.total_memory / 1e9,
        "multiprocessors": about.multi_processor_count,
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__},
    }
    for name, rate in rates():
        yield {"rate": name, "value": rate}


def benches(operator: str, **settings: Any) -> Iterator[Bench]:
    """Benches of one file of benchmarks/kernels."""
    torch.manual_seed(0)
    yield from importlib.import_module(f"benchmarks.kernels.{operator}").benches(**settings)


def smoke(device: str = "cuda") -> Iterator[Row]:
    """The errors of ours, at small and at full shapes; raises RuntimeError where one is too large."""
    wrong = []
    for small in (True, False) if device == "cuda" else (True,):
        for operator in OPERATORS:
            errors: dict[str, float] = {}
            failed = None
            try:
                for bench in benches(operator, device=device, batch=2 if small else 8, small=small):
                    errors[bench.name] = error(bench, next(iter(bench.forms.values())))
                    if not errors[bench.name] <= bench.right:
                        wrong.append(f"{bench.name}: error {errors[bench.name]:.2g}")
            except Exception as failure:  # torch's and Triton's are of many kinds; the rest shall still run
                failed = f"{type(failure).__name__}: {failure}"[:500]
                wrong.append(f"{operator}: {failed}")
            yield {"operator": operator, "small": small, "errors": errors, "failed": failed}
    if wrong:
        raise RuntimeError("; ".join(wrong))


def operator(name: str) -> Iterator[Row]:
    """All forms of an operator, timed."""
    return measure(benches(name))


def tune(name: str) -> Iterator[Row]:
    """All schedules of an operator, timed, after several processes have compiled them into Triton's cache."""
    with ProcessPoolExecutor(COMPILERS, get_context("spawn")) as pool:
        waiting = [pool.submit(_compile, name, index) for index in range(COMPILERS)]
        for future in waiting:
            future.exception()  # what fails here fails below, where it is told
    return sweep(benches(name))


def _compile(name: str, index: int) -> None:
    """Launch every COMPILERS-th schedule of each bench once."""
    for bench in benches(name, batch=1):
        for tiles in bench.candidates[index::COMPILERS]:
            with contextlib.suppress(Exception):
                bench.schedule(tiles)(*bench.inputs)


def tests(*arguments: str, prefix: tuple[str, ...] = ()) -> Iterator[Row]:
    """Run pytest, with several workers unless there is a prefix; counts, what failed, the end of its output.

    Raises RuntimeError where a test fails.
    """
    options = ["-vv", "-p", "no:cacheprovider", "--tb=short", "-rfE"]
    options += ["-o", "timeout=120", "-o", "timeout_method=thread"]  # no signal ends a wait for the device
    options += ["-n", WORKERS] if not prefix and importlib.util.find_spec("xdist") else []
    start = time.perf_counter()
    code, output = _echo([*prefix, sys.executable, "-m", "pytest", *options, *arguments])
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    failed = re.findall(r"^(?:FAILED|ERROR) (.{1,300})", output, re.MULTILINE)
    row = {"arguments": arguments, "code": code, "counts": counts, "failed": failed[:50]}
    yield {**row, "seconds": round(time.perf_counter() - start, 1), "tail": output[-3000:]}
    if code not in (0, NOTHING_SELECTED):
        raise RuntimeError(f"pytest {' '.join(arguments)}: exit code {code}: {failed[:5]}")


def _echo(command: list[str]) -> tuple[int, str]:
    """Exit code and output of a command; the output passes through too, lest it is lost with this process."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        lines = []
        for line in child.stdout or ():
            sys.stdout.write(line)
            lines.append(line)
    return child.returncode, "".join(lines)


def sanitize(tool: str, *files: str) -> Iterator[Row]:
    """The small cases of test files under one of compute-sanitizer's `TOOLS`, where it is installed.

    Every tensor is an allocation of its own: in torch's cache of memory a kernel that leaves one tensor
    would only meet the next, and memory once written would count as initialised for ever.
    """
    program = next(filter(None, map(shutil.which, SANITIZERS)), None)
    if program is None:
        yield {"missing": "compute-sanitizer is not installed"}
        return
    uncached = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
    prefix = (*uncached, program, "--tool", tool, "--error-exitcode", SANITIZER_ERROR)
    yield from tests("-k", CHECKED, *files, prefix=prefix)
