"""An upright RGB image to the network's input, float32 or float16 [3, S, S].

Two forms of one arithmetic, equal bit for bit: compiled (engine/_native), and Pillow's resize with NumPy's
normalisation. The compiled form reads the image where Pillow keeps it, works without the GIL, and writes each
value once, where the batch has it.

A slot is the place of one image in a batch's buffer, so that a batch whose images were prepared in its own
slots, by several threads, needs no copy.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from engine import _native
from engine.inputs.preprocess import CHANNELS, LEVELS, normalize_image, resize_image

# Pillow keeps an image of more than 16 MB in several blocks, which it does not give away: bands are copied.
_BLOCK, _BAND = 16 << 20, 1 << 20  # bytes
_PIXEL = 4  # bytes of an RGB pixel in Pillow's memory

Colour = tuple[float, float, float]


def make_slots(count: int, image_size: int) -> list[np.ndarray]:
    """`count` slots, float32 [3, S, S] each, one behind the other in one buffer; values are arbitrary."""
    return list(np.empty((count, CHANNELS, image_size, image_size), dtype=np.float32))


def join_slots(images: Sequence[np.ndarray]) -> np.ndarray:
    """A batch [B, 3, S, S] of images [3, S, S]; no copy where they are slots of one buffer in a row."""
    buffer = images[0].base
    if isinstance(buffer, np.ndarray) and buffer.ndim == images[0].ndim + 1:
        start = (_address(images[0]) - _address(buffer)) // images[0].nbytes
        batch = buffer[start : start + len(images)]
        places = zip(images, batch, strict=False)
        if len(batch) == len(images) and all(_is_same(image, place) for image, place in places):
            return batch
    return np.stack(images)


def network_input(
    rgb: Image.Image, image_size: int, mean: Colour, std: Colour, out: np.ndarray | None = None
) -> np.ndarray:
    """Resize to S = `image_size` as `resize_image` does and normalise as `normalize_image` does.

    Into `out`, dense float32 or float16 [3, S, S], or a new float32 array, and return it.
    """
    if out is None:
        (out,) = make_slots(1, image_size)
    if _native.resample is None or max(rgb.size) > _native.MAX_SIDE or image_size > _native.MAX_SIZE:
        out[...] = normalize_image(resize_image(rgb, image_size), mean, std)
    else:
        _native.resample(_bands(rgb), *rgb.size, _levels(mean, std, out.dtype), out)
    return out


@functools.lru_cache(maxsize=16)
def _levels(mean: Colour, std: Colour, dtype: np.dtype[Any]) -> np.ndarray:
    """Every level normalised, [3, 256]."""
    levels = np.arange(LEVELS, dtype=np.uint8).repeat(CHANNELS).reshape(1, LEVELS, CHANNELS)
    return normalize_image(levels, mean, std)[:, 0].astype(dtype)


def _bands(rgb: Image.Image) -> Iterator[object]:
    """The memory of an image, whole where Pillow keeps it in one piece, else in copies of bands of rows."""
    width, height = rgb.size
    if _PIXEL * width * height <= _BLOCK:
        yield _memory(rgb)
        return
    rows = max(_BAND // (_PIXEL * width), 1)
    for top in range(0, height, rows):
        yield _memory(rgb.crop((0, top, width, min(top + rows, height))))


def _memory(rgb: Image.Image) -> object:
    """The capsules of Arrow's interface, without a copy; an array where this Pillow gives none."""
    try:
        return rgb.__arrow_c_array__()
    except (AttributeError, ValueError):  # before 11.2; blocks that were set smaller
        return np.asarray(rgb)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _is_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are the same memory read in the same way."""
    return (one.__array_interface__, one.strides) == (other.__array_interface__, other.strides)
