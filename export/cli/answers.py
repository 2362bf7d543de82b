"""The answers to a long list in a file: what a stopped run has written serves the next one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from engine.errors import InputError, quoted
from engine.files import begin_unfinished, end_unfinished
from engine.inputs.text import read_caption
from engine.scoring.entries import Entry
from engine.scoring.records import json_line
from export.output import ERRORS

SUFFIX = ".partial"
Maker = Mapping[str, Mapping[str, Any]]


class Answers:
    """Context manager that writes lines to `<out>.partial`, which becomes `out` when the block ends.

    After an exception or a signal the lines so far stay there, and `keep` finds them. `write` is that of a
    file.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.partial = out, out.with_name(out.name + SUFFIX)
        self._file: IO[str] | None = None

    def keep(self, entries: Iterator[Entry], made_by: Maker) -> tuple[int, int]:
        """Keep the answers of a stopped run, or those of the whole file; return (how many, how many failed).

        `entries` are the list's, of which it takes those that are answered. Of each answer the fields in
        `made_by` have to hold what stands there. A torn last line goes. Raises InputError where an answer is
        not of the list's pair; all files are then as they were.
        """
        kept = self.partial if self.partial.exists() else self.out
        if not kept.exists():
            return 0, 0
        end = count = failed = 0
        with kept.open("rb") as file:
            for line in file:
                record = _parse(line)
                if record is None:
                    break
                _check(record, next(entries, None), count + 1, kept)
                _check_maker(record, made_by, kept)
                end, count, failed = end + len(line), count + 1, failed + ("error" in record)
        if kept == self.out:
            shutil.copyfile(self.out, self.partial)
        os.truncate(self.partial, end)
        self._file = self._open("a")
        return count, failed

    def __enter__(self) -> Answers:
        return self

    def write(self, text: str) -> None:
        """Write a line."""
        if self._file is None:
            if self.partial.exists():
                sys.stderr.write(f"dgm4: {self.partial} of an earlier run, kept for --resume, is replaced\n")
            self._file = self._open("w")
        self._file.write(text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        end_unfinished(self.partial)
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self.partial.replace(self.out)
            return
        with contextlib.suppress(OSError):  # a full disk, again
            self._file.close()
        _leave(self.partial)

    def _open(self, mode: str) -> IO[str]:
        begin_unfinished(self.partial, _leave)  # by a signal that ends the process
        # By the line: a process that is killed leaves one torn line at most.
        return self.partial.open(mode, encoding="utf-8", errors=ERRORS, buffering=1)


def _leave(partial: Path) -> None:
    """Leave the answers so far for the next run."""
    if partial.stat().st_size == 0:
        partial.unlink()
    else:
        sys.stderr.write(f"dgm4: {partial} holds the answers so far; --resume goes on with it\n")


def _check(record: dict[str, Any], entry: Entry | None, number: int, path: Path) -> None:
    """Raise InputError unless the record of `path` is of this entry."""
    theirs = {name: record.get(name) for name in ("line", "image", "id", "caption") if name in record}
    if entry is not None:
        ours = json.loads(json_line({**entry.head(), "caption": read_caption(entry.caption or "")[0]}))
        if all(ours.get(name) == value for name, value in theirs.items()):
            return
    now = "nothing" if entry is None else f"line {entry.number}, {quoted(entry.image)}"
    raise InputError(
        f"{path}: answer {number} is of line {theirs.get('line')}, {quoted(theirs.get('image'))}, "
        f"where the list now has {now}; leave out --resume to start anew"
    )


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a whole line, or None."""
    try:
        record = json.loads(line.decode()) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _check_maker(record: dict[str, Any], made_by: Maker, path: Path) -> None:
    for name, value in made_by.items():
        theirs = record.get(name, value)
        for key in value:
            if theirs.get(key) != value[key]:
                difference = f"{name}.{key} {quoted(theirs.get(key))}, not {quoted(value[key])}"
                raise InputError(
                    f"{path}: its answers are of another bundle or other options, with {difference}; "
                    "give the same, or leave out --resume to start anew"
                )
