"""torch: eager on the CPU, captured graphs of our Triton kernels on an NVIDIA GPU."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from engine.backends import usable_cores
from engine.backends.buckets import check_ids, measure
from engine.backends.graphs import BucketedRunner, EagerRunner
from engine.bundle import Bundle
from engine.errors import BackendError, BundleError, CheckpointError
from engine.manifest import Manifest
from engine.network.config import NetworkConfig
from engine.network.model import InferenceModel, Output, to_precision
from kernels import jit

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_DEVICE = re.compile(r"cpu|cuda(?::(\d+))?")


def create(bundle: Bundle, device: str, threads: int | None) -> TorchBackend:
    """Verify and load the bundle's `model.safetensors`; raises BackendError or BundleError.

    `device` is "auto" (a GPU where torch and Triton can use one), "cpu", "cuda" or "cuda:N"; `threads`, of
    the CPU's products, is torch's number for the whole process.
    """
    precision = bundle.manifest.precision
    if precision not in _DTYPES:
        raise BackendError(
            f"the backend 'torch' runs bundles in {' or '.join(_DTYPES)}, got {precision}; "
            "use the backend 'ort', or export with --precision fp16"
        )
    place = find_device(device)
    model = load_network(bundle, place)
    return TorchBackend(model, bundle.manifest, place, threads or usable_cores())


def find_device(name: str) -> torch.device:
    """The device that `name` means on this machine; raises BackendError where it has none of that name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and jit.triton is not None else "cpu"
    match = _DEVICE.fullmatch(name)
    if match is None:
        raise BackendError(
            f"the backend 'torch' runs on device 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}"
        )
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
        raise BackendError(
            f"device {name!r}: torch {torch.__version__} {built} and finds no NVIDIA GPU; "
            "use device 'cpu', or install the driver and a CUDA build of torch"
        )
    if jit.triton is None:
        raise BackendError(f"device {name!r} needs Triton, which is not installed; install it or use 'cpu'")
    index = torch.cuda.current_device() if match[1] is None else int(match[1])
    if index >= torch.cuda.device_count():
        raise BackendError(f"device {name!r}: expected cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return torch.device("cuda", index)


def load_network(bundle: Bundle, device: torch.device) -> InferenceModel:
    """Build the bundle's network on `device` from its verified weights; raises BundleError.

    On a GPU it has the manifest's precision with its float32 islands. On the CPU it is float32: torch's half
    products take four times as long there, and answer less exactly.
    """
    manifest = bundle.manifest
    config = NetworkConfig.from_fields(manifest.model.config)
    _check_outputs(config, manifest)
    path = bundle.verified(WEIGHTS)
    # Folds are computed from what is stored, and cast afterwards.
    state = {name: x.float() if x.is_floating_point() else x for name, x in _read(path).items()}
    try:
        model = InferenceModel.from_released(state, config)
    except CheckpointError as error:
        raise BundleError(f"{path}: {error}; export the bundle again") from error
    if device.type == "cpu":
        return model
    return to_precision(model, _DTYPES[manifest.precision]).to(device)


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # SafetensorError and OSError share no base but Exception
        raise BundleError(
            f"{path}: cannot be read as safetensors: {error}; export the bundle again"
        ) from error


def _check_outputs(config: NetworkConfig, manifest: Manifest) -> None:
    found = [name for name in Output._fields if name != "attention_map" or config.has_map]
    expected = [spec.name for spec in manifest.outputs]
    if sorted(found) != sorted(expected):
        raise BundleError(f"expected the outputs {expected} of the manifest, but {config.name} has {found}")


class TorchBackend:
    """The network in torch; `run` may be called from several threads at once."""

    name = "torch"

    def __init__(self, model: InferenceModel, manifest: Manifest, device: torch.device, threads: int) -> None:
        self.device = str(device)
        self._inputs = manifest.inputs
        self._vocabulary = model.config.vocabulary
        self._runner: EagerRunner | BucketedRunner | None = (
            EagerRunner(model, threads)
            if device.type == "cpu"
            else BucketedRunner(model, manifest.limits, device)
        )
        logger.info("loaded %s with torch %s on %s", model.config.name, torch.__version__, device)

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answer one batch; raises BackendError where torch fails or the backend was closed."""
        runner = self._runner
        if runner is None:
            raise BackendError("the backend was closed; create another Predictor")
        sizes = measure(feeds, self._inputs)
        check_ids(feeds["input_ids"], self._vocabulary)
        try:
            return runner.run(feeds, sizes["batch"], sizes["tokens"])
        except BackendError:
            raise
        except Exception as error:  # torch's and Triton's errors share no base but Exception
            shapes = {name: list(array.shape) for name, array in feeds.items()}
            raise BackendError(f"torch failed on inputs of shape {shapes}: {error}") from error

    def close(self) -> None:
        """Drop the network; its memory goes once running calls are done."""
        self._runner = None
