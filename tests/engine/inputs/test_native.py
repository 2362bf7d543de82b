"""The compiled resize and normalisation: Pillow's and NumPy's bits, refused arguments, threads, slots."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from engine import Predictor, _native
from engine.inputs.network_input import _levels, join_slots, make_slots, network_input
from engine.inputs.preprocess import CLIP_MEAN, CLIP_STD, normalize_image, resize_image

FLOAT32 = np.dtype(np.float32)
compiled = pytest.mark.skipif(_native.resample is None, reason=f"not built: {_native.absent}")


@pytest.fixture(params=[pytest.param("compiled", marks=compiled), "pillow"])
def form(request, monkeypatch):
    """Each form of the arithmetic in turn."""
    if request.param == "pillow":
        monkeypatch.setattr(_native, "resample", None)
    return request.param


def draw(random, width, height):
    """Noise, or black and white, which overshoots most."""
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return pixels if random.random() < 0.7 else (pixels > 127).astype(np.uint8) * 255


def by_pillow(rgb, size=256):
    return normalize_image(resize_image(rgb, size))


def resample(bands, size, out=None, levels=None, **options):
    """The compiled function itself; `size` is (width, height)."""
    out = np.full((3, 256, 256), np.nan, np.float32) if out is None else out
    _native.resample(
        bands, *size, _levels(CLIP_MEAN, CLIP_STD, out.dtype) if levels is None else levels, out, **options
    )
    return out


@compiled
def test_bits_are_pillows_at_a_thousand_sizes():
    random = np.random.default_rng(0)
    sizes = [(1, 1), (1, 900), (900, 1), (256, 256), (257, 255), (2, 7000), (7000, 2), (255, 1), (1, 257)]
    while len(sizes) < 1000:
        width, height = np.exp(random.uniform(0, np.log(1500), 2)).astype(int)
        if width * height < 90_000:
            sizes.append((int(width), int(height)))
    for width, height in sizes:
        pixels = draw(random, width, height)
        rgb = Image.fromarray(pixels)
        want = by_pillow(rgb)
        for passes in _native.passes:
            got = resample([pixels], rgb.size, passes=passes)
            assert np.array_equal(got, want), (width, height, passes)
        assert np.array_equal(network_input(rgb, 256, CLIP_MEAN, CLIP_STD), want), (width, height)


@pytest.mark.parametrize("size", [(65536, 3), (3, 65536), (65537, 1), (2600, 1700), (1700, 2600)])
def test_huge_images(size, form):
    """Up to the longest side of the compiled form, beyond it, and in more memory than Pillow gives away."""
    rgb = Image.fromarray(draw(np.random.default_rng(1), *size))
    assert np.array_equal(network_input(rgb, 256, CLIP_MEAN, CLIP_STD), by_pillow(rgb))


@pytest.mark.parametrize("image_size", [1, 30, 255, 384])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_other_outputs(image_size, dtype, form):
    rgb = Image.fromarray(draw(np.random.default_rng(2), 123, 77))
    out = np.full((3, image_size, image_size), np.nan, dtype)
    assert network_input(rgb, image_size, CLIP_MEAN, CLIP_STD, out) is out
    assert np.array_equal(out, by_pillow(rgb, image_size).astype(dtype))


@compiled
def test_bands_of_rows_wherever_they_lie():
    """Strided, read-only, reversed, of any number of rows; the bytes between rows count for nothing."""
    random = np.random.default_rng(3)
    pixels = draw(random, 61, 401)
    want = by_pillow(Image.fromarray(pixels))
    wide = random.integers(0, 256, (401, 90, 3), dtype=np.uint8)
    wide[:, 7:68] = pixels
    turned = pixels[::-1].copy()[::-1]
    frozen = pixels.copy()
    frozen.flags.writeable = False
    for passes in _native.passes:
        for whole in (pixels, wide[:, 7:68], turned, frozen):
            cuts = sorted(random.integers(0, 401, 6))
            bands = np.split(whole, cuts)
            assert np.array_equal(resample(iter(bands), (61, 401), passes=passes), want), passes


def test_a_pillow_that_gives_no_memory_away(form, monkeypatch):
    """Before 11.2, or with blocks that were set smaller."""
    rgb = Image.fromarray(draw(np.random.default_rng(4), 90, 60))
    monkeypatch.delattr(Image.Image, "__arrow_c_array__", raising=False)
    assert np.array_equal(network_input(rgb, 256, CLIP_MEAN, CLIP_STD), by_pillow(rgb))


PIXELS = np.zeros((4, 6, 3), np.uint8)
LEVELS = np.zeros((3, 256), np.float32)
READ_ONLY = np.zeros((3, 8, 8), np.float32)
READ_ONLY.flags.writeable = False
ODD = np.zeros(3 * 8 * 8 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(3, 8, 8)
RIGHT = {"bands": [PIXELS], "width": 6, "height": 4, "levels": LEVELS, "out": np.zeros((3, 8, 8), np.float32)}
RIGHT |= {"passes": None}
WRONG = {
    "too few rows": {"bands": [PIXELS[:3]]},
    "no rows": {"bands": []},
    "too many rows": {"bands": [PIXELS, PIXELS[:1]]},
    "another width": {"width": 5},
    "another height": {"height": 5},
    "side 0": {"width": 0, "bands": [PIXELS[:, :0]]},
    "negative side": {"height": -1},
    "side beyond the limit": {"width": 65537},
    "side beyond int": {"width": 2**40},
    "floats": {"bands": [PIXELS.astype(np.float32)]},
    "signed bytes": {"bands": [PIXELS.view(np.int8)]},
    "four channels": {"bands": [np.zeros((4, 6, 4), np.uint8)]},
    "two dimensions": {"bands": [np.zeros((4, 18), np.uint8)]},
    "pixels apart": {"bands": [np.zeros((4, 12, 3), np.uint8)[:, ::2]]},
    "channels apart": {"bands": [np.zeros((3, 4, 6), np.uint8).transpose(1, 2, 0)]},
    "columns reversed": {"bands": [PIXELS[:, ::-1]]},
    "no buffer": {"bands": [[1, 2]]},
    "None": {"bands": [None]},
    "no bands": {"bands": 3},
    "no capsules": {"bands": [(1, 2)]},
    "one capsule": {"bands": [Image.new("RGB", (6, 4)).__arrow_c_array__()[:1]]},
    "capsules swapped": {"bands": [Image.new("RGB", (6, 4)).__arrow_c_array__()[::-1]]},
    "one byte a pixel": {"bands": [Image.new("L", (6, 4)).__arrow_c_array__()]},
    "floats of Pillow's": {"bands": [Image.new("F", (6, 4)).__arrow_c_array__()]},
    "capsules of another width": {"bands": [Image.new("RGB", (5, 5)).__arrow_c_array__()]},
    "levels of another type": {"levels": LEVELS.astype(np.float64)},
    "levels of another shape": {"levels": LEVELS[:, :255]},
    "levels apart": {"levels": np.zeros((3, 512), np.float32)[:, ::2]},
    "levels of half the bytes": {"levels": LEVELS.astype(np.float16)},
    "out read-only": {"out": READ_ONLY},
    "out not square": {"out": np.zeros((3, 8, 9), np.float32)},
    "out of two channels": {"out": np.zeros((2, 8, 8), np.float32)},
    "out empty": {"out": np.zeros((3, 0, 0), np.float32)},
    "out too large": {"out": np.empty((3, 2049, 2049), np.float32)},
    "out apart": {"out": np.zeros((3, 8, 16), np.float32)[:, :, ::2]},
    "out transposed": {"out": np.zeros((3, 8, 8), np.float32).transpose(0, 2, 1)},
    "out unaligned": {"out": ODD},
    "out of doubles": {"out": np.zeros((3, 8, 8))},
    "out of bytes": {"out": np.zeros((3, 8, 8), np.uint8)},
    "out swapped": {"out": np.zeros((3, 8, 8), ">f4")},
    "unknown passes": {"passes": "mmx"},
}


@compiled
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_raise(case):
    """Before a byte is read or written that is not the caller's; benchmarks/sanitize.py looks at that."""
    with pytest.raises((ValueError, TypeError, BufferError)):
        _native.resample(**RIGHT | WRONG[case])


@compiled
def test_the_right_arguments_do_not():
    _native.resample(**RIGHT)


@compiled
def test_what_the_bands_raise_comes_out():
    def bands():
        yield PIXELS[:2]
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        _native.resample(**RIGHT | {"bands": bands()})


@compiled
def test_other_threads_run_meanwhile():
    """With a switch interval of minutes another thread runs only where the GIL is released."""
    pixels, seen, ticks = np.zeros((400, 20_000, 3), np.uint8), [], [0]

    def bands():
        for _ in range(8):
            before = ticks[0]
            yield pixels[:50]
            seen.append(ticks[0] - before)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)
    try:
        thread = threading.Thread(target=resample, args=(bands(), (20_000, 400)))
        thread.start()
        while thread.is_alive():
            ticks[0] += 1
            time.sleep(0)
    finally:
        sys.setswitchinterval(interval)
    assert len(seen) == 8 and max(seen) > 0


def test_images_in_slots_of_one_buffer_are_a_batch_already():
    slots = make_slots(4, 8)
    for index, slot in enumerate(slots):
        slot[...] = index
    whole = join_slots(slots)
    assert whole.shape == (4, 3, 8, 8) and whole is not slots[0].base
    assert np.shares_memory(whole, slots[0]) and whole.flags.c_contiguous
    part = join_slots(slots[1:3])
    assert np.shares_memory(part, slots[1]) and part[:, 0, 0, 0].tolist() == [1, 2]


@pytest.mark.parametrize("order", [[1, 0], [0, 2], [3, 3], [2, 3, 0]])
def test_others_are_copied(order):
    slots = make_slots(4, 8)
    for index, slot in enumerate(slots):
        slot[...] = index
    batch = join_slots([slots[index] for index in order])
    assert batch[:, 0, 0, 0].tolist() == order and not np.shares_memory(batch, slots[0])
    mixed = join_slots([slots[0], make_slots(1, 8)[0]])
    assert not np.shares_memory(mixed, slots[0])
    assert np.shares_memory(join_slots(slots[2:3]), slots[2])


def test_a_predictor_answers_the_same_in_both_forms(bundle_dir, photo, monkeypatch):
    pairs = [(photo, "A caption"), (photo.rotate(90, expand=True), "Another"), (None, "No image")]
    with Predictor(bundle_dir, backend="ort", device="cpu") as predictor:
        scores = [prediction.to_dict() for prediction in predictor.predict_batch(pairs)]
        monkeypatch.setattr(_native, "resample", None)
        again = [prediction.to_dict() for prediction in predictor.predict_batch(pairs)]
    for one, other in zip(scores, again, strict=True):
        assert {**one, "timing": None} == {**other, "timing": None}


def test_a_stream_prepares_its_images_in_the_batch_itself(bundle_dir, photo, monkeypatch):
    """But for a batch in which an image cannot be used, whose others are moved together."""
    joined = []

    def record(images):
        batch = join_slots(images)
        joined.append((len(batch), np.shares_memory(batch, images[0])))
        return batch

    monkeypatch.setattr("engine.backends.base.join_slots", record)
    with Predictor(bundle_dir, backend="ort", device="cpu") as predictor:
        predictor.predict(photo, "One")
        list(predictor.stream([(photo, f"Caption {i}") for i in range(5)], batch_size=2))
        pairs = [(photo, "First"), (b"no image", "Second"), (photo, "Third")]
        predictor.predict_batch(pairs, on_error="return")
    assert joined == [(1, True), (2, True), (2, True), (1, True), (2, False)]
