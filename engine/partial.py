"""What can be said of a pair without its caption, without its image, or without any word.

Every output of the networks depends on both sides, so an answer is the network's for an empty caption or a
plain image in the place of what is absent. The heads that judge the side that is there keep their answers:
the box and the face types judge the image, the marks on words and the text types judge the caption. The
verdict, which is about the pair, and the heat map, which relates the two, are None. A network that compares
the image with words answers the verdict alone where there are none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from engine.inputs.absent import Absent
from engine.result import Result

_Result = TypeVar("_Result", bound=Result)
_JUDGED = {"caption": "face_", "image": "text_"}  # the types that are still judged without it


def leave_out(result: _Result, absent: Absent) -> _Result:
    """Return the result without what cannot be said in the absence of the caption or the image."""
    if not absent:
        return result
    if absent == "words":
        types = dict.fromkeys(result.types)
        return replace(result, types=types, detected=(), box=None, words=(), heatmap=None)
    kept = _JUDGED[absent]
    result = replace(
        result,
        manipulated=None,
        score=None,
        types={kind: x if kind.startswith(kept) else None for kind, x in result.types.items()},
        detected=tuple(kind for kind in result.detected if kind.startswith(kept)),
        heatmap=None,
    )
    if absent == "caption":
        return replace(result, words=())
    return replace(result, box=None, size=None, thumbnail=None)
