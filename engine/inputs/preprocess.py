"""Images: whatever the user has -> upright RGB -> the network's float32 input.

One boundary maps everything Pillow raises to InputError. The resize is Pillow's bicubic, bit for
bit, rows first as every Pillow before 13 does it, since that is what the networks were trained on.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile

from engine.errors import InputError
from engine.inputs.budget import DECODING, check_cost, decoding_bytes
from engine.inputs.colour import depth_of, extrema, guessed, low_bytes, to_rgb
from engine.inputs.damage import Walked
from engine.inputs.options import ImageOptions as ImageOptions
from engine.inputs.sources import FORMATS, check_file, check_pixels, label_of, open_source
from engine.inputs.sources import ImageInput as ImageInput

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CHANNELS, LEVELS = 3, 256
_TINY = 32  # pixels of the shorter side: no face or scene is to be seen below
_ORIENTATION_TAG = 0x0112
_FIRST_SIDEWAYS = 5
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Every kind seen from Pillow on damaged files; Warning where a filter makes errors of warnings.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    struct.error,
    zlib.error,
    LookupError,
    AssertionError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    Image.DecompressionBombError,
    Warning,
)


class Decoded(NamedTuple):
    """An upright RGB image and the warnings of reading it.

    size: (width, height) of the upright image as it was given; `rgb` is smaller where it was decoded so.
    """

    rgb: Image.Image
    warnings: tuple[str, ...]
    size: tuple[int, int]


def decode_image(
    source: ImageInput,
    *,
    name: str | None = None,
    options: ImageOptions | None = None,
    side: int | None = None,
    reserve: Callable[[int], None] | None = None,
) -> Decoded:
    """Read an image as upright RGB; with options.decode "fast" smaller, but no side below `side` pixels.

    `source` is a path, the bytes of a file, a file object, a PIL image, an array of H x W or H x W x 1, 3
    or 4, or a torch tensor of that shape or of 1, 3 or 4 x H x W, as uint8 or as finite floats in [0, 1].
    `name` is what messages call the image. `reserve` waits for memory (`engine.inputs.budget`) on behalf of a
    caller who gives it back when the pixels are no longer needed; else it is back when they are decoded.
    Raises InputError.
    """
    options = options or ImageOptions()
    if reserve is None:
        with DECODING.reserving(options.max_decoding_bytes) as reserve:
            return decode_image(source, name=name, options=options, side=side, reserve=reserve)
    label = label_of(source, name)
    with _boundary(label), _whole_files():
        image, data, walked = open_source(source, label, options)
        size = image.size
        check_pixels(size, label, options)
        reserve(_cost(image, data, label, options))
        if side is not None and options.decode == "fast" and isinstance(image, ImageFile.ImageFile):
            image.draft(None, (side, side))  # only JPEG has it, libjpeg's scaled inverse transform
        depth, warnings = depth_of(image), _frame_warning(image, walked)
        walked.watch(image)
        image.load()
        orientation, exif_warning = _orientation(image) if options.apply_orientation else (1, "")
        low = low_bytes(image, depth, data)
        rgb, depth_warning = to_rgb(image if low is None else low, label, options.background)
        if low is not None:
            depth_warning = guessed(max(high for _, high in extrema(low)), 255)
        if orientation in _TRANSPOSES:
            del image
            rgb = rgb.transpose(_TRANSPOSES[orientation])
            size = size if orientation < _FIRST_SIDEWAYS else size[::-1]
    warnings += [walked.warning, depth_warning, exif_warning, _content_warning(rgb)]
    return Decoded(rgb, tuple(filter(None, warnings)), size)


def read_size(path: str | os.PathLike[str], *, options: ImageOptions | None = None) -> tuple[int, int]:
    """Return the stored image's (width, height), read from the file's header alone; raises InputError."""
    options = options or ImageOptions()
    label = label_of(path, None)
    with _boundary(label):
        check_file(Path(path), label, options)
        with Image.open(path, formats=FORMATS) as image:
            check_pixels(image.size, label, options)
            return image.size


def resize_image(rgb: Image.Image, image_size: int) -> Image.Image:
    """Resize to a square of `image_size` pixels, bicubic with Pillow's antialiasing, aspect ignored."""
    # In two calls: by itself, Pillow 13 resizes the columns of a tall image first, which rounds differently.
    across = rgb.resize((image_size, rgb.height), Image.Resampling.BICUBIC)
    return across.resize((image_size, image_size), Image.Resampling.BICUBIC)


def normalize_image(
    rgb: Image.Image | np.ndarray,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> np.ndarray:
    """Return (pixels / 255 - mean) / std as contiguous float32 [3, H, W]."""
    pixels = np.asarray(rgb, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
    pixels -= np.array(mean, dtype=np.float32)[:, None, None]
    pixels /= np.array(std, dtype=np.float32)[:, None, None]
    return np.ascontiguousarray(pixels)


def make_thumbnail(rgb: Image.Image, max_side: int) -> Image.Image:
    """Return a copy whose longer side is at most `max_side` pixels."""
    scale = min(1.0, max_side / max(rgb.size))
    if scale == 1.0:
        return rgb.copy()
    size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
    return rgb.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


@contextmanager
def _boundary(label: str) -> Iterator[None]:
    """Turn everything Pillow raises into an InputError that names the image."""
    try:
        yield
    except _PILLOW_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if "truncated" in reason.lower():  # Pillow counts bytes of its own buffer
            reason = "its file is truncated: the end is missing, or the middle is damaged"
        raise InputError(f"{label}: cannot be read as an image: {reason}") from error


def _cost(image: Image.Image, data: bytes | None, label: str, options: ImageOptions) -> int:
    """The bytes of memory that decoding takes; raises InputError where they are too many."""
    turned = options.apply_orientation and image.format != "PNG" and _orientation(image)[0] != 1
    needed = decoding_bytes(image, turned, data is not None)
    check_cost(needed, image.size, None if data is None else len(data), label, options)
    return needed


class _Switch:
    """Stands in for Pillow's LOAD_TRUNCATED_IMAGES where another module set it: false while this one reads.

    Pillow has one such switch for the whole process; to test it is to call `bool`, here by thread.
    """

    reading = threading.local()

    def __bool__(self) -> bool:
        return not getattr(self.reading, "here", False)


@contextmanager
def _whole_files() -> Iterator[None]:
    """Pillow refuses truncated files within the block, whatever other modules allow it for theirs."""
    if ImageFile.LOAD_TRUNCATED_IMAGES and not isinstance(ImageFile.LOAD_TRUNCATED_IMAGES, _Switch):
        ImageFile.LOAD_TRUNCATED_IMAGES = _Switch()  # type: ignore[assignment]
    _Switch.reading.here = True
    try:
        yield
    finally:
        _Switch.reading.here = False


def _frame_warning(image: Image.Image, walked: Walked) -> list[str]:
    # A phone's JPEG may contain more images (MPO: depth, gain map); these are no animation.
    animated = getattr(image, "is_animated", False) if walked.animated is None else walked.animated
    if image.format == "MPO" or not animated:
        return []
    return ["frames_ignored: the image is animated and only one frame was read"]


def _orientation(image: Image.Image) -> tuple[int, str]:
    """Return (EXIF orientation 1 to 8, warning); unreadable EXIF data leaves the image as stored."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _PILLOW_ERRORS as error:
        return 1, f"exif_unreadable: shown as stored ({error})"
    if value not in _TRANSPOSES:
        return 1, ""
    return value, f"exif_turned: turned upright by its EXIF orientation {value}"


def _content_warning(rgb: Image.Image) -> str:
    """The warning for an image that carries nothing to judge."""
    if min(rgb.size) < _TINY:
        return f"tiny_image: {rgb.width} x {rgb.height} pixels hold next to nothing to judge"
    # A few pixels tell most images from a blank one.
    sample = rgb.resize((_TINY, _TINY), Image.Resampling.NEAREST)
    if all(low == high for part in (sample, rgb) for low, high in extrema(part)):
        return "blank_image: all pixels have one colour"
    return ""
