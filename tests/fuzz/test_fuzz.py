"""What `benchmarks.fuzz` tries at length, in short; and the seeds of what it found, each once more."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.fuzz.__main__ import SLOWEST, main, try_bundle
from benchmarks.fuzz.bundles import sound_bundle
from benchmarks.fuzz.captions import try_caption
from benchmarks.fuzz.pictures import try_picture
from benchmarks.soak import resident

CORPUS = json.loads((Path(__file__).parent / "corpus.json").read_text())
PARTS = 5  # of each campaign, which run in parallel
PICTURES, CAPTIONS, BUNDLES = 10_000, 10_000, 2_000


def seeds(count, part):
    return range(part * count // PARTS, (part + 1) * count // PARTS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return sound_bundle(tmp_path_factory.mktemp("fuzz") / "sound")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_mutated_pictures(part):
    """Only InputError. About half of those that are accepted with other pixels are told of, and all PNG."""
    outcomes, slow, silent = Counter(), [], set()
    for warm in range(200):  # what is loaded once
        try_picture(warm)
    before = resident()
    for seed in seeds(PICTURES, part):
        tried = try_picture(seed)
        outcomes[tried.outcome] += 1
        silent |= {tried.file} if tried.outcome == "silent" else set()
        if tried.seconds > SLOWEST:
            slow.append((seed, tried.seconds))
    assert slow == []
    assert resident() - before < 100
    assert outcomes["refused"] > 0.5 * PICTURES / PARTS
    assert outcomes["told"] > 0.4 * (outcomes["told"] + outcomes["silent"])
    assert not any(name.startswith("png") for name in silent)


@pytest.mark.parametrize("part", range(PARTS))
def test_odd_captions(part):
    tried = {seed: try_caption(seed) for seed in seeds(CAPTIONS, part)}
    assert {seed: each.wrong for seed, each in tried.items() if each.wrong} == {}
    assert {seed: each.refused for seed, each in tried.items() if each.refused} == {}
    assert max(each.seconds for each in tried.values()) < SLOWEST


@pytest.mark.parametrize("part", range(PARTS))
def test_altered_bundles(part, bundle, tmp_path):
    tried = {seed: try_bundle(seed, bundle, tmp_path / "altered") for seed in seeds(BUNDLES, part)}
    assert {seed: each for seed, each in tried.items() if each.outcome == "silent"} == {}
    assert max(each.seconds for each in tried.values()) < SLOWEST


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("finding", CORPUS["pictures"], ids=lambda finding: finding["what"])
def test_pictures_of_the_corpus(finding):
    tried = try_picture(finding["seed"])
    assert (tried.file, tried.mutation, tried.outcome) == tuple(finding["was"])
    assert finding.get("says", "") in tried.message


@pytest.mark.parametrize("finding", CORPUS["bundles"], ids=lambda finding: finding["what"])
def test_bundles_of_the_corpus(finding, bundle, tmp_path):
    tried = try_bundle(finding["seed"], bundle, tmp_path / "altered")
    assert (tried.kind, tried.place, tried.outcome) == tuple(finding["was"])
    assert finding.get("says", "") in tried.message


@pytest.mark.fuzz
@pytest.mark.timeout(0)
def test_at_length(tmp_path, monkeypatch):
    """100,000 pictures, 100,000 captions, 20,000 bundles and 200 kills, by the command."""
    monkeypatch.setattr("sys.argv", ["fuzz", "--out", str(tmp_path / "fuzz.json")])
    assert main() == 0
