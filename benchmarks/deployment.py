"""What a deployment costs: `python -m benchmarks.deployment --out FILE [--network asap]`.

Exports the base network three times (float16 with an engine where one can be built, int8, float32) and
measures, each in processes of its own: time and peak memory of the export; from process start to the
first answer; peak memory while predicting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.results import ResultFile
from dgm4.config import MODEL_NAMES, SIZES
from engine.errors import BackendError
from engine.packages import install_command
from export.sample import SAMPLE_CAPTION, sample_photograph

STARTS = 5
PRECISIONS = ("fp16", "int8", "fp32")
_SAMPLING_S = 0.02
_SERVE = """
import sys
from engine import Predictor
with Predictor(sys.argv[1]) as predictor:
    for _ in range(int(sys.argv[4])):
        predictor.predict(sys.argv[2], sys.argv[3])
"""


def _resident(root: int) -> int:
    """Resident memory in bytes of a process and all below it; what they share counts once for each."""
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        try:
            fields = Path(f"/proc/{pid}/statm").read_text().split()
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        total += int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
        waiting += map(int, children)
    return total


def measure(command: list[str]) -> dict[str, Any]:
    """Run a command; its wall-clock seconds and the peak of its whole process tree in MB (10^6 bytes)."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    peak = 0
    output: list[bytes] = []
    reader = threading.Thread(target=lambda: output.extend(process.communicate()))
    reader.start()
    while process.poll() is None:
        peak = max(peak, _resident(process.pid))
        time.sleep(_SAMPLING_S)
    seconds = time.perf_counter() - start
    reader.join()
    if process.returncode != 0:
        raise BackendError(f"{' '.join(command[:3])} failed: {output[1].decode(errors='replace')[-2000:]}")
    return {"seconds": round(seconds, 2), "peak_mb": round(peak / 1e6), "stdout": output[0].decode()}


def export(network: str, precision: str, out: Path, size: str = "base") -> dict[str, Any]:
    """Export a network; time, peak memory and the seconds of every stage."""
    command = [sys.executable, "-m", "export.cli", "export", "--model", network, "--size", size, "--drawn"]
    done = measure([*command, "--precision", precision, "--out", str(out), "--json"])
    report = json.loads(done.pop("stdout"))
    engines = [e["file"] for e in report["manifest"]["engines"]]
    return {
        **done,
        "stages": {s["stage"]: s["seconds"] for s in report["stages"]},
        "engine_mb": sum(report["manifest"]["files"][name]["bytes"] for name in engines) / 1e6,
    }


def serve(bundle: Path, picture: Path, pairs: int, runs: int) -> dict[str, Any]:
    """Start a process that answers `pairs` times, `runs` times over; medians and extremes."""
    command = [sys.executable, "-c", _SERVE, str(bundle), str(picture), SAMPLE_CAPTION, str(pairs)]
    done = [measure(command) for _ in range(runs)]
    seconds = [d["seconds"] for d in done]
    return {
        "pairs": pairs,
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "peak_mb": max(d["peak_mb"] for d in done),
    }


def run(result: ResultFile, network: str, folder: Path, size: str = "base") -> dict[str, Any]:
    """Measure one network, writing after every precision."""
    image = sample_photograph()
    if image is None:
        raise BackendError(f"the sample photograph needs scikit-image: {install_command('export')}")
    record: dict[str, Any] = {"network": network}
    for precision in PRECISIONS:
        bundle = folder / precision
        with result.case(precision):
            record[precision] = {"export": export(network, precision, bundle, size)}
            if precision != "fp16":
                record[precision]["first_answer"] = serve(bundle, image, pairs=1, runs=STARTS)
                record[precision]["ten_answers"] = serve(bundle, image, pairs=10, runs=1)
        result.save(record)
    return record


def main() -> int:
    """Measure, write the data, print it; 1 if a precision failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deployment", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--network", default="asap", choices=MODEL_NAMES)
    parser.add_argument("--size", default="base", choices=SIZES, help="%(default)s")
    options = parser.parse_args()
    result = ResultFile(options.out)
    with tempfile.TemporaryDirectory() as folder:
        record = run(result, options.network, Path(folder), options.size)
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
