"""The fastest backend for a bundle on this machine, measured and recorded: `dgm4 bench --choose`.

First every backend's outputs are held to those of the backend that `auto` takes without a measurement, within
the tolerance that the bundle was verified with. Those that agree are measured, with a thread for every usable
core and, where cores run two threads, with one for every physical core.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from engine import Bundle
from engine.backends import choice, on_cpu, usable_cores
from engine.backends.choice import Choice
from engine.errors import BackendError, Dgm4Error
from engine.inputs.preprocess import normalize_image
from engine.manifest import Manifest
from engine.registry import network_of
from export.bench.measure import Bench, BenchOptions, Candidate, Report, bench, label
from export.bench.process import draw_image, network_outputs

# Another backend than the rule's has to be faster by so much: one run's medians move by that.
MARGIN = 0.03
_ABSOLUTE, _WRITTEN = "max", "written"  # of a manifest's `verification`
_EXACT = 1e-4  # for a bundle without a record of its verification
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"

Arrays = Mapping[str, np.ndarray]


def choose(bundle: Bundle, options: BenchOptions, report: Report) -> tuple[Bench, Choice]:
    """Measure the backends of a CPU that agree, and return the measurement with the winner.

    Raises what `bench` raises, BackendError where no backend is installed for the bundle.
    """
    names = on_cpu(bundle)
    if not names:
        raise BackendError(f"{bundle.path}: no backend is installed that serves it on a CPU")
    asked = [name for name in names if not options.backends or name in options.backends]
    disagreeing = dict(_disagreeing(bundle, names[0], asked, options))
    equal = tuple(name for name in asked if name not in disagreeing)
    counts = thread_counts() if options.threads is None else ()
    measured = bench(bundle, replace(options, backends=equal, counts=counts, device="cpu"), report)
    measured.absent.update(disagreeing)
    return measured, winner(bundle, names[0], measured)


def winner(bundle: Bundle, by_rule: str, measured: Bench) -> Choice:
    """The fastest over all batches, by the geometric mean of the medians; `by_rule` within the margin."""
    batches = {row.batch for row in measured.rows}
    found: dict[Candidate, list[float]] = {}
    for row in measured.rows:
        found.setdefault((row.backend, row.threads), []).append(row.total["p50"])
    means = {one: statistics.geometric_mean(x) for one, x in found.items() if len(x) == len(batches)}
    if not means:
        raise BackendError("no backend served every batch; choose others with --batch")
    best = min(means, key=lambda one: means[one] * (1.0 if one[0] == by_rule else 1.0 + MARGIN))
    model = measured.model
    return Choice(
        format=choice.FORMAT,
        situation=choice.current(bundle, measured.options.threads),
        backend=best[0],
        threads=best[1],
        medians={label(*one): round(means[one], 3) for one in sorted(means, key=lambda one: means[one])},
        model=f"{model['name']} {model['size']} {model['precision']}",
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def thread_counts() -> tuple[int | None, ...]:
    """Every usable core (None), and the physical ones where those are fewer."""
    physical = physical_cores()
    return (None, physical) if physical is not None and physical < usable_cores() else (None,)


def physical_cores() -> int | None:
    """Cores of this process that share nothing with one another; None where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    try:
        return len({Path(_SIBLINGS.format(core)).read_text() for core in os.sched_getaffinity(0)})
    except OSError:
        return None


def _disagreeing(
    bundle: Bundle, reference: str, names: Sequence[str], options: BenchOptions
) -> Iterator[tuple[str, str]]:
    """The backends whose outputs are not those of `reference`, or that do not load, and why."""
    kind, tolerance = _tolerance(bundle.manifest)
    feeds = _feeds(bundle.manifest, options.tokens)
    want = network_outputs(bundle.path, reference, options.threads, feeds)
    for name in names:
        if name == reference:
            continue
        try:
            got = network_outputs(bundle.path, name, options.threads, feeds)
        except Dgm4Error as error:
            yield name, str(error)
            continue
        apart = max(_distance(kind, [x[key] for x in want], [x[key] for x in got]) for key in want[0])
        if not apart <= tolerance:  # a NaN too
            yield name, f"its outputs differ from those of {reference}: {kind} {apart:.3g}, not {tolerance:g}"


def _tolerance(manifest: Manifest) -> tuple[str, float]:
    """What the bundle's precision was verified with: the kind of distance and its bound."""
    stages = [stage for stage in manifest.verification if stage.stage != _WRITTEN]
    return (stages[-1].kind or _ABSOLUTE, stages[-1].tolerance) if stages else (_ABSOLUTE, _EXACT)


def _distance(kind: str, want: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> float:
    """The largest difference, or the RMS of the differences over that of `want`."""
    reference = np.concatenate([array.ravel() for array in want]).astype(np.float64)
    apart = np.concatenate([array.ravel() for array in got]) - reference
    if kind == _ABSOLUTE:
        return float(np.abs(apart).max())
    return math.sqrt(np.mean(apart**2) / np.mean(reference**2))


def _feeds(manifest: Manifest, tokens: int) -> list[dict[str, np.ndarray]]:
    """Inputs of one pair, and of two captions of which one is padded."""
    spec, generator = manifest.preprocess, np.random.Generator(np.random.PCG64(1))
    side, config = spec.image_size, manifest.model.config
    further = network_of(config).further(config)
    pixels = normalize_image(np.resize(draw_image(), (side, side, 3)), spec.mean, spec.std)
    feeds = []
    for batch in (1, min(2, manifest.limits.max_batch)):
        ids = generator.integers(config.vocabulary, size=(batch, tokens))
        mask = np.ones_like(ids)
        mask[1:, (tokens + 1) // 2 :] = 0
        image = np.repeat(pixels[None], batch, axis=0)
        others = {
            name: np.full((batch, *map(int, shape)), 0.5, np.float32) for name, shape in further.items()
        }
        feeds.append({"image": image, "input_ids": ids, "attention_mask": mask, **others})
    return feeds
