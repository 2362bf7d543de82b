"""Shapes of the captured graphs: which bucket, what is padded, what is cut back."""

from __future__ import annotations

import numpy as np
import pytest

from engine.backends.buckets import Bucket, bucket_of, buckets, cut, fill, measure
from engine.errors import BackendError
from engine.manifest import Limits, TensorSpec

LIMITS = Limits(max_batch=24, max_tokens=127)
SPECS = (
    TensorSpec("image", "float32", ("batch", 3, 4, 4)),
    TensorSpec("input_ids", "int64", ("batch", "tokens")),
    TensorSpec("attention_mask", "int64", ("batch", "tokens")),
)


def feeds(batch=2, tokens=5, **changes):
    text = np.ones((batch, tokens), np.int64)
    image = np.ones((batch, 3, 4, 4), np.float32)
    return {"image": image, "input_ids": text, "attention_mask": text, **changes}


@pytest.mark.parametrize(
    ("shape", "bucket"),
    [
        ((1, 1), (1, 16)),
        ((1, 16), (1, 16)),
        ((2, 17), (2, 32)),
        ((3, 32), (4, 32)),
        ((5, 33), (8, 48)),
        ((16, 112), (16, 112)),
        ((17, 113), (24, 127)),
        ((24, 127), (24, 127)),
    ],
)
def test_the_smallest_bucket_that_holds_it(shape, bucket):
    assert bucket_of(*shape, LIMITS) == Bucket(*bucket)


def test_every_shape_fits_one_of_few_buckets():
    buckets = set()
    for batch in range(1, LIMITS.max_batch + 1):
        for tokens in range(1, LIMITS.max_tokens + 1):
            bucket = bucket_of(batch, tokens, LIMITS)
            assert batch <= bucket.batch <= min(2 * batch, LIMITS.max_batch)
            assert tokens <= bucket.tokens <= min(tokens + 15, LIMITS.max_tokens)
            assert bucket_of(*bucket, LIMITS) == bucket
            buckets.add(bucket)
    assert len(buckets) == 6 * 8  # 1, 2, 4, 8, 16, 24 pairs; 16, 32, ... 112, 127 tokens


@pytest.mark.parametrize("shape", [(0, 5), (25, 5), (1, 0), (1, 128)])
def test_nothing_beyond_the_limits(shape):
    with pytest.raises(
        BackendError, match=f"expected 1 to 24 pairs of 1 to 127 tokens.*got {shape[0]} of {shape[1]};"
    ):
        bucket_of(*shape, LIMITS)


def test_sizes_are_read_off_the_inputs():
    assert measure(feeds(3, 7), SPECS) == {"batch": 3, "tokens": 7}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image": np.ones((2, 3, 4, 5), np.float32)},
            r"image: expected float32 .*got float32 .*\[2, 3, 4, 5\]",
        ),
        ({"image": np.ones((2, 3, 4), np.float32)}, r"image: expected float32 .*\[2, 3, 4\]"),
        ({"image": np.ones((2, 3, 4, 4))}, r"image: expected float32 of shape .*got float64"),
        ({"image": np.ones((1, 3, 4, 4), np.float32)}, r"input_ids: .*where batch = 1.*got int64 .*\[2, 5\]"),
        (
            {"attention_mask": np.ones((2, 6), np.int64)},
            r"attention_mask: .*where batch = 2, tokens = 5, got",
        ),
        ({"input_ids": np.ones((2, 5), np.int32)}, "input_ids: expected int64 .*got int32"),
        ({"mask": np.ones(1)}, r"expected the inputs \['image', .*got .*'mask'\]"),
    ],
)
def test_inputs_that_do_not_fit(changes, message):
    with pytest.raises(BackendError, match=message):
        measure(feeds(**changes), SPECS)


def test_a_missing_input_is_named():
    given = feeds()
    del given["image"]
    with pytest.raises(BackendError, match=r"expected the inputs \['image'.*got \['input_ids'"):
        measure(given, SPECS)


def test_padding_is_zero_whatever_was_there_before():
    text = np.full((4, 6), 9, np.int64)
    fill(text, np.array([[1, 2], [3, 4]]))
    assert text.tolist() == [[1, 2, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0], [0] * 6, [0] * 6]


def test_a_full_bucket_has_no_padding():
    text = np.zeros((2, 3), np.int64)
    fill(text, np.array([[1, 2, 3], [4, 5, 6]]))
    assert text.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_answers_are_cut_back_and_copied():
    outputs = {
        "box": np.arange(16).reshape(4, 4),
        "logits_tok": np.arange(4 * 15 * 2).reshape(4, 15, 2),
        "attention_map": np.arange(4 * 16 * 3).reshape(4, 16, 3),
    }
    kept = {name: array.copy() for name, array in outputs.items()}
    answers = cut(outputs, 3, 5)
    for array in outputs.values():
        array[:] = -1
    assert np.array_equal(answers["box"], kept["box"][:3])
    assert np.array_equal(answers["logits_tok"], kept["logits_tok"][:3, :4])
    assert np.array_equal(answers["attention_map"], kept["attention_map"][:3, :5])


@pytest.mark.parametrize("limits", [Limits(32, 128), Limits(1, 1), Limits(5, 17), Limits(4, 127)])
def test_all_buckets_are_those_that_shapes_fall_into(limits):
    shapes = [(b, n) for b in range(1, limits.max_batch + 1) for n in range(1, limits.max_tokens + 1)]
    assert sorted(buckets(limits)) == sorted({bucket_of(*shape, limits) for shape in shapes})
