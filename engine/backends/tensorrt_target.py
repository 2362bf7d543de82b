"""Chooses the engine of a bundle for this machine, before any of it is deserialised.

An engine is built for one version of one library and for some compute capabilities. A serialized engine is
executable code, and a library may crash on one that was built for another machine. So the manifest's record
is compared with the machine first, and the file's SHA-256 with the manifest.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from engine.backends.cuda import Gpu, open_gpu
from engine.bundle import Bundle
from engine.errors import BackendError, Dgm4Error, EngineMismatchError, quoted
from engine.manifest import EngineEntry
from engine.packages import install_command, version_of

logger = logging.getLogger(__name__)

LIBRARIES = ("tensorrt", "tensorrt_rtx")
_DEVICE = re.compile(r"auto|cuda(?::(\d+))?")
_CUDA_MAJORS = (13, 12)
_AMPERE = (8, 0)
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


def find_gpu(device: str) -> Gpu:
    """The GPU that "auto", "cuda" or "cuda:N" means; raises BackendError where there is none."""
    match = _DEVICE.fullmatch(device)
    if match is None:
        raise BackendError(
            f"the backend 'tensorrt' runs on device 'auto', 'cuda' or 'cuda:N', got {quoted(device)}"
        )
    return open_gpu(int(match[1] or 0))


def installed() -> dict[str, str]:
    """Versions of TensorRT and TensorRT-RTX by module, where installed; imports them only if needed."""
    return {name: _version(name) for name in LIBRARIES if importlib.util.find_spec(name) is not None}


def suits(bundle: Bundle, device: str) -> bool:
    """Whether this machine can run an engine of the bundle; loads nothing of it."""
    try:
        choose(bundle, find_gpu(device))
    except Dgm4Error as error:
        logger.debug("no engine here: %s", error)
        return False
    return True


def choose(bundle: Bundle, gpu: Gpu) -> EngineEntry:
    """The engine of the bundle for `gpu` and the installed libraries, TensorRT's own before RTX's.

    Raises EngineMismatchError naming every engine, what it was built for and the command that builds one
    for this machine; BackendError where no library is installed or the driver is too old for it.
    """
    versions = installed()
    if not versions:
        raise BackendError(
            f"the backend 'tensorrt' needs TensorRT or TensorRT-RTX: {install_command('trt')}, or "
            f"{install_command('rtx')}"
        )
    engines = sorted(bundle.manifest.engines, key=lambda entry: entry.library)
    reasons = {entry.file: _mismatch(entry, bundle, gpu, versions) for entry in engines}
    fitting = [entry for entry in engines if reasons[entry.file] is None]
    if not fitting:
        have = ", ".join(f"{name} {version}" for name, version in versions.items())
        why = "; ".join(f"{file} {reason}" for file, reason in reasons.items()) or "the bundle has none"
        raise EngineMismatchError(
            f"no engine of {bundle.path} is for this machine ({gpu.name}, compute capability "
            f"{gpu.capability}, {have}): {why}; build one with: {rebuild_command(bundle)}"
        )
    _check_driver(fitting[0].library, gpu)
    return fitting[0]


def rebuild_command(bundle: Bundle) -> str:
    """The shell command that adds an engine for this machine to the bundle."""
    return f"dgm4 rebuild {shlex.quote(str(bundle.path))}"


def rebuilt(bundle: Bundle, device: str) -> Bundle:
    """Return the bundle with an engine for this machine, built by the command `dgm4 rebuild` if missing.

    Building takes from seconds to many minutes. Raises BackendError with the last line of its output.
    """
    gpu = find_gpu(device)
    if suits(bundle, device):
        return bundle
    logger.warning("building an engine of %s for %s; this can take minutes", bundle.path, gpu.name)
    command = [sys.executable, "-P", "-m", "export.cli", "rebuild", os.fspath(bundle.path)]
    path = os.pathsep.join(filter(None, (os.fspath(_PACKAGE_ROOT), os.environ.get("PYTHONPATH"))))
    # Both libraries build for the first GPU they see.
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": _visible(gpu.index)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BackendError(
            f"no engine was built for {gpu.name}: {words.removeprefix('dgm4: error: ')} "
            f"(status {done.returncode} of: {rebuild_command(bundle)})"
        )
    return Bundle.open(bundle.path)


def _visible(index: int) -> str:
    """CUDA_VISIBLE_DEVICES for a child process that shall see only GPU number `index` of this process."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[index] if index < len(visible) else str(index)


def _mismatch(entry: EngineEntry, bundle: Bundle, gpu: Gpu, versions: dict[str, str]) -> str | None:
    """Why this machine cannot run an engine, or None."""
    version = versions.get(entry.library)
    if version is None:
        return f"needs {entry.library} {entry.version}, which is not installed"
    if not _reads(version, entry):
        built = f"{entry.library} {entry.version}"
        later = f" for it and later {_numbers(entry.version)[0]}.x" if entry.version_compatible else ""
        return f"was built by {built}{later}, and {version} is installed"
    if not _runs(gpu.capability, entry):
        named = ", ".join(entry.compute_capabilities)
        return f"is for compute capability {'8.0 and later' if entry.hardware == 'ampere' else named}"
    graphs = {file.sha256 for name, file in bundle.manifest.files.items() if name.endswith(".onnx")}
    return None if entry.onnx_sha256 in graphs else "was built from a graph no longer in the bundle"


def _reads(version: str, entry: EngineEntry) -> bool:
    """Whether the library at `version` can load the engine: its own, or an older version-compatible one.

    NVIDIA's support matrix has version-compatible engines run on newer releases of the same major version;
    its guide goes further, from 10 to 11, where the interfaces of both allow it. The narrower holds here.
    """
    if version == entry.version or not entry.version_compatible:
        return version == entry.version
    installed, built = _numbers(version), _numbers(entry.version)
    return installed[0] == built[0] and installed >= built


def _runs(capability: str, entry: EngineEntry) -> bool:
    """Whether a GPU of `capability` runs the engine: one it was built for, or any from Ampere on."""
    if entry.hardware == "ampere":
        return _numbers(capability) >= _AMPERE
    return capability in entry.compute_capabilities


def _numbers(version: str) -> tuple[int, ...]:
    """Split a version such as 10.13.0.35 into numbers, for comparison."""
    return tuple(map(int, re.findall(r"\d+", version))) or (0,)


def _check_driver(library: str, gpu: Gpu) -> None:
    """Raise BackendError where the driver is older than the CUDA that the library was built with."""
    for major in _CUDA_MAJORS:
        if version_of(f"{library}_cu{major}") is not None:
            if gpu.cuda // 1000 < major:
                has = f"{gpu.cuda // 1000}.{gpu.cuda % 1000 // 10}"
                raise BackendError(
                    f"{library} here was built with CUDA {major}, and this driver knows CUDA {has} at most; "
                    f"update the NVIDIA driver, or install {library.replace('_', '-')}-cu{gpu.cuda // 1000}"
                )
            return


def _version(library: str) -> str:
    """Version of a library by its package metadata, else by importing it; raises BackendError."""
    version = version_of(library, *(f"{library}_cu{major}" for major in _CUDA_MAJORS))
    if version is not None:
        return version
    try:
        return str(importlib.import_module(library).__version__)
    except (ImportError, OSError) as error:
        raise BackendError(f"{library} is installed and cannot be imported: {error}") from error
