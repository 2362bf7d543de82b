"""Prepares pairs on the host: decodes, resizes and tokenizes them, and pads the captions of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from engine.errors import InputError
from engine.inputs.absent import WARNINGS, Absent
from engine.inputs.boxes import WHOLE, Box, check_box, network_box
from engine.inputs.budget import DECODING, KEPT
from engine.inputs.network_input import make_slots, network_input
from engine.inputs.options import ImageOptions
from engine.inputs.pairs import Caption
from engine.inputs.preprocess import decode_image, make_thumbnail, resize_image
from engine.inputs.sources import ImageInput
from engine.inputs.text import CaptionTokenizer, Tokens
from engine.manifest import Preprocess
from engine.registry.record import Network

_LARGEST_SENT = 4096  # pixels of a side: an image that the backend resizes has 50 MB at most


class Picture(NamedTuple):
    """A prepared image, for one caption or several.

    pixels: the network's input, float32 [3, S, S]; where the backend resizes images RGB, uint8 [H, W, 3].
    size: (width, height) of the upright image as the user gave it; None where there is none.
    timing: milliseconds by stage.
    """

    pixels: np.ndarray
    size: tuple[int, int] | None
    thumbnail: Image.Image | None
    warnings: tuple[str, ...]
    timing: dict[str, float]


class Item(NamedTuple):
    """A prepared pair: what the backend gets, and what the Prediction needs besides.

    caption: the text that the spans of `tokens.words` refer to.
    timing: milliseconds by stage.
    box: the one to judge, in pixels of the upright image; None for a network that reads none.
    """

    name: str
    picture: Picture
    tokens: Tokens
    caption: str
    warnings: tuple[str, ...]
    timing: dict[str, float]
    absent: Absent
    box: Box | None = None


class Preparation:
    """Prepares pairs for one bundle; safe to use from several threads.

    `thumbnail` is the longer side in pixels of the thumbnail, or 0 for none; `resize` is false where the
    backend resizes images. The record of the network tells whether a pair brings a box, and whether without
    words the verdict alone is answered.
    """

    def __init__(
        self,
        spec: Preprocess,
        network: Network,
        tokenizer: CaptionTokenizer,
        options: ImageOptions,
        thumbnail: int,
        resize: bool,
    ) -> None:
        self.box, self._compares = network.box, network.compares
        self._spec, self._tokenizer, self._options = spec, tokenizer, options
        self._thumbnail, self._resize = thumbnail, resize

    def slots(self, count: int) -> Sequence[np.ndarray | None]:
        """Places for the images of a batch, one for each; None where the backend resizes images."""
        return make_slots(count, self._spec.image_size) if self._resize else [None] * count

    def pair(
        self,
        name: str,
        image: ImageInput | None,
        caption: Caption | None,
        box: Any = None,
        slot: np.ndarray | None = None,
    ) -> Item:
        """Prepare one pair; raises InputError, which names it by `name` where that is not empty.

        `slot` is the place of its image in a batch, of `slots`; None for one by itself.
        """
        return self.caption(name, self.picture(name, image, slot=slot), caption, box)

    def picture(
        self, name: str, image: ImageInput | None, shares: int = 1, slot: np.ndarray | None = None
    ) -> Picture:
        """Prepare an image that `shares` captions have; for None a plain one of the mean colour."""
        if image is None:
            return self._plain(slot)
        started = perf_counter()
        side = self._spec.image_size
        with DECODING.reserving(self._options.max_decoding_bytes) as reserve:
            decoded = decode_image(
                image, name=name or None, options=self._options, side=side, reserve=reserve
            )
            size, warnings = decoded.size, decoded.warnings
            thumbnail = make_thumbnail(decoded.rgb, self._thumbnail) if self._thumbnail else None
            decode_end = perf_counter()
            pixels = self._pixels(decoded.rgb, slot)
            del decoded
        timing = {
            "decode": milliseconds(started, decode_end) / shares,
            "resize": milliseconds(decode_end, perf_counter()) / shares,
        }
        return Picture(pixels, size, thumbnail, warnings, timing)

    def _plain(self, slot: np.ndarray | None) -> Picture:
        side = self._spec.image_size
        red, green, blue = (round(255 * mean) for mean in self._spec.mean)
        pixels = self._pixels(Image.new("RGB", (side, side), (red, green, blue)), slot)
        return Picture(pixels, None, None, (), {"decode": 0.0, "resize": 0.0})

    def caption(self, name: str, picture: Picture, caption: Caption | None, box: Any = None) -> Item:
        """Join a prepared image with a caption, an empty one for None, and a box; raises as `pair` does."""
        if caption is None and picture.size is None:
            raise InputError(f"{name or 'the pair'}: expected an image or a caption, got neither")
        if caption is None and self._compares:
            raise InputError(
                f"{name or 'the pair'}: expected a caption, got none; this network compares the image with it"
            )
        started = perf_counter()
        try:
            text, tokens = self._tokenizer("" if caption is None else caption)
            judged, box_warnings = self._read_box(box, picture.size)
        except InputError as error:
            raise InputError(f"{name}: {error}" if name else str(error)) from error
        timing = picture.timing | {"tokenize": milliseconds(started, perf_counter())}
        absent: Absent = "caption" if caption is None else "image" if picture.size is None else ""
        if self._compares and not tokens.words:
            if absent:
                raise InputError(
                    f"{name or 'the pair'}: expected an image or a caption with words, got neither"
                )
            absent = "words"
        warnings = WARNINGS[absent] + picture.warnings + box_warnings
        if absent == "words":  # which says already that there is none
            warnings += tuple(text for text in tokens.warnings if not text.startswith("empty_text"))
        elif caption is not None:
            warnings += tokens.warnings
        return Item(name, picture, tokens, text, warnings, timing, absent, judged)

    def _read_box(self, box: Any, size: tuple[int, int] | None) -> tuple[Box | None, tuple[str, ...]]:
        if self.box is not None:
            return check_box(box, size)
        if box is not None:
            raise InputError("box: expected none, for this network finds the box itself; leave it out")
        return None, ()

    def _pixels(self, rgb: Image.Image, slot: np.ndarray | None = None) -> np.ndarray:
        spec = self._spec
        if self._resize:
            return network_input(rgb, spec.image_size, spec.mean, spec.std, slot)
        # A second resize to the same size changes nothing, so one here does no harm before the backend's.
        if max(rgb.size) <= _LARGEST_SENT:
            whole = np.asarray(rgb)
            if KEPT.keep(whole, self._options.max_decoding_bytes):
                return whole
        return np.asarray(resize_image(rgb, spec.image_size))

    def text(self, items: Sequence[Item]) -> dict[str, np.ndarray]:
        """Ids and mask of the items, int64 [B, N], padded with 0 to the longest caption, and their boxes."""
        longest = max(len(item.tokens.ids) for item in items)
        shape = (len(items), max(longest, self._spec.min_tokens))
        input_ids = np.zeros(shape, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        for row, item in enumerate(items):
            input_ids[row, : len(item.tokens.ids)] = item.tokens.ids
            attention_mask[row, : len(item.tokens.ids)] = 1
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.box is not None:
            inputs[self.box] = np.stack([_box_read(item) for item in items])
        return inputs

    def blank(self, pairs: int, tokens: int) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """Black images, and captions of `tokens` tokens (capped at the tokenizer's maximum)."""
        spec = self._spec
        image = self._pixels(Image.new("RGB", (spec.image_size, spec.image_size)))
        shape = pairs, min(max(tokens, spec.min_tokens), spec.max_tokens)
        text = {
            "input_ids": np.full(shape, self._tokenizer.cls_id, dtype=np.int64),
            "attention_mask": np.ones(shape, dtype=np.int64),
        }
        if self.box is not None:
            text[self.box] = np.tile(WHOLE, (pairs, 1))
        return [image] * pairs, text


def _box_read(item: Item) -> np.ndarray:
    size = item.picture.size
    return WHOLE if item.box is None or size is None else network_box(item.box, size)


def milliseconds(start: float, end: float) -> float:
    """Milliseconds between two instants of `perf_counter`."""
    return (end - start) * 1000
