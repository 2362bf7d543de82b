"""Agreement of two models on the same pairs: decisions, boxes, and the pairs that differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dgm4.data.annotations import Sample
from dgm4.metrics import TOKEN_PADDING, LabelledOutputs, box_iou, says_no_box
from engine.cards.card import FACE_TYPES
from engine.inputs.preprocess import read_size
from engine.inputs.text import CaptionTokenizer
from engine.manifest import Manifest
from engine.postprocess import read_result, sigmoid, softmax
from engine.result import Result

# Two boxes with at least this IoU look the same.
_SAME_BOX = 0.9
PARTS = ("score", "types", "words", "box")


@dataclass(frozen=True)
class Agreement:
    """Shares in [0, 1] of equal decisions of two models, and how far their boxes and scores lie apart.

    Both decide by the bundle's temperatures and thresholds. `verdict` counts pairs, `types` every type of
    every pair, `all_types` pairs with four equal types, `tokens` tokens (NaN without any), `no_box` pairs.
    `box_iou` is the mean IoU of the two predicted boxes, 1 where both say that there is none, and
    `box_iou_min` the smallest. `score_change` is the largest change of a pair's score.
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

    `changes` names what a reader sees differ, as `visible_changes` does. `parts` are the distances of
    `disagreement`, `total` their mean. Boxes are in pixels of the stored image of `size`. `fake_words` says
    of each word whether it is labelled manipulated.
    """

    sample: Sample
    changes: tuple[str, ...]
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
            "changes": list(self.changes),
            "disagreement": self.total,
            **{f"{name}_change": value for name, value in self.parts.items()},
            "true": {"types": list(self.sample.types), "box": self.sample.box},
            "bundle": _answer_dict(self.ours),
            "reference": _answer_dict(self.theirs),
        }


def measure_agreement(ours: LabelledOutputs, theirs: LabelledOutputs, manifest: Manifest) -> Agreement:
    """Compare two models' outputs for the same pairs."""
    verdict, types, tokens = _same_decisions(ours, theirs, manifest)
    valid = tokens[ours.token_labels != TOKEN_PADDING]
    iou = predicted_iou(ours, theirs)
    return Agreement(
        verdict=float(verdict.mean()),
        types=float(types.mean()),
        all_types=float(types.all(axis=1).mean()),
        tokens=float(valid.mean()) if valid.size else float("nan"),
        no_box=float(np.equal(says_no_box(ours.pred_box), says_no_box(theirs.pred_box)).mean()),
        box_iou=float(iou.mean()),
        box_iou_min=float(iou.min()),
        score_change=float(disagreement(ours, theirs, manifest)[:, 0].max()),
    )


def disagreement(ours: LabelledOutputs, theirs: LabelledOutputs, manifest: Manifest) -> np.ndarray:
    """Return how far two models' outputs are apart, [B, 4] in the order of PARTS, each in [0, 1].

    The change of the probability of being manipulated, the largest change over the types and over the
    tokens, and 1 - IoU of the two predicted boxes.
    """
    verdict, types, tokens = (
        np.abs(first - second)
        for first, second in zip(_scores(ours, manifest), _scores(theirs, manifest), strict=True)
    )
    words = (tokens * (ours.token_labels != TOKEN_PADDING)).max(axis=1, initial=0.0)
    return np.column_stack([verdict, types.max(axis=1), words, 1 - predicted_iou(ours, theirs)])


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
    """Return the pairs, `count` at most, that a reader sees differ, the worst first.

    Another verdict weighs most, then other types, other words, a box that moved. Raises InputError where an
    image has gone since it was read.
    """
    if not count:
        return ()
    parts = disagreement(ours, theirs, manifest)
    verdict, types, tokens = _same_decisions(ours, theirs, manifest)
    padding = ours.token_labels == TOKEN_PADDING
    same = verdict & types.all(axis=1) & (tokens | padding).all(axis=1) & (parts[:, 3] <= 1 - _SAME_BOX)
    cases = [
        _read_case(samples[row], _row_of(ours, row), _row_of(theirs, row), parts[row], manifest, tokenizer)
        for row in np.flatnonzero(~same).tolist()
    ]
    return tuple(sorted((case for case in cases if case.changes), key=_gravity, reverse=True)[:count])


def visible_changes(ours: Result, theirs: Result, iou: float) -> tuple[str, ...]:
    """Name what a reader of two predictions sees differ: "verdict", types, "2 words", "box".

    `iou` is that of the two predicted boxes. Types and boxes are shown of a pair that is manipulated, a box
    only where a face type is detected.
    """
    words = sum(a.manipulated != b.manipulated for a, b in zip(ours.words, theirs.words, strict=True))
    types = set(shown_types(ours)) ^ set(shown_types(theirs))
    boxes = shown_box(ours), shown_box(theirs)
    return (
        *(["verdict"] if ours.manipulated != theirs.manipulated else []),
        *(name.replace("_", " ") for name in ours.types if name in types),
        *([f"{words} word{'s' * (words > 1)}"] if words else []),
        *(["box"] if (boxes[0] is None) != (boxes[1] is None) or (all(boxes) and iou < _SAME_BOX) else []),
    )


def shown_box(result: Result) -> tuple[float, float, float, float] | None:
    """Return the box that a reader is shown."""
    return result.box if FACE_TYPES & set(shown_types(result)) else None


def shown_types(result: Result) -> tuple[str, ...]:
    """Return the types that a reader is shown."""
    return result.detected if result.manipulated else ()


def _gravity(case: Case) -> tuple[bool, int, int, float]:
    words = zip(case.ours.words, case.theirs.words, strict=True)
    return (
        case.ours.manipulated != case.theirs.manipulated,
        len(set(shown_types(case.ours)) ^ set(shown_types(case.theirs))),
        sum(ours.manipulated != theirs.manipulated for ours, theirs in words),
        case.total,
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
    fake = tokens.by_word(labels == 1)
    first, second = (
        read_result(_by_name(outputs), 0, tokens, size, manifest, sample.id) for outputs in (ours, theirs)
    )
    return Case(
        sample=sample,
        changes=visible_changes(first, second, 1 - float(parts[3])),
        total=float(parts.mean()),
        parts=dict(zip(PARTS, parts.tolist(), strict=True)),
        size=size,
        caption=caption,
        fake_words=tuple(fake.tolist()),
        ours=first,
        theirs=second,
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


def _scores(outputs: LabelledOutputs, manifest: Manifest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of the pairs [B], the types [B, 4] and the tokens [B, T], in float64."""
    temperatures = vars(manifest.temperatures)
    by_type = [temperatures[name] for name in manifest.types]
    return (
        softmax(outputs.logits_real_fake.astype(np.float64) / temperatures["manipulated"])[..., 1],
        sigmoid(outputs.logits_multicls.astype(np.float64) / by_type),
        softmax(outputs.logits_tok.astype(np.float64) / temperatures["words"])[..., 1],
    )


def _same_decisions(
    ours: LabelledOutputs, theirs: LabelledOutputs, manifest: Manifest
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether two models decide alike on the pairs [B], the types [B, 4] and the tokens [B, T]."""
    thresholds = vars(manifest.thresholds)
    limits = thresholds["manipulated"], [thresholds[name] for name in manifest.types], thresholds["words"]
    verdict, types, tokens = (
        np.equal(first >= limit, second >= limit)
        for first, second, limit in zip(
            _scores(ours, manifest), _scores(theirs, manifest), limits, strict=True
        )
    )
    return verdict, types, tokens
