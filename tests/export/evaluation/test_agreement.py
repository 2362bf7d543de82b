from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from dgm4.config import TYPES
from dgm4.metrics import LabelledOutputs
from engine.result import Result, Word
from engine.scores import DECISIONS, Temperatures, Thresholds
from export.evaluation import agreement
from export.evaluation.agreement import PARTS, predicted_iou, visible_changes

NONE = (0.0, 0.0, 0.0, 0.0)
FACE = (0.5, 0.5, 0.2, 0.2)


MANIFEST = SimpleNamespace(
    types=TYPES, temperatures=Temperatures(), thresholds=Thresholds(**dict.fromkeys(DECISIONS, 0.5))
)


def measure_agreement(ours, theirs, manifest=MANIFEST):
    return agreement.measure_agreement(ours, theirs, manifest)


def disagreement(ours, theirs):
    return agreement.disagreement(ours, theirs, MANIFEST)


def answers(**changes):
    """Two pairs, the second with one token of two; `changes` replaces arrays."""
    fields = {
        "labels": ["orig", "face_swap"],
        "logits_real_fake": [[1.0, -1.0], [-1.0, 1.0]],
        "logits_multicls": [[-1.0, -1, -1, -1], [1, -1, -1, -1]],
        "pred_box": [NONE, FACE],
        "true_box": [NONE, FACE],
        "logits_tok": [[[1.0, -1], [1, -1]], [[1, -1], [0, 0]]],
        "token_labels": [[0, 0], [0, -100]],
    }
    return LabelledOutputs(**{name: np.array(value) for name, value in {**fields, **changes}.items()})


def test_a_model_agrees_with_itself():
    found = measure_agreement(answers(), answers()).to_dict()
    assert found.pop("score_change") == 0
    assert set(found.values()) == {1.0}
    assert not disagreement(answers(), answers()).any()


def test_decisions_are_counted():
    other = answers(
        logits_real_fake=[[1.0, -1.0], [1.0, -1.0]],
        logits_multicls=[[-1.0, -1, 0.0, -1], [1, -1, -1, -1]],
        logits_tok=[[[1.0, -1], [-1, 1]], [[1, -1], [0, 9]]],
        pred_box=[FACE, (0.6, 0.5, 0.2, 0.2)],
    )
    found = measure_agreement(answers(), other)
    assert (found.verdict, found.types, found.all_types, found.no_box) == (0.5, 7 / 8, 0.5, 0.5)
    assert found.tokens == pytest.approx(2 / 3)
    assert found.box_iou == pytest.approx((0 + 1 / 3) / 2)
    assert found.box_iou_min == 0
    # softmax of (-1, 1) against that of (1, -1)
    assert found.score_change == pytest.approx(1 / (1 + math.exp(-2)) - 1 / (1 + math.exp(2)))


def test_each_part_sees_its_own_change_alone():
    changed = {
        "score": {"logits_real_fake": [[1.0, -1.0], [0.0, 0.0]]},
        "types": {"logits_multicls": [[-1.0, -1, -1, -1], [1, -1, -1, 3]]},
        "words": {"logits_tok": [[[1.0, -1], [1, -1]], [[0, 0], [5, 5]]]},
        "box": {"pred_box": [NONE, (0.5, 0.5, 0.1, 0.2)]},
    }
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = {
        "score": sigmoid(2) - 0.5,
        "types": sigmoid(3) - sigmoid(-1),
        "words": 0.5 - sigmoid(-2),
        "box": 0.5,
    }
    for column, name in enumerate(PARTS):
        found = disagreement(answers(**changed[name]), answers())
        wanted = np.zeros((2, 4))
        wanted[1, column] = expected[name]
        np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_two_models_without_a_box_agree():
    assert predicted_iou(answers(pred_box=[NONE, NONE]), answers()).tolist() == [1.0, 0.0]


def test_without_tokens():
    bare = answers(logits_tok=np.zeros((2, 0, 2)), token_labels=np.zeros((2, 0), int))
    assert math.isnan(measure_agreement(bare, bare).tokens)
    assert not disagreement(bare, bare).any()


def test_agreement_is_at_the_thresholds_in_use():
    other = answers(logits_real_fake=[[1.0, -1.0], [-0.5, 0.5]])
    assert measure_agreement(answers(), other).verdict == 1
    scores = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    between = Thresholds(**{**dict.fromkeys(DECISIONS, 0.5), "manipulated": sum(scores) / 2})
    strict = SimpleNamespace(**{**vars(MANIFEST), "thresholds": between})
    assert measure_agreement(answers(), other, strict).verdict == 0.5
    warm = SimpleNamespace(**{**vars(strict), "temperatures": Temperatures(manipulated=0.5)})
    assert measure_agreement(answers(), other, warm).verdict == 1


RESULT = Result(
    manipulated=True,
    score=0.9,
    types={"face_swap": 0.8, "text_swap": 0.1},
    detected=("face_swap",),
    box=(1, 1, 9, 9),
    words=(Word("a", 0, 1, 0.1, False), Word("b", 2, 3, 0.9, True)),
    size=(20, 20),
)
UNMARKED = tuple(replace(word, manipulated=False) for word in RESULT.words)


@pytest.mark.parametrize(
    ("change", "iou", "expected"),
    [
        ({}, 1, ()),
        ({"score": 0.6, "types": {"face_swap": 0.6, "text_swap": 0.4}}, 0.95, ()),
        ({"manipulated": False}, 1, ("verdict", "face swap", "box")),
        ({"detected": ("face_swap", "text_swap")}, 1, ("text swap",)),
        ({"detected": ()}, 1, ("face swap", "box")),
        ({"words": UNMARKED}, 1, ("1 word",)),
        ({}, 0.5, ("box",)),
        ({"box": None}, 0, ("box",)),
    ],
)
def test_changes_are_those_that_a_reader_sees(change, iou, expected):
    other = replace(RESULT, **change)
    assert visible_changes(RESULT, other, iou) == visible_changes(other, RESULT, iou) == expected


@pytest.mark.parametrize("hidden", [{"manipulated": False}, {"detected": ("text_swap",)}])
def test_a_box_that_is_not_shown_does_not_move(hidden):
    first = replace(RESULT, **hidden)
    assert visible_changes(first, replace(first, box=(0, 0, 0, 0)), 0.0) == ()
