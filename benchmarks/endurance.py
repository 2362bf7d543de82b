"""Whether a process survives long use of OpenVINO: `python -m benchmarks.endurance --out FILE`.

Processes load tiny networks with OpenVINO and ONNX Runtime, run them from several threads and drop them in
any order, beside torch, child processes and a timer that sends a signal 27 times a second. They do so in
two ways: with one `openvino.Core` for the process, as `engine.backends.openvino` does, and with one for each
model. The CPU plugin of a Core gives its thread a stack for signals and unmaps it with the Core, so that the
second way ends in SIGSEGV as soon as a signal finds the stack of a Core that is gone.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dgm4
from benchmarks.results import ResultFile
from engine.backends.ort import load_session
from export.graph.rewrite import rewrite
from export.graph.trace import example_inputs, export_onnx, flatten
from export.quantization.calibrate import calibrate
from export.quantization.qdq import int8_layers, to_int8

WAYS = ("one", "each")  # Cores: one for the process, one for each model
_PERIOD_S = 0.037
_KEPT = 3  # models at once
_SHAPES = ((1, 2), (1, 7), (2, 17), (3, 33), (4, 50))


def write_graphs(folder: Path) -> None:
    """Write every tiny network in float32 and calibrated int8."""
    for name in dgm4.MODEL_NAMES:
        model = dgm4.seeded_model(name, "tiny")
        fp32, int8 = rewrite(model), rewrite(model)
        batches = [example_inputs(model.config, 4, 17, seed) for seed in range(2)]
        int8 = to_int8(int8, calibrate(int8, int8_layers(int8), batches, torch.int8))
        for precision, network in (("fp32", fp32), ("int8", int8)):
            export_onnx(network, path := folder / f"{name}.{precision}.onnx")
            flatten(path, path.with_suffix(".flat.onnx"))


class Process:
    """What one process does, by chance; `counts` says how often it did what."""

    def __init__(self, graphs: Path, way: str, seed: int) -> None:
        from engine.backends import openvino

        self.library, self.way = openvino, way
        self.random, self.counts = random.Random(seed), Counter[str]()
        self.graphs = sorted(graphs.glob("*.flat.onnx"))
        self.kept: list[Any] = []
        signal.signal(signal.SIGALRM, lambda *_: self.counts.update(signals=1))

    def run(self, seconds: float) -> None:
        """Act for `seconds` of CPU time, with the timer on."""
        signal.setitimer(signal.ITIMER_REAL, _PERIOD_S, _PERIOD_S)
        actions = (self.load, self.load, self.infer, self.infer, self.share, self.ort, self.torch, self.spawn)
        end = time.process_time() + seconds
        while time.process_time() < end:
            action = self.random.choice(actions) if self.kept else self.load
            action()
            self.counts[action.__name__] += 1
        signal.setitimer(signal.ITIMER_REAL, 0)

    def load(self) -> None:
        """Load a model, and drop any one where there are enough."""
        if self.way == "each":
            self.library._CORE = self.library.openvino.Core()
        self.kept.append(self.library.load_model(self.random.choice(self.graphs), self.random.choice((1, 2))))
        if len(self.kept) > _KEPT:
            del self.kept[self.random.randrange(len(self.kept))]
            gc.collect()

    def infer(self) -> None:
        """Run one of the models."""
        _infer(self.random.choice(self.kept), self._feeds())

    def share(self) -> None:
        """Run one of the models from three threads at once."""
        model, feeds = self.random.choice(self.kept), [self._feeds() for _ in range(3)]
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda batch: _infer(model, batch), feeds))

    def ort(self) -> None:
        """Load and run a model with ONNX Runtime."""
        graph = self.random.choice(self.graphs)
        load_session(graph, self.random.choice((1, 2))).run(None, self._feeds())

    def torch(self) -> None:
        """A product in torch."""
        torch.ones(300, 300) @ torch.ones(300, 300)

    def spawn(self) -> None:
        """Run a child process."""
        subprocess.run(["true"], check=True, capture_output=True)

    def _feeds(self) -> dict[str, np.ndarray]:
        batch, tokens = self.random.choice(_SHAPES)
        ids = np.full((batch, tokens), 50)
        image = np.ones((batch, 3, 256, 256), np.float32)
        return {"image": image, "input_ids": ids, "attention_mask": np.ones_like(ids)}


def _infer(model: Any, feeds: dict[str, np.ndarray]) -> None:
    """As the backend does. A model that has run with shared inputs must never copy others."""
    model.create_infer_request().infer(feeds, share_inputs=True)


def start(graphs: Path, way: str, seed: int, seconds: float) -> dict[str, Any]:
    """Run one process to its end; its status, and its counts where it survived."""
    command = [sys.executable, "-X", "faulthandler", "-m", "benchmarks.endurance", "--graphs", str(graphs)]
    command += ["--seconds", str(seconds), "--process", f"{way},{seed}"]
    done = subprocess.run(command, capture_output=True, text=True)
    counts = json.loads(done.stdout) if done.returncode == 0 else {}
    return {"way": way, "status": done.returncode, "counts": counts, "tail": done.stderr[-2000:]}


def summarise(ended: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each way: processes, how many ended otherwise than well, and what the others did."""
    for way in WAYS:
        of_way = [one for one in ended if one["way"] == way]
        statuses = Counter(str(one["status"]) for one in of_way if one["status"])
        counts = sum((Counter(one["counts"]) for one in of_way), Counter[str]())
        yield {"cores": way, "processes": len(of_way), "failed": dict(statuses), "counts": dict(counts)}


def endure(result: ResultFile, graphs: Path, minutes: float, seconds: float) -> list[dict[str, Any]]:
    """Run processes for `minutes`, two at once, writing the rows after each; one in eight has Cores each."""
    ended: list[dict[str, Any]] = []
    lock, seeds, end = threading.Lock(), itertools.count(), time.monotonic() + 60 * minutes

    def work() -> None:
        while time.monotonic() < end:
            with lock:
                seed = next(seeds)
            one = start(graphs, WAYS[seed % 8 == 0], seed, seconds)
            with lock:
                ended.append(one)
                result.save({"seconds": seconds, "rows": list(summarise(ended))})

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work) for _ in range(2)]:
            future.result()
    return list(summarise(ended))


def main() -> int:
    """Run all processes and write the counts; 1 if one failed that has one Core."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON with the counts")
    parser.add_argument("--minutes", type=float, default=30.0, help="in all (%(default)g)")
    parser.add_argument("--seconds", type=float, default=10.0, help="CPU time of a process (%(default)g)")
    parser.add_argument("--graphs", type=Path, metavar="DIR", help="an earlier run's; else they are made")
    parser.add_argument("--process", metavar="WAY,SEED", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        way, seed = options.process.split(",")
        (process := Process(options.graphs, way, int(seed))).run(options.seconds)
        sys.stdout.write(json.dumps(process.counts) + "\n")
        return 0
    if options.out is None:
        parser.error("--out is required")
    with tempfile.TemporaryDirectory() as folder:
        graphs = options.graphs or Path(folder)
        if options.graphs is None:
            write_graphs(graphs)
        rows = endure(ResultFile(options.out), graphs, options.minutes, options.seconds)
    sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    return 1 if rows[0]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
