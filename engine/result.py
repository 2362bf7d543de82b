"""The data of a prediction, its dictionary, its JSON and its row of a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from PIL import Image

from engine.errors import InputError, shorten, why_no_json
from engine.registry import NETWORKS
from engine.registry.config import TYPES
from engine.schema import Record, at_least, within

_Score = Annotated[float, within(0, 1)]
_Pixels = Annotated[int, at_least(1)]
_Box = tuple[float, float, float, float]
Row = dict[str, bool | float | str | None]


@dataclass(frozen=True)
class Word(Record):
    """One word of the caption that the network read: `text` is `caption[start:end]`, `score` in [0, 1].

    The score is the largest over the word's tokens; `manipulated` compares it with the bundle's threshold.

    Examples:
        >>> from engine import Word
        >>> Word("Obama", 4, 9, score=0.91, manipulated=True).text
        'Obama'
    """

    open: ClassVar[bool] = True  # to what a later release adds

    text: str
    start: int
    end: int
    score: _Score
    manipulated: bool


@dataclass(frozen=True, kw_only=True)
class Result(Record):
    """What was decided for one image and its caption, as data; `engine.Prediction` can also be drawn.

    Attributes:
        manipulated: `score` reaches its threshold; None where the pair has no score.
        score: in [0, 1], how sure the network is that the pair is manipulated; None without a caption or
            an image. Scores are probabilities only after `dgm4 calibrate`.
        types: scores in [0, 1] of face_swap, face_attribute, text_swap, text_attribute; independent of
            each other and of `score`. None for the text types without a caption, for the face types without
            an image.
        detected: the types that reach their thresholds; meaningful where `manipulated` is not False.
        box: (x1, y1, x2, y2) of the manipulated face, in pixels of the upright image, clipped to it. The
            network predicts one box for every image, whatever the number of faces, so it is meaningful only
            where a face type is detected; None where it is empty (the benchmark's "no box") and without an
            image.
        box_given: the box that the caller gave for the network to judge, (x1, y1, x2, y2) in pixels of the
            upright image; None where the network finds the box itself.
        words: the words that the network read, in order.
        caption: the text that the words' spans refer to: the user's, cut to its first 4096 characters and
            with U+FFFD in place of what is not Unicode.
        size: (width, height) of the upright image; None without one.
        heatmap: float32 [16, 16] in [0, 1], rows from the top: of each patch what `heatmap_label` says; None
            where the model has no such map, and without a caption or an image.
        timing: milliseconds by stage: queue (what the pair waited, only from a Batcher), decode (with the
            thumbnail), resize (0 where a GPU does it), tokenize, inference (with the normalisation),
            postprocess, and total, their sum. In a batch the inference time is the batch's divided by its
            size, and so are decode and resize where captions share an image.
        warnings: short codes, each with detail after a colon.
        thresholds: the scores from which the verdict, each type and a word count: manipulated, the four
            types, words.
        model: name, size, precision, backend and device of the network, and the kind of its weights (trained,
            demo or drawn).
        thumbnail: the upright image within 1024 pixels, for `plot` and `to_html`; None if not stored.

    Equality leaves out heatmap, timing and thumbnail.
    """

    document: ClassVar[str] = "prediction"
    error: ClassVar[type[InputError]] = InputError
    open: ClassVar[bool] = True

    manipulated: bool | None
    score: _Score | None
    types: dict[str, _Score | None]
    detected: tuple[str, ...]
    box: _Box | None
    words: tuple[Word, ...]
    size: tuple[_Pixels, _Pixels] | None
    box_given: _Box | None = None
    caption: str = ""
    warnings: tuple[str, ...] = ()
    thresholds: dict[str, float] = field(default_factory=dict)
    model: dict[str, str] = field(default_factory=dict)
    heatmap: np.ndarray | None = field(default=None, compare=False, repr=False)
    timing: dict[str, float] = field(default_factory=dict, compare=False)
    thumbnail: Image.Image | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_dict(cls, raw: object, path: str = "") -> Self:
        """Read what `to_dict` gave, in this release or another one; the thumbnail is not in it.

        Unknown fields, such as those that `dgm4 predict --list` adds, are ignored. Raises InputError for what
        is no prediction, naming the field at fault.

        Examples:
            >>> from engine import Prediction, Predictor
            >>> prediction = Predictor("my-bundle").predict("photo.jpg", "Obama speaks")
            >>> Prediction.from_dict(prediction.to_dict()) == prediction
            True
        """
        if not isinstance(raw, dict):
            return super().from_dict(raw, path)
        if "error" in raw and "score" not in raw:
            message = shorten(str(raw["error"]))
            raise InputError(f"{cls.document}: expected one, got the error of a pair that failed: {message}")
        result = super().from_dict({k: x for k, x in raw.items() if k not in ("heatmap", "thumbnail")}, path)
        return replace(result, heatmap=_read_heatmap(raw.get("heatmap")))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` gave, or a line of `dgm4 predict`; raises InputError as `from_dict` does.

        Examples:
            >>> from engine import Prediction, Predictor
            >>> prediction = Predictor("my-bundle").predict("photo.jpg", "Obama speaks")
            >>> Prediction.from_json(prediction.to_json()) == prediction
            True
        """
        if not isinstance(text, (str, bytes, bytearray)):
            raise InputError(f"{cls.document}: expected JSON as str or bytes, got {type(text).__name__}")
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            got = f"{len(text)} characters"
            raise InputError(f"{cls.document}: expected JSON, got {got}: {why_no_json(error)}") from error
        return cls.from_dict(raw)

    @property
    def heatmap_label(self) -> str:
        """What a high value of the heat map says of its patch, by the record of the network."""
        network = NETWORKS.get(self.model.get("name", ""))
        tensor = None if network is None else network.heatmap
        return "heat map" if tensor is None or tensor.heatmap is None else tensor.heatmap.label

    def problems(self) -> Iterator[tuple[str, str, object]]:
        """See `Record.problems`."""
        if not set(self.detected) <= set(self.types):
            yield "detected", f"some of {', '.join(self.types) or 'no type'}", list(self.detected)
        for i, word in enumerate(self.words):
            if not 0 <= word.start <= word.end <= len(self.caption):
                yield f"words[{i}]", "a span of the caption", [word.start, word.end]

    def to_dict(self, heatmap: bool = True) -> dict[str, Any]:
        """Return JSON-safe data; the heat map as nested lists, left out where `heatmap` is false.

        Examples:
            >>> from engine import Predictor
            >>> prediction = Predictor("my-bundle").predict("photo.jpg", "Obama speaks")
            >>> sorted(prediction.to_dict(heatmap=False))[:4]
            ['box', 'box_given', 'caption', 'detected']
        """
        data: dict[str, Any] = {
            "manipulated": self.manipulated,
            "score": self.score,
            "types": dict(self.types),
            "detected": list(self.detected),
            "box": None if self.box is None else list(self.box),
            "box_given": None if self.box_given is None else list(self.box_given),
            "words": [vars(word).copy() for word in self.words],
            "caption": self.caption,
            "size": None if self.size is None else list(self.size),
            "warnings": list(self.warnings),
            "thresholds": dict(self.thresholds),
            "model": dict(self.model),
            "timing": dict(self.timing),
        }
        if heatmap:
            data["heatmap"] = None if self.heatmap is None else self.heatmap.tolist()
        return data

    def to_json(self, heatmap: bool = True, indent: int | None = None) -> str:
        """Return `to_dict` as JSON; raises ValueError for a NaN, which no prediction made here holds.

        Examples:
            >>> from engine import Predictor
            >>> prediction = Predictor("my-bundle").predict("photo.jpg", "Obama speaks")
            >>> prediction.to_json(heatmap=False).startswith('{"manipulated": ')
            True
        """
        return json.dumps(self.to_dict(heatmap), allow_nan=False, indent=indent)

    def to_row(self) -> Row:
        """Return one flat row of a table, of plain values; the columns are the same for every prediction.

        `words` and `marked` count the words read and those marked as manipulated, `marked_words` joins these.
        The heat map and the scores of single words are not in it.

        Examples:
            >>> from engine import Predictor
            >>> row = Predictor("my-bundle").predict("photo.jpg", "Obama speaks").to_row()
            >>> row["caption"], row["words"], row["width"], row["error"]
            ('Obama speaks', 2, 64, None)
        """
        marked = [word.text for word in self.words if word.manipulated]
        corners, size = ("x1", "y1", "x2", "y2"), self.size or (None,) * 2
        return {
            "manipulated": self.manipulated,
            "score": self.score,
            **{kind: self.types.get(kind) for kind in TYPES},
            "detected": " ".join(self.detected),
            **dict(zip(corners, self.box or (None,) * 4, strict=True)),
            **dict(zip((f"given_{x}" for x in corners), self.box_given or (None,) * 4, strict=True)),
            "words": len(self.words),
            "marked": len(marked),
            "marked_words": " ".join(marked),
            "caption": self.caption,
            **dict(zip(("width", "height"), size, strict=True)),
            "warnings": "; ".join(self.warnings),
            **{f"model_{name}": self.model.get(name) for name in _MODEL},
            "milliseconds": self.timing.get("total"),
            "error": None,
            "error_kind": None,
        }


_MODEL = ("name", "size", "precision", "backend", "device", "weights")
_EMPTY = Result(manipulated=None, score=None, types={}, detected=(), box=None, words=(), size=None)


def to_rows(results: Iterable[Result | Exception]) -> list[Row]:
    """Return one flat row (`Prediction.to_row`) for each prediction, for pandas, Polars or csv.DictWriter.

    An error that `on_error="return"` left in a prediction's place is a row too: its message in the column
    `error`, its class in `error_kind`, None in all others. Raises InputError for anything else.

    Examples:
        >>> from engine import Predictor, to_rows
        >>> pairs = [("photo.jpg", "Obama speaks"), ("nowhere.jpg", "Obama speaks")]
        >>> rows = to_rows(Predictor("my-bundle").predict_batch(pairs, on_error="return"))
        >>> [row["error_kind"] for row in rows]
        [None, 'InputError']
    """
    if not isinstance(results, Iterable):
        hint = "; of one, take its to_row()" if isinstance(results, Result) else ""
        raise InputError(f"to_rows: expected an iterable of predictions, got {type(results).__name__}{hint}")
    return [_row_of(result) for result in results]


def _row_of(result: object) -> Row:
    if isinstance(result, Result):
        return result.to_row()
    if not isinstance(result, Exception):
        raise InputError(f"to_rows: expected predictions and errors, got {type(result).__name__}")
    empty: Row = dict.fromkeys(_EMPTY.to_row())
    return empty | {"error": str(result), "error_kind": type(result).__name__}


def _read_heatmap(raw: object) -> np.ndarray | None:
    """A map from nested lists; raises InputError unless it is [rows, columns] of numbers in [0, 1]."""
    if raw is None:
        return None
    try:
        heatmap = np.asarray(raw, dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        heatmap = np.empty(0, np.float32)
    if heatmap.ndim != 2 or not heatmap.size or not ((heatmap >= 0) & (heatmap <= 1)).all():
        raise InputError("prediction: heatmap: expected rows of numbers in [0, 1], all of one length")
    return heatmap
