"""ONNX Runtime on the CPU."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnxruntime

from engine.backends import usable_cores
from engine.bundle import Bundle
from engine.errors import BackendError, BundleError
from engine.layout import GRAPH, GRAPH_DATA

logger = logging.getLogger(__name__)

_LOG_ERRORS = 3


def create(bundle: Bundle, device: str, threads: int | None) -> OrtBackend:
    """Verify and load the bundle's `model.onnx`; raises BackendError or BundleError."""
    if device not in ("auto", "cpu"):
        raise BackendError(
            f"the backend 'ort' runs on device 'cpu' (or 'auto'), got {device!r}; 'torch' runs on a GPU"
        )
    path = bundle.verified(GRAPH)
    if GRAPH_DATA in bundle.manifest.files:
        bundle.verified(GRAPH_DATA)
    return OrtBackend(path, bundle, threads or usable_cores())


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Return the options every session is made with; `threads` is the size of the operators' pool."""
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
    return options


class OrtBackend:
    """One InferenceSession; `run` is safe to call from several threads (ONNX Runtime's own promise)."""

    name = "ort"
    device = "cpu"

    def __init__(self, path: Path, bundle: Bundle, threads: int):
        """Load the model at `path`; raises BundleError where it does not load or is not the manifest's."""
        self._session: onnxruntime.InferenceSession | None = load_session(path, threads)
        self._outputs = [spec.name for spec in bundle.manifest.outputs]
        check_names(path, "inputs", self._session.get_inputs(), [s.name for s in bundle.manifest.inputs])
        check_names(path, "outputs", self._session.get_outputs(), self._outputs)
        logger.info("loaded %s with ONNX Runtime %s, %d threads", path, onnxruntime.__version__, threads)

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answer one batch; raises BackendError where ONNX Runtime fails or the backend was closed."""
        session = self._session
        if session is None:
            raise BackendError("the backend was closed; create another Predictor")
        try:
            answers = session.run(self._outputs, feeds)
        except Exception as error:  # ONNX Runtime's errors share no base but Exception
            shapes = {name: list(array.shape) for name, array in feeds.items()}
            raise BackendError(f"ONNX Runtime failed on inputs of shape {shapes}: {error}") from error
        return dict(zip(self._outputs, answers, strict=True))

    def close(self) -> None:
        """Drop the session; its memory goes once running calls are done."""
        self._session = None


def load_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Load the graph at `path` with `threads` CPU threads; raises BundleError where it does not load."""
    options = session_options(threads)
    try:
        # enable_fallback=0: the fallback prints to stdout and retries the same provider.
        return onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:  # no common base, and UnicodeDecodeError for some damaged models
        raise BundleError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {error}"
        ) from error


def check_names(path: Path, kind: str, found: list[onnxruntime.NodeArg], expected: list[str]) -> None:
    """Raise BundleError where the graph's tensors are not the manifest's."""
    names = [node.name for node in found]
    if sorted(names) != sorted(expected):
        raise BundleError(f"{path}: expected the {kind} {expected} of the manifest, got {names}")
