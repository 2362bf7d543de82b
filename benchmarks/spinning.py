"""Why int8 in ONNX Runtime shows two speeds: `python -m benchmarks.spinning --out FILE`.

By default a waiting worker thread of ONNX Runtime spins. Alone on the machine that is a little faster; as
soon as something else wants a core, the spinning thread holds it. Times a base int8 network in turns with
spinning on and off, each in a process of its own, alone and beside one busy process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dgm4
from benchmarks.results import ResultFile
from dgm4.config import SIZES
from export.graph.rewrite import rewrite
from export.graph.trace import export_onnx
from export.quantization.dynamic_int8 import quantize_dynamic

TURNS, CALLS, TOKENS = 5, 15, 50
_BUSY = "while True: pass"
_TIME = f"""
import json, sys, time
import numpy, onnxruntime
from engine.backends import usable_cores
from engine.backends.ort import session_options
options = session_options(usable_cores())
options.add_session_config_entry("session.intra_op.allow_spinning", sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
image = numpy.random.default_rng(0).standard_normal((1, 3, 256, 256), dtype=numpy.float32)
ids = numpy.full((1, {TOKENS}), 2000)
feeds = {{"image": image, "input_ids": ids, "attention_mask": numpy.ones_like(ids)}}
session.run(None, feeds)
times = []
for _ in range({CALLS}):
    start = time.perf_counter()
    session.run(None, feeds)
    times.append(time.perf_counter() - start)
print(json.dumps(times))
"""


@contextmanager
def _neighbour(busy: bool) -> Iterator[None]:
    """Keep one core's worth of other work running inside the block, if `busy`."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY]) if busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def measure(graph: Path, busy: bool) -> list[dict[str, Any]]:
    """Time the graph with spinning and without; rows with the medians of every process, in ms."""
    medians: dict[str, list[float]] = {"1": [], "0": []}
    with _neighbour(busy):
        for _ in range(TURNS):
            for spinning, times in medians.items():
                command = [sys.executable, "-c", _TIME, str(graph), spinning]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                times.append(round(1e3 * statistics.median(json.loads(done.stdout)), 1))
    beside = "one busy process" if busy else "nothing"
    return [
        {
            "beside": beside,
            "spinning": spinning == "1",
            "median_ms": statistics.median(times),
            "processes_ms": times,
        }
        for spinning, times in medians.items()
    ]


def main() -> int:
    """Export, measure, write and print; 1 if a situation failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spinning", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--size", default="base", choices=SIZES, help="%(default)s")
    options = parser.parse_args()
    result, rows = ResultFile(options.out), []
    with tempfile.TemporaryDirectory() as folder:
        source, graph = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        export_onnx(rewrite(dgm4.seeded_model("asap", options.size)), source)
        quantize_dynamic(source, graph)
        for busy in (False, True):
            with result.case("one busy process" if busy else "nothing"):
                rows += measure(graph, busy)
            network = f"asap {options.size} int8, one pair, {TOKENS} tokens"
            result.save({"network": network, "rows": rows})
    sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
