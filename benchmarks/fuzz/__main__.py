"""Fuzz at length: `python -m benchmarks.fuzz --out FILE`.

100,000 mutated pictures, 100,000 odd captions, 20,000 altered bundles, 200 kills. The result has what came of
them; a failure names the seed that does it again. Seeds of what was found are kept in tests/fuzz/corpus.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks.fuzz.bundles import TriedBundle, sound_bundle, try_files, try_manifest
from benchmarks.fuzz.captions import try_caption
from benchmarks.fuzz.kills import Server, prepare, sweep, try_kill
from benchmarks.fuzz.pictures import try_picture
from benchmarks.results import ResultFile, Row
from benchmarks.soak import resident

SLOWEST = 1.0  # seconds of CPU time that one input may take
_FILES = 4  # of so many altered bundles, one has altered files, the others altered manifests


class _Timed(Protocol):
    @property
    def seconds(self) -> float: ...


T = TypeVar("T", bound=_Timed)


class Campaign:
    """Tries one seed after another; failures name the seeds that failed, at most 20 of them."""

    def __init__(self, name: str, result: ResultFile) -> None:
        self.name, self.result = name, result
        self.failed = 0
        self.slowest, self.slowest_seed = 0.0, -1

    def over(self, seeds: Iterable[int], attempt: Callable[[int], T]) -> Iterator[tuple[int, T]]:
        """Yield each seed with what came of it; one that raises, or takes too long, is a failure."""
        for seed in seeds:
            try:
                tried = attempt(seed)
            except Exception as error:  # what fuzzing is for
                self.fail(seed, f"{type(error).__name__}: {error}")
                continue
            if tried.seconds > self.slowest:
                self.slowest, self.slowest_seed = tried.seconds, seed
            if tried.seconds > SLOWEST:
                self.fail(seed, f"took {tried.seconds:.2f} s")
            yield seed, tried

    def fail(self, seed: int, error: str) -> None:
        """Record a failure."""
        self.failed += 1
        if self.failed <= 20:
            self.result.fail(self.name, str(seed), error=error[:300])

    def record(self, count: int, outcomes: Counter[str]) -> Row:
        """The figures of the campaign."""
        return {
            "tried": count,
            "failures": self.failed,
            "outcomes": dict(sorted(outcomes.items())),
            "slowest_seconds": round(self.slowest, 4),
            "slowest_seed": self.slowest_seed,
            "memory_mb": round(resident(), 1),
        }


def fuzz_pictures(count: int, result: ResultFile) -> Row:
    """Outcomes by format; the share of accepted pictures with other pixels of which a warning tells."""
    campaign, outcomes = Campaign("pictures", result), Counter[str]()
    by_format: dict[str, Counter[str]] = {}
    half = 0.0
    for seed, tried in campaign.over(range(count), try_picture):
        outcomes[tried.outcome] += 1
        by_format.setdefault(tried.file.split()[0], Counter())[tried.outcome] += 1
        if seed == count // 2:
            half = resident()
    told, silent = outcomes["told"], outcomes["silent"]
    shares = {
        "other_pixels": told + silent,
        "told_share": round(told / max(told + silent, 1), 3),
        "formats": {name: dict(sorted(counts.items())) for name, counts in sorted(by_format.items())},
        "memory_mb_halfway": round(half, 1),
    }
    return campaign.record(count, outcomes) | shares


def fuzz_captions(count: int, result: ResultFile) -> Row:
    """Captions whose tokens are not those of the caption are failures."""
    campaign, outcomes = Campaign("captions", result), Counter[str]()
    for seed, tried in campaign.over(range(count), try_caption):
        outcomes["refused" if tried.refused else "read"] += 1
        if tried.wrong:
            campaign.fail(seed, tried.wrong)
    return campaign.record(count, outcomes)


def fuzz_bundles(count: int, folder: Path, result: ResultFile) -> Row:
    """Altered bundles that open as if nothing were are failures."""
    campaign, outcomes = Campaign("bundles", result), Counter[str]()
    bundle = sound_bundle(folder / "sound")

    def attempt(seed: int) -> TriedBundle:
        return try_bundle(seed, bundle, folder / "altered")

    for seed, tried in campaign.over(range(count), attempt):
        outcomes[f"{'files' if seed % _FILES == 0 else 'manifest'} {tried.outcome}"] += 1
        if tried.outcome == "silent":
            campaign.fail(seed, f"{tried.place}: {tried.kind} in silence")
    return campaign.record(count, outcomes)


def try_bundle(seed: int, bundle: Path, work: Path) -> TriedBundle:
    """Alter files of a bundle for a quarter of the seeds, its manifest for the others."""
    return try_files(seed, bundle, work) if seed % _FILES == 0 else try_manifest(seed, bundle)


def fuzz_kills(count: int, folder: Path, result: ResultFile) -> Row:
    """Kills that leave something broken are failures."""
    outcomes, strays, failed = Counter[str](), 0, 0
    with Server() as server:
        cases = prepare(server, folder)
        for seed in range(count):
            killed = try_kill(seed, server, cases, folder)
            ended = "finished" if killed.status == 0 else "killed"
            outcomes[f"{killed.command} {killed.signal} {ended}"] += 1
            strays = max(strays, killed.strays)
            if killed.wrong:
                failed += 1
                result.fail("kills", str(seed), error=f"{killed.command}, {killed.signal}: {killed.wrong}")
        if wrong := sweep(server, cases, folder):
            result.fail("kills", "sweep", error=wrong)
    return {"tried": count, "failures": failed, "outcomes": dict(sorted(outcomes.items())), "strays": strays}


def main() -> int:
    """Run the campaigns, saving after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--captions", type=int, default=100_000)
    parser.add_argument("--bundles", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result, record = ResultFile(options.out), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
        place = Path(folder)
        (place / "kills").mkdir()
        campaigns: dict[str, Callable[[], Row]] = {
            "pictures": lambda: fuzz_pictures(options.pictures, result),
            "captions": lambda: fuzz_captions(options.captions, result),
            "bundles": lambda: fuzz_bundles(options.bundles, place, result),
            "kills": lambda: fuzz_kills(options.kills, place / "kills", result),
        }
        for name, run in campaigns.items():
            if getattr(options, name):
                record[name] = run()
                result.save(record)
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
