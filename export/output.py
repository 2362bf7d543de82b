"""Output of a command: stdout or a file that appears whole or not at all, and tables of text."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from engine.errors import InputError
from engine.files import open_file, replacing
from engine.layout import MANIFEST
from engine.manifest import FORMAT
from export.writing import writing

Rows = list[tuple[str, ...]]

# File names need not be UTF-8: the bytes of others come as surrogates, written as \udce9.
ERRORS = "backslashreplace"


@contextlib.contextmanager
def open_output(
    path: Path | None, inputs: Sequence[Path | None] = (), option: str = "--out"
) -> Iterator[IO[str]]:
    """stdout, or a file that appears whole or not at all; raises InputError where it cannot be written.

    A stdout that was closed when the command began cannot: the null device stands in for it.

    `inputs` are files and folders of data that must not be overwritten; `option` is what messages call the
    path.
    """
    if path is None:
        if getattr(sys.stdout, "name", None) == os.devnull:
            raise InputError("stdout is closed: expected somewhere to write the answer, such as > FILE")
        yield sys.stdout
        return
    check_output(path, option, inputs)
    with (
        writing(path, option),
        replacing(path) as partial,
        partial.open("w", encoding="utf-8", errors=ERRORS) as file,
    ):
        yield file


def write_whole(path: Path, content: bytes, option: str, instead: str = "") -> None:
    """Write a file that appears whole or not at all; raises InputError where it cannot be written.

    `instead` is as for `writing`.
    """
    check_output(path, option)
    with writing(path, option, instead), replacing(path) as partial:
        partial.write_bytes(content)


def check_output(path: Path, option: str, inputs: Sequence[Path | None] = ()) -> None:
    """Raise InputError unless `path` can be a new file; `option` is what messages call it.

    It may be neither a file of a bundle, which would then be altered, nor one of the `inputs`, nor a file in
    one of them.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{option} {path}: expected the name of a file in a folder that exists")
    if any(is_bundle(folder) for folder in path.resolve().parents):
        raise InputError(f"{option} {path}: lies in a bundle, which it would damage; choose another place")
    for source in inputs:
        if source is None or not path.exists() or not source.exists():
            continue
        if path.samefile(source) or source.resolve() in path.resolve().parents:
            raise InputError(f"{option} {path}: would overwrite an input; choose another name")


def is_bundle(folder: Path) -> bool:
    """Whether a folder's manifest says that it is a bundle."""
    try:
        with open_file(folder / MANIFEST) as file:
            fields = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and fields.get("format") == FORMAT


def printable(text: str) -> str:
    """The text with what would move a terminal's cursor replaced."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def escaped(text: str) -> str:
    """The text with control characters, which may be of a file's name, as in a literal; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def align(rows: Rows, left: int = 1) -> list[str]:
    """Columns of equal width, the first `left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
