"""One-pair callers through a Batcher, beside `predict` in threads and `predict_batch`.

`python -m benchmarks.batcher --bundle demo:asap --out FILE`. All ways answer the same pairs in turns of one
run. Ratios are taken turn by turn, and their median. `cpu_ms` is the process's CPU time a pair, which other
work on the machine disturbs less than the clock.

- `lone`: one caller at a time, `Predictor.predict` beside the Batcher.
- `load`: so many callers at once, each sends its next pair when it has the answer.
- `lengths`: captions as they come, of similar length out of two batches, and all sorted by length.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.results import ResultFile
from benchmarks.timing import quantile
from engine import Batcher, Prediction, Predictor

CALLERS = (1, 2, 4, 8, 16, 32, 64)
WORDS = ["the", "president", "speaks", "to", "a", "crowd", "in", "her", "city", "after", "one", "long", "day"]

Pair = tuple[bytes, str]
Predict = Callable[[bytes, str], Prediction]
Row = dict[str, Any]


def draw_pairs(count: int) -> list[Pair]:
    """JPEGs of 640 x 427 pixels, and captions as long as those of news: half have under 20 words."""
    random = np.random.default_rng(0)
    pairs = []
    for words in np.clip(random.lognormal(3, 0.45, count).astype(int), 3, 50):
        coarse = Image.fromarray(random.integers(0, 256, (27, 40, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize((640, 427), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
        pairs.append((file.getvalue(), " ".join(random.choice(WORDS, words))))
    return pairs


class Turn:
    """What one way cost in one turn: pairs a second, CPU time a pair, and the milliseconds of each call."""

    def __init__(self, pairs: int, work: Callable[[], list[float]]) -> None:
        clock, cpu = time.perf_counter(), time.process_time()
        self.latencies = work()
        self.rate = pairs / (time.perf_counter() - clock)
        self.cpu_ms = 1e3 * (time.process_time() - cpu) / pairs


def call_at_once(predict: Predict, pairs: Sequence[Pair], callers: int) -> list[float]:
    """Answer the pairs from `callers` threads; returns the milliseconds of each call."""
    times: list[float] = []

    def work(first: int) -> None:
        for pair in pairs[first::callers]:
            started = time.perf_counter()
            predict(*pair)
            times.append(1e3 * (time.perf_counter() - started))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def in_batches(predictor: Predictor, pairs: Sequence[Pair], size: int | None = None) -> list[float]:
    """Answer the pairs as a list."""
    predictor.predict_batch(pairs, batch_size=size)
    return []


def measure_lone(predictor: Predictor, pairs: Sequence[Pair], turns: int) -> Row:
    """Medians of one call, in ms, and the median of the ratios, the ways taken in turn."""
    with Batcher(predictor) as batcher:
        ways: dict[str, Predict] = {"predict": predictor.predict, "batcher": batcher.predict}
        times: dict[str, list[float]] = defaultdict(list)
        for i in range(turns):
            for name, predict in ways.items():
                times[name] += call_at_once(predict, [pairs[i % len(pairs)]], 1)
    ratios = [b / p for b, p in zip(times["batcher"], times["predict"], strict=True)]
    medians = {f"{name}_ms": round(statistics.median(values), 2) for name, values in times.items()}
    return {**medians, "ratio": round(statistics.median(ratios), 3), "calls": turns}


def measure_load(predictor: Predictor, pairs: Sequence[Pair], callers: int, turns: int) -> Row:
    """Rates, CPU time and latencies of the three ways at so many callers."""
    ways: dict[str, list[Turn]] = defaultdict(list)
    count = len(pairs)
    with Batcher(predictor) as batcher:
        for _ in range(turns):
            work: dict[str, Callable[[], list[float]]] = {
                "batcher": lambda: call_at_once(batcher.predict, pairs, callers),
                "threads": lambda: call_at_once(predictor.predict, pairs, callers),
                "predict_batch": lambda: in_batches(predictor, pairs),
            }
            for name, run in work.items():
                ways[name].append(Turn(count, run))
        done = batcher.statistics()
    row: Row = {"callers": callers, "mean_batch": round(done.pairs / done.batches, 1)}
    for name, results in ways.items():
        row[name] = {
            "pairs_s": round(statistics.median(turn.rate for turn in results), 1),
            "cpu_ms": round(statistics.median(turn.cpu_ms for turn in results), 2),
        }
        if latencies := [ms for turn in results for ms in turn.latencies]:
            shares = {"p50_ms": 0.5, "p99_ms": 0.99}
            row[name] |= {key: round(quantile(latencies, share), 1) for key, share in shares.items()}
    together = list(zip(ways["batcher"], ways["predict_batch"], strict=True))
    row["rate_of_predict_batch"] = round(statistics.median(b.rate / p.rate for b, p in together), 3)
    row["cpu_of_predict_batch"] = round(statistics.median(b.cpu_ms / p.cpu_ms for b, p in together), 3)
    return row


def choose(pairs: Sequence[Pair], batch: int) -> list[Pair]:
    """The order if each batch were the oldest of two batches ready, and those most like it in length."""
    rest, ready, order = list(pairs), list[Pair](), list[Pair]()
    while rest or ready:
        room = 2 * batch - len(ready)
        ready, rest = ready + rest[:room], rest[room:]
        oldest = len(ready[0][1].split())
        ready.sort(key=lambda pair: abs(len(pair[1].split()) - oldest))
        order += ready[:batch]
        # The others keep their places: what came first is the next batch's oldest.
        ready = [pair for pair in pairs if pair in ready[batch:]]
    return order


def measure_lengths(predictor: Predictor, pairs: Sequence[Pair], turns: int) -> Row:
    """CPU time a pair, in ms, by how the captions of a batch are chosen; ratios to those as they come."""
    batch = predictor.manifest.limits.max_batch
    orders = {
        "as_they_come": list(pairs),
        "chosen": choose(pairs, batch),
        "sorted": sorted(pairs, key=lambda pair: len(pair[1].split())),
    }
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(turns):
        for name, ordered in orders.items():
            times[name].append(Turn(len(pairs), partial(in_batches, predictor, ordered)).cpu_ms)
    row: Row = {f"{name}_cpu_ms": round(statistics.median(values), 2) for name, values in times.items()}
    for name in ("chosen", "sorted"):
        ratios = [x / base for x, base in zip(times[name], times["as_they_come"], strict=True)]
        row[f"{name}_ratio"] = round(statistics.median(ratios), 3)
    return {"batch": batch, **row}


def main() -> int:
    """Measure, write and print; 1 if a case failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.batcher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", action="append", required=True, help="may be repeated")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--pairs", type=int, default=256, help="of each way and turn, %(default)s")
    parser.add_argument("--turns", type=int, default=5, help="%(default)s")
    parser.add_argument("--callers", type=int, nargs="+", default=CALLERS, help="%(default)s")
    options = parser.parse_args()
    result, pairs = ResultFile(options.out), draw_pairs(options.pairs)
    bundles: list[Row] = []
    for name in options.bundle:
        with Predictor(name, device="cpu") as predictor:
            predictor.warm_up([(1, 24), (predictor.manifest.limits.max_batch, 50)])
            row: Row = {"model": predictor.model, "load": []}
            bundles.append(row)
            with result.case(name, "lone"):
                row["lone"] = measure_lone(predictor, pairs, 20 * options.turns)
            with result.case(name, "lengths"):
                row["lengths"] = measure_lengths(predictor, pairs, options.turns)
            for callers in options.callers:
                with result.case(name, f"{callers} callers"):
                    row["load"].append(measure_load(predictor, pairs, callers, options.turns))
                    print(row["load"][-1], flush=True)
                result.save({"bundles": bundles, "pairs": options.pairs, "turns": options.turns})
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
