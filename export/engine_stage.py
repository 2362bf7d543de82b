"""The engine in a bundle: whether there can be one, for which shapes, and its record in the manifest."""

from __future__ import annotations

from engine.errors import BackendError
from engine.manifest import EngineEntry
from engine.registry import network_of
from engine.registry.config import NetworkConfig
from export.bundle.writer import BundleWriter
from export.manifest_fields import MAX_WORDS
from export.options import ExportOptions, asks_for_engine
from export.trt import build
from export.trt.engine_file import build_into
from export.trt.options import default_targets
from export.trt.profiles import Shapes


def has_graph(options: ExportOptions) -> bool:
    """Whether the network of these options has an ONNX graph: all but fp8 with a scale for each row."""
    return options.precision != "fp8" or options.calibration is not None


def no_engine(options: ExportOptions, builder: build.BuilderInfo | None) -> str | None:
    """Why no engine is built, or None; raises BackendError where one was asked for and nothing builds it."""
    if not options.engine:
        return "not asked for"
    if not has_graph(options):
        return "TensorRT takes fp8 from calibrated Q/DQ nodes (--calibration); the backend 'torch' serves it"
    if options.precision == "int8" and options.calibration is None:
        return "TensorRT takes int8 from calibrated Q/DQ nodes (--calibration), not from dynamic quantisation"
    if builder is None:
        if asks_for_engine(options):
            raise BackendError(f"an engine was asked for, and nothing here builds one ({build.reasons()})")
        return f"nothing here builds one ({build.reasons()})"
    return None


def write_engine(
    options: ExportOptions, config: NetworkConfig, builder: build.BuilderInfo, writer: BundleWriter
) -> tuple[EngineEntry, str]:
    """Build the engine of the bundle's graph; return its entry in the manifest and a line on it.

    Raises BuildError.
    """
    targets = options.targets or default_targets(builder.library, options.precision)
    network, building = network_of(config), options.building
    tokens = (network.tokenizer.min_tokens, min(MAX_WORDS, options.max_tokens), options.max_tokens)
    shapes = Shapes(options.max_batch, *tokens, config.image_size, network.further(config))
    entry, line = build_into(writer, builder, targets, shapes, building, options.precision)
    excluded = building.no_plugins() if building.plugins == "auto" else None
    return entry, line if excluded is None else f"{line}; without our kernels: {excluded}"
