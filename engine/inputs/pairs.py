"""The (image, caption) pairs of a batch, and the checks of their types and lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from engine.errors import InputError
from engine.inputs.preprocess import ImageInput

Caption = str | bytes
Pair = tuple[ImageInput, Caption]


def unpack_pair(name: str, pair: object) -> Pair:
    """Return the pair as a tuple; raises InputError if it is not one. `name` is what messages call it."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        actual = f"{len(pair)} values" if isinstance(pair, (tuple, list)) else type(pair).__name__
        raise InputError(f"{name}: expected a pair (image, caption), got {actual}")
    return pair[0], pair[1]


def join_pairs(
    pairs: Sequence[Pair] | Sequence[ImageInput], captions: Sequence[Caption] | None
) -> Iterable[Pair]:
    """Return pairs, zipped from images and captions where both are given.

    Raises InputError for a single value instead of a list and for lists of unequal length.
    """
    _check_list("a list of (image, caption) pairs" if captions is None else "a list of images", pairs)
    if captions is None:
        return cast(Sequence[Pair], pairs)
    _check_list("a list of captions", captions)
    if len(pairs) != len(captions):
        raise InputError(
            f"got {_count(pairs, 'image')} but {_count(captions, 'caption')}; pass one caption for each image"
        )
    return zip(cast(Sequence[ImageInput], pairs), captions, strict=True)


def _check_list(expected: str, value: object) -> None:
    if isinstance(value, (str, bytes, bytearray, memoryview, dict, set)) or not hasattr(value, "__len__"):
        hint = "; use stream for an iterator" if hasattr(value, "__next__") else ""
        raise InputError(f"expected {expected}, got {type(value).__name__}{hint}")


def _count(values: Sequence[object], noun: str) -> str:
    return f"{len(values)} {noun}" if len(values) == 1 else f"{len(values)} {noun}s"


def check_shapes(shapes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return (pairs, tokens) of batches as a list; raises InputError for other than positive integers."""
    checked = list(shapes) if isinstance(shapes, Iterable) else [shapes]
    for shape in checked:
        numbers = shape if isinstance(shape, tuple | list) else ()
        if len(numbers) != 2 or not all(type(n) is int and n >= 1 for n in numbers):
            raise InputError(f"shapes: expected (pairs, tokens) such as [(1, 24), (32, 50)], got {shape!r}")
    return checked
