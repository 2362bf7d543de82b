from __future__ import annotations

import io
import resource
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from engine.errors import InputError
from engine.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    ImageOptions,
    decode_image,
    make_thumbnail,
    preprocess_image,
)

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF"]


def pixels_of(source, **options) -> np.ndarray:
    return np.asarray(decode_image(source, options=ImageOptions(**options)).rgb)


def png_header(width: int, height: int) -> bytes:
    """A 1-bit PNG of any size whose pixels are zeros, deflated."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    deflate = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    body = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


# The network's input


def test_the_resize_is_pillows_and_the_normalisation_right(photo):
    result = preprocess_image(photo)
    resized = np.asarray(photo.resize((256, 256), Image.Resampling.BICUBIC))
    exact = (resized.astype(np.float64) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    assert result.pixels.dtype == np.float32
    assert result.pixels.shape == (3, 256, 256)
    assert result.pixels.flags.c_contiguous
    assert result.size == (64, 48)
    assert result.warnings == ()
    np.testing.assert_allclose(result.pixels, exact.transpose(2, 0, 1), rtol=0, atol=1e-6)
    restored = result.pixels.astype(np.float64).transpose(1, 2, 0) * np.array(CLIP_STD) + np.array(CLIP_MEAN)
    assert np.array_equal(np.rint(restored * 255), resized)


def test_all_sources_of_one_picture_agree(photo, encode, tmp_path):
    data = encode(photo, "PNG")
    path = tmp_path / "ünïcode picture.png"
    path.write_bytes(data)
    sources = [
        path,
        str(path),
        data,
        bytearray(data),
        memoryview(data),
        Image.open(io.BytesIO(data)),
        np.asarray(photo),
    ]
    first = preprocess_image(photo).pixels
    for source in sources:
        assert np.array_equal(preprocess_image(source).pixels, first)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(photo, encode, kind):
    data = encode(photo, kind)
    assert np.array_equal(pixels_of(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "PCX", "PDF"])
def test_other_formats_are_refused(photo, encode, kind):
    with pytest.raises(InputError, match="expected one of JPEG, PNG"):
        decode_image(encode(photo, kind))


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
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "P", "animated"])
def test_mutated_files_raise_only_input_errors(photo, encode, kind, mode):
    if mode == "P" and kind in ("JPEG", "WEBP"):
        pytest.skip("no palette in this format")
    if mode == "animated" and kind in ("JPEG", "BMP"):
        pytest.skip("no animation in this format")
    picture = photo.convert("P") if mode == "P" else photo
    more = {"save_all": True, "append_images": [photo.rotate(90), photo]} if mode == "animated" else {}
    data = encode(picture, kind, **more)
    generator = np.random.default_rng([FORMATS.index(kind), len(mode)])
    for seed in range(350):
        mutated = mutate(data, generator)
        start = time.perf_counter()
        try:
            # A canvas of the full 64 Mpx may take seconds; here the parsers are tried, not the limit.
            decode_image(mutated, options=ImageOptions(max_pixels=8_000_000))
        except InputError:
            pass
        except BaseException as error:  # names the seed of a foreign exception
            raise AssertionError(f"seed {seed}: {type(error).__name__} escaped") from error
        assert time.perf_counter() - start < 1


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
import resource, sys, time
from engine.errors import InputError
from engine.preprocess import decode_image
data = open(sys.argv[1], "rb").read()
try: decode_image(b"x" * 100)
except InputError: pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
seconds = 9
for _ in range(3):
    start = time.perf_counter()
    try: decode_image(data)
    except InputError as error: message = str(error)
    seconds = min(seconds, time.perf_counter() - start)
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(message)
"""


def test_a_bomb_is_refused_fast_and_without_memory(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(13000, 13000))
    assert path.stat().st_size < 40_000
    command = [sys.executable, "-W", "ignore", "-c", BOMB, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures, message = done.stdout.splitlines()
    seconds, kilobytes = map(float, figures.split())
    assert "13000 x 13000 = 169000000" in message
    assert seconds < 0.05
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


# Rows 4 to 7: modes, depth, transparency, animation


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX", "LAB"])
def test_modes_are_converted(photo, mode):
    picture = photo.convert(mode)
    assert np.array_equal(pixels_of(picture), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_opaque_alpha_changes_nothing(photo, mode):
    grey = mode in ("LA", "La")
    base = photo.convert("L" if grey else "P" if mode == "PA" else "RGB")
    between = {"La": "LA", "RGBa": "RGBA"}.get(mode)
    picture = (base.convert(between) if between else base).convert(mode)
    assert np.array_equal(pixels_of(picture), np.asarray(base.convert("RGB")))


def test_cmyk_jpeg(photo, encode):
    data = encode(photo.convert("CMYK"), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(pixels_of(data), expected)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_sixteen_bits_keep_256_levels(mode):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    stored = ramp.astype(">u2" if mode == "I;16B" else "<u2")
    picture = Image.frombytes(mode, (256, 256), stored.tobytes())
    result = pixels_of(picture)
    assert np.array_equal(result[..., 0], ramp >> 8)
    assert np.array_equal(result[..., 0], result[..., 2])


def test_a_sixteen_bit_png_keeps_256_levels(encode):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    data = encode(Image.fromarray(ramp), "PNG")
    assert len(np.unique(pixels_of(data))) == 256


def test_integer_and_float_modes():
    ramp = np.arange(256).reshape(16, 16)
    for values in (
        ramp.astype(np.int32),
        ramp.astype(np.int32) * 257,
        ramp.astype(np.float32),
        ramp.astype(np.float32) / 255,
    ):
        assert np.array_equal(pixels_of(Image.fromarray(values))[..., 0], ramp)


@pytest.mark.parametrize("value", [-1.0, 256.0, np.nan, np.inf])
def test_float_modes_out_of_range_are_refused(value):
    values = np.zeros((4, 4), np.float32)
    values[1, 1] = value
    with pytest.raises(InputError, match="NaN|expected pixels in"):
        decode_image(Image.fromarray(values))


def test_transparency_lies_on_white():
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (pixels_of(hidden) == 255).all()
    assert (pixels_of(hidden, background=(0, 0, 255)) == (0, 0, 255)).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert (pixels_of(half) == 127).all()


def test_transparent_colours_and_palettes_lie_on_white(encode):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert (pixels_of(encode(palette, "PNG", transparency=1)) == 255).all()
    assert (pixels_of(encode(palette, "PNG", transparency=0)) == (0, 255, 0)).all()
    assert (pixels_of(encode(palette, "GIF", transparency=1)) == 255).all()
    assert (
        pixels_of(encode(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))) == 255
    ).all()
    assert (pixels_of(encode(Image.new("L", (4, 4), 7), "PNG", transparency=7)) == 255).all()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_read_with_a_warning(encode, kind):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode_image(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert (np.asarray(decoded.rgb) == (255, 0, 0)).all()
    assert [warning.split(":")[0] for warning in decoded.warnings] == ["frames_ignored"]


# Row 8: orientation

STORED_AS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


def oriented(photo: Image.Image, orientation: int) -> tuple[Image.Image, Image.Exif]:
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](np.asarray(photo))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored, exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_eight_orientations_give_one_result(photo, encode, orientation, kind):
    stored, exif = oriented(photo, orientation)
    data = encode(stored, kind, exif=exif.tobytes(), **({"lossless": True} if kind == "WEBP" else {}))
    result = preprocess_image(data)
    assert result.size == photo.size
    assert np.array_equal(result.pixels, preprocess_image(photo).pixels)
    assert np.array_equal(pixels_of(data, apply_orientation=False), np.asarray(stored))


def test_jpeg_orientation(photo, encode):
    stored, exif = oriented(photo, 6)
    assert decode_image(encode(stored, "JPEG", exif=exif.tobytes())).rgb.size == photo.size


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_unknown_orientations_are_ignored(photo, encode, value):
    exif = Image.Exif()
    exif[0x0112] = value
    assert np.array_equal(pixels_of(encode(photo, "PNG", exif=exif.tobytes())), np.asarray(photo))


@pytest.mark.filterwarnings("ignore")
def test_unreadable_exif_leaves_the_picture_as_stored(photo, encode):
    data = encode(photo, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fbroken")
    assert np.array_equal(pixels_of(data), np.asarray(photo))


# Rows 9 and 10: sizes, arrays


@pytest.mark.parametrize(
    "size",
    [
        (1, 1),
        (1, 2),
        (2, 1),
        (3, 3),
        (1, 4000),
        (4000, 1),
        (1, 65500),
        (65500, 1),
        (255, 257),
        (256, 256),
        (7, 9),
        (5000, 3),
    ],
)
def test_extreme_sizes_are_accepted(size):
    result = preprocess_image(Image.new("RGB", size, (10, 200, 30)))
    assert result.size == size
    assert np.ptp(result.pixels, axis=(1, 2)).max() == 0


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0), (0, 3)])
def test_zero_sizes_are_refused(shape):
    with pytest.raises(InputError, match="at least 1 x 1"):
        decode_image(np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match="at least 1 x 1"):
        decode_image(Image.new("RGB", (0, 5)))


def test_arrays(photo):
    values = np.asarray(photo)
    grey = np.asarray(photo.convert("L"))
    assert np.array_equal(pixels_of(values), values)
    assert np.array_equal(pixels_of(values[::-1, ::2]), values[::-1, ::2])
    assert np.array_equal(pixels_of(grey)[..., 1], grey)
    assert np.array_equal(pixels_of(grey[..., None])[..., 1], grey)
    assert np.array_equal(pixels_of(np.dstack([values, np.full(grey.shape, 255, np.uint8)])), values)
    for kind in (np.float16, np.float32, np.float64):
        assert np.array_equal(pixels_of((values / 255).astype(kind)), values)


@pytest.mark.parametrize("shape", [(3, 48, 64), (1, 48, 64), (4, 48, 64)])
def test_channels_first_is_refused_with_a_hint(shape):
    with pytest.raises(InputError, match=r"pass array.transpose\(1, 2, 0\)"):
        decode_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 100, 3), (4, 5, 1)])
def test_ambiguous_shapes_are_refused(shape):
    with pytest.raises(InputError, match="reads as height x width x channels and as channels first"):
        decode_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("shape", [(), (5,), (8, 8, 2), (8, 8, 5), (2, 8, 8, 3), (1, 3, 8, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match="expected an array of height x width x 3"):
        decode_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, bool, object, complex, "U1"])
def test_other_types_of_array_are_refused(dtype):
    with pytest.raises(InputError, match="uint8 or of floats"):
        decode_image(np.zeros((8, 8, 3), dtype))


def test_no_array_with_a_bad_value_passes():
    generator = np.random.default_rng(3)
    for _ in range(1000):
        array = generator.random((5, 4, 3), dtype=np.float32)
        bad = generator.choice([np.nan, np.inf, -np.inf, -0.01, 1.01, 255, 1e38])
        array[tuple(generator.integers(0, array.shape))] = bad
        with pytest.raises(InputError, match="NaN or infinite|floats in"):
            decode_image(array)


def test_the_users_picture_is_left_alone(photo):
    picture = photo.convert("RGBA")
    before = picture.tobytes()
    decode_image(picture)
    assert (picture.tobytes(), picture.mode) == (before, "RGBA")


def test_a_closed_picture_is_an_input_error(photo, encode):
    picture = Image.open(io.BytesIO(encode(photo, "PNG")))
    picture.close()
    with pytest.raises(InputError, match="cannot be read as a picture"):
        decode_image(picture)


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 48), (64, 48)), ((2048, 512), (1024, 256)), ((1, 65500), (1, 1024))]
)
def test_thumbnails(size, expected):
    assert make_thumbnail(Image.new("RGB", size), 1024).size == expected
