"""`dgm4 serve` under load: `python -m benchmarks.serving --out FILE [--bundle B] [--soak N]`.

For each bundle, in turns: the Predictor's own throughput in batches, in a process of its own, and the
service's with as many clients as saturate it. Then the latency at half of that load, with independent
clients. With `--soak` so many requests to the first bundle, of which some are cut halfway: what was lost,
memory, files and threads of the service meanwhile. The client runs on the same cores; its CPU is told.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import http_load
from benchmarks.results import ResultFile, Row
from benchmarks.timing import quantile
from dgm4.shipped import demo_sample
from engine.backends import usable_cores
from export.flags import POSITIVE, SECONDS

CONNECTIONS = 64
TURNS = 5
CUT_EVERY = 200
_OPTIONS = ("--port", "0", "--max-pending", "1024", "--timeout", "3600")  # so that all are answered
_SAMPLES = 40  # of the service's memory during a soak
_PREDICTOR = """
import sys, time
from engine import Predictor
with Predictor(sys.argv[1], thumbnail=0) as predictor:
    image = open(sys.argv[2], "rb").read()
    pairs = [(image, f"{sys.argv[3]} {i}") for i in range(predictor.manifest.limits.max_batch)]
    predictor.predict_batch(pairs)
    print("ready", flush=True)
    for line in sys.stdin:
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < float(line):
            count += len(predictor.predict_batch(pairs * 2))
        print(count / (time.perf_counter() - start), flush=True)
"""


class Served:
    """A `dgm4 serve` process."""

    def __init__(self, bundle: str) -> None:
        command = [sys.executable, "-m", "export.cli", "serve", bundle, *_OPTIONS]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)
        self.address = self._await_ready()

    def _await_ready(self) -> tuple[str, int]:
        if self.process.stderr is None:
            raise RuntimeError("the service has no log")
        address = None
        for line in self.process.stderr:
            record = json.loads(line)
            address = record.get("address", address)
            if record.get("message") == "ready":
                break
        # The rest of the log is read, so that the service never waits for this process.
        subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)
        parts = urlsplit(address)
        return str(parts.hostname), int(parts.port or 0)

    def state(self) -> Row:
        """Resident memory in MB (10^6 bytes), open files and threads."""
        place = Path(f"/proc/{self.process.pid}")
        pages = int((place / "statm").read_text().split()[1])
        return {
            "rss_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
            "files": len(list((place / "fd").iterdir())),
            "threads": len(list((place / "task").iterdir())),
        }

    def metrics(self) -> dict[str, float]:
        """The metrics without labels, by name."""
        connection = http.client.HTTPConnection(*self.address, timeout=30)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return {
            name: float(value) for name, value in (x.split() for x in lines if x[0] != "#" and "{" not in x)
        }

    def stop(self) -> int:
        """End it by SIGTERM; its exit code."""
        self.process.terminate()
        return self.process.wait(60)


@contextmanager
def serving(bundle: str) -> Iterator[Served]:
    """Run the service inside the block."""
    served = Served(bundle)
    try:
        yield served
    finally:
        served.stop()


@contextmanager
def predicting(bundle: str, image: Path, caption: str) -> Iterator[Any]:
    """Yield a function from seconds to the Predictor's pairs a second, in a process of its own."""
    command = [sys.executable, "-c", _PREDICTOR, bundle, str(image), caption]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the predictor's process has no pipes")
    read, write = process.stdout.readline, process.stdin
    read()

    def measure(seconds: float) -> float:
        print(seconds, file=write, flush=True)
        return float(read())

    try:
        yield measure
    finally:
        write.close()
        process.wait(60)


def compare(bundle: str, seconds: float, turns: int = TURNS) -> Row:
    """Throughput beside the Predictor's own, and the latency at half of it, of one bundle."""
    image, caption = demo_sample()
    requests = _requests()
    rows = []
    with predicting(bundle, image, caption) as predict, serving(bundle) as served:
        http_load.run(served.address, requests, http_load.at_once(CONNECTIONS), CONNECTIONS)
        for _ in range(turns):
            own = predict(seconds)
            count = max(CONNECTIONS, round(own * seconds))
            done = http_load.run(served.address, requests, http_load.at_once(count), CONNECTIONS)
            row = {"predictor": own, "service": done.rate, "ratio": done.rate / own, **_client(done)}
            rows.append(row | {"statuses": done.statuses, "lost": done.lost})
        rate = statistics.median(row["service"] for row in rows) / 2
        half = http_load.run(
            served.address, requests, http_load.poisson(rate, turns * seconds, seed=0), 4 * CONNECTIONS
        )
    return {"turns": rows, "medians": _medians(rows), "half_load": {"rate": rate, **_latency(half)}}


def _medians(rows: list[Row]) -> Row:
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    return {name: statistics.median(row[name] for row in rows) for name in names}


def _client(done: http_load.Outcome) -> Row:
    """The share of all the client's share of the cores."""
    return {"client_share": done.client_s / done.wall_s / usable_cores()}


def _latency(done: http_load.Outcome) -> Row:
    p50, p99 = (1e3 * quantile(done.seconds, share) for share in (0.5, 0.99))
    return {
        "requests": len(done.seconds),
        "statuses": done.statuses,
        "p50_ms": p50,
        "p99_ms": p99,
        "ratio": p99 / p50,
        **_client(done),
    }


def soak(bundle: str, count: int) -> Row:
    """Send many requests, cut some halfway, and see what the service holds meanwhile and at the end."""
    samples: list[Row] = []
    with serving(bundle) as served:
        http_load.run(served.address, _requests(), http_load.at_once(4 * CONNECTIONS), CONNECTIONS)
        before, every = served.state(), max(1, count // _SAMPLES)

        def sample(answered: int) -> None:
            if answered % every == 0:
                samples.append({"answered": answered, **served.state()})

        done = http_load.run(
            served.address, _requests(), http_load.at_once(count), CONNECTIONS, CUT_EVERY, sample
        )
        time.sleep(2)
        after, metrics = served.state(), served.metrics()
        code = served.stop()
    settled = samples[len(samples) // 5 :]  # its caches are full by then
    slope = statistics.linear_regression(
        [x["answered"] for x in settled], [x["rss_mb"] for x in settled]
    ).slope
    return {
        "bundle": bundle,
        "requests": count,
        "answered": done.statuses,
        "lost": done.lost,
        "cut": done.cut,
        "seconds": done.wall_s,
        "mb_per_10k": 1e4 * slope,
        "before": before,
        "after": after,
        "pending": metrics["dgm4_pending_pairs"],
        "buffered_bytes": metrics["dgm4_buffered_bytes"],
        "exit_code": code,
        "samples": samples,
    }


def table(result: Row) -> str:
    """The table of the documentation, the bundles side by side."""
    bundles = result["bundles"]
    medians, half = ([x[part] for x in bundles.values()] for part in ("medians", "half_load"))
    rows = [
        ("pairs a second", *bundles),
        ("---",) * (1 + len(bundles)),
        ("Predictor, in batches", *(f"{x['predictor']:.1f}" for x in medians)),
        (f"service, {CONNECTIONS} clients", *(f"{x['service']:.1f}" for x in medians)),
        ("ratio, median of turns", *(f"{x['ratio']:.2f}" for x in medians)),
        ("the client's share of the cores", *(f"{x['client_share']:.1%}" for x in medians)),
        ("half load, p50", *(f"{x['p50_ms']:.0f} ms" for x in half)),
        ("half load, p99", *(f"{x['p99_ms']:.0f} ms" for x in half)),
        ("p99 / p50", *(f"{x['ratio']:.1f}" for x in half)),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _requests() -> list[bytes]:
    image, caption = demo_sample()
    return [http_load.form_request("/v1/predict", image.read_bytes(), f"{caption} {i}") for i in range(32)]


def main() -> int:
    """Measure, write the data, print it; 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--bundle", action="append", metavar="BUNDLE", help="again for another; demo:asap")
    parser.add_argument("--seconds", type=SECONDS, default=5.0, metavar="S", help="for a turn (%(default)g)")
    parser.add_argument("--turns", type=POSITIVE, default=TURNS, metavar="N", help="%(default)s")
    parser.add_argument("--soak", type=POSITIVE, metavar="N", help="requests to the first bundle; none")
    parser.add_argument("--keep", action="store_true", help="add to what the file has")
    options = parser.parse_args()
    result, bundles = ResultFile(options.out), options.bundle or ["demo:asap"]
    stored = json.loads(options.out.read_text()) if options.keep and options.out.exists() else {}
    record: Row = {"bundles": stored.get("bundles", {}), "soak": stored.get("soak")}
    if options.soak:
        with result.case("soak"):
            record["soak"] = soak(bundles[0], options.soak)
            result.save(record)
    else:
        for bundle in bundles:
            with result.case(bundle):
                record["bundles"][Path(bundle).name] = compare(bundle, options.seconds, options.turns)
            result.save(record)
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
