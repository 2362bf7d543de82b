"""The resize against Pillow, bit for bit: the plain form at the network's size, kernels at a small one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from engine.inputs.preprocess import CLIP_MEAN, CLIP_STD, normalize_image, resize_image
from kernels import resize as module
from kernels.jit import triton
from kernels.resize import pack, resize, resize_into, resize_ref
from kernels.resize_tables import Tables, axis_filter, make_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")
NORM = (CLIP_MEAN, CLIP_STD)
SIZES = [(1, 1), (2, 3), (255, 257), (256, 256), (1000, 37), (640, 480), (37, 1000), (256, 100), (300, 257)]
SMALL = [(1, 1), (2, 3), (16, 16), (63, 65), (100, 7), (7, 100), (16, 9), (33, 16), (40, 30)]


def draw(height, width, kind="noise"):
    """Noise, or black and white alone, whose overshoot is clipped at both ends."""
    random = np.random.default_rng(height * 1000 + width)
    if kind == "noise":
        return random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return (random.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)


def pillow(picture, size):
    return normalize_image(resize_image(Image.fromarray(picture), size))


@pytest.mark.parametrize("kind", ["noise", "black and white"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_equals_pillow(height, width, kind):
    picture = draw(height, width, kind)
    got = resize(*pack([picture]), 256, *NORM)
    assert got.dtype == torch.float32
    assert np.array_equal(got[0].numpy(), pillow(picture, 256))


def test_a_batch_of_different_sizes():
    pictures = [draw(*size) for size in SMALL]
    got = resize(*pack(pictures), 24, *NORM)
    assert np.array_equal(got.numpy(), np.stack([pillow(x, 24) for x in pictures]))


def test_the_filter_is_keys_cubic():
    """From 8 pixels to 4: centres at 1, 3, 5, 7; the kernel's two pieces, in float64."""
    first, weights = axis_filter(8, 4)
    assert first.tolist() == [0, 0, 1, 3]

    def cubic(x):
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    for column, centre in enumerate((1, 3, 5, 7)):
        raw = {j: cubic((j + 0.5 - centre) / 2) for j in range(8)}
        for tap, weight in enumerate(weights[:, column]):
            want = raw.get(first[column] + tap, 0.0) / sum(raw.values())
            assert abs(int(weight) - want * 2**22) <= 0.5 + 1e-6


def test_weights_sum_to_one():
    for length in (1, 3, 37, 255, 256, 257, 4000):
        assert np.abs(axis_filter(length, 256).weights.sum(0, dtype=np.int64) - 2**22).max() <= 64


def test_no_pictures_and_half_precision():
    assert resize(*pack([]), 8, *NORM).shape == (0, 3, 8, 8)
    packed = pack([draw(9, 7)])
    assert torch.equal(resize(*packed, 8, *NORM, dtype=torch.float16), resize(*packed, 8, *NORM).half())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": [(4, 6)]}, "expected uint8 of shape (72,) for 1 images, got torch.uint8 of shape (60,)"),
        ({"sizes": [(0, 5)]}, "image 0: expected sides of 1 to 65536 pixels, got 0 x 5"),
        ({"sizes": [(1, 70000)]}, "image 0: expected sides of 1 to 65536 pixels, got 1 x 70000"),
        ({"pixels": torch.zeros(60)}, "got torch.float32"),
        ({"size": 0}, "expected a size of 1 to 1024"),
        ({"std": (1.0, 1.0)}, "expected three means and three deviations"),
        ({"dtype": torch.float64}, "dtype: expected one of"),
    ],
)
def test_what_does_not_go_together_is_refused(change, message):
    pixels, sizes = pack([draw(4, 5)])
    given = {"pixels": pixels, "sizes": sizes, "size": 8, "mean": CLIP_MEAN, "std": CLIP_STD, **change}
    with pytest.raises(ValueError) as caught:
        resize(**given)
    assert message in str(caught.value)


def test_pictures_of_another_kind_are_refused():
    with pytest.raises(
        (TypeError, ValueError), match=r"image 1: expected uint8 of shape \(height, width, 3\)"
    ):
        pack([draw(2, 2), np.zeros((2, 2), np.uint8)])


@needs_triton
@pytest.mark.parametrize("size", [16, 20])
def test_kernels_equal_the_plain_form(size, fenced):
    pixels, sizes = pack([draw(*pair, "black and white") for pair in SMALL])
    tables = make_tables(sizes, size, *NORM)
    lines = tables.plan[:, 2].tolist()
    sent = Tables(*(x.to(DEVICE) for x in tables))
    copy = pixels.clone().to(DEVICE)
    middle = module.launch_lines(
        module._line_kernel, pixels.to(DEVICE), sent, size, sum(lines), max(lines), block_rows=64
    )
    empty = sent.levels.new_empty((len(sizes), 3, size, size))
    out = module.launch_cross(module._cross_kernel, middle, sent, size, empty, block_rows=8)
    fenced()
    assert torch.equal(copy.cpu(), pixels)
    assert torch.equal(out.cpu(), resize_ref(pixels, sizes, size, *NORM))


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=needs_triton)])
def test_into_a_part_of_a_buffer(launched, monkeypatch):
    """As the runtime does: pictures into the first rows of a larger buffer, the rest left alone."""
    monkeypatch.setattr(module, "_launches", lambda _: launched)
    pictures = [draw(9, 7), draw(20, 33)]
    pixels, sizes = pack(pictures)
    buffer = torch.full((3, 3, 16, 16), torch.nan, device=DEVICE)
    tables = Tables(*(x.to(DEVICE) for x in make_tables(sizes, 16, *NORM)))
    resize_into(buffer[:2], pixels.to(DEVICE), sizes, *NORM, tables)
    assert np.array_equal(buffer[:2].cpu().numpy(), np.stack([pillow(x, 16) for x in pictures]))
    assert buffer[2].isnan().all()
    with pytest.raises(
        (TypeError, ValueError), match=r"out: expected dense \(2, 3, 16, 16\), got \(3, 3, 16, 16\)"
    ):
        resize_into(buffer, pixels.to(DEVICE), sizes, *NORM, tables)


@needs_triton
def test_pixels_are_read_by_strides(monkeypatch):
    """Every second byte, and one byte for all pixels."""
    monkeypatch.setattr(module, "_launches", lambda _: True)
    pixels, sizes = pack([draw(9, 7)])
    tables = Tables(*(x.to(DEVICE) for x in make_tables(sizes, 8, *NORM)))
    strided = torch.stack([pixels, 255 - pixels], 1).to(DEVICE).flatten()[::2]
    for given in (strided, strided[:1].expand(len(strided))):
        out = torch.full((1, 3, 8, 8), torch.nan, device=DEVICE)
        resize_into(out, given, sizes, *NORM, tables)
        assert torch.equal(out.cpu(), resize_ref(given.cpu().contiguous(), sizes, 8, *NORM))


def test_tables_on_another_device_are_refused():
    pixels, sizes = pack([draw(9, 7)])
    tables = make_tables(sizes, 8, *NORM)
    tables = tables._replace(levels=tables.levels.to("meta"))
    with pytest.raises(ValueError, match="levels: expected it dense on cpu as the pixels, got meta"):
        resize_into(torch.empty(1, 3, 8, 8), pixels, sizes, *NORM, tables)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_on_a_gpu_a_batch_equals_pillow():
    pictures = [draw(*size) for size in SIZES]
    pixels, sizes = pack(pictures)
    got = resize(pixels.to(DEVICE), sizes, 256, *NORM)
    assert np.array_equal(got.cpu().numpy(), np.stack([pillow(x, 256) for x in pictures]))
