"""The accuracy gate: how far a precision's metrics may lie from those of the float32 network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import InputError

GATED = ("AUC", "mAP", "IoUmean", "text_F1")
# Largest distance of each gated metric, as a fraction: 0.01 is one percent point.
GATES = {"fp32": 0.0002, "fp16": 0.002, "bf16": 0.002, "int8": 0.01, "fp8": 0.01}
_ROUNDING = 1e-9  # a distance of exactly the bound passes, however it was computed


@dataclass(frozen=True)
class GateFailure:
    """A metric outside its gate; values are fractions, NaN where the pairs do not define the metric."""

    metric: str
    value: float
    reference: float
    allowed: float

    def __str__(self) -> str:
        if math.isnan(self.value - self.reference):
            return f"{self.metric} is undefined on these pairs, so nothing can be said; use more pairs"
        return (
            f"{self.metric}: expected within {100 * self.allowed:g} % points of {100 * self.reference:.2f}, "
            f"got {100 * self.value:.2f}"
        )


def check_gate(
    precision: str, metrics: Mapping[str, float], reference: Mapping[str, float]
) -> list[GateFailure]:
    """Return the gated metrics that lie too far from the reference's, on the same pairs; none is a pass.

    The distance counts in both directions. A metric that is NaN fails. Raises InputError for a precision
    without a gate.
    """
    if precision not in GATES:
        raise InputError(f"precision: expected one of {', '.join(GATES)}, got {precision!r}")
    allowed = GATES[precision]
    return [
        GateFailure(name, metrics[name], reference[name], allowed)
        for name in GATED
        # Written so that a NaN does not pass.
        if not abs(metrics[name] - reference[name]) <= allowed + _ROUNDING
    ]
