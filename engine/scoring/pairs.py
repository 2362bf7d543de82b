"""The pairs of a list: JSON lines, a JSON array, CSV, Parquet, or a folder of images with their captions."""

from __future__ import annotations

import codecs
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from engine.errors import InputError, why_no_json
from engine.logs import warn_once
from engine.schema import parse_json
from engine.scoring.entries import ROW, SHOWN, START, Entry, Mark, failed, make_entry, shown
from engine.scoring.parquet import SUFFIX as PARQUET
from engine.scoring.parquet import read_rows
from engine.scoring.tables import TABLES, Table, why_no_table

logger = logging.getLogger(__name__)

STDIN = Path("-")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
LIST_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
_CAPTION_FILES = tuple(f"captions{suffix}" for suffix in LIST_SUFFIXES if suffix != ".ndjson")
_LINES = (".jsonl", ".ndjson")
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 begins like the first, and holds NUL as these do


class PairList:
    """The pairs of a file, of a folder, or of stdin (`STDIN`), read anew at each iteration.

    A file is told by its suffix, else by how it begins. CSV has the columns image and caption (or file_name
    and text), in any order, or two without a header; Parquet has them by name, and its images may be bytes.
    A folder has one of `captions.jsonl`, `.json`, `.csv`, `.tsv` and `.txt`, or Parquet files, which are one
    list in the order of their names, or a NAME.txt beside each image. An empty cell or text file is None.
    Iterating raises InputError for a list that cannot be read as a whole or is empty; a line that cannot be
    used is an `Entry` with an error.
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
                        f"--out {out}: would overwrite an input, the image of {entry.place} of the "
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
    if suffix not in (*_LINES, *TABLES) and first.lstrip().startswith(b"["):
        for entry in _read_array(b"".join(line for _, line in whole), name)[start.number :]:
            yield entry, Mark(0, entry.number)
        return
    table = None if suffix in _LINES else Table.found(first, suffix)
    if table is None and suffix in TABLES:
        raise InputError(f"{name}: {why_no_table(first)}")
    if table is None and not first.lstrip().startswith(b"{"):
        raise InputError(
            f"{name}: expected JSON lines, a JSON array, or CSV with the columns image and caption, "
            f"in UTF-8, got {shown(first)}"
        )
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


def _read_line(line: bytes, number: int) -> Entry:
    """One line of JSON lines."""
    try:
        record = parse_json(line)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or numbers and nesting past reason
        strict = type(error) is ValueError  # JSON but for NaN, say, which Python's own json writes
        why = f": {error}" if strict else ""
        return failed(Entry(number), f"expected JSON in UTF-8, got {shown(line)}{why}")
    return make_entry(record, Entry(number), shown(line))


def _read_array(content: bytes, name: str) -> list[Entry]:
    try:
        records = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{name}: expected a JSON array of pairs in UTF-8: {why_no_json(error)[:SHOWN]}"
        ) from error
    return [
        make_entry(record, Entry(number, unit="item"), shown(json.dumps(record).encode()))
        for number, record in enumerate(records, start=1)
    ]


def _read_parquet(paths: list[Path], start: Mark, content: bool) -> Iterator[tuple[Entry, Mark]]:
    """The entries of the rows of Parquet files, taken as one table."""
    for number, row in enumerate(read_rows(paths, start.number, content), start=start.number + 1):
        data = row.pop("content", None)
        entry = Entry(number, content=data, unit=ROW)
        yield make_entry(row, entry, shown(repr(row).encode())), Mark(0, number)


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
    _tell_left_out(folder, files, images)
    for number, image in enumerate(images[start.number :], start=start.number + 1):
        entry, caption = Entry(number, image.name, unit="item"), image.with_suffix(".txt")
        try:
            text = caption.read_bytes().decode("utf-8-sig", "replace").strip()
            entry = replace(entry, caption=text or None)
        except OSError:
            entry = failed(entry, f"no caption; expected it in {caption.name} beside the image")
        yield entry, Mark(0, number)


def _tell_left_out(folder: Path, files: list[Path], images: list[Path]) -> None:
    """Warn of texts that have the form of a caption, but no image beside them."""
    stems = {path.stem for path in images}
    alone = [path.name for path in files if path.suffix == ".txt" and path.stem not in stems]
    if alone:
        more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
        warn_once(
            logger, f"{folder}: {alone[0]}{more} left out: expected an image of the same name beside it"
        )
