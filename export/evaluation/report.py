"""An evaluation as text and as one self-contained HTML page: no script, no outside address, all escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from PIL import Image

from dgm4.metrics import Interval
from engine.drawing import INK, MANIPULATED, TRACK, WHITE, Color, mix
from engine.errors import InputError
from engine.inputs.preprocess import ImageOptions, decode_image, make_thumbnail
from engine.markup import css, embed, escape
from engine.render import BOX, EMPTY, PRISTINE, draw_box
from export.evaluation.agreement import Case
from export.evaluation.evaluate import Comparison, Evaluation
from export.evaluation.gate import GATED, GATES, GateFailure
from export.output import Rows, align

_REFERENCE_BOX: Color = (255, 160, 0)
_TRUE_BOX: Color = (64, 200, 80)
_PICTURE = 520  # longer side in pixels
_TYPE_SCORES = ("AUC", "AP", "P", "R", "F1")
_CELL = "padding:3px 14px 3px 0;text-align:right"
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


def write_table(evaluation: Evaluation, failures: Sequence[GateFailure] | None) -> str:
    """Return the evaluation as lines of text, metrics in percent; `failures` as of `check_gate`, or None."""
    lines = [*_head(evaluation), "", *align(_metric_rows(evaluation)), "", *align(_type_rows(evaluation))]
    compared = evaluation.comparison
    if compared is not None:
        lines += ["", *align([(text, value) for text, value in _agreement_rows(compared)], left=1)]
        if compared.worst:
            lines += ["", "largest disagreements, bundle / float32", *align(_worst_rows(compared), left=4)]
    if failures is not None:
        lines += ["", *_gate_lines(evaluation, failures)]
    return "\n".join(lines) + "\n"


def write_page(evaluation: Evaluation, failures: Sequence[GateFailure] | None) -> str:
    """Return the evaluation as a whole HTML document, the worst disagreements drawn."""
    compared = evaluation.comparison
    parts = [
        "<h1>Evaluation</h1>",
        *(f"<p>{escape(line)}</p>" for line in _head(evaluation)),
        _gate_part(evaluation, failures),
        "<h2>Metrics</h2>",
        _html_table(_metric_rows(evaluation)),
        "<h2>Types</h2>",
        _html_table(_type_rows(evaluation)),
    ]
    if compared is not None:
        parts += ["<h2>Agreement with float32</h2>", _html_table([("", ""), *_agreement_rows(compared)])]
        parts += ["<h2>Largest disagreements</h2>", _legend(), *map(_case_part, compared.worst)]
    if compared is not None and not compared.worst:
        parts.append("<p>None: all predictions are the same.</p>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>dgm4 evaluate</title></head>\n'
        f'<body style="font-family:system-ui,sans-serif;color:{css(INK)};max-width:1060px;margin:auto">\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _head(evaluation: Evaluation) -> Iterator[str]:
    """What was evaluated, on what, how fast, and what to know about it."""
    model = evaluation.model
    yield (
        f"{model['name']} {model['size']} {model['precision']}, {model['backend']} on {model['device']}: "
        f"{evaluation.pairs} pairs of {evaluation.split} in {evaluation.data}"
    )
    if evaluation.comparison is not None:
        yield f"reference: float32 torch, {evaluation.comparison.source}"
    if evaluation.note:
        yield f"note: {evaluation.note}"
    if not evaluation.trained:
        yield "note: the weights are untrained; the metrics mean nothing"
    if evaluation.problems:
        yield "left out: " + ", ".join(f"{kind} {count}" for kind, count in evaluation.problems.items())
    yield "seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in evaluation.seconds.items())


def _metric_rows(evaluation: Evaluation) -> Rows:
    """Metrics in percent with intervals, and where there is a reference its own and the change."""
    width = 3 if evaluation.comparison is None else 6
    name = f"{100 * evaluation.level:g} %"
    heads = [head if head != "interval" else name for head in _HEADS]
    rows = [tuple(heads[:width])]
    for key, value in evaluation.scores.metrics.items():
        row = [key, _percent(value), _interval(evaluation.scores.intervals[key])]
        if evaluation.comparison is not None:
            change = evaluation.comparison.changes[key]
            row += [_percent(evaluation.comparison.scores.metrics[key]), _percent(change.value, "+")]
            row.append(_interval((change.low, change.high), "+"))
        rows.append(tuple(row))
    return rows


def _type_rows(evaluation: Evaluation) -> Rows:
    """Metrics of each type, beside float32's in brackets."""
    rows: Rows = [("type", "pairs", *_TYPE_SCORES)]
    theirs = None if evaluation.comparison is None else evaluation.comparison.scores.types
    for name, scores in evaluation.scores.types.items():
        cells = [_percent(scores[key]) for key in _TYPE_SCORES]
        if theirs is not None:
            cells = [
                f"{cell} ({_percent(theirs[name][key])})"
                for cell, key in zip(cells, _TYPE_SCORES, strict=True)
            ]
        rows.append((name, f"{scores['positives']:g}", *cells))
    return rows


def _agreement_rows(compared: Comparison) -> Rows:
    values = compared.agreement.to_dict()
    return [(text, f"{_percent(values[name])} %") for name, text in _AGREEMENT.items()]


def _worst_rows(compared: Comparison) -> Rows:
    rows: Rows = [("id", "image", "score", "types", "IoU of boxes")]
    for case in compared.worst:
        pair = case.ours, case.theirs
        scores = " / ".join(f"{answer.score:.3f}" for answer in pair)
        types = " / ".join("&".join(answer.detected) or "none" for answer in pair)
        rows.append(
            (_line(case.sample.id), _line(case.sample.image), scores, types, f"{1 - case.parts['box']:.3f}")
        )
    return rows


def _gate_lines(evaluation: Evaluation, failures: Sequence[GateFailure]) -> list[str]:
    precision = evaluation.model["precision"]
    bound = f"{', '.join(GATED)} within {100 * GATES[precision]:g} % points of float32"
    if not failures:
        return [f"gate of {precision}: passed ({bound})"]
    return [f"gate of {precision}: failed ({bound})", *(f"  {failure}" for failure in failures)]


def _percent(value: float, sign: str = "") -> str:
    # + 0.0: a change that rounds to nothing has no sign of its own.
    return "-" if math.isnan(value) else f"{round(100 * value, 2) + 0.0:{sign}.2f}"


def _interval(bounds: Interval, sign: str = "") -> str:
    return "-" if math.isnan(bounds[0]) else " to ".join(_percent(value, sign) for value in bounds)


def _line(text: str) -> str:
    """Text of a user on one line of a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _html_table(rows: Rows) -> str:
    head, *body = rows
    return (
        '<table style="border-collapse:collapse;font-variant-numeric:tabular-nums">'
        + _html_row(head, "th")
        + "".join(_html_row(row, "td") for row in body)
        + "</table>"
    )


def _html_row(cells: Iterable[str], tag: str) -> str:
    first = _CELL.replace("right", "left")
    return (
        f'<tr style="border-bottom:1px solid {css(TRACK)}">'
        + "".join(
            f'<{tag} style="{_CELL if i else first}">{escape(cell)}</{tag}>' for i, cell in enumerate(cells)
        )
        + "</tr>"
    )


def _gate_part(evaluation: Evaluation, failures: Sequence[GateFailure] | None) -> str:
    if failures is None:
        return ""
    color = MANIPULATED if failures else PRISTINE
    lines = "<br>".join(escape(line) for line in _gate_lines(evaluation, failures))
    return f'<p style="color:{css(color)};font-weight:600">{lines}</p>'


def _legend() -> str:
    names = ((_TRUE_BOX, "true box"), (BOX, "bundle"), (_REFERENCE_BOX, "float32"))
    boxes = " ".join(
        f'<span style="border:3px solid {css(color)};padding:0 8px">{name}</span>' for color, name in names
    )
    true, ours, theirs = (_mark("fake", i == 0, i == 1, i == 2) for i in range(3))
    return f"<p>{boxes} Words: {true} in truth, {ours} to the bundle, {theirs} to float32.</p>"


def _case_part(case: Case) -> str:
    """One pair: the image with all boxes, both predictions, and the caption."""
    sample = case.sample
    rows: Rows = [("", "bundle", "float32", "truth")]
    truth = "manipulated" if sample.manipulated else "pristine"
    rows.append(("score", f"{case.ours.score:.3f}", f"{case.theirs.score:.3f}", truth))
    for name in case.ours.types:
        scores = (f"{answer.types[name]:.3f}" for answer in (case.ours, case.theirs))
        rows.append((name.replace("_", " "), *scores, "yes" if name in sample.types else "no"))
    rows.append(("box", *map(_pixels, (case.ours.box, case.theirs.box, sample.box))))
    rows.append(("IoU of the two", f"{1 - case.parts['box']:.3f}", "", ""))
    return (
        f'<div style="border-top:2px solid {css(TRACK)};margin-top:18px;padding-top:12px">'
        f"<h3>{escape(sample.id)} <small>{escape(sample.image)}</small></h3>"
        '<div style="display:flex;flex-wrap:wrap;gap:28px">'
        f'<div style="flex:1 1 320px">{_image(case)}</div><div>{_html_table(rows)}</div></div>'
        f'<p dir="auto" style="line-height:2;overflow-wrap:anywhere">{_caption(case)}</p></div>'
    )


def _pixels(box: Sequence[float] | None) -> str:
    return "none" if box is None else ", ".join(f"{value:.0f}" for value in box)


def _image(case: Case) -> str:
    """The stored image with the true box and both predicted ones, where there are any."""
    try:
        # As stored: the boxes are annotated and predicted without the EXIF orientation.
        decoded = decode_image(case.sample.picture, options=ImageOptions(apply_orientation=False))
        photo = _fit(decoded.rgb)
    except InputError as error:
        return f'<p style="background:{css(EMPTY)};padding:20px">{escape(str(error))}</p>'
    boxes = ((case.sample.box, _TRUE_BOX), (case.theirs.box, _REFERENCE_BOX), (case.ours.box, BOX))
    for box, color in boxes:
        if box is not None:
            draw_box(photo, box, case.size, color)
    return embed(photo)


def _fit(photo: Image.Image) -> Image.Image:
    """Bring the longer side to _PICTURE pixels, so that the boxes' lines are thin beside it."""
    scale = _PICTURE / max(photo.size)
    width, height = (max(1, round(side * scale)) for side in photo.size)
    return make_thumbnail(photo, _PICTURE).resize((width, height), Image.Resampling.BICUBIC)


def _caption(case: Case) -> str:
    """The caption with every word marked that is fake in truth or to either model."""
    parts: list[str] = []
    position = 0
    for true, ours, theirs in zip(case.fake_words, case.ours.words, case.theirs.words, strict=True):
        parts.append(escape(case.caption[position : ours.start]))
        title = f"bundle {ours.score:.1%}, float32 {theirs.score:.1%}"
        parts.append(_mark(ours.text, true, ours.manipulated, theirs.manipulated, title))
        position = ours.end
    return "".join(parts) + escape(case.caption[position:])


def _mark(text: str, true: bool, ours: bool, theirs: bool, title: str = "") -> str:
    """A word: underlined where truly fake, red where the bundle says so, overlined where float32 does."""
    background = css(mix(WHITE, MANIPULATED, 0.4)) if ours else "transparent"
    below = f"3px solid {css(_TRUE_BOX)}" if true else "3px solid transparent"
    above = f"3px solid {css(_REFERENCE_BOX)}" if theirs else "3px solid transparent"
    style = f"color:inherit;padding:1px 2px;background:{background};border-bottom:{below};border-top:{above}"
    return f'<mark title="{escape(title)}" style="{style}">{escape(text)}</mark>'
