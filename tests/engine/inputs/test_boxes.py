"""Boxes that a caller gives: pixels to shares of the image, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import InputError
from engine.inputs.boxes import network_box

SIZE = 200, 100


@pytest.mark.parametrize("box", [(20, 10, 120, 60), [20.0, 10.0, 120.0, 60.0], np.array([20, 10, 120, 60])])
def test_pixels_become_shares(box):
    got = network_box(box, SIZE)
    assert got.dtype == np.float32
    assert got.tolist() == pytest.approx([0.35, 0.35, 0.5, 0.5])


def test_the_whole_image_is_a_box():
    assert network_box((0, 0, 200, 100), SIZE).tolist() == [0.5, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (None, r"which this network judges, got none"),
        ((1, 2, 3), r"four numbers, got \(1, 2, 3\)"),
        ("1,2,3,4", r"four numbers, got '1,2,3,4'"),
        (7, r"four numbers, got 7"),
        ((1, 2, "3", 4), r"four numbers"),
        ((20, 10, 20, 60), r"x1 < x2 <= 200 .* got \(20, 10, 20, 60\)"),
        ((20, 60, 120, 10), r"y1 < y2 <= 100"),
        ((-1, 10, 120, 60), r"0 <= x1"),
        ((20, 10, 201, 60), r"x2 <= 200"),
        ((20, 10, 120, 100.5), r"y2 <= 100"),
        ((20, 10, float("nan"), 60), r"x1 < x2"),
    ],
)
def test_what_is_no_box_in_the_image(box, message):
    with pytest.raises(InputError, match=f"box: expected.*{message}"):
        network_box(box, SIZE)


def test_a_box_needs_an_image():
    with pytest.raises(InputError, match="image: expected one, with the box"):
        network_box((20, 10, 120, 60), None)
    with pytest.raises(InputError, match="image: expected one, with the box"):
        network_box(None, None)
