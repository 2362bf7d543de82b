"""One lane through an engine: a stream, its buffers, and a context and graph for each bucket of shapes.

A context serves one run at a time and one shape only: changing its shape costs a synchronisation, breaks its
graph, and leaks with plugins compiled ahead of time (NVIDIA/TensorRT #4849). All contexts of a lane share its
inputs and its memory for activations, since its runs follow one another.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from engine.backends.buckets import Arrays, Bucket, cut, fill
from engine.backends.cuda import Gpu, Graph, Memory, Pinned, Stream
from engine.backends.tensorrt_engine import Engine, Profile, make_allocator, shape_of
from engine.errors import BackendError
from engine.manifest import TensorSpec

logger = logging.getLogger(__name__)


class _Closable(Protocol):
    def close(self) -> None: ...


Owned = TypeVar("Owned", bound=_Closable)


class Staged(NamedTuple):
    """A tensor's pinned memory and its memory on the GPU."""

    host: Pinned
    device: Memory
    dtype: np.dtype[Any]


class Lane:
    """What one caller at a time runs through; every method needs its GPU to be the current one."""

    def __init__(self, engine: Engine, gpu: Gpu) -> None:
        """Allocate for the largest shapes of the engine's profiles; raises BackendError."""
        self.engine, self.driver = engine, gpu.driver
        self._slots: dict[tuple[int, Bucket], _Slot] = {}
        self._owned = ExitStack()
        largest = Bucket(
            max(profile.batch[1] for profile in engine.profiles),
            max(profile.tokens[1] for profile in engine.profiles),
        )
        try:
            self.stream = self.own(Stream(gpu.driver))
            self.scratch = self.own(Memory(gpu.driver, engine.scratch_bytes))
            self.inputs = {spec.name: self.stage(shape_of(spec, largest), spec) for spec in engine.inputs}
        except BaseException:
            self._owned.close()
            raise

    def own(self, thing: Owned) -> Owned:
        """Keep what `close` is to give back, the latest first."""
        self._owned.callback(thing.close)
        return thing

    def stage(self, shape: tuple[int, ...], spec: TensorSpec) -> Staged:
        """Memory for a tensor on both sides."""
        dtype = np.dtype(spec.dtype)
        size = bytes_of(shape, dtype)
        return Staged(self.own(Pinned(self.driver, size)), self.own(Memory(self.driver, size)), dtype)

    def run(self, feeds: Arrays, profile: Profile, bucket: Bucket) -> dict[str, np.ndarray]:
        """Answer one batch that fits the bucket; raises BackendError."""
        self.engine.forget()
        batch, tokens = feeds["input_ids"].shape
        for spec in self.engine.inputs:
            staged = self.inputs[spec.name]
            _pad(staged.host.array(shape_of(spec, bucket), staged.dtype), feeds[spec.name])
        key = profile.number, bucket
        if key not in self._slots:
            self._slots[key] = _Slot(self, profile, bucket)
        return cut(self._slots[key].run(), batch, tokens)

    def close(self) -> None:
        """Give everything back, once the stream has run dry."""
        try:
            self.stream.wait()
        finally:
            self._slots.clear()  # the contexts go before the memory that they point into
            self._owned.close()


class _Slot:
    """The context, the outputs and the graph of one bucket.

    The first run goes as it is, so that the library has set up what it sets up lazily; then a run is recorded
    with its copies, and from there on it is one launch.
    """

    def __init__(self, lane: Lane, profile: Profile, bucket: Bucket) -> None:
        self._lane, self._engine, self._bucket = lane, lane.engine, bucket
        self._context = self._engine.context(profile, lane.scratch, lane.stream.handle)
        self._graph: Graph | None = None
        self._sizes: dict[str, int] = {}
        for spec in self._engine.inputs:
            shape = shape_of(spec, bucket)
            self._sizes[spec.name] = bytes_of(shape, np.dtype(spec.dtype))
            if not self._context.set_input_shape(spec.name, shape):
                raise self._engine.failure(f"take {spec.name} of shape {list(shape)}")
            self._bind(spec.name, lane.inputs[spec.name].device)
        self._outputs: dict[str, tuple[Staged, tuple[int, ...]]] = {}
        self._growing: dict[str, tuple[Any, np.dtype[Any]]] = {}
        for spec in self._engine.outputs:
            self._add_output(spec)
        # What the library allocates in mid-run, or records by itself, cannot be recorded here.
        self._recordable = not self._growing and not self._engine.captures_itself

    def run(self) -> dict[str, np.ndarray]:
        """Run on what is staged; the answers are views that the next run overwrites."""
        stream = self._lane.stream
        if self._graph is not None:
            self._graph.launch(stream)
        else:
            self._enqueue()
        stream.wait()
        answers = {
            name: staged.host.array(shape, staged.dtype) for name, (staged, shape) in self._outputs.items()
        }
        answers |= {name: self._fetch(*grown) for name, grown in self._growing.items()}
        if self._recordable:
            self._record()
        return answers

    def _enqueue(self) -> None:
        """Queue the copies to the GPU, the network, and the copies back."""
        stream = self._lane.stream
        for name, size in self._sizes.items():
            stream.send(self._lane.inputs[name].device, self._lane.inputs[name].host, size)
        if not self._context.execute_async_v3(stream.handle):
            raise self._engine.failure(f"run {self._bucket.batch} pairs of {self._bucket.tokens} tokens")
        for staged, _ in self._outputs.values():
            stream.fetch(staged.host, staged.device, staged.device.size)

    def _record(self) -> None:
        """Record a run as a graph; where that cannot be, go on without."""
        self._recordable = False
        try:
            with self._lane.stream.capture() as graph:
                self._enqueue()
        except BackendError as error:
            logger.warning("no CUDA graph for %s, which stays slower: %s", self._bucket, error)
        else:
            self._graph = self._lane.own(graph)

    def _add_output(self, spec: TensorSpec) -> None:
        """Give an output its memory; an allocator of its own where its shape depends on values."""
        shape = tuple(self._context.get_tensor_shape(spec.name))
        if min(shape, default=0) >= 0:
            staged = self._lane.stage(shape, spec)
            self._outputs[spec.name] = staged, shape
            self._bind(spec.name, staged.device)
            return
        allocator = self._lane.own(make_allocator(self._engine.trt, self._lane.driver))
        self._growing[spec.name] = allocator, np.dtype(spec.dtype)
        if not self._context.set_output_allocator(spec.name, allocator):
            raise self._engine.failure(f"take an allocator for {spec.name}")

    def _bind(self, name: str, memory: Memory) -> None:
        if not self._context.set_tensor_address(name, memory.address):
            raise self._engine.failure(f"take an address for {name}")

    def _fetch(self, allocator: Any, dtype: np.dtype[Any]) -> np.ndarray:
        """Copy an output that the run allocated to the host."""
        size = bytes_of(allocator.shape, dtype)
        host = Pinned(self._lane.driver, size)
        try:
            self._lane.stream.fetch(host, allocator.memory, size)
            self._lane.stream.wait()
            return host.array(allocator.shape, dtype).copy()
        finally:
            host.close()


def bytes_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Bytes of an array."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _pad(buffer: np.ndarray, values: np.ndarray) -> None:
    """Put `values` at the start of a bucket's buffer, zeros behind them."""
    if values.ndim == 2:
        fill(buffer, values)
        return
    buffer[: len(values)] = values
    buffer[len(values) :] = 0
