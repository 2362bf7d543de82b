from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from engine import InputError, Prediction, Word

CAPTION = 'The <script>alert("x")</script> of Obama\'s\n& co. \x00\x07end'


@pytest.fixture
def prediction():
    starts = [(match.start(), match.end()) for match in re.finditer(r"The|Obama's|end", CAPTION)]
    words = [
        Word(CAPTION[a:b], a, b, score, score >= 0.5)
        for (a, b), score in zip(starts, (0.1, 0.9, 0.6), strict=True)
    ]
    heatmap = np.zeros((16, 16), np.float32)
    heatmap[4:8, 4:8] = 1
    return Prediction(
        manipulated=True,
        score=0.93,
        types={"face_swap": 0.9, "face_attribute": 0.2, "text_swap": 0.1, "text_attribute": 0.7},
        detected=("face_swap", "text_attribute"),
        box=(25.0, 25.0, 75.0, 60.0),
        words=tuple(words),
        caption=CAPTION,
        size=(100, 80),
        warnings=("text_truncated: <kept> 50 of 73 words",),
        model={"name": "asap", "size": "tiny", "precision": "fp32", "backend": "ort", "device": "cpu"},
        heatmap=heatmap,
        timing={"total": 12.5},
        thumbnail=Image.new("RGB", (100, 80), (90, 120, 150)),
    )


def test_json_round_trip(prediction):
    data = json.loads(prediction.to_json())
    assert data == prediction.to_dict()
    assert data["box"] == [25.0, 25.0, 75.0, 60.0]
    assert data["words"][1] == {"text": "Obama's", "start": 35, "end": 42, "score": 0.9, "manipulated": True}
    assert np.array_equal(np.array(data["heatmap"], np.float32), prediction.heatmap)
    assert "heatmap" not in prediction.to_dict(heatmap=False)
    assert "thumbnail" not in data


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "expected JSON as str or bytes, got NoneType"),
        ({}, "expected JSON as str or bytes, got dict"),
        (b'"\xe9"', "expected JSON, got 3 characters: it is not UTF-8"),
    ],
)
def test_what_is_no_json(text, reason):
    with pytest.raises(InputError) as caught:
        Prediction.from_json(text)
    assert str(caught.value) == f"prediction: {reason}"


def test_json_holds_no_nan(prediction):
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(prediction, score=float("nan")).to_json()


def test_repr_and_equality_leave_out_the_arrays(prediction):
    assert "thumbnail" not in repr(prediction)
    assert "heatmap" not in repr(prediction)
    assert prediction == dataclasses.replace(prediction, heatmap=None, thumbnail=None, timing={})
    assert prediction != dataclasses.replace(prediction, score=0.5)
