"""How much memory pictures take: of one while it is decoded, of all that are decoded at once, of those kept.

All figures are of this process: its threads and its Predictors share them.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from engine.errors import InputError
from engine.inputs.options import ImageOptions

BYTES_PER_PIXEL = 4  # of RGB in Pillow
_FREE_PIXELS = 16_000_000  # a picture of any format is decoded in less than a second
_PIXELS_PER_BYTE = 100  # of a larger one's file; a blank screenshot has 300, but fewer pixels
_NARROW = ("1", "L", "P")  # modes of a byte a pixel
_WEBP_CANVASES = 12  # bytes a pixel: two of the decoder's canvases, and the frame that it hands over


def decoding_bytes(image: Image.Image, turned: bool, opened: bool = True) -> int:
    """The most memory that an image's pixels take while they become upright RGB.

    `opened` is false for an image whose own pixels are in memory already, and somebody else's.
    """
    stored = 0 if not opened else 1 if image.mode in _NARROW else BYTES_PER_PIXEL
    result = 0 if image.mode == "RGB" and not turned else BYTES_PER_PIXEL
    extra: float = _WEBP_CANVASES if image.format == "WEBP" else 0
    if image.info.get("progressive"):  # libjpeg holds all coefficients, of two bytes, until the last scan
        samples = [across * down for _, across, down, *_ in getattr(image, "layer", ())]
        extra = 2 * sum(samples) / max([1, *samples])  # a damaged file may state 0
    return int(image.width * image.height * (stored + result + extra))


def check_cost(
    needed: int, size: tuple[int, int], file: int | None, label: str, options: ImageOptions
) -> None:
    """Raise InputError for a picture that takes `needed` bytes, of a `file` of so many, at too high a cost.

    Few bytes that stand for very many pixels are a decompression bomb; some formats and modes take several
    times the memory of the pixels themselves.
    """
    pixels = size[0] * size[1]
    if file is not None and pixels > max(_FREE_PIXELS, _PIXELS_PER_BYTE * file):
        raise InputError(
            f"{label}: expected at most {_PIXELS_PER_BYTE} pixels a byte of the file above {_FREE_PIXELS} "
            f"pixels, got {size[0]} x {size[1]} = {pixels} in {file} bytes; make the image smaller"
        )
    if needed > options.max_decoding_bytes:
        raise InputError(
            f"{label}: expected an image that takes at most {options.max_decoding_bytes} bytes to read, "
            f"got {needed} for {size[0]} x {size[1]} pixels of its kind; make it smaller or save it as a JPEG"
        )


class Budget:
    """Bytes in use, shared by the threads of a process; those that want more than is free wait in turn."""

    def __init__(self) -> None:
        self._freed = threading.Condition()
        self._used = 0
        self._waiting: deque[object] = deque()

    @property
    def used(self) -> int:
        """Bytes in use now."""
        return self._used

    @contextmanager
    def reserving(self, limit: int) -> Iterator[Callable[[int], None]]:
        """Yield a function that waits until so many bytes are free below `limit`; the block's end frees them.

        What is more than `limit` by itself waits until it is alone. Call it once: two threads that each wait
        for a second reservation would wait for one another.
        """
        reserved = 0

        def reserve(amount: int) -> None:
            nonlocal reserved
            with self._freed:
                self._waiting.append(turn := object())
                try:
                    self._freed.wait_for(
                        lambda: self._waiting[0] is turn and self._used + amount <= max(limit, amount)
                    )
                    self._used += amount
                    reserved += amount
                finally:
                    self._waiting.remove(turn)
                    self._freed.notify_all()

        try:
            yield reserve
        finally:
            self._free(reserved)

    def keep(self, array: np.ndarray, limit: int) -> bool:
        """Count an array until it is garbage, and say True; False where that would be more than `limit`."""
        with self._freed:
            if self._used + array.nbytes > limit:
                return False
            self._used += array.nbytes
        weakref.finalize(array, self._free, array.nbytes).atexit = False
        return True

    def forget(self) -> None:
        """Begin anew, in a forked child: what the parent's threads hold is none of its own."""
        self.__init__()  # type: ignore[misc]

    def _free(self, amount: int) -> None:
        with self._freed:
            self._used -= amount
            self._freed.notify_all()


DECODING = Budget()  # pictures that are being decoded
KEPT = Budget()  # prepared pictures in their full size, for a backend that resizes them
for _budget in (DECODING, KEPT):
    os.register_at_fork(after_in_child=_budget.forget)
