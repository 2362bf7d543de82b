"""What a card says: verdict, bars, notes, pieces of the caption; `render` draws it, `markup` writes HTML."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from engine.result import Result, Word

FACE_TYPES = frozenset({"face_swap", "face_attribute"})
TEXT_TYPES = frozenset({"text_swap", "text_attribute"})
# By `weights` of Result.model, with the code of the warning that says the same.
_RIBBONS = {
    "demo": ("demo_weights", "Demo weights: says nothing about real images"),
    "drawn": ("untrained_weights", "Drawn weights: untrained, the scores mean nothing"),
}
_TINY = 64  # pixels of the longer side; the networks read 256
# A smaller side, as a share of the image's, shows no face: 4 of the 256 pixels that the networks read.
_MIN_BOX_SIDE = 1 / 64
_LEAST_SPAN = 0.1  # of the values of a heat map from its first colour to its last
_ROUNDING = 1e-4  # of float32, in hundredths


class Bar(NamedTuple):
    """A labelled score in [0, 1]; None where the network did not answer. `threshold`: None where unknown."""

    label: str
    score: float | None
    threshold: float | None
    detected: bool
    weak: bool = False

    @property
    def value(self) -> str:
        """The score as people read it."""
        return "not answered" if self.score is None else percent(self.score, self.threshold)


class ShownBox(NamedTuple):
    """A box on the image: its name, its corners (x1, y1, x2, y2) in shares of the image, and in pixels.

    `given` is whether it is the caller's and not the network's own.
    """

    name: str
    shares: tuple[float, float, float, float]
    pixels: tuple[float, float, float, float]
    given: bool

    @property
    def text(self) -> str:
        """Its name and its pixels, for a legend."""
        return f"{self.name} {', '.join(f'{x:.0f}' for x in self.pixels)}"


class HeatScale(NamedTuple):
    """What the heat map is of, and the values that its first and last colour stand for."""

    label: str
    low: float
    high: float

    @property
    def text(self) -> str:
        """The label with both ends."""
        return f"{self.label}, {self.low:.2f} to {self.high:.2f}"


class Piece(NamedTuple):
    """A piece of the caption: a word that the network read, or the text between two words.

    `mark` is the largest score of the run of adjacent marked words that the piece lies in, None outside of
    such a run. `read` is false for text with words that the network did not read.
    """

    text: str
    word: Word | None
    mark: float | None = None
    read: bool = True


def percent(score: float, threshold: float | None = None) -> str:
    """Return a score in percent, never rounded to 0 or 100 nor across its threshold."""
    if score > 0.999:
        return "> 99.9 %"
    if score < 0.001:
        return "< 0.1 %"
    shown = round(100 * score, 1)
    if threshold is not None and (shown / 100 >= threshold) != (score >= threshold):
        return f"{'at least' if score >= threshold else 'below'} {threshold_percent(threshold)}"
    return f"{shown:.1f} %"


def threshold_percent(threshold: float) -> str:
    """Return a threshold in percent."""
    return f"{100 * threshold:.4g} %"


def verdict(result: Result) -> str:
    """Return the headline."""
    if result.manipulated is None:
        return "Not answered"
    return "Manipulated" if result.manipulated else "Not manipulated"


def ribbon(result: Result) -> str | None:
    """Return the warning about the weights that the whole card carries, None for trained weights."""
    for kind, (code, text) in _RIBBONS.items():
        if result.model.get("weights") == kind or any(note.startswith(code) for note in result.warnings):
            return text
    return None


def main_bar(result: Result) -> Bar:
    """Return the bar of the verdict."""
    threshold = result.thresholds.get("manipulated")
    return Bar("Manipulation score", result.score, threshold, bool(result.manipulated))


def type_bars(result: Result) -> list[Bar]:
    """Return the bars of the types in order."""
    shown, weak = shown_types(result), weak_types(result)
    return [
        Bar(kind.replace("_", " "), score, result.thresholds.get(kind), kind in shown, kind in weak)
        for kind, score in result.types.items()
    ]


def shown_types(result: Result) -> tuple[str, ...]:
    """Return the detected types; none on a pair that is not manipulated."""
    return () if result.manipulated is False else result.detected


def face_box(result: Result) -> tuple[float, float, float, float] | None:
    """Return the box (x1, y1, x2, y2) in shares of the image, None where it means nothing.

    It does where a face type is detected and it is large enough for a face.
    """
    if result.box is None or result.size is None or not FACE_TYPES & set(shown_types(result)):
        return None
    x1, y1, x2, y2 = (value / result.size[i % 2] for i, value in enumerate(result.box))
    return (x1, y1, x2, y2) if min(x2 - x1, y2 - y1) >= _MIN_BOX_SIDE else None


def shown_boxes(result: Result) -> list[ShownBox]:
    """Return the boxes to show: the one that was given, whatever the verdict, and the network's own."""
    boxes = []
    if result.box_given is not None and result.size is not None:
        x1, y1, x2, y2 = (value / result.size[i % 2] for i, value in enumerate(result.box_given))
        boxes.append(ShownBox("box given", (x1, y1, x2, y2), result.box_given, True))
    if result.box is not None and (face := face_box(result)) is not None:
        boxes.append(ShownBox("network's box", face, result.box, False))
    return boxes


def heat_scale(result: Result) -> HeatScale | None:
    """Return the scale of the heat map, None where none is shown.

    There is one where the pair is not judged as not manipulated. Its ends are the map's own, rounded outwards
    to hundredths, at least a tenth apart, so that a map is neither a veil nor all noise.
    """
    if result.heatmap is None or result.manipulated is False:
        return None
    low = math.floor(100 * float(result.heatmap.min()) + _ROUNDING) / 100
    high = math.ceil(100 * float(result.heatmap.max()) - _ROUNDING) / 100
    low = min(low, 1 - _LEAST_SPAN)
    return HeatScale(result.heatmap_label, low, max(high, round(low + _LEAST_SPAN, 2)))


def alternative(result: Result) -> str:
    """Return what the image with its evidence shows, in words."""
    scale = heat_scale(result)
    shown = [box.text for box in shown_boxes(result)] + ([] if scale is None else [f"heat map: {scale.text}"])
    return "; ".join(["the image with its evidence", *shown])


def weak_types(result: Result) -> frozenset[str]:
    """Return the detected types without evidence: no marked word for a text type, no box for a face type."""
    shown = frozenset(shown_types(result))
    marked = any(word.manipulated for word in result.words)
    return (shown & FACE_TYPES if face_box(result) is None else frozenset()) | (
        shown & TEXT_TYPES if not marked else frozenset()
    )


def evidence_notes(result: Result, stored: bool) -> list[str]:
    """Return what a reader must know about the evidence; `stored` is whether there is an image to show."""
    notes, weak = [], weak_types(result)
    reasons = [
        reason
        for types, reason in ((TEXT_TYPES, "no marked word"), (FACE_TYPES, "no face box"))
        if weak & types
    ]
    if reasons:
        notes.append(f"Weak evidence: {' and '.join(reasons)}.")
    told = any(warning.startswith("tiny_image") for warning in result.warnings)
    if result.size and max(result.size) < _TINY and not told:
        notes.append("Tiny image: {} x {} pixels.".format(*result.size))
    if result.size and not stored:
        notes.append("The image was not stored with the prediction.")
    if not all(piece.read for piece in caption_pieces(result)):
        notes.append("Words in grey were not read by the network.")
    return notes


def model_name(result: Result) -> str:
    """Return the network's name, size and precision, and what runs it."""
    names = (result.model.get(key) for key in ("name", "size", "precision", "backend", "device"))
    return " ".join(name for name in names if name)


def model_note(result: Result) -> str:
    """Return the network's name with the time that it took."""
    total = result.timing.get("total")
    return model_name(result) + (f", {total:.0f} ms" if total is not None else "")


def caption_pieces(result: Result) -> Iterator[Piece]:
    """Split the caption into its words and what stands between them; joined they give the caption.

    Words are marked unless the pair is judged as not manipulated.
    """
    position, pieces = 0, []
    for word in result.words:
        if word.start > position:
            pieces.append(_gap(result.caption[position : word.start]))
        pieces.append(Piece(result.caption[word.start : word.end], word))
        position = word.end
    if position < len(result.caption):
        pieces.append(_gap(result.caption[position:]))
    return iter(pieces) if result.manipulated is False else _mark_runs(pieces)


def _gap(text: str) -> Piece:
    return Piece(text, None, read=not any(c.isalnum() for c in text))


def _mark_runs(pieces: list[Piece]) -> Iterator[Piece]:
    """Mark each run of adjacent marked words, the gaps inside included, with its largest score."""
    marked = [piece.word is not None and piece.word.manipulated for piece in pieces]
    inside = [
        marked[i] or (piece.word is None and piece.read and all(marked[max(i - 1, 0) : i + 2 : 2]))
        for i, piece in enumerate(pieces)
    ]
    # At either end of the caption a gap has one neighbour only, and joins nothing.
    inside[:1], inside[-1:] = marked[:1], marked[-1:]
    for joined, group in groupby(zip(pieces, inside, strict=True), key=itemgetter(1)):
        run = [piece for piece, _ in group]
        mark = max(piece.word.score for piece in run if piece.word is not None) if joined else None
        yield from (piece._replace(mark=mark) for piece in run)
