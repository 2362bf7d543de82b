"""Prepares pairs on the host: decodes, resizes and tokenizes them, and pads the captions of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
from PIL import Image

from engine.errors import InputError
from engine.inputs.pairs import Caption
from engine.inputs.preprocess import (
    ImageInput,
    ImageOptions,
    decode_image,
    make_thumbnail,
    resize_image,
)
from engine.inputs.text import CaptionTokenizer, Tokens
from engine.manifest import Preprocess

_LARGEST_SENT = 4096  # pixels of a side: an image that the backend resizes has 50 MB at most


class Item(NamedTuple):
    """A prepared pair: what the backend gets, and what the Prediction needs besides.

    pixels: RGB, uint8 [H, W, 3]; of the network's size unless the backend resizes images.
    caption: the text that the spans of `tokens.words` refer to.
    size: (width, height) of the upright image as the user gave it.
    timing: milliseconds by stage.
    """

    name: str
    pixels: np.ndarray
    tokens: Tokens
    caption: str
    size: tuple[int, int]
    thumbnail: Image.Image | None
    warnings: tuple[str, ...]
    timing: dict[str, float]


class Preparation:
    """Prepares pairs for one bundle; safe to use from several threads.

    `thumbnail` is the longer side in pixels of the thumbnail, or 0 for none; `resize` is false where the
    backend resizes images.
    """

    def __init__(
        self,
        spec: Preprocess,
        tokenizer: CaptionTokenizer,
        options: ImageOptions,
        thumbnail: int,
        resize: bool,
    ) -> None:
        self._spec, self._tokenizer, self._options = spec, tokenizer, options
        self._thumbnail, self._resize = thumbnail, resize

    def pair(self, name: str, image: ImageInput, caption: Caption) -> Item:
        """Prepare one pair; raises InputError, which names it by `name` where that is not empty."""
        started = perf_counter()
        decoded = decode_image(image, name=name or None, options=self._options)
        thumbnail = make_thumbnail(decoded.rgb, self._thumbnail) if self._thumbnail else None
        decode_end = perf_counter()
        pixels = self._pixels(decoded.rgb)
        resize_end = perf_counter()
        try:
            text, tokens = self._tokenizer(caption)
        except InputError as error:
            raise InputError(f"{name}: {error}" if name else str(error)) from error
        timing = {
            "decode": milliseconds(started, decode_end),
            "resize": milliseconds(decode_end, resize_end),
            "tokenize": milliseconds(resize_end, perf_counter()),
        }
        warnings = decoded.warnings + tokens.warnings
        return Item(name, pixels, tokens, text, decoded.rgb.size, thumbnail, warnings, timing)

    def _pixels(self, rgb: Image.Image) -> np.ndarray:
        # A second resize to the same size changes nothing, so one here does no harm before the backend's.
        if self._resize or max(rgb.size) > _LARGEST_SENT:
            rgb = resize_image(rgb, self._spec.image_size)
        return np.asarray(rgb)

    def text(self, items: Sequence[Item]) -> dict[str, np.ndarray]:
        """Token ids and mask of the items, int64 [B, N], padded with 0 to the longest caption."""
        longest = max(len(item.tokens.ids) for item in items)
        shape = (len(items), max(longest, self._spec.min_tokens))
        input_ids = np.zeros(shape, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        for row, item in enumerate(items):
            input_ids[row, : len(item.tokens.ids)] = item.tokens.ids
            attention_mask[row, : len(item.tokens.ids)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def blank(self, pairs: int, tokens: int) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """Black images, and captions of `tokens` tokens (capped at the tokenizer's maximum)."""
        spec = self._spec
        image = np.zeros((spec.image_size, spec.image_size, 3), dtype=np.uint8)
        shape = pairs, min(max(tokens, spec.min_tokens), spec.max_tokens)
        text = {
            "input_ids": np.full(shape, self._tokenizer.cls_id, dtype=np.int64),
            "attention_mask": np.ones(shape, dtype=np.int64),
        }
        return [image] * pairs, text


def milliseconds(start: float, end: float) -> float:
    """Milliseconds between two instants of `perf_counter`."""
    return (end - start) * 1000
