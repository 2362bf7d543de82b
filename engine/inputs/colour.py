"""Any mode of Pillow to RGB of 8 bits."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from engine.errors import InputError

_BLACK_BELOW = 4096  # of 65535: what reaches no further looks black on that scale


def to_rgb(image: Image.Image, label: str, background: tuple[int, int, int]) -> tuple[Image.Image, str]:
    """Convert to RGB, transparency composited on `background`; with a warning where the depth was guessed.

    Raises InputError for pixels beyond any known scale.
    """
    if image.mode.startswith("I"):
        grey, warning = _scale(np.asarray(image), (255, 65535), label)
        return grey.convert("RGB"), warning
    if image.mode == "F":
        grey, warning = _scale(np.asarray(image), (1, 255), label)
        return grey.convert("RGB"), warning
    if image.has_transparency_data:
        return _lay_on(background, image.convert("LA") if image.mode == "La" else image), ""
    return (image if image.mode == "RGB" else image.convert("RGB")), ""


def low_bytes(image: Image.Image, depth: str, data: bytes | None) -> Image.Image | None:
    """The low bytes of a PNG with 16 bits a channel whose high bytes are all 0, which is all Pillow reads.

    `depth` is Pillow's name of the file's pixels before `image` was read. None for any other image.
    """
    if depth not in ("RGB;16B", "RGBA;16B") or data is None or any(high for _, high in extrema(image)):
        return None
    again = Image.open(io.BytesIO(data), formats=("PNG",))
    low = depth.replace("16B", "16L")
    again.tile = [tile._replace(args=low) for tile in again.tile]
    again.load()
    return again


def depth_of(image: Image.Image) -> str:
    """Pillow's name of a file's pixels, such as "RGB;16B"; empty for an image in memory."""
    tile = getattr(image, "tile", None)
    return tile[0].args if tile and isinstance(tile[0].args, str) else ""


def extrema(image: Image.Image) -> list[tuple[int, int]]:
    """The least and the largest value of each channel of 8 bits."""
    return [channel.getextrema() for channel in image.split()]  # type: ignore[misc]


def guessed(high: float, top: int) -> str:
    """The warning for pixels whose scale nobody stated."""
    return f"depth_guessed: pixels up to {high:g} in a deep image were read on a scale of 0 to {top}"


def _lay_on(background: tuple[int, int, int], image: Image.Image) -> Image.Image:
    """Composite an image with transparency on one colour; an opaque one is only converted."""
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")


def _scale(values: np.ndarray, tops: tuple[int, int], label: str) -> tuple[Image.Image, str]:
    """Bring pixels without a stated scale to 8 bits: theirs goes to the first of `tops` that holds them."""
    if not np.isfinite(values).all():
        raise InputError(f"{label}: holds NaN or infinite pixels")
    low, high = values.min(), values.max()
    if low < 0 or high > tops[1]:
        raise InputError(f"{label}: expected pixels in [0, {tops[0]}] or [0, {tops[1]}], got [{low}, {high}]")
    top = tops[0] if high <= tops[0] else tops[1]
    # The high byte of 16 bits, as Pillow itself reads 16-bit colour; its convert() would clip at 255.
    pixels = values >> 8 if top == 65535 else np.rint(values.astype(np.float32) * (255 // top))
    unsure = 0 < high <= tops[0] or (top == 65535 and high < _BLACK_BELOW)
    return Image.fromarray(pixels.astype(np.uint8)), guessed(float(high), top) if unsure else ""
