"""A prediction for people: a few lines on a terminal."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from export.output import printable

Record = dict[str, Any]

_INDENT = 11  # columns of a line's name
_WIDEST = 100
_FACE = ("face_swap", "face_attribute")


def summary(name: str, record: Record) -> str:
    """Lines on the prediction `record` (`Prediction.to_dict`) for the image `name`.

    Of a pair that is not manipulated only the verdict and the warnings; types, box and words mean nothing
    there. The box is of a face, so it is given where a face type is detected. An image or a caption by itself
    has no verdict.
    """
    verdict = {None: "not answered", True: "manipulated", False: "not manipulated"}[record["manipulated"]]
    lines = [f"{name}: {verdict}"]
    if record["score"] is not None:
        threshold = record["thresholds"].get("manipulated")
        counted = "" if threshold is None else f" (threshold {percent(threshold)})"
        lines += row("score", f"{percent(record['score'])}{counted}")
    if record["box_given"] is not None:
        lines += row("box given", _corners(record["box_given"]))
    if record["manipulated"] is not False:
        types = [f"{kind} {percent(record['types'][kind])}" for kind in record["detected"]]
        lines += row("types", ", ".join(types) or "none reaches its threshold")
        if record["box"] is not None and any(kind in record["detected"] for kind in _FACE):
            lines += row("face", _corners(record["box"]))
        marked = [f"[{w['text']}]" if w["manipulated"] else w["text"] for w in record["words"]]
        if marked:
            lines += row("words", " ".join(marked))
    for warning in record["warnings"]:
        lines += row("warning", warning)
    return "\n".join(map(printable, lines)) + "\n"


def _corners(box: list[float]) -> str:
    x1, y1, x2, y2 = (f"{x:.0f}" for x in box)
    return f"from ({x1}, {y1}) to ({x2}, {y2}), in pixels"


def row(name: str, text: str) -> list[str]:
    """A named line of a summary, filled to the terminal."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    indent = " " * (_INDENT + 4)
    head = f"  {name:<{_INDENT}}  "
    wrapper = textwrap.TextWrapper(width, head, indent, break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(text) or [head.rstrip()]


def percent(share: float) -> str:
    """A score in percent; never 0 or 100, which no network knows."""
    if share > 0.999:
        return "> 99.9 %"
    return "< 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"
