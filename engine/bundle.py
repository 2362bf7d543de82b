"""Reading a bundle: the manifest, the set of files beside it, and their hashes.

Nothing of a bundle is parsed before its SHA-256 agrees with the manifest's, and the manifest holds that
of its own content. This finds damage; it does not tell who wrote a bundle. Load only what you exported.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import BundleError, shorten
from engine.files import open_file, sha256_of
from engine.layout import ENGINE_SUFFIX, MANIFEST, SIGNATURE
from engine.manifest import (
    FileEntry,
    Manifest,
    check_digest,
    parse_manifest,
)
from engine.shipped import locate, suggest
from engine.signing import PublicKey, check_signature, read_public_key

logger = logging.getLogger(__name__)

_MAX_MANIFEST_BYTES = 4 * 2**20
_SHOWN = 5  # names that a message lists


class Bundle:
    """A bundle's directory whose manifest was read; all of its files are there, and no others.

    `path` is absolute, so that a later change of the working directory does not matter. `public_key` is the
    key, as PEM text, whose owner signed it, where `open` was given one. A Bundle is pickled by its path, and
    opened again where it is unpickled.

    Examples:
        >>> from engine import Bundle, Predictor
        >>> bundle = Bundle.open("my-bundle")
        >>> Predictor(bundle).manifest.model.name
        'asap'
    """

    def __init__(self, path: Path, manifest: Manifest, engines: bool = True, public_key: bytes | None = None):
        self.path = path
        self.manifest = manifest
        self.public_key = public_key
        self._engines = engines
        self._verified: set[str] = set()
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], engines: bool = True, public_key: PublicKey | None = None
    ) -> Bundle:
        """Read the manifest of the bundle at `path` and compare the directory with it.

        A name such as "demo:asap" stands for a bundle that ships with the package (`engine.shipped`).
        Without `engines` its prebuilt engines may be missing or damaged: for a caller that builds them again.
        Links to files are followed, as a cache of downloads makes them, and hidden files are ignored.
        With `public_key`, an Ed25519 key in PEM as a file's path or as bytes, its owner must have signed the
        bundle (`dgm4 sign`).
        Raises BundleError for a manifest that is missing, of another format or wrong, for a file that is
        missing, foreign or of another size, and for a signature that is missing or wrong.

        Examples:
            >>> from engine import Bundle
            >>> Bundle.open("my-bundle").manifest.precision
            'fp32'
        """
        root = _absolute(locate(path))
        content = _read_manifest(root)
        key = None if public_key is None else read_public_key(public_key)
        if key is not None:
            check_signature(root, content, key)
        manifest = _parse(root, content)
        sizes = _list_files(root)
        optional = set() if engines else {entry.file for entry in manifest.engines}
        missing = sorted(set(manifest.files) - set(sizes) - optional)
        if missing:
            raise BundleError(f"{root}: missing {_some(missing)}; {_remedy(missing[0])}")
        foreign = sorted(set(sizes) - set(manifest.files))
        if foreign:
            verb = "is" if len(foreign) == 1 else "are"
            raise BundleError(
                f"{root}: {_some(foreign)} {verb} not in the manifest; remove what is not the bundle's"
            )
        for name in set(manifest.files) - optional:
            _check_size(root / name, sizes[name], manifest.files[name])
        logger.debug("opened the bundle %s: %s", root, manifest.model.name)
        return cls(root, manifest, engines, key)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.manifest, self._engines, self.public_key)

    def verified(self, name: str) -> Path:
        """Return the path of the file `name` once its SHA-256 agrees; hashes each file only once.

        Raises BundleError where the manifest does not list `name` or the file was altered.

        Examples:
            >>> from engine import Bundle
            >>> Bundle.open("my-bundle").verified("model.onnx").name
            'model.onnx'
        """
        entry, path = self._entry(name), self.path / name
        with self._lock:
            if name not in self._verified:
                _check_digest(path, entry)
                self._verified.add(name)
        return path

    def read(self, name: str) -> bytes:
        """Return the content of the file `name` once its SHA-256 agrees: the very bytes that were hashed.

        Between `verified` and a library's own reading of the path, the file can be replaced. Raises
        BundleError where the manifest does not list `name` or the file was altered.

        Examples:
            >>> from engine import Bundle
            >>> Bundle.open("my-bundle").read("README.md")[:1]
            b'#'
        """
        entry, path = self._entry(name), self.path / name
        try:
            with open_file(path) as file:
                content = file.read()
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {_reason(error)}") from error
        _check_size(path, len(content), entry)
        _compare(path, sha256_of(content), entry)
        return content

    @contextmanager
    def held(self, *names: str) -> Iterator[None]:
        """Verify the files `names` for a block in which a library reads them by their paths.

        `read` is for libraries that take a file's content. Raises BundleError where the manifest does not
        list a file, and for one that was altered before the block, or is written or replaced within it.

        Examples:
            >>> from engine import Bundle
            >>> bundle = Bundle.open("my-bundle")
            >>> with bundle.held("model.onnx"):
            ...     (bundle.path / "model.onnx").is_file()
            True
        """
        states = {name: _check_digest(self.path / name, self._entry(name)) for name in names}
        yield
        for name, state in states.items():
            path = self.path / name
            found = _state(path.stat()) if path.is_file() else ()
            if found[:-1] != state[:-1]:
                raise BundleError(f"{path}: was replaced while it was loaded; {_remedy(name)}")
            if found != state:  # a link to it was made, as a copy of the bundle does, or its times were set
                _check_digest(path, self._entry(name))

    def _entry(self, name: str) -> FileEntry:
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(
                f"{self.path}: does not contain {name}; it contains {', '.join(self.manifest.files)}"
            )
        return entry

    def verify_all(self) -> None:
        """Verify every file of the bundle; raises BundleError naming the first altered one.

        Examples:
            >>> from engine import Bundle
            >>> Bundle.open("my-bundle").verify_all()
        """
        for name in self.manifest.files:
            self.verified(name)

    def describe(self) -> dict[str, Any]:
        """Return the manifest as plain JSON-safe data, with the bundle's path and its size in bytes.

        Examples:
            >>> from engine import Bundle
            >>> Bundle.open("my-bundle").describe()["model"]["name"]
            'asap'
        """
        fields = self.manifest.to_dict()
        # As in every release: the key is there for an engine of a single kind of GPU too.
        fields["engines"] = [{"hardware": None, **engine} for engine in fields["engines"]]
        total = sum(entry.bytes for entry in self.manifest.files.values())
        return {"path": str(self.path), "total_bytes": total, **fields}


def _absolute(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        given = "an empty one" if path == "" else type(path).__name__
        raise BundleError(f"expected the path of a bundle's directory, got {given}")
    try:
        return Path(os.fsdecode(path)).absolute()
    except OSError as error:  # the working directory is gone
        raise BundleError(
            f"{path}: not a bundle, the working directory cannot be found: {_reason(error)}"
        ) from error


def _reopen(path: Path, manifest: Manifest, engines: bool, public_key: bytes | None = None) -> Bundle:
    bundle = Bundle.open(path, engines, public_key)
    if bundle.manifest != manifest:
        raise BundleError(f"{path}: holds another bundle than when it was pickled; make the Predictor again")
    return bundle


def _read_manifest(root: Path) -> bytes:
    path = root / MANIFEST
    try:
        with open_file(path) as file:
            data = file.read(_MAX_MANIFEST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise BundleError(f"{shorten(str(root))}: not a bundle, {_why_none(root, error)}") from error
    if len(data) > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{path}: expected at most {_MAX_MANIFEST_BYTES} bytes; {_remedy(MANIFEST)}")
    return data


def _parse(root: Path, data: bytes) -> Manifest:
    try:
        return parse_manifest(check_digest(data))
    except BundleError as error:
        raise BundleError(f"{root}{os.sep}{error}") from error  # it begins with the manifest's name


def _why_none(root: Path, error: OSError | ValueError) -> str:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        there = "a file" if root.is_file() else "a directory without one" if root.is_dir() else "nothing"
        hint = suggest(root) if there == "nothing" else ""
        return f"expected the directory with a {MANIFEST} that dgm4 export writes, got {there}{hint}"
    return f"its {MANIFEST} cannot be read: {_reason(error)}"


def _reason(error: OSError | ValueError) -> str:
    """The error without its number and path, which a message has."""
    return getattr(error, "strerror", None) or str(error)


def _some(names: Sequence[str]) -> str:
    """The first names, in which nothing moves a terminal's cursor."""
    shown = [shorten(name if name.isprintable() else repr(name)) for name in names[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _list_files(root: Path) -> dict[str, int]:
    """Return the size of every file of the directory but the manifest, its signature and the hidden ones."""
    sizes = {}
    try:
        for entry in os.scandir(root):
            if entry.name in (MANIFEST, SIGNATURE) or entry.name.startswith("."):
                continue
            if not entry.is_file():
                kind = (
                    "a link to nothing" if entry.is_symlink() and not Path(entry).exists() else "not a file"
                )
                raise BundleError(
                    f"{root}: {_some([entry.name])} is {kind}; {_remedy(entry.name)}, or remove it"
                )
            sizes[entry.name] = entry.stat().st_size
    except OSError as error:
        raise BundleError(f"{root}: cannot list the bundle: {_reason(error)}") from error
    return sizes


def _check_size(path: Path, size: int, entry: FileEntry) -> None:
    if size != entry.bytes:
        raise BundleError(f"{path}: expected {entry.bytes} bytes, got {size}; {_remedy(path.name)}")


def _check_digest(path: Path, entry: FileEntry) -> tuple[int, ...]:
    """Raise BundleError unless the file's SHA-256 agrees; return the state of the file that was hashed."""
    try:
        with open_file(path) as file:
            found = os.fstat(file.fileno())
            _check_size(path, found.st_size, entry)
            digest = sha256_of(file)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {_reason(error)}") from error
    _compare(path, digest, entry)
    return _state(found)


def _state(found: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written or another takes its place."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _compare(path: Path, digest: str, entry: FileEntry) -> None:
    if digest != entry.sha256:
        raise BundleError(
            f"{path}: expected SHA-256 {entry.sha256}, got {digest}; the file was altered, "
            f"{_remedy(path.name)}"
        )


def _remedy(name: str) -> str:
    rebuild = "build the engine again (dgm4 rebuild), or " if name.endswith(ENGINE_SUFFIX) else ""
    return f"{rebuild}export or copy the bundle again"
