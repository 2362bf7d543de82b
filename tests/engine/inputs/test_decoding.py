"""decode="fast": JPEGs at a part of their size, everything else as it was."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from engine import ImageOptions, Predictor
from engine.errors import InputError
from engine.inputs.preprocess import decode_image, resize_image

FAST = ImageOptions(decode="fast")


def encode(width, height, format="JPEG", **options):
    """A smooth picture with some noise, as a file."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = np.clip(smooth + random.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((511, 900), (511, 900)),  # half of it has no 256 pixels a side
        ((1200, 800), (600, 400)),
        ((800, 1201), (400, 601)),
        ((1100, 2048), (275, 512)),
        ((2300, 2049), (288, 257)),
        ((300, 4000), (300, 4000)),
    ],
)
def test_a_jpeg_is_read_at_a_part_of_its_size(size, decoded):
    data = encode(*size)
    fast = decode_image(data, options=FAST, side=256)
    assert (fast.rgb.size, fast.size, fast.warnings) == (decoded, size, ())
    exact = decode_image(data, side=256)
    assert exact.rgb.size == exact.size == size
    difference = np.subtract(*(np.asarray(resize_image(x.rgb, 256), np.int16) for x in (fast, exact)))
    assert np.abs(difference).mean() < 3
    assert fast.rgb.size != size or not difference.any()


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_other_jpegs(options):
    assert decode_image(encode(1200, 800, **options), options=FAST, side=256).rgb.size == (600, 400)


def test_grey_and_cmyk():
    for mode in ("L", "CMYK"):
        file = io.BytesIO()
        Image.open(io.BytesIO(encode(1200, 800))).convert(mode).save(file, "JPEG")
        fast, exact = (decode_image(file.getvalue(), options=o, side=256).rgb for o in (FAST, None))
        assert fast.size == (600, 400)
        half = np.asarray(exact.resize((600, 400), Image.Resampling.BOX), np.int16)
        assert np.abs(np.asarray(fast, np.int16) - half).mean() < 2


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "GIF"])
def test_other_formats_are_read_exactly(format):
    data = encode(1200, 800, format)
    fast, exact = (decode_image(data, options=options, side=256) for options in (FAST, None))
    assert np.array_equal(np.asarray(fast.rgb), np.asarray(exact.rgb)) and fast.size == exact.size == (
        1200,
        800,
    )


@pytest.mark.parametrize("image", [np.zeros((900, 900, 3), np.uint8), Image.new("RGB", (900, 900))])
def test_images_in_memory_are_whole(image):
    assert decode_image(image, options=FAST, side=256).rgb.size == (900, 900)


def test_without_a_side_nothing_is_left_out():
    assert decode_image(encode(1200, 800), options=FAST).rgb.size == (1200, 800)


@pytest.mark.parametrize(("orientation", "upright"), [(1, (1200, 800)), (3, (1200, 800)), (6, (800, 1200))])
def test_the_size_is_the_upright_images(orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    fast = decode_image(encode(1200, 800, exif=exif), options=FAST, side=256)
    assert fast.size == upright and fast.rgb.size == tuple(side // 2 for side in upright)


def test_a_truncated_file_is_refused():
    with pytest.raises(InputError, match="cannot be read as an image"):
        decode_image(encode(1200, 800)[:20_000], options=FAST, side=256)


@pytest.mark.parametrize("decode", ["quick", None, 1])
def test_an_unknown_way_is_refused(decode):
    with pytest.raises(InputError, match='decode: expected "exact" or "fast", got'):
        ImageOptions(decode=decode)


def test_a_predictors_box_is_in_pixels_of_the_given_image(bundle_dir):
    """The fake network's box is a share of the image."""
    data = encode(1200, 800)
    answers = []
    for options in (None, FAST):
        with Predictor(bundle_dir, backend="ort", device="cpu", image_options=options) as predictor:
            answers.append(predictor.predict(data, "A caption"))
    exact, fast = answers
    assert fast.size == exact.size == (1200, 800)
    assert np.allclose(fast.box, exact.box, atol=6) and abs(fast.score - exact.score) < 0.01
    assert fast.thumbnail.size == (600, 400) and exact.thumbnail.size == (1024, 683)
