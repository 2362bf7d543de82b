"""An engine as a file of a bundle, and its record in the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export import trt
from export.bundle import BundleWriter
from export.digest import sha256_of
from export.plugins.graph import plugin_graph

GRAPH, DRAFT = "model.onnx", "draft.engine"
HALF = "model.fp16.onnx"  # of a calibrated int8 bundle: the same products with float16 around them
TYPICAL_BATCH = 8

Profile = dict[str, tuple[trt.Shape, trt.Shape, trt.Shape]]


def build_into(
    writer: BundleWriter, library: str, targets: Sequence[str], profile: Profile, plugins: bool = False
) -> tuple[dict[str, Any], str]:
    """Build the engine of the graph in `writer`'s folder; the manifest's record of it and a line on it.

    The graph is `HALF` where there is one. `targets` are compute capabilities, as "8.6"; `plugins` tells
    whether our kernels go into it. Raises BuildError.
    """
    half, draft = writer.path(HALF), writer.path(DRAFT)
    graph = half if half.exists() else writer.path(GRAPH)
    source, ours = _with_plugins(graph) if plugins else (graph, {})
    spec = trt.EngineSpec(
        source, profile, compute_capabilities=tuple(targets), library=library, plugins=bool(ours)
    )
    built = trt.build_engine(spec, draft)
    if ours:
        source.unlink()
    kind = "rtx" if built.library == "tensorrt_rtx" else "trt"
    target = "-".join([kind, *(f"sm{c.replace('.', '')}" for c in built.compute_capabilities)])
    name = f"model.{target}.engine"
    draft.replace(writer.path(name))
    record = {
        "file": name,
        "library": built.library,
        "version": built.version,
        "compute_capabilities": list(built.compute_capabilities),
        "onnx_sha256": sha256_of(graph),
        "profile": {
            k: dict(zip(("min", "opt", "max"), map(list, v), strict=True)) for k, v in profile.items()
        },
        "plugins": ours,
        "build": {"seconds": round(built.seconds, 1), "peak_memory_mb": round(built.peak_memory_mb)},
    }
    nodes = f", {sum(ours.values())} nodes with our kernels" if ours else ""
    return record, (
        f"{name}: {built.library} {built.version} for {', '.join(built.compute_capabilities)}{nodes}, "
        f"{built.engine_bytes / 1e6:.0f} MB, {built.peak_memory_mb:.0f} MB at its peak"
    )


def _with_plugins(graph: Path) -> tuple[Path, dict[str, int]]:
    """The graph to build from, and the number of its nodes that are plugins, by operator."""
    rewritten = graph.with_name(f"plugins.{graph.name}")
    plugins = plugin_graph(graph, rewritten)
    return (rewritten, plugins) if plugins else (graph, plugins)


def profile_of(max_batch: int, tokens: tuple[int, int, int], image_size: int) -> Profile:
    """Shapes (smallest, typical, largest) of every input, `tokens` being those of a caption."""
    batch = (1, min(TYPICAL_BATCH, max_batch), max_batch)
    image: list[trt.Shape] = [(b, 3, image_size, image_size) for b in batch]
    text: list[trt.Shape] = list(zip(batch, tokens, strict=True))
    shapes = {"image": image, "input_ids": text, "attention_mask": text}
    return {name: (x[0], x[1], x[2]) for name, x in shapes.items()}
