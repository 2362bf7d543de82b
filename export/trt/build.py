"""Build TensorRT and TensorRT-RTX engines from ONNX files, in a child process.

Both libraries have one Python API; `tensorrt` builds on the GPU it builds for, `tensorrt_rtx` needs no
GPU and builds for several compute capabilities at once. The builder is native code that can crash or
take very long: `export.trt.worker` runs it in a process of its own, which `export.trt.process` starts and
follows, and whatever ends it comes back as `BuildError`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import BackendError, BuildError, quoted
from engine.files import temporary_name, unfinished
from engine.packages import EXTRAS, install_command, version_of
from export.trt.features import Features
from export.trt.probe import no_gpu
from export.trt.process import BuildProcess, Progress, decode, describe_status, start
from export.trt.profiles import Profile

Shape = tuple[int, ...]

LIBRARIES = ("tensorrt", "tensorrt_rtx")
RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
RTX_KNOWN = (*RTX_CAPABILITIES, "12.1")  # it knows 7.5 too, without the float32 products of our networks
WORKER = (sys.executable, "-P", "-m", "export.trt.worker")

_PROBE_LIMIT_S = 60.0


@dataclass(frozen=True)
class BuilderInfo:
    """One of the two builder libraries on this machine; `reason` says why it can or cannot build."""

    library: str
    version: str | None
    usable: bool
    reason: str
    compute_capability: str | None = None  # of the GPU that is built for
    gpu: str | None = None  # its name


@dataclass(frozen=True)
class EngineSpec:
    """What to build.

    onnx: model file, external data beside it. profiles: each input name -> (min, opt, max) shapes, for
    every input with a dynamic dimension. compute_capabilities: targets as "8.6"; empty for `RTX_CAPABILITIES`
    with `tensorrt_rtx`, and for the GPU of this machine, the only one possible, with `tensorrt`.
    timing_cache: file that is read and rewritten; ignored by `tensorrt_rtx`, which times nothing.
    time_limit_s: seconds for the whole build. workspace_mb: scratch memory of a layer in MiB; None for
    the library's default. library: "tensorrt" or "tensorrt_rtx"; None takes what `find_builder` finds.
    plugins: whether the file has nodes for export/trt/plugins, which only "tensorrt" builds. features: what
    the engine may be besides.
    """

    onnx: Path
    profiles: Sequence[Profile]
    compute_capabilities: tuple[str, ...] = ()
    timing_cache: Path | None = None
    time_limit_s: float = 3600.0
    workspace_mb: int | None = None
    library: str | None = None
    plugins: bool = False
    features: Features = Features()


@dataclass(frozen=True)
class TensorInfo:
    """An input or output as the network declares it; -1 where a dimension is dynamic."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class EngineReport:
    """What was built: `seconds` of wall clock, `peak_memory_mb` in MiB of the building process."""

    library: str
    version: str
    seconds: float
    peak_memory_mb: float
    engine_bytes: int
    compute_capabilities: tuple[str, ...]
    warnings: tuple[str, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


def describe_builders() -> tuple[BuilderInfo, ...]:
    """State of both libraries on this machine, in order of preference; loads nothing of CUDA here."""
    return tuple(_describe_builder(library) for library in LIBRARIES)


def find_builder() -> BuilderInfo | None:
    """First library that can build on this machine: `tensorrt` beside a GPU, else `tensorrt_rtx`."""
    return next((info for info in describe_builders() if info.usable), None)


def reasons() -> str:
    """Why none of the libraries builds here, in one line."""
    return "; ".join(f"{info.library}: {info.reason}" for info in describe_builders())


def gpu_capability() -> str | None:
    """Compute capability of this machine's first GPU, asked in a process of its own; None without one."""
    capability: str | None = _probe_driver()["compute_capability"]
    return capability


def build_engine(
    spec: EngineSpec,
    out_path: str | Path,
    progress: Progress | None = None,
    worker: Sequence[str] | None = None,
) -> EngineReport:
    """Build the engine of `spec` and write it to `out_path`, which is replaced only by a whole engine.

    progress: called as (phase, steps done, steps of the phase); by default a bar on stderr, if that is
    a terminal. worker: command of the building process, `WORKER` by default. Raises `BackendError` if
    no library can build here, and `BuildError` with the likely cause if the file, a profile or a
    target is refused, the builder fails or crashes, or the time limit passes. An exception raised by
    `progress`, or KeyboardInterrupt, ends the child and goes on to the caller.
    """
    out = Path(out_path).resolve()
    _check_paths(spec, out)
    library = spec.library or _choose_library()
    partial = temporary_name(out)
    start = time.monotonic()
    with unfinished(partial):
        try:
            with BuildProcess(worker or WORKER, _request(spec, library, partial), spec.time_limit_s) as build:
                with _progress_or_bar(progress) as show:
                    build.follow(show)
                done = build.result()
            _move_engine(partial, out, done["engine_bytes"])
        finally:
            partial.unlink(missing_ok=True)
    return _report(library, time.monotonic() - start, done, build.warnings)


def _describe_builder(library: str) -> BuilderInfo:
    if importlib.util.find_spec(library) is None:
        return BuilderInfo(library, None, False, f"not installed: {install_command(EXTRAS[library])}")
    version = _library_version(library)
    if library == "tensorrt_rtx":
        return BuilderInfo(library, version, True, "builds without a GPU")
    driver = _probe_driver()
    capability = driver["compute_capability"]
    return BuilderInfo(library, version, capability is not None, driver["reason"], capability, driver["gpu"])


def _library_version(library: str) -> str | None:
    return version_of(library, f"{library}-cu13", f"{library}-cu12")


def _probe_driver() -> dict[str, Any]:
    process = start((*WORKER, "--probe"), stdin=subprocess.DEVNULL)
    try:
        output, errors = process.communicate(timeout=_PROBE_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return no_gpu("the CUDA driver does not respond")
    event = decode(output)
    if event is None:
        return no_gpu(
            f"the CUDA driver cannot be asked: {describe_status(process.returncode)} {errors[-200:]}"
        )
    return event


def _choose_library() -> str:
    builders = describe_builders()
    for info in builders:
        if info.usable:
            return info.library
    reasons = "; ".join(f"{info.library}: {info.reason}" for info in builders)
    raise BackendError(f"no library here can build an engine ({reasons})")


def _check_paths(spec: EngineSpec, out: Path) -> None:
    if not spec.onnx.is_file():
        raise BuildError(f"{spec.onnx} is not a file; expected an ONNX model")
    if not out.parent.is_dir():
        raise BuildError(f"{out.parent} is not a directory; create it before the engine is built")
    if spec.library not in (None, *LIBRARIES):
        raise BuildError(f"expected the library to be one of {LIBRARIES}, got {quoted(spec.library)}")
    if spec.time_limit_s <= 0:
        raise BuildError(f"expected a time limit above 0 s, got {spec.time_limit_s}")


def _request(spec: EngineSpec, library: str, engine: Path) -> dict[str, Any]:
    cache = None if spec.timing_cache is None else os.fspath(spec.timing_cache.resolve())
    default = RTX_CAPABILITIES if library == "tensorrt_rtx" else ()
    return {
        "library": library,
        "onnx": os.fspath(spec.onnx.resolve()),
        "engine": os.fspath(engine),
        "profiles": [
            {name: [[int(n) for n in shape] for shape in ranges] for name, ranges in profile.items()}
            for profile in spec.profiles
        ],
        "compute_capabilities": list(spec.compute_capabilities or default),
        "timing_cache": cache,
        "workspace_mb": spec.workspace_mb,
        "plugins": spec.plugins,
        "features": asdict(spec.features),
        "parent": os.getpid(),
    }


def _move_engine(partial: Path, out: Path, size: int) -> None:
    written = partial.stat().st_size if partial.is_file() else 0
    if written != size or size == 0:
        raise BuildError(f"the builder reported an engine of {size:,} bytes and wrote {written:,}")
    try:
        partial.replace(out)
    except OSError as error:
        raise BuildError(f"the engine cannot be moved to {out}: {error.strerror}") from error


def _report(library: str, seconds: float, done: dict[str, Any], warnings: Mapping[str, None]) -> EngineReport:
    return EngineReport(
        library=library,
        version=done["version"],
        seconds=seconds,
        peak_memory_mb=done["peak_memory_mb"],
        engine_bytes=done["engine_bytes"],
        compute_capabilities=tuple(done["compute_capabilities"]),
        warnings=tuple(warnings),
        inputs=tuple(_tensor_info(item) for item in done["inputs"]),
        outputs=tuple(_tensor_info(item) for item in done["outputs"]),
    )


def _tensor_info(item: dict[str, Any]) -> TensorInfo:
    return TensorInfo(item["name"], item["dtype"], tuple(item["shape"]))


@contextlib.contextmanager
def _progress_or_bar(progress: Progress | None) -> Iterator[Progress]:
    if progress is not None:
        yield progress
        return
    from tqdm import tqdm

    with tqdm(desc="engine", unit="step", leave=False, disable=None) as bar:

        def show(phase: str, step: int, total: int) -> None:
            bar.total, bar.n = total, step
            bar.set_description(phase)

        yield show
