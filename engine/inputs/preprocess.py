"""Images: whatever the user has -> upright RGB -> the network's float32 input.

One boundary maps everything Pillow raises to InputError. The resize is Pillow's bicubic, bit for
bit, rows first as every Pillow before 13 does it, since that is what the networks were trained on.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from engine.errors import InputError

ImageInput = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_ORIENTATION_TAG = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Every kind seen from Pillow on damaged files; DecompressionBombWarning where a filter makes it an error.
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
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True)
class ImageOptions:
    """How images are read: limits in bytes and pixels, EXIF orientation, the colour behind transparency."""

    max_bytes: int = 32 * 2**20
    max_pixels: int = 64_000_000
    apply_orientation: bool = True
    background: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        """Raise InputError for a limit below 1 and for a colour other than three integers from 0 to 255."""
        for name in ("max_bytes", "max_pixels"):
            check_count(name, getattr(self, name), least=1)
        colour = self.background
        if not isinstance(colour, tuple | list) or len(colour) != 3:
            raise InputError(f"background: expected (red, green, blue), got {colour!r}")
        if not all(isinstance(x, Integral) and 0 <= x <= 255 for x in colour):
            raise InputError(f"background: expected three integers from 0 to 255, got {colour!r}")


def check_count(name: str, value: object, least: int) -> None:
    """Raise InputError unless `value` is an integer from `least`; `name` is what messages call it."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name}: expected an integer of at least {least}, got {value!r}")


class Decoded(NamedTuple):
    """An upright RGB image and the warnings of reading it."""

    rgb: Image.Image
    warnings: tuple[str, ...]


def decode_image(
    source: ImageInput, *, name: str | None = None, options: ImageOptions | None = None
) -> Decoded:
    """Read an image as upright RGB.

    `source` is a path, the bytes of a file, a PIL image, or an array: H x W, H x W x 1, 3 or 4, as
    uint8 or as finite floats in [0, 1]. `name` is what messages call the image. Raises InputError.
    """
    options = options or ImageOptions()
    label = _label(source, name)
    with _boundary(label):
        if isinstance(source, np.ndarray):
            image = _from_array(source, label, options)
        elif isinstance(source, Image.Image):
            image = source
        else:
            image = _open(_read_bytes(source, label, options), label)
        _check_pixels(image.size, label, options)
        warnings = _frame_warning(image)
        image.load()
        orientation, exif_warnings = _orientation(image) if options.apply_orientation else (1, ())
        rgb = _to_rgb(image, label, options.background)
        if orientation in _TRANSPOSES:
            rgb = rgb.transpose(_TRANSPOSES[orientation])
    return Decoded(rgb, warnings + exif_warnings)


def read_size(path: str | os.PathLike[str], *, options: ImageOptions | None = None) -> tuple[int, int]:
    """Return the stored image's (width, height), read from the file's header alone; raises InputError."""
    options = options or ImageOptions()
    label = _label(path, None)
    with _boundary(label):
        _check_bytes(_check_file(Path(path), label), label, options)
        with Image.open(path, formats=FORMATS) as image:
            _check_pixels(image.size, label, options)
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


def _label(source: object, name: str | None) -> str:
    """What a message calls this image: its name, its path, or its kind."""
    path = f"{os.fspath(source)!r}" if isinstance(source, (str, os.PathLike)) else ""
    if name:
        return f"{name} ({path})" if path else name
    return path or "the image"


@contextmanager
def _boundary(label: str) -> Iterator[None]:
    """Turn everything Pillow raises into an InputError that names the image."""
    try:
        yield
    except _PILLOW_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{label}: cannot be read as an image: {reason}") from error


def _read_bytes(source: object, label: str, options: ImageOptions) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        size = memoryview(source).nbytes
        _check_bytes(size, label, options)
        return bytes(source)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"{label}: expected a path, the bytes of a file, a PIL image or a height x width x 3 array, "
            f"got {type(source).__name__}"
        )
    path = Path(os.fsdecode(source))
    _check_bytes(_check_file(path, label), label, options)
    with path.open("rb") as file:
        # Reads one byte past the limit: the file may have grown since.
        data = file.read(options.max_bytes + 1)
    _check_bytes(len(data), label, options)
    return data


def _check_file(path: Path, label: str) -> int:
    """Return the size of the file in bytes."""
    if not path.is_file():
        reason = "not a file" if path.exists() else "no such file"
        raise InputError(f"{label}: {reason}; expected the path of an image (addresses are not fetched)")
    return path.stat().st_size


def _check_bytes(size: int, label: str, options: ImageOptions) -> None:
    if size > options.max_bytes:
        raise InputError(f"{label}: expected at most {options.max_bytes} bytes, got {size}")
    if size == 0:
        raise InputError(f"{label}: the file is empty")


def _open(data: bytes, label: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        formats = ", ".join(FORMATS)
        raise InputError(f"{label}: not an image of a supported format; expected one of {formats}") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{label}: far more pixels than any photograph has; make it smaller") from error


def _check_pixels(size: tuple[int, int], label: str, options: ImageOptions) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f"{label}: expected an image of at least 1 x 1 pixels, got {width} x {height}")
    if width * height > options.max_pixels:
        raise InputError(
            f"{label}: expected at most {options.max_pixels} pixels, "
            f"got {width} x {height} = {width * height}; make the image smaller"
        )


def _frame_warning(image: Image.Image) -> tuple[str, ...]:
    # A phone's JPEG may contain more images (MPO: depth, gain map); these are no animation.
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return ()
    return ("frames_ignored: the image is animated and only one frame was read",)


def _orientation(image: Image.Image) -> tuple[int, tuple[str, ...]]:
    """Return (EXIF orientation 1 to 8, warnings); unreadable EXIF data leaves the image as stored."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _PILLOW_ERRORS as error:
        return 1, (f"exif_unreadable: shown as stored ({error})",)
    return (value, ()) if isinstance(value, int) else (1, ())


def _to_rgb(image: Image.Image, label: str, background: tuple[int, int, int]) -> Image.Image:
    """Convert any mode to RGB of 8 bits, transparency composited on `background`."""
    if image.mode.startswith("I;16"):
        # The high byte, as Pillow itself reads 16-bit colour; its convert() would clip at 255.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        return _scale(np.asarray(image), (255, 65535), label).convert("RGB")
    if image.mode == "F":
        return _scale(np.asarray(image), (1, 255), label).convert("RGB")
    if image.has_transparency_data:
        return _lay_on(background, image.convert("LA") if image.mode == "La" else image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _lay_on(background: tuple[int, int, int], image: Image.Image) -> Image.Image:
    """Composite an image with transparency on one colour; an opaque one is only converted."""
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")


def _scale(values: np.ndarray, ranges: tuple[int, int], label: str) -> Image.Image:
    """Bring a mode without a fixed range to 8 bits; its range is the first of `ranges` that holds it."""
    if not np.isfinite(values).all():
        raise InputError(f"{label}: holds NaN or infinite pixels")
    low, high = values.min(), values.max()
    for top in ranges:
        if low >= 0 and high <= top:
            if top > 255:
                return Image.fromarray((values >> 8).astype(np.uint8))
            return Image.fromarray(np.rint(values.astype(np.float32) * (255 // top)).astype(np.uint8))
    raise InputError(f"{label}: expected pixels in [0, {ranges[0]}] or [0, {ranges[1]}], got [{low}, {high}]")


def _from_array(array: np.ndarray, label: str, options: ImageOptions) -> Image.Image:
    _check_shape(array, label)
    _check_pixels((array.shape[1], array.shape[0]), label, options)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array))
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{label}: expected an array of uint8 or of floats in [0, 1], got {array.dtype}")
    if not np.isfinite(array).all():
        raise InputError(f"{label}: holds NaN or infinite pixels")
    if array.min() < 0 or array.max() > 1:
        raise InputError(
            f"{label}: expected floats in [0, 1], got [{array.min()}, {array.max()}]; "
            "pass values of 0 to 255 as uint8"
        )
    return Image.fromarray(np.rint(array.astype(np.float32) * 255).astype(np.uint8))


def _check_shape(array: np.ndarray, label: str) -> None:
    """Refuse what is not height x width (x channels), above all channels first."""
    shape = tuple(array.shape)
    channels = (1, 3, 4)
    if array.ndim == 2 or (array.ndim == 3 and shape[2] in channels and shape[0] not in (3, 4)):
        return
    if array.ndim == 3 and shape[0] in (3, 4) and shape[2] in channels:
        raise InputError(
            f"{label}: the array's shape {shape} reads as height x width x channels and as channels first; "
            "pass PIL.Image.fromarray(array)"
        )
    hint = ""
    if array.ndim == 3 and shape[0] in channels:
        hint = "; it looks like channels first, pass array.transpose(1, 2, 0)"
    elif array.ndim == 4:
        hint = "; pass the images of a batch one by one to predict_batch"
    raise InputError(f"{label}: expected an array of height x width x 3, got the shape {shape}{hint}")
