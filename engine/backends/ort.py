"""ONNX Runtime on the CPU."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import onnxruntime

from engine.backends import usable_cores
from engine.backends.base import Backend, Outputs, has_vnni
from engine.backends.buckets import Arrays
from engine.bundle import Bundle
from engine.errors import BackendError, BundleError, quoted
from engine.layout import GRAPH, GRAPH_DATA
from engine.manifest import Manifest

logger = logging.getLogger(__name__)

if os.environ.get("ORT_DISABLE_TELEMETRY") == "1":  # set by `engine`, too late where it was imported before
    onnxruntime.disable_telemetry_events()

_LOG_ERRORS = 3


def create(bundle: Bundle, device: str, threads: int | None) -> OrtBackend:
    """Verify and load the bundle's `model.onnx`; raises BackendError or BundleError."""
    if device not in ("auto", "cpu"):
        raise BackendError(
            f"the backend 'ort' runs on device 'cpu' (or 'auto'), got {quoted(device)}; 'torch' runs on a GPU"
        )
    return load(bundle, GRAPH, GRAPH_DATA, threads)


def load(bundle: Bundle, model: str, data: str, threads: int | None) -> OrtBackend:
    """Verify and load the graph `model` of the bundle and its weights `data`, if any; raises BundleError.

    From memory, so that a session is made of the very bytes that were hashed, even where a file is replaced
    meanwhile.
    """
    threads, path = threads or usable_cores(), bundle.path / model
    options = session_options(threads)
    graph, weights = bundle.read(model), b""
    if data in bundle.manifest.files:
        weights = bundle.read(data)  # ONNX Runtime reads this buffer until the session is made
        options.add_external_initializers_from_files_in_memory([data], [weights], [len(weights)])
    session = _load(path, graph, options)
    del weights
    check_names(path, session, bundle.manifest)
    logger.info("loaded %s with ONNX Runtime %s, %d threads", path, onnxruntime.__version__, threads)
    return OrtBackend(session, bundle.manifest, "cpu")


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Return the options of every session; `threads` is the size of the operators' pool."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_ERRORS
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.enable_cpu_mem_arena = True
    # A waiting thread that spins takes a core from whatever else runs: beside one busy process on two
    # cores int8 takes 326 ms with it and 224 without, alone 128 and 139 (benchmarks/spinning.py).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # An x86 CPU without VNNI adds pairs of int8 products in 16 bits, which saturate: logits are a fifth off
    # without a word. Unsigned codes are exact there; with VNNI both are exact, and signed ones faster.
    options.add_session_config_entry("session.x64quantprecision", "0" if has_vnni() else "1")
    return options


class OrtBackend(Backend[onnxruntime.InferenceSession]):
    """One InferenceSession, which ONNX Runtime promises to be safe to run from several threads."""

    name = "ort"
    library = "ONNX Runtime"

    def _run(self, network: onnxruntime.InferenceSession, feeds: Arrays, batch: int, tokens: int) -> Outputs:
        return dict(zip(self._outputs, network.run(self._outputs, dict(feeds)), strict=True))


def load_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Load the graph at `path` with `threads` CPU threads; raises BundleError where it does not load."""
    return _load(path, str(path), session_options(threads))


def _load(
    path: Path, model: str | bytes, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    """Load a model, by path or from memory; `path` is its name in messages."""
    try:
        # enable_fallback=0: the fallback prints to stdout and retries the same provider.
        return onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:  # no common base, and UnicodeDecodeError for some damaged models
        raise BundleError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {error}"
        ) from error


def check_names(path: Path, session: onnxruntime.InferenceSession, manifest: Manifest) -> None:
    """Raise BundleError where the graph's tensors are not the manifest's."""
    for kind, nodes, specs in (
        ("inputs", session.get_inputs(), manifest.inputs),
        ("outputs", session.get_outputs(), manifest.outputs),
    ):
        names, expected = [node.name for node in nodes], [spec.name for spec in specs]
        if sorted(names) != sorted(expected):
            raise BundleError(f"{path}: expected the {kind} {expected} of the manifest, got {names}")
