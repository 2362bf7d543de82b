"""What a Triton Inference Server adds to a Predictor: `python -m benchmarks.inference_server --out FILE`.

A genuine server (`benchmarks.tritonserver`) serves a bundle as a Python model on this machine. Callers ask it
over gRPC, each for one pair at a time; beside that the same pairs go through `Predictor.predict_batch` in
this process. The turns are interleaved, and medians of them are written: requests a second, and the
milliseconds of a request.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.results import ResultFile, Row
from benchmarks.timing import quantile
from benchmarks.tritonserver import INSTALL, VARIABLE, TritonServer, server_folder
from engine import Bundle, Predictor
from engine.errors import BackendError
from export.inference_server.config import PYTHON, ServerOptions
from export.inference_server.repository import write_repository

CALLERS = (1, 4, 16)
MODEL = "pairs"
_PAIRS, _SIZE = 32, (640, 480)
_CAPTION = "The defeat at the park brings pleasure to Laura Cook"

Pair = tuple[bytes, bytes]


def make_pairs() -> list[Pair]:
    """JPEG files of drawn blocks, 640 x 480, and captions of ten words."""
    random = np.random.default_rng(0)
    pairs = []
    for number in range(_PAIRS):
        file = io.BytesIO()
        blocks = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize(_SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
        pairs.append((file.getvalue(), f"{_CAPTION} {number}".encode()))
    return pairs


def ask_for(ask: Callable[[Pair], object], pairs: list[Pair], callers: int, seconds: float) -> Row:
    """Let `callers` threads ask one pair after another; the rate, and p50 and p99 of a request."""
    end = time.perf_counter() + seconds

    def work(first: int) -> list[float]:
        times: list[float] = []
        for pair in itertools.islice(itertools.cycle(pairs), first, None):
            started = time.perf_counter()
            if started >= end:
                return times
            ask(pair)
            times.append(1000 * (time.perf_counter() - started))
        return times

    started = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        times = [x for future in [pool.submit(work, i) for i in range(callers)] for x in future.result()]
    rate = len(times) / (time.perf_counter() - started)
    return {"requests_s": rate, "p50_ms": quantile(times, 0.5), "p99_ms": quantile(times, 0.99)}


def predict_for(predictor: Predictor, pairs: list[Pair], seconds: float) -> Row:
    """Predict all pairs in one batch after another; the rate."""
    done, started = 0, time.perf_counter()
    while time.perf_counter() < started + seconds:
        done += len(predictor.predict_batch(pairs))
    return {"requests_s": done / (time.perf_counter() - started)}


def median_rows(turns: list[dict[str, Row]]) -> dict[str, Row]:
    """The median of each number over the turns."""
    return {
        case: {name: round(statistics.median(turn[case][name] for turn in turns), 2) for name in row}
        for case, row in turns[0].items()
    }


def measure(server: TritonServer, predictor: Predictor, turns: int, seconds: float) -> dict[str, Row]:
    """Rates and times by case, "predict_batch" and the number of callers."""
    import tritonclient.grpc as triton

    pairs, rows = make_pairs(), []
    with triton.InferenceServerClient(server.grpc) as client:

        def ask(pair: Pair) -> Any:
            inputs = [triton.InferInput(name, [1, 1], "BYTES") for name in ("image", "caption")]
            for tensor, value in zip(inputs, pair, strict=True):
                tensor.set_data_from_numpy(np.array([[value]], dtype=object))
            return client.infer(MODEL, inputs)

        for case in (*CALLERS, 0):  # everything is warm before the first turn
            ask_for(ask, pairs, case, 1) if case else predict_for(predictor, pairs, 1)
        for _ in range(turns):
            row = {"predict_batch": predict_for(predictor, pairs, seconds)}
            rows.append(row | {f"{n} callers": ask_for(ask, pairs, n, seconds) for n in CALLERS})
        (stats,) = client.get_inference_statistics(MODEL, as_json=True)["model_stats"]
    batches = int(stats["inference_count"]) / int(stats["execution_count"])
    return {**median_rows(rows), "server": {"pairs_a_batch": round(batches, 2)}}


def run(bundle: Bundle, turns: int, seconds: float) -> dict[str, Any]:
    """Serve the bundle and measure."""
    folder = server_folder()
    if folder is None:
        raise BackendError(f"expected a Triton Inference Server: {INSTALL}, then {VARIABLE}=FOLDER")
    info = bundle.manifest.model
    with tempfile.TemporaryDirectory() as place, Predictor(bundle, thumbnail=0) as predictor:
        work, repository = Path(place, "work"), Path(place, "models")
        work.mkdir()
        write_repository({MODEL: bundle}, repository, ServerOptions(form=PYTHON, queue_delay_us=2000))
        with TritonServer(folder, work, f"--model-repository={repository}") as server:
            cases = measure(server, predictor, turns, seconds)
    model = f"{info.name} {info.size} {bundle.manifest.precision}"
    return {"model": model, "turns": turns, "seconds": seconds, "cases": cases}


def table(record: dict[str, Any]) -> str:
    """The rows of the documentation."""
    base = record["cases"]["predict_batch"]["requests_s"]
    lines = ["| | requests/s | of `predict_batch` | p50 | p99 |", "| --- | --- | --- | --- | --- |"]
    lines.append(f"| `predict_batch`, in one process | {base:.0f} | 1.00 | | |")
    for callers in CALLERS:
        row = record["cases"][f"{callers} callers"]
        name = f"{callers} caller{'' if callers == 1 else 's'}"
        rate, times = row["requests_s"], f"{row['p50_ms']:.0f} ms | {row['p99_ms']:.0f} ms"
        lines.append(f"| {name} | {rate:.0f} | {rate / base:.2f} | {times} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, write the data, print it as a table; 1 if it failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference_server", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--bundle", default="demo:asap", help="%(default)s")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="%(default)s")
    parser.add_argument("--seconds", type=float, default=6, metavar="S", help="of each case (%(default)s)")
    options = parser.parse_args()
    result, record = ResultFile(options.out), {}
    with result.case("server"):
        record = run(Bundle.open(options.bundle), options.turns, options.seconds)
        sys.stdout.write(table(record))
    result.save(record)
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
