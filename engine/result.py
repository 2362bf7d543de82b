"""What a prediction holds, and its forms: dictionary, JSON, picture, HTML."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from engine.inputs.preprocess import ImageInput


@dataclass(frozen=True)
class Word:
    """One word that the network read: `text` is `caption[start:end]`, `score` in [0, 1].

    The score is the largest over the word's tokens; `manipulated` compares it with the bundle's threshold.
    """

    text: str
    start: int
    end: int
    score: float
    manipulated: bool


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture and its caption.

    manipulated: `score` reaches the bundle's threshold.
    score: probability in [0, 1] that the pair is manipulated.
    types: probability in [0, 1] of face_swap, face_attribute, text_swap, text_attribute; independent of
        each other and of `score`.
    detected: the types that reach the bundle's threshold; to be read where `manipulated` is true.
    box: (x1, y1, x2, y2) of the manipulated face, in pixels of the upright picture, clipped to it. The
        network names a box for every picture, so it means something only where a face type is detected;
        None where the box is empty (the benchmark's "no box").
    words: the words that the network read, in order.
    caption: the text that the words' spans refer to: the user's, cut to its first 4096 characters and
        with U+FFFD in place of what is not Unicode.
    size: (width, height) of the upright picture.
    heatmap: float32 [16, 16] in [0, 1], rows from the top: how strongly the words point at each patch;
        None where the model has no such map.
    timing: milliseconds by stage: decode (with the thumbnail), resize (with the normalisation), tokenize,
        inference, postprocess, and total, their sum. In a batch the inference time is the batch's
        divided by its size.
    warnings: short codes, each with detail after a colon.
    model: name, size, precision, backend and device that answered.
    thumbnail: the upright picture within 1024 pixels, for `plot` and `to_html`; None if not kept.

    Equality leaves out heatmap, timing and thumbnail.
    """

    manipulated: bool
    score: float
    types: dict[str, float]
    detected: tuple[str, ...]
    box: tuple[float, float, float, float] | None
    words: tuple[Word, ...]
    caption: str
    size: tuple[int, int]
    warnings: tuple[str, ...]
    model: dict[str, str]
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
            "model": dict(self.model),
            "timing": dict(self.timing),
        }
        if heatmap:
            data["heatmap"] = None if self.heatmap is None else self.heatmap.tolist()
        return data

    def to_json(self, heatmap: bool = True, indent: int | None = None) -> str:
        """Return `to_dict` as JSON; raises ValueError for a NaN, which no prediction made here holds."""
        return json.dumps(self.to_dict(heatmap), allow_nan=False, indent=indent)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        image: ImageInput | None = None,
        font: str | os.PathLike[str] | None = None,
    ) -> Image.Image:
        """Draw the verdict, the types, the words and, on the picture, the heat map and the box.

        The heat map is drawn only where the pair is said to be manipulated, the box only where a face
        type is detected besides. `image` replaces the kept thumbnail, `font` (a TrueType file) the
        built-in one, which knows Latin letters only.
        Saves to `path` if given. Raises InputError for an unreadable `image` and for a `path` that cannot
        be a picture's, OSError where writing it or reading `font` fails.
        """
        from engine.render import check_plot_path, draw_card

        if path is not None:
            check_plot_path(path)
        card = draw_card(self, image, font)
        if path is not None:
            card.save(path)
        return card

    def to_html(self, image: ImageInput | None = None) -> str:
        """Return a self-contained HTML fragment: the picture as a data URI, the words marked, all escaped."""
        from engine.markup import write_fragment

        return write_fragment(self, image)
