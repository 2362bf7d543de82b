"""The pairs of a list: JSON lines, a JSON array, CSV, or a folder of images with their captions."""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InputError, shorten

STDIN = Path("-")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_CAPTION_FILES = tuple(f"captions.{suffix}" for suffix in ("jsonl", "json", "csv", "tsv", "txt"))
_IMAGE_NAMES, _CAPTION_NAMES = ("image", "file_name"), ("caption", "text")
_LINES, _TABLES = (".jsonl", ".ndjson"), (".csv", ".tsv")
_DELIMITERS = ",;\t|"
_LONGEST_PATH = 4096  # characters: the system's limit
_SHOWN = 60  # characters of a faulty line that a message repeats
_EXPECTED = 'expected {"image": path, "caption": text}'


@dataclass(frozen=True)
class Entry:
    """A pair of a list, or what is wrong with its line; `number` counts lines, or items where there are none.

    `image` is the path as the list has it, relative to `PairList.base`; `id` what the list calls the pair.
    """

    number: int
    image: str | None = None
    caption: str = ""
    id: Any = None
    error: InputError | None = None

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
    and text), in any order, or two without a header. A folder has one of `captions.jsonl`, `.json`, `.csv`,
    `.tsv` and `.txt`, or a NAME.txt beside each image. Iterating raises InputError for a list that cannot be
    read as a whole; a line that cannot be used is an `Entry` with an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = Path.cwd() if path == STDIN else path if path.is_dir() else path.parent

    def __iter__(self) -> Iterator[Entry]:
        if self.path == STDIN:
            yield from _read(sys.stdin.buffer, "", "stdin")
        elif self.path.is_dir():
            yield from _read_folder(self.path)
        else:
            yield from _read_file(self.path)

    def count(self, out: Path | None) -> int | None:
        """How many pairs there are, None for stdin; raises InputError where `out` is an image of the list."""
        if self.path == STDIN:
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


def _read_file(path: Path) -> Iterator[Entry]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot read the list: {error.strerror}") from error
    with file:
        yield from _read(file, path.suffix.lower(), str(path))


def _read(lines: Iterable[bytes], suffix: str, name: str) -> Iterator[Entry]:
    """The entries of a file's or a stream's lines; `name` is what messages call it."""
    numbered = enumerate(lines, start=1)
    head = next(((n, line) for n, line in numbered if line.removeprefix(codecs.BOM_UTF8).strip()), None)
    if head is None:
        return
    first = head[1].removeprefix(codecs.BOM_UTF8)
    whole = itertools.chain([(head[0], first)], numbered)
    if suffix not in (*_LINES, *_TABLES) and first.lstrip().startswith(b"["):
        yield from _read_array(b"".join(line for _, line in whole), name)
    elif suffix not in _LINES and (table := _Table.found(first, suffix)) is not None:
        yield from table.read(whole)
    elif suffix in _TABLES:
        raise InputError(
            f"{name}: expected a header with the columns image and caption, or two columns, "
            f"got {_shorten(first)}"
        )
    else:
        for number, line in whole:
            if line.strip():
                yield _read_line(line, number)


def _read_line(line: bytes, number: int) -> Entry:
    """One line of JSON lines."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or numbers and nesting past reason
        wrong = f"line {number} of the list: expected JSON in UTF-8, got {_shorten(line)}"
        return Entry(number, error=InputError(wrong))
    return _entry(record, number, f"line {number} of the list", _shorten(line))


def _read_array(content: bytes, name: str) -> Iterator[Entry]:
    try:
        records = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: expected a JSON array of pairs in UTF-8: {str(error)[:_SHOWN]}") from error
    for number, record in enumerate(records, start=1):
        yield _entry(record, number, f"item {number} of the list", _shorten(repr(record).encode()))


def _entry(record: Any, number: int, where: str, shown: str) -> Entry:
    if isinstance(record, dict):
        image, caption = (_first(record, names) for names in (_IMAGE_NAMES, _CAPTION_NAMES))
        if isinstance(image, str) and isinstance(caption, str):
            return Entry(number, image, caption, record.get("id"))
    return Entry(number, error=InputError(f"{where}: {_EXPECTED}, got {shown}"))


def _first(record: dict[str, Any], names: Iterable[str]) -> Any:
    return next((record[name] for name in names if name in record), None)


@dataclass(frozen=True)
class _Table:
    """How a CSV is read: its delimiter, and the columns of image, caption and id by number."""

    delimiter: str
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
                return _Table(delimiter, image, caption, names.index("id") if "id" in names else None, True)
        # Without a header a comma may be one of the caption's, so that outside a .csv only a tab counts.
        for delimiter, row in rows.items():
            if len(row) == 2 and (delimiter == "\t" or suffix in _TABLES):
                return _Table(delimiter, 0, 1, None, False)
        return None

    def read(self, lines: Iterator[tuple[int, bytes]]) -> Iterator[Entry]:
        """The entries of numbered lines."""
        number, read = 0, 0  # of the row's first line, and of the last one read

        def text() -> Iterator[str]:
            nonlocal read
            for number_of_line, line in lines:
                read = number_of_line
                yield line.decode(errors="surrogateescape")

        rows = csv.reader(text(), delimiter=self.delimiter)
        if self.header:
            next(rows)
        while True:
            number = read + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Entry(number, error=InputError(f"line {number} of the list: {error}"))
                continue
            if any(cell.strip() for cell in row):
                yield self._entry(row, number)

    def _entry(self, row: list[str], number: int) -> Entry:
        where = f"line {number} of the list"
        if len(row) <= max(self.image, self.caption):
            wrong = f"{where}: expected an image and a caption, got {_shorten(repr(row).encode())}"
            return Entry(number, error=InputError(wrong))
        if not _is_utf8(row[self.caption]):
            return Entry(
                number, error=InputError(f"{where}: expected UTF-8, got {row[self.caption][:_SHOWN]!r}")
            )
        known = row[self.id] if self.id is not None and self.id < len(row) else None
        return Entry(number, row[self.image].strip(), row[self.caption], known)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # holds bytes that are not
        return False
    return True


def _read_folder(folder: Path) -> Iterator[Entry]:
    """The entries of a folder's captions file, or of its images with the text files beside them."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    lists = [path for path in files if path.name.lower() in _CAPTION_FILES]
    if len(lists) > 1:
        raise InputError(
            f"{folder}: expected one list of captions, got {' and '.join(path.name for path in lists)}; "
            "name one of them with --list"
        )
    if lists:
        yield from _read_file(lists[0])
        return
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise InputError(
            f"{folder}: expected captions.csv or another list of captions, or images with a text file "
            "each, got neither"
        )
    for number, image in enumerate(images, start=1):
        caption = image.with_suffix(".txt")
        try:
            yield Entry(number, image.name, caption.read_bytes().decode("utf-8-sig", "replace").strip())
        except OSError:
            wrong = f"{image.name}: no caption; expected it in {caption.name} beside the image"
            yield Entry(number, image.name, error=InputError(wrong))


def _shorten(line: bytes) -> str:
    return repr(line.decode(errors="replace").strip()[:_SHOWN])
