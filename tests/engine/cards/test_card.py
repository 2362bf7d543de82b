from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from predictions import TYPES, make_prediction

from engine.cards.card import (
    alternative,
    caption_pieces,
    evidence_notes,
    face_box,
    heat_scale,
    main_bar,
    percent,
    ribbon,
    shown_boxes,
    type_bars,
    verdict,
    weak_types,
)


@pytest.mark.parametrize(
    ("score", "threshold", "shown"),
    [
        (0.93, 0.5, "93.0 %"),
        (0.912, None, "91.2 %"),
        (0.9999, 0.5, "> 99.9 %"),
        (1.0, 0.5, "> 99.9 %"),
        (0.999, 0.5, "99.9 %"),
        (0.0004, 0.5, "< 0.1 %"),
        (0.0, 0.5, "< 0.1 %"),
        (0.5, 0.5, "50.0 %"),
        (0.07, 0.07, "7.0 %"),
        (0.4999, 0.5, "below 50 %"),
        (0.73126, 0.73125, "at least 73.12 %"),
    ],
)
def test_a_score_is_never_rounded_to_certainty_or_over_its_threshold(score, threshold, shown):
    assert percent(score, threshold) == shown


def test_the_bar_of_the_verdict_is_the_manipulation_score_whatever_the_verdict():
    innocent = make_prediction(manipulated=False, thresholds={"manipulated": 0.95})
    assert verdict(innocent) == "Not manipulated"
    bar = main_bar(innocent)
    assert (bar.label, bar.value, bar.threshold) == ("Manipulation score", "93.0 %", 0.95)
    assert verdict(make_prediction()) == "Manipulated"


def test_what_the_network_did_not_answer_says_so():
    partial = make_prediction(manipulated=None, score=None, types={**TYPES, "face_swap": None})
    assert verdict(partial) == "Not answered"
    assert main_bar(partial).value == "not answered"
    assert [bar.value for bar in type_bars(partial)] == ["not answered", "20.0 %", "10.0 %", "70.0 %"]


@pytest.mark.parametrize(
    ("fields", "weak"),
    [
        ({}, set()),
        ({"marked": ()}, {"text_attribute"}),
        ({"box": None}, {"face_swap"}),
        ({"box": (10.0, 10.0, 11.0, 70.0)}, {"face_swap"}),
        ({"marked": (), "box": None}, {"face_swap", "text_attribute"}),
        ({"marked": (), "box": None, "manipulated": False}, set()),
        ({"marked": (), "box": None, "detected": ()}, set()),
    ],
)
def test_a_type_without_evidence_is_weak(fields, weak):
    prediction = make_prediction(**fields)
    assert weak_types(prediction) == weak
    assert {bar.label.replace(" ", "_") for bar in type_bars(prediction) if bar.weak} == weak
    assert any("Weak" in note for note in evidence_notes(prediction, True)) == bool(weak)


def test_nothing_is_marked_on_a_pair_that_is_not_manipulated():
    innocent = make_prediction(manipulated=False)
    assert face_box(innocent) is None and heat_scale(innocent) is None
    assert not any(bar.detected for bar in type_bars(innocent))
    assert all(piece.mark is None for piece in caption_pieces(innocent))


@pytest.mark.parametrize(
    ("caption", "marked", "runs"),
    [
        ("The mayor opens a bridge", (1, 2, 4), ["mayor opens", "bridge"]),
        ("one, two. Three", (0, 1, 2), ["one, two. Three"]),
        ("one two", (), []),
        (" one ", (0,), ["one"]),
        ("", (), []),
    ],
)
def test_adjacent_marked_words_are_joined(caption, marked, runs):
    words = make_prediction(caption, marked).words
    # Punctuation stands between the words, as the tokenizer leaves it.
    trimmed = [
        dataclasses.replace(w, text=w.text.strip(".,"), end=w.end - (w.text[-1] in ".,")) for w in words
    ]
    pieces = list(caption_pieces(make_prediction(caption, words=tuple(trimmed))))
    assert "".join(piece.text for piece in pieces) == caption
    shown = "".join(piece.text if piece.mark else "|" for piece in pieces)
    assert [run for run in shown.split("|") if run] == runs


def test_a_run_has_the_largest_score_of_its_words():
    first, second, *rest = make_prediction(marked=(0, 1)).words
    words = (dataclasses.replace(first, score=0.6), second, *rest)
    assert {piece.mark for piece in caption_pieces(make_prediction(words=words))} == {0.9, None}


def test_words_that_were_not_read_are_known():
    cut = make_prediction("one two three four", marked=(), read=2)
    assert [(piece.text, piece.read) for piece in caption_pieces(cut)] == [
        ("one", True),
        (" ", True),
        ("two", True),
        (" three four", False),
    ]
    assert "Words in grey were not read by the network." in evidence_notes(cut, True)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"model": {"weights": "demo"}}, "Demo weights: says nothing about real images"),
        (
            {"warnings": ("demo_weights: trained on made images",)},
            "Demo weights: says nothing about real images",
        ),
        ({"model": {"weights": "drawn"}}, "Drawn weights: untrained, the scores mean nothing"),
        ({"warnings": ("untrained_weights: seed 0",)}, "Drawn weights: untrained, the scores mean nothing"),
        ({"model": {"weights": "trained"}, "warnings": ("text_truncated: kept 2",)}, None),
    ],
)
def test_a_ribbon_tells_of_weights_that_say_nothing(fields, text):
    assert ribbon(make_prediction(**fields)) == text


def test_notes_tell_of_the_image():
    assert evidence_notes(make_prediction(size=(24, 20)), True) == ["Tiny image: 24 x 20 pixels."]
    assert evidence_notes(make_prediction(size=(2, 2), warnings=("tiny_image: 2 x 2 pixels",)), True) == []
    assert any("not stored" in note for note in evidence_notes(make_prediction(), False))
    assert evidence_notes(make_prediction(), True) == []


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ((0.1321, 0.2512), (0.13, 0.26)),
        ((0.0, 1.0), (0.0, 1.0)),
        ((0.3, 0.3001), (0.3, 0.4)),
        ((0.87, 0.87), (0.87, 0.97)),
        ((0.99, 1.0), (0.9, 1.0)),
    ],
)
def test_the_scale_of_a_heat_map_spans_its_own_values(values, ends):
    scale = heat_scale(make_prediction(heatmap=np.array([values, values], np.float32)))
    assert (scale.low, scale.high) == pytest.approx(ends, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "label"),
    [("asap", "patch evidence"), ("cscl", "disagreement with the caption"), ("of tomorrow", "heat map")],
)
def test_the_record_of_the_network_names_its_heat_map(name, label):
    assert heat_scale(make_prediction(model={"name": name})).label == label


def test_the_box_that_was_given_is_shown_whatever_the_verdict():
    given = (10.0, 8.0, 60.0, 40.0)
    shown = shown_boxes(make_prediction(box_given=given, size=(100, 80)))
    assert [(box.text, box.given) for box in shown] == [
        ("box given 10, 8, 60, 40", True),
        ("network's box 25, 20, 75, 60", False),
    ]
    assert shown[0].shares == pytest.approx((0.1, 0.1, 0.6, 0.5))
    (only,) = shown_boxes(make_prediction(box_given=given, manipulated=False))
    assert only.given


def test_the_evidence_in_words():
    text = alternative(make_prediction(box_given=(10, 8, 60, 40), model={"name": "cscl"}))
    assert text == (
        "the image with its evidence; box given 10, 8, 60, 40; network's box 25, 20, 75, 60; "
        "heat map: disagreement with the caption, 0.00 to 1.00"
    )
    assert alternative(make_prediction(manipulated=False)) == "the image with its evidence"
