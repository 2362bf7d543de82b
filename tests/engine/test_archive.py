"""Predictions that come back from dictionaries and JSON lines; as rows, in one line, in a notebook."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re

import numpy as np
import pytest

from engine import Dgm4Error, InputError, NumericalError, Prediction, to_rows

CAPTION = "The President's friend, Obama, speaks!"


@pytest.fixture(scope="module")
def prediction(predictor, photo):
    return predictor.predict(photo, CAPTION)


def test_a_prediction_survives_a_dictionary_and_json(prediction):
    for again in (
        Prediction.from_dict(prediction.to_dict()),
        Prediction.from_json(prediction.to_json()),
        Prediction.from_json(prediction.to_json(indent=2).encode()),
    ):
        assert again == prediction
        assert type(again) is Prediction
        assert np.array_equal(again.heatmap, prediction.heatmap)
        assert again.heatmap.dtype == np.float32
        assert again.timing == prediction.timing
    assert Prediction.from_json(prediction.to_json(heatmap=False)).heatmap is None


def test_rows_of_one_prediction_or_of_nothing(prediction):
    with pytest.raises(InputError, match="expected an iterable of predictions, got Prediction; of one, take"):
        to_rows(prediction)
    with pytest.raises(InputError, match="expected an iterable of predictions, got int$"):
        to_rows(3)


def test_a_detected_type_is_one_of_the_types(prediction):
    line = prediction.to_dict() | {"types": {}, "detected": ["face_swap"]}
    with pytest.raises(InputError, match=r"detected: expected some of no type, got \['face_swap'\]"):
        Prediction.from_dict(line)


def test_a_card_needs_a_path(prediction):
    with pytest.raises(InputError, match="expected the path of an image file to draw into, got int"):
        prediction.plot(3)


def test_a_prediction_survives_pickle(prediction):
    again = pickle.loads(pickle.dumps(prediction))
    assert again == prediction
    assert again.thumbnail.size == prediction.thumbnail.size


@pytest.mark.parametrize("absent", ["caption", "image"])
def test_partial_predictions_survive_json(predictor, photo, absent):
    pair = {"image": photo, "caption": CAPTION, absent: None}
    (prediction,) = predictor.predict_batch([pair])
    assert Prediction.from_json(prediction.to_json()) == prediction


def test_lines_of_older_and_newer_releases_are_read(prediction):
    line = {"line": 3, "image": "a.jpg", "id": 7} | prediction.to_dict() | {"invented_later": [1]}
    assert Prediction.from_dict(line) == prediction
    for name in ("thresholds", "model", "timing", "warnings", "heatmap"):
        del line[name]
    assert Prediction.from_dict(line).thresholds == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "high"}, "prediction: score: expected a finite number"),
        ({"score": 1.5}, r"score: expected a finite number in \[0, 1\], got 1.5"),
        ({"score": float("nan")}, "score: expected a finite number"),
        ({"manipulated": 1}, "manipulated: expected true or false, got 1"),
        ({"types": {"face_swap": 2}}, "types.face_swap: expected"),
        ({"types": ["face_swap"]}, "types: expected an object"),
        ({"box": [1, 2, 3]}, "box: expected a list of 4"),
        ({"words": [{"text": "a"}]}, r"words\[0\].start: expected a value, got nothing"),
        (
            {"words": [{"text": "a", "start": 5, "end": 99, "score": 0, "manipulated": False}]},
            "a span of the",
        ),
        ({"size": [0, 5]}, r"size\[0\]: expected an integer >= 1"),
        ({"heatmap": [[0.5], [0.5, 0.1]]}, "heatmap: expected rows of numbers"),
        ({"heatmap": [[2.0]]}, "heatmap: expected rows of numbers"),
        ({"heatmap": "x"}, "heatmap: expected rows of numbers"),
        ({"caption": "x" * 5000, "size": "y" * 5000}, "size: expected a list of 2, got 'yyy"),
    ],
)
def test_rubbish_is_an_input_error_by_field(prediction, change, message):
    with pytest.raises(InputError, match=message) as caught:
        Prediction.from_dict(prediction.to_dict() | change)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("raw", [None, [], 3, "x", {}, {"score": 0.5}])
def test_what_is_no_prediction_is_refused(raw):
    with pytest.raises(InputError, match="^prediction: .*expected"):
        Prediction.from_dict(raw)


def test_a_line_with_an_error_is_refused_as_such():
    line = {"line": 8, "image": "x.jpg", "error": "line 8: no such file", "kind": "InputError"}
    with pytest.raises(InputError, match="got the error of a pair that failed: line 8: no such file"):
        Prediction.from_dict(line)


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe\x00", "[" * 100_000, None, 5])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(InputError, match="^prediction: expected"):
        Prediction.from_json(text)


def test_a_row_is_flat_and_plain(prediction):
    row = prediction.to_row()
    assert all(value is None or type(value) in (bool, int, float, str) for value in row.values())
    assert json.loads(json.dumps(row)) == row
    assert (row["score"], row["face_swap"]) == (prediction.score, prediction.types["face_swap"])
    assert (row["x1"], row["y2"]) == (prediction.box[0], prediction.box[3])
    marked = [word.text for word in prediction.words if word.manipulated]
    assert (row["words"], row["marked"]) == (len(prediction.words), len(marked))
    assert row["marked_words"] == " ".join(marked)
    assert (row["width"], row["height"], row["caption"]) == (64, 48, CAPTION)
    assert (row["model_name"], row["model_backend"], row["error"]) == ("asap", "ort", None)
    assert row["milliseconds"] == prediction.timing["total"]


def test_rows_of_predictions_and_errors_have_the_same_columns(predictor, photo, prediction):
    pairs = [(photo, "a"), (b"broken", "b"), (photo, "poison"), (photo, None), (None, "")]
    rows = to_rows(predictor.predict_batch(pairs, on_error="return"))
    rows += to_rows(
        iter([dataclasses.replace(prediction, box=None, detected=("face_swap",), warnings=("a", "b"))])
    )
    assert {tuple(row) for row in rows} == {tuple(prediction.to_row())}
    assert [row["error_kind"] for row in rows] == [None, "InputError", "NumericalError", None, None, None]
    assert rows[1]["error"].startswith("item 1: ")
    assert rows[1]["score"] is rows[3]["score"] is rows[4]["width"] is rows[5]["x1"] is None
    assert (rows[5]["detected"], rows[5]["warnings"]) == ("face_swap", "a; b")
    assert to_rows([]) == []
    with pytest.raises(InputError, match="to_rows: expected predictions and errors, got dict"):
        to_rows([{}])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, r"Prediction\(manipulated 0\.93: face_swap 0\.91; box 25 25 75 60; 1 of 5 words\)"),
        ({"box": None}, r"Prediction\(manipulated 0\.93: face_swap 0\.91; 1 of 5 words\)"),
        ({"detected": ()}, r"Prediction\(manipulated 0\.93; 1 of 5 words\)"),
        ({"manipulated": False, "score": 0.2}, r"Prediction\(not manipulated 0\.20; 1 of 5 words\)"),
        ({"manipulated": None, "score": None}, r"Prediction\(no verdict: face_swap 0\.91; box 25.*"),
        ({"words": ()}, r".*; 0 of 0 words\)"),
    ],
)
def test_one_line_says_what_was_found(prediction, change, expected):
    words = [dataclasses.replace(word, manipulated=i == 0) for i, word in enumerate(prediction.words)]
    fields = {
        "manipulated": True,
        "score": 0.93,
        "types": dict.fromkeys(prediction.types, 0.1) | {"face_swap": 0.91},
        "detected": ("face_swap",),
        "box": (25.0, 25.0, 75.4, 60.0),
        "words": tuple(words),
    }
    shown = repr(dataclasses.replace(prediction, **fields | change))
    assert "\n" not in shown
    assert re.fullmatch(expected, shown), shown


def test_a_notebook_shows_the_page(prediction):
    assert prediction._repr_html_() == prediction.to_html()


def test_errors_are_at_the_top():
    import engine

    assert issubclass(engine.InputError, Dgm4Error)
    assert engine.errors.NumericalError is NumericalError
