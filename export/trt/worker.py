"""The child process that parses an ONNX file and builds a TensorRT or TensorRT-RTX engine.

It reads one request (JSON) from stdin and writes one JSON event a line to stdout: `started`,
`progress`, `log`, then `done` or `error`. A crash of the native builder ends this process alone.
Start it with `python -P -m export.trt.worker`, the package root being on PYTHONPATH; `--probe` tells
what the CUDA driver of this machine is. `export.trt.build` is the parent's side.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from engine.errors import BuildError
from engine.packages import EXTRAS, install_command
from export.trt.features import Features, refusal, set_features
from export.trt.probe import open_driver, probe_driver
from export.trt.profiles import Profile, check_profiles
from export.trt.timing_cache import load_timing_cache, save_timing_cache

PROGRESS_INTERVAL_S = 0.05

_PR_SET_PDEATHSIG = 1
_MIB = 1 << 20
# On a machine with no driver the RTX builder logs this beside every real error.
_DRIVER_NOISE = "CUDA driver version is insufficient"
_PARSER_NOISE = "ModelImporter.cpp:"  # repeats what the parser's own errors say
_PARSER_HINTS = {
    "false": "this library has no such operator",
    "Plugin not found": "no operator of the library, no function of the model and no plugin has this name",
}

_DTYPES = {"float": "float32", "half": "float16", "bf16": "bfloat16"}  # the others are numpy's own names


class RefusedError(BuildError):
    """The request cannot be built; the message goes to the parent as an `error` event."""


class Channel:
    """Writes events as JSON lines; whatever else writes to stdout is sent to stderr instead."""

    def __init__(self) -> None:
        self._stream: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self._lock = threading.Lock()
        os.dup2(2, 1)

    def send(self, event: str, **fields: Any) -> None:
        """Write one event with its fields; safe to call from any thread."""
        with self._lock:
            self._stream.write(json.dumps({"event": event, **fields}) + "\n")
            self._stream.flush()

    def warn(self, text: str) -> None:
        """Send a warning."""
        self.send("log", severity="warning", text=text)


def main(arguments: Sequence[str]) -> int:
    """Serve one request; returns 0 when an engine was written and 1 when the request was refused."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when a build is given up
    channel = Channel()
    if "--probe" in arguments:
        channel.send("probe", **probe_driver())
        return 0
    channel.send("started", pid=os.getpid())
    request = json.loads(sys.stdin.readline())
    if os.getppid() != request["parent"]:
        return 1
    try:
        channel.send("done", **build(request, channel))
    except BuildError as error:
        channel.send("error", message=str(error))
        return 1
    return 0


def build(request: Mapping[str, Any], channel: Channel) -> dict[str, Any]:
    """Build the engine of a request and write it; returns what the `done` event reports.

    Raises `BuildError` if the library is missing, the model, a profile, a feature or a compute capability
    is not accepted, the builder gives no engine, or the engine cannot be written.
    """
    trt = _import_library(request["library"])
    logger = _make_logger(trt, channel)
    builder = _make_builder(trt, logger)
    features = Features(**request["features"])
    _check_features(features, request["library"])
    if request["plugins"]:
        _use_plugins(request["library"])
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    _parse(parser, network, request["onnx"])
    config = builder.create_builder_config()
    monitor = _make_monitor(trt, channel)  # must outlive the build
    config.progress_monitor = monitor
    _add_profiles(builder, config, network, request["profiles"])
    set_features(trt, config, features)
    capabilities = _set_capabilities(trt, config, request["compute_capabilities"])
    if request["workspace_mb"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_mb"] * _MIB)
    timings = _timing_file(trt, request["timing_cache"])
    cache = None if timings is None else load_timing_cache(config, timings, channel.warn)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RefusedError("the builder gave no engine")
    _write_engine(request["engine"], engine)
    if timings is not None:
        save_timing_cache(timings, cache, channel.warn)
    return {
        "version": trt.__version__,
        "engine_bytes": engine.nbytes,
        "peak_memory_mb": _peak_memory_mb(),
        "compute_capabilities": capabilities,
        "inputs": [_describe(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_describe(network.get_output(i)) for i in range(network.num_outputs)],
    }


def _import_library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise RefusedError(
            f"the library {name} cannot be imported: {error}; install it: {install_command(EXTRAS[name])}"
        ) from error


def _make_builder(trt: Any, logger: Any) -> Any:
    try:
        return trt.Builder(logger)
    except TypeError as error:  # what the binding makes of a null pointer
        raise RefusedError(
            f"{trt.__name__} {trt.__version__} cannot start a builder on this machine "
            f"({probe_driver()['reason']}); update the NVIDIA driver, or install a version made for it"
        ) from error


def _use_plugins(library: str) -> None:
    """Register our plugins for the GPU of this machine."""
    if library != "tensorrt":
        raise RefusedError(f"{library} has no plugins; export with --plugins off")
    capability = int(_own_capability(())[0].replace(".", ""))
    try:
        plugins, ptx = map(
            importlib.import_module, ("export.trt.plugins.registration", "export.trt.plugins.ptx")
        )
        plugins.use(ptx.target_of(capability, open_driver().version()))
    except (ImportError, BuildError) as error:
        raise RefusedError(f"the plugins cannot be used here: {error}; export with --plugins off") from error


def _network_flags(trt: ModuleType) -> int:
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _make_logger(trt: Any, channel: Channel) -> Any:
    severities = {
        trt.ILogger.INTERNAL_ERROR: "error",
        trt.ILogger.ERROR: "error",
        trt.ILogger.WARNING: "warning",
    }
    hidden = (_PARSER_NOISE, *([_DRIVER_NOISE] if _builds_without_gpu(trt) else []))

    class EventLogger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in severities and not any(noise in text for noise in hidden):
                channel.send("log", severity=severities[severity], text=text.strip())

    return EventLogger()


def _make_monitor(trt: Any, channel: Channel) -> Any:
    class EventMonitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}
            self.sent_s = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.totals[phase] = steps
            channel.send("progress", phase=phase, step=0, total=steps)

        def step_complete(self, phase: str, step: int) -> bool:
            total, now = self.totals.get(phase, 0), time.monotonic()
            if now - self.sent_s >= PROGRESS_INTERVAL_S:
                self.sent_s = now
                channel.send("progress", phase=phase, step=step + 1, total=total)
            return True

        def phase_finish(self, phase: str) -> None:
            total = self.totals.pop(phase, 0)
            channel.send("progress", phase=phase, step=total, total=total)

    return EventMonitor()


def _parse(parser: Any, network: Any, onnx: str) -> None:
    parsed = parser.parse_from_file(onnx)
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if errors or not parsed:
        lines = [_describe_error(error) for error in errors] or ["the parser gave no reason"]
        raise RefusedError("the ONNX parser refused the model: " + "; ".join(lines))
    # A file that is no ONNX at all parses "well" into a network of nothing.
    if network.num_outputs == 0:
        raise RefusedError("the file holds no network: it is empty or not an ONNX model")


def _describe_error(error: Any) -> str:
    reason = " ".join(line for line in error.desc().splitlines() if _DRIVER_NOISE not in line)
    reason = next(
        (hint for key, hint in _PARSER_HINTS.items() if reason == key or key + "," in reason), reason
    )
    stack = "".join(f" in function {frame}" for frame in error.local_function_stack())
    node = f"node {error.node_name()!r} ({error.node_operator()}){stack}: " if error.node() >= 0 else ""
    return f"{node}{reason} [{str(error.code()).rpartition('.')[2]}]"


def _add_profiles(builder: Any, config: Any, network: Any, profiles: Sequence[Profile]) -> None:
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    shaping = [tensor.name for tensor in tensors if tensor.is_shape_tensor]
    if shaping:
        raise RefusedError(f"the inputs {shaping} set shapes by their values, which no profile here covers")
    check_profiles({tensor.name: tuple(tensor.shape) for tensor in tensors}, profiles)
    for number, profile in enumerate(profiles, 1):
        optimization = builder.create_optimization_profile()
        for name, ranges in profile.items():
            optimization.set_shape(name, *(tuple(limit) for limit in ranges))
        if config.add_optimization_profile(optimization) < 0:
            raise RefusedError(f"the builder refused profile {number}: {dict(profile)}")


def _check_features(features: Features, library: str) -> None:
    """Raise where the library or this machine's GPU lacks them; asks the driver only if there are any."""
    if features != Features():
        reason = refusal(features, library, probe_driver()["compute_capability"])
        if reason is not None:
            raise RefusedError(reason)


def _set_capabilities(trt: Any, config: Any, wanted: Sequence[str]) -> list[str]:
    """Ask for the targets where the library takes them; else the target is this machine's GPU."""
    if not hasattr(config, "set_compute_capability"):
        return _own_capability(wanted)
    if not wanted:
        raise RefusedError("no compute capability was asked for; name at least one, as 8.6")
    members = trt.ComputeCapability.__members__
    unknown = [name for name in wanted if _member_name(name) not in members]
    if unknown:
        offered = ", ".join(sorted(name for name in members if name.startswith("SM")))
        raise RefusedError(f"{trt.__name__} does not build for compute capability {unknown}; only {offered}")
    config.num_compute_capabilities = len(wanted)
    for index, name in enumerate(wanted):
        if not config.set_compute_capability(members[_member_name(name)], index):
            raise RefusedError(f"{trt.__name__} refused compute capability {name} beside {list(wanted)}")
    return list(wanted)


def _own_capability(wanted: Sequence[str]) -> list[str]:
    capability: str | None = probe_driver()["compute_capability"]
    if capability is None:
        raise RefusedError("TensorRT builds on the GPU it builds for, and this machine shows none")
    if wanted and capability not in wanted:
        raise RefusedError(f"TensorRT builds for this machine's GPU ({capability}), not for {list(wanted)}")
    return [capability]


def _member_name(capability: str) -> str:
    return "SM" + capability.replace(".", "")


def _builds_without_gpu(trt: ModuleType) -> bool:
    return trt.__name__ == "tensorrt_rtx"


def _timing_file(trt: ModuleType, path: str | None) -> Path | None:
    """The file of timings; None where there is to be none, or the library has none."""
    return None if path is None or _builds_without_gpu(trt) else Path(path)


def _write_engine(path: str, engine: Any) -> None:
    try:
        with Path(path).open("wb") as file:
            file.write(engine)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RefusedError(
            f"the engine ({engine.nbytes:,} bytes) cannot be written: {error.strerror or error}; "
            "free space or choose another place"
        ) from error


def _describe(tensor: Any) -> dict[str, Any]:
    dtype = tensor.dtype.name.lower()
    return {"name": tensor.name, "dtype": _DTYPES.get(dtype, dtype), "shape": list(tensor.shape)}


def _peak_memory_mb() -> float:
    """Largest resident memory of this process in MiB; getrusage would count the parent's before exec."""
    for key, value in _status_fields():
        if key == "VmHWM":
            return int(value.split()[0]) / 1024
    return 0.0


def _status_fields() -> Iterator[tuple[str, str]]:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            key, _, value = line.partition(":")
            yield key, value


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
