"""`--threshold` of `dgm4 predict` and `dgm4 evaluate`."""

from __future__ import annotations

import json

import pytest

from engine.scores import DECISIONS
from export.cli import main

GIVEN = {"0.8": "manipulated", "face_swap=0.25": "face_swap", "words=1": "words"}


@pytest.fixture(scope="module")
def source(bundle):
    return str(bundle("asap", "fp32").path)


@pytest.fixture(scope="module")
def data(annotated):
    return annotated(4)


def options(*thresholds):
    return [part for threshold in thresholds for part in ("--threshold", threshold)]


def test_every_threshold_of_a_prediction_can_be_given(source, data, capsys):
    photo = str(data / "origin" / "0.jpg")
    assert main(["predict", source, photo, "a man", *options(*GIVEN)]) == 0
    record = json.loads(capsys.readouterr().out)
    expected = {**dict.fromkeys(DECISIONS, 0.5), "manipulated": 0.8, "face_swap": 0.25, "words": 1}
    assert record["thresholds"] == expected
    assert main(["predict", source, photo, "a man", *options("types=0.9", "text_swap=0", "0.1", "0.2")]) == 0
    found = json.loads(capsys.readouterr().out)["thresholds"]
    assert (found["face_swap"], found["text_swap"], found["manipulated"]) == (0.9, 0, 0.2)


def test_an_evaluation_judges_at_the_thresholds_given(source, data, capsys):
    arguments = ["evaluate", source, "--data", str(data), "--reference", "none", "--json"]
    assert main([*arguments, *options("0", "words=1")]) == 0
    decisions = json.loads(capsys.readouterr().out)["decisions"]
    assert decisions["manipulated"]["in_use"]["threshold"] == 0
    assert decisions["manipulated"]["in_use"]["missed"] == decisions["manipulated"]["in_use"]["passed"] == 0
    assert decisions["words"]["in_use"]["found"] == decisions["words"]["in_use"]["false_alarms"] == 0
    assert decisions["face_swap"]["in_use"]["threshold"] == 0.5


@pytest.mark.parametrize("text", ["3", "-0.1", "nan", "words", "=", "face=0.5", "words=", "words=high"])
@pytest.mark.parametrize("verb", [["predict", "b", "i", "c"], ["evaluate", "b", "--data", "d"]])
def test_a_threshold_that_cannot_be_is_a_usage_error(verb, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*verb, f"--threshold={text}"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "expected P or NAME=P with P from 0 to 1 and NAME one of manipulated, face_swap" in message
    hint = "; did you mean face_swap?" if text == "face=0.5" else ""
    assert message.endswith(f"got {text!r}{hint}")
