"""Files that appear whole or not at all, their SHA-256, JSON without NaN, and the user's cache folder."""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

# What this process is writing and how each is removed. A handler that ends the process, and an exception
# that strikes before a with block has begun or while it cleans up, would leave them behind.
_unfinished: dict[Path, Callable[[Path], object]] = {}
os.register_at_fork(after_in_child=_unfinished.clear)  # they are the parent's


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Let `remove_unfinished` delete this file or folder if it is called inside the block."""
    begin_unfinished(path, _delete)
    try:
        yield
    finally:
        end_unfinished(path)


def begin_unfinished(path: Path, remove: Callable[[Path], object]) -> None:
    """Let `remove_unfinished` call `remove` with this path, until `end_unfinished`."""
    _unfinished[path] = remove


def end_unfinished(path: Path) -> None:
    """The path is finished, or gone."""
    _unfinished.pop(path, None)


@atexit.register
def remove_unfinished() -> None:
    """Remove the files and folders that this process is still writing; for one that is about to end."""
    for path, remove in list(_unfinished.items()):
        with contextlib.suppress(OSError):
            remove(path)


def _delete(path: Path) -> None:
    if path.is_dir():
        import shutil  # with its compressors it is a tenth of what `import engine` loads

        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path, only_writer: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write; it takes the place of `path` when the block ends.

    After an exception `path` is as it was and the sibling is gone. The bytes are on the disk before the name
    changes, so that a crash leaves the old file or the whole new one. With `only_writer`, where no other
    process writes `path`, the sibling's name is fixed: the next write replaces what a killed process left.
    Raises OSError.
    """
    partial = path.with_name(f".{path.name}.partial") if only_writer else temporary_name(path)
    with unfinished(partial):
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A hidden sibling of `path` whose name no other process or thread chooses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def open_file(path: Path) -> BufferedReader:
    """Open a file for reading bytes; raises OSError for what is none, as a pipe, which waits for a writer."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Not a file", os.fspath(path))
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def sha256_of(file: Path | BufferedReader | bytes) -> str:
    """Digest of a file or of bytes, in hexadecimal; of an open file from where it stands."""
    if isinstance(file, bytes):
        return hashlib.sha256(file).hexdigest()
    if isinstance(file, Path):
        with open_file(file) as opened:
            return sha256_of(opened)
    return hashlib.file_digest(file, "sha256").hexdigest()


def without_nan(value: Any) -> Any:
    """JSON data with null in place of NaN, which JSON lacks, and lists in place of tuples."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def cache_folder() -> Path:
    """The user's folder for caches of this project; it may not exist yet.

    $XDG_CACHE_HOME/dgm4, or ~/.cache/dgm4. Where no home is known, the path begins with a literal "~".
    """
    # os.path.expanduser does not raise without a home, as Path.home does in a container.
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(base) / "dgm4"
