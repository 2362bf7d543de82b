"""Boxes that a caller gives, for the networks that judge one: pixels to what the network reads."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from numbers import Real
from typing import Any

import numpy as np

from engine.errors import InputError, quoted

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the upright image

_EXPECTED = "expected (x1, y1, x2, y2) in pixels of the upright image"
_TINY = 1 / 64  # of the image's side: 4 of the 256 pixels that the networks read
WHOLE = np.array([0.5, 0.5, 1, 1], np.float32)  # of the whole image, for a run without a picture


def box_of_text(text: str) -> list[float]:
    """The four numbers of a box, apart by commas or white space; raises ValueError for another text.

    Whether they are a box in an image `check_box` tells.
    """
    x1, y1, x2, y2 = map(float, text.replace(",", " ").split())
    return [x1, y1, x2, y2]


def check_box(box: Any, size: tuple[int, int] | None) -> tuple[Box, tuple[str, ...]]:
    """A box in an image of `size` (width, height), in its pixels, and warnings.

    Raises InputError for a box that is missing, is none, is empty or reaches outside the image, and for one
    without an image.
    """
    if size is None:
        raise InputError("image: expected one, with the box in it that this network judges, got none")
    if box is None:
        raise InputError(
            f"box: {_EXPECTED}, which this network judges, got none; give box=(x1, y1, x2, y2), as a face "
            "detector finds it"
        )
    numbers = list(box) if isinstance(box, Iterable) and not isinstance(box, str | bytes) else []
    if len(numbers) != 4 or not all(isinstance(x, Real) and not isinstance(x, bool) for x in numbers):
        raise InputError(f"box: {_EXPECTED}, four numbers, got {quoted(box)}")
    if not all(-inf < x < inf for x in numbers):  # nor is NaN
        raise InputError(f"box: {_EXPECTED}, four finite numbers, got {quoted(box)}")
    width, height = size
    x1, y1, x2, y2 = numbers
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        meets = max(x1, 0) < min(x2, width) and max(y1, 0) < min(y2, height)
        corners = "its left upper corner comes first, then its right lower one"
        remedy = "clip it to the image" if meets else corners
        raise InputError(
            f"box: {_EXPECTED}, with 0 <= x1 < x2 <= {width} and 0 <= y1 < y2 <= {height}, "
            f"got {quoted(box)}; {remedy}"
        )
    x1, y1, x2, y2 = map(float, numbers)
    tiny = x2 - x1 < width * _TINY or y2 - y1 < height * _TINY
    text = f"tiny_box: {x2 - x1:.3g} x {y2 - y1:.3g} of {width} x {height} pixels show no face"
    return (x1, y1, x2, y2), (text,) if tiny else ()


def network_box(box: Box, size: tuple[int, int]) -> np.ndarray:
    """A box in an image of `size` (width, height) as the network reads it: float32 cx, cy, w, h in [0, 1]."""
    width, height = size
    x1, y1, x2, y2 = box
    centre = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height
    return np.array([*centre, (x2 - x1) / width, (y2 - y1) / height], np.float32)
