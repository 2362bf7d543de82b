"""What a user gives as an image, opened: a path, bytes, a file object, a PIL image, an array, a tensor."""

from __future__ import annotations

import inspect
import io
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from engine.errors import InputError, quoted
from engine.inputs.damage import Walked, walk
from engine.inputs.options import ImageOptions

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
_CHANNELS = (1, 3, 4)
# A data: URL, or the beginning of an image of these formats in base64; a folder may stand before it.
_INLINE = re.compile(r"(?:.*/)?data:[^,/]*(?:/[^,/]*)?;base64,", re.DOTALL)
_BASE64 = re.compile(r"(?:.*/)?(?:iVBORw0KGgo|R0lGOD|UklGR|Qk)[\w+/=\s-]{48,}|/9j/[\w+/=\s-]{48,}")
_HEAD = 4096  # characters that say what a text is


class ReadableFile(Protocol):
    """A file that is open for reading bytes, from where it stands."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, none at the end."""
        ...


class Tensor(Protocol):
    """A torch.Tensor; the name stands for it without importing torch."""

    def detach(self) -> Any:
        """Return it without its graph."""
        ...

    def cpu(self) -> Any:
        """Return it in the host's memory."""
        ...


ImageInput = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | ReadableFile | Image.Image | np.ndarray | Tensor
)


class Opened(NamedTuple):
    """An image whose pixels need not be read yet; the file's bytes, and its parts, where it was a file."""

    image: Image.Image
    data: bytes | None = None
    walked: Walked = Walked()


def label_of(source: object, name: str | None) -> str:
    """What a message calls an image: its name, its path, or its kind."""
    path = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", None)
    shown = quoted(os.fspath(path)) if isinstance(path, (str, os.PathLike)) else ""
    if name:
        return f"{name} ({shown})" if shown else name
    return shown or "the image"


def open_source(source: object, label: str, options: ImageOptions) -> Opened:
    """Open an image of any of the kinds of `ImageInput`; raises InputError, or what Pillow raises."""
    if isinstance(source, Image.Image):
        return Opened(source)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, getattr(torch, "Tensor", ())):
        source = _array_of(source, label)
    if isinstance(source, np.ndarray):
        return Opened(_from_array(source, label, options))
    start, data = _read(source, label, options)
    walked = walk(data, label)
    return Opened(_open(data, label, start), data, walked)


def check_pixels(size: tuple[int, int], label: str, options: ImageOptions) -> None:
    """Raise InputError for a (width, height) of no pixels or of more than the limit."""
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f"{label}: expected an image of at least 1 x 1 pixels, got {width} x {height}")
    if width * height > options.max_pixels:
        raise InputError(
            f"{label}: expected at most {options.max_pixels} pixels, "
            f"got {width} x {height} = {width * height}; make the image smaller"
        )


def check_file(path: Path, label: str, options: ImageOptions) -> None:
    """Raise InputError unless `path` is a file within the limit of bytes."""
    try:
        found = path.is_file()
    except OSError:  # a name longer than any file's
        _refuse_inline(os.fspath(path), label)
        raise
    if not found:
        _refuse_inline(os.fspath(path), label)
        reason = "not a file" if path.exists() else "no such file"
        raise InputError(f"{label}: {reason}; expected the path of an image (addresses are not fetched)")
    _check_bytes(path.stat().st_size, label, options)


def _refuse_inline(text: str, label: str) -> None:
    """Raise InputError for a text that is an image in base64."""
    head = text[:_HEAD]
    if _INLINE.match(head) or _BASE64.fullmatch(head):
        encoded = "url.partition(',')[2]" if _INLINE.match(head) else "text"
        raise InputError(
            f"{label}: expected a path, got an image in base64; pass its bytes, base64.b64decode({encoded})"
        )


def _read(source: object, label: str, options: ImageOptions) -> tuple[int, bytes]:
    """Where reading began, above 0 only in a file object, and the bytes of the file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        _check_bytes(memoryview(source).nbytes, label, options)
        return 0, bytes(source)
    if hasattr(source, "read") and not isinstance(source, os.PathLike):
        return _read_object(source, label, options)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"{label}: expected a path, the bytes of a file, a file object, a PIL image, "
            f"a height x width x 3 array or a tensor, got {type(source).__name__}"
        )
    path = Path(os.fsdecode(source))
    check_file(path, label, options)
    with path.open("rb") as file:
        # Reads one byte past the limit: the file may have grown since.
        data = file.read(options.max_bytes + 1)
    _check_bytes(len(data), label, options)
    return 0, data


def _read_object(file: Any, label: str, options: ImageOptions) -> tuple[int, bytes]:
    if isinstance(file, io.TextIOBase):
        raise InputError(f"{label}: the file is open as text; open it with mode 'rb'")
    if getattr(file, "closed", False) is True:
        raise InputError(f"{label}: the file is closed; pass it while it is open, or its path")
    parts: list[bytes] = []
    room = options.max_bytes + 1
    try:
        start = file.tell() if hasattr(file, "tell") else 0
        while room > 0 and (part := _check_part(file.read(room), label)):
            parts.append(part)
            room -= len(part)
    except InputError:
        raise
    except Exception as error:  # a user's object may raise anything
        raise InputError(f"{label}: reading the file failed: {error or type(error).__name__}") from error
    data, start = b"".join(parts), start if isinstance(start, int) else 0
    if not data and start:
        raise InputError(f"{label}: the file stands at its end, byte {start}; call seek(0) before")
    _check_bytes(len(data), label, options)
    return start, data


def _check_part(part: object, label: str) -> bytes:
    if inspect.iscoroutine(part):
        part.close()
        raise InputError(f"{label}: the file's read() is asynchronous; pass `await file.read()` or file.file")
    if isinstance(part, str):
        raise InputError(f"{label}: the file is open as text; open it with mode 'rb'")
    if not isinstance(part, (bytes, bytearray, memoryview)):
        raise InputError(f"{label}: expected bytes of the file's read(), got {type(part).__name__}")
    return bytes(part)


def _check_bytes(size: int, label: str, options: ImageOptions) -> None:
    if size > options.max_bytes:
        raise InputError(f"{label}: expected at most {options.max_bytes} bytes, got {size}")
    if size == 0:
        raise InputError(f"{label}: the file is empty")


def _open(data: bytes, label: str, start: int) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        _refuse_inline(data[:_HEAD].decode("latin-1"), label)
        hint = f"; reading began at byte {start} of the file, call seek(0) before" if start else ""
        raise InputError(
            f"{label}: not an image of a supported format; expected one of {', '.join(FORMATS)}{hint}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{label}: more pixels than this process lets Pillow read "
            f"(PIL.Image.MAX_IMAGE_PIXELS is {Image.MAX_IMAGE_PIXELS}); make the image smaller"
        ) from error


def _array_of(tensor: Any, label: str) -> np.ndarray:
    """A torch tensor as an array of height x width x channels, copied from a GPU."""
    try:
        host = tensor.detach().cpu()
        array: np.ndarray = (host.float() if host.is_floating_point() else host).numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # sparse, quantised or without data
        raise InputError(f"{label}: the tensor has no values that can be read: {error}") from error
    shape = array.shape
    channels_first = array.ndim == 3 and shape[0] in _CHANNELS and shape[2] not in _CHANNELS
    return array.transpose(1, 2, 0) if channels_first else array


def _from_array(array: np.ndarray, label: str, options: ImageOptions) -> Image.Image:
    _check_shape(array, label)
    check_pixels((array.shape[1], array.shape[0]), label, options)
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
            "pass values of 0 to 255 as uint8, and an image before its normalisation"
        )
    return Image.fromarray(np.rint(array.astype(np.float32) * 255).astype(np.uint8))


def _check_shape(array: np.ndarray, label: str) -> None:
    """Refuse what is not height x width (x channels), above all channels first."""
    shape = tuple(array.shape)
    if array.ndim == 2 or (array.ndim == 3 and shape[2] in _CHANNELS and shape[0] not in (3, 4)):
        return
    if array.ndim == 3 and shape[0] in (3, 4) and shape[2] in _CHANNELS:
        raise InputError(
            f"{label}: the array's shape {shape} reads as height x width x channels and as channels first; "
            "pass PIL.Image.fromarray(array)"
        )
    hint = ""
    if array.ndim == 3 and shape[0] in _CHANNELS:
        hint = "; it looks like channels first, pass array.transpose(1, 2, 0)"
    elif array.ndim == 4:
        hint = "; pass the images of a batch one by one to predict_batch"
    raise InputError(f"{label}: expected an array of height x width x 3, got the shape {shape}{hint}")
