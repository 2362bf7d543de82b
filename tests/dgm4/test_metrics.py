from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn import metrics as sklearn_metrics

from dgm4.config import TYPES
from dgm4.metrics import (
    LabelledOutputs,
    benchmark_iou,
    bootstrap,
    bootstrap_difference,
    box_iou,
    per_type,
    says_no_box,
    summarise,
)
from engine.errors import InputError, NumericalError

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics.npz"
FIELDS = LabelledOutputs._fields
NONE = (0.0, 0.0, 0.0, 0.0)
FACE = (0.5, 0.5, 0.2, 0.2)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        expected = json.loads(str(file["expected"].item()))
        return LabelledOutputs(*(file[name] for name in FIELDS)), expected


def made(count=40, tokens=7, seed=0, ties=False):
    """Random answers with every kind of label; `ties` rounds the logits so that many are equal."""
    random = np.random.default_rng(seed)
    names = ["orig", "face_swap", "face_attribute&text_swap", "text_attribute", "face_swap&text_attribute"]
    labels = np.array(names)[random.integers(len(names), size=count)]
    with_face = np.char.startswith(labels, "face")
    labels_tok = random.integers(0, 2, (count, tokens))
    labels_tok[np.arange(tokens) >= random.integers(1, tokens + 1, (count, 1))] = -100
    logits = [random.normal(size=(count, *shape)) for shape in ((2,), (4,), (tokens, 2))]
    if ties:
        logits = [np.rint(2 * x) / 2 for x in logits]
    true_box = np.where(with_face[:, None], random.uniform(0.2, 0.6, (count, 4)), 0)
    pred_box = np.where(random.random((count, 1)) < 0.5, true_box, random.uniform(0.2, 0.6, (count, 4)))
    return LabelledOutputs(labels, logits[0], logits[1], pred_box, true_box, logits[2], labels_tok)


def taken(answers, index):
    return LabelledOutputs(*(array[index] for array in answers))


def plain(answers):
    """The metrics again, by scikit-learn and scipy, one by one."""
    a = answers
    fake = (a.labels != "orig").astype(int)
    types = np.array([[kind in label.split("&") for kind in TYPES] for label in a.labels]).astype(int)
    score = a.logits_real_fake[:, 1] - a.logits_real_fake[:, 0]
    false_rate, true_rate, _ = sklearn_metrics.roc_curve(fake, score)
    curve = interp1d(false_rate, true_rate)
    guess = (a.logits_multicls >= 0).astype(int)
    valid = a.token_labels != -100
    true_tok, guess_tok = a.token_labels[valid], a.logits_tok.argmax(-1)[valid]
    f1 = sklearn_metrics.f1_score
    return {
        "AUC": sklearn_metrics.roc_auc_score(fake, score),
        "EER": brentq(lambda x: 1.0 - x - curve(x), 0.0, 1.0),
        "ACC": sklearn_metrics.accuracy_score(fake, a.logits_real_fake.argmax(1)),
        "mAP": sklearn_metrics.average_precision_score(types, a.logits_multicls, average="macro"),
        "OP": sklearn_metrics.precision_score(types, guess, average="micro", zero_division=0),
        "OR": sklearn_metrics.recall_score(types, guess, average="micro", zero_division=0),
        "OF1": f1(types, guess, average="micro", zero_division=0),
        "CP": sklearn_metrics.precision_score(types, guess, average="macro", zero_division=0),
        "CR": sklearn_metrics.recall_score(types, guess, average="macro", zero_division=0),
        "text_ACC": sklearn_metrics.accuracy_score(true_tok, guess_tok),
        "text_P": sklearn_metrics.precision_score(true_tok, guess_tok, zero_division=0),
        "text_R": sklearn_metrics.recall_score(true_tok, guess_tok, zero_division=0),
        "text_F1": f1(true_tok, guess_tok, zero_division=0),
    }


def test_the_benchmarks_own_numbers(golden):
    answers, expected = golden
    found = summarise(*answers)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_scikit_learn_and_scipy(seed, ties):
    answers = made(200, seed=seed, ties=ties)
    found = summarise(*answers)
    expected = plain(answers)
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-9)


def test_per_type_agrees_with_scikit_learn(golden):
    answers, expected = golden
    found = per_type(answers.labels, answers.logits_multicls)
    assert tuple(found) == TYPES
    assert np.mean([scores["AP"] for scores in found.values()]) == pytest.approx(expected["mAP"], abs=1e-6)
    for k, kind in enumerate(TYPES):
        true = np.array([kind in label for label in answers.labels])
        logit = answers.logits_multicls[:, k]
        assert found[kind]["positives"] == true.sum()
        assert found[kind]["AUC"] == pytest.approx(sklearn_metrics.roc_auc_score(true, logit))
        assert found[kind]["F1"] == pytest.approx(sklearn_metrics.f1_score(true, logit >= 0))


def test_equal_error_of_a_symmetrical_case():
    labels = np.array(["orig"] * 4 + ["text_swap"] * 4)
    margin = np.array([0.0, 1, 2, 3, 1, 2, 3, 4])
    answers = made(8)._replace(labels=labels, logits_real_fake=np.stack([-margin / 2, margin / 2], axis=1))
    # ROC: (0, .25) (.25, .5) (.5, .75) ...: it meets 1 - x at x = 0.375.
    assert summarise(*answers)["EER"] == pytest.approx(0.375)
    # Won pairs plus half the ties: 0 beats none of 4, and so on: (4 + 3.5 + 2.5 + 1.5) / 16.
    assert summarise(*answers)["AUC"] == pytest.approx(11.5 / 16)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (FACE, FACE, 1.0),
        (FACE, (0.6, 0.5, 0.2, 0.2), 1 / 3),
        (FACE, (0.5, 0.5, 0.1, 0.1), 0.25),
        (FACE, (0.6, 0.6, 0.2, 0.2), 1 / 7),
        (FACE, (0.9, 0.9, 0.1, 0.1), 0.0),
        (FACE, (0.7, 0.5, 0.2, 0.2), 0.0),
        (NONE, NONE, 0.0),
    ],
)
def test_iou_by_hand(first, second, expected):
    assert box_iou(np.array([first]), np.array([second])) == pytest.approx([expected])


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        (NONE, 1.0),
        ((4e-5, 4e-5, 4e-5, 4e-5), 1.0),
        ((4e-5, 4e-5, 4e-5, 2e-4), 0.0),
        ((9.9e-5, 0.0, 0.0, 0.0), 1.0),
        ((1.1e-4, 0.0, 0.0, 0.0), 0.0),
        ((0.5, 0.5, 0.0, 0.0), 0.0),
        (FACE, 0.0),
    ],
)
def test_without_a_true_box_only_no_box_counts(predicted, expected):
    assert benchmark_iou(np.array([predicted]), np.array([NONE])) == expected
    assert says_no_box(np.array([predicted])) == bool(expected)


def test_no_box_where_there_is_one_is_a_miss():
    assert benchmark_iou(np.array([NONE]), np.array([FACE])) == 0


def test_thresholds_are_exceeded_strictly():
    true = np.array([[0.5, 0.5, 0.5, 0.5]])
    half = np.array([[0.5, 0.5, 0.25, 0.5]])  # exact in binary: IoU 0.5
    answers = taken(made(2), [0])._replace(labels=np.array(["face_swap"]), true_box=true, pred_box=half)
    found = summarise(*answers)
    assert (found["IoUmean"], found["IoU50"]) == (0.5, 0.0)
    assert summarise(*answers._replace(pred_box=half + [[0, 0, 1e-6, 0]]))["IoU50"] == 1.0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 60), ties=st.booleans())
def test_the_order_of_pairs_does_not_count(seed, count, ties):
    answers = made(count, seed=seed, ties=ties)
    order = np.random.default_rng(seed).permutation(count)
    shuffled = summarise(*taken(answers, order))
    assert shuffled == pytest.approx(summarise(*answers), abs=1e-12, nan_ok=True)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), more=st.integers(1, 9), fill=st.sampled_from([0.0, 50.0, math.nan]))
def test_padding_does_not_count(seed, more, fill):
    answers = made(30, seed=seed)
    padded = answers._replace(
        logits_tok=np.pad(answers.logits_tok, ((0, 0), (0, more), (0, 0)), constant_values=fill),
        token_labels=np.pad(answers.token_labels, ((0, 0), (0, more)), constant_values=-100),
    )
    assert summarise(*padded) == summarise(*answers)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), ties=st.booleans())
def test_taking_every_pair_twice_changes_nothing(seed, ties):
    answers = made(25, seed=seed, ties=ties)
    doubled = taken(answers, np.repeat(np.arange(25), 2))
    assert summarise(*doubled) == pytest.approx(summarise(*answers), abs=1e-12, nan_ok=True)


def test_saturated_scores_still_rank():
    # As float32 probabilities both would be 1, and the AUC 0.5.
    answers = made(2)._replace(
        labels=np.array(["orig", "text_swap"]), logits_real_fake=np.array([[-20, 20], [-30, 30]], np.float32)
    )
    assert summarise(*answers)["AUC"] == 1


def test_one_class_alone():
    pristine = made(12)._replace(labels=np.full(12, "orig"), true_box=np.zeros((12, 4)))
    found = summarise(*pristine)
    assert all(math.isnan(found[key]) for key in ("AUC", "EER", "mAP", "CP", "CR", "CF1"))
    assert (found["OP"], found["OR"], found["OF1"]) == (0, 0, 0)
    assert found["ACC"] == np.mean(pristine.logits_real_fake.argmax(1) == 0)
    intervals = bootstrap(pristine, repeats=20)
    assert all(map(math.isnan, intervals["AUC"]))
    assert 0 <= intervals["ACC"][0] <= intervals["ACC"][1] <= 1
    assert math.isnan(per_type(pristine.labels, pristine.logits_multicls)["face_swap"]["AP"])


def test_absent_types_are_left_out_of_the_means():
    answers = made(60)
    labels = np.where(np.arange(60) % 2, "face_swap", "orig")
    found = summarise(*answers._replace(labels=labels))
    alone = per_type(labels, answers.logits_multicls)["face_swap"]
    assert (found["mAP"], found["CP"], found["CR"]) == pytest.approx((alone["AP"], alone["P"], alone["R"]))


def test_nothing_predicted():
    answers = made(20)
    silent = answers._replace(
        logits_multicls=np.full((20, 4), -1.0),
        logits_tok=np.stack([np.ones((20, 7)), np.zeros((20, 7))], axis=-1),
    )
    found = summarise(*silent)
    assert [found[key] for key in ("OP", "OR", "OF1", "CP", "CR", "CF1")] == [0] * 6
    assert [found[key] for key in ("text_P", "text_R", "text_F1")] == [0] * 3


@pytest.mark.parametrize("width", [0, 3])
def test_without_tokens_the_text_metrics_are_nan(width):
    answers = made(10)._replace(logits_tok=np.zeros((10, width, 2)), token_labels=np.full((10, width), -100))
    found = summarise(*answers)
    assert all(math.isnan(found[key]) for key in ("text_ACC", "text_P", "text_R", "text_F1"))
    assert not math.isnan(found["AUC"])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("labels", lambda x: x[:0], "at least one pair"),
        ("labels", lambda x: np.where(np.arange(40) == 3, "face_swop", x), "'face_swop'"),
        ("labels", lambda x: np.where(np.arange(40) == 3, "", x), "''"),
        ("logits_real_fake", lambda x: x[:-1], r"\(40, 2\), got \(39, 2\)"),
        ("logits_multicls", lambda x: x[:, :3], r"\(40, 4\), got \(40, 3\)"),
        ("pred_box", lambda x: x.ravel(), r"pred_box"),
        ("true_box", lambda x: x[:, :2], r"true_box"),
        ("true_box", lambda x: x - 1, "w and h >= 0"),
        ("true_box", lambda x: x * np.nan, "finite"),
        ("logits_tok", lambda x: x[:, :-1], r"\(40, 7, 2\), got \(40, 6, 2\)"),
        ("token_labels", lambda x: x[0], "token_labels"),
        ("token_labels", lambda x: x + 1, "0, 1 and -100"),
    ],
)
def test_arrays_that_cannot_be_are_refused(name, change, message):
    answers = made(40)
    with pytest.raises(InputError, match=message):
        summarise(*answers._replace(**{name: change(getattr(answers, name))}))


@pytest.mark.parametrize("name", ["logits_real_fake", "logits_multicls", "pred_box", "logits_tok"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_score_is_made_of_nan(name, value):
    answers = made(40)
    array = getattr(answers, name).copy()
    array[5, 0] = value
    with pytest.raises(NumericalError, match=f"{name}: NaN or infinite in 1 of 40 rows, first in row 5"):
        summarise(*answers._replace(**{name: array}))


@pytest.mark.parametrize(("repeats", "level"), [(0, 0.95), (10, 0.0), (10, 1.0), (10, math.nan)])
def test_a_bootstrap_that_cannot_be_is_refused(repeats, level):
    with pytest.raises(InputError, match="repeats"):
        bootstrap(made(10), repeats=repeats, level=level)


def test_a_resample_is_the_metric_of_the_resampled_pairs(monkeypatch):
    answers = made(50, ties=True)
    drawn = np.random.default_rng(3).integers(50, size=50)
    counts = np.bincount(drawn, minlength=50).astype(float)[None]
    monkeypatch.setattr("dgm4.metrics._resamples", lambda *_: iter([counts]))
    intervals = bootstrap(answers, repeats=1)
    again = summarise(*taken(answers, drawn))
    assert {key: low for key, (low, _) in intervals.items()} == pytest.approx(again, abs=1e-12)


def test_chunks_do_not_change_the_interval(monkeypatch):
    answers = made(30)
    whole = bootstrap(answers, repeats=25, seed=4)
    monkeypatch.setattr("dgm4.metrics._CHUNK", 90)
    for key, interval in bootstrap(answers, repeats=25, seed=4).items():
        assert interval == pytest.approx(whole[key], abs=1e-12)


def test_the_interval_covers_a_known_binomial():
    """ACC of 60 pairs that are right with probability 0.8; 95 % intervals hold it about that often."""
    random = np.random.default_rng(11)
    answers = made(60)
    covered = 0
    for _ in range(200):
        right = random.random(60) < 0.8
        fake = answers.labels != "orig"
        margin = np.where(right == fake, 1.0, -1.0)
        low, high = bootstrap(
            answers._replace(logits_real_fake=np.stack([-margin, margin], axis=1)), repeats=200
        )["ACC"]
        covered += low <= 0.8 <= high
    # 200 draws of 0.93 or so (percentile intervals of a coarse binomial are a little short).
    assert 175 <= covered <= 199


def test_the_interval_has_the_width_of_the_normal_approximation():
    answers = made(400, seed=5)
    accuracy = summarise(*answers)["ACC"]
    low, high = bootstrap(answers, repeats=2000, level=0.95)["ACC"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(accuracy * (1 - accuracy) / 400), rel=0.1)


def test_a_model_does_not_differ_from_itself():
    answers = made(50)
    assert set(bootstrap_difference(answers, answers, repeats=30).values()) == {(0.0, 0.0)}


def test_paired_differences_are_narrower_than_unpaired():
    reference = made(300, seed=2)
    noise = np.random.default_rng(0).normal(scale=0.05, size=(300, 2))
    answers = reference._replace(logits_real_fake=reference.logits_real_fake + noise)
    paired = bootstrap_difference(answers, reference, repeats=200)["AUC"]
    alone = bootstrap(answers, repeats=200)["AUC"]
    assert paired[1] - paired[0] < 0.5 * (alone[1] - alone[0])
    change = summarise(*answers)["AUC"] - summarise(*reference)["AUC"]
    assert paired[0] <= change <= paired[1]


@pytest.mark.parametrize("name", ["labels", "true_box", "token_labels"])
def test_models_on_other_pairs_are_not_compared(name):
    answers = made(10)
    other = answers._replace(**{name: getattr(answers, name)[::-1]})
    with pytest.raises(InputError, match=f"same pairs, got different {name}"):
        bootstrap_difference(answers, other)


def test_large_sets_take_no_loop_of_python(golden, count_calls):
    """Arrays are as long as the set; the calls of their functions are not."""
    calls = [
        count_calls(lambda n=n: summarise(*taken(golden[0], np.arange(n) % 400)))[1] for n in (400, 4000)
    ]
    assert calls[1] < 1.5 * calls[0] + 4000
    few = taken(golden[0], np.arange(800) % 400)
    calls = [count_calls(lambda r=r: bootstrap(few, repeats=r))[1] for r in (10, 20)]
    assert calls[1] < 2.1 * calls[0]
