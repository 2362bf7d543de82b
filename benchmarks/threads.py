"""Whether threads at once get what one thread gets: `python -m benchmarks.threads --out FILE`.

16 threads make 1,000 calls each of one tiny float32 network, through `Predictor.predict` and through a
Batcher with batches of one pair, so that every batch has the shape of the serial one. Python switches between
the threads as often as it can. Every answer is compared bit for bit with the serial answer. Rows of
other backends and ways stay in FILE.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.batcher import WORDS
from benchmarks.results import ResultFile
from engine import Batcher, Prediction, Predictor
from export.options import ExportOptions
from export.pipeline import export_bundle

SWITCH_S = 1e-6
PAIRS = 16
BACKENDS, WAYS = ("ort", "torch"), ("Predictor", "Batcher")

Pairs = Sequence[tuple[Image.Image, str]]
Predict = Callable[[Image.Image, str], Prediction]


@contextmanager
def switching() -> Iterator[None]:
    """Have Python offer the interpreter to another thread after each microsecond."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def draw_pairs(count: int) -> Pairs:
    """Pairs of different images and caption lengths, the same at each call."""
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (48, 64, 3), np.uint8)) for _ in range(count)]
    return [(image, " ".join(random.choice(WORDS, 1 + 2 * i))) for i, image in enumerate(images)]


def same(left: Prediction, right: Prediction) -> bool:
    """Whether two predictions agree bit for bit, with the heat map, which == leaves out."""
    maps = [b"" if p.heatmap is None else p.heatmap.tobytes() for p in (left, right)]
    return left == right and maps[0] == maps[1]


def count_differing(predict: Predict, pairs: Pairs, threads: int, calls: int) -> int:
    """How many answers of `threads` threads with `calls` calls each differ from the serial ones."""
    serial = [predict(*pair) for pair in pairs]

    def work(first: int) -> int:
        order = [(first + i) % len(pairs) for i in range(calls)]
        return sum(not same(predict(*pairs[i]), serial[i]) for i in order)

    with switching(), ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, range(threads)))


def measure(
    bundle: Path, backend: str, ways: Sequence[str], threads: int, calls: int
) -> Iterator[dict[str, Any]]:
    """Rows: what differed, of how many calls, for each of `ways`."""
    with (
        Predictor(bundle, backend=backend, device="cpu", thumbnail=0) as predictor,
        Batcher(predictor, max_batch=1) as batcher,
    ):
        for way in ways:
            predict = (predictor if way == "Predictor" else batcher).predict
            started = time.perf_counter()
            differing = count_differing(predict, draw_pairs(PAIRS), threads, calls)
            seconds = round(time.perf_counter() - started, 1)
            counts = {"threads": threads, "calls_each": calls, "differing": differing}
            yield {"backend": backend, "way": way, **counts, "seconds": seconds}


def main() -> int:
    """Export, measure, write and print; 1 if an answer differed or a case failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--threads", type=int, default=16, help="%(default)s")
    parser.add_argument("--calls", type=int, default=1000, help="of each thread, %(default)s")
    parser.add_argument("--backend", nargs="+", default=BACKENDS, choices=BACKENDS, help="both by default")
    parser.add_argument("--way", nargs="+", default=WAYS, choices=WAYS, help="both by default")
    options = parser.parse_args()
    result = ResultFile(options.out)
    rows = [
        row
        for row in result.load("rows")
        if row["backend"] not in options.backend or row["way"] not in options.way
    ]
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export_bundle(ExportOptions(bundle, model="asap", size="tiny", engine=False), lambda stage: None)
        for backend in options.backend:
            with result.case(backend):
                for row in measure(bundle, backend, options.way, options.threads, options.calls):
                    rows.append(row)
                    print(row, flush=True)
                    if row["differing"]:
                        result.fail(backend, row["way"], error=f"{row['differing']} answers differ")
                    result.save({"network": "asap tiny fp32", "switch_interval_s": SWITCH_S, "rows": rows})
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
