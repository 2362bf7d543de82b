"""The stages of an export, and the immutable records that go from one to the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dgm4.config import ModelConfig
from engine.manifest import Calibration, Vocabulary, Weights
from engine.network.model import InferenceModel
from export.bundle.writer import BundleWriter
from export.graph.parity import Arrays, Difference, Tolerance, compare
from export.options import ExportOptions


@dataclass(frozen=True)
class Stage:
    """What one stage did, how long it took and how far it is from the stage before."""

    name: str
    text: str
    seconds: float
    differences: tuple[Difference, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "stage": self.name,
            "text": self.text,
            "seconds": round(self.seconds, 3),
            "differences": [d.to_dict() for d in self.differences],
        }


@dataclass
class OpenStage:
    """A running stage: the line that will describe it, its comparisons, and whether it failed besides."""

    text: str = ""
    differences: list[Difference] = field(default_factory=list)
    failed: bool = False

    def compare(
        self,
        name: str,
        against: str,
        reference: Sequence[Arrays],
        candidate: Sequence[Arrays],
        tolerance: Tolerance,
    ) -> Difference:
        """Record how far `candidate` is from `reference`; see `export.graph.parity.compare`."""
        self.differences.append(compare(name, against, reference, candidate, tolerance))
        return self.differences[-1]

    @property
    def passed(self) -> bool:
        """Whether nothing failed and every comparison is within its tolerance."""
        return not self.failed and all(difference.passed for difference in self.differences)


@dataclass(frozen=True)
class Job:
    """What stays the same throughout an export: options, the bundle being written, who hears of stages.

    `begin` hears the name of each stage, `report` what became of it.
    """

    options: ExportOptions
    writer: BundleWriter
    report: Callable[[Stage], None]
    begin: Callable[[str], None] = lambda name: None

    @contextmanager
    def stage(self, name: str) -> Iterator[OpenStage]:
        """Announce a stage, time and report it; one that raises or fails a comparison is not reported."""
        self.begin(name)
        start = time.perf_counter()
        current = OpenStage()
        yield current
        if current.passed:
            self.report(Stage(name, current.text, time.perf_counter() - start, tuple(current.differences)))


@dataclass(frozen=True)
class Source:
    """The float32 network to export.

    `weights` and `vocabulary` are their records in the manifest, `feeds` the inputs of its checks, `outputs`
    the network's for them, `rewrite` their distance from the trained network's.
    """

    config: ModelConfig
    weights: Weights
    vocabulary: Vocabulary
    network: InferenceModel
    feeds: Sequence[Mapping[str, Tensor]]
    outputs: Sequence[Arrays]
    rewrite: Difference


@dataclass(frozen=True)
class Calibrated:
    """Scales of activations by layer, and the manifest's record of the pairs they come from."""

    scales: Mapping[str, float]
    record: Calibration


@dataclass(frozen=True)
class Lowered:
    """A network brought to its precision, its graph written: one attempt.

    `keep` names the Linear layers left a step above the precision, `float_layers` the modules with float32
    parameters. `checks` are the comparisons made; the last one may have failed, and then nothing followed it.
    """

    network: InferenceModel
    keep: tuple[str, ...]
    float_layers: tuple[str, ...]
    checks: tuple[Difference, ...]

    @property
    def failure(self) -> str | None:
        """Why this attempt is no use, or None."""
        return next((check.failure for check in self.checks if not check.passed), None)
