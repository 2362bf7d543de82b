"""What a network decided on annotated pairs, their types and their words, and rates with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv

from dgm4.config import TYPES
from dgm4.data.annotations import Sample
from dgm4.metrics import LabelledOutputs
from engine.errors import NumericalError
from engine.inputs.text import Tokens
from engine.postprocess import sigmoid
from engine.scores import DECISIONS, Rate


class Decisions(NamedTuple):
    """Logits for "manipulated" of n pairs, types or words, and the truth.

    margin [n] float64, a logit or the difference of two; truth [n] bool; item [n] int, the news item that
    each belongs to: what comes from one item is not independent.
    """

    margin: np.ndarray
    truth: np.ndarray
    item: np.ndarray

    def scores(self, temperature: float = 1.0) -> np.ndarray:
        """Return the scores in [0, 1] that a Predictor gives at this temperature."""
        return sigmoid(self.margin / temperature)

    def where(self, taken: np.ndarray) -> Decisions:
        """Return those that `taken` [n] is true of."""
        return Decisions(*(array[taken] for array in self))


def read_decisions(
    samples: Sequence[Sample], tokens: Sequence[Tokens], outputs: LabelledOutputs
) -> dict[str, Decisions]:
    """Return the decisions by name, as `engine.scores.DECISIONS` lists them.

    Raises NumericalError where a logit is NaN or infinite.
    """
    items = np.unique([sample.id for sample in samples], return_inverse=True)[1]
    pairs = np.diff(outputs.logits_real_fake.astype(np.float64))[:, 0]
    types = outputs.logits_multicls.astype(np.float64)
    truth = np.array([[name in sample.types for name in TYPES] for sample in samples])
    columns = [
        Decisions(pairs, truth.sum(axis=1) > 0, items),
        *(Decisions(types[:, k], truth[:, k], items) for k in range(len(TYPES))),
        _read_words(tokens, outputs, items),
    ]
    for name, decisions in zip(DECISIONS, columns, strict=True):
        if not np.isfinite(decisions.margin).all():
            raise NumericalError(f"{name}: the network's logits hold NaN or infinity")
    return dict(zip(DECISIONS, columns, strict=True))


def _read_words(tokens: Sequence[Tokens], outputs: LabelledOutputs, items: np.ndarray) -> Decisions:
    """A word has the largest margin of its tokens, as a Predictor reads it."""
    margins = np.diff(outputs.logits_tok.astype(np.float64))[..., 0]
    rows = []
    for row, caption in enumerate(tokens):
        length = len(caption.ids) - 1
        with np.errstate(invalid="ignore"):  # NaN is looked for in the result
            margin = caption.by_word(margins[row, :length])
        truth = caption.by_word(outputs.token_labels[row, :length] == 1)
        rows.append(Decisions(margin, truth, np.full(len(truth), items[row])))
    return Decisions(*map(np.concatenate, zip(*rows, strict=True)))


def rate_of(flagged: np.ndarray, item: np.ndarray, level: float) -> Rate:
    """Return the share of true values in `flagged` [n], n >= 1, and its exact interval.

    Clopper and Pearson's interval (Biometrika 26, 1934), for the size that the sample has in effect where
    several values come from one item (Korn and Graubard, Survey Methodology 24, 1998).
    """
    count, share = len(flagged), float(flagged.mean())
    size = _effective_size(flagged, item)
    hits, tail = share * size, (1 - level) / 2
    low = 0.0 if share == 0 else float(betaincinv(hits, size - hits + 1, tail))
    high = 1.0 if share == 1 else float(betaincinv(hits + 1, size - hits, 1 - tail))
    return Rate(share, low, high, count)


def _effective_size(flagged: np.ndarray, item: np.ndarray) -> float:
    """Between the number of items and that of values, by the variance between items."""
    _, index, sizes = np.unique(item, return_inverse=True, return_counts=True)
    count, items, share = len(flagged), len(sizes), flagged.mean()
    if items in (1, count):
        return float(items)
    apart = np.bincount(index, weights=flagged) - share * sizes
    variance = items / (items - 1) * (apart**2).sum() / count**2
    return float(np.clip(share * (1 - share) / variance, items, count)) if variance > 0 else float(items)
