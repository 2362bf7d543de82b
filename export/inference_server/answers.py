"""What a served Predictor takes and gives: the tensors of a pair and of its answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from engine.registry.config import TYPES
from engine.result import Result

# Name, type and dimensions without the batch; a dimension of -1 is as long as the answer needs.
Spec = tuple[str, str, tuple[int, ...]]
PAIR: tuple[Spec, ...] = (("image", "STRING", (1,)), ("caption", "STRING", (1,)))
ANSWER: tuple[Spec, ...] = (
    ("score", "FP32", (1,)),
    ("types", "FP32", (len(TYPES),)),
    ("box", "FP32", (4,)),
    ("words", "INT32", (-1, 2)),
    ("word_scores", "FP32", (-1,)),
    ("prediction", "STRING", (1,)),
)
# What the model before a network hands on to the one after it: the note of a prepared picture.
PIXELS, PICTURE = "pixels", "picture"
BUNDLE = "bundle"  # the folder beside model.py
# Where a pair has no such answer; JSON has no NaN, and no score and no pixel is below 0.
NOTHING = -1.0


def answer_tensors(results: Sequence[Result]) -> dict[str, np.ndarray]:
    """The tensors of `ANSWER` for the results of one request, first the batch.

    `words` are the spans of the words in the caption, `prediction` is the whole answer as JSON in UTF-8.
    Words that another caption of the request has more have the span (-1, -1) and the score -1.
    """
    most = max(len(result.words) for result in results)
    words = np.full((len(results), most, 2), int(NOTHING), np.int32)
    word_scores = np.full((len(results), most), NOTHING, np.float32)
    for row, result in enumerate(results):
        for column, word in enumerate(result.words):
            words[row, column] = word.start, word.end
            word_scores[row, column] = word.score
    return {
        "score": _numbers([result.score] for result in results),
        "types": _numbers([result.types[kind] for kind in TYPES] for result in results),
        "box": _numbers(result.box or [None] * 4 for result in results),
        "words": words,
        "word_scores": word_scores,
        "prediction": np.array([[result.to_json().encode()] for result in results], dtype=object),
    }


def _numbers(rows: Iterable[Sequence[float | None]]) -> np.ndarray:
    return np.array([[NOTHING if x is None else x for x in row] for row in rows], np.float32)
