"""Where a verb writes its answer: stdout, or a file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from engine.errors import InputError


@contextlib.contextmanager
def open_output(path: Path | None, source: Path | None = None, option: str = "--out") -> Iterator[IO[str]]:
    """stdout, or a file that appears whole or not at all; raises InputError where it cannot be written.

    `source` is a file that it may not be; `option` is what messages call the path.
    """
    if path is None:
        yield sys.stdout
        return
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{option} {path}: expected the name of a file in a folder that exists")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise InputError(f"{option} {path}: is the list itself; choose another name")
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
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
    finally:
        partial.unlink(missing_ok=True)
