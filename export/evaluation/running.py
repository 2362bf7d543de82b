"""Run a bundle, and maybe a reference beside it, on a split of annotated pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dgm4.data.annotations import Sample, read_split
from engine.backends import Backend, create, ort
from engine.bundle import Bundle
from engine.errors import InputError
from engine.inputs.options import Decode
from engine.inputs.text import CaptionTokenizer
from engine.layout import DATA_SUFFIX
from engine.manifest import Manifest
from engine.registry import network_of
from export.evaluation.scoring import Network, Pairs, Scored, score

BUNDLE, REFERENCE = "bundle", "reference"


@dataclass(frozen=True)
class RunOptions:
    """Which pairs to run and how.

    `graph` names an ONNX file of the bundle to run in ONNX Runtime, in place of a backend's choice.
    `limit` draws that many pairs of the split with `seed`; None takes all. `batch` None is the bundle's
    largest, 32 at most. `decode` is that of `ImageOptions`. `on_bad` "skip" leaves unusable records out,
    "raise" stops there. `level` is that of the intervals.
    """

    split: str = "test"
    graph: str | None = None
    limit: int | None = None
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    batch: int | None = None
    decode: Decode = "exact"
    on_bad: Literal["skip", "raise"] = "skip"
    level: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """What came of a run: the outputs, the model that gave them, and what was left out, by kind."""

    scored: Scored
    model: dict[str, str]
    problems: dict[str, int]


def run_bundle(
    bundle: Bundle,
    data: str | Path,
    options: RunOptions,
    reference: Network | None = None,
    progress: bool = False,
) -> Run:
    """Run the bundle on a split of the data folder `data`, in the published layout.

    Raises BundleError and BackendError for what does not load, InputError for data that cannot be used.
    `progress` shows a bar on stderr.
    """
    manifest = bundle.manifest
    check_network(bundle, "evaluate")
    annotations = read_split(data, options.split, options.on_bad)
    samples = _draw(annotations.usable(f"{data}, split {options.split}"), options)
    pairs = Pairs(samples, CaptionTokenizer.of(bundle), manifest, options.decode)
    network = _load_network(bundle, options)
    networks: dict[str, Network] = {BUNDLE: network}
    if reference is not None:
        networks[REFERENCE] = reference
    try:
        scored = score(networks, pairs, _batch_size(manifest, options), options.on_bad, progress)
    finally:
        network.close()
    info = manifest.model
    model = {"name": info.name, "size": info.size, "precision": manifest.precision}
    problems = Counter(problem.kind for problem in (*annotations.problems, *scored.problems))
    return Run(
        scored, {**model, "backend": network.name, "device": network.device}, dict(problems.most_common())
    )


def check_network(bundle: Bundle, verb: str) -> None:
    """Raise InputError, which says what to `verb` instead, unless annotations have what the network reads."""
    if network_of(bundle.manifest.model.config).box is not None:
        raise InputError(
            f"{bundle.path}: {bundle.manifest.model.name} judges a box that each pair brings, which "
            f"annotations do not have; {verb} a network that finds it itself"
        )


def _load_network(bundle: Bundle, options: RunOptions) -> Backend[Any]:
    if options.graph is None:
        return create(options.backend, bundle, options.device, options.threads)
    return ort.load(bundle, options.graph, options.graph + DATA_SUFFIX, options.threads)


def _draw(samples: Sequence[Sample], options: RunOptions) -> Sequence[Sample]:
    """Return all samples, or `limit` of them drawn with the seed, in their order."""
    if options.limit is None or options.limit >= len(samples):
        return samples
    if options.limit < 1:
        raise InputError(f"limit: expected at least 1, got {options.limit}")
    chosen = np.random.default_rng(options.seed).choice(len(samples), options.limit, replace=False)
    return [samples[i] for i in np.sort(chosen)]


def _batch_size(manifest: Manifest, options: RunOptions) -> int:
    if options.batch is not None and options.batch < 1:
        raise InputError(f"batch: expected at least 1, got {options.batch}")
    return min(options.batch or 32, manifest.limits.max_batch)
