"""A lane through an engine: a stream, its buffers, and a context and graph for each bucket of shapes.

A context serves one run at a time and one shape only: changing its shape costs a synchronisation, breaks its
graph, and leaks with plugins compiled ahead of time (NVIDIA/TensorRT #4849). All contexts of a lane share its
inputs and its memory for activations, since its runs are sequential.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from engine.backends.buckets import Arrays, Bucket, cut, fill
from engine.backends.cuda import Driver, Gpu, Graph, Memory, Pinned, Stream
from engine.backends.tensorrt_engine import Engine, Profile, make_allocator, shape_of
from engine.errors import BackendError
from engine.manifest import TensorSpec

logger = logging.getLogger(__name__)

# Contexts of a lane; the one unused for longest goes. All 48 buckets of the usual limits fit. A context adds
# its outputs (8.5 MB at most there, on both sides), its CUDA graph and, with RTX, the kernels of its shape.
MOST_SLOTS = 64


class _Closable(Protocol):
    def close(self) -> None: ...


Owned = TypeVar("Owned", bound=_Closable)


class Staged(NamedTuple):
    """A tensor's pinned memory and its memory on the GPU."""

    host: Pinned
    device: Memory
    dtype: np.dtype[Any]


class Resources:
    """What was allocated together and is freed together, the latest first."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._stack = ExitStack()

    def own(self, thing: Owned) -> Owned:
        """Take over `thing`, which `close` will close."""
        self._stack.callback(thing.close)
        return thing

    def stage(self, shape: tuple[int, ...], spec: TensorSpec) -> Staged:
        """Allocate a tensor on both sides."""
        dtype = np.dtype(spec.dtype)
        size = bytes_of(shape, dtype)
        return Staged(self.own(Pinned(self.driver, size)), self.own(Memory(self.driver, size)), dtype)

    def close(self) -> None:
        """Free everything."""
        self._stack.close()


class _Shared(NamedTuple):
    """What all buckets of a lane use, one run after the other."""

    engine: Engine
    stream: Stream
    scratch: Memory
    inputs: dict[str, Staged]


class Lane:
    """What one caller at a time runs through; creating one and `run` need its GPU to be the current one.

    A lane that is dropped without `close` frees its memory too.
    """

    def __init__(self, engine: Engine, gpu: Gpu) -> None:
        """Allocate for the largest shapes of the engine's profiles; raises BackendError."""
        self._slots: OrderedDict[tuple[int, Bucket], _Slot] = OrderedDict()
        largest = Bucket(
            max(profile.batch[1] for profile in engine.profiles),
            max(profile.tokens[1] for profile in engine.profiles),
        )
        resources = Resources(gpu.driver)
        try:
            self._shared = _Shared(
                engine,
                resources.own(Stream(gpu.driver)),
                resources.own(Memory(gpu.driver, engine.scratch_bytes)),
                {spec.name: resources.stage(shape_of(spec, largest), spec) for spec in engine.inputs},
            )
        except BaseException:
            resources.close()
            raise
        # Nothing that the finalizer holds may lead back to the lane, which would never die then.
        self._finalizer = weakref.finalize(self, _free, gpu, self._shared.stream, self._slots, resources)
        self._finalizer.atexit = False  # the end of the process frees everything by itself

    def run(self, feeds: Arrays, profile: Profile, bucket: Bucket) -> dict[str, np.ndarray]:
        """Run one batch that fits the bucket and return its outputs by name; raises BackendError."""
        engine, *_, inputs = self._shared
        engine.forget()
        batch, tokens = feeds["input_ids"].shape
        for spec in engine.inputs:
            staged = inputs[spec.name]
            _pad(staged.host.array(shape_of(spec, bucket), staged.dtype), feeds[spec.name])
        return cut(self._slot(profile, bucket).run(), batch, tokens)

    def close(self) -> None:
        """Free everything once the stream has run dry; raises BackendError where the driver fails."""
        self._finalizer()

    def _slot(self, profile: Profile, bucket: Bucket) -> _Slot:
        key = profile.number, bucket
        if key not in self._slots:
            if len(self._slots) >= MOST_SLOTS:
                self._slots.popitem(last=False)[1].close()
            self._slots[key] = _Slot(self._shared, profile, bucket)
        self._slots.move_to_end(key)
        return self._slots[key]


def _free(
    gpu: Gpu, stream: Stream, slots: OrderedDict[tuple[int, Bucket], _Slot], resources: Resources
) -> None:
    """Free what a lane held; on any thread, since it may be the garbage collector's."""
    with gpu.current(), ExitStack() as stack:
        stack.callback(resources.close)
        while slots:  # before the memory that their contexts point into
            stack.callback(slots.popitem()[1].close)
        stream.wait()


class _Slot:
    """The context, the outputs and the graph of one bucket.

    The first run is launched step by step, so that the library does its lazy set-up; then a run is recorded
    with its copies, and from there on it is one launch.
    """

    def __init__(self, shared: _Shared, profile: Profile, bucket: Bucket) -> None:
        self._shared, self._engine, self._bucket = shared, shared.engine, bucket
        self._context = self._engine.context(profile, shared.scratch, shared.stream.handle)
        self._resources = Resources(shared.stream.driver)
        self._graph: Graph | None = None
        self._sizes: dict[str, int] = {}
        self._outputs: dict[str, tuple[Staged, tuple[int, ...]]] = {}
        self._growing: dict[str, tuple[Any, np.dtype[Any]]] = {}
        try:
            for spec in self._engine.inputs:
                self._set_input(spec)
            for spec in self._engine.outputs:
                self._add_output(spec)
        except BaseException:
            self.close()
            raise
        # What the library allocates in mid-run, or records by itself, cannot be recorded here.
        self._recordable = not self._growing and not self._engine.captures_itself

    def close(self) -> None:
        """Destroy the context, then free the memory that it points into; nothing may run on it any more."""
        self._context = None
        self._resources.close()

    def run(self) -> dict[str, np.ndarray]:
        """Run on the staged inputs; the outputs are views that the next run overwrites."""
        stream = self._shared.stream
        if self._graph is not None:
            self._graph.launch(stream)
        else:
            self._enqueue()
        stream.wait()
        outputs = {
            name: staged.host.array(shape, staged.dtype) for name, (staged, shape) in self._outputs.items()
        }
        outputs |= {name: self._fetch(*grown) for name, grown in self._growing.items()}
        if self._recordable:
            self._record()
        return outputs

    def _enqueue(self) -> None:
        """Queue the copies to the GPU, the network, and the copies back."""
        stream = self._shared.stream
        for name, size in self._sizes.items():
            stream.send(self._shared.inputs[name].device, self._shared.inputs[name].host, size)
        if not self._context.execute_async_v3(stream.handle):
            raise self._engine.failure(f"run {self._bucket.batch} pairs of {self._bucket.tokens} tokens")
        for staged, _ in self._outputs.values():
            stream.fetch(staged.host, staged.device, staged.device.size)

    def _record(self) -> None:
        """Record a run as a graph; where that fails, go on without one."""
        self._recordable = False
        try:
            with self._shared.stream.capture() as graph:
                self._enqueue()
        except BackendError as error:
            logger.warning("no CUDA graph for %s, which stays slower: %s", self._bucket, error)
        else:
            self._graph = self._resources.own(graph)

    def _set_input(self, spec: TensorSpec) -> None:
        """Set the shape and address of an input."""
        shape = shape_of(spec, self._bucket)
        self._sizes[spec.name] = bytes_of(shape, np.dtype(spec.dtype))
        if not self._context.set_input_shape(spec.name, shape):
            raise self._engine.failure(f"take {spec.name} of shape {list(shape)}")
        self._bind(spec.name, self._shared.inputs[spec.name].device)

    def _add_output(self, spec: TensorSpec) -> None:
        """Allocate an output; where its shape depends on values, set an allocator for the run to call."""
        shape = tuple(self._context.get_tensor_shape(spec.name))
        if min(shape, default=0) >= 0:
            staged = self._resources.stage(shape, spec)
            self._outputs[spec.name] = staged, shape
            self._bind(spec.name, staged.device)
            return
        allocator = self._resources.own(make_allocator(self._engine.trt, self._resources.driver))
        self._growing[spec.name] = allocator, np.dtype(spec.dtype)
        if not self._context.set_output_allocator(spec.name, allocator):
            raise self._engine.failure(f"take an allocator for {spec.name}")

    def _bind(self, name: str, memory: Memory) -> None:
        if not self._context.set_tensor_address(name, memory.address):
            raise self._engine.failure(f"take an address for {name}")

    def _fetch(self, allocator: Any, dtype: np.dtype[Any]) -> np.ndarray:
        """Copy an output that the run allocated to the host."""
        size = bytes_of(allocator.shape, dtype)
        host = Pinned(self._resources.driver, size)
        try:
            self._shared.stream.fetch(host, allocator.memory, size)
            self._shared.stream.wait()
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
