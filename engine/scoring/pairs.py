"""The pairs of a list: JSON lines, a JSON array, CSV, Parquet, or a folder of images with their captions."""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from engine.errors import InputError, shorten
from engine.scoring.parquet import SUFFIX as PARQUET
from engine.scoring.parquet import read_rows

STDIN = Path("-")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_CAPTION_FILES = tuple(f"captions.{suffix}" for suffix in ("jsonl", "json", "csv", "tsv", "txt"))
_IMAGE_NAMES, _CAPTION_NAMES = ("image", "file_name"), ("caption", "text")
_LINES, _TABLES = (".jsonl", ".ndjson"), (".csv", ".tsv")
_DELIMITERS = ",;\t|"
_LONGEST_PATH = 4096  # characters: the system's limit
_SHOWN = 60  # characters of a faulty line that a message repeats
_EXPECTED = 'expected {"image": path, "caption": text}, where one of the two may be null'
_QUOTE = "; quote a caption that holds the delimiter"
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 begins like the first, and holds NUL as these do


class Mark(NamedTuple):
    """A place in a list: how many bytes and lines of its text come before it, or how many items."""

    offset: int = 0
    number: int = 0


START = Mark()


@dataclass(frozen=True)
class Entry:
    """A pair of a list, or what is wrong with its line; `number` counts lines, or items where there are none.

    `image` is the path as the list has it, relative to `PairList.base`; `id` what the list calls the pair.
    The image or the caption is None where the list has none. `content` are the bytes of an image that the
    list itself holds.
    """

    number: int
    image: str | None = None
    caption: str | None = None
    id: Any = None
    error: InputError | None = None
    content: bytes | None = None

    def head(self) -> dict[str, Any]:
        """What the record of the pair's prediction begins with."""
        identity = {} if self.id is None else {"id": self.id}
        image = self.image
        if image is not None and len(image) > _LONGEST_PATH:  # an image in base64, say
            image = shorten(image)
        return {"line": self.number, "image": image, **identity}


class PairList:
    """The pairs of a file, of a folder, or of stdin (`STDIN`), read anew at each iteration.

    A file is told by its suffix, else by how it begins. CSV has the columns image and caption (or file_name
    and text), in any order, or two without a header; Parquet has them by name, and its images may be bytes.
    A folder has one of `captions.jsonl`, `.json`, `.csv`, `.tsv` and `.txt`, or Parquet files, which are one
    list in the order of their names, or a NAME.txt beside each image. Iterating raises InputError for a list
    that cannot be read as a whole or is empty; a line that cannot be used is an `Entry` with an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_once = path == STDIN or path.is_fifo()  # <(...) in a shell
        self._files: list[Path] = []  # of a folder
        self.base = Path.cwd() if self._read_once else path if path.is_dir() else path.parent

    def __iter__(self) -> Iterator[Entry]:
        entry = None
        for entry, _ in self.read():
            yield entry
        if entry is None:
            name = "stdin" if self.path == STDIN else str(self.path)
            raise InputError(f"{name}: expected at least one pair, got an empty list")

    def read(self, start: Mark = START, content: bool = True) -> Iterator[tuple[Entry, Mark]]:
        """The entries from a mark on, each with the mark behind it; a stream has no marks but its start.

        Without `content` the images that a list holds as bytes are not read.
        """
        if self.path == STDIN:
            return _read(sys.stdin.buffer, "", "stdin", START)
        if self.path.is_dir():
            if start == START or not self._files:  # a listing of a million files serves all marks
                self._files = sorted(Path(x.path) for x in os.scandir(self.path) if x.is_file())
            return _read_folder(self.path, self._files, start, content)
        return _read_file(self.path, start, content)

    def count(self, out: Path | None) -> int | None:
        """How many pairs there are, None for a stream, which is read once.

        Raises InputError where `out` is an image of the list.
        """
        if self._read_once:
            return None
        written = out if out is not None and out.exists() else None
        total = 0
        for entry in self:
            total += 1
            if written is not None and entry.image is not None:
                image = self.base / entry.image
                if image.exists() and written.samefile(image):
                    raise InputError(
                        f"--out {out}: would overwrite an input, the image of line {entry.number} of the "
                        "list; choose another name"
                    )
        return total


class _Lines:
    """The lines of a binary file with their numbers; `mark` is the place behind the last one."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = iter(lines)
        self.mark = START

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> tuple[int, bytes]:
        line = next(self._lines)
        self.mark = Mark(self.mark.offset + len(line), self.mark.number + 1)
        return self.mark.number, line


def _read_file(path: Path, start: Mark, content: bool) -> Iterator[tuple[Entry, Mark]]:
    if path.suffix.lower() == PARQUET:
        yield from _read_parquet([path], start, content)
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot read the list: {error.strerror}") from error
    with file:
        yield from _read(file, path.suffix.lower(), str(path), start)


def _read(file: BinaryIO, suffix: str, name: str, start: Mark) -> Iterator[tuple[Entry, Mark]]:
    """The entries of a file or a stream from a mark on; `name` is what messages call it."""
    lines = _Lines(file)
    head = next(((n, line) for n, line in lines if line.removeprefix(codecs.BOM_UTF8).strip()), None)
    if head is None:
        return
    first = head[1].removeprefix(codecs.BOM_UTF8)
    if first.startswith(_WIDE) or b"\0" in first:
        kind = "UTF-16; save it as UTF-8" if first.startswith(_WIDE) else "a binary file"
        raise InputError(f"{name}: expected a list as text in UTF-8, got {kind}")
    whole = itertools.chain([(head[0], first)], lines)
    if suffix not in (*_LINES, *_TABLES) and first.lstrip().startswith(b"["):
        for entry in _read_array(b"".join(line for _, line in whole), name)[start.number :]:
            yield entry, Mark(0, entry.number)
        return
    table = None if suffix in _LINES else _Table.found(first, suffix)
    if table is None and (suffix in _TABLES or not first.lstrip().startswith(b"{")):
        raise InputError(f"{name}: {_no_list(suffix)}, got {_shorten(first)}{_QUOTE * (suffix in _TABLES)}")
    if start != START:
        file.seek(start.offset)
        lines.mark, whole = start, itertools.chain(lines)
        table = table and replace(table, header=False)
    if table is not None:
        entries = table.read(whole, start.number or head[0] - 1)
    else:
        entries = (_read_line(line, number) for number, line in whole if line.strip())
    for entry in entries:
        yield entry, lines.mark


def _no_list(suffix: str) -> str:
    """What was expected of a file that is no list."""
    if suffix in _TABLES:
        return "expected a header with the columns image and caption, or two columns"
    return "expected JSON lines, a JSON array, or CSV with the columns image and caption, in UTF-8"


def _read_line(line: bytes, number: int) -> Entry:
    """One line of JSON lines."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or numbers and nesting past reason
        return _failed(number, f"expected JSON in UTF-8, got {_shorten(line)}")
    return _entry(record, number, _shorten(line))


def _read_array(content: bytes, name: str) -> list[Entry]:
    try:
        records = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: expected a JSON array of pairs in UTF-8: {str(error)[:_SHOWN]}") from error
    return [
        _entry(record, number, _shorten(json.dumps(record).encode()))
        for number, record in enumerate(records, start=1)
    ]


def _entry(record: Any, number: int, shown: str, content: bytes | None = None) -> Entry:
    if isinstance(record, dict):
        image, caption = (_first(record, names) for names in (_IMAGE_NAMES, _CAPTION_NAMES))
        neither = image is None and caption is None and content is None
        if isinstance(image, str | None) and isinstance(caption, str | None) and not neither:
            return Entry(number, image, caption, record.get("id"), content=content)
    return _failed(number, f"{_EXPECTED}, got {shown}")


def _failed(number: int, reason: str, image: str | None = None) -> Entry:
    """The entry of a line that cannot be used."""
    where = f"line {number}" if image is None else f"line {number} ({image!r})"
    return Entry(number, image, error=InputError(f"{where}: {reason}"))


def _first(record: dict[str, Any], names: Iterable[str]) -> Any:
    return next((record[name] for name in names if name in record), None)


@dataclass(frozen=True)
class _Table:
    """How a CSV is read: its delimiter, how many columns, and those of image, caption and id by number."""

    delimiter: str
    columns: int
    image: int
    caption: int
    id: int | None
    header: bool

    @staticmethod
    def found(first: bytes, suffix: str) -> _Table | None:
        """The table that the first line is of, or None."""
        line = first.decode(errors="replace")
        rows = {delimiter: next(csv.reader([line], delimiter=delimiter)) for delimiter in _DELIMITERS}
        for delimiter, row in rows.items():
            names = [name.strip().lower() for name in row]
            image, caption = (
                next((names.index(x) for x in known if x in names), None)
                for known in (_IMAGE_NAMES, _CAPTION_NAMES)
            )
            if image is not None and caption is not None:
                known = names.index("id") if "id" in names else None
                return _Table(delimiter, len(row), image, caption, known, True)
        # Without a header a comma may be one of the caption's, so that outside a .csv only a tab counts.
        for delimiter, row in rows.items():
            if len(row) == 2 and (delimiter == "\t" or suffix in _TABLES):
                return _Table(delimiter, 2, 0, 1, None, False)
        return None

    def read(self, lines: Iterator[tuple[int, bytes]], read: int) -> Iterator[Entry]:
        """The entries of numbered lines; `read` is the number of the last line before them."""
        taken: list[str] = []  # the lines of the row

        def text() -> Iterator[str]:
            nonlocal read
            for number_of_line, line in lines:
                read = number_of_line
                taken.append(line.decode(errors="surrogateescape"))
                yield taken[-1]

        rows = csv.reader(text(), delimiter=self.delimiter)
        if self.header:
            next(rows)
        while True:
            number = read + 1
            taken.clear()
            try:
                row = next(rows)
                if len(taken) > 1:  # a quote that nothing closes takes all the lines after it
                    list(csv.reader(taken, delimiter=self.delimiter, strict=True))
            except StopIteration:
                return
            except csv.Error as error:
                yield _failed(number, f"{error}; close the quotes of its caption, and double those within")
                continue
            if any(cell.strip() for cell in row):
                yield self._entry(row, number)

    def _entry(self, row: list[str], number: int) -> Entry:
        if len(row) != self.columns:
            return _failed(
                number,
                f"expected {self.columns} fields, got {len(row)}; "
                f"quote a caption that holds the delimiter {self.delimiter!r}",
            )
        if not _is_utf8(row[self.caption]):
            return _failed(
                number, f"expected UTF-8, got {row[self.caption][:_SHOWN]!r}; save the list as UTF-8"
            )
        image = row[self.image].strip() or None
        if image is None and not row[self.caption].strip():
            return _failed(number, "expected an image or a caption, got neither")
        return Entry(number, image, row[self.caption], None if self.id is None else row[self.id])


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # holds bytes that are not
        return False
    return True


def _read_parquet(paths: list[Path], start: Mark, content: bool) -> Iterator[tuple[Entry, Mark]]:
    """The entries of the rows of Parquet files, taken as one table."""
    for number, row in enumerate(read_rows(paths, start.number, content), start=start.number + 1):
        data = row.pop("content", None)
        yield _entry(row, number, _shorten(repr(row).encode()), data), Mark(0, number)


def _read_folder(folder: Path, files: list[Path], start: Mark, content: bool) -> Iterator[tuple[Entry, Mark]]:
    """The entries of a folder's captions file, its Parquet files, or its images with the texts beside."""
    lists = [path for path in files if path.name.lower() in _CAPTION_FILES]
    if len(lists) > 1:
        raise InputError(
            f"{folder}: expected one list of captions, got {' and '.join(path.name for path in lists)}; "
            "name one of them with --list"
        )
    if lists:
        yield from _read_file(lists[0], start, content)
        return
    if tables := [path for path in files if path.suffix.lower() == PARQUET]:
        yield from _read_parquet(tables, start, content)
        return
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise InputError(
            f"{folder}: expected captions.csv or another list of captions, or images with a text file "
            "each, got neither"
        )
    for number, image in enumerate(images[start.number :], start=start.number + 1):
        caption = image.with_suffix(".txt")
        try:
            text = caption.read_bytes().decode("utf-8-sig", "replace").strip()
            entry = Entry(number, image.name, text)
        except OSError:
            reason = f"no caption; expected it in {caption.name} beside the image"
            entry = _failed(number, reason, image.name)
        yield entry, Mark(0, number)


def _shorten(line: bytes) -> str:
    return repr(line.decode(errors="replace").strip()[:_SHOWN])
