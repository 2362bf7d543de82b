"""torch: eager on the CPU, captured graphs of our Triton kernels on an NVIDIA GPU."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import safetensors.torch
import torch

from engine.backends import usable_cores
from engine.backends.base import Backend, Outputs, Pending
from engine.backends.buckets import Arrays
from engine.backends.graphs import EagerRunner, GraphRunner, Replay
from engine.bundle import Bundle
from engine.errors import BackendError, BundleError, CheckpointError, InputError, quoted
from engine.layout import SCALES, WEIGHTS
from engine.manifest import Manifest
from engine.network.model import InferenceModel
from engine.network.precision import DTYPES, fp8_layers, set_precision
from engine.registry import network_of
from engine.registry.config import NetworkConfig
from kernels import jit
from kernels.resize import check_images
from kernels.rows import E4M3_CAPABILITY

logger = logging.getLogger(__name__)

SHIFTS = "shifts"  # in the scales.json of an old bundle with rescaled channels
_DEVICE = re.compile(r"cpu|cuda(?::(\d+))?")
Runner = TypeVar("Runner", EagerRunner, GraphRunner)


def create(bundle: Bundle, device: str, threads: int | None) -> TorchBackend[EagerRunner] | GpuBackend:
    """Verify and load the bundle's `model.safetensors`; raises BackendError or BundleError.

    `device` is "auto" (a GPU where torch and Triton can use one), "cpu", "cuda" or "cuda:N". `threads` is
    torch's number of CPU threads while the network runs; the process has its own number at other times.
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
        return TorchBackend(EagerRunner(model, threads or usable_cores()), manifest, "cpu")
    runner = GraphRunner(model, manifest.limits, manifest.preprocess, place)
    return GpuBackend(runner, manifest, str(place))


def suits(bundle: Bundle) -> bool:
    """Whether this backend would run `bundle` on a GPU of this machine; loads nothing."""
    return bundle.manifest.precision in DTYPES and find_device("auto").type == "cuda"


def find_device(name: str) -> torch.device:
    """Return the device called `name`, "auto" included; raises BackendError where this machine lacks it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and jit.triton is not None else "cpu"
    match = _DEVICE.fullmatch(name)
    if match is None:
        raise BackendError(
            f"the backend 'torch' runs on device 'auto', 'cpu', 'cuda' or 'cuda:N', got {quoted(name)}"
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
    """Raise BackendError where the GPU has no products in E4M3."""
    major, minor = torch.cuda.get_device_capability(place)
    if (major, minor) < E4M3_CAPABILITY:
        needed = ".".join(map(str, E4M3_CAPABILITY))
        raise BackendError(
            f"fp8 needs compute capability {needed}, {place} has {major}.{minor}; use a bundle in bf16"
        )


def load_network(bundle: Bundle, device: torch.device) -> InferenceModel:
    """Build the bundle's network on `device` from its verified weights; raises BundleError.

    It has the manifest's precision with its float32 islands. fp16 is float32 on a CPU, where torch's products
    in float16 take four times as long and are less exact.
    """
    model, manifest = load_float(bundle), bundle.manifest
    precision = "fp32" if device.type == "cpu" and manifest.precision == "fp16" else manifest.precision
    scales = read_scales(bundle, [name for name, _ in fp8_layers(model)])
    return set_precision(model, precision, scales, manifest.kept_layers).to(device)


def load_float(bundle: Bundle) -> InferenceModel:
    """Build the bundle's network in float32 from its verified weights; raises BundleError."""
    manifest = bundle.manifest
    config = manifest.model.config
    _check_outputs(config, manifest)
    path = bundle.path / WEIGHTS
    # Folds are computed from the stored weights, and cast afterwards.
    state = {name: x.float() if x.is_floating_point() else x for name, x in _read_weights(bundle).items()}
    try:
        return InferenceModel.from_released(state, config)
    except CheckpointError as error:
        raise BundleError(f"{path}: {error}; export the bundle again") from error


def read_scales(bundle: Bundle, names: Sequence[str]) -> dict[str, float] | None:
    """The calibrated scales of the activations that the layers `names` read, or None; raises BundleError."""
    if SCALES not in bundle.manifest.files:
        if bundle.manifest.calibration is not None:
            raise BundleError(f"the bundle was calibrated but has no {SCALES}; export it again")
        return None
    path, scales = bundle.path / SCALES, _read_calibrated(bundle)
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
    path, content = bundle.path / SCALES, bundle.read(SCALES)
    try:
        scales = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not valid JSON: {error}; export the bundle again") from error
    if not isinstance(scales, dict):
        raise BundleError(f"{path}: expected the scales of layers by name; export the bundle again")
    return scales


def _read_weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    content = bundle.read(WEIGHTS)
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # SafetensorError and OSError share no base but Exception
        raise BundleError(
            f"{bundle.path / WEIGHTS}: cannot be read as safetensors: {error}; export the bundle again"
        ) from error


def _check_outputs(config: NetworkConfig, manifest: Manifest) -> None:
    names = [output.name for output in network_of(config).outputs]
    expected = [spec.name for spec in manifest.outputs]
    if sorted(names) != sorted(expected):
        raise BundleError(f"expected the outputs {expected} of the manifest, but {config.name} has {names}")


class TorchBackend(Backend[Runner]):
    """The network in torch, eager on a CPU."""

    name = "torch"
    library = "torch"

    def _run(self, network: Runner, feeds: Arrays, batch: int, tokens: int) -> Outputs:
        return network.run(feeds, batch, tokens)


class GpuBackend(TorchBackend[GraphRunner]):
    """The network as captured graphs on a GPU, which resizes images itself."""

    resizes = asynchronous = True

    def submit(self, images: Sequence[np.ndarray], text: Arrays) -> Pending:
        """Start to copy and run one batch; see `Backend.submit`."""
        runner = self._open()
        sizes = self._check(text, [spec for spec in self._manifest.inputs if spec.name != "image"])
        if len(images) == 1:
            images = list(images) * sizes["batch"]
        if len(images) != sizes["batch"]:
            raise BackendError(f"expected {sizes['batch']} images for as many captions, got {len(images)}")
        try:
            check_images(images)
        except ValueError as error:  # the kernels know nothing of the engine's errors
            raise InputError(str(error)) from error
        with self._reported(text):
            replay = runner.start(images, text, sizes["batch"], sizes["tokens"])
        return _Submitted(replay, partial(self._reported, text))

    def free(self) -> None:
        """Give what torch keeps for later batches back to the GPU."""
        torch.cuda.empty_cache()

    def close(self) -> None:
        """Drop the network once submitted batches are done."""
        runner = self._network
        super().close()
        if runner is not None:
            runner.close()


class _Submitted(NamedTuple):
    """A batch on the GPU; `reported` maps the errors of waiting for it."""

    replay: Replay
    reported: Callable[[], AbstractContextManager[None]]

    def result(self) -> Outputs:
        with self.reported():
            return self.replay.result()
