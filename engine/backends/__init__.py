"""Backends: what runs a bundle's network. Each module is imported only when it is asked for."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

import numpy as np

from engine.errors import BackendError

if TYPE_CHECKING:
    from engine.bundle import Bundle

# name -> (libraries that must be installed, module with `create(bundle, device, threads)`, what it reads of a
# bundle), best one first. Dynamic int8, which ONNX Runtime runs fastest, has no flat graph.
_BACKENDS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "ort": (("onnxruntime",), "engine.backends.ort", "model.onnx"),
    "torch": (("torch", "safetensors"), "engine.backends.torch", "model.safetensors"),
    "openvino": (("openvino",), "engine.backends.openvino", "model.flat.onnx"),
}
# Never chosen by "auto": long test runs that had used it ended three times in a signal of unknown cause.
_ASKED_FOR = ("openvino",)


# Precisions whose graph is for TensorRT alone: ONNX Runtime's CPU provider has no product in bfloat16.
_NOT_FOR_ORT = ("bf16", "fp8")


class Backend(Protocol):
    """A loaded network. `run` may be called from several threads at once."""

    name: str
    device: str

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answer one batch: arrays by input name in, arrays by output name out; raises BackendError."""
        ...

    def close(self) -> None:
        """Release the network; `run` may not be called afterwards."""
        ...


@runtime_checkable
class PictureBackend(Backend, Protocol):
    """A backend on a device of its own, which makes the network's input there and runs beside the host."""

    def start(
        self, pictures: Sequence[np.ndarray], text: dict[str, np.ndarray]
    ) -> Callable[[], dict[str, np.ndarray]]:
        """Begin to answer one batch and return the function that waits for its answers.

        `pictures` are decoded, uint8 [H, W, 3] each of its own size; `text` is the other inputs by name. What
        the network gets is `engine.preprocess`'s, bit for bit. Both raise BackendError.
        """
        ...


class _Module(Protocol):
    def create(self, bundle: Bundle, device: str, threads: int | None) -> Backend: ...


def available() -> list[str]:
    """Names of the backends whose libraries are installed, the best one first; imports none of them."""
    return [name for name in _BACKENDS if not _missing(name)]


def create(name: str, bundle: Bundle, device: str = "auto", threads: int | None = None) -> Backend:
    """Load `bundle` with the backend `name`; with "auto", with the best installed one for it and `device`.

    That is torch where `device` is an NVIDIA GPU, or is "auto" and this machine has one, with Triton, for a
    bundle that torch runs. Raises BackendError for an unknown or absent backend or device, BundleError for a
    model that does not load.
    """
    present = available()
    suited = [name for name in _BACKENDS if _serves(name, bundle)]
    if name == "auto":
        name = _choose(bundle, device, present, suited)
    if name not in _BACKENDS:
        raise BackendError(f"unknown backend {name!r}; known are auto, {', '.join(_BACKENDS)}")
    if name not in present:
        needed = " and ".join(_missing(name) or _BACKENDS[name][0])
        raise BackendError(f"the backend {name!r} needs {needed}, which is not installed")
    if name not in suited:
        precision, others = bundle.manifest.precision, " or ".join(map(repr, suited))
        why = f"reads {_BACKENDS[name][2]}, which this bundle in {precision} has not"
        if _BACKENDS[name][2] in bundle.manifest.files:
            why = f"has no products in {precision} on a CPU"
        raise BackendError(f"the backend {name!r} {why}; use {others or 'another bundle'}")
    cores = usable_cores()
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= cores):
        raise BackendError(f"expected 1 to {cores} threads (the usable cores) or None, got {threads!r}")
    return cast(_Module, importlib.import_module(_BACKENDS[name][1])).create(bundle, device, threads)


def usable_cores() -> int:
    """Number of CPU cores that this process may run on (its affinity mask where the system has one)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _serves(name: str, bundle: Bundle) -> bool:
    """Whether the bundle has what the backend reads, in a precision that it runs."""
    manifest = bundle.manifest
    return _BACKENDS[name][2] in manifest.files and not (name == "ort" and manifest.precision in _NOT_FOR_ORT)


def _choose(bundle: Bundle, device: str, present: list[str], suited: list[str]) -> str:
    """What "auto" means; imports torch only where an NVIDIA driver is installed."""
    if device.startswith("cuda"):
        return "torch"
    usable = [name for name in present if name in suited and name not in _ASKED_FOR]
    if not usable:
        raise BackendError(
            f"no backend is installed that serves this bundle; install one of {_libraries(suited)}"
        )
    if device == "auto" and "torch" in usable and _has_driver():
        from engine.backends import torch as torch_backend

        return "torch" if torch_backend.suits(bundle) else usable[0]
    return usable[0]


def _has_driver() -> bool:
    """Whether NVIDIA's driver is installed, looked for as torch does; nothing is initialised."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _missing(name: str) -> list[str]:
    """The libraries of a backend that are not installed."""
    return [library for library in _BACKENDS[name][0] if not importlib.util.find_spec(library)]


def _libraries(names: list[str]) -> str:
    return ", ".join(" with ".join(_BACKENDS[name][0]) for name in names)
