"""OpenVINO on the CPU, for bundles with a graph in standard operators: float ones and calibrated INT8.

It is a little faster than ONNX Runtime in float32 and clearly faster in calibrated INT8. Dynamic INT8 is not
offered: OpenVINO takes three times as long to quantise at run time.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import openvino  # without its telemetry: engine/startup.py

from engine.backends import usable_cores
from engine.backends.base import Backend, Outputs, graph_files, has_vnni
from engine.backends.buckets import Arrays
from engine.bundle import Bundle
from engine.errors import BackendError, BundleError, quoted
from engine.layout import FLAT_GRAPH, GRAPH_DATA

logger = logging.getLogger(__name__)

# One for the process, never let go. The CPU plugin of a Core gives the calling thread a stack for signals and
# unmaps it with the Core, in whatever order: after two Cores that were dropped first to last the thread's
# stack lies in unmapped memory, and the next signal with a Python handler kills the process.
_CORE = openvino.Core()
# Mapped weights would change with their file.
_CORE.set_property({"ENABLE_MMAP": False})


def create(bundle: Bundle, device: str, threads: int | None) -> OpenVinoBackend:
    """Verify and load the bundle's `model.flat.onnx`; raises BackendError or BundleError."""
    if device not in ("auto", "cpu"):
        raise BackendError(
            f"the backend 'openvino' runs on device 'cpu' (or 'auto'), got {quoted(device)}; "
            "'torch' runs on a GPU"
        )
    path, threads, manifest = bundle.path / FLAT_GRAPH, threads or usable_cores(), bundle.manifest
    # By path, not from memory: OpenVINO finds the weights beside a graph by the graph's path alone.
    with bundle.held(*graph_files(bundle, FLAT_GRAPH, GRAPH_DATA)):
        model = load_model(path, threads)
    _check_names(path, "inputs", model.inputs, [spec.name for spec in manifest.inputs])
    _check_names(path, "outputs", model.outputs, [spec.name for spec in manifest.outputs])
    logger.info("loaded %s with OpenVINO %s, %d threads", path, openvino.__version__, threads)
    return OpenVinoBackend(_Compiled(model, []), manifest, "cpu")


class _Compiled(NamedTuple):
    """A compiled model and the idle ones of its requests, one for each call that ever ran at once."""

    model: openvino.CompiledModel
    idle: list[openvino.InferRequest]


class OpenVinoBackend(Backend[_Compiled]):
    """One compiled model; every call has a request of its own.

    The model has one stream, so that calls at once take turns, each on all its threads.
    """

    name = "openvino"
    library = "OpenVINO"

    def _run(self, network: _Compiled, feeds: Arrays, batch: int, tokens: int) -> Outputs:
        try:
            request = network.idle.pop()
        except IndexError:
            request = network.model.create_infer_request()
        # Always shared: a model that ran once with shared inputs writes into their memory, which is freed by
        # then, when a later run copies its own.
        results = request.infer(feeds, share_inputs=True)
        outputs = {name: results[name] for name in self._outputs}
        network.idle.append(request)  # not after a failure, which leaves a request in an unspecified state
        return outputs


def load_model(path: Path, threads: int) -> openvino.CompiledModel:
    """Compile the graph at `path` for `threads` CPU threads; raises BundleError where it does not load."""
    options = {
        "INFERENCE_PRECISION_HINT": "f32",  # its own choice is bfloat16 on CPUs that have it
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        # Two models that are pinned to the same core would share it while others idle.
        "ENABLE_CPU_PINNING": False,
        # Its int8 products saturate without VNNI (engine/backends/ort.py), and it has no others: the same
        # codes are multiplied as float32.
        **({} if has_vnni() else {"LP_TRANSFORMS_MODE": "NO"}),
    }
    try:
        return _CORE.compile_model(_CORE.read_model(path), "CPU", options)
    except Exception as error:  # no common base
        raise BundleError(f"{path}: OpenVINO {openvino.__version__} cannot load it: {error}") from error


def _check_names(path: Path, kind: str, ports: list[openvino.ConstOutput], expected: list[str]) -> None:
    """Raise BundleError unless each tensor has one of the names; one whose cast was dropped has two."""
    aliases = [port.get_names() for port in ports]
    if len(aliases) != len(expected) or any(names.isdisjoint(expected) for names in aliases):
        raise BundleError(
            f"{path}: expected the {kind} {expected} of the manifest, got {[min(names) for names in aliases]}"
        )
