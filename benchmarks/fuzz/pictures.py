"""Mutated pictures: sound files of every format and mode, what may happen to one, and what a reader says."""

from __future__ import annotations

import functools
import io
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from engine.errors import InputError
from engine.inputs.preprocess import Decoded, decode_image

SIDES = (64, 48)
_ORIENTATION = 0x0112


class Tried(NamedTuple):
    """What became of one mutated picture.

    outcome: "refused"; of the accepted ones "same" pixels as before, "told" of by a warning that the sound
    file has not, or "silent". seconds: of this thread's CPU time.
    """

    file: str
    mutation: str
    outcome: str
    seconds: float
    message: str = ""


def photo(seed: int = 7) -> Image.Image:
    """A smooth, noisy RGB picture of 64 x 48 pixels."""
    width, height = SIDES
    rows, columns = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(seed).integers(0, 40, (height, width, 3))
    base = np.stack([rows * 4, columns * 3, rows + columns], axis=-1)
    return Image.fromarray((base + noise).clip(0, 255).astype(np.uint8))


def _save(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _runs() -> bytes:
    """A bitmap of 8 bits in runs, which Pillow reads and does not write."""
    width, height = SIDES
    values = np.asarray(photo().convert("L")) // 32
    row = [b"".join(bytes([1, value]) for value in line) + b"\0\0" for line in values.tolist()]
    data, palette = (
        b"".join(row[::-1]) + b"\0\1",
        bytes(x for i in range(256) for x in (i, 255 - i, i // 2, 0)),
    )
    place = 14 + 40 + len(palette)
    head = struct.pack("<HIHHI", 0x4D42, place + len(data), 0, 0, place)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    return head + info + palette + data


@functools.cache
def sound_files() -> dict[str, bytes]:
    """A file of each format and mode, by name; one image with different encodings."""
    image: Image.Image = photo()
    more: dict[str, Any] = {"save_all": True, "append_images": [photo(8), photo(9)]}
    palette, alpha = image.convert("P"), image.copy()
    alpha.putalpha(image.getchannel("R"))
    turned = Image.Exif()
    turned[_ORIENTATION] = 6
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    modes: dict[str, list[tuple[str, Image.Image, dict[str, Any]]]] = {
        "": [
            ("jpeg", image, {}),
            ("png", image, {}),
            ("webp", image, {}),
            ("bmp", image, {}),
            ("gif", palette, {}),
        ],
        "grey": [(kind, image.convert("L"), {}) for kind in ("jpeg", "png", "bmp")],
        "palette": [("png", palette, {"transparency": 3}), ("bmp", palette, {})],
        "alpha": [("png", alpha, {}), ("webp", alpha, {"lossless": True})],
        "animated": [
            ("png", image, more),
            ("webp", image, more),
            ("gif", palette, more),
            ("mpo", image, more),
        ],
        "cmyk": [("jpeg", image.convert("CMYK"), {})],
        "progressive": [("jpeg", image, {"progressive": True})],
        "restarts": [("jpeg", image, {"restart_marker_blocks": 4, "subsampling": 0})],
        "turned": [("jpeg", image, {"exif": turned})],
        "deep": [("png", deep, {})],
        "bilevel": [("png", image.convert("1"), {})],
        "interlaced": [("gif", palette, {"interlace": 1})],
    }
    files = {
        f"{kind} {mode}".strip(): _save(picture, kind.upper(), **options)
        for mode, listed in modes.items()
        for kind, picture, options in listed
    }
    return {**files, "bmp runs": _runs()}


def _bytes(data: bytearray, random: np.random.Generator) -> None:
    """Other bytes, half of them among the first 64, where headers are."""
    for _ in range(random.integers(1, 9)):
        end = min(64 if random.random() < 0.5 else len(data), len(data))
        data[random.integers(end)] = random.integers(256)


def _bit(data: bytearray, random: np.random.Generator) -> None:
    data[random.integers(len(data))] ^= 1 << int(random.integers(8))


def _cut(data: bytearray, random: np.random.Generator) -> None:
    del data[random.integers(len(data)) :]


def _run(data: bytearray, random: np.random.Generator) -> slice:
    begin = int(random.integers(len(data)))
    return slice(begin, min(begin + int(random.integers(1, 1 + len(data) // 4)), len(data)))


def _zeros(data: bytearray, random: np.random.Generator) -> None:
    run = _run(data, random)
    data[run] = bytes(run.stop - run.start)


def _delete(data: bytearray, random: np.random.Generator) -> None:
    del data[_run(data, random)]


def _insert(data: bytearray, random: np.random.Generator) -> None:
    run = _run(data, random)
    data[run.start : run.start] = random.integers(0, 256, run.stop - run.start, dtype=np.uint8).tobytes()


def _repeat(data: bytearray, random: np.random.Generator) -> None:
    run = _run(data, random)
    data[run.stop : run.stop] = data[run]


MUTATIONS: dict[str, Callable[[bytearray, np.random.Generator], None]] = {
    "bytes": _bytes,
    "bit": _bit,
    "cut": _cut,
    "zeros": _zeros,
    "delete": _delete,
    "insert": _insert,
    "repeat": _repeat,
}


def mutated(seed: int) -> tuple[str, str, bytes]:
    """(Name of the sound file, name of the mutation, mutated bytes) of a seed."""
    random, files = np.random.default_rng([1, seed]), sound_files()
    name = list(files)[seed % len(files)]
    mutation = list(MUTATIONS)[int(random.integers(len(MUTATIONS)))]
    data = bytearray(files[name])
    MUTATIONS[mutation](data, random)
    return name, mutation, bytes(data)


@functools.cache
def _sound(name: str) -> Decoded:
    return decode_image(sound_files()[name])


def try_picture(seed: int) -> Tried:
    """Read the mutated picture of a seed; whatever it raises but InputError is raised."""
    name, mutation, data = mutated(seed)
    sound, begun = _sound(name), time.thread_time()
    try:
        decoded = decode_image(data)
    except InputError as error:
        return Tried(name, mutation, "refused", time.thread_time() - begun, str(error))
    took = time.thread_time() - begun
    same = decoded.rgb.size == sound.rgb.size and np.array_equal(
        np.asarray(decoded.rgb), np.asarray(sound.rgb)
    )
    outcome = "same" if same else "told" if set(decoded.warnings) - set(sound.warnings) else "silent"
    return Tried(name, mutation, outcome, took, "; ".join(decoded.warnings))
