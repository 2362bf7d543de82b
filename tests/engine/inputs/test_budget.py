"""Memory of pictures in flight: threads wait in turn, and full-size pictures that are kept have a limit."""

from __future__ import annotations

import gc
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from engine.inputs.budget import DECODING, KEPT, Budget, decoding_bytes
from engine.inputs.options import ImageOptions
from engine.inputs.preparation import Preparation
from engine.inputs.preprocess import decode_image
from engine.registry import network_of


def test_what_is_used_never_exceeds_the_limit():
    budget, most, lock = Budget(), [0], threading.Lock()
    amounts = np.random.default_rng(0).integers(1, 60, 200).tolist()

    def work():
        while True:
            with lock:
                if not amounts:
                    return
                amount = amounts.pop()
            with budget.reserving(100) as reserve:
                reserve(amount)
                time.sleep(0.001)
                most[0] = max(most[0], budget.used)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert 60 < most[0] <= 100
    assert budget.used == 0


def test_more_than_the_limit_goes_alone_and_is_not_overtaken():
    budget, order = Budget(), []
    first = budget.reserving(100)
    first.__enter__()(90)

    def want(name, amount):
        with budget.reserving(100) as reserve:
            reserve(amount)
            order.append(name)

    large = threading.Thread(target=want, args=("large", 500))
    large.start()
    while not budget._waiting:
        pass
    small = threading.Thread(target=want, args=("small", 5))  # there would be room for it
    small.start()
    small.join(0.05)
    assert order == []
    first.__exit__(None, None, None)
    large.join(60)
    small.join(60)
    assert order == ["large", "small"]
    assert budget.used == 0


def test_an_error_gives_back_what_was_reserved():
    budget = Budget()
    with pytest.raises(RuntimeError), budget.reserving(100) as reserve:
        reserve(50)
        raise RuntimeError
    assert budget.used == 0


def test_kept_arrays_count_until_they_are_garbage():
    budget = Budget()
    arrays = [np.zeros(40, np.uint8) for _ in range(3)]
    assert [budget.keep(array, 100) for array in arrays] == [True, True, False]
    assert budget.used == 80
    arrays.pop(0)
    gc.collect()
    assert budget.used == 40
    del arrays
    gc.collect()
    assert budget.used == 0


def test_a_forked_child_begins_anew():
    with DECODING.reserving(100) as reserve:
        reserve(60)
        child = os.fork()
        if child == 0:
            os._exit(DECODING.used)
        assert os.waitpid(child, 0)[1] == 0


def test_decoding_reserves_and_gives_back(photo, encode):
    seen = []
    decode_image(encode(photo, "JPEG"), reserve=seen.append)
    decode_image(encode(photo.convert("P"), "PNG"), reserve=seen.append)
    decode_image(encode(photo, "WEBP"), reserve=seen.append)
    pixels = photo.width * photo.height
    assert seen == [4 * pixels, 5 * pixels, 16 * pixels]
    assert DECODING.used == 0


def test_a_progressive_jpeg_is_held_twice(photo, encode):
    for subsampling, each in ((0, 4 + 6), (2, 4 + 3)):
        data = encode(photo, "JPEG", progressive=True, subsampling=subsampling)
        seen = []
        decode_image(data, reserve=seen.append)
        assert seen == [each * photo.width * photo.height]


def test_an_image_in_memory_is_its_owners(photo):
    assert decoding_bytes(photo, False, opened=False) == 0
    assert decoding_bytes(photo, True, opened=False) == 4 * photo.width * photo.height


def test_large_conversions_go_strip_by_strip(encode):
    """The same pixels as in one piece."""
    random = np.random.default_rng(0)
    whole = Image.fromarray(random.integers(0, 256, (1100, 1300, 4), dtype=np.uint8))
    deep = Image.fromarray(random.integers(0, 65536, (1100, 1300), dtype=np.uint16))
    white = Image.new("RGBA", whole.size, (255, 255, 255, 255))
    assert np.array_equal(decode_image(whole).rgb, Image.alpha_composite(white, whole).convert("RGB"))
    palette = whole.convert("RGB").convert("P")
    assert np.array_equal(decode_image(encode(palette, "PNG")).rgb, palette.convert("RGB"))
    grey = (np.asarray(deep) >> 8).astype(np.uint8)
    assert np.array_equal(np.asarray(decode_image(encode(deep, "PNG")).rgb)[..., 0], grey)


def test_pictures_kept_in_full_have_a_limit(predictor, photo, encode):
    """Where a backend resizes, those beyond it are resized here, which gives the same pixels later."""
    spec = predictor.manifest.preprocess
    size = 3 * photo.width * photo.height
    options = ImageOptions(max_decoding_bytes=2 * size)
    network, tokenizer = network_of(predictor.manifest.model.config), predictor._preparation._tokenizer
    preparation = Preparation(spec, network, tokenizer, options, 0, resize=False)
    data = encode(photo, "PNG")
    kept = [preparation.picture("", data).pixels.shape for _ in range(1)]
    pictures = [preparation.picture("", data) for _ in range(4)]
    shapes = [picture.pixels.shape for picture in pictures]
    side = spec.image_size
    assert kept == [(photo.height, photo.width, 3)]
    assert shapes == [(photo.height, photo.width, 3)] * 2 + [(side, side, 3)] * 2
    del pictures
    gc.collect()
    assert KEPT.used == 0
    assert preparation.picture("", data).pixels.shape == (photo.height, photo.width, 3)
