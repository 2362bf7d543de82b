"""Boxes that a caller gives: pixels to shares of the image, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import InputError
from engine.inputs.boxes import box_of_text, check_box, network_box

SIZE = 200, 100


@pytest.mark.parametrize("box", [(20, 10, 120, 60), [20.0, 10.0, 120.0, 60.0], np.array([20, 10, 120, 60])])
def test_pixels_become_shares(box):
    checked, warnings = check_box(box, SIZE)
    assert checked == (20.0, 10.0, 120.0, 60.0) and warnings == ()
    assert all(type(x) is float for x in checked)
    got = network_box(checked, SIZE)
    assert got.dtype == np.float32
    assert got.tolist() == pytest.approx([0.35, 0.35, 0.5, 0.5])


def test_the_whole_image_is_a_box():
    assert network_box(check_box((0, 0, 200, 100), SIZE)[0], SIZE).tolist() == [0.5, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (None, r"which this network judges, got none; give box=\(x1, y1, x2, y2\)"),
        ((1, 2, 3), r"four numbers, got \(1, 2, 3\)"),
        ("1,2,3,4", r"four numbers, got '1,2,3,4'"),
        (7, r"four numbers, got 7"),
        ((1, 2, "3", 4), r"four numbers"),
        ((20, 10, 20, 60), r"x1 < x2 <= 200 .* got \(20, 10, 20, 60\)"),
        ((20, 60, 120, 10), r"y1 < y2 <= 100.*; its left upper corner comes first"),
        ((-1, 10, 120, 60), r"0 <= x1.*; clip it to the image"),
        ((20, 10, 201, 60), r"x2 <= 200.*; clip it to the image"),
        ((20, 10, 120, 100.5), r"y2 <= 100.*; clip it to the image"),
        ((201, 10, 220, 60), r"x2 <= 200.*; its left upper corner comes first"),
        ((20, 10, float("nan"), 60), "four finite numbers, got .*nan"),
        ((float("-inf"), 10, 30, 60), "four finite numbers, got .*-inf"),
    ],
)
def test_what_is_no_box_in_the_image(box, message):
    with pytest.raises(InputError, match=f"box: expected.*{message}"):
        check_box(box, SIZE)


def test_a_box_needs_an_image():
    with pytest.raises(InputError, match="image: expected one, with the box"):
        check_box((20, 10, 120, 60), None)
    with pytest.raises(InputError, match="image: expected one, with the box"):
        check_box(None, None)


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0, 0, 1e-9, 1e-9), (20, 10, 120, 11), (0.1, 0.1, 0.6, 0.7)])
def test_a_box_of_next_to_nothing_is_told(box):
    _, (warning,) = check_box(box, SIZE)
    assert warning.startswith("tiny_box: ")


@pytest.mark.parametrize("text", ["-5,0,50,50", "-5, 0 ,50,50", " -5 0 50 50.0 "])
def test_a_box_as_text(text):
    assert box_of_text(text) == [-5, 0, 50, 50]


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,x", "1,2,3,4,5", "[1,2,3,4]"])
def test_what_is_no_box_as_text(text):
    with pytest.raises(ValueError):  # noqa: PT011 (the caller has the message)
        box_of_text(text)
