"""The engine in a bundle: whether there can be one, for which shapes, and its record in the manifest."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from dgm4.config import ModelConfig
from engine.errors import BackendError
from export import trt
from export.bundle import BundleWriter
from export.digest import sha256_of
from export.options import ExportOptions
from export.plugins.graph import plugin_graph
from export.record import MAX_WORDS, MIN_TOKENS
from kernels.jit import TARGETS

MODEL = "model.onnx"
GRAPHS = ("fp32", "fp16", "int8")  # precisions that have an ONNX graph; the others are the torch backend's


def no_engine(options: ExportOptions, builder: trt.BuilderInfo | None) -> str | None:
    """Why no engine is built, or None; raises BackendError where one was asked for and nothing builds it."""
    if not options.engine:
        return "not asked for"
    if options.precision not in GRAPHS:
        return f"{options.precision} has no ONNX graph to build one of; the backend 'torch' serves it"
    if options.precision == "int8" and options.calibration is None:
        return "TensorRT takes int8 from calibrated Q/DQ nodes (--calibration), not from dynamic quantisation"
    if builder is None:
        reasons = "; ".join(f"{info.library}: {info.reason}" for info in trt.describe_builders())
        if options.targets:
            raise BackendError(f"--target was given but nothing here can build an engine ({reasons})")
        return f"nothing here builds one ({reasons})"
    return None


def plugins_fit(options: ExportOptions, builder: trt.BuilderInfo) -> bool:
    """Whether our kernels go into the engine; raises BackendError where they were asked for and cannot."""
    reasons, known = [], [f"{target / 10}" for target in TARGETS]
    if builder.library != "tensorrt":
        reasons.append(f"{builder.library} has no plugins; pip install tensorrt on a machine with a GPU")
    elif builder.compute_capability not in known:
        gpu = builder.compute_capability
        reasons.append(f"the kernels are for compute capability {', '.join(known)}, and this GPU's is {gpu}")
    if importlib.util.find_spec("triton") is None:
        reasons.append("Triton, which compiles them, is not installed: pip install triton")
    if options.plugins == "on" and reasons:
        raise BackendError(f"--plugins on: {'; '.join(reasons)}")
    return options.plugins != "off" and not reasons


def _with_plugins(graph: Path) -> tuple[Path, dict[str, int]]:
    """The graph to build from, and the number of its nodes that are plugins, by operator."""
    rewritten = graph.with_name(f"plugins.{MODEL}")
    plugins = plugin_graph(graph, rewritten)
    return (rewritten, plugins) if plugins else (graph, plugins)


def write_engine(
    options: ExportOptions, config: ModelConfig, builder: trt.BuilderInfo, writer: BundleWriter
) -> tuple[dict[str, Any], str]:
    """Build the engine of the bundle's graph; the manifest's record of it and a line that says what it is.

    Raises BuildError.
    """
    graph = writer.path(MODEL)
    source, plugins = _with_plugins(graph) if plugins_fit(options, builder) else (graph, {})
    targets = options.targets or (trt.RTX_CAPABILITIES if builder.library == "tensorrt_rtx" else ())
    spec = trt.EngineSpec(
        source,
        profile_of(options, config),
        compute_capabilities=targets,
        library=builder.library,
        plugins=bool(plugins),
    )
    draft = writer.path("draft.engine")
    built = trt.build_engine(spec, draft)
    if plugins:
        source.unlink()
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
        "plugins": plugins,
    }
    ours = f", {sum(plugins.values())} nodes with our kernels" if plugins else ""
    return record, (
        f"{name}: {built.library} {built.version} for {', '.join(built.compute_capabilities)}{ours}, "
        f"{built.engine_bytes / 1e6:.0f} MB, {built.peak_memory_mb:.0f} MB at its peak"
    )


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
