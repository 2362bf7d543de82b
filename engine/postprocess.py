"""Decides on one pair from a network's outputs: scores in float64, and an error for non-finite outputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.errors import NumericalError
from engine.inputs.text import Tokens
from engine.manifest import Manifest
from engine.registry import TENSORS
from engine.result import Result, Word

# The benchmark's test for "no box": all four corner values below this.
_NO_BOX = 1e-4


def read_result(
    outputs: Mapping[str, np.ndarray],
    index: int,
    tokens: Tokens,
    size: tuple[int, int],
    manifest: Manifest,
    name: str,
) -> Result:
    """Decide on item `index` of a batch's outputs; `name` is what messages call the item.

    `size` is the upright image's (width, height). Raises NumericalError for NaN or infinity.
    """
    item = _valid_part(outputs, index, len(tokens.ids))
    for output, values in item.items():
        if not np.isfinite(values).all():
            raise NumericalError(
                f"{name}: the network's {output} holds NaN or infinity; no score is made of it"
            )
    thresholds, temperatures = vars(manifest.thresholds), vars(manifest.temperatures)
    score = float(softmax(item["logits_real_fake"] / temperatures["manipulated"])[1])
    by_type = item["logits_multicls"] / [temperatures[name] for name in manifest.types]
    types = dict(zip(manifest.types, sigmoid(by_type).tolist(), strict=True))
    return Result(
        manipulated=score >= thresholds["manipulated"],
        score=score,
        types=types,
        detected=tuple(kind for kind, value in types.items() if value >= thresholds[kind]),
        box=read_box(item["box"], size),
        words=read_words(item["logits_tok"] / temperatures["words"], tokens, thresholds["words"]),
        size=size,
        thresholds=dict(thresholds),
        heatmap=read_heatmap(item, manifest.model.config.grid),
    )


def _valid_part(outputs: Mapping[str, np.ndarray], index: int, length: int) -> dict[str, np.ndarray]:
    """One item's outputs in float64, without the rows of padding."""
    item = {name: values[index].astype(np.float64) for name, values in outputs.items()}
    return {name: x[: TENSORS[name].rows(length)] if x.ndim > 1 else x for name, x in item.items()}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; finite for any finite logits."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logits)) without overflow for any finite logits."""
    powers = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, powers) / (1.0 + powers)


def read_box(box: np.ndarray, size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """Turn (cx, cy, w, h) in [0, 1] into (x1, y1, x2, y2) in pixels of a (width, height) image.

    Clipped to the image; None where nothing is left or the benchmark would count no box.
    """
    corners = np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])
    if (corners < _NO_BOX).all():
        return None
    x1, y1, x2, y2 = (np.clip(corners, 0.0, 1.0) * [*size, *size]).tolist()
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def read_words(logits_tok: np.ndarray, tokens: Tokens, threshold: float) -> tuple[Word, ...]:
    """Score each word by the largest softmax [1] over its tokens; `logits_tok` [n - 1, 2] lacks [CLS]."""
    scores = tokens.by_word(softmax(logits_tok)[:, 1])
    return tuple(
        Word(span.text, span.start, span.end, score, score >= threshold)
        for span, score in zip(tokens.words, scores.tolist(), strict=True)
    )


def read_heatmap(item: Mapping[str, np.ndarray], grid: int) -> np.ndarray | None:
    """The heat map of one pair as float32 [grid, grid]; None where the network has none."""
    for name, values in item.items():
        if (heatmap := TENSORS[name].heatmap) is not None:
            return heatmap.read(values, grid)
    return None
