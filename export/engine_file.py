"""An engine as a file of a bundle, and its record in the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from export import trt
from export.bundle import BundleWriter
from export.digest import sha256_of
from export.engine_options import EngineOptions
from export.plugins.graph import plugin_graph
from export.profiles import Profile, Shapes

GRAPH, DRAFT = "model.onnx", "draft.engine"


def build_into(
    writer: BundleWriter,
    builder: trt.BuilderInfo,
    targets: Sequence[str],
    shapes: Shapes,
    options: EngineOptions,
    plugins: bool = False,
) -> tuple[dict[str, Any], str]:
    """Build the engine of the graph in `writer`'s folder; the manifest's record of it and a line on it.

    `targets` are compute capabilities, as "8.6"; `plugins` tells whether our kernels go into it. Raises
    BuildError.
    """
    graph, draft = writer.path(GRAPH), writer.path(DRAFT)
    source, ours = _with_plugins(graph) if plugins else (graph, {})
    spec = options.spec(source, builder, targets, shapes, bool(ours))
    built = trt.build_engine(spec, draft)
    if ours:
        source.unlink()
    record = _record(replace(spec, onnx=graph), built, ours)
    draft.replace(writer.path(record["file"]))
    return record, _line(record, built)


def _record(spec: trt.EngineSpec, built: trt.EngineReport, ours: dict[str, int]) -> dict[str, Any]:
    """The entry in the manifest: `engine.manifest.EngineEntry`."""
    features = spec.features
    return {
        "file": f"model.{_target(built, features.hardware)}.engine",
        "library": built.library,
        "version": built.version,
        "compute_capabilities": list(built.compute_capabilities),
        "onnx_sha256": sha256_of(spec.onnx),
        "profiles": [_ranges(profile) for profile in spec.profiles],
        "plugins": ours,
        "stripped": features.strip_weights,
        "version_compatible": features.version_compatible,
        **({} if features.hardware is None else {"hardware": features.hardware}),
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
    parts = [
        f"{record['file']}: {built.library} {built.version} for {', '.join(built.compute_capabilities)}",
        *([f"{count} profiles"] if count > 1 else []),
        *([f"{ours} nodes with our kernels"] if ours else []),
        *(["weights stripped"] if record["stripped"] else []),
        f"{built.engine_bytes / 1e6:.0f} MB",
        f"{built.peak_memory_mb:.0f} MB at its peak",
    ]
    return ", ".join(parts)


def _with_plugins(graph: Path) -> tuple[Path, dict[str, int]]:
    """The graph to build from, and the number of its nodes that are plugins, by operator."""
    rewritten = graph.with_name(f"plugins.{GRAPH}")
    plugins = plugin_graph(graph, rewritten)
    return (rewritten, plugins) if plugins else (graph, plugins)
