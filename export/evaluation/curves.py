"""How good the scores of a decision are, and what its threshold makes of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import brier_score_loss, precision_recall_curve, roc_curve

from engine.scores import Rate
from export.evaluation.decisions import Decisions, rate_of

SWEEP = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
BINS = 15  # of the reliability diagram, as Guo et al. (2017) have it
_POINTS = 100  # of a curve; more would not be seen

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Reliability:
    """How far scores are probabilities.

    `bins` holds (mean score, share that is manipulated, count) of each bin of equal width with anything in
    it; `ece` the expected calibration error, their distance weighted by count; `brier` the mean squared
    distance of score and truth.
    """

    ece: float
    brier: float
    bins: tuple[tuple[float, float, int], ...]


@dataclass(frozen=True)
class AtThreshold:
    """What comes of a threshold: counts, `found` and `missed` of what is manipulated, the others of the rest.

    `found_rate` (recall) and `false_alarm_rate` have intervals, and are None where there is nothing to count;
    `precision` is that of what is flagged, None where nothing is.
    """

    threshold: float
    found: int
    missed: int
    false_alarms: int
    passed: int
    found_rate: Rate | None
    false_alarm_rate: Rate | None
    precision: float | None


@dataclass(frozen=True)
class Judgement:
    """The curves of one decision: `roc` (false alarm rate, recall), `precision_recall` (recall, precision).

    Both are empty where the pairs do not define them. `raw` is the reliability at temperature 1.
    """

    temperature: float
    raw: Reliability
    calibrated: Reliability
    in_use: AtThreshold
    sweep: tuple[AtThreshold, ...]
    roc: Points
    precision_recall: Points


def judge(decisions: Decisions, temperature: float, threshold: float, level: float) -> Judgement | None:
    """Judge a decision's scores at its temperature and threshold; None where there are none."""
    truth, scores = decisions.truth, decisions.scores(temperature)
    if not truth.size:
        return None
    roc: Points = ()
    recall: Points = ()
    if truth.any() and not truth.all():
        alarms, hits, _ = roc_curve(truth, scores)
        roc = _thin(alarms, hits)
    if truth.any():
        precision, found, _ = precision_recall_curve(truth, scores)
        recall = _thin(found, precision)
    return Judgement(
        temperature,
        reliability(truth, decisions.scores()),
        reliability(truth, scores),
        at_threshold(decisions, temperature, threshold, level),
        tuple(at_threshold(decisions, temperature, x, level) for x in sorted({*SWEEP, threshold})),
        roc,
        recall,
    )


def reliability(truth: np.ndarray, scores: np.ndarray) -> Reliability:
    """Compare scores [n] in [0, 1] with the truth [n] bool; n >= 1."""
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    counts, score_sums, hits = (
        np.bincount(bins, weights, BINS) for weights in (np.ones(len(bins)), scores, truth)
    )
    filled = counts > 0
    means, shares, sizes = score_sums[filled] / counts[filled], hits[filled] / counts[filled], counts[filled]
    error = float((np.abs(means - shares) * sizes).sum() / len(scores))
    rows = zip(means.tolist(), shares.tolist(), sizes.astype(int).tolist(), strict=True)
    return Reliability(error, float(brier_score_loss(truth, scores, pos_label=True)), tuple(rows))


def at_threshold(decisions: Decisions, temperature: float, threshold: float, level: float) -> AtThreshold:
    """Count what a threshold flags."""
    flagged, truth = decisions.scores(temperature) >= threshold, decisions.truth
    found, alarms = int((flagged & truth).sum()), int((flagged & ~truth).sum())
    rates = (rate_of(flagged[x], decisions.item[x], level) if x.any() else None for x in (truth, ~truth))
    found_rate, alarm_rate = rates
    return AtThreshold(
        threshold=threshold,
        found=found,
        missed=int(truth.sum()) - found,
        false_alarms=alarms,
        passed=int((~truth).sum()) - alarms,
        found_rate=found_rate,
        false_alarm_rate=alarm_rate,
        precision=found / (found + alarms) if found + alarms else None,
    )


def _thin(x: Iterable[float], y: Iterable[float]) -> Points:
    """Points of a curve, _POINTS at most, its ends among them."""
    points = list(zip(map(float, x), map(float, y), strict=True))
    chosen = np.unique(np.linspace(0, len(points) - 1, _POINTS).round().astype(int))
    return tuple(points[i] for i in chosen)
