"""An evaluation as one self-contained HTML page: no script, no outside address, all text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup
from PIL import Image

from engine.cards.markup import embed, environment
from engine.errors import InputError
from engine.inputs.preprocess import ImageOptions, decode_image, make_thumbnail
from export.evaluation.agreement import Case, shown_box
from export.evaluation.curves import Judgement, Reliability
from export.evaluation.evaluate import Evaluation
from export.evaluation.gate import Failures
from export.evaluation.report import (
    MORE_TERMS,
    TERMS,
    agreement_rows,
    decision_rows,
    gate_lines,
    head,
    metric_rows,
    reliability_rows,
    sweep_rows,
    type_rows,
)
from export.output import Rows

_PICTURE = 520  # longer side in pixels


class _Line(NamedTuple):
    """A line of `points` (x, y) in [0, 1], or `dots` (x, y, radius), and the class that styles it."""

    style: str
    points: Sequence[tuple[float, float]] = ()
    dots: Sequence[tuple[float, float, float]] = ()


class _Plot(NamedTuple):
    """A plot of values in [0, 1]; `mark` is the point at the threshold in use."""

    title: str
    x: str
    y: str
    lines: tuple[_Line, ...]
    mark: tuple[float, float] | None = None


def write_page(evaluation: Evaluation, failures: Failures) -> str:
    """Return the evaluation as a whole HTML document, its curves and the worst disagreements drawn."""
    compared = evaluation.comparison
    return (
        environment("export.evaluation")
        .get_template("page.html")
        .render(
            head=list(head(evaluation)),
            gate=None if failures is None else gate_lines(evaluation, failures),
            passed=not failures,
            metrics=_with_meaning(metric_rows(evaluation)),
            types=type_rows(evaluation),
            decisions=decision_rows(evaluation),
            reliability=reliability_rows(evaluation),
            judgements={
                name: (list(_plots(judgement)), sweep_rows(judgement.sweep, evaluation.level))
                for name, judgement in evaluation.decisions.items()
            },
            agreement=None if compared is None else [("", ""), *agreement_rows(compared)],
            cases=[] if compared is None else [_case(case) for case in compared.worst],
            terms=MORE_TERMS,
        )
    )


def _with_meaning(rows: Rows) -> Rows:
    first, *rest = rows
    return [(*first, "what it is"), *((*row, TERMS[row[0]]) for row in rest)]


def _plots(judgement: Judgement) -> Iterator[_Plot]:
    """The ROC curve, the precision-recall curve and the reliability diagram of a decision."""
    used, diagonal = judgement.in_use, _Line("guess", ((0, 0), (1, 1)))
    found = used.found_rate.value if used.found_rate else None
    alarms = used.false_alarm_rate.value if used.false_alarm_rate else None
    roc = None if found is None or alarms is None else (alarms, found)
    recall = None if found is None or used.precision is None else (found, used.precision)
    yield _Plot("ROC", "false alarms", "found", (diagonal, _Line("curve", judgement.roc)), roc)
    curve = (_Line("curve", judgement.precision_recall),)
    yield _Plot("Precision and recall", "found", "precision", curve, recall)
    lines: tuple[_Line, ...] = (diagonal, _Line("curve", dots=_dots(judgement.calibrated)))
    if judgement.temperature != 1:
        lines = (diagonal, _Line("raw", dots=_dots(judgement.raw)), lines[1])
    yield _Plot("Reliability", "score", "share manipulated", lines)


def _dots(reliability: Reliability) -> list[tuple[float, float, float]]:
    """A dot for each bin, whose area grows with its count."""
    total = sum(count for _, _, count in reliability.bins)
    return [(score, share, 2 + 8 * (count / total) ** 0.5) for score, share, count in reliability.bins]


def _case(case: Case) -> dict[str, Any]:
    """What the template shows of a pair: the image, its boxes, both predictions, and the caption's words."""
    sample, both = case.sample, (case.ours, case.theirs)
    boxes = {"true": sample.box, "float32": shown_box(case.theirs), "bundle": shown_box(case.ours)}
    rows: Rows = [("", "bundle", "float32", "truth")]
    scores = [f"{answer.score:.3f}" for answer in both]
    rows.append(("score", *scores, "manipulated" if sample.manipulated else "not manipulated"))
    for name in case.ours.types:
        values = (f"{answer.types[name]:.3f}" for answer in both)
        rows.append((name.replace("_", " "), *values, "yes" if name in sample.types else "no"))
    rows.append(("box", *(_pixels(boxes[name]) for name in ("bundle", "float32", "true"))))
    if boxes["bundle"] and boxes["float32"]:
        rows.append(("IoU of the two", f"{1 - case.parts['box']:.3f}", "", ""))
    return {
        "id": sample.id,
        "image": sample.image,
        "changes": ", ".join(case.changes),
        "picture": _picture(case),
        "size": case.size,
        "boxes": {name: box for name, box in boxes.items() if box is not None},
        "rows": rows,
        "words": list(_words(case)),
    }


def _pixels(box: Iterable[float] | None) -> str:
    return "none" if box is None else ", ".join(f"{value:.0f}" for value in box)


def _picture(case: Case) -> str:
    """The image as it is stored, which is how boxes are annotated; else why it cannot be shown."""
    try:
        decoded = decode_image(case.sample.picture, options=ImageOptions(apply_orientation=False))
    except InputError as error:
        return str(error)
    scale = _PICTURE / max(decoded.rgb.size)
    width, height = (max(1, round(side * scale)) for side in decoded.rgb.size)
    photo = make_thumbnail(decoded.rgb, _PICTURE).resize((width, height), Image.Resampling.BICUBIC)
    return Markup(embed(photo))  # noqa: S704 (base64 of our own JPEG)


def _words(case: Case) -> Iterator[tuple[str, str, str]]:
    """The caption in pieces: text, what marks it (true, bundle, float32), and the scores."""
    position = 0
    for true, ours, theirs in zip(case.fake_words, case.ours.words, case.theirs.words, strict=True):
        yield case.caption[position : ours.start], "", ""
        marks = {"true": true, "bundle": ours.manipulated, "float32": theirs.manipulated}
        shown = " ".join(name for name, marked in marks.items() if marked)
        yield ours.text, shown or "none", f"bundle {ours.score:.1%}, float32 {theirs.score:.1%}"
        position = ours.end
    yield case.caption[position:], "", ""
