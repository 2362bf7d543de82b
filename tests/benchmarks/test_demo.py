"""Which pair the demo shows."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.demo import pick_sample
from dgm4.metrics import TOKEN_PADDING, LabelledOutputs


def answers(changed=None):
    """Four candidates: a wrong box, a wrong word, two that are right."""
    labels = np.array(["face_swap&text_attribute"] * 4)
    tokens = np.array([[0, 1, 1], [0, 1, 1], [0, 1, TOKEN_PADDING], [0, 1, TOKEN_PADDING]])
    said = np.array([[0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 1, 1]])
    truth = np.tile([[0.5, 0.5, 0.2, 0.2]], (4, 1))
    boxes = truth.copy()
    boxes[0, 0] = 0.6  # overlap 1/3
    types = np.where([[1, 0, 0, 1]] * 4, 1.0, -1.0)
    types[2:] = types[2:] if changed is None else changed
    return LabelledOutputs(labels, np.zeros((4, 2)), types, boxes, truth, np.eye(2)[said], tokens)


def test_the_first_pair_that_is_answered_right():
    assert pick_sample(answers()) == (2, {"answered_right": 2, "of": 4})


def test_no_such_pair():
    with pytest.raises(ValueError, match="no candidate for the sample is answered right"):
        pick_sample(answers(changed=[1.0, -1.0, 1.0, 1.0]))
