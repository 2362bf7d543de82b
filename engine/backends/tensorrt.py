"""Engines of TensorRT and TensorRT-RTX, which have one Python API, without torch.

`create` finds the bundle's engine for this machine and verifies its file; the engine itself, hundreds of
megabytes of GPU memory, is deserialised at the first run, which `Predictor.warm_up` can be. So a service
that cannot serve fails at its start, and one that does not serve yet takes no GPU memory.

Concurrent calls run in parallel, each in a lane, since one small batch does not fill a GPU; at most `LANES`
at once, further ones wait. A batch above the engine's largest is split, one below its smallest is padded.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from engine.backends.base import Backend, Outputs
from engine.backends.buckets import Arrays
from engine.backends.cuda import Gpu
from engine.backends.tensorrt_engine import Engine, Model, place
from engine.backends.tensorrt_lane import Lane
from engine.backends.tensorrt_target import choose, find_gpu
from engine.bundle import Bundle
from engine.errors import BackendError
from engine.layout import DATA_SUFFIX
from engine.manifest import EngineEntry

logger = logging.getLogger(__name__)

LANES = 4  # each holds the inputs and activations of the largest batch


def create(bundle: Bundle, device: str, threads: int | None) -> TensorRtBackend:
    """Choose and verify an engine of the bundle for this machine; it is loaded at the first run.

    `device` is "auto", "cuda" or "cuda:N"; `threads` is ignored. Raises BackendError,
    EngineMismatchError with the command that builds an engine, or BundleError for an altered file.
    """
    gpu = find_gpu(device)
    entry = choose(bundle, gpu)
    bundle.verified(entry.file)  # an altered file is an error of the service's start, not of its first run
    if entry.stripped:
        _verified_graph(bundle, entry)
    return TensorRtBackend(bundle, entry, gpu)


def _verified_graph(bundle: Bundle, entry: EngineEntry) -> str:
    """Name of the graph with the weights of a stripped engine, once it and its external data are verified."""
    files = bundle.manifest.files
    name = next(name for name, file in files.items() if file.sha256 == entry.onnx_sha256)  # `choose` saw it
    if name + DATA_SUFFIX in files:
        bundle.verified(name + DATA_SUFFIX)
    bundle.verified(name)
    return name


def _read(bundle: Bundle, name: str) -> Model:
    return Model(bundle.path / name, bundle.read(name))


class _Lanes:
    """An engine, deserialised for the first caller, and its idle lanes."""

    def __init__(self, bundle: Bundle, entry: EngineEntry, gpu: Gpu) -> None:
        self._bundle, self._entry, self._gpu = bundle, entry, gpu
        self._engine: Engine | None = None
        self._idle: list[Lane] = []
        self._lock, self._free = threading.Lock(), threading.BoundedSemaphore(LANES)
        self._closed = False

    @contextmanager
    def lend(self) -> Iterator[tuple[Engine, Lane]]:
        """Lend a lane; after a failure it is given up, since its state is then unspecified."""
        with self._free, self._gpu.current():
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

    def close(self) -> None:
        """Release the engine and the idle lanes; a lane that is lent is released when it comes back."""
        with self._lock:
            self._closed, idle, loaded = True, self._idle, self._engine is not None
            self._idle = []
        if loaded:
            with self._gpu.current():
                for lane in idle:
                    lane.close()
                self._engine = None

    def _load(self) -> Engine:
        """The engine, deserialised by the first caller while the others wait."""
        with self._lock:
            if self._closed:
                raise BackendError("the backend was closed; create another Predictor")
            if self._engine is None:
                bundle, entry = self._bundle, self._entry
                graph = _read(bundle, _verified_graph(bundle, entry)) if entry.stripped else None
                weights = [graph.path.name + DATA_SUFFIX] if graph is not None else []
                with bundle.held(*(name for name in weights if name in bundle.manifest.files)):
                    engine = Engine(entry, _read(bundle, entry.file), bundle.manifest, graph)
                self._engine = engine
                logger.info("loaded %s with %s on %s", entry.file, entry.library, self._gpu.name)
            return self._engine


class TensorRtBackend(Backend[_Lanes]):
    """One engine on one GPU.

    Dropped without `close`, it frees its memory too: see `Lane`.
    """

    name = "tensorrt"
    library = "TensorRT"

    def __init__(self, bundle: Bundle, entry: EngineEntry, gpu: Gpu) -> None:
        super().__init__(_Lanes(bundle, entry, gpu), bundle.manifest, f"cuda:{gpu.index}")

    def close(self) -> None:
        """Release the engine, its memory and contexts; a running call releases its own at its end."""
        lanes = self._network
        super().close()
        if lanes is not None:
            lanes.close()

    def _run(self, network: _Lanes, feeds: Arrays, batch: int, tokens: int) -> Outputs:
        parts: list[Outputs] = []
        with network.lend() as (engine, lane):
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


def _give_up(lane: Lane) -> None:
    """Release a lane as far as the driver still works; the error that led here is the one to report."""
    try:
        lane.close()
    except BackendError as error:
        logger.debug("a lane was not released: %s", error)
