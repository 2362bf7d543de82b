"""The accuracy gate: how far a precision's metrics may lie from float32's, and calibrated false alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from engine.errors import InputError, quoted
from engine.scores import Rate, ScoreCalibration

if TYPE_CHECKING:
    from export.evaluation.curves import Judgement
    from export.evaluation.evaluate import Evaluation

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
        raise InputError(f"precision: expected one of {', '.join(GATES)}, got {quoted(precision)}")
    allowed = GATES[precision]
    return [
        GateFailure(name, metrics[name], reference[name], allowed)
        for name in GATED
        # Written so that a NaN does not pass.
        if not abs(metrics[name] - reference[name]) <= allowed + _ROUNDING
    ]


@dataclass(frozen=True)
class FalseAlarmFailure:
    """A decision with more false alarms than its bundle was calibrated for, beyond chance."""

    decision: str
    rate: Rate
    allowed: float

    def __str__(self) -> str:
        rate = self.rate
        return (
            f"false alarms of {self.decision}: expected at most {100 * self.allowed:.2f} %, got "
            f"{100 * rate.value:.2f} % ({100 * rate.low:.2f} to {100 * rate.high:.2f})"
        )


Failures: TypeAlias = "Sequence[GateFailure | FalseAlarmFailure] | None"


def check_false_alarms(
    calibration: ScoreCalibration, decisions: Mapping[str, Judgement]
) -> list[FalseAlarmFailure]:
    """Return the decisions whose rate of false alarms lies above both the wanted and the reached one.

    That is so where its whole interval lies above the wanted rate and above the interval that the
    calibration reached on the pairs it held out.
    """
    failures = []
    for name, reached in calibration.reached.items():
        allowed = max(calibration.false_alarms, reached.high)
        rate = decisions[name].in_use.false_alarm_rate if name in decisions else None
        if rate is not None and rate.low > allowed:
            failures.append(FalseAlarmFailure(name, rate, allowed))
    return failures


def find_failures(evaluation: Evaluation) -> Failures:
    """Return what the gate refuses; None without a reference and a calibration to hold the bundle to."""
    failures: list[GateFailure | FalseAlarmFailure] = []
    if evaluation.comparison is None and evaluation.calibration is None:
        return None
    if (compared := evaluation.comparison) is not None:
        metrics = evaluation.scores.metrics
        failures += check_gate(evaluation.model["precision"], metrics, compared.scores.metrics)
    if evaluation.calibration is not None:
        failures += check_false_alarms(evaluation.calibration, evaluation.decisions)
    return failures
