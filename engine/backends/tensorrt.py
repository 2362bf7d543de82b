"""Engines of TensorRT and TensorRT-RTX, which have one Python API, without torch.

`create` finds the bundle's engine for this machine and verifies its file; the engine itself, hundreds of
megabytes of GPU memory, is deserialised at the first run, which `Predictor.warm_up` can be. So a service
fails at its start where it cannot serve, and takes no memory before it serves.

Calls at once run in lanes of their own beside each other, which small batches need to fill a GPU, up to
`LANES`; further ones wait. A batch above the engine's largest is split, one below its smallest padded.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from engine.backends.buckets import check_ids, measure
from engine.backends.cuda import Gpu
from engine.backends.tensorrt_engine import Engine, place
from engine.backends.tensorrt_lane import Lane
from engine.backends.tensorrt_target import choose, find_gpu
from engine.bundle import Bundle
from engine.errors import BackendError
from engine.layout import DATA_SUFFIX
from engine.manifest import EngineEntry, Manifest

logger = logging.getLogger(__name__)

LANES = 4  # each holds the inputs and activations of the largest batch


def create(bundle: Bundle, device: str, threads: int | None) -> TensorRtBackend:
    """Choose and verify an engine of the bundle for this machine; it is loaded at the first run.

    `device` is "auto", "cuda" or "cuda:N"; `threads` is of no use here. Raises BackendError,
    EngineMismatchError with the command that builds an engine, or BundleError for an altered file.
    """
    gpu = find_gpu(device)
    entry = choose(bundle, gpu)
    graph = _verified_graph(bundle, entry) if entry.stripped else None
    return TensorRtBackend(entry, bundle.verified(entry.file), graph, bundle.manifest, gpu)


def _verified_graph(bundle: Bundle, entry: EngineEntry) -> Path:
    """The graph that a stripped engine takes its weights from, its hash and that of its data compared."""
    files = bundle.manifest.files
    name = next(name for name, file in files.items() if file.sha256 == entry.onnx_sha256)  # `choose` saw it
    if name + DATA_SUFFIX in files:
        bundle.verified(name + DATA_SUFFIX)
    return bundle.verified(name)


class TensorRtBackend:
    """One engine on one GPU; `run` may be called from several threads at once."""

    name = "tensorrt"

    def __init__(
        self, entry: EngineEntry, path: Path, graph: Path | None, manifest: Manifest, gpu: Gpu
    ) -> None:
        self.device = f"cuda:{gpu.index}"
        self._entry, self._path, self._graph = entry, path, graph
        self._manifest, self._gpu = manifest, gpu
        self._vocabulary = manifest.model.config.get("vocabulary")
        self._engine: Engine | None = None
        self._idle: list[Lane] = []
        self._lock, self._lanes = threading.Lock(), threading.BoundedSemaphore(LANES)
        self._closed = False

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answer one batch; raises BackendError where TensorRT fails or the backend was closed."""
        sizes = measure(feeds, self._manifest.inputs)
        if self._vocabulary is not None:
            check_ids(feeds["input_ids"], self._vocabulary)
        batch, tokens = sizes["batch"], sizes["tokens"]
        parts: list[dict[str, np.ndarray]] = []
        with self._lanes, self._gpu.current(), self._lane() as (engine, lane):
            start = 0
            while start < batch or not parts:
                profile, bucket = place(batch - start, tokens, engine.profiles)
                end = min(start + bucket.batch, batch)
                part = {name: array[start:end] for name, array in feeds.items()}
                parts.append(lane.run(part, profile, bucket))
                start = end
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def close(self) -> None:
        """Release the engine, its memory and contexts; what still runs gives its own back at its end."""
        with self._lock:
            self._closed, idle, loaded = True, self._idle, self._engine is not None
            self._idle = []
        if loaded:
            with self._gpu.current():
                for lane in idle:
                    lane.close()
                self._engine = None

    @contextmanager
    def _lane(self) -> Iterator[tuple[Engine, Lane]]:
        """Lend a lane; after a failure it is given up, since what that leaves in it is not specified."""
        engine = self._load()
        with self._lock:
            lane = self._idle.pop() if self._idle else None
        lane = lane or Lane(engine, self._gpu)
        try:
            yield engine, lane
        except BaseException:
            _give_up(lane)
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(lane)
                return
        lane.close()

    def _load(self) -> Engine:
        """The engine, deserialised by the first caller while the others wait."""
        with self._lock:
            if self._closed:
                raise BackendError("the backend was closed; create another Predictor")
            if self._engine is None:
                self._engine = Engine(self._entry, self._path, self._manifest, self._graph)
                logger.info("loaded %s with %s on %s", self._path, self._entry.library, self._gpu.name)
            return self._engine


def _give_up(lane: Lane) -> None:
    """Release a lane as far as the driver still answers; the error that led here is the one to report."""
    try:
        lane.close()
    except BackendError as error:
        logger.debug("a lane was not released: %s", error)
