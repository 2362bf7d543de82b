"""A job of scoring on its folder: what was asked, which shards are done, and the count at the end.

_job.json                  what was asked; a later run has to ask the same
pairs-START-STOP.jsonl     the answers to a range of the list, or .parquet; whole, or not there
_SUCCESS                   counts; there once every shard is

Readers of data sets, pyarrow's and Spark's among them, pass over names that begin with _ or a dot.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import InputError, why_no_json
from engine.files import replacing
from engine.schema import parse_json
from engine.scoring.pairs import PairList
from engine.scoring.shards import Shard, cut, digest_of
from engine.scoring.worker import Tally, Work, tally_of

JOB, SUCCESS, LOCK = "_job.json", "_SUCCESS", ".lock"


class Job:
    """The shards of a list and the files of those that are done; made by `open_job`."""

    def __init__(self, work: Work, shards: list[Shard], max_failed: int | None) -> None:
        self.work, self.shards, self.max_failed = work, shards, max_failed
        self.tally = Tally()
        self.missing: list[Shard] = []

    @property
    def pairs(self) -> int:
        """How many pairs the list has."""
        return self.shards[-1].stop

    def find_missing(self) -> None:
        """Count what earlier runs have answered; raises InputError for a file that is not a shard's."""
        last = 0
        for shard in self.shards:
            path = self.work.path(shard)
            if not path.exists():
                self.missing.append(shard)
                continue
            tally, last = tally_of(path, last)
            if tally.pairs != len(shard):
                raise InputError(
                    f"{path}: holds {tally.pairs} answers, expected {len(shard)}; delete it and run again"
                )
            self.count(tally)
        if self.missing:
            (self.work.out / SUCCESS).unlink(missing_ok=True)

    def count(self, done: Tally) -> None:
        """Count the answers of a shard; raises InputError where more pairs have failed than may."""
        self.tally.add(done)
        failed = self.tally.failed.total()
        if self.max_failed is not None and failed > self.max_failed:
            kinds = ", ".join(f"{kind} {n}" for kind, n in self.tally.failed.most_common())
            raise InputError(
                f"{failed} of {self.tally.pairs} pairs failed ({kinds}), more than the {self.max_failed} "
                f"that are allowed; {self.work.out} holds their errors, and a run that allows more goes on"
            )

    def finish(self) -> Tally:
        """Write the counts once every shard's file is there and no other; returns them."""
        out, suffix = self.work.out, self.work.format
        sweep(out)
        there = {path.name for path in out.glob(f"[!._]*.{suffix}")}
        wanted = {self.work.path(shard).name for shard in self.shards}
        if there != wanted or self.tally.pairs != self.pairs:
            odd = sorted(there ^ wanted)[:1] or [f"{self.tally.pairs} answers to {self.pairs} pairs"]
            raise InputError(f"{out}: {odd[0]}: was added or removed meanwhile; delete what is not the job's")
        write_json(out / SUCCESS, {"shards": len(self.shards), **self.tally.to_dict()})
        return self.tally


@contextlib.contextmanager
def open_job(work: Work, size: int, max_failed: int | None = None) -> Iterator[Job]:
    """Open a job on the folder `work.out`, which is made if need be, and which this process holds meanwhile.

    The list is read through once and cut into shards of `size` pairs. Raises InputError for a list that
    cannot be read, is empty or is a stream, for a folder of another job or of anything else, and where
    another process holds it.
    """
    work.out.mkdir(exist_ok=True)
    if not (work.out / JOB).exists() and any(path.name != LOCK for path in work.out.iterdir()):
        raise InputError(f"{work.out}: expected a new folder or one of this job; choose another --out")
    with _held(work.out):
        shards = list(cut(PairList(work.source), size))
        if not shards:
            raise InputError(f"{work.source}: expected at least one pair, got an empty list")
        _agree(work.out / JOB, _describe(work, shards, size))
        sweep(work.out)
        job = Job(work, shards, max_failed)
        job.find_missing()
        yield job


def sweep(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote."""
    for stray in folder.glob(".pairs-*"):
        stray.unlink(missing_ok=True)


def _describe(work: Work, shards: list[Shard], size: int) -> dict[str, Any]:
    """What the answers depend on. Where and by how many workers they are made is none of it."""
    return {
        "version": work.version,
        "bundle": work.digest,
        "shard": size,
        "format": work.format,
        "heatmap": work.heatmap,
        "batch": work.batch,
        "backend": work.backend,
        "device": work.device,
        "thresholds": dict(work.thresholds),
        "pairs": shards[-1].stop,
        "list": digest_of(shards),
    }


def _agree(path: Path, asked: dict[str, Any]) -> None:
    """Write what is asked of a new job; raises InputError where an earlier run was asked for another."""
    if not path.exists():
        write_json(path, asked)
        return
    try:
        before = parse_json(path.read_bytes())
        differing = [name for name, value in asked.items() if before[name] != value]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        why = why_no_json(error) if isinstance(error, ValueError | RecursionError) else "a field is missing"
        why = error.strerror or why if isinstance(error, OSError) else why
        raise InputError(
            f"{path}: is damaged, so that what the answers beside it belong to cannot be told: {why}; "
            "choose another --out"
        ) from error
    for name in differing[:1]:
        raise InputError(f"{path.parent}: {_difference(name, before[name], asked[name])}")


def _difference(name: str, before: Any, now: Any) -> str:
    """What a job was begun with, what is asked now, and what to do."""
    if name in ("pairs", "list"):
        change = f"{before} pairs, not {now}," if name == "pairs" else "other pairs"
        return f"its list had {change} when the job began; put the list back, or choose another --out"
    return (
        f"holds the answers of another job, with {name} {_told(before)}, not {_told(now)}; "
        "ask for the same, or choose another --out"
    )


def _told(value: Any) -> str:
    """A setting as a message has it; none stands for thresholds that are the bundle's."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={number}" for name, number in value.items()) or "of the bundle"
    return str(value)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder against a second run in it; the system lets go when the process ends, however it does."""
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{folder}: another process scores into it; wait for it or stop it") from error
        yield


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small file that appears whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
