from __future__ import annotations

import math

import numpy as np
import pytest

from dgm4.metrics import LabelledOutputs
from export.evaluation.agreement import PARTS, disagreement, measure_agreement, predicted_iou

NONE = (0.0, 0.0, 0.0, 0.0)
FACE = (0.5, 0.5, 0.2, 0.2)


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
