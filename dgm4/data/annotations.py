"""Annotations of DGM4 as published: JSON lists of records beside the folders `origin` and `manipulation`.

A record is {"id", "image", "text", "fake_cls", "fake_image_box", "fake_text_pos"}; what else it holds is
not read. Its id is that of the news item, which several manipulations of one item share, so a record is
known by its image and text. A record that cannot be used is reported and left out, or stops the reading.
"""

from __future__ import annotations

import json
import logging
import math
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dgm4.config import TYPES
from dgm4.places import check_data
from engine.errors import InputError, quoted
from engine.inputs.preprocess import read_size
from engine.inputs.text import MAX_CHARACTERS, clean_caption

log = logging.getLogger(__name__)

Box = tuple[float, float, float, float]
OnError = Literal["skip", "raise"]

SPLITS = ("train", "val", "test")
ORIGINAL = "orig"
MAX_WORDS = 50  # of the published cleaning; what stands behind is never read
_SHOWN = 200  # characters of a reason that an error repeats
_NAMED = 20  # bad records that the log names at its usual level
_CHOICES = ("skip", "raise")
_DATA_NAME = "DGM4"  # the first component of a published path stands for the data folder
_FIELDS = {
    "id": (int, str),
    "image": (str,),
    "text": (str,),
    "fake_cls": (str,),
    "fake_image_box": (list,),
    "fake_text_pos": (list,),
}
_OVERHANG = 1.0  # pixels that a box may stick out through rounding
_LETTERED = re.compile(r"[^\W_][^ ]*")  # a word that no cleaning deletes, as it holds a letter or digit
_LARGEST = 2.0**31  # pixels; larger numbers are no coordinates


@dataclass(frozen=True)
class Sample:
    """One pair. `image` is the path as annotated, `picture` the file that it names, `text` the raw caption.

    `types` is a subset of TYPES in its order, empty for a pristine pair. `box` is (x1, y1, x2, y2) in
    pixels of the stored image. `fake_words` are indices into the cleaned caption's words, split on ' '.
    """

    id: str
    picture: Path
    image: str
    text: str
    types: tuple[str, ...]
    box: Box | None
    fake_words: tuple[int, ...]

    @property
    def manipulated(self) -> bool:
        """Whether image or text was manipulated."""
        return bool(self.types)

    @property
    def fake_cls(self) -> str:
        """The class as annotated: "orig", or the types joined by "&"."""
        return "&".join(self.types) or ORIGINAL


@dataclass(frozen=True)
class Problem:
    """Why a record of `file`, or the whole of it, was left out; `kind` is a short name for counting."""

    file: Path
    id: str
    message: str
    kind: str


@dataclass(frozen=True)
class Annotations:
    """The usable samples in the order of the files, and what was left out."""

    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]

    def counts(self) -> dict[str, int]:
        """Return the number of problems of each kind, the most frequent first."""
        return dict(Counter(problem.kind for problem in self.problems).most_common())

    def usable(self, source: str) -> tuple[Sample, ...]:
        """Return the samples; raises InputError, with the commonest reason, where `source` has none."""
        if self.samples:
            return self.samples
        most = next(iter(self.counts()), None)
        first = next((problem for problem in self.problems if problem.kind == most), None)
        reason = "" if first is None else f", most often {most}: {first.message[:_SHOWN]}"
        raise InputError(
            f"{source}: expected annotated pairs, got none of {len(self.problems)} usable{reason}"
        )


class _Unusable(Exception):
    """A record or file that cannot be used; never leaves this module."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def read_split(
    data: str | Path, split: str, on_error: OnError = "skip", check_pictures: bool = True
) -> Annotations:
    """Read the annotations of a split of a data folder in the published layout; see `read_annotations`."""
    if split not in SPLITS:
        raise InputError(f"unknown split {quoted(split)}: expected one of {', '.join(SPLITS)}")
    return read_annotations([split_file(data, split)], data, on_error, check_pictures)


def split_file(data: str | Path, split: str) -> Path:
    """Return DATA/metadata/<split>.json, the annotation file of a split."""
    return Path(data) / "metadata" / f"{split}.json"


def read_annotations(
    files: str | Path | Iterable[str | Path],
    root: str | Path,
    on_error: OnError = "skip",
    check_pictures: bool = True,
) -> Annotations:
    """Read annotation files whose images lie under the data folder `root`.

    `on_error` says what a bad record or file does: "skip" lists it in `problems`, names the first 20 in the
    log (all at its level DEBUG) and counts them at the end; "raise" raises InputError. With `check_pictures`
    every image's header is read; without, nothing but the files is, and a box may still reach past its
    image. Raises InputError where `root` is no folder and where a file cannot be opened.
    """
    if on_error not in _CHOICES:
        raise InputError(f"on_error: expected one of {', '.join(_CHOICES)}, got {quoted(on_error)}")
    folder = Path(root)
    check_data(folder)
    reader = _Reader(folder.resolve(), on_error, check_pictures)
    for file in [files] if isinstance(files, (str, os.PathLike)) else files:
        reader.read(Path(file))
    return reader.finish()


class _Reader:
    """Collects samples and problems over the files of one reading."""

    def __init__(self, root: Path, on_error: OnError, check_pictures: bool):
        self.root, self.on_error, self.check_pictures = root, on_error, check_pictures
        self.samples: list[Sample] = []
        self.problems: list[Problem] = []
        self.seen: set[tuple[Path, str]] = set()

    def read(self, file: Path) -> None:
        """Read the records of one file."""
        try:
            records = _load(file)
        except _Unusable as error:
            self._report(Problem(file, "", str(error), error.kind))
            return
        for index, record in enumerate(records):
            try:
                self._add(record)
            except _Unusable as error:
                self._report(Problem(file, _id_of(record), f"record {index}: {error}", error.kind))

    def finish(self) -> Annotations:
        """Log what was left out and return everything."""
        annotations = Annotations(tuple(self.samples), tuple(self.problems))
        if annotations.problems:
            counts = ", ".join(f"{kind} {n}" for kind, n in annotations.counts().items())
            log.warning(
                "left out %d bad records or files, kept %d records (%s)",
                len(annotations.problems),
                len(annotations.samples),
                counts,
            )
        return annotations

    def _add(self, record: Any) -> None:
        sample = _parse(record, self.root)
        key = (sample.picture, sample.text)
        if key in self.seen:
            raise _Unusable("duplicate", "its picture and text came before; expected each pair once")
        self.samples.append(_check_picture(sample) if self.check_pictures else sample)
        self.seen.add(key)

    def _report(self, problem: Problem) -> None:
        if self.on_error == "raise":
            raise InputError(f'{_describe(problem)}; correct it, or leave it out with on_error="skip"')
        if len(self.problems) < _NAMED:
            log.warning("left out: %s", _describe(problem))
        else:
            log.debug("left out: %s", _describe(problem))
        self.problems.append(problem)


def _describe(problem: Problem) -> str:
    named = f" (id {problem.id})" if problem.id else ""
    return f"{problem.file}{named}: {problem.message}"


def _id_of(record: Any) -> str:
    """The id of a record that may be anything."""
    value = record.get("id") if isinstance(record, dict) else None
    return str(value) if type(value) in _FIELDS["id"] else ""


def _load(file: Path) -> list[Any]:
    """Return the JSON list that a file holds; raises InputError where it cannot be opened."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot read the annotations: {error.strerror}") from error
    try:
        records = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or numbers and nesting past reason
        raise _Unusable("file_not_json", f"expected JSON in UTF-8: {error}") from error
    if not isinstance(records, list):
        raise _Unusable("file_not_a_list", f"expected a list of records, got {type(records).__name__}")
    return records


def _parse(record: Any, root: Path) -> Sample:
    """Read one record without looking at its image."""
    _check_fields(record)
    types = _read_types(record["fake_cls"])
    return Sample(
        id=str(record["id"]),
        picture=_locate(record["image"], root),
        image=record["image"],
        text=record["text"],
        types=types,
        box=_read_box(record["fake_image_box"], any(name.startswith("face_") for name in types)),
        fake_words=_read_words(
            record["fake_text_pos"], record["text"], any(name.startswith("text_") for name in types)
        ),
    )


def _check_fields(record: Any) -> None:
    if not isinstance(record, dict):
        raise _Unusable("not_an_object", f"expected an object, got {type(record).__name__}")
    for name, kinds in _FIELDS.items():
        if name not in record:
            raise _Unusable("field_missing", f"expected the field {quoted(name)}, which is missing")
        if type(record[name]) not in kinds:  # not isinstance: true and false are no ids
            wanted = " or ".join(kind.__name__ for kind in kinds)
            actual = type(record[name]).__name__
            raise _Unusable("field_type", f"expected the field {quoted(name)} as {wanted}, got {actual}")


def _read_types(fake_cls: str) -> tuple[str, ...]:
    """Read a class: "orig", or at most one face type and one text type."""
    if fake_cls == ORIGINAL:
        return ()
    names = fake_cls.split("&")
    if unknown := [name for name in names if name not in TYPES]:
        known = ", ".join((ORIGINAL, *TYPES))
        raise _Unusable("class_unknown", f"expected fake_cls of {known}, got {quoted(unknown[0])}")
    modalities = [name.partition("_")[0] for name in names]
    if len(set(modalities)) < len(modalities):
        raise _Unusable(
            "class_forbidden", f"expected at most one face type and one text type, got {quoted(fake_cls)}"
        )
    return tuple(name for name in TYPES if name in names)


def _locate(image: str, root: Path) -> Path:
    """Return the file that an annotated path names, which has to lie inside the data folder."""
    plain = posixpath.normpath(image.removeprefix(f"{_DATA_NAME}/"))
    if "\\" in image and not _exists(root / plain):  # written on Windows
        return _locate(image.replace("\\", "/"), root)
    if not image or "\0" in image or plain.startswith(("/", "../")) or plain in (".", ".."):
        raise _Unusable("path_outside", f"expected a path inside the data folder, got {quoted(image)}")
    return root / plain


def _read_box(values: list[Any], claimed: bool) -> Box | None:
    """Read [x1, y1, x2, y2], or [] where no face type is claimed."""
    if not values:
        if claimed:
            raise _Unusable("box_missing", "the class names a face type; expected a box, got none")
        return None
    numbers = all(type(v) in (int, float) and abs(v) < _LARGEST for v in values)  # NaN is not smaller
    if len(values) != 4 or not numbers:
        raise _Unusable("box_malformed", f"expected four finite numbers as the box, got {_shown(values)}")
    if not claimed:
        raise _Unusable("box_unclaimed", "the class names no face type; expected no box, got one")
    x1, y1, x2, y2 = values
    if x2 <= x1 or y2 <= y1:
        raise _Unusable("box_degenerate", f"expected x1 < x2 and y1 < y2 in the box, got {values}")
    return _clip((x1, y1, x2, y2), math.inf, math.inf)


def clip_box(box: Box, width: float, height: float) -> Box | None:
    """Clip a box (x1, y1, x2, y2) to an image of `width` x `height` pixels.

    None where it sticks out by more than the pixel that rounding explains, or nothing is left of it.
    """
    x1, y1, x2, y2 = box
    if min(x1, y1, width - x2, height - y2) < -_OVERHANG:
        return None
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _clip(box: Box, width: float, height: float) -> Box:
    clipped = clip_box(box, width, height)
    if clipped is None:
        size = "" if math.isinf(width) else f" of {width:.0f} x {height:.0f} pixels"
        raise _Unusable("box_outside", f"expected a box inside the picture{size}, got {list(box)}")
    return clipped


def _read_words(indices: list[Any], text: str, claimed: bool) -> tuple[int, ...]:
    """Read word indices; those of words behind the published limit are dropped."""
    if bool(indices) != claimed:
        if claimed:
            raise _Unusable("words_missing", "the class names a text type; expected word indices, got none")
        raise _Unusable("words_unclaimed", "the class names no text type; expected no word index")
    if not indices:
        return ()
    count = _count_words(text, indices)
    for index in indices:
        if type(index) is not int or not 0 <= index < count:
            shown = _shown([index])[1:-1]
            raise _Unusable("word_index", f"expected indices of the caption's {count} words, got {shown}")
    read = count if len(text) <= MAX_CHARACTERS else _count_words(text[:MAX_CHARACTERS], indices)
    return tuple(sorted({index for index in indices if index < min(read, MAX_WORDS)}))


def _count_words(text: str, indices: list[Any]) -> int:
    """Words of the whole cleaned caption as published indices count them: split on ' ' alone.

    A lower bound where it is enough for all indices, since cleaning takes most of the time.
    """
    surely = len(_LETTERED.findall(text))
    if all(type(index) is int and 0 <= index < surely for index in indices):
        return surely
    cleaned = clean_caption(text, max_words=len(text) + 1).text
    return cleaned.count(" ") + 1 if cleaned else 0


def _shown(values: list[Any], most: int = 80) -> str:
    """The first characters of faulty values, which may be nested deeper than repr goes."""
    try:
        text = repr(values)
    except RecursionError:
        text = "[...]"
    return text if len(text) <= most else f"{text[:most]}..."


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, or a folder that may not be entered
        return False


def _check_picture(sample: Sample) -> Sample:
    """Return the sample with its box clipped to the stored image, whose header is read."""
    if not _exists(sample.picture):
        raise _Unusable("picture_missing", f"expected the picture {quoted(sample.picture)}, which is missing")
    try:
        width, height = read_size(sample.picture)
    except InputError as error:
        raise _Unusable("picture_unreadable", str(error)) from error
    if sample.box is None:
        return sample
    box = _clip(sample.box, width, height)
    return sample if box == sample.box else replace(sample, box=box)
