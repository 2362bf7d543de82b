"""Put an engine for this machine into a bundle that exists: `dgm4 rebuild`. Needs neither torch nor onnx."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.backends.tensorrt_target import find_gpu
from engine.bundle import Bundle
from engine.errors import BackendError, BundleError
from engine.manifest import MANIFEST, Manifest
from export import trt
from export.bundle import BundleWriter
from export.card import model_card
from export.cli_engine import engine_options
from export.engine_file import GRAPH, build_into, graph_of
from export.engine_options import EngineOptions
from export.profiles import Shapes

CARD = "README.md"


def run(options: argparse.Namespace) -> int:
    """Rebuild, and say on stderr what was built."""
    sys.stderr.write(rebuild(options.bundle, engine_options(options)) + "\n")
    return 0


def rebuild(path: Path, options: EngineOptions | None = None) -> str:
    """Build an engine of the bundle at `path` and publish the bundle with it; a line on the engine.

    Engines for other machines stay, those of another graph go. The bundle is replaced whole, in one step.
    Raises BundleError for one that is damaged, InputError for options that do not fit it, BackendError where
    nothing here can build an engine of it, BuildError where the builder fails; the bundle is then as it was.
    """
    options = options or EngineOptions()
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    _check_graph(manifest)
    spec, limits = manifest.preprocess, manifest.limits
    options.check(limits.max_batch, limits.max_tokens)
    builder = _builder()
    options.check_builder(builder)
    bundle.verify_all()
    fields = json.loads((bundle.path / MANIFEST).read_bytes())
    graph = manifest.files[graph_of(manifest.files)].sha256
    current = [_modern(record) for record in fields["engines"] if record["onnx_sha256"] == graph]
    dropped = {CARD, *(record["file"] for record in fields["engines"])} - {r["file"] for r in current}
    kept = [name for name in manifest.files if name not in dropped]
    with BundleWriter(bundle.path) as writer:
        for name in kept:
            _carry(bundle.path / name, writer.path(name))
        tokens = (spec.min_tokens, min(spec.max_words, limits.max_tokens), limits.max_tokens)
        shapes = Shapes(limits.max_batch, *tokens, spec.image_size)
        targets = _targets(builder.library)
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


def _targets(library: str) -> Sequence[str]:
    """Compute capabilities to build for: this machine's GPU, which TensorRT takes by itself."""
    if library == "tensorrt":
        return ()
    try:
        return (find_gpu("cuda").capability,)
    except BackendError:
        return trt.RTX_CAPABILITIES


def _carry(source: Path, target: Path) -> None:
    """Take a file along without its bytes where the file system can; raises BundleError."""
    try:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
    except OSError as error:
        raise BundleError(f"{source}: cannot be taken into the new bundle: {error.strerror}") from error
