"""What all backends share: how a batch is checked, submitted and run, and how failures are reported."""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np

from engine.backends.buckets import Arrays, check_ids, measure
from engine.errors import BackendError, Dgm4Error
from engine.inputs.network_input import join_slots
from engine.manifest import Manifest, TensorSpec

if TYPE_CHECKING:
    from engine.bundle import Bundle

Network = TypeVar("Network")
Outputs = dict[str, np.ndarray]


class OutOfMemoryError(BackendError):
    """The device, or the host, has no memory for a batch; a smaller one may fit."""


# What the libraries say, which share no kind: torch, CUDA and TensorRT; cuBLAS and cuDNN; C++; ONNX Runtime,
# NumPy, and torch on a CPU.
_NO_MEMORY = re.compile(
    r"out ?of ?memory|_STATUS_ALLOC_FAILED|bad[_ ]alloc|(failed to|unable to|can't) allocate", re.IGNORECASE
)


def lacks_memory(error: BaseException) -> bool:
    """Whether a library's error says that there was no memory."""
    told = f"{type(error).__name__}: {error}"  # torch's kind is an OutOfMemoryError too
    return isinstance(error, MemoryError) or _NO_MEMORY.search(told) is not None


class Pending(Protocol):
    """A batch that was submitted."""

    def result(self) -> Outputs:
        """Wait for the batch and return its outputs by name; raises BackendError where it failed."""
        ...


class Finished:
    """A batch whose outputs are there."""

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs

    def result(self) -> Outputs:
        """Return the outputs by name."""
        return self._outputs


class Backend(ABC, Generic[Network]):
    """A loaded network. Every method but `close` may be called from several threads at once.

    name, device: "torch" and "cuda:0", for example.
    library: what error messages call the library that runs the network.
    resizes: `submit` takes RGB images of any size, uint8 [H, W, 3]; else the network's input, float32
        [3, S, S].
    asynchronous: `submit` returns while the network runs; else once it has run.
    chosen: why it is this backend that runs the bundle; `engine.backends.create` says so.
    """

    name: str
    library: str
    resizes = False
    asynchronous = False
    chosen = "asked for"

    def __init__(self, network: Network, manifest: Manifest, device: str) -> None:
        self.device = device
        self._network: Network | None = network
        self._manifest = manifest
        self._outputs = [spec.name for spec in manifest.outputs]

    def submit(self, images: Sequence[np.ndarray], text: Arrays) -> Pending:
        """Submit one batch: images, float32 [3, S, S] or what `resizes` says, and the other inputs by name.

        A single image is that of all captions; `run` gets it as a view that repeats it. Images in slots of
        one buffer are not copied. The network gets what `engine.inputs.network_input` makes of an image, bit
        for bit. Raises BackendError.
        """
        pixels = join_slots(images)
        if len(pixels) == 1:
            pixels = np.broadcast_to(pixels, (len(text["input_ids"]), *pixels.shape[1:]))
        return Finished(self.run({"image": pixels, **text}))

    def run(self, feeds: Arrays) -> Outputs:
        """Run one batch and return its outputs by name; `feeds` are the manifest's inputs by name.

        Raises BackendError for other inputs, where the library fails, and after `close`.
        """
        network = self._open()
        sizes = self._check(feeds, self._manifest.inputs)
        with self._reported(feeds):
            return self._run(network, feeds, sizes["batch"], sizes["tokens"])

    def free(self) -> None:
        """Give memory that is kept for later batches back to the device, where there is such memory."""

    def close(self) -> None:
        """Drop the network; its memory is freed once running calls are done."""
        self._network = None

    @abstractmethod
    def _run(self, network: Network, feeds: Arrays, batch: int, tokens: int) -> Outputs:
        """Run checked inputs."""

    def _open(self) -> Network:
        network = self._network
        if network is None:
            raise BackendError("the backend was closed; create another Predictor")
        return network

    def _check(self, feeds: Arrays, specs: Sequence[TensorSpec]) -> Mapping[str, int]:
        """Return the sizes "batch" and "tokens" of `feeds`; raises BackendError unless they fit `specs`."""
        sizes = measure(feeds, specs)
        check_ids(feeds["input_ids"], self._manifest.model.config.vocabulary)
        return sizes

    @contextmanager
    def _reported(self, feeds: Arrays) -> Iterator[None]:
        """Turn whatever the library raises into a BackendError with the shapes of the inputs."""
        try:
            yield
        except Exception as error:  # the errors of these libraries share no base but Exception
            short = lacks_memory(error)
            if isinstance(error, Dgm4Error) and not short:
                raise
            if short:  # the frames of its traceback hold what fills the memory
                error.__traceback__ = None
            shapes = {name: list(array.shape) for name, array in feeds.items()}
            kind = OutOfMemoryError if short else BackendError
            raise kind(f"{self.library} failed on inputs of shape {shapes}: {error}") from error


def graph_files(bundle: Bundle, model: str, data: str) -> list[str]:
    """The graph `model` and, where the bundle has it, the file of its weights `data`."""
    return [name for name in (model, data) if name == model or name in bundle.manifest.files]


@functools.cache
def has_vnni() -> bool:
    """Whether an x86 CPU adds int8 products in 32 bits; false where that cannot be told."""
    try:
        return re.search(r"\b(avx512_vnni|avx_vnni)\b", Path("/proc/cpuinfo").read_text()) is not None
    except OSError:
        return False
