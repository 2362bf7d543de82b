"""The stages of an export: what each did, and the state that goes from one to the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.graph.parity import Difference
from export.options import ExportOptions
from export.quantization.calibrate import Calibrated


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
class Run:
    """The state of one export: options, what was said so far, and the records for the manifest.

    `calibrated` holds the scales of activations and the shifts they are for; `ranking` names the layers that
    a precision rounds, the one that loses most first, once it was needed, and `kept` those of them that stay
    higher; `float_layers` are the float32 islands.
    """

    options: ExportOptions
    report: Callable[[Stage], None]
    verification: list[Difference] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    vocabulary: Path | None = None
    calibrated: Calibrated | None = None
    ranking: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    float_layers: list[str] = field(default_factory=list)

    @property
    def scales(self) -> dict[str, float] | None:
        """Scales of calibrated activations by layer, or None."""
        return None if self.calibrated is None else self.calibrated.scales

    @contextmanager
    def stage(self, name: str) -> Iterator[Open]:
        """Time a stage and report it once it went well."""
        start = time.perf_counter()
        current = Open()
        yield current
        self.verification += current.differences
        self.report(Stage(name, current.text, time.perf_counter() - start, tuple(current.differences)))


@dataclass
class Open:
    """What a stage that runs has to say of itself, and the differences it has checked."""

    text: str = ""
    differences: list[Difference] = field(default_factory=list)
