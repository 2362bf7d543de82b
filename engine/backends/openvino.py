"""OpenVINO on the CPU, for bundles with a graph in standard operators: float ones and calibrated INT8.

Beside ONNX Runtime it is a little faster in float32 and clearly in calibrated INT8. Dynamic INT8 is not for
it: its quantisation at run time takes three times as long there.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import openvino

from engine.backends import usable_cores
from engine.backends.buckets import check_ids, measure
from engine.bundle import Bundle
from engine.errors import BackendError, BundleError
from engine.layout import FLAT_GRAPH, GRAPH_DATA

logger = logging.getLogger(__name__)


def create(bundle: Bundle, device: str, threads: int | None) -> OpenVinoBackend:
    """Verify and load the bundle's `model.flat.onnx`; raises BackendError or BundleError."""
    if device not in ("auto", "cpu"):
        raise BackendError(
            f"the backend 'openvino' runs on device 'cpu' (or 'auto'), got {device!r}; 'torch' runs on a GPU"
        )
    path = bundle.verified(FLAT_GRAPH)
    if GRAPH_DATA in bundle.manifest.files:
        bundle.verified(GRAPH_DATA)
    return OpenVinoBackend(path, bundle, threads or usable_cores())


class OpenVinoBackend:
    """One compiled model; `run` may be called from several threads, each call with a request of its own.

    The model has one stream, so that calls at once take turns, each on all `threads`.
    """

    name = "openvino"
    device = "cpu"

    def __init__(self, path: Path, bundle: Bundle, threads: int):
        """Load the graph at `path`; raises BundleError where it does not load or is not the manifest's."""
        self._inputs = bundle.manifest.inputs
        self._outputs = [spec.name for spec in bundle.manifest.outputs]
        # OpenVINO answers for ids outside the table of word vectors as if all was well.
        self._vocabulary = bundle.manifest.model.config.get("vocabulary")
        self._model: openvino.CompiledModel | None = load_model(path, threads)
        _check_names(path, "inputs", self._model.inputs, [spec.name for spec in self._inputs])
        _check_names(path, "outputs", self._model.outputs, self._outputs)
        self._idle: list[openvino.InferRequest] = []  # one for each call that ever ran at once
        logger.info("loaded %s with OpenVINO %s, %d threads", path, openvino.__version__, threads)

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answer one batch; raises BackendError where OpenVINO fails or the backend was closed."""
        model, idle = self._model, self._idle
        if model is None:
            raise BackendError("the backend was closed; create another Predictor")
        measure(feeds, self._inputs)
        if self._vocabulary is not None:
            check_ids(feeds["input_ids"], self._vocabulary)
        try:
            request = idle.pop()
        except IndexError:
            request = model.create_infer_request()
        try:
            answers = request.infer(feeds, share_inputs=True)
            outputs = {name: answers[name] for name in self._outputs}
        except Exception as error:  # OpenVINO's errors share no base but Exception
            shapes = {name: list(array.shape) for name, array in feeds.items()}
            raise BackendError(f"OpenVINO failed on inputs of shape {shapes}: {error}") from error
        idle.append(request)  # not after a failure: what a failed call leaves in a request is not specified
        return outputs

    def close(self) -> None:
        """Drop the model and its requests; their memory goes once running calls are done."""
        self._model, self._idle = None, []


def load_model(path: Path, threads: int) -> openvino.CompiledModel:
    """Compile the graph at `path` for `threads` CPU threads; raises BundleError where it does not load."""
    options = {
        "INFERENCE_PRECISION_HINT": "f32",  # its own choice is bfloat16 on CPUs that have it
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        # Two models that are pinned to the same core would share it while others idle.
        "ENABLE_CPU_PINNING": False,
    }
    core = openvino.Core()
    try:
        return core.compile_model(core.read_model(path), "CPU", options)
    except Exception as error:  # no common base
        raise BundleError(f"{path}: OpenVINO {openvino.__version__} cannot load it: {error}") from error


def _check_names(path: Path, kind: str, found: list[openvino.ConstOutput], expected: list[str]) -> None:
    """Each tensor must have one of the names; where OpenVINO drops a cast it has that of its result too."""
    names = [port.get_names() for port in found]
    if len(names) != len(expected) or any(own.isdisjoint(expected) for own in names):
        raise BundleError(
            f"{path}: expected the {kind} {expected} of the manifest, got {[min(own) for own in names]}"
        )
