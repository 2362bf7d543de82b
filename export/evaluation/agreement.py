"""Agreement of two models on the same pairs: decisions, boxes, and the pairs that differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dgm4.data.annotations import Sample
from dgm4.metrics import TOKEN_PADDING, TYPE_LOGIT, LabelledOutputs, box_iou, says_no_box
from engine.inputs.preprocess import read_size
from engine.inputs.text import CaptionTokenizer
from engine.manifest import Manifest
from engine.postprocess import read_result, sigmoid, softmax
from engine.result import Result

# Below this mean distance two outputs count as the same, and there is nothing to show.
_SAME = 1e-3
PARTS = ("score", "types", "words", "box")


@dataclass(frozen=True)
class Agreement:
    """Shares in [0, 1] of equal decisions of two models, and how far their boxes and scores lie apart.

    `verdict` counts pairs (real or manipulated), `types` every type of every pair, `all_types` pairs with
    four equal types, `tokens` tokens (NaN without any), `no_box` pairs. `box_iou` is the mean IoU of the two
    predicted boxes, 1 where both say that there is none, and `box_iou_min` the smallest. `score_change` is
    the largest change of a pair's probability of being manipulated.
    """

    verdict: float
    types: float
    all_types: float
    tokens: float
    no_box: float
    box_iou: float
    box_iou_min: float
    score_change: float

    def to_dict(self) -> dict[str, float]:
        """Return the fields."""
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """A pair on which bundle and reference disagree.

    `parts` are the distances of `disagreement`, `total` their mean. Boxes are in pixels of the stored image
    of `size`. `fake_words` says of each word whether it is labelled fake.
    """

    sample: Sample
    total: float
    parts: dict[str, float]
    size: tuple[int, int]
    caption: str
    fake_words: tuple[bool, ...]
    ours: Result
    theirs: Result

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe data."""
        return {
            "id": self.sample.id,
            "image": self.sample.image,
            "disagreement": self.total,
            **{f"{name}_change": value for name, value in self.parts.items()},
            "true": {"types": list(self.sample.types), "box": self.sample.box},
            "bundle": _answer_dict(self.ours),
            "reference": _answer_dict(self.theirs),
        }


def measure_agreement(ours: LabelledOutputs, theirs: LabelledOutputs) -> Agreement:
    """Compare two models' outputs for the same pairs."""
    types = _same(ours.logits_multicls >= TYPE_LOGIT, theirs.logits_multicls >= TYPE_LOGIT)
    valid = ours.token_labels != TOKEN_PADDING
    tokens = _same(_second_wins(ours.logits_tok), _second_wins(theirs.logits_tok))[valid]
    iou = predicted_iou(ours, theirs)
    return Agreement(
        verdict=float(
            _same(_second_wins(ours.logits_real_fake), _second_wins(theirs.logits_real_fake)).mean()
        ),
        types=float(types.mean()),
        all_types=float(types.all(axis=1).mean()),
        tokens=float(tokens.mean()) if tokens.size else float("nan"),
        no_box=float(_same(says_no_box(ours.pred_box), says_no_box(theirs.pred_box)).mean()),
        box_iou=float(iou.mean()),
        box_iou_min=float(iou.min()),
        score_change=float(disagreement(ours, theirs)[:, 0].max()),
    )


def disagreement(ours: LabelledOutputs, theirs: LabelledOutputs) -> np.ndarray:
    """Return how far two models' outputs are apart, [B, 4] in the order of PARTS, each in [0, 1].

    The change of the probability of being manipulated, the largest change over the types and over the
    tokens, and 1 - IoU of the two predicted boxes.
    """
    score = np.abs(_probability(ours.logits_real_fake) - _probability(theirs.logits_real_fake))
    types = np.abs(sigmoid(_wide(ours.logits_multicls)) - sigmoid(_wide(theirs.logits_multicls)))
    valid = ours.token_labels != TOKEN_PADDING
    tokens = np.abs(_probability(ours.logits_tok) - _probability(theirs.logits_tok)) * valid
    words = tokens.max(axis=1, initial=0.0)
    return np.column_stack([score, types.max(axis=1), words, 1 - predicted_iou(ours, theirs)])


def predicted_iou(ours: LabelledOutputs, theirs: LabelledOutputs) -> np.ndarray:
    """Return the IoU [B] of the two predicted boxes, 1 where both say that there is no box."""
    neither = says_no_box(ours.pred_box) & says_no_box(theirs.pred_box)
    return np.where(neither, 1.0, box_iou(ours.pred_box, theirs.pred_box))


def worst_cases(
    samples: Sequence[Sample],
    ours: LabelledOutputs,
    theirs: LabelledOutputs,
    count: int,
    manifest: Manifest,
    tokenizer: CaptionTokenizer,
) -> tuple[Case, ...]:
    """Return the pairs, `count` at most, whose outputs are furthest apart, the worst first.

    Raises InputError where an image has gone since it was read.
    """
    parts = disagreement(ours, theirs)
    total = parts.mean(axis=1)
    rows = [int(i) for i in np.argsort(-total, kind="stable")[:count] if total[i] > _SAME]
    return tuple(
        _read_case(samples[row], _row_of(ours, row), _row_of(theirs, row), parts[row], manifest, tokenizer)
        for row in rows
    )


def _row_of(outputs: LabelledOutputs, row: int) -> LabelledOutputs:
    """The outputs for one pair, still with the first dimension."""
    return LabelledOutputs(*(array[row : row + 1] for array in outputs))


def _read_case(
    sample: Sample,
    ours: LabelledOutputs,
    theirs: LabelledOutputs,
    parts: np.ndarray,
    manifest: Manifest,
    tokenizer: CaptionTokenizer,
) -> Case:
    """Postprocess both outputs for one pair as the Predictor does."""
    caption, tokens = tokenizer(sample.text)
    size = read_size(sample.picture)
    labels = ours.token_labels[0, : len(tokens.ids) - 1]
    fake = np.zeros(len(tokens.words), dtype=bool)
    np.logical_or.at(fake, tokens.word_of[1:], labels == 1)
    return Case(
        sample=sample,
        total=float(parts.mean()),
        parts=dict(zip(PARTS, parts.tolist(), strict=True)),
        size=size,
        caption=caption,
        fake_words=tuple(fake.tolist()),
        ours=read_result(_by_name(ours), 0, tokens, size, manifest, sample.id),
        theirs=read_result(_by_name(theirs), 0, tokens, size, manifest, sample.id),
    )


def _by_name(outputs: LabelledOutputs) -> dict[str, np.ndarray]:
    """Outputs by the names of a network's outputs."""
    names = ("logits_real_fake", "logits_multicls", "logits_tok")
    return {"box": outputs.pred_box, **{name: getattr(outputs, name) for name in names}}


def _answer_dict(answer: Result) -> dict[str, Any]:
    return {
        "score": answer.score,
        "types": answer.types,
        "box": answer.box,
        "fake_words": [word.text for word in answer.words if word.manipulated],
    }


def _same(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.equal(first, second)


def _second_wins(logits: np.ndarray) -> np.ndarray:
    return np.greater(logits[..., 1], logits[..., 0])


def _wide(logits: np.ndarray) -> np.ndarray:
    return logits.astype(np.float64)


def _probability(logits: np.ndarray) -> np.ndarray:
    """Softmax of the second of two logits, in float64."""
    return softmax(_wide(logits))[..., 1]
