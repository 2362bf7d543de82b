"""What a user is told where the system refuses a write: the place as it was given, why, and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from engine.errors import Dgm4Error, InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what only a write answers, which names no file
_NO_ROOM = 1 << 20  # bytes: with less free, a failed write of a library is put down to a full disk
_REMEDIES = {
    errno.ENOSPC: "free space or {instead}",
    errno.EDQUOT: "free space or {instead}",
    errno.EFBIG: "it is larger than the file system or a limit (ulimit -f) allows: {instead}",
    errno.EACCES: "change its owner, or {instead}",
    errno.EPERM: "change its owner, or {instead}",
    errno.EROFS: "{instead}",
    errno.ENOENT: "its folder does not exist: create it first",
    errno.ENOTDIR: "a part of the path is a file: {instead}",
    errno.EBUSY: "it is in use or a mount point: choose a folder inside it",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextlib.contextmanager
def writing(path: Path, option: str, instead: str = "") -> Iterator[None]:
    """Raise InputError, which names the option and its path, where the block may not write there.

    The block writes nowhere else: an error that names no file is taken for one of `path`. `instead` is what
    else the user can do, "choose another" and the option where it is left out.
    """
    try:
        yield
    except OSError as error:
        if (refused := refusal(error, path)) is None:
            raise
        instead = instead or f"choose another {option}"
        raise InputError(cannot_write(f"{option} {path}", refused, instead)) from error


def cannot_write(what: str, error: OSError, instead: str) -> str:
    """The message for a refused write of `what`."""
    remedy = _REMEDIES.get(error.errno or 0, "check whether the disk is full, or {instead}")
    reason = os.strerror(error.errno) if error.errno else str(error)  # pyarrow adds words
    return f"{what}: cannot be written: {reason}; {remedy.format(instead=instead)}"


def refusal(error: BaseException, place: Path) -> OSError | None:
    """The OSError of a refused write of `place`, or of a file in it, that caused an exception; or None.

    Libraries may name no number in it (NumPy's tofile).
    """
    if not isinstance(error, Exception) or isinstance(error, Dgm4Error):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        named = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        ours = any(_concerns(os.fsdecode(name), place) for name in named)
        return error if ours or (not named and error.errno in FULL) else None
    room = os.statvfs(next(path for path in (place, *place.absolute().parents) if path.is_dir()))
    if room.f_bavail * room.f_frsize < _NO_ROOM:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return error if isinstance(error, OSError) else None


def _concerns(name: str, place: Path) -> bool:
    """Whether a file is the place, in it, a folder on the way to it, or a temporary one for it."""
    given = Path(name).absolute()
    folders = (given, *given.parents)
    for own in {place.absolute(), place.resolve()}:
        temporary = re.compile(rf"\.?{re.escape(own.name)}\.(.*\.)?(partial|old)")
        if own in folders or given in own.parents:
            return True
        if any(path.parent == own.parent and temporary.fullmatch(path.name) for path in folders):
            return True
    return False
