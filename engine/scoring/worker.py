"""Scores one shard after another, in this process or in one of Ray's, and writes each shard's file."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine import __version__
from engine.bundle import Bundle
from engine.errors import BackendError, BundleError, Dgm4Error, InputError
from engine.files import replacing, sha256_of
from engine.layout import MANIFEST
from engine.predictor import Predictor
from engine.scoring.pairs import PairList
from engine.scoring.parquet import TableWriter, read_numbers
from engine.scoring.records import Answer, Record, answers, json_line, line_record, table_row
from engine.scoring.shards import Shard, read

Format = Literal["jsonl", "parquet"]


@dataclass(frozen=True)
class Work:
    """What every worker of a job is told: where the pairs are, what answers them, where answers go.

    `digest` is that of the bundle's manifest, so that no machine of a cluster answers with another bundle.
    `threads` are the CPU threads of one worker, None for all cores. With `public_key`, PEM, the bundle has to
    be signed by its owner.
    """

    bundle: str
    digest: str
    source: Path
    out: Path
    format: Format = "jsonl"
    heatmap: bool = False
    batch: int = 32
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    public_key: bytes | None = field(default=None, repr=False)
    version: str = __version__  # of the process that gives the work out

    def path(self, shard: Shard) -> Path:
        """The file of a shard's answers."""
        return self.out / f"{shard.name}.{self.format}"


@dataclass
class Tally:
    """How many pairs were answered or not, and how many failed by the kind of their error."""

    pairs: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Count those of `other` too."""
        self.pairs += other.pairs
        self.failed.update(other.failed)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-safe data."""
        return {"pairs": self.pairs, "failed": dict(self.failed)}


class Worker:
    """Scores shards with one Predictor, which is opened at the first; call it with a shard.

    `on_pair` is called after each pair.
    """

    def __init__(self, work: Work, on_pair: Callable[[], object] = lambda: None) -> None:
        self.work = work
        self._on_pair = on_pair
        self._pairs = PairList(work.source)
        self._predictor: Predictor | None = None

    def __call__(self, shard: Shard) -> Tally:
        """Score a shard and write its file, which appears whole or not at all.

        Raises InputError where the list has changed, BundleError for another bundle than the job's,
        BackendError for another version of this package, and what a Predictor raises. The error of a pair is
        a row of the file.
        """
        work, tally = self.work, Tally()
        predictor = self._open()
        found = answers(predictor, read(self._pairs, shard), self._pairs.base, work.batch)
        with replacing(work.path(shard)) as partial, _writing(work, partial) as write:
            for entry, answer in found:
                tally.pairs += 1
                if isinstance(answer, Dgm4Error):
                    tally.failed[type(answer).__name__] += 1
                write(entry.head(), answer)
                self._on_pair()
        return tally

    def _open(self) -> Predictor:
        if self._predictor is None:
            work = self.work
            if work.version != __version__:
                raise BackendError(
                    f"this worker has dgm4 {__version__}, the driver {work.version}; take one for all"
                )
            bundle = Bundle.open(work.bundle, public_key=work.public_key)
            if manifest_digest(bundle) != work.digest:
                raise BundleError(
                    f"{bundle.path}: holds another bundle than the job began with; "
                    "every machine needs the same one at the same path"
                )
            self._predictor = Predictor(
                bundle,
                backend=work.backend,
                device=work.device,
                threads=work.threads,
                thumbnail=0,
                thresholds=work.thresholds,
                public_key=work.public_key,
            )
        return self._predictor


def manifest_digest(bundle: Bundle) -> str:
    """SHA-256 of a bundle's manifest, which has that of every other file."""
    return sha256_of(bundle.path / MANIFEST)


@contextlib.contextmanager
def _writing(work: Work, path: Path) -> Iterator[Callable[[Record, Answer], object]]:
    """What writes an answer to the file at `path`, in the format of the job."""
    if work.format == "parquet":
        with TableWriter(path) as table:
            yield lambda head, answer: table.write(table_row(head, answer))
    else:
        with path.open("w", encoding="utf-8") as file:
            yield lambda head, answer: file.write(json_line(line_record(head, answer, work.heatmap)))


def tally_of(path: Path, after: int) -> tuple[Tally, int]:
    """Count the rows of a shard's file that an earlier run wrote, and return the number of the last one.

    Raises InputError for a row that is none, and where the numbers of rows do not go up from `after`.
    """
    tally, last = Tally(), after
    for number, kind in read_numbers(path) if path.suffix == ".parquet" else _numbers_of(path):
        tally.pairs += 1
        if number <= last:
            raise InputError(
                f"{path}: row {tally.pairs} answers pair {number}, expected one above {last}; "
                "delete the file and run again"
            )
        last = number
        if kind is not None:
            tally.failed[kind] += 1
    return tally, last


def _numbers_of(path: Path) -> Iterator[tuple[int, str | None]]:
    """Each row's number, and the kind of its error."""
    with path.open("rb") as file:
        for row, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                yield int(record["line"]), record["kind"] if "error" in record else None
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}: row {row} is no answer; delete the file and run again") from error
