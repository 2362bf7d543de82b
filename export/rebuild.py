"""Build an engine for this machine from an existing bundle. Needs neither torch nor onnx."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.backends.tensorrt_target import find_gpu
from engine.bundle import Bundle
from engine.errors import BackendError, BundleError
from engine.layout import CARD, GRAPH
from engine.manifest import EngineEntry, Manifest
from engine.registry import network_of
from export.bundle.card import model_card
from export.bundle.copying import carry, stored_fields
from export.bundle.writer import BundleWriter
from export.trt import build
from export.trt.engine_file import build_into, graph_of
from export.trt.options import EngineOptions, default_targets
from export.trt.profiles import Shapes

logger = logging.getLogger(__name__)


def rebuild(path: Path, options: EngineOptions | None = None, keep_fitting: bool = False) -> str:
    """Build an engine of the bundle at `path` and publish the bundle with it; a line on the engine.

    Engines for other machines stay; those of another graph, missing or damaged go. Without `options` an
    engine of several profiles is followed by one of the same. The bundle is replaced whole, in one step.
    With `keep_fitting` an engine of the same library, version and GPU stays, and nothing is built or written.
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
    graph = manifest.files[graph_of(manifest.files)].sha256
    current = [entry for entry in manifest.engines if entry.onnx_sha256 == graph]
    options = _with_profiles_of(options, current)
    options.check(limits.max_batch, limits.max_tokens)
    whole = _verified(bundle)
    current = [entry for entry in current if entry.file in whole]
    targets = _targets(builder.library, manifest)
    if keep_fitting:
        for entry in current:
            if _fits(entry, builder, targets):
                return f"{entry.file} was fine; --force builds it again"
    dropped = {CARD, *(entry.file for entry in manifest.engines)} - {entry.file for entry in current}
    with BundleWriter(bundle.path) as writer:
        for name in manifest.files:
            if name not in dropped:
                carry(bundle.path / name, writer.path(name))
        tokens = (spec.min_tokens, min(spec.max_words, limits.max_tokens), limits.max_tokens)
        config = manifest.model.config
        others = network_of(config).further(config)
        shapes = Shapes(limits.max_batch, *tokens, spec.image_size, others)
        entry, line = build_into(writer, builder, targets, shapes, options, manifest.precision)
        engines = (*(other for other in current if other.file != entry.file), entry)
        manifest = replace(manifest, engines=engines)
        writer.add_text(CARD, model_card(manifest))
        writer.commit({**stored_fields(bundle), **manifest.to_dict()})
    return line


def _check_graph(manifest: Manifest) -> None:
    """Raise BackendError unless the bundle contains a graph that TensorRT reads."""
    if GRAPH not in manifest.files:
        raise BackendError(
            f"a bundle in {manifest.precision} does not contain the {GRAPH} that an engine is built from; "
            "serve it with the backend 'torch'"
        )
    if manifest.precision == "int8" and manifest.calibration is None:
        raise BackendError(
            "TensorRT takes int8 from calibrated Q/DQ nodes: export again with --calibration, or use 'ort'"
        )


def _builder() -> build.BuilderInfo:
    """The library that can build here, TensorRT before TensorRT-RTX; raises BackendError."""
    builder = build.find_builder()
    if builder is None:
        reasons = "; ".join(f"{info.library}: {info.reason}" for info in build.describe_builders())
        raise BackendError(f"nothing here can build an engine ({reasons})")
    return builder


def _with_profiles_of(options: EngineOptions, engines: Sequence[EngineEntry]) -> EngineOptions:
    """Return the options with the profiles of the last engine that has several, unless some were given."""
    several = [entry.profiles for entry in engines if len(entry.profiles) > 1]
    if options.profiles is not None or not several:
        return options
    most = [profile["input_ids"].max for profile in several[-1]]
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
        capabilities = [
            c for entry in manifest.engines if entry.library == library for c in entry.compute_capabilities
        ]
        return tuple(dict.fromkeys(capabilities)) or default_targets(library, manifest.precision)


def _fits(entry: EngineEntry, builder: build.BuilderInfo, targets: Sequence[str]) -> bool:
    """Whether the builder would build this engine again."""
    wanted: set[str | None] = {*targets} or {builder.compute_capability}
    numbers = (entry.version.split("."), (builder.version or "").split("."))  # one may have fewer
    same = all(mine == theirs for mine, theirs in zip(*numbers, strict=False))
    return entry.library == builder.library and same and wanted <= set(entry.compute_capabilities)
