"""The (image, caption) pairs of a batch, and the checks of their types and lengths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, cast

from engine.errors import InputError, quoted
from engine.inputs.boxes import Box
from engine.inputs.sources import ImageInput

Caption = str | bytes
Pair = (
    tuple[ImageInput | None, Caption | None]
    | tuple[ImageInput | None, Caption | None, Box | None]
    | Mapping[str, Any]
)


def unpack_pair(name: str, pair: object) -> tuple[ImageInput | None, Caption | None, Any]:
    """Return (image, caption, box) of such a tuple or of a mapping with these names; messages call it `name`.

    The box may be left out, "text" does for "caption", and other names are ignored, as in a line of
    `dgm4 predict --list`. Raises InputError for anything else.
    """
    expected = 'a pair (image, caption) or {"image": ..., "caption": ...}'
    if isinstance(pair, Mapping):
        caption = "caption" if "caption" in pair else "text"
        if "image" not in pair or caption not in pair:
            names = quoted(", ".join(map(str, pair)))
            raise InputError(f"{name}: expected {expected}, got the names {names}; None stands for neither")
        return pair["image"], pair[caption], box_of(pair)
    if isinstance(pair, (tuple, list)):
        image, caption, *box = pair if len(pair) > 1 else (None, None, None, None)
        if not box or (len(box) == 1 and not isinstance(box[0], str)):
            return image, caption, box[0] if box else None
    actual = f"{len(pair)} values" if isinstance(pair, (tuple, list)) else type(pair).__name__
    raise InputError(f"{name}: expected {expected}, got {actual}")


def box_of(record: Mapping[str, Any]) -> Any:
    """The box that a pair brings; that of an answer read again is "box_given", "box" being the network's."""
    return record["box_given"] if "box_given" in record else record.get("box")


def join_pairs(
    pairs: Sequence[Pair] | Sequence[ImageInput | None], captions: Sequence[Caption | None] | None
) -> Iterable[Pair]:
    """Return pairs, zipped from images and captions where both are given.

    Raises InputError for a single value instead of a list and for lists of unequal length.
    """
    check_list("a list of (image, caption) pairs" if captions is None else "a list of images", pairs)
    if captions is None:
        return cast(Sequence[Pair], pairs)
    check_list("a list of captions", captions)
    if len(pairs) != len(captions):
        raise InputError(
            f"got {_count(pairs, 'image')} but {_count(captions, 'caption')}; pass one caption for each image"
        )
    return zip(cast(Sequence[ImageInput | None], pairs), captions, strict=True)


def check_list(expected: str, value: object) -> None:
    """Raise InputError, naming what is `expected`, for a single value and for what has no length."""
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
        whole = [n for n in numbers if isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 1]
        if len(numbers) != 2 or len(whole) != 2:
            expected = "(pairs, tokens) such as [(1, 24), (32, 50)]"
            raise InputError(f"shapes: expected {expected}, got {quoted(shape)}")
    return [(int(pairs), int(tokens)) for pairs, tokens in checked]
