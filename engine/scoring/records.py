"""An answer as a record: a line of JSON with all that is known, or a flat row of a table."""

from __future__ import annotations

import base64
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from engine.errors import Dgm4Error
from engine.prediction import Prediction
from engine.predictor import Predictor
from engine.result import to_rows
from engine.scoring.entries import Entry

Record = dict[str, Any]
Answer = Prediction | Dgm4Error

_SCORE_DIGITS, _PIXEL_DIGITS, _MS_DIGITS = 6, 1, 2
_SURROGATE = re.compile("[\ud800-\udfff]")
_ITEM = re.compile(r"^item \d+")  # what the predictor calls the pairs of a stream


def answers(
    predictor: Predictor, entries: Iterable[Entry], base: Path, batch_size: int
) -> Iterator[tuple[Entry, Answer]]:
    """Each entry of a list with its prediction or its error, lazily and in order.

    `base` is the folder that the paths of images are relative to. Errors name the entry's place.
    """
    waiting: deque[Entry] = deque()

    def pairs() -> Iterator[object]:
        for entry in entries:
            waiting.append(entry)
            if entry.error is not None:
                yield None  # no pair: the predictor returns an error in its place
            else:
                path = None if entry.image is None else base / entry.image
                image = path if entry.content is None else entry.content
                yield {"image": image, "caption": entry.caption, "box": entry.box}

    for answer in predictor.stream(cast(Iterable[Any], pairs()), batch_size, on_error="return"):
        entry = waiting.popleft()
        if entry.error is not None:
            yield entry, entry.error
        elif isinstance(answer, Dgm4Error):
            yield entry, type(answer)(_ITEM.sub(entry.place, str(answer)))
        else:
            yield entry, answer


def line_record(head: Record, answer: Answer, heatmap: bool = False) -> Record:
    """What a line of JSON says of a pair that the list calls `head`."""
    if isinstance(answer, Dgm4Error):
        return {**head, "error": str(answer), "kind": type(answer).__name__}
    return {**head, **rounded(answer.to_dict(heatmap))}


def table_row(head: Record, answer: Answer) -> Record:
    """The flat row of a pair: `to_rows` with line, image and id, which is text."""
    name = head.get("id")
    row = {
        "line": head["line"],
        "image": head["image"],
        "id": name if isinstance(name, str | None) else json.dumps(name),
        **to_rows([answer])[0],
    }
    return {column: readable(value) if isinstance(value, str) else value for column, value in row.items()}


def rounded(record: Record) -> Record:
    """A prediction's record without digits that mean nothing: probabilities to 1e-6, pixels to 0.1.

    The box that was given stays as it was: it is read again, and rounding could leave nothing of it.
    """
    short = dict(record)
    short["score"] = record["score"] and round(record["score"], _SCORE_DIGITS)
    short["types"] = {kind: x and round(x, _SCORE_DIGITS) for kind, x in record["types"].items()}
    short["words"] = [{**word, "score": round(word["score"], _SCORE_DIGITS)} for word in record["words"]]
    short["box"] = record["box"] and [round(x, _PIXEL_DIGITS) for x in record["box"]]
    short["timing"] = {stage: round(ms, _MS_DIGITS) for stage, ms in record["timing"].items()}
    if record.get("heatmap") is not None:
        short["heatmap"] = [[round(x, _SCORE_DIGITS) for x in line] for line in record["heatmap"]]
    return short


def json_line(record: Mapping[str, Any]) -> str:
    """A line of JSON that is valid Unicode, with U+FFFD in place of what is not.

    A path that is not UTF-8 is given whole too, as `image_base64`.
    """
    image = record.get("image")
    if isinstance(image, str) and _SURROGATE.search(image):
        record = {**record, "image_base64": base64.b64encode(os.fsencode(image)).decode("ascii")}
    return readable(json.dumps(record, allow_nan=False, ensure_ascii=False)) + "\n"


def readable(text: str) -> str:
    """Text that is valid Unicode, with U+FFFD in place of what is not."""
    return _SURROGATE.sub("\ufffd", text)
