from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from engine.errors import InputError
from engine.inputs.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    ImageOptions,
    decode_image,
    make_thumbnail,
    read_size,
    resize_image,
)

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF"]


def pixels_of(source, **options) -> np.ndarray:
    return np.asarray(decode_image(source, options=ImageOptions(**options)).rgb)


# The network's input


def rows_first(pixels, size):
    """Pillow's bicubic on bytes by its formula: weights in fixed point, rows, then columns, each rounded."""

    def weights(length):
        scale = length / size
        reach = 2.0 * max(scale, 1.0)
        matrix = np.zeros((size, length))
        for i in range(size):
            centre = (i + 0.5) * scale
            low, high = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), length)
            x = np.abs((np.arange(low, high) - centre + 0.5) / max(scale, 1.0))
            near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
            taken = np.where(x < 1, near, np.where(x < 2, far, 0.0))
            matrix[i, low:high] = taken / taken.sum()
        return np.trunc(matrix * 2**22 + np.copysign(0.5, matrix)).astype(np.int64)

    for axis in (1, 0):
        turned = np.moveaxis(pixels.astype(np.int64), axis, 0)
        summed = np.tensordot(weights(len(turned)), turned, 1) + 2**21
        pixels = np.moveaxis(np.clip(summed >> 22, 0, 255), 0, axis)
    return pixels


@pytest.mark.parametrize("shape", [(300, 20), (64, 64), (20, 300), (1, 1), (97, 41), (40, 500)])
def test_the_resize_does_rows_first_whatever_the_pillow(shape):
    """As all Pillows before 13, which the networks were trained with; tall pictures tell the difference."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(resize_image(Image.fromarray(pixels), 32)), rows_first(pixels, 32))


def test_the_resize_is_pillows_and_the_normalisation_right(photo, network_input):
    pixels = network_input(photo)
    resized = np.asarray(photo.resize((256, 256), Image.Resampling.BICUBIC))
    exact = (resized.astype(np.float64) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    assert pixels.dtype == np.float32
    assert pixels.shape == (3, 256, 256)
    assert pixels.flags.c_contiguous
    assert decode_image(photo).warnings == ()
    np.testing.assert_allclose(pixels, exact.transpose(2, 0, 1), rtol=0, atol=1e-6)
    restored = pixels.astype(np.float64).transpose(1, 2, 0) * np.array(CLIP_STD) + np.array(CLIP_MEAN)
    assert np.array_equal(np.rint(restored * 255), resized)


def test_all_sources_of_one_picture_agree(photo, encode, tmp_path, network_input):
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
    first = network_input(photo)
    for source in sources:
        assert np.array_equal(network_input(source), first)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(photo, encode, kind):
    data = encode(photo, kind)
    assert np.array_equal(pixels_of(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "PCX", "PDF"])
def test_other_formats_are_refused(photo, encode, kind):
    with pytest.raises(InputError, match="expected one of JPEG, PNG"):
        decode_image(encode(photo, kind))


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
    assert [warning.split(":")[0] for warning in decoded.warnings] == ["frames_ignored", "tiny_image"]


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
def test_the_eight_orientations_give_one_result(photo, encode, orientation, kind, network_input):
    stored, exif = oriented(photo, orientation)
    data = encode(stored, kind, exif=exif.tobytes(), **({"lossless": True} if kind == "WEBP" else {}))
    assert decode_image(data).rgb.size == photo.size
    assert np.array_equal(network_input(data), network_input(photo))
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
def test_extreme_sizes_are_accepted(size, network_input):
    image = Image.new("RGB", size, (10, 200, 30))
    assert decode_image(image).rgb.size == size
    assert np.ptp(network_input(image), axis=(1, 2)).max() == 0


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
    with pytest.raises(InputError, match="cannot be read as an image"):
        decode_image(picture)


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 48), (64, 48)), ((2048, 512), (1024, 256)), ((1, 65500), (1, 1024))]
)
def test_thumbnails(size, expected):
    assert make_thumbnail(Image.new("RGB", size), 1024).size == expected


# The header alone


@pytest.mark.parametrize("kind", FORMATS)
def test_the_size_is_that_of_the_stored_picture(photo, encode, tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "picture"
    path.write_bytes(encode(photo, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {})))
    assert read_size(path) == read_size(str(path)) == (64, 48)


def test_a_size_that_cannot_be_read_is_an_input_error(photo, encode, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(encode(photo, "PNG"))
    for options in (ImageOptions(max_pixels=64 * 48 - 1), ImageOptions(max_bytes=100)):
        with pytest.raises(InputError, match="expected at most"):
            read_size(path, options=options)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="the file is empty"):
        read_size(path)
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match="cannot be read as an image"):
        read_size(path)
    for other, found in ((tmp_path, "not a file"), (tmp_path / "none", "no such file")):
        with pytest.raises(InputError, match=found):
            read_size(other)
    with pytest.raises(InputError, match="cannot be read as an image"):
        read_size(tmp_path / ("x" * 5000))


@pytest.mark.parametrize(
    "options",
    [
        {"background": (0, 0)},
        {"background": (300, 0, 0)},
        {"background": (0, 0, -1)},
        {"background": (0.5, 0, 0)},
        {"background": "red"},
        {"max_bytes": None},
        {"max_bytes": -1},
        {"max_pixels": 0},
    ],
)
def test_options_that_mean_nothing_are_refused(options):
    (name,) = options
    with pytest.raises(InputError, match=f"{name}: expected"):
        ImageOptions(**options)
