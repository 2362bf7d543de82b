"""Write a bundle directory so that a reader sees the whole old bundle or the whole new one.

The files are written into a temporary sibling `.<name>.<pid>-<random>.partial`, hashed and synced; the
manifest is written last and the directory is swapped with its final name in one rename. The writer
holds a lock on its temporary directory, so that the next writer can tell the leftovers of a killed
process from the work of a living one, in another container too.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.errors import BundleError, quoted
from engine.files import begin_unfinished, end_unfinished, sha256_of, temporary_name
from engine.layout import MANIFEST, SIGNATURE
from engine.manifest import FORMAT, FORMAT_VERSION, manifest_digest, parse_manifest
from export.writing import cannot_write, refusal

log = logging.getLogger(__name__)

_HASH_THREADS = 4
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM)
# A network file system may have no locks on directories: nothing is swept there.
_NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class BundleWriter:
    """Context manager that collects the files of a bundle and publishes them at once.

    out: directory of the bundle; its parent must exist. An existing bundle there is replaced when
    `overwrite` is true, an existing empty directory always. Anything else there is refused with
    `BundleError` before a byte is written. Leaving the block without `commit`, or by an exception,
    removes what was written. A full disk met inside the block is raised as `BundleError`.
    `format` is what a manifest says of what is written here, `noun` what messages call it.
    """

    format, noun = FORMAT, "bundle"

    def __init__(self, out: str | Path, overwrite: bool = True) -> None:
        self.out = Path(out).resolve()
        self.overwrite = overwrite
        self._directory: Path | None = None
        self._lock = -1
        self._sealed: dict[Path, tuple[_State, dict[str, Any]]] = {}

    def __enter__(self) -> BundleWriter:
        with self._writing():
            self.check_replaceable(self.out, self.overwrite)
            sweep_partials(self.out)
            self._directory, self._lock = _make_locked(self.out)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        directory = self._opened()
        refused = None if error is None else refusal(error, self.out)
        try:
            # After a swap this name holds the bundle that was replaced, after a plain rename nothing.
            _remove_tree(directory)
            end_unfinished(directory)
        except OSError as leftover:
            end_unfinished(directory)
            log.warning("%s could not be removed (%s); the next export sweeps it", directory, leftover)
        finally:
            self._directory = None
            os.close(self._lock)
        if refused is not None:
            raise self._error(refused) from error

    @classmethod
    def check_replaceable(cls, out: Path, overwrite: bool) -> None:
        """Raise `BundleError` unless `out` is absent, an empty directory, or one of ours to be replaced."""
        noun = cls.noun
        if not os.path.lexists(out):
            return
        if not out.is_dir():
            raise BundleError(f"{out} is a file; expected a directory or a free name for the {noun}")
        if not any(out.iterdir()):
            return
        listed = _listed_files(out, cls.format)
        if listed is None:
            raise BundleError(
                f"{out} is not empty and not a {noun}: nothing there is touched, choose another --out"
            )
        foreign = sorted(name for name in _entries(out) - listed if not cls.is_derived(name))
        if foreign:
            raise BundleError(
                f"{out} is a {noun} with files that are not in its manifest: {', '.join(foreign[:5])}; "
                "move them away"
            )
        if not overwrite:
            raise BundleError(f"{out} already holds a {noun}: allow overwriting or choose another --out")

    @classmethod
    def is_derived(cls, name: str) -> bool:
        """Whether a file that the manifest does not list was made of ours, and may go with them."""
        return False

    def path(self, name: str) -> Path:
        """Path for a file called `name` of the bundle; the caller writes it before `commit`.

        Raises `BundleError` if the name is no plain file name, or is the manifest's own.
        """
        if name in ("", ".", "..", MANIFEST, SIGNATURE) or name != Path(name).name or "\\" in name:
            raise BundleError(f"expected a plain file name other than {MANIFEST}, got {quoted(name)}")
        return self._opened() / name

    def add_bytes(self, name: str, content: bytes) -> Path:
        """Write `content` as the file `name` and return its path; raises `BundleError`."""
        path = self.path(name)
        with self._writing():
            path.write_bytes(content)
        return path

    def add_text(self, name: str, content: str) -> Path:
        """Write `content` in UTF-8 as the file `name` and return its path; raises `BundleError`."""
        return self.add_bytes(name, content.encode(errors="backslashreplace"))  # a name may be Latin-1

    def preview(self, manifest: Mapping[str, Any]) -> Path:
        """Make the unpublished directory one that `engine.Bundle` opens, to try it; return its path.

        manifest as for `commit`, which still has to follow and writes its own. Raises `BundleError`.
        """
        directory = self._opened()
        with self._writing():
            self._write_manifest(manifest)
        return directory

    def commit(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Hash and sync every file, write the manifest last and publish the bundle at `out`.

        manifest: the fields of the manifest; "files" is filled here, and "format", "format_version"
        and "created" where absent. Returns the manifest as written. Raises `BundleError` if the reader
        (`engine.manifest`) would refuse the manifest, a file is not a plain one, or the system refuses
        to write; `out` is then as it was before.
        """
        directory = self._opened()
        with self._writing():
            filled = self._write_manifest(manifest)
            for folder in (directory, *filter(Path.is_dir, directory.rglob("*"))):
                _sync_directory(folder)
            self.check_replaceable(self.out, self.overwrite)
            _publish(directory, self.out)
            _sync_directory(self.out.parent)
        return filled

    def _write_manifest(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        directory = self._opened()
        (directory / MANIFEST).unlink(missing_ok=True)
        filled = _fill_manifest({"format": self.format, **manifest}, self._seal_files(directory))
        content = (json.dumps(filled, indent=1) + "\n").encode()
        self._check_manifest(content)
        _write_synced(directory / MANIFEST, content)
        return filled

    def _seal_files(self, directory: Path) -> dict[str, dict[str, Any]]:
        """Hash, sync and open to its readers every file of the directory; name -> sha256 and bytes."""
        paths = [directory / name for name in sorted(_entries(directory))]
        for path in paths:
            if path.is_symlink() or not path.is_file():
                raise BundleError(
                    f"{path.name} is not a regular file; expected nothing else in {directory.name}"
                )
        # Writers of temporary files leave 0600: give every file what the umask gave the directory.
        mode = stat.S_IMODE(directory.stat().st_mode) & 0o666
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            sealed = list(pool.map(lambda path: self._seal(path, mode), paths))
        names = (path.relative_to(directory).as_posix() for path in paths)
        return dict(zip(names, sealed, strict=True))

    def _seal(self, path: Path, mode: int) -> dict[str, Any]:
        """Hash a file, but for one that nobody has touched since `preview` did."""
        state, entry = self._sealed.get(path, (None, {}))
        with path.open("rb") as file:
            if state != _state(file):
                digest = sha256_of(file)
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
                    os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
                entry = {"sha256": digest, "bytes": os.fstat(file.fileno()).st_size}
                self._sealed[path] = _state(file), entry
        return entry

    def _check_manifest(self, content: bytes) -> None:
        parse_manifest(content)  # what the reader would refuse is never published

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise an OSError of the block as BundleError."""
        try:
            yield
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> BundleError:
        return BundleError(cannot_write(f"the {self.noun} {self.out}", error, "choose another --out"))

    def _opened(self) -> Path:
        if self._directory is None:
            raise BundleError(f"the {self.noun} writer is closed: use it inside its with block")
        return self._directory


_State = tuple[int, int, int, int]


def _state(file: BufferedReader) -> _State:
    """What changes with any write to a file: even one of the same size in place sets its ctime."""
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def sweep_partials(out: Path) -> list[Path]:
    """Remove the temporary siblings of `out` that a dead writer left; return those removed.

    A bundle that was set aside by a writer killed between its two renames is put back.
    """
    pattern = re.compile(rf"\.{re.escape(out.name)}\.\d+-[0-9a-f]+(\.old)?\.partial")
    stale = [path for path in sorted(out.parent.glob(".*.partial")) if pattern.fullmatch(path.name)]
    return [path for path in stale if path.is_dir() and _sweep(path, out)]


def _sweep(path: Path, out: Path) -> bool:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _clear_stale(path, out)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s may be the leftover of a killed export; remove it if none is running", path)
        return False
    finally:
        os.close(lock)
    return True


def _clear_stale(path: Path, out: Path) -> None:
    aside = path.name.endswith(".old.partial")
    if aside and not os.path.lexists(out) and (path / MANIFEST).is_file():
        path.rename(out)
        return
    # The writer that replaced a bundle may be removing the same directory at this moment.
    with contextlib.suppress(FileNotFoundError):
        _remove_tree(path)


def _make_locked(out: Path) -> tuple[Path, int]:
    """Create and lock a temporary sibling; a sweep may remove it before it is locked, so look again."""
    while True:
        path = temporary_name(out)
        begin_unfinished(path, _remover(out))
        path.mkdir()
        with contextlib.suppress(FileNotFoundError):
            lock = _lock_directory(path)
            if path.exists():
                return path, lock
            os.close(lock)
        end_unfinished(path)


def _lock_directory(directory: Path) -> int:
    """Open and lock a directory; without the lock where the file system has none."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
        log.debug("%s cannot be locked: %s", directory, error)
    return descriptor


def _entries(directory: Path) -> set[str]:
    """Files below a directory by their path in it, and the directories that hold none."""
    entries = set()
    for path in directory.rglob("*"):
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            entries.add(path.relative_to(directory).as_posix())
    return entries


def _listed_files(directory: Path, kind: str) -> set[str] | None:
    """Paths of the files that a manifest lists, itself included; None if there is none of ours."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        return None
    files = manifest.get("files")
    return {MANIFEST, SIGNATURE, *(files if isinstance(files, dict) else ())}


def _fill_manifest(manifest: Mapping[str, Any], files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    head = {"format_version": FORMAT_VERSION, "created": created}
    filled = {**head, **copy.deepcopy(dict(manifest)), "files": files}
    return {**filled, "sha256": manifest_digest(filled)}


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(directory: Path, out: Path) -> None:
    """Give the directory its final name; a bundle that was there is left under the temporary one."""
    if not os.path.lexists(out) or not any(out.iterdir()):
        directory.rename(out)
    elif not _exchange(directory, out):
        _replace_in_two_steps(directory, out)


def _exchange(left: Path, right: Path) -> bool:
    """Swap two names in one system call (Linux); False where kernel or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), os.fspath(right))


def _replace_in_two_steps(directory: Path, out: Path) -> None:
    aside = _aside(directory)
    out.rename(aside)
    try:
        directory.rename(out)
    except BaseException:
        if not os.path.lexists(out):
            aside.rename(out)
        raise
    _remove_tree(aside)


def _aside(directory: Path) -> Path:
    """Where `_replace_in_two_steps` keeps the old bundle for a moment."""
    return directory.with_name(directory.name.removesuffix(".partial") + ".old.partial")


def _remove_tree(directory: Path) -> None:
    """Remove a directory if it is there, its manifest first, so that what is left of it is no bundle."""
    (directory / MANIFEST).unlink(missing_ok=True)
    if directory.exists():
        shutil.rmtree(directory)


def _remover(out: Path) -> Callable[[Path], None]:
    """What removes the temporary directory of a bundle `out`; one that was set aside comes back."""

    def remove(directory: Path) -> None:
        aside = _aside(directory)
        if aside.exists():
            _clear_stale(aside, out)
        _remove_tree(directory)

    return remove
