"""An engine as a file of a bundle, and its record in the manifest."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import BuildError
from export.bundle.digest import sha256_of
from export.bundle.writer import BundleWriter
from export.trt import build as trt
from export.trt.options import EngineOptions
from export.trt.process import BuildLimitError
from export.trt.profiles import Profile, Shapes

logger = logging.getLogger(__name__)

GRAPH, DRAFT = "model.onnx", "draft.engine"
HALF = "model.fp16.onnx"  # of a calibrated int8 bundle: the same products with float16 around them
_HALVES = ("fp16", "bf16", "fp8")  # precisions whose attention is in half precision
_DERIVED = ("plugins", "fused")
_FIRST_FUSED = (10, 14)  # of TensorRT, to read a node Attention


def build_into(
    writer: BundleWriter,
    builder: trt.BuilderInfo,
    targets: Sequence[str],
    shapes: Shapes,
    options: EngineOptions,
    precision: str,
) -> tuple[dict[str, Any], str]:
    """Build the engine of the bundle in `writer`'s folder; the manifest's record of it and a line on it.

    Its graph is `graph_of` the folder's files. `targets` are compute capabilities, as "8.6". Attention that
    is not ours is the library's own fused one where the graph has it in half precision, and products and
    softmax where the library refuses that. Raises BuildError, and BackendError for plugins that cannot be.
    """
    plugins = options.takes_plugins(builder)
    graph, draft = writer.path(HALF), writer.path(DRAFT)
    graph = graph if graph.exists() else writer.path(GRAPH)
    for fuse in (True, False) if _fuses(builder, options, precision, graph) else (False,):
        source = _source(graph, plugins, fuse)
        spec = options.spec(source.path, builder, targets, shapes, bool(source.ours))
        try:
            built = trt.build_engine(spec, draft)
            break
        except BuildError as error:
            if not source.fused or isinstance(error, BuildLimitError):
                raise
            logger.warning("no engine with %s's own attention, so one without: %s", builder.library, error)
        finally:
            for label in _DERIVED:
                _beside(graph, label).unlink(missing_ok=True)
    record = _record(replace(spec, onnx=graph), built, source)
    draft.replace(writer.path(record["file"]))
    return record, _line(record, built)


def graph_of(files: Container[str]) -> str:
    """The name of the graph that engines of a bundle with these files are built from."""
    return HALF if HALF in files else GRAPH


def _fuses(builder: trt.BuilderInfo, options: EngineOptions, precision: str, graph: Path) -> bool:
    """Whether TensorRT's own attention is tried; a stripped engine is refitted from the graph as it is."""
    if options.features.strip_weights or not (precision in _HALVES or graph.name == HALF):
        return False
    if importlib.util.find_spec("onnx") is None:  # a serving machine, which rebuilds
        logger.warning("attention is built of products: pip install onnx for %s's own", builder.library)
        return False
    version = tuple(map(int, re.findall(r"\d+", builder.version or "")))
    return builder.library == "tensorrt_rtx" or version >= _FIRST_FUSED


class _Source(NamedTuple):
    """The file to build from, and how many of its nodes are ours, by operator, and fused attention."""

    path: Path
    ours: dict[str, int]
    fused: int


def _source(graph: Path, plugins: bool, fuse: bool) -> _Source:
    """Make what an engine is built from, beside the graph, whose weights it shares."""
    path, ours, fused = graph, dict[str, int](), 0
    if plugins:
        from export.trt.plugins.graph import plugin_graph

        if ours := plugin_graph(path, _beside(graph, "plugins")):
            path = _beside(graph, "plugins")
    if fuse:
        from export.graph.fused_attention import native_graph

        if fused := native_graph(path, _beside(graph, "fused")):
            path = _beside(graph, "fused")
    return _Source(path, ours, fused)


def _beside(graph: Path, label: str) -> Path:
    return graph.with_name(f"{label}.{graph.name}")


def _record(spec: trt.EngineSpec, built: trt.EngineReport, source: _Source) -> dict[str, Any]:
    """The entry in the manifest: `engine.manifest.EngineEntry`."""
    features = spec.features
    return {
        "file": f"model.{_target(built, features.hardware)}.engine",
        "library": built.library,
        "version": built.version,
        "compute_capabilities": list(built.compute_capabilities),
        "onnx_sha256": sha256_of(spec.onnx),
        "profiles": [_ranges(profile) for profile in spec.profiles],
        "plugins": source.ours,
        "fused_attention": source.fused,
        "stripped": features.strip_weights,
        "version_compatible": features.version_compatible,
        **({} if features.hardware is None else {"hardware": features.hardware}),
        "build": {"seconds": round(built.seconds, 1), "peak_memory_mb": round(built.peak_memory_mb)},
    }


def _target(built: trt.EngineReport, hardware: str | None) -> str:
    """What the engine runs on, as a part of its file's name."""
    if hardware == "ampere":
        return "trt-sm80plus"
    kind = "rtx" if built.library == "tensorrt_rtx" else "trt"
    return "-".join([kind, *(f"sm{c.replace('.', '')}" for c in built.compute_capabilities)])


def _ranges(profile: Profile) -> dict[str, dict[str, list[int]]]:
    return {
        name: dict(zip(("min", "opt", "max"), map(list, shapes), strict=True))
        for name, shapes in profile.items()
    }


def _line(record: dict[str, Any], built: trt.EngineReport) -> str:
    count, ours = len(record["profiles"]), sum(record["plugins"].values())
    fused = record["fused_attention"]
    parts = [
        f"{record['file']}: {built.library} {built.version} for {', '.join(built.compute_capabilities)}",
        *([f"{count} profiles"] if count > 1 else []),
        *([f"{ours} nodes with our kernels"] if ours else []),
        *([f"{fused} fused attentions"] if fused else []),
        *(["weights stripped"] if record["stripped"] else []),
        f"{built.engine_bytes / 1e6:.0f} MB",
        f"{built.peak_memory_mb:.0f} MB at its peak",
    ]
    return ", ".join(parts)
