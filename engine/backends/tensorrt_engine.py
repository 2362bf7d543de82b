"""A deserialised engine of TensorRT or TensorRT-RTX: profiles, tensors, contexts, and the errors."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.backends.buckets import Bucket, bucket_of
from engine.backends.cuda import Driver, Memory
from engine.errors import BackendError, BundleError
from engine.manifest import EngineEntry, Limits, Manifest, TensorSpec

logger = logging.getLogger(__name__)

_MOST_MESSAGES = 8  # of a failure: the first says what happened, the rest follow from it
_MIN, _MAX = 0, 2  # of the three shapes of a profile


class Profile(NamedTuple):
    """Smallest and largest number of pairs and of tokens that one of the engine's profiles takes."""

    number: int
    batch: tuple[int, int]
    tokens: tuple[int, int]


class Model(NamedTuple):
    """A verified file of the bundle: its path, for messages and for the files beside it, and its content."""

    path: Path
    content: bytes


class Engine:
    """An engine on the current GPU; contexts of it may be created from any thread."""

    def __init__(
        self, entry: EngineEntry, model: Model, manifest: Manifest, graph: Model | None = None
    ) -> None:
        """Deserialise `model`; a stripped engine takes its weights from the ONNX model `graph`.

        Raises BackendError where the library fails, BundleError for other tensors than the manifest's.
        """
        self.trt = _import(entry.library)
        self._errors = error_log(self.trt)
        self._lock = threading.Lock()
        try:
            self._runtime = self.trt.Runtime(self._errors)
        except TypeError as error:  # what the binding makes of a null pointer
            raise self.failure("start on this machine") from error
        if entry.version_compatible:
            self._runtime.engine_host_code_allowed = True  # of the lean runtime that is embedded in it
        # From memory: the content that was hashed, even where the file has been replaced since.
        engine = self._runtime.deserialize_cuda_engine(model.content)
        if engine is None:
            raise self.failure(f"load {model.path}")
        self.engine = engine
        self.inputs, self.outputs = manifest.inputs, manifest.outputs
        _check_tensors(self.trt, engine, model.path, manifest)
        self.profiles = read_profiles(engine)
        if graph is not None:
            self._refit(model.path, graph)
        self._cache: Any = None

    @property
    def scratch_bytes(self) -> int:
        """Memory that a context needs for its activations, at any shape of any profile."""
        return int(self.engine.device_memory_size_v2)

    def context(self, profile: Profile, scratch: Memory, stream: int) -> Any:
        """Create an IExecutionContext of `profile` with its activations in `scratch`; raises BackendError."""
        with self._lock:
            context = self.engine.create_execution_context(self._options())
        if context is None:
            raise self.failure("make an execution context")
        if not context.set_optimization_profile_async(profile.number, stream):
            raise self.failure(f"take profile {profile.number}")
        context.set_device_memory(scratch.address, scratch.size)
        return context

    def failure(self, what: str) -> BackendError:
        """The error for what the library could not do, with its first message to this thread."""
        messages = self._errors.take()
        reason = messages[0] if messages else "it gave no reason"
        return BackendError(f"{self.trt.__name__} {self.trt.__version__} could not {what}: {reason}")

    def _options(self) -> Any:
        """Contexts get their memory from us; RTX compiles each shape eagerly and captures graphs itself."""
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.captures_itself:
            return strategy
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # A bucket has one shape: kernels compiled for it pay off, and a fallback would slow the first calls.
        kernels = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = kernels
        if self._cache is None:
            self._cache = config.create_runtime_cache()  # of compiled kernels, for all contexts
        config.set_runtime_cache(self._cache)
        return config

    def _refit(self, path: Path, graph: Model) -> None:
        """Put the weights of the ONNX model `graph` into the stripped engine; BackendError unless all fit."""
        refitter = self.trt.Refitter(self.engine, self._errors)
        parser = self.trt.OnnxParserRefitter(refitter, self._errors)
        # The parser takes the graph from memory, but reads external weights by path, relative to the graph's.
        done = parser.refit_from_bytes(graph.content, os.fspath(graph.path))
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        if done and (missing := refitter.get_missing_weights()):
            named = ", ".join(sorted(missing)[:_MOST_MESSAGES])
            reasons.append(f"{len(missing)} of its weights are not in the graph: {named}")
        if not done or reasons or not refitter.refit_cuda_engine():
            if reasons:
                self._errors.take()
                self._errors.add(reasons[0])
            raise self.failure(f"refit {path} from {graph.path.name}")

    def forget(self) -> None:
        """Drop this thread's earlier messages, so that the next failure's come first."""
        self._errors.take()

    @property
    def captures_itself(self) -> bool:
        """Whether the library records CUDA graphs by itself, as RTX does once its kernels are compiled."""
        return hasattr(self.trt, "CudaGraphStrategy")


@functools.cache
def error_log(trt: Any) -> Any:
    """The ILogger of a library, one for the life of the process, with the errors of each thread apart.

    The library keeps the first logger it is given, by raw pointer, in state that all engines of the process
    share, so a logger may never be freed. `take` returns the calling thread's messages, the earliest first,
    and drops them.
    """

    class ErrorLog(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._messages = threading.local()

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.add(" ".join(msg.split()))

        def add(self, message: str) -> None:
            logger.debug("%s: %s", trt.__name__, message)  # all, those of the library's own threads too
            messages = self._messages.__dict__.setdefault("list", [])
            if len(messages) < _MOST_MESSAGES:
                messages.append(message)

        def take(self) -> list[str]:
            return list(self._messages.__dict__.pop("list", []))

    return ErrorLog()


def make_allocator(trt: Any, driver: Driver) -> Any:
    """An IOutputAllocator for an output of data-dependent shape; has `memory` and `shape` after a run."""

    class OutputAllocator(trt.IOutputAllocator):
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.memory: Memory | None = None
            self.shape: tuple[int, ...] = ()

        def reallocate_output_async(
            self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            try:
                if self.memory is None or self.memory.size < size:
                    self.close()  # nothing runs on it: a lane waits for each run
                    self.memory = Memory(driver, size)
            except BackendError:
                return 0  # the library reports a null address as its own error
            return self.memory.address

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(shape)

        def close(self) -> None:
            memory, self.memory = self.memory, None
            if memory is not None:
                memory.close()

    return OutputAllocator()


def read_profiles(engine: Any) -> list[Profile]:
    """The ranges of the engine's profiles."""
    profiles = []
    for index in range(engine.num_optimization_profiles):
        text = engine.get_tensor_profile_shape("input_ids", index)
        low, high = tuple(text[_MIN]), tuple(text[_MAX])
        profiles.append(Profile(index, (low[0], high[0]), (low[1], high[1])))
    return profiles


def place(batch: int, tokens: int, profiles: Sequence[Profile]) -> tuple[Profile, Bucket]:
    """The profile and bucket for as many of `batch` pairs of `tokens` tokens as one run can take.

    The tightest profile that takes all of them; else the one that takes the most pairs, so that the caller
    splits. A bucket is never below its profile's smallest shape. Raises BackendError for too many tokens.
    """
    fitting = [profile for profile in profiles if tokens <= profile.tokens[1]]
    if not fitting:
        most = max(profile.tokens[1] for profile in profiles)
        raise BackendError(
            f"input_ids: expected 1 to {most} tokens, the engine's profiles, got {tokens}; "
            "export again with a higher --max-tokens"
        )
    whole = [profile for profile in fitting if batch <= profile.batch[1]]
    if whole:
        profile = min(whole, key=lambda profile: profile.batch[1] * profile.tokens[1])
    else:
        profile = max(fitting, key=lambda profile: profile.batch[1])
    limits = Limits(profile.batch[1], profile.tokens[1])
    bucket = bucket_of(min(batch, limits.max_batch), tokens, limits)
    return profile, Bucket(max(bucket.batch, profile.batch[0]), max(bucket.tokens, profile.tokens[0]))


def shape_of(spec: TensorSpec, bucket: Bucket) -> tuple[int, ...]:
    """Shape of an input in a bucket."""
    sizes = bucket._asdict()
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


def _import(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except (ImportError, OSError) as error:
        raise BackendError(f"{library} cannot be imported: {error}; install it again") from error


def _check_tensors(trt: Any, engine: Any, path: Path, manifest: Manifest) -> None:
    """Raise BundleError where the engine's tensors are not the manifest's."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    for mode, specs in (
        (trt.TensorIOMode.INPUT, manifest.inputs),
        (trt.TensorIOMode.OUTPUT, manifest.outputs),
    ):
        actual = {
            name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
            for name in names
            if engine.get_tensor_mode(name) == mode
        }
        expected = {spec.name: spec.dtype for spec in specs}
        if actual != expected:
            raise BundleError(f"{path}: expected the tensors {expected} of the manifest, got {actual}")
