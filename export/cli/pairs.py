"""The pairs of a list: JSON lines, a JSON array, CSV, or a folder of images with their captions."""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import InputError, quoted, shorten

STDIN = Path("-")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
LIST_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
_CAPTION_FILES = tuple(f"captions{suffix}" for suffix in LIST_SUFFIXES if suffix != ".ndjson")
_IMAGE_NAMES, _CAPTION_NAMES = ("image", "file_name"), ("caption", "text")
_LINES, _TABLES = (".jsonl", ".ndjson"), (".csv", ".tsv")
_DELIMITERS = ",;\t|"
_COLUMN_NAME = re.compile(r"[^\W\d][\w -]*")  # a path has a dot or a slash
_LONGEST_PATH = 4096  # characters: the system's limit
_SHOWN = 60  # characters of a faulty line that a message repeats
_EXPECTED = 'expected {"image": path, "caption": text}, where one of the two may be null'
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 begins like the first, and holds NUL as these do


@dataclass(frozen=True)
class Entry:
    """A pair of a list, or what is wrong with it; `number` counts lines, or items where there are none.

    `image` is the path as the list has it, relative to `PairList.base`; `id` what the list calls the pair.
    The image or the caption is None where the list has none. Of a pair with an error what is known is there.
    `unit` is what `number` counts: "line" or "item".
    """

    number: int
    image: str | None = None
    caption: str | None = None
    id: Any = None
    error: InputError | None = None
    unit: str = "line"

    @property
    def place(self) -> str:
        """What a message calls the pair, as "line 3"."""
        return f"{self.unit} {self.number}"

    @property
    def name(self) -> str:
        """What people know it by."""
        return self.image or self.place

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
    `.tsv` and `.txt`, or a NAME.txt beside each image. An empty cell or text file is None. Iterating raises
    InputError for a list that cannot be read as a whole or is empty; a line that cannot be used is an `Entry`
    with an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_once = path == STDIN or path.is_fifo()  # <(...) in a shell
        self.base = Path.cwd() if self._read_once else path if path.is_dir() else path.parent

    def __iter__(self) -> Iterator[Entry]:
        name, entry = str(self.path), None
        if self.path == STDIN:
            name, entries = "stdin", _read(sys.stdin.buffer, "", "stdin")
        elif self.path.is_dir():
            entries = _read_folder(self.path)
        else:
            entries = _read_file(self.path)
        for entry in entries:
            yield entry
        if entry is None:
            raise InputError(f"{name}: expected at least one pair, got an empty list")

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
                        f"--out {out}: would overwrite an input, the image of {entry.place} of the "
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
    if first.startswith(_WIDE) or b"\0" in first:
        kind = "UTF-16; save it as UTF-8" if first.startswith(_WIDE) else "a binary file"
        raise InputError(f"{name}: expected a list as text in UTF-8, got {kind}")
    whole = itertools.chain([(head[0], first)], numbered)
    if suffix not in (*_LINES, *_TABLES) and first.lstrip().startswith(b"["):
        yield from _read_array(b"".join(line for _, line in whole), name)
    elif suffix not in _LINES and (table := _Table.found(first, suffix)) is not None:
        yield from table.read(whole)
    elif suffix in _TABLES:
        raise InputError(f"{name}: {_why_no_table(first)}")
    elif not first.lstrip().startswith(b"{"):
        raise InputError(
            f"{name}: expected JSON lines, a JSON array, or CSV with the columns image and caption, "
            f"in UTF-8, got {_shorten(first)}"
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
        return _failed(Entry(number), f"expected JSON in UTF-8, got {_shorten(line)}")
    return _entry(record, Entry(number), _shorten(line))


def _read_array(content: bytes, name: str) -> Iterator[Entry]:
    try:
        records = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: expected a JSON array of pairs in UTF-8: {str(error)[:_SHOWN]}") from error
    for number, record in enumerate(records, start=1):
        yield _entry(record, Entry(number, unit="item"), _shorten(json.dumps(record).encode()))


def _entry(record: Any, empty: Entry, shown: str) -> Entry:
    """The pair of a JSON object, at the place of `empty`."""
    if isinstance(record, dict):
        image, caption = (_first(record, names) for names in (_IMAGE_NAMES, _CAPTION_NAMES))
        known = image if isinstance(image, str) else None
        empty = replace(empty, image=known, id=record.get("id"))
        if known == image and isinstance(caption, str | None) and not (image is None and caption is None):
            return replace(empty, caption=caption)
    return _failed(empty, f"{_EXPECTED}, got {shown}")


def _failed(entry: Entry, reason: str) -> Entry:
    """The entry of a pair that cannot be used, with what is known of it."""
    where = entry.place if entry.image is None else f"{entry.place} ({quoted(entry.image)})"
    return replace(entry, error=InputError(f"{where}: {reason}"))


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
            if len(row) == 2 and (delimiter == "\t" or suffix in _TABLES) and not _is_header(row):
                return _Table(delimiter, 2, 0, 1, None, False)
        return None

    def read(self, lines: Iterator[tuple[int, bytes]]) -> Iterator[Entry]:
        """The entries of numbered lines."""
        number, read = 0, 0  # of the row's first line, and of the last one read
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
                row = next(csv.reader(taken[:1], delimiter=self.delimiter))
                reason = f"{error}; close the quotes of its caption, and double those within"
                yield _failed(self._known(row, number), reason)
                continue
            if len(row) > 1 or any(cell.strip() for cell in row):
                yield self._entry(row, number)

    def _entry(self, row: list[str], number: int) -> Entry:
        entry = self._known(row, number)
        if len(row) != self.columns:
            return _failed(
                entry,
                f"expected {self.columns} fields, got {len(row)}; "
                f"quote a caption that holds the delimiter {self.delimiter!r}",
            )
        caption = row[self.caption] if row[self.caption].strip() else None
        if caption is not None and not _is_utf8(caption):
            return _failed(entry, f"expected UTF-8, got {quoted(caption[:_SHOWN])}; save the list as UTF-8")
        if entry.image is None and caption is None:
            return _failed(entry, "expected an image or a caption, got two empty cells")
        return replace(entry, caption=caption)

    def _known(self, row: list[str], number: int) -> Entry:
        """The image and the id of a row, also of one that a delimiter in its caption has cut."""

        def cell(column: int | None) -> str | None:
            if column is None:
                return None
            place = column if column < self.caption else column + len(row) - self.columns
            return row[place].strip() or None if 0 <= place < len(row) and place != self.caption else None

        return Entry(number, cell(self.image), None, cell(self.id))


def _is_header(row: list[str]) -> bool:
    """Whether a row of two cells names columns rather than an image and its caption."""
    names = [cell.strip().lower() for cell in row]
    known = (*_IMAGE_NAMES, *_CAPTION_NAMES)
    return any(name in known for name in names) or all(_COLUMN_NAME.fullmatch(name) for name in names)


def _why_no_table(first: bytes) -> str:
    """Why the first line is of no table, and what to do."""
    line = first.decode(errors="replace").lower()
    cells = [cell.strip() for cell in re.split(rf"[{re.escape(_DELIMITERS)}]", line)]
    found = [known[0] for known in (_IMAGE_NAMES, _CAPTION_NAMES) if any(name in cells for name in known)]
    expected = "expected a header with the columns image and caption, or two columns without one"
    if len(found) == 1:
        lacking = "caption" if found == ["image"] else "image"
        advice = f"add the column {lacking}, whose cells may be empty, or give it this name"
    elif len(cells) == 2 and _is_header(cells):
        advice = "give its columns these names, or put image,caption above a row that is a pair"
    else:
        advice = "quote a caption that holds the delimiter"
    return f"{expected}, got {_shorten(first)}; {advice}"


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
        entry, caption = Entry(number, image.name, unit="item"), image.with_suffix(".txt")
        try:
            text = caption.read_bytes().decode("utf-8-sig", "replace").strip()
            yield replace(entry, caption=text or None)
        except OSError:
            yield _failed(entry, f"no caption; expected it in {caption.name} beside the image")


def _shorten(line: bytes) -> str:
    return repr(line.decode(errors="replace").strip()[:_SHOWN])
