"""Put an engine for this machine into a bundle that exists. Needs neither torch nor onnx."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.backends.tensorrt_target import find_gpu
from engine.bundle import Bundle
from engine.errors import BackendError, BundleError
from engine.manifest import MANIFEST, Manifest
from export.bundle.card import model_card
from export.bundle.writer import BundleWriter
from export.trt import build as trt
from export.trt.engine_file import GRAPH, build_into, graph_of
from export.trt.options import EngineOptions, default_targets
from export.trt.profiles import Shapes

logger = logging.getLogger(__name__)

CARD = "README.md"


def rebuild(path: Path, options: EngineOptions | None = None) -> str:
    """Build an engine of the bundle at `path` and publish the bundle with it; a line on the engine.

    Engines for other machines stay; those of another graph, missing or damaged go. Without `options` an
    engine of several profiles is followed by one of the same. The bundle is replaced whole, in one step.
    Raises BundleError for one that is damaged, InputError for options that do not fit it, BackendError where
    nothing here can build an engine of it, BuildError where the builder fails; the bundle is then as it was.
    """
    options = options or EngineOptions()
    bundle = Bundle.open(path, engines=False)
    manifest = bundle.manifest
    _check_graph(manifest)
    spec, limits = manifest.preprocess, manifest.limits
    builder = _builder()
    options.check_builder(builder)
    fields = json.loads((bundle.path / MANIFEST).read_bytes())
    graph = manifest.files[graph_of(manifest.files)].sha256
    current = [_modern(record) for record in fields["engines"] if record["onnx_sha256"] == graph]
    options = _remembering(options, current)
    options.check(limits.max_batch, limits.max_tokens)
    whole = _verified(bundle)
    current = [record for record in current if record["file"] in whole]
    dropped = {CARD, *(record["file"] for record in fields["engines"])} - {r["file"] for r in current}
    kept = [name for name in manifest.files if name not in dropped]
    with BundleWriter(bundle.path) as writer:
        for name in kept:
            _carry(bundle.path / name, writer.path(name))
        tokens = (spec.min_tokens, min(spec.max_words, limits.max_tokens), limits.max_tokens)
        shapes = Shapes(limits.max_batch, *tokens, spec.image_size)
        targets = _targets(builder.library, manifest)
        record, line = build_into(writer, builder, targets, shapes, options, manifest.precision)
        fields["engines"] = [*(old for old in current if old["file"] != record["file"]), record]
        writer.add_text(CARD, model_card(fields))
        del fields["sha256"]
        writer.commit(fields)
    return line


def _check_graph(manifest: Manifest) -> None:
    """Raise BackendError where the bundle has no graph that TensorRT takes."""
    if GRAPH not in manifest.files:
        raise BackendError(
            f"a bundle in {manifest.precision} has no {GRAPH} to build an engine of; the backend 'torch' "
            "serves it"
        )
    if manifest.precision == "int8" and manifest.calibration is None:
        raise BackendError(
            "TensorRT takes int8 from calibrated Q/DQ nodes: export again with --calibration, or use 'ort'"
        )


def _modern(record: dict[str, Any]) -> dict[str, Any]:
    """An engine's record as it is written today: a list of profiles where there was one."""
    if "profile" not in record:
        return record
    return {"profiles": [record["profile"]], **{k: v for k, v in record.items() if k != "profile"}}


def _builder() -> trt.BuilderInfo:
    """The library that can build here, TensorRT's own before RTX's; raises BackendError."""
    builder = trt.find_builder()
    if builder is None:
        reasons = "; ".join(f"{info.library}: {info.reason}" for info in trt.describe_builders())
        raise BackendError(f"nothing here can build an engine ({reasons})")
    return builder


def _remembering(options: EngineOptions, records: Sequence[dict[str, Any]]) -> EngineOptions:
    """The options with the profiles of an engine in `records` that has several, where none were given."""
    several = [record["profiles"] for record in records if len(record["profiles"]) > 1]
    if options.profiles is not None or not several:
        return options
    most = [profile["input_ids"]["max"] for profile in several[-1]]
    return replace(options, profiles=tuple((batch, tokens) for batch, tokens in most))


def _verified(bundle: Bundle) -> set[str]:
    """The files whose hashes agree: all of them but engines, or BundleError."""
    engines = {entry.file for entry in bundle.manifest.engines}
    whole = set()
    for name in bundle.manifest.files:
        try:
            bundle.verified(name)
            whole.add(name)
        except BundleError as error:
            if name not in engines:
                raise
            logger.warning("an engine is left out: %s", error)
    return whole


def _targets(library: str, manifest: Manifest) -> Sequence[str]:
    """Compute capabilities: this machine's GPU, which TensorRT takes by itself; without one, the bundle's."""
    if library == "tensorrt":
        return ()
    try:
        return (find_gpu("cuda").capability,)
    except BackendError:
        own = [
            c for entry in manifest.engines if entry.library == library for c in entry.compute_capabilities
        ]
        return tuple(dict.fromkeys(own)) or default_targets(library, manifest.precision)


def _carry(source: Path, target: Path) -> None:
    """Take a file along without its bytes where the file system can; raises BundleError."""
    try:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
    except OSError as error:
        raise BundleError(f"{source}: cannot be taken into the new bundle: {error.strerror}") from error
