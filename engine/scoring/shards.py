"""A list of pairs cut into shards: ranges of its entries, each with the place where it begins."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from engine.errors import InputError
from engine.scoring.entries import ROW, START, Entry, Mark
from engine.scoring.pairs import PairList

_DIGITS = 12


@dataclass(frozen=True)
class Shard:
    """The entries `start` to `stop` of a list, counted from 0 and `stop` left out; they begin at `mark`.

    `digest` is the SHA-256 of what the list says of them, without the bytes of images.
    """

    start: int
    stop: int
    mark: Mark
    digest: str

    @property
    def name(self) -> str:
        """The name of its file of answers, without a suffix; names sort in the order of the list."""
        return f"pairs-{self.start:0{_DIGITS}}-{self.stop:0{_DIGITS}}"

    def __len__(self) -> int:
        return self.stop - self.start


def cut(pairs: PairList, size: int) -> Iterator[Shard]:
    """Cut a list into shards of `size` entries, the last one shorter; reads it once, an entry at a time."""
    start, mark = 0, START
    entries = pairs.read(content=False)
    while True:
        total, begin, stop = Digest(), mark, start
        for entry, behind in itertools.islice(entries, size):
            total.add(entry)
            mark, stop = behind, stop + 1
        if stop == start:
            return
        yield Shard(start, stop, begin, total.hex)
        start = stop


def read(pairs: PairList, shard: Shard) -> Iterator[Entry]:
    """The entries of a shard; raises InputError at their end if they are not those that were cut."""
    total, count = Digest(), 0
    for entry, _ in itertools.islice(pairs.read(shard.mark), len(shard)):
        total.add(entry)
        count += 1
        yield entry
    if (count, total.hex) != (len(shard), shard.digest):
        raise InputError(
            f"{pairs.path}: entries {shard.start + 1} to {shard.stop} are others than when the job began; "
            "put the list back, or score it anew into another folder"
        )


def digest_of(shards: Iterable[Shard]) -> str:
    """SHA-256 of a whole list, by its shards."""
    return hashlib.sha256("".join(shard.digest for shard in shards).encode()).hexdigest()


class Digest:
    """SHA-256 over what a list says of its entries."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, entry: Entry) -> None:
        """Take the next entry."""
        # Whether a row of Parquet has an image in bytes is known only where they are read.
        error = entry.error if entry.unit != ROW else None
        said = (entry.number, entry.image, entry.caption, entry.id, error and str(error))
        self._hash.update(repr(said).encode(errors="surrogatepass"))

    @property
    def hex(self) -> str:
        """The digest so far."""
        return self._hash.hexdigest()
