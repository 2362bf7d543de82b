"""Where a verb writes its output: stdout, or a file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from engine.errors import InputError

Rows = list[tuple[str, ...]]


@contextlib.contextmanager
def open_output(path: Path | None, source: Path | None = None, option: str = "--out") -> Iterator[IO[str]]:
    """stdout, or a file that appears whole or not at all; raises InputError where it cannot be written.

    `source` is a file that it may not be; `option` is what messages call the path.
    """
    if path is None:
        yield sys.stdout
        return
    check_output(path, option)
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise InputError(f"{option} {path}: is the list itself; choose another name")
    partial = _partial(path)
    try:
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written: {error.strerror}") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{option} {path}: cannot be written: {error.strerror}; free space or choose another place"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes, option: str) -> None:
    """Write a file that appears whole or not at all; raises InputError where it cannot be written."""
    check_output(path, option)
    partial = _partial(path)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def check_output(path: Path, option: str) -> None:
    """Raise InputError unless `path` can be the name of a file; `option` is what messages call it."""
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{option} {path}: expected the name of a file in a folder that exists")


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
