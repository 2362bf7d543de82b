"""The benchmark's metrics of DGM4, and bootstrap intervals for them.

Every metric is a function of per-pair statistics and of a weight for each pair: the metrics of a set are
those of weights 1, and a bootstrap draws other weights instead of running anything again. Conventions, found
to agree with the benchmark's own code: AUC and EER rank by the margin of the two logits; a type counts as
predicted at logit >= 0; of the two logits of a pair or token the larger decides, the first where they are
equal; IoU thresholds are exceeded strictly. Where a set lacks what a metric speaks of:

- AUC and EER are NaN where all pairs are pristine or all manipulated;
- mAP, CP, CR and CF1 are means over the types that occur, NaN where none does;
- OP, OR, OF1, text_P, text_R and text_F1 are 0 where their denominator is;
- the text metrics are NaN where there is no token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from dgm4.config import TYPES
from engine.errors import InputError, NumericalError, quoted

PRISTINE = "orig"
TOKEN_PADDING = -100
TYPE_LOGIT = 0.0
# Below this, in every corner of the predicted box, the network is taken to say that there is no box.
NO_BOX = 1e-4
IOU_THRESHOLDS = (50, 75, 95)
# Weights held at once while bootstrapping: 32 MB in each array of float64.
_CHUNK = 4_000_000

Interval = tuple[float, float]


class LabelledOutputs(NamedTuple):
    """A model's raw outputs for B pairs beside the labels, as `summarise` takes them.

    labels [B] strings, "orig" or types joined by "&"; logits_real_fake [B, 2] (1 = manipulated);
    logits_multicls [B, 4] in the order of TYPES; pred_box and true_box [B, 4] as (cx, cy, w, h) in [0, 1],
    true zeros = no box; logits_tok [B, T, 2] (1 = manipulated); token_labels [B, T]: 1, 0, or -100 = padding.
    """

    labels: np.ndarray
    logits_real_fake: np.ndarray
    logits_multicls: np.ndarray
    pred_box: np.ndarray
    true_box: np.ndarray
    logits_tok: np.ndarray
    token_labels: np.ndarray


def summarise(
    labels: np.ndarray,
    logits_real_fake: np.ndarray,
    logits_multicls: np.ndarray,
    pred_box: np.ndarray,
    true_box: np.ndarray,
    logits_tok: np.ndarray,
    token_labels: np.ndarray,
) -> dict[str, float]:
    """Return the benchmark's metrics, fractions in [0, 1]; the arrays are those of `LabelledOutputs`.

    AUC, EER, ACC of real against manipulated; mAP, OP, OR, OF1, CP, CR, CF1 of the four types; IoUmean and
    the shares of pairs above IoU 0.50, 0.75, 0.95; accuracy, precision, recall and F1 over all tokens.
    Raises InputError for shapes, labels or boxes that cannot be, NumericalError for NaN or infinite logits.
    """
    outputs = LabelledOutputs(
        labels, logits_real_fake, logits_multicls, pred_box, true_box, logits_tok, token_labels
    )
    statistics = _Statistics(outputs)
    return {key: float(value[0]) for key, value in statistics.metrics(statistics.ones()).items()}


def per_type(labels: np.ndarray, logits_multicls: np.ndarray) -> dict[str, dict[str, float]]:
    """Return positives, AUC, AP, P, R and F1 of each type; labels [B], logits [B, 4].

    AUC, AP and R are NaN for a type that does not occur, AUC also for one that all pairs have.
    """
    truth = _read_labels(labels)
    logits = _finite("logits_multicls", logits_multicls, (len(truth), len(TYPES)))
    weights = np.ones((1, len(truth)))
    return {name: _type_scores(truth[:, k], logits[:, k], weights) for k, name in enumerate(TYPES)}


def bootstrap(
    outputs: LabelledOutputs, *, repeats: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Return (low, high) of every metric: percentile bootstrap over pairs, central `level`.

    Errors as for `summarise`; InputError also for repeats < 1 or a level outside (0, 1). Resamples in which
    a metric is NaN are left out of its interval. Source: Efron, Annals of Statistics 7 (1979).
    """
    statistics = _Statistics(outputs)
    return _intervals(statistics.metrics, statistics.count, repeats, level, seed)


def bootstrap_difference(
    outputs: LabelledOutputs,
    reference: LabelledOutputs,
    *,
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return (low, high) of metric(outputs) - metric(reference), both models on the same resampled pairs.

    Errors as for `bootstrap`; InputError also where the two do not hold the same truth.
    """
    for name in ("labels", "true_box", "token_labels"):
        if not np.array_equal(getattr(outputs, name), getattr(reference, name)):
            raise InputError(f"expected two models on the same pairs, got different {name}")
    ours, theirs = _Statistics(outputs), _Statistics(reference)

    def difference(weights: np.ndarray) -> dict[str, np.ndarray]:
        first, second = ours.metrics(weights), theirs.metrics(weights)
        return {key: first[key] - second[key] for key in first}

    return _intervals(difference, ours.count, repeats, level, seed)


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the IoU [B] of boxes [B, 4] given as (cx, cy, w, h); 0 where the union has no area."""
    a, b = _corners(first), _corners(second)
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    shared = np.clip(sides, 0.0, None).prod(axis=1)
    union = (a[:, 2:] - a[:, :2]).prod(axis=1) + (b[:, 2:] - b[:, :2]).prod(axis=1) - shared
    return _ratio(shared, union)


def says_no_box(box: np.ndarray) -> np.ndarray:
    """Return [B] bool: all four corner values (x1, y1, x2, y2) of boxes [B, 4] are below 1e-4."""
    return _corners(box).max(axis=1) < NO_BOX


def benchmark_iou(pred_box: np.ndarray, true_box: np.ndarray) -> np.ndarray:
    """Return the IoU [B] as the benchmark counts it: 1 or 0 without a true box, by `says_no_box`."""
    absent = (np.asarray(true_box) == 0).all(axis=1)
    return np.where(absent, says_no_box(pred_box).astype(np.float64), box_iou(pred_box, true_box))


class _Statistics:
    """Statistics of each pair, so that they are sums over pairs or over sorted pairs."""

    def __init__(self, outputs: LabelledOutputs):
        types = _read_labels(outputs.labels)
        count = self.count = len(types)
        margin = np.diff(_finite("logits_real_fake", outputs.logits_real_fake, (count, 2)))[:, 0]
        logits = _finite("logits_multicls", outputs.logits_multicls, (count, len(TYPES)))
        fake = types.sum(axis=1) > 0
        self.verdict = _Ranking(margin, fake)
        self.types = [_Ranking(logits[:, k], types[:, k]) for k in range(len(TYPES))]
        predicted = logits >= TYPE_LOGIT
        # Columns: correct | IoU, three shares | hits, predicted and true types, four each | tokens.
        self.columns = np.column_stack(
            [
                (margin > 0) == fake,
                _box_columns(outputs, count),
                predicted & types,
                predicted,
                types,
                _token_columns(outputs, count),
            ]
        )

    def ones(self) -> np.ndarray:
        """Weights [1, B] that take every pair once."""
        return np.ones((1, self.count))

    def metrics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return each metric as [R], for weights [R, B] whose rows sum to B."""
        sums = weights @ self.columns
        correct, iou, hits, predicted, true, tokens = np.split(sums, [1, 5, 9, 13, 17], axis=1)
        verdict = self.verdict.curve(weights)
        average = np.stack([ranking.curve(weights).average_precision() for ranking in self.types], axis=1)
        boxes = dict(zip(("IoUmean", *(f"IoU{t}" for t in IOU_THRESHOLDS)), iou.T / self.count, strict=True))
        return {
            "AUC": verdict.area(),
            "EER": verdict.equal_error(),
            "ACC": correct[:, 0] / self.count,
            "mAP": _mean_where(average, true > 0),
            **_type_metrics(hits, predicted, true),
            **boxes,
            **_token_metrics(tokens),
        }


class _Ranking:
    """Pairs in falling order of a score, equal scores grouped."""

    def __init__(self, score: np.ndarray, positive: np.ndarray):
        self.order = np.argsort(-score, kind="stable")
        self.positive = positive[self.order].astype(np.float64)
        falling = score[self.order]
        self.last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))

    def curve(self, weights: np.ndarray) -> _Curve:
        """Count true and false positives below each threshold, for weights [R, B]."""
        taken = weights[:, self.order]
        hits = np.cumsum(taken * self.positive, axis=1)[:, self.last]
        return _Curve(hits, np.cumsum(taken, axis=1)[:, self.last] - hits)


class _Curve(NamedTuple):
    """True and false positives [R, thresholds], as the threshold falls."""

    hits: np.ndarray
    alarms: np.ndarray

    def rates(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (false positive rate, true positive rate), starting at 0; NaN where a class is missing."""
        alarms, hits = (np.pad(x, ((0, 0), (1, 0))) for x in (self.alarms, self.hits))
        return _ratio(alarms, alarms[:, -1:], np.nan), _ratio(hits, hits[:, -1:], np.nan)

    def area(self) -> np.ndarray:
        """Return the area under the ROC curve [R], by trapezia."""
        false_rate, true_rate = self.rates()
        return (np.diff(false_rate, axis=1) * (true_rate[:, 1:] + true_rate[:, :-1]) / 2).sum(axis=1)

    def equal_error(self) -> np.ndarray:
        """Return the false positive rate [R] where the ROC curve meets 1 - rate.

        The benchmark looks for this root of the interpolated curve with brentq. The curve only rises, so it
        lies on the segment where the sum of both rates passes 1.
        """
        false_rate, true_rate = self.rates()
        total = false_rate + true_rate
        end = np.argmax(total >= 1, axis=1)[:, None].clip(1)
        below, above = (np.take_along_axis(total, i, 1) for i in (end - 1, end))
        left, right = (np.take_along_axis(false_rate, i, 1) for i in (end - 1, end))
        return (left + _ratio(1 - below, above - below, np.nan) * (right - left))[:, 0]

    def average_precision(self) -> np.ndarray:
        """Return the mean [R] over positives of the precision at their threshold; NaN without positives."""
        precision = _ratio(self.hits, self.hits + self.alarms)
        gained = np.diff(self.hits, axis=1, prepend=0.0)
        return _ratio((precision * gained).sum(axis=1), self.hits[:, -1], np.nan)


def _read_labels(labels: np.ndarray) -> np.ndarray:
    """Return [B, 4] bool in the order of TYPES; raises InputError for an empty list or an unknown label."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not labels.size:
        raise InputError(f"labels: expected one for each of at least one pair, got the shape {labels.shape}")
    names, index = np.unique(labels.astype(str), return_inverse=True)
    return np.array([_read_label(str(name)) for name in names])[index]


def _read_label(label: str) -> list[bool]:
    parts = [] if label == PRISTINE else label.split("&")
    unknown = [part for part in parts if part not in TYPES]
    if unknown:
        raise InputError(
            f'labels: expected "{PRISTINE}" or {", ".join(TYPES)} joined by "&", got {quoted(label)}'
        )
    return [name in parts for name in TYPES]


def _shaped(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(array)
    if array.shape != shape:
        raise InputError(f"{name}: expected the shape {shape}, got {array.shape}")
    return array


def _finite(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return an output of the network as float64; raises InputError or NumericalError."""
    return _check_finite(name, _shaped(name, array, shape).astype(np.float64))


def _check_finite(name: str, array: np.ndarray) -> np.ndarray:
    bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if bad.any():
        raise NumericalError(
            f"{name}: NaN or infinite in {bad.sum()} of {len(array)} rows, first in row {bad.argmax()}"
        )
    return array


def _box_columns(outputs: LabelledOutputs, count: int) -> np.ndarray:
    """Return IoU and the thresholds passed, [B, 4]."""
    predicted = _finite("pred_box", outputs.pred_box, (count, 4))
    true = _shaped("true_box", outputs.true_box, (count, 4)).astype(np.float64)
    if not np.isfinite(true).all() or (true[:, 2:] < 0).any():
        raise InputError("true_box: expected finite (cx, cy, w, h) with w and h >= 0, zeros for no box")
    iou = benchmark_iou(predicted, true)
    return np.column_stack([iou, *(iou > percent / 100 for percent in IOU_THRESHOLDS)])


def _token_columns(outputs: LabelledOutputs, count: int) -> np.ndarray:
    """Return hits, predicted, true, correct and all tokens of each pair, [B, 5]."""
    labels = np.asarray(outputs.token_labels)
    width = labels.shape[1] if labels.ndim == 2 else 0
    labels = _shaped("token_labels", labels, (count, width))
    if not np.isin(labels, (0, 1, TOKEN_PADDING)).all():
        raise InputError(f"token_labels: expected 0, 1 and {TOKEN_PADDING} for padding, got other values")
    valid = labels != TOKEN_PADDING
    logits = _shaped("logits_tok", outputs.logits_tok, (count, width, 2))
    # What the network says of padding is nobody's concern, NaN included.
    _check_finite("logits_tok", np.where(valid[..., None], logits, 0))
    predicted, true = valid & (logits[..., 1] > logits[..., 0]), labels == 1
    columns = (predicted & true, predicted, true, valid & (predicted == true), valid)
    return np.column_stack([column.sum(axis=1) for column in columns])


def _type_metrics(hits: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> dict[str, np.ndarray]:
    """Return overall and per-class precision, recall and F1 [R], from counts [R, 4]."""
    overall = [x.sum(axis=1) for x in (hits, predicted, true)]
    precision, recall = _ratio(overall[0], overall[1]), _ratio(overall[0], overall[2])
    occurs = true > 0
    by_class = [_mean_where(_ratio(hits, x), occurs) for x in (predicted, true)]
    return {
        "OP": precision,
        "OR": recall,
        "OF1": _harmonic(precision, recall),
        "CP": by_class[0],
        "CR": by_class[1],
        "CF1": _harmonic(*by_class),
    }


def _token_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    hits, predicted, true, correct, count = sums.T
    missing = np.where(count > 0, 0.0, np.nan)
    precision, recall = _ratio(hits, predicted) + missing, _ratio(hits, true) + missing
    return {
        "text_ACC": _ratio(correct, count, np.nan),
        "text_P": precision,
        "text_R": recall,
        "text_F1": _harmonic(precision, recall),
    }


def _type_scores(positive: np.ndarray, logit: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    curve = _Ranking(logit, positive).curve(weights)
    predicted = logit >= TYPE_LOGIT
    hits = np.array([(predicted & positive).sum()])
    precision, recall = _ratio(hits, predicted.sum()), _ratio(hits, positive.sum(), np.nan)
    scores = {
        "AUC": curve.area(),
        "AP": curve.average_precision(),
        "P": precision,
        "R": recall,
        "F1": _harmonic(precision, recall),
    }
    return {"positives": int(positive.sum()), **{key: float(value[0]) for key, value in scores.items()}}


def _corners(box: np.ndarray) -> np.ndarray:
    """Turn (cx, cy, w, h) [B, 4] into (x1, y1, x2, y2), in float64."""
    box = np.asarray(box, dtype=np.float64)
    return np.concatenate([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], axis=1)


def _ratio(over: np.ndarray, under: np.ndarray, otherwise: float = 0.0) -> np.ndarray:
    """Divide, with `otherwise` where the denominator is 0."""
    over, under = np.broadcast_arrays(over, under)
    return np.divide(over, under, out=np.full(over.shape, otherwise), where=under != 0)


def _harmonic(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    return _ratio(2 * precision * recall, precision + recall)


def _mean_where(values: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Mean of each row over the places taken, NaN where there are none."""
    return _ratio(np.where(taken, values, 0.0).sum(axis=1), taken.sum(axis=1), np.nan)


def _resamples(count: int, repeats: int, seed: int) -> Iterator[np.ndarray]:
    """Draw how often each of `count` pairs is taken, as weights [chunk, count]; fixed by the seed."""
    random = np.random.default_rng(seed)
    step = max(1, _CHUNK // count)
    for start in range(0, repeats, step):
        rows = min(step, repeats - start)
        drawn = random.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def _intervals(
    compute: Callable[[np.ndarray], dict[str, np.ndarray]], count: int, repeats: int, level: float, seed: int
) -> dict[str, Interval]:
    if repeats < 1 or not 0 < level < 1:
        raise InputError(f"expected repeats >= 1 and a level in (0, 1), got {repeats} and {level}")
    drawn = [compute(weights) for weights in _resamples(count, repeats, seed)]
    return {key: _interval(np.concatenate([part[key] for part in drawn]), level) for key in drawn[0]}


def _interval(values: np.ndarray, level: float) -> Interval:
    defined = values[~np.isnan(values)]
    if not defined.size:
        return float("nan"), float("nan")
    low, high = np.quantile(defined, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
