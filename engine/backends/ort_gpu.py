"""ONNX Runtime on an NVIDIA GPU, by its CUDA or its TensorRT execution provider.

Both read the graph in standard operators, float or calibrated int8. Precision is in the graph, so no provider
is asked to lower it, and float32 products stay float32. The TensorRT provider builds an engine at its first
load, for all shapes up to the bundle's limits, which takes minutes for a base network, and caches it in the
user's cache folder.
"""

from __future__ import annotations

import logging
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from engine import files
from engine.backends import usable_cores
from engine.backends.base import Backend, Outputs, graph_files
from engine.backends.buckets import Arrays
from engine.backends.ort import check_names, session_options
from engine.bundle import Bundle
from engine.errors import BackendError, BundleError, quoted
from engine.layout import FLAT_GRAPH, GRAPH_DATA
from engine.manifest import Manifest
from engine.packages import find_conflict, install_command

logger = logging.getLogger(__name__)

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
_DEVICE = re.compile(r"auto|cuda(?::(\d+))?")
_TYPICAL_BATCH, _TYPICAL_TOKENS = 8, 50

Options = dict[str, str]
Providers = list[tuple[str, Options]]


def create_cuda(bundle: Bundle, device: str, threads: int | None) -> OrtGpuBackend:
    """Verify and load `model.flat.onnx` with the CUDA provider; raises BackendError or BundleError."""
    index = _index("ort-cuda", device)
    return _create("ort-cuda", bundle, index, threads, [(CUDA, cuda_options(index))])


def create_tensorrt(bundle: Bundle, device: str, threads: int | None) -> OrtGpuBackend:
    """The same with the TensorRT provider, and CUDA's for the operators that it does not take."""
    index = _index("ort-tensorrt", device)
    if bundle.manifest.precision == "fp32" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
        # The provider has no option for it (microsoft/onnxruntime #26029).
        raise BackendError(
            "the backend 'ort-tensorrt' would round this float32 bundle's products to TF32: set "
            "NVIDIA_TF32_OVERRIDE=0 before Python starts, or use the backend 'ort-cuda'"
        )
    options = tensorrt_options(bundle, index, cache_folder(bundle))
    return _create("ort-tensorrt", bundle, index, threads, [(TENSORRT, options), (CUDA, cuda_options(index))])


def cuda_options(index: int) -> Options:
    """Options of the CUDA provider for GPU number `index`: float32 products in float32."""
    return {
        "device_id": str(index),
        "use_tf32": "0",  # the float32 islands of the other precisions too
        "cudnn_conv_algo_search": "HEURISTIC",  # the default times every algorithm for each new shape
        "arena_extend_strategy": "kSameAsRequested",  # the default takes twice the memory at each growth
    }


def tensorrt_options(bundle: Bundle, index: int, cache: Path | None) -> Options:
    """Options of the TensorRT provider: one profile up to the bundle's limits, its engines in `cache`."""
    manifest = bundle.manifest
    limits, least = manifest.limits, manifest.preprocess.min_tokens
    shapes = {
        "min": (1, least),
        "opt": (min(_TYPICAL_BATCH, limits.max_batch), min(_TYPICAL_TOKENS, limits.max_tokens)),
        "max": (limits.max_batch, limits.max_tokens),
    }
    profile = {f"trt_profile_{name}_shapes": _shapes(manifest, *sizes) for name, sizes in shapes.items()}
    # Precision is in the graph; TensorRT 10 reads its Q/DQ nodes only where int8 is allowed.
    lower = {"trt_fp16_enable": "False", "trt_int8_enable": str(manifest.precision == "int8")}
    cached: Options = {"trt_engine_cache_enable": "False", "trt_timing_cache_enable": "False"}
    if cache is not None:
        cached = {
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": os.fspath(cache),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": os.fspath(cache),
        }
    return {"device_id": str(index), **lower, **profile, **cached}


def cache_folder(bundle: Bundle) -> Path | None:
    """The user's folder for engines of this graph and these weights; None where it cannot be made or trusted.

    An engine is a program, so nobody else may write there. Hence the hashes in its name: the provider
    identifies a graph by its structure alone.
    """
    entries = bundle.manifest.files
    key = "-".join(entries[name].sha256[:16] for name in (FLAT_GRAPH, GRAPH_DATA) if name in entries)
    folder = files.cache_folder() / key
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except OSError as error:
        logger.warning("engines are built anew at each start: %s cannot be made: %s", folder, error.strerror)
        return None
    if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o022):
        logger.warning("engines are built anew at each start: others may write in %s", folder)
        return None
    return folder


class OrtGpuBackend(Backend[onnxruntime.InferenceSession]):
    """One InferenceSession on a GPU."""

    library = "ONNX Runtime"

    def __init__(
        self, name: str, session: onnxruntime.InferenceSession, manifest: Manifest, index: int
    ) -> None:
        super().__init__(session, manifest, f"cuda:{index}")
        self.name, self._index = name, index

    def _run(self, network: onnxruntime.InferenceSession, feeds: Arrays, batch: int, tokens: int) -> Outputs:
        """Copy the inputs to the GPU once, leave the outputs there until all are done, and fetch them."""
        place = partial(onnxruntime.OrtValue.ortvalue_from_numpy, device_type="cuda", device_id=self._index)
        binding = network.io_binding()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, place(np.ascontiguousarray(array)))
        for name in self._outputs:
            binding.bind_output(name, "cuda", self._index)
        binding.synchronize_inputs()
        network.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return dict(zip(self._outputs, binding.copy_outputs_to_cpu(), strict=True))


def _index(name: str, device: str) -> int:
    match = _DEVICE.fullmatch(device)
    if match is None:
        raise BackendError(
            f"the backend {name!r} runs on device 'auto', 'cuda' or 'cuda:N', got {quoted(device)}"
        )
    return int(match[1] or 0)


def _create(
    name: str, bundle: Bundle, index: int, threads: int | None, providers: Providers
) -> OrtGpuBackend:
    # By path, not from memory: the TensorRT provider names the engines in its cache after the model's file.
    path = bundle.path / FLAT_GRAPH
    with bundle.held(*graph_files(bundle, FLAT_GRAPH, GRAPH_DATA)):
        session = _load(name, path, session_options(threads or usable_cores()), providers)
    check_names(path, session, bundle.manifest)
    logger.info("loaded %s with ONNX Runtime %s, %s", path, onnxruntime.__version__, session.get_providers())
    return OrtGpuBackend(name, session, bundle.manifest, index)


def _load(
    name: str, path: Path, options: onnxruntime.SessionOptions, providers: Providers
) -> onnxruntime.InferenceSession:
    """Load the graph; raises BackendError where a provider does not start: the CPU would run instead."""
    wanted = [provider for provider, _ in providers]
    instead = find_conflict() or f"pip uninstall -y onnxruntime && {install_command('gpu')}"
    _check_providers(name, wanted, onnxruntime.get_available_providers(), instead)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # no common base
        raise BundleError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it on a GPU: {error}"
        ) from error
    needed = "install the CUDA and cuDNN" + (" and TensorRT" if TENSORRT in wanted else "")
    _check_providers(name, wanted, session.get_providers(), f"{needed} that this version names in its log")
    return session


def _check_providers(name: str, wanted: list[str], started: list[str], remedy: str) -> None:
    missing = [provider for provider in wanted if provider not in started]
    if missing:
        raise BackendError(
            f"the backend {name!r} needs {' and '.join(missing)}, which ONNX Runtime "
            f"{onnxruntime.__version__} here does not start (it has {', '.join(started)}); {remedy}"
        )


def _shapes(manifest: Manifest, batch: int, tokens: int) -> str:
    """Shapes of all inputs as the provider reads them: name:1x3x256x256,..."""
    sizes: dict[Any, int] = {"batch": batch, "tokens": tokens}
    return ",".join(
        f"{spec.name}:{'x'.join(str(sizes.get(size, size)) for size in spec.shape)}"
        for spec in manifest.inputs
    )
