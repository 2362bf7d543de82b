"""An evaluation and a calibration as text, and the tables that the page shows too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from dgm4.metrics import Interval
from engine.scores import Rate
from export.evaluation.agreement import shown_box, shown_types
from export.evaluation.calibrate import Calibrated, Outcome
from export.evaluation.curves import AtThreshold
from export.evaluation.evaluate import Comparison, Evaluation
from export.evaluation.gate import GATED, GATES, Failures
from export.output import Rows, align, printable

# The terms of the report, a line each. "At 0.5" is the benchmark's own threshold, whatever is in use.
TERMS = {
    "AUC": "chance that a manipulated pair scores above one that is not; 50 is guessing",
    "EER": "error rate at the threshold that misses as many pairs as it flags falsely; lower is better",
    "ACC": "pairs with the right verdict at 0.5",
    "mAP": "mean over the types of AP, the area under the precision-recall curve",
    "OP": "overall precision: of all types flagged at 0.5, those that are right",
    "OR": "overall recall: of all types that are there, those flagged at 0.5",
    "OF1": "harmonic mean of OP and OR",
    "CP": "class precision: mean over the types of the precision at 0.5",
    "CR": "class recall: mean over the types of the recall at 0.5",
    "CF1": "harmonic mean of CP and CR",
    "IoUmean": "mean overlap (intersection over union) of predicted and true box; 1 where both say no box",
    "IoU50": "pairs with an overlap above 0.50",
    "IoU75": "pairs with an overlap above 0.75",
    "IoU95": "pairs with an overlap above 0.95",
    "text_ACC": "tokens of the caption decided right at 0.5",
    "text_P": "of the tokens flagged at 0.5, those that are manipulated",
    "text_R": "of the manipulated tokens, those flagged at 0.5",
    "text_F1": "harmonic mean of text_P and text_R",
}
MORE_TERMS = {
    "false alarms": "what is flagged though it is not manipulated",
    "found": "what is flagged and is manipulated (recall)",
    "precision": "of what is flagged, the share that is manipulated",
    "AP": "of one type, the area under its precision-recall curve; P, R, F1: precision, recall, F1",
    "ECE": "expected calibration error: mean distance of a score from the share that is manipulated at it",
    "Brier": "mean squared distance of score and truth; lower is better",
}
_TYPE_SCORES = ("AUC", "AP", "P", "R", "F1")
_HEADS = ("metric", "bundle", "interval", "float32", "change", "interval")
_AGREEMENT = {
    "verdict": "pairs with the same verdict",
    "types": "types decided alike",
    "all_types": "pairs with all four types alike",
    "tokens": "tokens decided alike",
    "no_box": "pairs alike in having a box",
    "box_iou": "mean IoU of the two boxes",
    "box_iou_min": "smallest IoU of the two boxes",
    "score_change": "largest change of a score",
}


def write_table(evaluation: Evaluation, failures: Failures) -> str:
    """Return the evaluation as lines of text, rates in percent; `failures` as of `find_failures`."""
    lines = [*head(evaluation), "", *align(metric_rows(evaluation)), "", *align(type_rows(evaluation))]
    lines += ["", "decisions at the thresholds in use", *align(decision_rows(evaluation))]
    lines += ["", "scores as probabilities", *align(reliability_rows(evaluation))]
    verdict = evaluation.decisions["manipulated"]
    lines += ["", "the verdict at other thresholds", *align(sweep_rows(verdict.sweep, evaluation.level))]
    compared = evaluation.comparison
    if compared is not None:
        lines += ["", *align([(text, value) for text, value in agreement_rows(compared)], left=1)]
        lines += ["", f"largest disagreements, bundle / float32{'' if compared.worst else ': none'}"]
        lines += align(_worst_rows(compared), left=5) if compared.worst else []
    if failures is not None:
        lines += ["", *gate_lines(evaluation, failures)]
    lines += ["", "terms", *align(list({**TERMS, **MORE_TERMS}.items()), left=2)]
    return "\n".join(lines) + "\n"


def write_calibration(result: Calibrated) -> str:
    """Return a calibration as lines of text, rates in percent."""
    model, record = result.model, result.calibration
    lines = [
        f"{model['name']} {model['size']} {model['precision']}, {model['backend']} on {model['device']}: "
        f"fitted on {record.fitted} pairs of {record.split} in {record.source} for "
        f"{100 * record.false_alarms:g} % false alarms, checked on {record.checked} others",
        "",
        *align(_outcome_rows(result)),
        "",
        *(f"note: {note}" for note in result.notes),
    ]
    if result.problems:
        lines.append(_left_out(result.problems))
    return "\n".join([*lines, f"wrote {result.out}"]) + "\n"


def _outcome_rows(result: Calibrated) -> Rows:
    level = f"{100 * result.calibration.level:g} %"
    rows: Rows = [
        ("decision", "temperature", "threshold", "was", "false alarms", "rate", level, "found", "ECE", "was")
    ]
    return rows + [(name, *_outcome_cells(outcome)) for name, outcome in result.outcomes.items()]


def _outcome_cells(outcome: Outcome) -> tuple[str, ...]:
    reached = outcome.reached
    errors = (outcome.calibrated, outcome.raw)
    return (
        f"{outcome.temperature:.3f}",
        f"{outcome.threshold:.4f}",
        f"{outcome.before:.4f}",
        f"{reached.false_alarms} of {reached.false_alarms + reached.passed}",
        *_rate(reached.false_alarm_rate),
        _rate(reached.found_rate)[0],
        *("-" if error is None else percent(error.ece) for error in errors),
    )


def head(evaluation: Evaluation) -> Iterator[str]:
    """What was evaluated, on what, how fast, and what to know about it."""
    model = evaluation.model
    if evaluation.weights_warning is not None:
        yield f"warning: {evaluation.weights_warning}"
    yield (
        f"{model['name']} {model['size']} {model['precision']}, {model['backend']} on {model['device']}: "
        f"{evaluation.pairs} pairs of {evaluation.split} in {evaluation.data}"
    )
    if evaluation.comparison is not None:
        yield f"reference: float32 torch, {evaluation.comparison.source}"
    yield from (f"note: {note}" for note in evaluation.notes)
    if evaluation.problems:
        yield _left_out(evaluation.problems)
    yield "seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in evaluation.seconds.items())


def _left_out(problems: dict[str, int]) -> str:
    return "left out: " + ", ".join(f"{kind} {count}" for kind, count in problems.items())


def metric_rows(evaluation: Evaluation) -> Rows:
    """Metrics in percent with intervals, and where there is a reference its own and the change."""
    width = 3 if evaluation.comparison is None else 6
    name = f"{100 * evaluation.level:g} %"
    heads = [head if head != "interval" else name for head in _HEADS]
    rows = [tuple(heads[:width])]
    for key, value in evaluation.scores.metrics.items():
        row = [key, percent(value), _interval(evaluation.scores.intervals[key])]
        if evaluation.comparison is not None:
            change = evaluation.comparison.changes[key]
            row += [percent(evaluation.comparison.scores.metrics[key]), percent(change.value, "+")]
            row.append(_interval((change.low, change.high), "+"))
        rows.append(tuple(row))
    return rows


def type_rows(evaluation: Evaluation) -> Rows:
    """Metrics of each type, beside float32's in brackets."""
    rows: Rows = [("type", "pairs", *_TYPE_SCORES)]
    theirs = None if evaluation.comparison is None else evaluation.comparison.scores.types
    for name, scores in evaluation.scores.types.items():
        cells = [percent(scores[key]) for key in _TYPE_SCORES]
        if theirs is not None:
            cells = [
                f"{cell} ({percent(theirs[name][key])})"
                for cell, key in zip(cells, _TYPE_SCORES, strict=True)
            ]
        rows.append((name, f"{scores['positives']:g}", *cells))
    return rows


def decision_rows(evaluation: Evaluation) -> Rows:
    """What the thresholds in use make of the pairs, the types and the words."""
    rows: Rows = [
        ("decision", "threshold", "found", "missed", "false alarms", "passed", *_rate_heads(evaluation.level))
    ]
    for name, judgement in evaluation.decisions.items():
        x = judgement.in_use
        counts = map(str, (x.found, x.missed, x.false_alarms, x.passed))
        rows.append((name, f"{x.threshold:.4g}", *counts, *_rate_cells(x)))
    return rows


def reliability_rows(evaluation: Evaluation) -> Rows:
    """How far scores are probabilities, before and after calibration."""
    rows: Rows = [("decision", "temperature", "ECE", "uncalibrated", "Brier", "uncalibrated")]
    for name, judgement in evaluation.decisions.items():
        pairs = (judgement.calibrated.ece, judgement.raw.ece, judgement.calibrated.brier, judgement.raw.brier)
        rows.append((name, f"{judgement.temperature:.3f}", *map(percent, pairs)))
    return rows


def sweep_rows(sweep: Sequence[AtThreshold], level: float) -> Rows:
    """False alarms, recall and precision of one decision at several thresholds."""
    rows: Rows = [("threshold", *_rate_heads(level))]
    return rows + [(f"{x.threshold:.4g}", *_rate_cells(x)) for x in sweep]


def _rate_heads(level: float) -> tuple[str, ...]:
    name = f"{100 * level:g} %"
    return "false alarms %", name, "found %", name, "precision %"


def _rate_cells(x: AtThreshold) -> tuple[str, ...]:
    precision = "-" if x.precision is None else percent(x.precision)
    return *_rate(x.false_alarm_rate), *_rate(x.found_rate), precision


def _rate(rate: Rate | None) -> tuple[str, str]:
    return ("-", "-") if rate is None else (percent(rate.value), _interval((rate.low, rate.high)))


def agreement_rows(compared: Comparison) -> Rows:
    """Shares of equal decisions, in percent."""
    values = compared.agreement.to_dict()
    return [(text, f"{percent(values[name])} %") for name, text in _AGREEMENT.items()]


def _worst_rows(compared: Comparison) -> Rows:
    rows: Rows = [("id", "image", "differs in", "score", "types", "IoU of boxes")]
    for case in compared.worst:
        pair = case.ours, case.theirs
        scores = " / ".join(f"{answer.score:.3f}" for answer in pair)
        types = " / ".join("&".join(shown_types(answer)) or "none" for answer in pair)
        names = (printable(case.sample.id), printable(case.sample.image), ", ".join(case.changes))
        iou = f"{1 - case.parts['box']:.3f}" if all(map(shown_box, pair)) else "-"
        rows.append((*names, scores, types, iou))
    return rows


def gate_lines(evaluation: Evaluation, failures: Failures) -> list[str]:
    """Whether the gate passes the bundle, what it asks for, and what failed."""
    precision = evaluation.model["precision"]
    bounds = []
    if evaluation.comparison is not None:
        bounds.append(f"{', '.join(GATED)} within {100 * GATES[precision]:g} % points of float32")
    if (calibration := evaluation.calibration) is not None:
        bounds.append(f"false alarms as calibrated for {100 * calibration.false_alarms:g} %")
    bound = "; ".join(bounds)
    if not failures:
        return [f"gate of {precision}: passed ({bound})"]
    return [f"gate of {precision}: failed ({bound})", *(f"  {failure}" for failure in failures)]


def percent(value: float, sign: str = "") -> str:
    """A fraction in percent, "-" for NaN."""
    # + 0.0: a change that rounds to nothing has no sign of its own.
    return "-" if math.isnan(value) else f"{round(100 * value, 2) + 0.0:{sign}.2f}"


def _interval(bounds: Interval, sign: str = "") -> str:
    return "-" if math.isnan(bounds[0]) else " to ".join(percent(value, sign) for value in bounds)
