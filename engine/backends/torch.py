"""torch: eager on the CPU, captured graphs of our Triton kernels on an NVIDIA GPU."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import safetensors.torch
import torch

from engine.backends import usable_cores
from engine.backends.buckets import check_ids, measure
from engine.backends.graphs import EagerRunner, GraphRunner
from engine.bundle import Bundle
from engine.errors import BackendError, BundleError, CheckpointError, Dgm4Error, InputError
from engine.layout import SCALES, WEIGHTS
from engine.manifest import Manifest
from engine.network.config import NetworkConfig
from engine.network.model import InferenceModel, Output
from engine.network.precision import DTYPES, fp8_layers, set_precision
from kernels import jit
from kernels.resize import check_images
from kernels.rows import E4M3_CAPABILITY

logger = logging.getLogger(__name__)

SHIFTS = "shifts"  # in the scales.json of an old bundle with rescaled channels
_DEVICE = re.compile(r"cpu|cuda(?::(\d+))?")
Runner = TypeVar("Runner", EagerRunner, GraphRunner)


def create(bundle: Bundle, device: str, threads: int | None) -> TorchBackend[EagerRunner] | GpuBackend:
    """Verify and load the bundle's `model.safetensors`; raises BackendError or BundleError.

    `device` is "auto" (a GPU where torch and Triton can use one), "cpu", "cuda" or "cuda:N"; `threads`, of
    the CPU's products, is torch's number for the whole process.
    """
    precision = bundle.manifest.precision
    if precision not in DTYPES:
        raise BackendError(
            f"the backend 'torch' runs bundles in {', '.join(DTYPES)}, got {precision}; "
            "use the backend 'ort' on device 'cpu', or export in one of those"
        )
    place = find_device(device)
    if precision == "fp8" and place.type == "cuda":
        _check_fp8(place)
    model, manifest = load_network(bundle, place), bundle.manifest
    logger.info("loaded %s with torch %s on %s", model.config.name, torch.__version__, place)
    if place.type == "cpu":
        return TorchBackend(EagerRunner(model, threads or usable_cores()), manifest, model.config, "cpu")
    runner = GraphRunner(model, manifest.limits, manifest.preprocess, place)
    return GpuBackend(runner, manifest, model.config, str(place))


def suits(bundle: Bundle) -> bool:
    """Whether this machine has a GPU, and `bundle` a precision, for this backend; loads nothing."""
    return bundle.manifest.precision in DTYPES and find_device("auto").type == "cuda"


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


def _check_fp8(place: torch.device) -> None:
    """Raise BackendError where the GPU has no E4M3."""
    found = torch.cuda.get_device_capability(place)
    if found < E4M3_CAPABILITY:
        needed = ".".join(map(str, E4M3_CAPABILITY))
        raise BackendError(
            f"fp8 needs compute capability {needed}, {place} has {found[0]}.{found[1]}; use a bundle in bf16"
        )


def load_network(bundle: Bundle, device: torch.device) -> InferenceModel:
    """Build the bundle's network on `device` from its verified weights; raises BundleError.

    It has the manifest's precision with its float32 islands, but for fp16 on the CPU, which is float32 there:
    torch's products in float16 take four times as long, and answer less exactly.
    """
    model, manifest = load_float(bundle), bundle.manifest
    precision = "fp32" if device.type == "cpu" and manifest.precision == "fp16" else manifest.precision
    scales = read_scales(bundle, [name for name, _ in fp8_layers(model)])
    return set_precision(model, precision, scales, manifest.kept_layers).to(device)


def load_float(bundle: Bundle) -> InferenceModel:
    """Build the bundle's network in float32 from its verified weights; raises BundleError."""
    manifest = bundle.manifest
    config = NetworkConfig.from_fields(manifest.model.config)
    _check_outputs(config, manifest)
    path = bundle.verified(WEIGHTS)
    # Folds are computed from what is stored, and cast afterwards.
    state = {name: x.float() if x.is_floating_point() else x for name, x in _read(path).items()}
    try:
        return InferenceModel.from_released(state, config)
    except CheckpointError as error:
        raise BundleError(f"{path}: {error}; export the bundle again") from error


def read_scales(bundle: Bundle, names: Sequence[str]) -> dict[str, float] | None:
    """The calibrated scales of what the layers `names` read, or None; raises BundleError."""
    if SCALES not in bundle.manifest.files:
        if bundle.manifest.calibration is not None:
            raise BundleError(f"the bundle was calibrated but has no {SCALES}; export it again")
        return None
    path, scales = bundle.verified(SCALES), _read_calibrated(bundle)
    if SHIFTS in scales:  # they are for a network whose channels were rescaled
        raise BundleError(
            f"{path}: written with --smooth, which is no longer supported; export the bundle again"
        )
    if sorted(scales) != sorted(names):
        raise BundleError(
            f"{path}: expected the scales of {len(names)} layers by name; export the bundle again"
        )
    wrong = [k for k, v in scales.items() if type(v) not in (int, float) or not 0 < v < math.inf]
    if wrong:
        raise BundleError(f"{path}: {wrong[0]}: expected a finite number above 0, got {scales[wrong[0]]!r}")
    return scales


def _read_calibrated(bundle: Bundle) -> dict[str, Any]:
    path = bundle.verified(SCALES)
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not valid JSON: {error}; export the bundle again") from error
    if not isinstance(found, dict):
        raise BundleError(f"{path}: expected the scales of layers by name; export the bundle again")
    return found


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


class TorchBackend(Generic[Runner]):
    """The network in torch; `run` may be called from several threads at once."""

    name = "torch"

    def __init__(self, runner: Runner, manifest: Manifest, config: NetworkConfig, device: str) -> None:
        self.device = device
        self._inputs, self._vocabulary = manifest.inputs, config.vocabulary
        self._runner: Runner | None = runner

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answer one batch; raises BackendError where torch fails or the backend was closed."""
        runner = self._open()
        sizes = measure(feeds, self._inputs)
        check_ids(feeds["input_ids"], self._vocabulary)
        with _reported(feeds):
            return runner.run(feeds, sizes["batch"], sizes["tokens"])

    def close(self) -> None:
        """Drop the network; its memory goes once running calls are done."""
        self._runner = None

    def _open(self) -> Runner:
        if self._runner is None:
            raise BackendError("the backend was closed; create another Predictor")
        return self._runner


class GpuBackend(TorchBackend[GraphRunner]):
    """The network as captured graphs on a GPU, which also takes pictures as they were decoded."""

    def start(
        self, pictures: Sequence[np.ndarray], text: dict[str, np.ndarray]
    ) -> Callable[[], dict[str, np.ndarray]]:
        """Begin to answer decoded pictures; see engine.backends.PictureBackend."""
        runner = self._open()
        sizes = measure(text, [spec for spec in self._inputs if spec.name != "image"])
        if len(pictures) != sizes["batch"]:
            raise BackendError(
                f"expected {sizes['batch']} pictures for as many captions, got {len(pictures)}"
            )
        check_ids(text["input_ids"], self._vocabulary)
        try:
            check_images(pictures)
        except ValueError as error:  # the kernels know nothing of the engine's errors
            raise InputError(str(error)) from error
        with _reported(text):
            answers = runner.start(pictures, text, sizes["batch"], sizes["tokens"])

        def wait() -> dict[str, np.ndarray]:
            with _reported(text):
                return answers()

        return wait

    def close(self) -> None:
        """Drop the network, once what was started is done."""
        runner = self._runner
        super().close()
        if runner is not None:
            runner.close()


@contextmanager
def _reported(feeds: dict[str, np.ndarray]) -> Iterator[None]:
    """Turn whatever torch raises into a BackendError that names the inputs."""
    try:
        yield
    except Dgm4Error:
        raise
    except Exception as error:  # torch's and Triton's errors share no base but Exception
        shapes = {name: list(array.shape) for name, array in feeds.items()}
        raise BackendError(f"torch failed on inputs of shape {shapes}: {error}") from error
