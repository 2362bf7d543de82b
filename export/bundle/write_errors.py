"""Turn an OSError on write into a BundleError with a hint."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from engine.errors import BundleError, Dgm4Error

_NO_ROOM = 1 << 20  # bytes: with less free, a failed write of a model is put down to a full disk
_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)")
_HINTS = {
    errno.ENOSPC: "the disk is full: free space or choose another --out",
    errno.EDQUOT: "the disk quota is used up: free space or choose another --out",
    errno.EFBIG: "larger than the file system or a limit (ulimit -f) allows: choose another --out",
    errno.EACCES: "no permission to write there: choose another --out or change its owner",
    errno.EPERM: "no permission to write there: choose another --out or change its owner",
    errno.EROFS: "the file system is read-only: choose another --out",
    errno.ENOENT: "the parent directory does not exist: create it first",
    errno.ENOTDIR: "a part of the path is a file, not a directory: choose another --out",
    errno.EBUSY: "the directory is in use or a mount point: choose a directory inside it",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter --out",
}


def refusal(error: BaseException, directory: Path) -> OSError | None:
    """The OSError of a refused write below `directory` that caused an exception, or None.

    Libraries name it in their message (safetensors, written in Rust), or not at all (NumPy's tofile).
    """
    if not isinstance(error, Exception) or isinstance(error, Dgm4Error):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if name is not None]
        ours = not named or any(directory in path.parents for path in named)
        return error if ours and error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    if (match := _ERROR_NUMBER.search(str(error))) is not None:
        return OSError(int(match[1]), os.strerror(int(match[1])))
    room = os.statvfs(directory)
    if room.f_bavail * room.f_frsize < _NO_ROOM:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return error if isinstance(error, OSError) else None


@contextlib.contextmanager
def as_bundle_error(noun: str, out: Path) -> Iterator[None]:
    """Raise an OSError of the block as BundleError; `noun` is what is written to `out`."""
    try:
        yield
    except OSError as error:
        raise write_error(noun, out, error) from error


def write_error(noun: str, out: Path, error: OSError) -> BundleError:
    """The error for a `noun` that the system refuses to write to `out`."""
    hint = _HINTS.get(error.errno or 0, "check whether the disk is full, or choose another --out")
    return BundleError(f"cannot write the {noun} {out}: {error.strerror or error}; {hint}")
