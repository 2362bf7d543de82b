"""Run networks over annotated pairs and keep their raw outputs beside the labels.

Images are read in threads while the networks run, two batches ahead, so that a run takes as long as the
networks do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np
import torch

from dgm4.data.annotations import Problem, Sample
from dgm4.data.dataset import Batch, Item, PairDataset, collate
from dgm4.metrics import LabelledOutputs
from dgm4.model import Detector
from dgm4.training.outputs import join_outputs
from engine.backends import usable_cores
from engine.backends.float32 import full_float32
from engine.errors import InputError
from engine.manifest import INPUTS
from engine.progress import progress_bar

_MAX_WORKERS = 4
_BATCHES_AHEAD = 2
WAITING = "waiting for pictures"  # a key of the JSON report


class Network(Protocol):
    """What `score` runs: a backend of the engine, or `TorchNetwork`."""

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one batch: arrays by input name in, arrays by output name out."""
        ...


class TorchNetwork:
    """A trained network of torch as it is, float32 on the CPU."""

    def __init__(self, model: Detector):
        self.model = model.float().eval()

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one batch, as a backend does."""
        with full_float32("cpu"), torch.inference_mode():
            output = self.model(*(torch.from_numpy(feeds[name]) for name in INPUTS))
        return {name: value.numpy() for name, value in output._asdict().items() if value is not None}


@dataclass(frozen=True)
class Scored:
    """The readable samples, every network's outputs for them, what failed, and seconds by part."""

    samples: tuple[Sample, ...]
    outputs: dict[str, LabelledOutputs]
    problems: tuple[Problem, ...]
    seconds: dict[str, float]


def score(
    networks: Mapping[str, Network],
    dataset: PairDataset,
    batch_size: int,
    on_bad: str = "skip",
    progress: bool = False,
) -> Scored:
    """Run every network over the same batches of `dataset`.

    An image that cannot be read is left out and listed, or raises InputError with on_bad="raise". Raises
    InputError where no pair is left, and what the networks raise. `progress` shows a bar on stderr.
    """
    reader = _Reader(dataset, on_bad)
    batches: list[Batch] = []
    outputs: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in networks}
    seconds = dict.fromkeys([*networks, WAITING], 0.0)
    with progress_bar("evaluate", len(dataset), "pairs", progress) as bar:
        started = perf_counter()
        for batch in reader.batches(batch_size):
            seconds[WAITING] += perf_counter() - started
            for name, network in networks.items():
                started = perf_counter()
                outputs[name].append(_run(network, batch))
                seconds[name] += perf_counter() - started
            bar.update(len(batch.indices))
            # The image is the bulk of a batch, and nothing after this reads it.
            batches.append(batch._replace(image=batch.image.new_empty(0)))
            started = perf_counter()
    if not batches:
        raise InputError(f"expected at least one usable pair, got none of {len(dataset)}")
    samples = tuple(dataset.samples[i] for batch in batches for i in batch.indices.tolist())
    joined = {name: join_outputs(samples, batches, parts) for name, parts in outputs.items()}
    return Scored(samples, joined, tuple(reader.problems), seconds)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` CPU threads inside the block; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Reader:
    """Reads a data set in order and ahead of its use."""

    def __init__(self, dataset: PairDataset, on_bad: str):
        self.dataset, self.on_bad = dataset, on_bad
        self.problems: list[Problem] = []

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield batches of up to `size` pairs; a batch is smaller where pairs of it cannot be read."""
        pool = ThreadPoolExecutor(min(_MAX_WORKERS, usable_cores()), thread_name_prefix="read")
        ahead: deque[list[Future[Item | Problem]]] = deque()
        try:
            count = len(self.dataset)
            for start in range(0, count, size):
                ahead.append([pool.submit(self._read, i) for i in range(start, min(start + size, count))])
                if len(ahead) > _BATCHES_AHEAD:
                    yield from self._collect(ahead.popleft())
            while ahead:
                yield from self._collect(ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, index: int) -> Item | Problem:
        try:
            return self.dataset[index]
        except InputError as error:
            if self.on_bad == "raise":
                raise
            sample = self.dataset.samples[index]
            return Problem(sample.picture, sample.id, str(error), "picture_unreadable")

    def _collect(self, futures: Sequence[Future[Item | Problem]]) -> Iterator[Batch]:
        """Yield one batch, or none where nothing of it could be read."""
        results = [future.result() for future in futures]
        self.problems += [x for x in results if isinstance(x, Problem)]
        items = [x for x in results if isinstance(x, Item)]
        if items:
            yield collate(items)


def _run(network: Network, batch: Batch) -> dict[str, np.ndarray]:
    outputs = network.run({name: getattr(batch, name).numpy() for name in INPUTS})
    return {name: value for name, value in outputs.items() if name != "attention_map"}
