"""What `dgm4 score` costs beside the network, on one machine: `python -m benchmarks.scoring --out FILE`.

Scores made pairs with the demo, by one process and on a local Ray cluster, in turns; and once more while
workers and drivers are killed at random, after which every pair has to have one answer. It needs the extra
`ray`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import dgm4
from benchmarks.results import ResultFile
from dgm4.config import MODEL_NAMES
from dgm4.tokenizer import BERT_VOCABULARY
from engine import Predictor
from engine.backends import usable_cores
from engine.scoring import PairList
from engine.scoring.records import json_line, line_record, table_row
from engine.scoring.shards import cut
from export.graph.rewrite import rewrite

BUNDLE, SIZE, PICTURES = "demo:asap", (1200, 800), 24
SHARD, TURNS, WORKER = 50, 3, "ShardActor"
CAPTION = "The president smiles in front of the new house of the senate, a man says at noon on Friday"
WORDS = 20  # of a caption, drawn, so that a table of them does not shrink as one sentence would
KILL_PAIRS = 4000
# Ray's workers step back behind everything else on the machine, and end when others fill its memory.
BUSY_MACHINE = {
    "RAY_worker_niceness": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_raylet_start_wait_time_s": "120",
}
CASES = ("gflop", "costs", "rows", "kills")


def make_list(folder: Path, pairs: int) -> Path:
    """Write made pictures of news size and JSON lines of so many pairs; one in a hundred has no picture."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    for number in range(PICTURES):
        low = Image.fromarray(draw.integers(0, 256, (40, 60, 3), np.uint8))
        low.resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    path = folder / "pairs.jsonl"
    known = [word for word in BERT_VOCABULARY.read_text(encoding="utf-8").split() if word.isalpha()]
    with path.open("w") as file:
        for number in range(pairs):
            image = f"{number % PICTURES}.jpg" if number % 100 != 99 else "missing.jpg"
            caption = " ".join(draw.choice(known, WORDS))
            file.write(json.dumps({"id": number, "image": image, "caption": caption}) + "\n")
    return path


def command(source: Path, out: Path, *more: str) -> list[str]:
    """The command line of a job."""
    job = [sys.executable, "-m", "export.cli", "score", BUNDLE, str(source), "--out", str(out), "-q"]
    return [*job, "--shard", str(SHARD), *more]


def run_job(source: Path, out: Path, *more: str) -> float:
    """Run a job; pairs a second between its first file and its last, so without the start."""
    subprocess.run(command(source, out, *more), check=True, stdout=subprocess.DEVNULL)
    return rate(out)


def rate(out: Path) -> float:
    """Pairs a second between the first file of a job and its last."""
    stamps = sorted(path.stat().st_mtime for path in out.glob("pairs-*"))
    return (len(stamps) - 1) * SHARD / (stamps[-1] - stamps[0])


def variants() -> dict[str, tuple[str, ...]]:
    """What is compared, with the options of each."""
    cores = str(usable_cores())
    return {
        "one process": ("--threads", cores),
        f"Ray, {cores} workers of 1 core": ("--ray", "--workers", cores, "--threads", "1"),
        f"Ray, 1 worker of {cores} cores": ("--ray", "--workers", "1", "--threads", cores),
    }


def compare(folder: Path, source: Path, turns: int) -> list[dict[str, Any]]:
    """Run the variants in turns; medians, and the ratio to one process within each turn."""
    runs: dict[str, list[float]] = {name: [] for name in variants()}
    for turn in range(turns):
        for number, (name, more) in enumerate(variants().items()):
            runs[name].append(run_job(source, folder / f"{turn}-{number}", *more))
    return summary(runs)


def summary(runs: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Rows of the pairs a second of each variant by turn; the first variant is what the others relate to."""
    first = next(iter(runs.values()))
    rows = []
    for name, rates in runs.items():
        ratios = [own / other for own, other in zip(rates, first, strict=True)]
        rows.append(
            {
                "variant": name,
                "pairs_per_s": round(statistics.median(rates), 2),
                "turns": [round(x, 2) for x in rates],
                "ratio": round(statistics.median(ratios), 3),
                "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
            }
        )
    return rows


def cpu_ms(work: Callable[[int], object], count: int) -> float:
    """Milliseconds of CPU of this process for one call of `work`, which takes the number of the call."""
    work(0)
    start = time.process_time()
    for number in range(count):
        work(number)
    return round(1e3 * (time.process_time() - start) / count, 3)


def costs(folder: Path, source: Path) -> dict[str, Any]:
    """What a pair costs beside the network in CPU time of one core, and the bytes that are read and written.

    CPU time, not the clock's, so that it holds on a busy machine too.
    """
    run_job(source, folder / "lines")
    run_job(source, folder / "rows", "--format", "parquet")
    sizes = [
        sum(path.stat().st_size for path in (folder / name).glob("pairs-*")) for name in ("lines", "rows")
    ]
    pictures = sorted(source.parent.glob("*.jpg"))
    pairs = len(list(PairList(source)))
    with Predictor(BUNDLE, thumbnail=0, threads=1) as predictor:
        answer = predictor.predict(pictures[0], CAPTION)
        prepare = predictor._preparation.pair
        prepared = cpu_ms(lambda n: prepare("", pictures[n % len(pictures)], CAPTION), 100)
    head = next(iter(PairList(source))).head()
    return {
        "prepare_ms": prepared,
        "line_ms": cpu_ms(lambda _: json_line(line_record(head, answer)), 500),
        "row_ms": cpu_ms(lambda _: table_row(head, answer), 500),
        "listing_ms": round(cpu_ms(lambda _: sum(1 for _ in cut(PairList(source), SHARD)), 3) / pairs, 4),
        "jsonl_bytes": round(sizes[0] / pairs),
        "parquet_bytes": round(sizes[1] / pairs),
        "list_bytes": round(source.stat().st_size / pairs),
        "picture_bytes": round(statistics.mean(path.stat().st_size for path in pictures)),
    }


def operations() -> dict[str, float]:
    """Floating-point operations in 10^9 of a pair of 50 tokens, of each base network as it is served."""
    counts = {}
    for name in MODEL_NAMES:
        network = rewrite(dgm4.seeded_model(name)).eval()
        ids = torch.full((1, 50), 2000)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, 3, 256, 256), ids, torch.ones_like(ids))
        counts[name] = round(counter.get_total_flops() / 1e9, 1)
    return counts


def _workers(driver: psutil.Process) -> list[psutil.Process]:
    """The processes below a driver that score."""
    found = []
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if WORKER in " ".join(process.cmdline()):
                found.append(process)
    return found


def _kills(driver: psutil.Popen, chance: random.Random, workers: int) -> Iterator[str]:
    """Kill so many workers of a driver and at last the driver itself, each after a while of work."""
    for number in range(workers + 1):
        wait = chance.uniform(0.5, 4)
        while driver.poll() is None and not _workers(driver):
            time.sleep(0.05)
        time.sleep(wait)
        if driver.poll() is not None:
            return
        victims = [driver] if number == workers else _workers(driver)
        if victims:
            chance.choice(victims).kill()
            yield "driver" if number == workers else "worker"


def survive(folder: Path, source: Path, drivers: int, workers: int, seed: int = 0) -> dict[str, Any]:
    """Kill `drivers` drivers with their clusters, each after `workers` workers; then let one finish."""
    chance, killed, out = random.Random(seed), {"worker": 0, "driver": 0}, folder / "killed"
    job = command(source, out, "--ray", "--workers", "2")
    for _ in range(drivers):
        driver = psutil.Popen(job, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for kind in _kills(driver, chance, workers):
            killed[kind] += 1
        driver.wait()
    subprocess.run(job, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(x)["line"] for path in sorted(out.glob("pairs-*")) for x in path.open()]
    pairs = sum(1 for _ in PairList(source))
    return {
        "killed": killed,
        "pairs": pairs,
        "lost": len(set(range(1, pairs + 1)) - set(lines)),
        "doubled": len(lines) - len(set(lines)),
        "stray_files": len(list(out.glob(".pairs-*"))),
    }


def measure(result: ResultFile, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the cases asked for, writing after each; the others stay as an earlier call wrote them."""
    record: dict[str, Any] = {"bundle": BUNDLE, "picture": list(SIZE)}
    if result.path.exists():
        record |= {name: x for name, x in json.loads(result.path.read_text()).items() if name in CASES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make_list(folder / "list", options.pairs)
        cases: dict[str, Callable[[], Any]] = {
            "gflop": operations,
            "costs": lambda: costs(folder, source),
            "rows": lambda: {
                "pairs": options.pairs,
                "load": round(os.getloadavg()[0], 1),  # of other work
                "variants": compare(folder, source, options.turns),
            },
            "kills": lambda: survive(
                folder, make_list(folder / "long", options.kill_pairs), options.drivers, options.workers
            ),
        }
        for case in options.cases:
            with result.case(case):
                record[case] = cases[case]()
            result.save(record)
    return record


def main() -> int:
    """Measure, write the data, print it; 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="all by default")
    parser.add_argument("--pairs", type=int, default=600, help="of a run (%(default)s)")
    parser.add_argument("--turns", type=int, default=TURNS, help="%(default)s")
    parser.add_argument("--kill-pairs", type=int, default=KILL_PAIRS, help="while killing (%(default)s)")
    parser.add_argument("--drivers", type=int, default=6, help="that are killed (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="that are killed before each (%(default)s)")
    options = parser.parse_args()
    os.environ.update(BUSY_MACHINE)
    result = ResultFile(options.out)
    record = measure(result, options)
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
