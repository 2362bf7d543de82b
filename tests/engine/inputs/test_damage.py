"""Damage that still decodes is told; sound files of every encoder setting are not accused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from helpers import cpu_seconds
from PIL import Image

from engine.errors import InputError
from engine.inputs.damage import walk
from engine.inputs.options import ImageOptions
from engine.inputs.preprocess import decode_image


def damage(data):
    """The warning of damage, without its code; empty for none."""
    warnings = decode_image(data).warnings
    return next((w.removeprefix("image_damaged: ") for w in warnings if w.startswith("image_damaged")), "")


def draw(random):
    """A picture of any size from 1 pixel, blocky or smooth."""
    width, height = (int(side) for side in random.integers(1, 160, 2))
    step = int(random.integers(1, 20))
    blocks = random.integers(0, 256, (max(1, height // step), max(1, width // step), 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), int(random.choice([0, 3])))


SOUND = {
    "JPEG": lambda random: {
        "quality": int(random.integers(1, 100)),
        "subsampling": int(random.integers(3)),
        "progressive": bool(random.integers(2)),
        "optimize": bool(random.integers(2)),
        "restart_marker_blocks": int(random.integers(2) * random.integers(1, 9)),
    },
    "PNG": lambda random: {"compress_level": int(random.integers(10))},
    "GIF": lambda random: {"interlace": int(random.integers(2))},
    "WEBP": lambda random: {"lossless": bool(random.integers(2)), "quality": int(random.integers(1, 100))},
    "BMP": lambda random: {},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SOUND)
def test_sound_files_are_not_accused_and_read_as_pillow_reads_them(kind, encode):
    random = np.random.default_rng(len(kind))
    for number in range(60):
        mode = ("RGB", "L", "P", "RGBA", "1", "CMYK")[number % (6 if kind == "JPEG" else 5)]
        mode = "RGB" if kind == "JPEG" and mode in ("P", "RGBA") else mode
        data = encode(draw(random).convert(mode), kind, **SOUND[kind](random))
        assert damage(data) == ""
        with Image.open(io.BytesIO(data)) as theirs:
            if theirs.mode == "RGB":
                assert np.array_equal(theirs, decode_image(data).rgb)


def test_a_wrong_checksum_of_a_pngs_pixels(photo, encode):
    data = bytearray(encode(photo, "PNG"))
    at = data.index(b"IDAT")
    data[at + 4 + struct.unpack(">I", data[at - 4 : at])[0]] ^= 1
    assert damage(bytes(data)) == "the checksum of its chunk IDAT is wrong; pixels may be wrong or missing"


def test_a_png_without_its_end(photo, encode):
    assert damage(encode(photo, "PNG")[:-12]).startswith("it ends too early")


@pytest.mark.parametrize("kind", ["JPEG", "GIF"])
def test_a_stream_that_is_not_read_to_its_end(photo, encode, kind):
    """Codes that a flipped bit made shorter or longer; most of such files look sound to the decoder."""
    data = encode(photo if kind == "JPEG" else photo.convert("P"), kind)
    random, said = np.random.default_rng(0), []
    for _ in range(150):
        bent = bytearray(data)
        bent[random.integers(len(data) * 3 // 4, len(data) - 2)] ^= 1 << int(random.integers(8))
        try:
            said.append(damage(bytes(bent)).partition(";")[0])
        except InputError:
            continue
    assert "its picture is full before its data ends" in said


def test_a_jpeg_whose_end_comes_early_and_whose_scans_are_missing(photo, encode):
    data = encode(photo, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    assert damage(data[:last] + b"\xff\xd9").startswith("some of its scans are missing")
    data = encode(photo, "JPEG")
    assert damage(data[:-200] + b"\xff\xd9").startswith("its data ends before its picture is full")
    with pytest.raises(InputError, match="truncated"):
        decode_image(data[:-2])


def test_what_follows_a_whole_picture_does_not_matter(photo, encode):
    for kind in ("JPEG", "PNG"):
        assert damage(encode(photo, kind) + b"appended by a camera") == ""


def test_lengths_and_names_of_parts(photo, encode):
    bitmap, webp = bytearray(encode(photo, "BMP")), bytearray(encode(photo, "WEBP", exif=b"Exif\0\0MM"))
    bitmap[2] ^= 2
    webp[webp.index(b"EXIF")] ^= 2
    assert damage(bytes(bitmap)).startswith("it states ")
    assert "its chunk b'GXIF' is of no known kind" in damage(bytes(webp))
    assert damage(encode(photo, "WEBP") + bytes(9)).startswith("it states ")


def many_parts(kind):
    """Files of a few megabytes that consist of empty parts, over each of which Python would go."""
    chunk = struct.pack(">I", 0) + b"teXt" + struct.pack(">I", zlib.crc32(b"teXt"))
    return {
        "PNG": b"\x89PNG\r\n\x1a\n" + chunk * 300_000,
        "JPEG": b"\xff\xd8" + b"\xff\xfe\x00\x02" * 300_000,
        "GIF": b"GIF89a\x01\x00\x01\x00\x00\x00\x00!\xfe" + b"\x01a" * 300_000,
        "BMP": b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 9, 9, 1, 8, 1) + bytes(2_000_000),
    }[kind]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP"])
def test_a_file_of_very_many_parts_is_refused_at_once(kind):
    data = many_parts(kind)

    def refuse():
        with pytest.raises(InputError, match="at most"):
            decode_image(data)

    assert cpu_seconds(refuse) < 1


def test_the_walk_reads_no_further_than_the_first_picture(photo, encode):
    """Frames beyond the first may be what they like."""
    more = {"save_all": True, "append_images": [photo.rotate(90).convert("P")]}
    data = encode(photo.convert("P"), "GIF", **more)
    assert walk(data, "it").animated is True
    assert damage(data[:-40] + bytes(40)) == ""


# One small picture that costs much


def blank(kind, mode, side, **options):
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["1", "P", "RGB", "RGBA"])
def test_few_bytes_for_very_many_pixels_are_refused(mode):
    with pytest.raises(InputError, match=r"at most 100 pixels a byte of the file above 16000000 pixels"):
        decode_image(blank("PNG", mode, 4100))


def test_a_kind_that_takes_more_memory_than_the_limit_is_refused():
    """WebP takes 16 bytes a pixel while it is decoded, so fewer pixels of it are read."""
    options = ImageOptions(max_decoding_bytes=4_000_000)
    data = blank("WEBP", "RGB", 900)
    with pytest.raises(InputError, match=r"at most 4000000 bytes to read, got 12960000 for 900 x 900 pixels"):
        decode_image(data, options=options)
    assert decode_image(blank("JPEG", "RGB", 900), options=options).rgb.size == (900, 900)


def test_only_the_first_frame_is_decoded(photo, encode, monkeypatch):
    from PIL import ImageFile

    loads = []
    load = ImageFile.ImageFile.load_prepare
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", lambda image: loads.append(image) or load(image))
    for kind, mode in (("GIF", "P"), ("PNG", "RGB"), ("WEBP", "RGB")):
        frames = [photo.rotate(angle).convert(mode) for angle in (90, 180, 270)]
        loads.clear()
        decoded = decode_image(encode(photo.convert(mode), kind, save_all=True, append_images=frames))
        assert any(w.startswith("frames_ignored") for w in decoded.warnings)
        assert len(loads) == 1
