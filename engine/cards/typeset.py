"""Sets the pieces of a caption in rows: line breaks, right-to-left text, control characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import accumulate, groupby
from typing import NamedTuple

from PIL import features

from engine.cards.card import Piece
from engine.cards.fonts import JOINERS, Fonts

# Chinese and Japanese, whose lines may break after any letter; the letter's own accents stay with it.
_CJK = "\u2e80-\ua4cf\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_ATOM = re.compile(rf"\s+|[{_CJK}][\u3099\u309a\ufe00-\ufe0f]*|[^\s{_CJK}]+")
_ELLIPSIS = " ..."


class Atom(NamedTuple):
    """What no line break splits: text as drawn, its width in pixels, and the piece that it is part of."""

    text: str
    width: float
    piece: Piece


class Rows(NamedTuple):
    """Rows of atoms from left to right; `leftwards` where the text is read, and aligned, from the right."""

    rows: list[list[Atom]]
    leftwards: bool


def set_rows(pieces: Iterable[Piece], fonts: Fonts, size: int, width: float, most: int) -> Rows:
    """Break text into at most `most` rows of `width` pixels."""
    rows: list[list[Atom]] = [[]]
    used = 0.0
    for atom in _atoms(pieces, fonts, size, width):
        if used + atom.width > width and rows[-1]:
            if len(rows) == most:
                rows[-1] = _shorten(rows[-1], fonts, size, width)
                break
            rows.append([])
            used = 0.0
        if rows[-1] or not atom.text.isspace():
            rows[-1].append(atom)
            used += atom.width
    leftwards = _direction("".join(atom.text for row in rows for atom in row)) == "R"
    return Rows([_visual_order(_trim(row), leftwards) for row in rows if row], leftwards)


def lacks_shaping(text: str) -> bool:
    """Whether `text` has right-to-left letters that a Pillow without raqm draws unjoined and in reverse."""
    return any(_strong(c) == "R" for c in text) and not features.check("raqm")


def _atoms(pieces: Iterable[Piece], fonts: Fonts, size: int, width: float) -> Iterator[Atom]:
    """The pieces' atoms, white space as one space; one wider than a row is cut into parts that fit."""
    for piece in pieces:
        for text in _ATOM.findall(fonts.spelled(_printable(piece.text))):
            rest = " " if text.isspace() else text
            while (length := fonts.length(rest, size)) > width and len(rest) > 1:
                head = rest[: _fitting(rest, fonts, size, width)]
                yield Atom(head, fonts.length(head, size), piece)
                rest = rest[len(head) :]
            yield Atom(rest, length, piece)


def _fitting(text: str, fonts: Fonts, size: int, width: float) -> int:
    """How many letters of `text` fit, at least one."""
    low, high = 1, len(text) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fonts.length(text[:middle], size) <= width else (low, middle - 1)
    return low


def _shorten(row: list[Atom], fonts: Fonts, size: int, width: float) -> list[Atom]:
    """End a row with an ellipsis."""
    dots = Atom(_ELLIPSIS, fonts.length(_ELLIPSIS, size), Piece(_ELLIPSIS, None))
    while len(row) > 1 and sum(atom.width for atom in row) + dots.width > width:
        row = row[:-1]
    return [*row, dots]


def _trim(row: list[Atom]) -> list[Atom]:
    return row[:-1] if row[-1].text.isspace() else row


def _visual_order(row: list[Atom], leftwards: bool) -> list[Atom]:
    """Order a row from left to right as Unicode's bidirectional algorithm does, in whole atoms."""
    base, other = ("R", "L") if leftwards else ("L", "R")
    directions = [_direction(atom.text) for atom in row]
    # An atom without a direction takes that of its neighbours where both have the same.
    before = list(accumulate(directions, lambda last, own: own or last, initial=base))[1:]
    after = list(accumulate(reversed(directions), lambda last, own: own or last, initial=base))[:0:-1]
    resolved = [a if a == b else base for a, b in zip(before, after, strict=True)]
    ordered: list[Atom] = []
    for direction, group in groupby(zip(resolved, row, strict=True), key=lambda pair: pair[0]):
        run = [atom for _, atom in group]
        ordered += reversed(run) if direction == other else run
    return ordered[::-1] if leftwards else ordered


def _direction(text: str) -> str:
    """L or R after the first letter that has a direction, an empty string without any."""
    return next((strong for c in text if (strong := _strong(c))), "")


def _strong(c: str) -> str:
    return {"L": "L", "R": "R", "AL": "R"}.get(unicodedata.bidirectional(c), "")


def _printable(text: str) -> str:
    """Drop invisible controls, such as those that reverse text, and replace what cannot be printed."""
    visible = (c for c in text if unicodedata.category(c) != "Cf" or c in JOINERS)
    return "".join(c if c.isprintable() or c.isspace() or c in JOINERS else "\ufffd" for c in visible)
