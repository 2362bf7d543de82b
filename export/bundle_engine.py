"""The engine in a bundle: whether there can be one, for which shapes, and its record in the manifest."""

from __future__ import annotations

from typing import Any

from dgm4.config import ModelConfig
from engine.errors import BackendError
from export import trt
from export.bundle import BundleWriter
from export.digest import sha256_of
from export.options import ExportOptions
from export.record import MAX_WORDS, MIN_TOKENS
from kernels.rows import E4M3_CAPABILITY

MODEL = "model.onnx"


def has_graph(options: ExportOptions) -> bool:
    """Whether the network of these options has an ONNX graph: all but fp8 with a scale for each row."""
    return options.precision != "fp8" or options.calibration is not None


def no_engine(options: ExportOptions, builder: trt.BuilderInfo | None) -> str | None:
    """Why no engine is built, or None; raises BackendError where one was asked for and nothing builds it."""
    if not options.engine:
        return "not asked for"
    if not has_graph(options):
        return "TensorRT takes fp8 from calibrated Q/DQ nodes (--calibration); the backend 'torch' serves it"
    if options.precision == "int8" and options.calibration is None:
        return "TensorRT takes int8 from calibrated Q/DQ nodes (--calibration), not from dynamic quantisation"
    if builder is None:
        reasons = "; ".join(f"{info.library}: {info.reason}" for info in trt.describe_builders())
        if options.targets:
            raise BackendError(f"--target was given but nothing here can build an engine ({reasons})")
        return f"nothing here builds one ({reasons})"
    return None


def write_engine(
    options: ExportOptions, config: ModelConfig, builder: trt.BuilderInfo, writer: BundleWriter
) -> tuple[dict[str, Any], str]:
    """Build the engine of the bundle's graph; the manifest's record of it and a line that says what it is.

    Raises BuildError.
    """
    graph = writer.path(MODEL)
    targets = options.targets or _default_targets(options, builder)
    spec = trt.EngineSpec(
        graph, profile_of(options, config), compute_capabilities=targets, library=builder.library
    )
    draft = writer.path("draft.engine")
    built = trt.build_engine(spec, draft)
    kind = "rtx" if built.library == "tensorrt_rtx" else "trt"
    target = "-".join([kind, *(f"sm{c.replace('.', '')}" for c in built.compute_capabilities)])
    name = f"model.{target}.engine"
    draft.rename(writer.path(name))
    record = {
        "file": name,
        "library": built.library,
        "version": built.version,
        "compute_capabilities": list(built.compute_capabilities),
        "onnx_sha256": sha256_of(graph),
        "profile": {
            k: dict(zip(("min", "opt", "max"), map(list, v), strict=True)) for k, v in spec.profile.items()
        },
    }
    return record, (
        f"{name}: {built.library} {built.version} for {', '.join(built.compute_capabilities)}, "
        f"{built.engine_bytes / 1e6:.0f} MB, {built.peak_memory_mb:.0f} MB at its peak"
    )


def _default_targets(options: ExportOptions, builder: trt.BuilderInfo) -> tuple[str, ...]:
    """All that the builder knows without a GPU, less those without E4M3 for fp8."""
    if builder.library != "tensorrt_rtx":
        return ()
    known = trt.RTX_CAPABILITIES
    return tuple(c for c in known if options.precision != "fp8" or _number(c) >= E4M3_CAPABILITY)


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def profile_of(
    options: ExportOptions, config: ModelConfig
) -> dict[str, tuple[trt.Shape, trt.Shape, trt.Shape]]:
    """Shapes (smallest, typical, largest) of every input."""
    batch = (1, min(8, options.max_batch), options.max_batch)
    tokens = (MIN_TOKENS, min(MAX_WORDS, options.max_tokens), options.max_tokens)
    image: list[trt.Shape] = [(b, 3, config.image_size, config.image_size) for b in batch]
    text: list[trt.Shape] = list(zip(batch, tokens, strict=True))
    shapes = {"image": image, "input_ids": text, "attention_mask": text}
    return {name: (x[0], x[1], x[2]) for name, x in shapes.items()}
