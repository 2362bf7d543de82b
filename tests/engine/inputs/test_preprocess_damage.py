"""Damaged, oversized and foreign files."""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from helpers import cpu_seconds

from engine.errors import InputError
from engine.inputs.preprocess import ImageOptions, decode_image

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF"]


def png_header(width: int, height: int) -> bytes:
    """A 1-bit PNG of any size whose pixels are zeros, deflated."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    deflate = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    body = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


# Rows 1 and 2: truncated and corrupt files


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_files_raise_only_input_errors(photo, encode, kind):
    data = encode(photo, kind)
    refused = 0
    for percent in range(100):
        try:
            decode_image(data[: len(data) * percent // 100], name=f"item {percent}")
        except InputError as error:
            assert str(error).startswith(f"item {percent}: ")
            refused += 1
    assert refused >= 90


def test_most_of_a_jpeg_says_what_is_wrong(photo, encode, tmp_path):
    data = encode(photo, "JPEG")
    path = tmp_path / "half.jpg"
    path.write_bytes(data[: len(data) * 9 // 10])
    with pytest.raises(InputError, match=r"half\.jpg.*truncated"):
        decode_image(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, "RGB") for kind in FORMATS]
    + [(kind, "P") for kind in ("PNG", "BMP", "GIF")]
    + [(kind, "animated") for kind in ("PNG", "WEBP", "GIF")],
)
def test_mutated_files_raise_only_input_errors(photo, encode, kind, mode):
    picture = photo.convert("P") if mode == "P" else photo
    more = {"save_all": True, "append_images": [photo.rotate(90), photo]} if mode == "animated" else {}
    data = encode(picture, kind, **more)
    generator = np.random.default_rng([FORMATS.index(kind), len(mode)])
    for seed in range(350):
        mutated = mutate(data, generator)

        def decode(mutated=mutated, seed=seed):
            try:
                # A canvas of the full 64 Mpx may take seconds; here the parsers are tried, not the limit.
                decode_image(mutated, options=ImageOptions(max_pixels=4_000_000))
            except InputError:
                pass
            except BaseException as error:  # names the seed of a foreign exception
                raise AssertionError(f"seed {seed}: {type(error).__name__} escaped") from error

        assert cpu_seconds(decode) < 1


def mutate(data: bytes, generator: np.random.Generator) -> bytes:
    """Change some bytes; half of the changes fall on the first 64, where the headers are."""
    mutated = bytearray(data)
    for _ in range(generator.integers(1, 9)):
        end = 64 if generator.random() < 0.5 else len(mutated)
        mutated[generator.integers(0, min(end, len(mutated)))] = generator.integers(0, 256)
    if generator.random() < 0.2:
        cut, length = generator.integers(0, len(mutated), 2)
        del mutated[cut : cut + length // 4]
    return bytes(mutated)


# Row 3: limits

BOMB = """
import resource, sys
from PIL import ImageFile
from engine.errors import InputError
from engine.inputs.preprocess import decode_image
data = open(sys.argv[1], "rb").read()
try: decode_image(b"x" * 100)
except InputError: pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loads = []
load = ImageFile.ImageFile.load
ImageFile.ImageFile.load = lambda image: loads.append(image) or load(image)
try: decode_image(data)
except InputError as error: message = str(error)
print(len(loads), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(message)
"""


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(13000, 13000))
    assert path.stat().st_size < 40_000
    command = [sys.executable, "-W", "ignore", "-c", BOMB, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures, message = done.stdout.splitlines()
    loads, kilobytes = map(int, figures.split())
    assert "13000 x 13000 = 169000000" in message
    assert loads == 0
    assert kilobytes < 20_000


@pytest.mark.filterwarnings("error")
def test_a_bomb_is_an_input_error_where_warnings_are_errors():
    for side in (9000, 11000, 20000):
        with pytest.raises(InputError):
            decode_image(png_header(side, 10000)[:5000])


@pytest.mark.filterwarnings("ignore")
def test_a_webp_of_a_huge_canvas_is_refused_without_memory(photo, encode):
    data = bytearray(encode(photo, "WEBP", save_all=True, append_images=[photo.rotate(180)]))
    canvas = data.index(b"VP8X") + 12
    data[canvas : canvas + 6] = (12999).to_bytes(3, "little") * 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError):
        decode_image(bytes(data))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def test_limits_can_be_set(photo, encode, tmp_path):
    data = encode(photo, "PNG")
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(InputError, match=f"at most 100 bytes, got {len(data)}"):
            decode_image(source, options=ImageOptions(max_bytes=100))
    for source in (data, path, photo, np.asarray(photo)):
        with pytest.raises(InputError, match="at most 3071 pixels, got 64 x 48 = 3072"):
            decode_image(source, options=ImageOptions(max_pixels=3071))


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "large.jpg"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="at most 33554432 bytes, got 1099511627776"):
        decode_image(path)


@pytest.mark.parametrize(
    "source", ["/dev/zero", "no such file.jpg", "/", "a\0b", "", "https://example.org/a.jpg"]
)
def test_what_is_no_file_is_refused(source):
    with pytest.raises(InputError, match="file|cannot be read"):
        decode_image(source)


@pytest.mark.parametrize("source", [b"", None, 3, [1, 2], {"a": 1}, object()])
def test_other_types_are_refused(source):
    with pytest.raises(InputError, match="empty|expected a path"):
        decode_image(source)
