"""The registry of backends, which run a bundle's network; each module is imported only when needed."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.backends import choice
from engine.backends.base import Backend
from engine.backends.cores import usable_cores as usable_cores
from engine.backends.cores import visible_cores
from engine.backends.cuda import load_library, open_gpu
from engine.errors import BackendError, did_you_mean, quoted
from engine.layout import FLAT_GRAPH, GRAPH, WEIGHTS
from engine.packages import find_conflict, install_command

if TYPE_CHECKING:
    from engine.bundle import Bundle

    _Load = Callable[[Bundle, str, int | None], Backend[Any]]


class _Kind(NamedTuple):
    """What a backend requires: libraries, the function that loads it, the file that it reads of a bundle.

    `libraries` are modules ("a|b" for either); `part` is a file inside the first of them that only some of
    its builds contain, and `package` the one that does. The `extra` of `dgm4` installs them. `gpu`: it needs
    an NVIDIA GPU.
    """

    libraries: tuple[str, ...]
    create: str
    reads: str
    extra: str
    part: str = ""
    package: str = ""
    gpu: bool = False


def _ort_gpu(create: str, provider: str) -> _Kind:
    part = (
        f"onnxruntime_providers_{provider}.dll"
        if os.name == "nt"
        else f"libonnxruntime_providers_{provider}.so"
    )
    create = f"engine.backends.ort_gpu:{create}"
    return _Kind(("onnxruntime",), create, FLAT_GRAPH, "gpu", f"capi/{part}", "onnxruntime-gpu", gpu=True)


# The best first, those for a GPU after the others; `create` documents what "auto" chooses. Dynamic int8,
# which ONNX Runtime runs fastest, has no flat graph.
_BACKENDS: dict[str, _Kind] = {
    "ort": _Kind(("onnxruntime",), "engine.backends.ort:create", GRAPH, "cpu"),
    "torch": _Kind(("torch", "safetensors"), "engine.backends.torch:create", WEIGHTS, "torch"),
    "openvino": _Kind(("openvino",), "engine.backends.openvino:create", FLAT_GRAPH, "openvino"),
    "tensorrt": _Kind(
        ("tensorrt|tensorrt_rtx",), "engine.backends.tensorrt:create", "model.*.engine", "trt", gpu=True
    ),
    "ort-cuda": _ort_gpu("create_cuda", "cuda"),
    "ort-tensorrt": _ort_gpu("create_tensorrt", "tensorrt"),
}
_DRIVER = "an NVIDIA driver"
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


# Precisions whose graph is only for TensorRT: ONNX Runtime's CPU provider has no products in bfloat16.
_NOT_FOR_ORT = ("bf16", "fp8")


def known() -> list[str]:
    """Names of all backends, installed or not, the best first."""
    return list(_BACKENDS)


def available() -> list[str]:
    """Names of the backends whose requirements this machine meets; imports none of them."""
    return [name for name in _BACKENDS if not _missing(name)]


def describe() -> dict[str, str | None]:
    """Every backend with its missing requirements, or None; imports none of them."""
    return {name: " and ".join(_missing(name)) or None for name in _BACKENDS}


def remedy(name: str) -> str | None:
    """The command that installs the libraries which the backend lacks; None where it lacks none."""
    kind = _BACKENDS[name]
    if not _missing_libraries(kind):
        return None
    if kind.part and (conflict := find_conflict()):
        return conflict
    # The package for the CPU would hide the other, or be hidden by it.
    first = "pip uninstall -y onnxruntime && " if kind.part and _found(kind.libraries[0]) else ""
    return first + install_command(kind.extra)


def takes(name: str, device: str) -> bool:
    """Whether a backend runs on the kind of `device`; true for "auto" in either place."""
    if "auto" in (name, device) or name == "torch":
        return True
    return device.startswith("cuda") == _BACKENDS[name].gpu


def serving(bundle: Bundle) -> dict[str, str | None]:
    """The backends that can read the bundle, each with its missing requirements, or None."""
    missing = describe()
    return {name: missing[name] for name in _suited(bundle)}


def create(name: str, bundle: Bundle, device: str = "auto", threads: int | None = None) -> Backend[Any]:
    """Load `bundle` with the backend `name`; "auto" is the best installed one for the bundle and `device`.

    On a CPU that is the one that `dgm4 bench --choose` found to be the fastest for this bundle, machine and
    these versions (`engine.backends.choice`), else "ort", or "torch" for a bundle without a graph. On an
    NVIDIA GPU, which "auto" prefers as `device`, it is "tensorrt" where the bundle has an engine for this GPU
    and library version, else "torch" with Triton, else "ort-cuda". "ort-tensorrt" is never chosen: its first
    load takes minutes. The backend's `chosen` says why it is this one.
    Raises BackendError for an unknown or missing backend or device, EngineMismatchError for an engine of
    another machine, BundleError for a model that does not load.
    """
    if not isinstance(device, str) or _DEVICE.fullmatch(device) is None:
        hint = did_you_mean(str(device), ("auto", "cpu", "cuda"))
        raise BackendError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {quoted(device)}{hint}")
    present, suited = available(), _suited(bundle)
    threads, chosen = _check_threads(threads), "asked for"
    if name == "auto":
        name, threads, chosen = _choose(bundle, device, threads, present, suited)
    if not isinstance(name, str) or name not in _BACKENDS:
        hint = did_you_mean(str(name), _BACKENDS)
        raise BackendError(f"unknown backend {quoted(name)}; known are auto, {', '.join(_BACKENDS)}{hint}")
    if name not in present:
        needed = _missing(name) or _BACKENDS[name].libraries
        verb = "is" if len(needed) == 1 else "are"
        how = f": {command}" if (command := remedy(name)) else ""
        raise BackendError(
            f"the backend {name!r} needs {' and '.join(needed)}, which {verb} not installed{how}"
        )
    if name not in suited and name != "tensorrt":  # which says how an engine is built
        precision, others = bundle.manifest.precision, " or ".join(map(repr, suited))
        why = f"needs {_BACKENDS[name].reads}; this {precision} bundle does not contain it"
        if name == "ort" and GRAPH in bundle.manifest.files:
            why = f"has no products in {precision} on a CPU"
        raise BackendError(f"the backend {name!r} {why}; use {others or 'another bundle'}")
    backend = _load(name)(bundle, device, threads)
    backend.chosen = chosen
    return backend


def _check_threads(threads: object) -> int | None:
    """The number as an int; raises BackendError unless it is None or an integer from 1 to the cores here."""
    if threads is None:
        return None
    cores = visible_cores()
    if isinstance(threads, bool) or not isinstance(threads, Integral) or not 1 <= int(threads) <= cores:
        raise BackendError(
            f"expected 1 to {cores} threads (the cores of this process) or None, got {quoted(threads)}"
        )
    return int(threads)


def rebuilt(name: str, bundle: Bundle, device: str = "auto") -> Bundle:
    """Return the bundle with an engine for this machine; the command `dgm4 rebuild` builds a missing one.

    Can take many minutes. Raises BackendError where `name` is not a backend of engines or the build fails.
    """
    if name not in ("auto", "tensorrt"):
        raise BackendError(f"an engine is rebuilt for the backend 'tensorrt' (or 'auto'), got {quoted(name)}")
    if not _has_driver():
        raise BackendError(f"an engine is rebuilt for this machine's GPU, which needs {_DRIVER}")
    from engine.backends import tensorrt_target

    return tensorrt_target.rebuilt(bundle, device)


def _load(name: str) -> _Load:
    """The function that loads a bundle; raises BackendError where the library does not even import."""
    module, function = _BACKENDS[name].create.split(":")
    try:
        load: _Load = getattr(importlib.import_module(module), function)
    except Exception as error:  # a library raises what it likes, as RuntimeError without a home folder
        kind = type(error).__name__
        raise BackendError(f"the backend {name!r} cannot be imported: {kind}: {error}") from error
    return load


def on_cpu(bundle: Bundle) -> list[str]:
    """The installed backends that serve the bundle on a CPU; that of "auto" without a measurement first."""
    present = available()
    return [name for name in _suited(bundle) if name in present and not _BACKENDS[name].gpu]


def _choose(
    bundle: Bundle, device: str, threads: int | None, present: list[str], suited: list[str]
) -> tuple[str, int | None, str]:
    """The backend that "auto" means, its threads, and why; imports torch only where there is a driver."""
    usable = [name for name in present if name in suited]
    asked = device.startswith("cuda")
    if asked or (device == "auto" and _has_driver()):
        best = _choose_gpu(bundle, device, usable)
        if best or asked:
            return best or _explain_no_gpu(bundle, device, suited), threads, "the rule for a GPU"
    candidates = on_cpu(bundle)
    found = choice.find(bundle, threads)
    if found is not None and found.backend in candidates:
        return found.backend, found.threads, found.reason
    if not candidates:
        served = [name for name in suited if not _BACKENDS[name].gpu]
        command = install_command(*(_BACKENDS[name].extra for name in served[:1]))
        raise BackendError(
            f"no backend is installed that serves this bundle; install one of {_libraries(served)}: {command}"
        )
    return candidates[0], threads, "the rule for a CPU; dgm4 bench --choose measures"


def _explain_no_gpu(bundle: Bundle, device: str, suited: list[str]) -> str:
    """Raise BackendError where this machine or the bundle has nothing for a GPU; else "torch" says more."""
    if not _has_driver():
        raise BackendError(
            f"device {device!r}: no CUDA GPU is here, as no NVIDIA driver is installed; use device 'cpu'"
        )
    if "torch" in suited:
        return "torch"
    open_gpu(int(device.partition(":")[2] or 0))  # raises where there is none
    needs = [
        f"{name} needs {' and '.join(_missing(name))}: {remedy(name)}" for name in suited if _missing(name)
    ]
    raise BackendError(
        f"device {device!r}: no installed backend serves this {bundle.manifest.precision} bundle on a GPU; "
        f"{'; or '.join(needs) or 'export it with an engine, or use another bundle'}"
    )


def _choose_gpu(bundle: Bundle, device: str, usable: list[str]) -> str | None:
    """The best backend for this bundle on a GPU of this machine, or None."""
    if "tensorrt" in usable:
        from engine.backends import tensorrt_target

        if tensorrt_target.suits(bundle, device):
            return "tensorrt"
    if "torch" in usable:
        from engine.backends import torch as torch_backend

        if torch_backend.suits(bundle):
            return "torch"
    return "ort-cuda" if "ort-cuda" in usable else None


def _suited(bundle: Bundle) -> list[str]:
    """The backends that can read the bundle."""
    files = list(bundle.manifest.files)
    suited = [name for name, kind in _BACKENDS.items() if fnmatch.filter(files, kind.reads)]
    return [name for name in suited if name != "ort" or bundle.manifest.precision not in _NOT_FOR_ORT]


def _has_driver() -> bool:
    """Whether NVIDIA's driver is installed; initialises nothing."""
    try:
        load_library()
    except OSError:
        return False
    return True


def _missing(name: str) -> list[str]:
    """Missing requirements of a backend."""
    kind = _BACKENDS[name]
    return _missing_libraries(kind) + ([_DRIVER] if kind.gpu and not _has_driver() else [])


def _missing_libraries(kind: _Kind) -> list[str]:
    missing = [
        library.replace("|", " or ") for library in kind.libraries if not any(map(_found, library.split("|")))
    ]
    if kind.part and not missing and not _has_part(kind):
        missing.append(kind.package)
    return missing


def _found(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _has_part(kind: _Kind) -> bool:
    spec = importlib.util.find_spec(kind.libraries[0])
    folders = (spec.submodule_search_locations if spec else None) or []
    return any((Path(folder) / kind.part).is_file() for folder in folders)


def _libraries(names: list[str]) -> str:
    return ", ".join(" with ".join(_BACKENDS[name].libraries) for name in names)
