"""Backends: what runs a bundle's network. Each module is imported only when it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from engine.errors import BackendError

if TYPE_CHECKING:
    from engine.bundle import Bundle

# name -> (libraries that must be installed, module with `create(bundle, device, threads)`, the bundle's file
# that it runs), best one first. Dynamic int8, where ONNX Runtime is the fastest, has no flat graph.
_BACKENDS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "openvino": (("openvino",), "engine.backends.openvino", "model.flat.onnx"),
    "ort": (("onnxruntime",), "engine.backends.ort", "model.onnx"),
    "torch": (("torch", "safetensors"), "engine.backends.torch", "model.safetensors"),
}


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


class _Module(Protocol):
    def create(self, bundle: Bundle, device: str, threads: int | None) -> Backend: ...


def available() -> list[str]:
    """Names of the backends whose libraries are installed, the best one first; imports none of them."""
    return [name for name in _BACKENDS if not _missing(name)]


def create(name: str, bundle: Bundle, device: str = "auto", threads: int | None = None) -> Backend:
    """Load `bundle` with the backend `name`; "auto" is the best installed one whose file the bundle has.

    Raises BackendError for an unknown or absent backend or device, BundleError for a model that does
    not load.
    """
    present = available()
    if name == "auto":
        if not present:
            raise BackendError(f"no backend is installed; install one of {_libraries()}")
        name = next((x for x in present if _BACKENDS[x][2] in bundle.manifest.files), present[0])
    if name not in _BACKENDS:
        raise BackendError(f"unknown backend {name!r}; known are auto, {', '.join(_BACKENDS)}")
    if name not in present:
        needed = " and ".join(_missing(name) or _BACKENDS[name][0])
        raise BackendError(f"the backend {name!r} needs {needed}, which is not installed")
    cores = usable_cores()
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= cores):
        raise BackendError(f"expected 1 to {cores} threads (the usable cores) or None, got {threads!r}")
    return cast(_Module, importlib.import_module(_BACKENDS[name][1])).create(bundle, device, threads)


def usable_cores() -> int:
    """Number of CPU cores that this process may run on (its affinity mask where the system has one)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _missing(name: str) -> list[str]:
    """The libraries of a backend that are not installed."""
    return [library for library in _BACKENDS[name][0] if not importlib.util.find_spec(library)]


def _libraries() -> str:
    return ", ".join(" with ".join(libraries) for libraries, *_ in _BACKENDS.values())
