"""Any mode of Pillow to RGB of 8 bits."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from engine.errors import InputError

_STRIP_PIXELS = 2**20
_DEEP = 65535
_BLACK_BELOW = 4096  # of 65535: what reaches no further looks black on that scale


def to_rgb(image: Image.Image, label: str, background: tuple[int, int, int]) -> tuple[Image.Image, str]:
    """Convert to RGB, transparency composited on `background`; with a warning where the depth was guessed.

    Goes strip by strip, so that no more than the image and its RGB is ever held. Raises InputError for pixels
    beyond any known scale.
    """
    if image.mode[0] in "IF":
        top, warning = _scale_of(image, (255, 65535) if image.mode[0] == "I" else (1, 255), label)
        return _by_strips(image, lambda strip: _grey(np.asarray(strip), top)), warning
    if image.has_transparency_data:
        return _by_strips(image, lambda strip: _lay_on(background, strip)), ""
    return (image if image.mode == "RGB" else _by_strips(image, lambda strip: strip.convert("RGB"))), ""


def strips_of(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in strips of at most a megapixel or so, each with its first row; a small one as it is."""
    rows = max(1, _STRIP_PIXELS // image.width)
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        strip.info = image.info  # where the transparency of a palette is
        yield top, strip


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    if image.width * image.height <= _STRIP_PIXELS:
        return convert(image)
    rgb = Image.new("RGB", image.size)
    for top, strip in strips_of(image):
        rgb.paste(convert(strip), (0, top))
    return rgb


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
    by_strip = [np.reshape(strip.getextrema(), (-1, 2)) for _, strip in strips_of(image)]
    channels = np.stack(by_strip, axis=1)  # [channels, strips, 2]
    return [(int(channel[:, 0].min()), int(channel[:, 1].max())) for channel in channels]


def guessed(high: float, top: int) -> str:
    """The warning for pixels whose scale nobody stated."""
    return f"depth_guessed: pixels up to {high:g} in a deep image were read on a scale of 0 to {top}"


def _lay_on(background: tuple[int, int, int], image: Image.Image) -> Image.Image:
    """Composite an image with transparency on one colour; an opaque one is only converted."""
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")


def _scale_of(image: Image.Image, tops: tuple[int, int], label: str) -> tuple[int, str]:
    """The scale of pixels that state none, the first of `tops` that holds them; the warning for a guess."""
    bounds = []
    for _, strip in strips_of(image):
        values = np.asarray(strip)
        if not np.isfinite(values).all():
            raise InputError(f"{label}: holds NaN or infinite pixels")
        bounds.append((values.min(), values.max()))
    low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
    if low < 0 or high > tops[1]:
        raise InputError(f"{label}: expected pixels in [0, {tops[0]}] or [0, {tops[1]}], got [{low}, {high}]")
    top = tops[0] if high <= tops[0] else tops[1]
    unsure = 0 < high <= tops[0] or (top == _DEEP and high < _BLACK_BELOW)
    return top, guessed(float(high), top) if unsure else ""


def _grey(values: np.ndarray, top: int) -> Image.Image:
    """Pixels on a scale up to `top` as RGB."""
    # The high byte of 16 bits, as Pillow itself reads 16-bit colour; its convert() would clip at 255.
    pixels = values >> 8 if top == _DEEP else np.rint(values.astype(np.float32) * (255 // top))
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
