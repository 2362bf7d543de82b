"""NVIDIA's CUDA driver through ctypes: functions, devices, memory, streams and graphs, without torch.

The driver is the one library that every machine with a GPU has, and its ABI is stable; the runtime library
would have to be found in one of several places and versions. The context is the device's primary one, which
the runtime library inside TensorRT uses too, so streams and addresses mean the same on both sides.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_ulonglong, c_void_p
from typing import Any

import numpy as np

from engine.errors import BackendError

Prototypes = Mapping[str, tuple[Any, ...]]

# Exported names with the types of their arguments, as in cuda.h; each function returns a CUresult.
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}
# What launches code of one's own; no backend does.
LAUNCHING: dict[str, tuple[Any, ...]] = {
    "cuDriverGetVersion": PROTOTYPES["cuDriverGetVersion"],
    "cuGetErrorString": PROTOTYPES["cuGetErrorString"],
    "cuModuleLoadData": (POINTER(c_void_p), c_void_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
}
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the default stream of others
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile
_OUT_OF_MEMORY = 2
_NAME_BYTES = 256


class Driver:
    """The driver's functions; `call` turns their status into a BackendError."""

    def __init__(self, library: Any, prototypes: Prototypes = PROTOTYPES) -> None:
        """Bind the functions of `prototypes`; raises AttributeError where `library` lacks one."""
        self._functions = {name: getattr(library, name) for name in prototypes}
        for name, types in prototypes.items():
            self._functions[name].argtypes, self._functions[name].restype = types, c_int

    def call(self, name: str, *arguments: Any) -> None:
        """Call one function; raises BackendError with the driver's reason where it fails."""
        status = self.attempt(name, *arguments)
        if status == 0:
            return
        text = c_char_p()
        self.attempt("cuGetErrorString", status, byref(text))
        reason = (text.value or b"an unknown error").decode(errors="replace")
        hint = "; free GPU memory or lower the bundle's limits" if status == _OUT_OF_MEMORY else ""
        raise BackendError(f"the NVIDIA driver failed in {name}: {reason} (error {status}){hint}")

    def attempt(self, name: str, *arguments: Any) -> int:
        """Call one function and return its status, 0 for success."""
        return int(self._functions[name](*arguments))

    def number(self, name: str, *arguments: Any) -> int:
        """Return what a function writes to its first argument, an int."""
        value = c_int()
        self.call(name, byref(value), *arguments)
        return value.value

    def handle(self, name: str, *arguments: Any) -> c_void_p:
        """Return what a function writes to its first argument, a pointer to an object of the driver."""
        pointer = c_void_p()
        self.call(name, byref(pointer), *arguments)
        return pointer

    def version(self) -> int:
        """The newest CUDA that the driver serves, 13000 for 13.0; known before the driver is initialised."""
        return self.number("cuDriverGetVersion")

    def device_name(self, device: int) -> str:
        """Name of a device, such as "NVIDIA H200"."""
        text = ctypes.create_string_buffer(_NAME_BYTES)
        self.call("cuDeviceGetName", text, _NAME_BYTES, device)
        return text.value.decode(errors="replace")

    def capability(self, device: int) -> str:
        """Compute capability of a device, such as "9.0"."""
        return ".".join(str(self.number("cuDeviceGetAttribute", key, device)) for key in (_MAJOR, _MINOR))


def load_library() -> ctypes.CDLL:
    """Load the driver's library, without initialising it; raises OSError where there is none."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


@functools.cache
def open_gpu(index: int) -> Gpu:
    """GPU number `index` of those visible to the process; raises BackendError where there is none.

    Its context stays for the life of the process, as torch's does: TensorRT keeps pointers into it.
    """
    try:
        driver = Driver(load_library())
    except OSError as error:
        raise BackendError(
            f"no NVIDIA driver was found ({error}); install it, or use device 'cpu'"
        ) from error
    except AttributeError as error:
        raise BackendError(
            f"the NVIDIA driver is too old ({error}); update it to CUDA 12 or newer"
        ) from error
    driver.call("cuInit", 0)
    count = driver.number("cuDeviceGetCount")
    if not 0 <= index < count:
        raise BackendError(f"device 'cuda:{index}': this machine shows {count} NVIDIA GPU(s), from cuda:0")
    return Gpu(driver, index)


class Gpu:
    """One GPU: `name`, compute `capability` ("9.0"), and the newest `cuda` of its driver (13000 is 13.0)."""

    def __init__(self, driver: Driver, index: int) -> None:
        self.driver, self.index = driver, index
        self._device = driver.number("cuDeviceGet", index)
        self.name, self.capability = driver.device_name(self._device), driver.capability(self._device)
        self.cuda = driver.version()
        self._context: c_void_p | None = None
        self._lock = threading.Lock()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this GPU the calling thread's in the block; its previous one comes back afterwards."""
        with self._lock:
            if self._context is None:  # created when needed: it takes some 0.3 GB of GPU memory
                self._context = self.driver.handle("cuDevicePrimaryCtxRetain", self._device)
        self.driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self.driver.handle("cuCtxPopCurrent_v2")


class Memory:
    """`size` bytes on the current GPU, aligned to 256, at `address`."""

    def __init__(self, driver: Driver, size: int) -> None:
        self._driver, self.size = driver, size
        address = c_uint64()
        driver.call("cuMemAlloc_v2", byref(address), max(size, 1))
        self.address = address.value

    def close(self) -> None:
        """Free the memory; no stream may use it any more."""
        self._driver.call("cuMemFree_v2", self.address)


class Pinned:
    """`size` bytes of page-locked host memory at `address`: copies of it run beside the host."""

    def __init__(self, driver: Driver, size: int) -> None:
        self._driver, self.size = driver, max(size, 1)
        self.address = driver_address(driver.handle("cuMemHostAlloc", self.size, 0))

    def array(self, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        """The beginning of the memory as an array; not to be used after `close`."""
        raw = memoryview((ctypes.c_char * self.size).from_address(self.address))
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(raw, dtype, count).reshape(shape)

    def close(self) -> None:
        """Free the memory."""
        self._driver.call("cuMemFreeHost", self.address)


class Stream:
    """A queue of work on the current GPU, `handle` by number."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.handle = driver_address(driver.handle("cuStreamCreate", _NON_BLOCKING))

    def send(self, target: Memory, source: Pinned, size: int) -> None:
        """Copy the first `size` bytes to the GPU."""
        self.driver.call("cuMemcpyHtoDAsync_v2", target.address, source.address, size, self.handle)

    def fetch(self, target: Pinned, source: Memory, size: int) -> None:
        """Copy the first `size` bytes to the host."""
        self.driver.call("cuMemcpyDtoHAsync_v2", target.address, source.address, size, self.handle)

    def wait(self) -> None:
        """Wait until all queued work is done; raises BackendError where it failed."""
        self.driver.call("cuStreamSynchronize", self.handle)

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Record what the block queues, without running it; raises BackendError where that fails.

        The graph can be launched after the block.
        """
        graph = Graph(self.driver)
        self.driver.call("cuStreamBeginCapture_v2", self.handle, _THREAD_LOCAL)
        recorded = c_void_p()
        try:
            yield graph
        except BaseException:
            self.driver.attempt("cuStreamEndCapture", self.handle, byref(recorded))  # or it records for ever
            raise
        self.driver.call("cuStreamEndCapture", self.handle, byref(recorded))
        try:
            graph.executable = self.driver.handle("cuGraphInstantiateWithFlags", recorded, 0)
        finally:
            self.driver.call("cuGraphDestroy", recorded)

    def close(self) -> None:
        """Destroy the stream."""
        self.driver.call("cuStreamDestroy_v2", self.handle)


class Graph:
    """Recorded work."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.executable: c_void_p | None = None

    def launch(self, stream: Stream) -> None:
        """Queue all of it at once."""
        self._driver.call("cuGraphLaunch", self.executable, stream.handle)

    def close(self) -> None:
        """Destroy the graph."""
        self._driver.call("cuGraphExecDestroy", self.executable)


def driver_address(pointer: c_void_p) -> int:
    """The number that a pointer is; raises BackendError for a null one."""
    if pointer.value is None:
        raise BackendError("the NVIDIA driver gave a null pointer without an error; update it")
    return pointer.value
