"""Doubles of NVIDIA's driver and of TensorRT's runtime that really answer, on memory of the host.

Work on a stream waits in a queue until somebody waits for the stream, so that what is read too early is not
there; memory is born as NaN. `test_surface` and `test_cuda` hold both doubles to the real libraries.
One file, since the two doubles share their queue and memory.
"""

from __future__ import annotations

import collections
import ctypes
import enum
import hashlib
import itertools
import json
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from engine import backends
from engine.backends import cuda, tensorrt_target

ALIGNED = 256
INVALID_CONTEXT, OUT_OF_MEMORY = 201, 2


class Refused(Exception):
    """A CUresult other than success."""


class Entry:
    """One exported function; as ctypes, it takes what its argument types take."""

    def __init__(self, library, name):
        self.library, self.name, self.argtypes, self.restype = library, name, None, None

    def __call__(self, *arguments):
        assert len(arguments) == len(self.argtypes), self.name
        for kind, argument in zip(self.argtypes, arguments, strict=True):
            kind.from_param(argument)
        self.library.log.append(self.name)
        plain = [
            getattr(x, "_obj", getattr(x, "value", x) if isinstance(x, ctypes.c_void_p) else x)
            for x in arguments
        ]
        try:
            self.library.fail(self.name)
            getattr(self.library, f"do_{self.name}")(*plain)
        except Refused as error:
            return error.args[0]
        return 0


class FakeDriver:
    """libcuda with `gpus` GPUs; `failing` maps a function's name to the status it answers once."""

    def __init__(self, capability="8.9", gpus=1, version=13000):
        self.capability, self.gpus, self.version = capability, gpus, version
        self.log, self.failing, self.entries = [], {}, {}
        self.memory, self.pinned, self.streams, self.graphs = {}, {}, {}, {}
        self.recording = {}
        self.numbers = itertools.count(4096)
        self.thread = threading.local()
        self.lock = threading.RLock()
        self.free_bytes = 2**31

    def __getattr__(self, name):
        if f"do_{name}" not in dir(type(self)):
            raise AttributeError(f"undefined symbol: {name}")
        return self.entries.setdefault(name, Entry(self, name))

    def fail(self, name):
        if name in self.failing:
            raise Refused(self.failing.pop(name))

    def held(self):
        return [*self.memory, *self.pinned, *self.streams, *self.graphs]

    def queue(self, stream, work):
        """What TensorRT does too: work on a stream, recorded where that is being recorded."""
        with self.lock:
            (self.recording if stream in self.recording else self.streams)[stream].append(work)

    def need_context(self):
        if not getattr(self.thread, "stack", None):
            raise Refused(INVALID_CONTEXT)

    def do_cuInit(self, flags): ...

    def do_cuDriverGetVersion(self, version):
        version.value = self.version

    def do_cuDeviceGetCount(self, count):
        count.value = self.gpus

    def do_cuDeviceGet(self, device, ordinal):
        device.value = ordinal

    def do_cuDeviceGetName(self, text, size, device):
        text.value = b"NVIDIA Double"

    def do_cuDeviceGetAttribute(self, value, attribute, device):
        value.value = int(self.capability.split(".")[{75: 0, 76: 1}[attribute]])

    def do_cuDevicePrimaryCtxRetain(self, context, device):
        context.value = 77 + device

    def do_cuCtxPushCurrent_v2(self, context):
        self.thread.stack = [*getattr(self.thread, "stack", []), context]

    def do_cuCtxPopCurrent_v2(self, context):
        context.value = self.thread.stack.pop()

    def allocate(self, kept, size):
        self.need_context()
        with self.lock:
            if size > self.free_bytes:
                raise Refused(OUT_OF_MEMORY)
            buffer = (ctypes.c_char * (size + ALIGNED))()
            ctypes.memset(buffer, 0xFF, size + ALIGNED)
            address = -(-ctypes.addressof(buffer) // ALIGNED) * ALIGNED
            kept[address] = buffer
        return address

    def do_cuMemAlloc_v2(self, address, size):
        address.value = self.allocate(self.memory, size)

    def do_cuMemHostAlloc(self, address, size, flags):
        address.value = self.allocate(self.pinned, size)

    def do_cuMemFree_v2(self, address):
        self.need_context()
        del self.memory[address]

    def do_cuMemFreeHost(self, address):
        self.need_context()
        del self.pinned[address]

    def do_cuMemcpyHtoDAsync_v2(self, target, source, size, stream):
        assert target in self.memory and source in self.pinned
        self.queue(stream, lambda: ctypes.memmove(target, source, size))

    def do_cuMemcpyDtoHAsync_v2(self, target, source, size, stream):
        assert target in self.pinned and source in self.memory
        self.queue(stream, lambda: ctypes.memmove(target, source, size))

    def do_cuStreamCreate(self, stream, flags):
        self.need_context()
        stream.value = next(self.numbers)
        self.streams[stream.value] = []

    def do_cuStreamSynchronize(self, stream):
        assert stream not in self.recording
        work, self.streams[stream] = self.streams[stream], []
        for step in work:
            step()

    def do_cuStreamDestroy_v2(self, stream):
        del self.streams[stream]

    def do_cuStreamBeginCapture_v2(self, stream, mode):
        self.recording[stream] = []

    def do_cuStreamEndCapture(self, stream, graph):
        graph.value = next(self.numbers)
        self.graphs[graph.value] = self.recording.pop(stream)

    def do_cuGraphInstantiateWithFlags(self, executable, graph, flags):
        executable.value = next(self.numbers)
        self.graphs[executable.value] = list(self.graphs[graph])

    def do_cuGraphLaunch(self, executable, stream):
        for step in self.graphs[executable]:
            self.queue(stream, step)

    def do_cuGraphExecDestroy(self, executable):
        del self.graphs[executable]

    def do_cuGraphDestroy(self, graph):
        del self.graphs[graph]

    def do_cuGetErrorString(self, status, text):
        text.value = {OUT_OF_MEMORY: b"out of memory"}.get(status, b"a reason")


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class CudaGraphStrategy(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY, EAGER, NONE = range(3)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self): ...


class IOutputAllocator:
    def __init__(self): ...


class IRuntimeConfig:
    cuda_graph_strategy = dynamic_shapes_kernel_specialization_strategy = None

    def __init__(self):
        self.allocation = self.cache = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.allocation = strategy

    def create_runtime_cache(self):
        return object()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


class IExecutionContext:
    """Holds what was set and runs the network on it."""

    def __init__(self, engine, config):
        self._engine, self._config = engine, config
        self._profile = self._scratch = None
        self._shapes, self._addresses, self._allocators = {}, {}, {}

    def set_optimization_profile_async(self, profile_index, stream_handle):
        assert stream_handle in self._engine.world.driver.streams
        self._profile = profile_index
        return 0 <= profile_index < len(self._engine.world.profiles)

    def set_device_memory(self, memory, size):
        assert size >= self._engine.device_memory_size_v2 and memory % ALIGNED == 0
        self._scratch = memory

    def set_input_shape(self, name, shape):
        assert name not in self._shapes, "one context for each shape"
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        self._shapes[name] = tuple(shape)
        return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name, memory):
        self._addresses[name] = memory
        return memory in self._engine.world.driver.memory

    def set_output_allocator(self, name, output_allocator):
        self._allocators[name] = output_allocator
        return True

    def get_tensor_shape(self, name):
        if name in self._engine.world.by_values:
            return (-1, *self._shape(name)[1:])
        return self._shape(name)

    def execute_async_v3(self, stream_handle):
        world = self._engine.world
        assert self._scratch in world.driver.memory
        world.runs.append((id(self), dict(self._shapes)["input_ids"], self._profile))
        if world.complaints:
            for severity, text in world.complaints.pop():
                self._engine.logger.log(severity, text)
            return False
        for name, allocator in self._allocators.items():
            size = int(np.prod(self._shape(name))) * 4
            address = allocator.reallocate_output_async(name, 0, size, ALIGNED, stream_handle)
            if address not in world.driver.memory:
                return False
            self._addresses[name] = address
            allocator.notify_shape(name, self._shape(name))
        world.driver.queue(stream_handle, self._run)
        return True

    def _shape(self, name):
        batch, tokens = self._shapes["input_ids"]
        sizes = {"batch": batch, "tokens": tokens, "tokens - 1": tokens - 1}
        return tuple(sizes.get(size, size) for size in self._engine.world.specs[name].shape)

    def _view(self, name):
        shape, dtype = self._shape(name), np.dtype(self._engine.world.specs[name].dtype)
        raw = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(self._addresses[name])
        return np.frombuffer(raw, dtype).reshape(shape)

    def _run(self):
        world = self._engine.world
        answers = world.session.run(world.outputs, {name: self._view(name) for name in self._shapes})
        for name, answer in zip(world.outputs, answers, strict=True):
            self._view(name)[:] = answer


class ICudaEngine:
    device_memory_size_v2 = 1000

    def __init__(self, world, logger):
        self.world, self.logger = world, logger
        self.names = list(world.specs)

    num_io_tensors = property(lambda self: len(self.names))
    num_optimization_profiles = property(lambda self: len(self.world.profiles))

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_mode(self, name):
        return TensorIOMode.OUTPUT if name in self.world.outputs else TensorIOMode.INPUT

    def get_tensor_dtype(self, name):
        return self.world.dtypes.get(name, self.world.specs[name].dtype)

    def get_tensor_profile_shape(self, name, profile_index):
        (low, high), shape = self.world.profiles[profile_index], self.world.specs[name].shape
        return [tuple({"batch": b, "tokens": t}.get(n, n) for n in shape) for b, t in (low, low, high)]

    def create_execution_context(self, strategy):
        assert self.world.weights != "none", "a stripped engine computes nothing"
        self.world.contexts.append(strategy)
        return None if self.world.no_context else IExecutionContext(self, strategy)

    def create_runtime_config(self):
        return IRuntimeConfig()


class ParserError:
    def __init__(self, text):
        self._text = text

    def desc(self):
        return self._text


class Refitter:
    """Knows which weights of a stripped engine came; `world.missing` are those that no graph has."""

    def __init__(self, engine, logger):
        self.engine, self.logger = engine, logger

    def get_missing_weights(self):
        return self.engine.world.missing

    def refit_cuda_engine(self):
        world = self.engine.world
        assert world.weights.startswith("given") and not world.missing
        if world.complaints:
            for severity, text in world.complaints.pop():
                self.logger.log(severity, text)
            return False
        world.weights = world.weights.removeprefix("given ")
        return True


class OnnxParserRefitter:
    """Reads a graph; `world.unreadable` is what it says of one that it does not take."""

    def __init__(self, refitter, logger):
        self._world = refitter.engine.world

    num_errors = property(lambda self: len(self._world.unreadable))

    def get_error(self, index):
        return ParserError(self._world.unreadable[index])

    def refit_from_bytes(self, model, path=None):
        assert bytes(model)
        self._world.weights = f"given {path}"
        return not self._world.unreadable


class Runtime:
    world = None
    engine_host_code_allowed = False

    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        world = self.world
        world.loaded.append(bytes(serialized_engine))
        world.trusted.append(self.engine_host_code_allowed)
        if world.complaints:
            for severity, text in world.complaints.pop():
                self.logger.log(severity, text)
            return None
        return ICudaEngine(world, self.logger)


RTX_ONLY = (CudaGraphStrategy, DynamicShapesKernelSpecializationStrategy, IRuntimeConfig)
BOTH = (
    TensorIOMode,
    ExecutionContextAllocationStrategy,
    ILogger,
    IOutputAllocator,
    ICudaEngine,
    ParserError,
    Refitter,
    OnnxParserRefitter,
)


def make_library(world, name, version):
    module = ModuleType(name)
    module.__version__, module.nptype = version, lambda dtype: dtype
    module.Runtime = type("Runtime", (Runtime,), {"world": world})
    for kind in (*BOTH, *(RTX_ONLY if name == "tensorrt_rtx" else ())):
        setattr(module, kind.__name__, kind)
    return module


@pytest.fixture
def doubles():
    """The classes of the double, by the names of those that they stand for."""
    return (*BOTH, *RTX_ONLY, IExecutionContext, Runtime)


@pytest.fixture(scope="session")
def session(bundle_dir):
    return onnxruntime.InferenceSession(str(bundle_dir / "model.onnx"), providers=["CPUExecutionProvider"])


@pytest.fixture
def engine_bundle(bundle_copy, manifest_template, write_manifest):
    """A function that puts engines (fields over the usual ones) into a bundle and returns its path."""

    def put(*engines):
        manifest = manifest_template()
        for fields in engines or ({},):
            entry = {
                "file": "model.trt-sm89.engine",
                "library": "tensorrt",
                "version": "11.4.0.106",
                "compute_capabilities": ["8.9"],
                "onnx_sha256": hashlib.sha256((bundle_copy / "model.onnx").read_bytes()).hexdigest(),
                "profiles": [{}],
            } | fields
            (bundle_copy / entry["file"]).write_bytes(b"an engine")
            manifest["engines"].append(entry)
        write_manifest(bundle_copy, manifest)
        return bundle_copy

    return put


@pytest.fixture
def machine(monkeypatch, session, bundle_dir):
    """A function that makes this a machine with a GPU and TensorRT; what happened there, what is to fail."""

    def make(library="tensorrt", version="11.4.0.106", profiles=(((1, 2), (4, 127)),), **driver):
        manifest = json.loads((bundle_dir / "manifest.json").read_text())
        specs = {t["name"]: SimpleNamespace(**t) for t in manifest["inputs"] + manifest["outputs"]}
        world = SimpleNamespace(
            driver=FakeDriver(**driver),
            session=session,
            specs=specs,
            outputs=[t["name"] for t in manifest["outputs"]],
            profiles=list(profiles),
            dtypes={},
            by_values=set(),
            complaints=[],
            no_context=False,
            weights="its own",
            missing=[],
            unreadable=[],
            loaded=[],
            trusted=[],
            contexts=[],
            runs=[],
        )
        cuda.open_gpu.cache_clear()
        monkeypatch.setattr(cuda, "load_library", lambda: world.driver)
        monkeypatch.setattr(backends, "_has_driver", lambda: True)
        monkeypatch.setattr(backends, "_found", lambda name: True)
        monkeypatch.setattr(tensorrt_target, "installed", lambda: {library: version})
        monkeypatch.setitem(sys.modules, library, make_library(world, library, version))
        return world

    yield make
    cuda.open_gpu.cache_clear()


@pytest.fixture
def counted():
    """How often each name stands in a log."""
    return lambda log: collections.Counter(log)
