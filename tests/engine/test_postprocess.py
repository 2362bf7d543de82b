from __future__ import annotations

import numpy as np
import pytest

from engine import Bundle
from engine.errors import NumericalError
from engine.inputs.text import Span, Tokens
from engine.postprocess import read_box, read_heatmap, read_result, read_words, sigmoid, softmax


def tokens_of(word_of: list[int]) -> Tokens:
    words = tuple(Span(f"w{i}", 3 * i, 3 * i + 2) for i in range(max(word_of) + 1))
    return Tokens(np.arange(len(word_of)), np.array(word_of), words, ())


def outputs_of(batch: int, tokens: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "logits_real_fake": generator.normal(size=(batch, 2)).astype(np.float32),
        "logits_multicls": generator.normal(size=(batch, 4)).astype(np.float32),
        "box": np.full((batch, 4), 0.5, np.float32),
        "logits_tok": generator.normal(size=(batch, tokens - 1, 2)).astype(np.float32),
        "attention_map": generator.normal(size=(batch, tokens, 257)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def manifest(bundle_dir):
    return Bundle.open(bundle_dir).manifest


def test_softmax_and_sigmoid_never_overflow():
    with np.errstate(all="raise", under="ignore"):
        assert softmax(np.array([-1e300, 1e300])).tolist() == [0, 1]
        assert sigmoid(np.array([-1e300, 0, 1e300])).tolist() == [0, 0.5, 1]
    values = np.linspace(-20, 20, 101)
    np.testing.assert_allclose(sigmoid(values), 1 / (1 + np.exp(-values)), rtol=1e-14)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([0.5, 0.5, 0.2, 0.4], (80, 15, 120, 35)),
        ([0.0, 0.0, 0.5, 0.5], (0, 0, 50, 12.5)),
        ([1.0, 1.0, 1.0, 1.0], (100, 25, 200, 50)),
        ([0.5, 0.5, 2.0, 2.0], (0, 0, 200, 50)),
        ([0.5, 0.5, 0.0, 0.5], None),
        ([0.0, 0.0, 1e-4, 1e-4], None),
        ([4e-5, 4e-5, 1e-4, 1e-4], None),
        ([2.0, 0.5, 0.1, 0.1], None),
    ],
)
def test_boxes(box, expected):
    result = read_box(np.array(box), (200, 50))
    assert result == (None if expected is None else pytest.approx(expected))


def test_a_words_score_is_its_largest_tokens():
    logits = np.array([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0], [5.0, 0.0]])
    words = read_words(logits, tokens_of([-1, 0, 0, 0, 1]), 0.5)
    assert [word.score for word in words] == pytest.approx([1 / (1 + np.exp(-3)), 1 / (1 + np.exp(5))])
    assert [word.manipulated for word in words] == [True, False]
    assert (words[1].text, words[1].start, words[1].end) == ("w1", 3, 5)


def test_the_heatmap_leaves_out_both_cls():
    scores = np.full((3, 257), -100.0)
    scores[:, 0] = 100
    scores[0] = 100
    scores[1, 1] = 100
    scores[1:, 2] = 100
    heatmap = read_heatmap({"attention_map": scores}, 16)
    assert heatmap.shape == (16, 16)
    assert heatmap.dtype == np.float32
    assert heatmap[0, :3].tolist() == pytest.approx([0.5, 1, 0])
    assert heatmap.sum() == pytest.approx(1.5)
    assert read_heatmap({"attention_map": scores[:1]}, 16).min() == 1
    assert read_heatmap({"box": np.zeros(4)}, 16) is None


def test_padding_does_not_reach_the_answer(manifest):
    outputs = outputs_of(2, 6)
    tokens = tokens_of([-1, 0, 1])
    first = read_result(outputs, 1, tokens, (10, 10), manifest, "item 1")
    for name in ("logits_tok", "attention_map"):
        outputs[name][1, 3:] = np.nan
    outputs["logits_tok"][1, 2:] = np.nan
    again = read_result(outputs, 1, tokens, (10, 10), manifest, "item 1")
    assert (first.score, first.types, first.words) == (again.score, again.types, again.words)
    assert np.array_equal(first.heatmap, again.heatmap)


@pytest.mark.parametrize(
    "name", ["logits_real_fake", "logits_multicls", "box", "logits_tok", "attention_map"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_score_is_made_of_a_value_that_is_not_finite(manifest, name, value):
    outputs = outputs_of(2, 3)
    outputs[name][1].flat[-1] = value
    tokens = tokens_of([-1, 0, 1])
    read_result(outputs, 0, tokens, (10, 10), manifest, "item 0")
    with pytest.raises(NumericalError, match=f"item 1: the network's {name} holds NaN or infinity"):
        read_result(outputs, 1, tokens, (10, 10), manifest, "item 1")


def test_a_model_without_a_map_has_no_heatmap(manifest):
    outputs = outputs_of(1, 3)
    del outputs["attention_map"]
    assert read_result(outputs, 0, tokens_of([-1, 0, 1]), (10, 10), manifest, "x").heatmap is None
