"""Which backend was measured to be the fastest for a bundle on this machine.

`dgm4 bench --choose` writes the record, a JSON file in the cache folder, and `backend="auto"` follows it
on a CPU. It counts for one situation: the bundle (its manifest's SHA-256), the processor, the cores of the
process, the threads that are asked for, and the versions of the libraries. Any other has no record.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from engine.backends.cores import usable_cores
from engine.errors import BackendError, Dgm4Error
from engine.files import cache_folder, replacing, sha256_of
from engine.manifest import manifest_digest
from engine.packages import version_of
from engine.schema import Record, at_least, one_of, within

if TYPE_CHECKING:
    from engine.bundle import Bundle

logger = logging.getLogger(__name__)

_LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "openvino", "torch")
_FIELDS = ("model name", "vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
FORMAT = "dgm4-backend-1"
_MAX_BYTES = 65_536


@dataclass(frozen=True)
class Situation(Record):
    """What a record counts for; `threads` is None where the caller asks for no number."""

    document: ClassVar[str] = "the record"
    error: ClassVar[type[Dgm4Error]] = BackendError

    bundle: str
    processor: str
    cores: Annotated[int, at_least(1)]
    threads: Annotated[int, at_least(1)] | None
    libraries: dict[str, str]


@dataclass(frozen=True)
class Choice(Record):
    """The winner of a measurement: the backend and its number of threads (None: every usable core).

    medians: milliseconds a call of each candidate, the winner among them. model: whose bundle it is.
    """

    document: ClassVar[str] = "the record"
    error: ClassVar[type[Dgm4Error]] = BackendError

    format: Annotated[str, one_of(FORMAT)]
    situation: Situation
    backend: str
    threads: Annotated[int, at_least(1)] | None
    medians: dict[str, Annotated[float, within(0)]]
    model: str
    time: str

    @property
    def reason(self) -> str:
        """One line that says what was measured, and when."""
        figures = ", ".join(f"{name} {value:.1f} ms" for name, value in self.medians.items())
        return f"measured by dgm4 bench --choose on {self.time[:10]}: {figures}"


def current(bundle: Bundle, threads: int | None) -> Situation:
    """The situation of this process."""
    digest = manifest_digest(bundle.manifest.to_dict())
    return Situation(digest, processor(), usable_cores(), threads, _libraries())


def find(bundle: Bundle, threads: int | None) -> Choice | None:
    """The record of this situation, or None; one that is damaged is ignored with one warning."""
    if not _folder().is_dir():  # the hash, the processor and the versions take a millisecond or two
        return None
    situation = current(bundle, threads)
    choice = _read(_path(situation))
    return choice if choice is not None and choice.situation == situation else None


def write(choice: Choice) -> Path:
    """Write the record of its situation, whole or not at all; returns its path. Raises BackendError."""
    path = _path(choice.situation)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(choice.to_dict(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BackendError(
            f"{path}: the choice cannot be written: {error.strerror or error}; free space there, or set "
            "XDG_CACHE_HOME to another folder"
        ) from error
    return path


def recorded() -> Iterator[Choice]:
    """Every record of this user that can be read, of other machines and versions too."""
    for path in sorted(_folder().glob("*.json")):
        if (choice := _read(path)) is not None:
            yield choice


def applies(choice: Choice) -> bool:
    """Whether the record is of this processor, these cores and these versions."""
    there = choice.situation
    here = (processor(), usable_cores(), _libraries())
    return (there.processor, there.cores, there.libraries) == here


@functools.cache
def processor() -> str:
    """What tells this model of processor from others: its name, family, model and instruction sets."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    first = text.partition("\n\n")[0].splitlines()
    fields = dict(line.split(":", 1) for line in first if ":" in line)
    found = {name.strip(): value.strip() for name, value in fields.items()}
    flags = hashlib.sha256(found.get("flags", found.get("Features", "")).encode()).hexdigest()[:8]
    return ", ".join([*(f"{name} {found[name]}" for name in _FIELDS if name in found), f"flags {flags}"])


def _libraries() -> dict[str, str]:
    return {name: version for name in _LIBRARIES if (version := version_of(name))}


def _folder() -> Path:
    return cache_folder() / "backends"


def _path(situation: Situation) -> Path:
    text = json.dumps(situation.to_dict(), sort_keys=True)
    return _folder() / f"{situation.bundle[:16]}-{sha256_of(text.encode())[:16]}.json"


@functools.cache
def _warn(path: Path, why: str) -> None:
    """Once a process for the same fault."""
    logger.warning("%s is ignored: %s; dgm4 bench --choose writes it anew", path, why)


def _read(path: Path) -> Choice | None:
    try:
        with path.open("rb") as file:
            return Choice.from_dict(json.loads(file.read(_MAX_BYTES)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, Dgm4Error) as error:
        _warn(path, str(error))
        return None
