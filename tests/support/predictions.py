"""A Prediction to draw, of any caption and image."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

from engine import Prediction, Word

TYPES = {"face_swap": 0.9, "face_attribute": 0.2, "text_swap": 0.1, "text_attribute": 0.7}
THRESHOLDS = dict.fromkeys(("manipulated", *TYPES, "words"), 0.5)


def make_prediction(caption="The mayor opens a bridge", marked=(1, 2), size=(100, 80), read=None, **fields):
    """A manipulated pair on a plain image; `marked` words score 0.9; words from `read` on were not read."""
    spans = [match.span() for match in re.finditer(r"\S+", caption)][:read]
    words = tuple(
        Word(caption[a:b], a, b, 0.9 if i in marked else 0.1, i in marked) for i, (a, b) in enumerate(spans)
    )
    heatmap = np.zeros((16, 16), np.float32)
    heatmap[4:8, 4:8] = 1
    width, height = size
    return Prediction(
        **{
            "manipulated": True,
            "score": 0.93,
            "types": TYPES,
            "detected": ("face_swap", "text_attribute"),
            "box": (0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height),
            "words": words,
            "caption": caption,
            "size": size,
            "thresholds": THRESHOLDS,
            "model": {"name": "asap", "size": "tiny", "precision": "fp32", "backend": "ort", "device": "cpu"},
            "heatmap": heatmap,
            "timing": {"total": 12.5},
            "thumbnail": Image.new("RGB", size, (90, 120, 150)),
        }
        | fields
    )
