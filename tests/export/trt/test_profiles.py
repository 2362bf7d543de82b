"""Optimisation profiles: which are chosen, which are refused and in what words, what the engine gets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine.backends.buckets import Bucket
from engine.backends.tensorrt_engine import place, read_profiles
from engine.errors import BuildError, InputError
from export.trt.profiles import (
    Shapes,
    auto_extents,
    check_extents,
    check_profiles,
    extents_text,
    profiles_of,
)

SHAPES = Shapes(32, 2, 50, 128, 256)
DECLARED = {"image": (-1, 3, 256, 256), "input_ids": (-1, -1), "attention_mask": (-1, -1), "fixed": (3,)}
WIDTH = 32
GOOD = {"x": ((1, 2, WIDTH), (4, 16, WIDTH), (8, 64, WIDTH))}


@pytest.mark.parametrize(
    ("library", "limits", "extents"),
    [
        ("tensorrt_rtx", (32, 128), ((32, 128),)),
        ("tensorrt", (32, 128), ((1, 128), (32, 128))),
        ("tensorrt", (1, 128), ((1, 128),)),
    ],
)
def test_the_default(library, limits, extents):
    assert auto_extents(library, *limits) == extents
    check_extents(extents, *limits)


def test_shapes_of_each_in_rising_order():
    profiles = profiles_of([(32, 128), (1, 32), (8, 64), (32, 64)], SHAPES)
    assert [profile["input_ids"] for profile in profiles] == [
        [(1, 2), (1, 32), (1, 32)],
        [(1, 2), (8, 50), (8, 64)],
        [(1, 2), (16, 50), (32, 64)],
        [(1, 2), (16, 65), (32, 128)],
    ]
    for profile in profiles:
        assert profile["attention_mask"] == profile["input_ids"]
        assert [shape[1:] for shape in profile["image"]] == [(3, 256, 256)] * 3
        assert [shape[0] for shape in profile["image"]] == [shape[0] for shape in profile["input_ids"]]
    check_profiles(DECLARED, profiles)


def test_the_single_one_is_chosen_for_usual_pairs():
    (profile,) = profiles_of([(32, 128)], SHAPES)
    assert profile["input_ids"] == [(1, 2), (8, 50), (32, 128)]


def test_the_runtime_places_inputs_in_what_was_built():
    """The smallest profile that takes them, by the ranges that the engine tells."""
    profiles = profiles_of([(1, 32), (8, 64), (32, 128)], SHAPES)
    engine = SimpleNamespace(
        num_optimization_profiles=len(profiles),
        get_tensor_profile_shape=lambda name, index: profiles[index][name],
    )
    read = read_profiles(engine)
    found = {
        size: (place(*size, read)[0].number, place(*size, read)[1])
        for size in [(1, 20), (1, 40), (5, 64), (9, 20)]
    }
    assert found == {
        (1, 20): (0, Bucket(1, 32)),
        (1, 40): (1, Bucket(1, 48)),
        (5, 64): (1, Bucket(8, 64)),
        (9, 20): (2, Bucket(16, 32)),
    }


@pytest.mark.parametrize(
    ("extents", "message"),
    [
        ((), "expected 1 to 8, got 0"),
        (tuple((n, 128) for n in range(1, 10)), "expected 1 to 8, got 9"),
        (((32, 128), (32, 128)), "expected each once, got 32x128,32x128"),
        (((1, 32), (64, 128)), r"profile 2 \(64x128\): expected 1\.\.32 pairs, the bundle's limit, got 64"),
        (
            ((1, 256), (32, 128)),
            r"profile 1 \(1x256\): expected 2\.\.128 tokens, the bundle's limit, got 256",
        ),
        (((1, 1), (32, 128)), r"profile 1 \(1x1\): expected 2\.\.128 tokens"),
        (((1, 128), (32, 64)), "expected one for the bundle's limits, 32x128, among 1x128,32x64; add it"),
    ],
)
def test_extents_that_do_not_fit(extents, message):
    with pytest.raises(InputError, match=message):
        check_extents(extents, 32, 128)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (GOOD | {"z": GOOD["x"]}, r"profile 2 names inputs \['z'\]; the network has \['fixed', 'x'\]"),
        ({}, r"profile 2 lacks the dynamic inputs \['x'\]"),
        ({"x": ((1, 2),) * 3}, r"profile 2, input 'x': expected 3 dimensions, as \[-1, -1, 32\], got"),
        (
            {"x": ((1, 2, 32), (9, 16, 32), (8, 64, 32))},
            r"profile 2, input 'x', dimension 0: 1\.\.9\.\.8; expected 1 <= min <= opt <= max",
        ),
        ({"x": ((0, 2, 32), (4, 16, 32), (8, 64, 32))}, r"dimension 0: 0\.\.4\.\.8"),
        ({"x": ((1, 2, 31), (4, 16, 32), (8, 64, 32))}, r"dimension 2: 31\.\.32\.\.32; .* fixes it to 32"),
        ({"x": ((1, 2, 32), (4, 16, 32))}, r"input 'x': expected three shapes \(min, opt, max\), got 2"),
    ],
)
def test_a_profile_must_fit_the_network(profile, message):
    with pytest.raises(BuildError, match=message):
        check_profiles({"x": (-1, -1, WIDTH), "fixed": (3,)}, [GOOD, profile])


def test_a_dynamic_network_needs_one():
    with pytest.raises(BuildError, match=r"expected a profile for the dynamic inputs \['x'\], got none"):
        check_profiles({"x": (-1, -1, WIDTH)}, [])
    check_profiles({"fixed": (3,)}, [])
    check_profiles({"x": (-1, -1, WIDTH), "fixed": (3,)}, [GOOD])


def test_in_words():
    assert extents_text([(1, 32), (8, 64)]) == "1x32,8x64"
