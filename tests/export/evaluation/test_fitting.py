from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

from engine.postprocess import sigmoid
from export.evaluation.curves import BINS, at_threshold, judge, reliability
from export.evaluation.decisions import Decisions, rate_of
from export.evaluation.fitting import draw_half, fit_temperature, fit_threshold, needed


def drawn(count=400, seed=0, temperature=2.5, items=None):
    """Decisions whose logits are `temperature` times too large."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=count) * 1.5
    truth = random.random(count) < sigmoid(logits)
    item = np.arange(count) if items is None else random.integers(0, items, count)
    return Decisions(logits * temperature, truth, item)


@pytest.mark.parametrize("seed", range(3))
def test_the_temperature_has_the_smallest_log_loss_of_all(seed):
    decisions = drawn(seed=seed)
    found = fit_temperature(decisions)
    grid = np.exp(np.linspace(np.log(1.5), np.log(4), 301))
    losses = [log_loss(decisions.truth, decisions.scores(x)) for x in grid]
    assert found == pytest.approx(grid[np.argmin(losses)], rel=4e-3)
    assert log_loss(decisions.truth, decisions.scores(found)) <= min(losses) + 1e-9
    assert 1.7 < found < 3.7


@pytest.mark.parametrize(
    "truth", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]], ids=["none", "all", "parted", "wrong"]
)
def test_without_a_smallest_loss_there_is_no_temperature(truth):
    decisions = Decisions(np.array([-2.0, -1, 1, 2]), np.array(truth, bool), np.arange(4))
    assert fit_temperature(decisions) is None


@pytest.mark.parametrize("rate", [0.01, 0.05, 1 / 3, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_is_the_lowest_that_a_search_finds(rate, seed):
    decisions = drawn(seed=seed)
    genuine = ~decisions.truth
    allowed = rate * (genuine.sum() + 1)
    scores = decisions.scores(2.0)
    best = min(t for t in [*scores.tolist(), 2.0] if (scores[genuine] >= t).sum() + 1 <= allowed + 1e-9)
    found = fit_threshold(decisions, 2.0, rate)
    assert np.array_equal(scores >= found, scores >= best)
    assert max(scores[scores < best]) < found <= best


def test_equal_scores_are_on_one_side():
    decisions = Decisions(np.array([0.0, 0, 0, 0, 1, 3]), np.array([0, 0, 0, 0, 0, 1], bool), np.arange(6))
    assert 1 < np.log(1 / (1 / fit_threshold(decisions, 1.0, 1 / 6) - 1)) < 3
    assert 0 < np.log(1 / (1 / fit_threshold(decisions, 1.0, 1 / 3) - 1)) < 1


RATES = [(0.01, 99), (0.05, 19), (0.1, 9), (1 / 3, 2), (0.5, 1), (0.9, 1)]


@pytest.mark.parametrize(("rate", "least"), RATES)
def test_too_few_for_the_rate_give_no_threshold(rate, least):
    assert needed(rate) == least
    for count, enough in ((least, True), (least - 1, False)):
        decisions = Decisions(np.linspace(-1, 1, count), np.zeros(count, bool), np.arange(count))
        assert (fit_threshold(decisions, 1.0, rate) is not None) == enough


def test_scores_of_one_give_no_threshold():
    decisions = Decisions(np.full(200, 60.0), np.zeros(200, bool), np.arange(200))
    assert fit_threshold(decisions, 1.0, 0.01) is None
    assert fit_threshold(decisions, 5.0, 0.01) > decisions.scores(5.0)[0]


def test_new_values_have_the_promised_rate_on_average():
    rates = []
    for seed in range(300):
        random = np.random.default_rng(seed)
        fitting = Decisions(random.normal(size=99), np.zeros(99, bool), np.arange(99))
        rates.append((sigmoid(random.normal(size=500)) >= fit_threshold(fitting, 1.0, 0.05)).mean())
    assert 0.04 < np.mean(rates) <= 0.05 + 3 * np.std(rates) / 300**0.5


@pytest.mark.parametrize(("hits", "count", "expected"), [(0, 50, (0, 0.0711)), (3, 50, (0.0125, 0.1655))])
def test_the_interval_is_clopper_and_pearsons(hits, count, expected):
    flagged = np.arange(count) < hits
    found = rate_of(flagged, np.arange(count), 0.95)
    assert (found.value, found.count) == (hits / count, count)
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-4)
    turned = rate_of(~flagged, np.arange(count), 0.95)
    assert (turned.low, turned.high) == pytest.approx((1 - found.high, 1 - found.low))


def test_words_of_one_caption_count_less_than_so_many_captions():
    flagged = np.repeat(np.arange(40) < 4, 10)  # whole captions are flagged
    alone = rate_of(flagged, np.arange(400), 0.95)
    together = rate_of(flagged, np.repeat(np.arange(40), 10), 0.95)
    by_caption = rate_of(flagged[::10], np.arange(40), 0.95)
    assert alone.low > together.low == pytest.approx(by_caption.low, abs=1e-3)
    assert alone.high < together.high == pytest.approx(by_caption.high, abs=1e-3)


def test_the_interval_covers_the_rate_of_clustered_values():
    hits = 0
    for seed in range(300):
        random = np.random.default_rng(seed)
        flagged = random.random(600) < np.repeat(random.beta(1, 9, 60), 10)  # 10 % on average
        found = rate_of(flagged, np.repeat(np.arange(60), 10), 0.95)
        hits += found.low <= 0.1 <= found.high
    assert hits >= 0.92 * 300


def test_reliability_is_scikit_learns():
    decisions = drawn()
    scores = decisions.scores()
    found = reliability(decisions.truth, scores)
    shares, means = calibration_curve(decisions.truth, scores, n_bins=BINS)
    np.testing.assert_allclose([x[:2] for x in found.bins], np.column_stack([means, shares]))
    assert sum(count for _, _, count in found.bins) == 400
    weights = np.array([count for _, _, count in found.bins]) / 400
    assert found.ece == pytest.approx((np.abs(means - shares) * weights).sum())
    assert found.brier == pytest.approx(brier_score_loss(decisions.truth, scores))
    calibrated = reliability(decisions.truth, decisions.scores(fit_temperature(decisions)))
    assert calibrated.ece < found.ece / 2 and calibrated.brier < found.brier


def test_curves_are_those_of_the_metrics():
    decisions = drawn(count=60)
    found = judge(decisions, 2.0, 0.7, 0.95)
    assert np.trapezoid(*np.array(found.roc).T[::-1]) == pytest.approx(
        roc_auc_score(decisions.truth, decisions.margin)
    )
    recall, precision = np.array(found.precision_recall).T
    assert -(np.diff(recall) * precision[:-1]).sum() == pytest.approx(
        average_precision_score(decisions.truth, decisions.margin)
    )
    assert found.in_use in found.sweep
    alarms = [x.false_alarm_rate.value for x in found.sweep]
    assert alarms == sorted(alarms, reverse=True)


def test_a_long_curve_is_thinned_to_its_ends():
    found = judge(drawn(count=5000), 1.0, 0.5, 0.95)
    assert len(found.roc) <= 100
    assert (found.roc[0], found.roc[-1]) == ((0, 0), (1, 1))


@pytest.mark.parametrize("truth", [False, True])
def test_one_class_alone_has_no_roc(truth):
    found = judge(Decisions(np.array([-1.0, 2]), np.full(2, truth), np.arange(2)), 1.0, 0.5, 0.95)
    assert found.roc == ()
    assert (found.in_use.found_rate is None) != truth and (found.in_use.false_alarm_rate is None) == truth
    assert bool(found.precision_recall) == truth


def test_nothing_to_judge():
    empty = Decisions(np.zeros(0), np.zeros(0, bool), np.zeros(0, int))
    assert judge(empty, 1.0, 0.5, 0.95) is None
    reached = at_threshold(empty, 1.0, 0.5, 0.95)
    assert (reached.found, reached.passed, reached.precision, reached.false_alarm_rate) == (0, 0, None, None)


@pytest.mark.parametrize("seed", range(3))
def test_halves_have_half_of_the_genuine(seed):
    genuine = np.random.default_rng(seed).random(41) < 0.3
    chosen = draw_half(genuine, seed)
    assert chosen[genuine].sum() == (genuine.sum() + 1) // 2
    assert chosen[~genuine].sum() == ((~genuine).sum() + 1) // 2
    assert np.array_equal(chosen, draw_half(genuine, seed))
    assert not np.array_equal(chosen, draw_half(genuine, 9))
