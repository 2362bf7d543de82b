"""The data of a prediction, and its dictionary and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Word:
    """One word of the caption that the network read: `text` is `caption[start:end]`, `score` in [0, 1].

    The score is the largest over the word's tokens; `manipulated` compares it with the bundle's threshold.
    """

    text: str
    start: int
    end: int
    score: float
    manipulated: bool


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was decided for one image and its caption, as data; `engine.Prediction` can also be drawn.

    manipulated: `score` reaches its threshold.
    score: probability in [0, 1] that the pair is manipulated.
    types: probability in [0, 1] of face_swap, face_attribute, text_swap, text_attribute; independent of
        each other and of `score`.
    detected: the types that reach their thresholds; meaningful where `manipulated` is true.
    box: (x1, y1, x2, y2) of the manipulated face, in pixels of the upright image, clipped to it. The
        network predicts a box for every image, so it is meaningful only where a face type is detected;
        None where the box is empty (the benchmark's "no box").
    words: the words that the network read, in order.
    caption: the text that the words' spans refer to: the user's, cut to its first 4096 characters and
        with U+FFFD in place of what is not Unicode.
    size: (width, height) of the upright image.
    heatmap: float32 [16, 16] in [0, 1], rows from the top: how strongly the words point at each patch;
        None where the model has no such map.
    timing: milliseconds by stage: decode (with the thumbnail), resize (0 where a GPU does it), tokenize,
        inference (with the normalisation), postprocess, and total, their sum. In a batch the inference time
        is the batch's divided by its size.
    warnings: short codes, each with detail after a colon.
    thresholds: the scores from which the verdict, each type and a word count: manipulated, the four types,
        words.
    model: name, size, precision, backend and device of the network, and the kind of its weights (trained,
        demo or drawn).
    thumbnail: the upright image within 1024 pixels, for `plot` and `to_html`; None if not stored.

    Equality leaves out heatmap, timing and thumbnail.
    """

    manipulated: bool
    score: float
    types: dict[str, float]
    detected: tuple[str, ...]
    box: tuple[float, float, float, float] | None
    words: tuple[Word, ...]
    size: tuple[int, int]
    caption: str = ""
    warnings: tuple[str, ...] = ()
    thresholds: dict[str, float] = field(default_factory=dict)
    model: dict[str, str] = field(default_factory=dict)
    heatmap: np.ndarray | None = field(default=None, compare=False, repr=False)
    timing: dict[str, float] = field(default_factory=dict, compare=False)
    thumbnail: Image.Image | None = field(default=None, compare=False, repr=False)

    def to_dict(self, heatmap: bool = True) -> dict[str, Any]:
        """Return JSON-safe data; the heat map as nested lists, left out where `heatmap` is false."""
        data: dict[str, Any] = {
            "manipulated": self.manipulated,
            "score": self.score,
            "types": dict(self.types),
            "detected": list(self.detected),
            "box": None if self.box is None else list(self.box),
            "words": [vars(word).copy() for word in self.words],
            "caption": self.caption,
            "size": list(self.size),
            "warnings": list(self.warnings),
            "thresholds": dict(self.thresholds),
            "model": dict(self.model),
            "timing": dict(self.timing),
        }
        if heatmap:
            data["heatmap"] = None if self.heatmap is None else self.heatmap.tolist()
        return data

    def to_json(self, heatmap: bool = True, indent: int | None = None) -> str:
        """Return `to_dict` as JSON; raises ValueError for a NaN, which no prediction made here holds."""
        return json.dumps(self.to_dict(heatmap), allow_nan=False, indent=indent)
