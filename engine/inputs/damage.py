"""Damage that decoders pass over: the parts of an image file, walked before it is decoded.

Pillow checks no CRC of a PNG's pixels, does not tell libjpeg's warnings, and ignores what a GIF or a JPEG has
left when its picture is full. Three things tell more: checksums and lengths of a file's parts; whether a JPEG
has all its scans; and how much of its stream a decoder asks for, which is not what was written where a code
was flipped on the way. What leaves no trace of these, as a flipped pixel of a BMP, nobody can tell.

The walk is bounded: a file of millions of empty parts, over each of which a parser of Python's would go, is
refused.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile

from engine.errors import InputError

_MOST_PARTS = 100_000  # chunks, segments or blocks; a PNG of 32 MB by libpng has 4,000 of 8 kB
_PADDING = bytes(9)  # libjpeg reads 8 ahead of the codes that it needs
_JPEG_END = b"\xff\xd9"
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_BARE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_WEBP_CHUNKS = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP", b"EXIF", b"XMP "}
_GIF_TAIL = 5  # bytes that hold the codes Clear and End and a part of the last pixels' code
_RUNS_HEADER = 40  # bytes of the oldest header that tells of compression
_RUNS = (1, 2)  # a BMP's compression in runs, 8 and 4 bits
_MOST_RUNS = 2**20  # bytes of them: Pillow reads them in Python, a microsecond a byte


class Damaged(Exception):
    """A part of the file is not what it says; the message completes "the file is damaged: "."""


class _TooManyError(Exception):
    """More parts than a parser of Python's should go over; the message completes "expected "."""


class Watched(io.BytesIO):
    """A file whose reads end at `low` and `high`, so that it tells which of these its reader went past."""

    def __init__(self, data: bytes, low: int, high: int) -> None:
        super().__init__(data)
        self._stops = (low, high)

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as a file does, but never across a stop."""
        at = self.tell()
        stop = next((stop for stop in self._stops if stop > at), None)
        if stop is not None and (size is None or size < 0 or size > stop - at):
            size = stop - at
        return super().read(size)

    @property
    def problem(self) -> str:
        """What is wrong where the reader stopped: short of the first stop, or past the second."""
        low, high = self._stops
        if self.tell() <= low:
            return "its picture is full before its data ends"
        return "its data ends before its picture is full" if self.tell() > high else ""


class Walked(NamedTuple):
    """What the walk over a file found: the damage, or "", and the stream to watch while it is decoded.

    `animated` says whether the file has more than one frame, where the walk can tell.
    """

    damage: str = ""
    stream: Watched | None = None
    animated: bool | None = None

    def watch(self, image: Image.Image) -> None:
        """Let the image be decoded from the stream."""
        if self.stream is not None and isinstance(image, ImageFile.ImageFile):
            image.fp = self.stream

    @property
    def warning(self) -> str:
        """The warning for the damage of a file that was decoded; empty for none."""
        problem = self.damage or (self.stream.problem if self.stream is not None else "")
        return f"image_damaged: {problem}; pixels may be wrong or missing" if problem else ""


def walk(data: bytes, label: str) -> Walked:
    """Walk over the parts of a file of any format; raises InputError for one of too many parts."""
    walker = next((found for magic, found in _WALKERS if data.startswith(magic)), None)
    if walker is None:
        return Walked()
    try:
        return walker(data)
    except (Damaged, IndexError) as error:  # an index beyond the end of a file that was cut
        return Walked(str(error) if isinstance(error, Damaged) else "it ends too early")
    except _TooManyError as error:
        raise InputError(f"{label}: expected {error}") from error


def _parts() -> Iterator[None]:
    for _ in range(_MOST_PARTS):
        yield None
    raise _TooManyError(f"an image file of at most {_MOST_PARTS} parts, got more; save it again")


def _number(data: bytes, at: int, size: int, big: bool = True) -> int:
    if at + size > len(data):
        raise IndexError
    return int.from_bytes(data[at : at + size], "big" if big else "little")


def _walk_png(data: bytes) -> Walked:
    """Each chunk's length and CRC, up to IEND."""
    at, view = 8, memoryview(data)
    for _ in _parts():
        end = at + 12 + _number(data, at, 4)
        kind = data[at + 4 : at + 8]
        name = kind.decode("latin-1") if kind.isalpha() else repr(kind)
        if end > len(data):
            raise Damaged(f"its chunk {name} is cut short")
        if zlib.crc32(view[at + 4 : end - 4]) != _number(data, end - 4, 4):
            raise Damaged(f"the checksum of its chunk {name} is wrong")
        if kind == b"IEND":
            break
        at = end
    return Walked()


class _Scan(NamedTuple):
    """Where a scan's codes begin, its components, and of a progressive one its coefficients and precision."""

    begin: int
    components: bytes
    first: int
    last: int
    low: int


def _walk_jpeg(data: bytes) -> Walked:
    """The markers up to the end of the first image; a single sequential scan is watched."""
    at, frame, restarts, scans = 2, b"", 0, list[_Scan]()
    for _ in _parts():
        if data[at] != 0xFF:
            raise Damaged(f"byte {at} is no marker")
        code, at = data[at + 1], at + (1 if data[at + 1] == 0xFF else 2)
        if code == 0xD9:
            _check_scans(frame, scans)
            return Walked()
        if code == 0xFF or code in _BARE:
            continue
        body = data[at + 2 : at + _number(data, at, 2)]
        at += 2 + len(body)
        if code == 0xDD:
            restarts = _number(body, 0, 2)
        if code in _FRAMES:
            frame = bytes([code]) + body
        if code == 0xDA:
            count = body[0]
            low, high = body[1 + 2 * count : 3 + 2 * count]
            scans.append(_Scan(at, body[1 : 1 + 2 * count : 2], low, high, body[3 + 2 * count] & 15))
            if frame[:1] and frame[0] in _SEQUENTIAL and count == frame[6]:
                return _watch_scan(data, at, restarts)
            found = _MARKER.search(data, at)
            if found is None:
                raise Damaged("its end marker is missing")
            at = found.start()
    return Walked()


def _watch_scan(data: bytes, begin: int, restarts: int) -> Walked:
    """Watch the only scan: of sound codes the decoder needs the last two bytes, and nothing behind them."""
    end = data.find(_JPEG_END, begin)
    if end < 0:
        raise Damaged("its end marker is missing")
    codes = data[begin:end].rstrip(b"\xff")  # fill bytes
    if restarts:
        _check_restarts(codes)
    end = begin + len(codes)
    whole = data[:end] + _PADDING + _JPEG_END
    return Walked(stream=Watched(whole, max(end - 2, begin), end + len(_PADDING)))


def _check_restarts(codes: bytes) -> None:
    """Restart markers are numbered from 0 to 7, again and again."""
    values = np.frombuffer(codes, np.uint8)
    after = values[1:][values[:-1] == 0xFF]
    numbers = after[(after >= 0xD0) & (after <= 0xD7)] - 0xD0
    if not np.array_equal(numbers, np.arange(len(numbers)) % 8):
        raise Damaged("its restart markers are out of order")


def _check_scans(frame: bytes, scans: list[_Scan]) -> None:
    """A progressive image needs every coefficient of every component in full precision."""
    if not scans:
        raise Damaged("it has no scan")
    if frame[:1] != bytes([_PROGRESSIVE]):
        return
    missing = {component: set(range(64)) for component in frame[7 : 7 + 3 * frame[6] : 3]}
    for scan in scans:
        if scan.low == 0:
            for component in scan.components:
                missing.get(component, set()).difference_update(range(scan.first, scan.last + 1))
    if any(missing.values()):
        raise Damaged("some of its scans are missing")


def _walk_gif(data: bytes) -> Walked:
    """The blocks up to the one behind the first image, whose codes are watched."""
    at, stream, parts = 13 + _colours(data[10]), None, _parts()
    while True:
        kind = data[at : at + 1]
        if kind == b"!":
            at = _blocks(data, at + 2, parts)[-1]
        elif kind == b"," and stream is None:
            at += 10 + _colours(data[at + 9]) + 1
            starts = _blocks(data, at, parts)
            stream, at = _watch_codes(data, starts), starts[-1]
        elif kind in (b",", b";"):
            return Walked(stream=stream, animated=kind == b",")
        else:
            return Walked("" if stream and not kind else "a block of it is of no known kind", stream)


def _colours(flags: int) -> int:
    """Bytes of a GIF's colour table."""
    return 3 << (flags & 7) + 1 if flags & 128 else 0


def _blocks(data: bytes, at: int, parts: Iterator[None]) -> list[int]:
    """Where each of a chain of data blocks begins, its end, and last what comes behind the chain."""
    starts = [at]
    while data[at]:
        next(parts)
        at += 1 + data[at]
        starts.append(at)
    return [*starts, at + 1]


def _watch_codes(data: bytes, starts: list[int]) -> Watched:
    """Watch a GIF's codes, the last of them in a block of their own: a decoder takes whole blocks."""
    *starts, behind = starts
    codes = b"".join(data[at + 1 : end] for at, end in pairwise(starts))
    cut = max(len(codes) - _GIF_TAIL, 0)
    head, tail = (
        b"".join(bytes([len(part := codes[i : min(i + 255, end)])]) + part for i in range(begin, end, 255))
        for begin, end in ((0, cut), (cut, len(codes)))
    )
    low = starts[0] + len(head)
    return Watched(data[: starts[0]] + head + tail + data[behind - 1 :], low, low + len(tail) + 1)


def _walk_webp(data: bytes) -> Walked:
    """Each chunk's name and length."""
    end, at = 8 + _number(data, 4, 4, big=False), 12
    if not end <= len(data) <= end + end % 2:
        raise Damaged(f"it states {end} bytes and has {len(data)}")
    for _ in _parts():
        if at + 8 > end:
            break
        name, size = data[at : at + 4], _number(data, at + 4, 4, big=False)
        if name not in _WEBP_CHUNKS:
            raise Damaged(f"its chunk {name!r} is of no known kind")
        if at + 8 + size > end:
            raise Damaged(f"its chunk {name.decode()} is cut short")
        at += 8 + size + size % 2
    return Walked()


def _walk_bmp(data: bytes) -> Walked:
    """The size that the header states, and that of runs."""
    in_runs = _number(data, 14, 4, big=False) >= _RUNS_HEADER and _number(data, 30, 4, big=False) in _RUNS
    if in_runs and len(data) > _MOST_RUNS:
        raise _TooManyError(
            f"a bitmap in runs of at most {_MOST_RUNS} bytes, got {len(data)}; save it as PNG"
        )
    stated = _number(data, 2, 4, big=False)
    if stated and stated != len(data):
        raise Damaged(f"it states {stated} bytes and has {len(data)}")
    return Walked()


_WALKERS: tuple[tuple[bytes, Callable[[bytes], Walked]], ...] = (
    (b"\x89PNG\r\n\x1a\n", _walk_png),
    (b"\xff\xd8", _walk_jpeg),
    (b"GIF8", _walk_gif),
    (b"RIFF", _walk_webp),
    (b"BM", _walk_bmp),
)
