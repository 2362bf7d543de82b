"""Fit the temperature and the threshold of one decision, and choose the pairs to do it on."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize_scalar

from engine.scores import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from export.evaluation.decisions import Decisions

_ROUNDING = 1e-9  # one of a hundred is a rate of 0.01, however that is computed


def needed(rate: float) -> int:
    """Return how many values that are not manipulated a threshold for this rate of false alarms takes."""
    return math.ceil((1 - _ROUNDING) / rate) - 1


def draw_half(genuine: np.ndarray, seed: int) -> np.ndarray:
    """Draw half of the items, and half of those that are `genuine` [n] bool among them; bool [n]."""
    random, taken = np.random.default_rng(seed), np.zeros(len(genuine), dtype=bool)
    for group in (np.flatnonzero(genuine), np.flatnonzero(~genuine)):
        taken[random.permutation(group)[: (len(group) + 1) // 2]] = True
    return taken


def fit_temperature(decisions: Decisions) -> float | None:
    """Return the temperature with the smallest log loss; None where there is none.

    That is so where a class is missing, where the logits part the classes without an error, and where they
    tell nothing about them.
    """
    if decisions.truth.all() or not decisions.truth.any():
        return None
    low, high = math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE)

    def loss(logarithm: float) -> float:
        return log_loss(decisions, math.exp(logarithm))

    found = float(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-8}).x)
    return math.exp(found) if low + 0.01 < found < high - 0.01 else None


def log_loss(decisions: Decisions, temperature: float) -> float:
    """Return the mean negative log likelihood of the truth, in nats; there must be a value."""
    signed = np.where(decisions.truth, decisions.margin, -decisions.margin)
    return float(np.logaddexp(0, -signed / temperature).mean())


def fit_threshold(decisions: Decisions, temperature: float, rate: float) -> float | None:
    """Return the lowest threshold whose expected rate of false alarms on new values is at most `rate`.

    Of n values that are not manipulated it flags k with (k + 1) / (n + 1) <= rate, as conformal prediction
    has it (Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005), and lies halfway to the
    next score above. None where there are fewer than `needed(rate)` of them, or too many score 1.
    """
    scores = decisions.scores(temperature)
    genuine = np.sort(scores[~decisions.truth])[::-1]
    place = math.floor(rate * (len(genuine) + 1) + _ROUNDING)
    if place < 1 or genuine[place - 1] == 1:
        return None
    last = genuine[place - 1]
    above = scores.min(initial=1.0, where=scores > last)
    return float(max((last + above) / 2, np.nextafter(last, 1)))
