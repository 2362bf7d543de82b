"""Options as users give them: numbers of Python, NumPy or another library, checked and made Python's own."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

from engine.errors import InputError, quoted

Decode = Literal["exact", "fast"]
DECODES: tuple[Decode, ...] = get_args(Decode)


def check_count(name: str, value: object, least: int) -> int:
    """Return an integer of any library as int; raises InputError below `least` and for what is none.

    `name` is what messages call it.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name}: expected an integer of at least {least}, got {quoted(value)}")
    return int(value)


@dataclass(frozen=True)
class ImageOptions:
    """How images are read: limits in bytes and pixels, EXIF orientation, the colour behind transparency.

    `max_decoding_bytes` is for the pixels that all threads of the process decode at once, and again for those
    that wait in full size for a backend that resizes them; a picture that needs more is decoded alone.
    `decode` "exact" reads every pixel of an image. "fast" reads a JPEG at 1/2, 1/4 or 1/8 of its size where
    both sides keep the network's; it answers slightly differently, and a thumbnail is as small.

    Examples:
        >>> from engine import ImageOptions, Predictor
        >>> options = ImageOptions(max_bytes=8 * 2**20, background=(0, 0, 0))
        >>> predictor = Predictor("my-bundle", image_options=options)
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000
    apply_orientation: bool = True
    background: tuple[int, int, int] = (255, 255, 255)
    max_decoding_bytes: int = 512 * 2**20
    decode: Decode = "exact"

    def __post_init__(self) -> None:
        """Raise InputError for a limit below 1, a colour not of 0 to 255, and an unknown way to decode."""
        if self.decode not in DECODES:
            raise InputError(f'decode: expected "exact" or "fast", got {quoted(self.decode)}')
        for name in ("max_bytes", "max_pixels", "max_decoding_bytes"):
            check_count(name, getattr(self, name), least=1)
        colour = self.background
        if not isinstance(colour, tuple | list) or len(colour) != 3:
            raise InputError(f"background: expected (red, green, blue), got {quoted(colour)}")
        if not all(isinstance(x, Integral) and 0 <= x <= 255 for x in colour):
            raise InputError(f"background: expected three integers from 0 to 255, got {quoted(colour)}")
