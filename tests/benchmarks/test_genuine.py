"""The genuine photographs set aside, and the pair that the demo shows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from benchmarks import genuine
from benchmarks.sample import TYPES, candidates
from dgm4.data.sources import ASIDE, PHOTOS
from dgm4.data.subjects import SUBJECTS
from dgm4.data.vocabulary import PARTNER
from dgm4.metrics import LabelledOutputs
from engine.inputs.text import clean_caption


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(genuine, "PAIRS_EACH", 2)
    return genuine.genuine_pairs(tmp_path / "images")


def test_the_photographs_are_in_no_split(pairs):
    assert set(genuine.CAPTIONS) == set(ASIDE)
    assert not set(ASIDE) & {name for names in PHOTOS.values() for name in names}
    assert len(pairs) == 2 * len(ASIDE) == len({pair.picture for pair in pairs})
    for pair in pairs:
        assert not pair.manipulated
        with Image.open(pair.picture) as image:
            assert 256 <= min(image.size) <= max(image.size) <= 320


def test_their_captions_are_none_of_the_set():
    known = {subject for subjects, _ in SUBJECTS.values() for subject in subjects}
    for caption in itertools.chain(*genuine.CAPTIONS.values()):
        assert caption.lower() not in known


def test_false_alarms_by_photograph(pairs):
    logits = np.tile([[1.0, -1.0]], (len(pairs), 1))
    logits[0] = [-1.0, 1.0]  # the first of the first photograph's two
    logits[3] = [0.0, 0.0]  # a probability of 0.5 reaches the threshold
    nothing = np.zeros(len(pairs))
    answers = LabelledOutputs(nothing, logits, nothing, nothing, nothing, nothing, nothing)
    found = genuine.false_alarms(pairs, answers)
    assert (found["pairs"], found["false_alarms"], found["rate"]) == (10, 2, 0.2)
    first, second, *others = found["by_photograph"].values()
    assert (first, second, set(others)) == (1, 1, {0})


def test_the_candidates_for_the_sample(tmp_path):
    first, second = itertools.islice(candidates(tmp_path), 2)
    assert first.picture != second.picture and first.text == second.text
    for sample in (first, second):
        assert sample.types == TYPES
        words = clean_caption(sample.text).text.split()
        assert [words[i] for i in sample.fake_words if words[i] in PARTNER] != []
    x1, y1, x2, y2 = first.box
    with Image.open(first.picture) as image:
        assert 0 <= x1 < x2 <= image.width and 0 <= y1 < y2 <= image.height
