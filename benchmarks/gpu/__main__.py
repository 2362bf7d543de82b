"""The proof on a GPU, in one command: `python -m benchmarks.gpu --out DIR [--minutes 9]`.

Parts, each a file in DIR; a part that is there is not run again, so that the command can go on where it
stopped: machine and rates; the kernels' tests on this GPU; memcheck of some, where compute-sanitizer is
installed; every kernel beside torch's forms; the whole networks beside the published ones. What is there
is joined in DIR/gpu.json. Exit code 1 where a test fails, 4 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import kernels, networks
from benchmarks.gpu.timing import rates
from benchmarks.machine import describe_machine

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/kernels/test_launch.py"
CHECKED = "float16 and not base and not long"  # tests that memcheck runs: small shapes
NETWORKS = ("asap", "cals", "hammer")
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"

Record = dict[str, Any]


def gpu_state() -> dict[str, str]:
    """Name, driver and clocks, as nvidia-smi tells them now."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    return dict(zip(QUERY.split(","), (x.strip() for x in line.split(",")), strict=True))


def machine() -> Record:
    """Machine, GPU, versions and the two measured rates."""
    import triton

    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__}
    return {**describe_machine(), "gpu": gpu_state(), "versions": versions, "rates": rates()}


def run_tests(prefix: list[str], limit_s: float, *selection: str) -> Record:
    """Run the kernels' tests in a process of its own; a fault there leaves this one whole."""
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection, TESTS]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"code": None, "seconds": limit_s, "tail": "out of time"}
    tail = (done.stdout + done.stderr)[-3000:]
    return {"code": done.returncode, "seconds": round(time.perf_counter() - start), "tail": tail}


def memcheck(limit_s: float) -> Record:
    """The small cases under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return {"code": None, "tail": "compute-sanitizer is not installed"}
    return run_tests([tool, "--tool", "memcheck", "--error-exitcode", "9"], limit_s, "-k", CHECKED)


class Parts:
    """Files of finished parts in a folder, and the time that is left."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.end = folder, time.monotonic() + 60 * minutes
        folder.mkdir(parents=True, exist_ok=True)

    def left_s(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()

    def run(self, name: str, part: Callable[[], Any], needs_s: float) -> Any:
        """The part's record; run now unless its file is there or the time does not reach."""
        path = self.folder / f"{name}.json"
        if path.is_file():
            return json.loads(path.read_text())
        if self.left_s() < needs_s:
            sys.stderr.write(f"{name}: not run, {self.left_s():.0f} s are left; run the command again\n")
            return None
        start = time.monotonic()
        record = part()
        path.write_text(json.dumps(record, indent=1) + "\n")
        sys.stderr.write(f"{name}: {time.monotonic() - start:.0f} s\n")
        return record


def main() -> int:
    """Run what is missing, join what is there."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the parts")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no part starts (%(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("benchmarks.gpu: error: no CUDA device is visible; run it on a GPU machine\n")
        return 4
    parts = Parts(options.out, options.minutes)
    joined: Record = {"machine": parts.run("machine", machine, 20)}
    joined["tests"] = parts.run("tests", lambda: run_tests([], parts.left_s()), 60)
    measured = joined["machine"]["rates"] if joined["machine"] else {"copy_tb_s": 4.3, "bf16_tflop_s": 790.0}
    for index, bench in enumerate(kernels.benches()):
        part = partial(kernels.measure, bench, measured["copy_tb_s"], measured["bf16_tflop_s"])
        joined.setdefault("kernels", []).append(parts.run(f"kernel-{index}", part, 30))
    for variant_index, variant in enumerate(networks.VARIANTS):
        for network in NETWORKS:
            run = partial(networks.measure, variant, network, measured["bf16_tflop_s"])
            name = f"network-{variant_index}-{network}"
            joined.setdefault("networks", []).append(parts.run(name, run, 45))
            torch.cuda.empty_cache()
    joined["memcheck"] = parts.run("memcheck", lambda: memcheck(max(parts.left_s(), 1)), 90)
    joined["state_after"] = gpu_state()
    (options.out / "gpu.json").write_text(json.dumps(joined, indent=1) + "\n")
    print(json.dumps(joined["tests"]))
    failed = [r for r in (joined["tests"], joined["memcheck"]) if r and r["code"] not in (0, None)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
