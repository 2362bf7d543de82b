"""Build the engine file of a bundle and describe it as an entry of the manifest."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from engine.errors import BuildError
from engine.files import sha256_of
from engine.layout import GRAPH, HALF_GRAPH, engine_name
from engine.manifest import BuildCost, EngineEntry, ShapeRange
from export.bundle.writer import BundleWriter
from export.trt import build as trt
from export.trt.options import EngineOptions
from export.trt.process import BuildLimitError
from export.trt.profiles import Profile, Shapes

logger = logging.getLogger(__name__)

_DRAFT = "draft.engine"  # until its targets, which are part of its name, are known
_HALVES = ("fp16", "bf16", "fp8")  # precisions whose attention is in half precision
_DERIVED = ("plugins", "fused")
_FIRST_FUSED = (10, 14)  # version of TensorRT that reads a node Attention


def build_into(
    writer: BundleWriter,
    builder: trt.BuilderInfo,
    targets: Sequence[str],
    shapes: Shapes,
    options: EngineOptions,
    precision: str,
) -> tuple[EngineEntry, str]:
    """Build the engine of the bundle in `writer`'s folder; return its entry in the manifest and a line on it.

    It is built from the graph that `graph_of` names. `targets` are compute capabilities, as "8.6". Attention
    that our kernels do not run is fused by the library where it is in half precision; where the library
    refuses, it stays products and softmax. Raises BuildError, and BackendError for plugins that are asked
    for and cannot be built.
    """
    plugins = options.takes_plugins(builder)
    graph, draft = writer.path(HALF_GRAPH), writer.path(_DRAFT)
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
            logger.warning("%s cannot fuse attention, building without: %s", builder.library, error)
        finally:
            for label in _DERIVED:
                _beside(graph, label).unlink(missing_ok=True)
    entry = _entry(replace(spec, onnx=graph), built, source)
    draft.replace(writer.path(entry.file))
    return entry, _line(entry, built)


def graph_of(files: Container[str]) -> str:
    """The name of the graph that engines of a bundle with these files are built from."""
    return HALF_GRAPH if HALF_GRAPH in files else GRAPH


def _fuses(builder: trt.BuilderInfo, options: EngineOptions, precision: str, graph: Path) -> bool:
    """Whether to try TensorRT's fused attention; a stripped engine is refitted from the graph as it is."""
    if options.features.strip_weights or not (precision in _HALVES or graph.name == HALF_GRAPH):
        return False
    if importlib.util.find_spec("onnx") is None:  # a serving machine, which rebuilds
        logger.warning("attention is built of products: pip install onnx for %s's fused one", builder.library)
        return False
    version = tuple(map(int, re.findall(r"\d+", builder.version or "")))
    return builder.library == "tensorrt_rtx" or version >= _FIRST_FUSED


class _Source(NamedTuple):
    """The file to build from, and how many of its nodes are ours, by operator, and fused attention."""

    path: Path
    ours: dict[str, int]
    fused: int


def _source(graph: Path, plugins: bool, fuse: bool) -> _Source:
    """Write the graph to build from beside the given one, whose weights it shares."""
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


def _entry(spec: trt.EngineSpec, built: trt.EngineReport, source: _Source) -> EngineEntry:
    features = spec.features
    return EngineEntry(
        file=engine_name(_target(built, features.hardware)),
        library=built.library,
        version=built.version,
        compute_capabilities=tuple(built.compute_capabilities),
        onnx_sha256=sha256_of(spec.onnx),
        profiles=tuple(_ranges(profile) for profile in spec.profiles),
        plugins=source.ours,
        fused_attention=source.fused,
        stripped=features.strip_weights,
        version_compatible=features.version_compatible,
        hardware=features.hardware,
        build=BuildCost(round(built.seconds, 1), round(built.peak_memory_mb)),
    )


def _target(built: trt.EngineReport, hardware: str | None) -> str:
    """What the engine runs on, as a part of its file's name."""
    if hardware == "ampere":
        return "trt-sm80plus"
    kind = "rtx" if built.library == "tensorrt_rtx" else "trt"
    return "-".join([kind, *(f"sm{c.replace('.', '')}" for c in built.compute_capabilities)])


def _ranges(profile: Profile) -> dict[str, ShapeRange]:
    return {name: ShapeRange(*(tuple(shape) for shape in shapes)) for name, shapes in profile.items()}


def _line(entry: EngineEntry, built: trt.EngineReport) -> str:
    profiles, ours = len(entry.profiles), sum(entry.plugins.values())
    parts = [
        f"{entry.file}: {entry.library} {entry.version} for {', '.join(entry.compute_capabilities)}",
        *([f"{profiles} profiles"] if profiles > 1 else []),
        *([f"{ours} nodes with our kernels"] if ours else []),
        *([f"{entry.fused_attention} fused attentions"] if entry.fused_attention else []),
        *(["weights stripped"] if entry.stripped else []),
        f"{built.engine_bytes / 1e6:.0f} MB",
        f"{built.peak_memory_mb:.0f} MB at its peak",
    ]
    return ", ".join(parts)
