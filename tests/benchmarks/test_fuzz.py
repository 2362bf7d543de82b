"""The commands that fuzz and soak, at tiny size; what they must notice."""

from __future__ import annotations

import json

import pytest

from benchmarks import soak
from benchmarks.fuzz import __main__ as fuzz
from benchmarks.fuzz.bundles import TriedBundle
from benchmarks.fuzz.kills import _check_answers
from benchmarks.hollow import hollow_bundle
from engine import Predictor


@pytest.fixture
def run(monkeypatch, tmp_path):
    def command(**counts):
        out = tmp_path / "fuzz.json"
        given = {"pictures": 0, "captions": 0, "bundles": 0, "kills": 0, **counts, "out": out}
        monkeypatch.setattr("sys.argv", ["fuzz", *(f"--{name}={value}" for name, value in given.items())])
        return fuzz.main(), json.loads(out.read_text())

    return command


def test_a_short_campaign(run):
    code, record = run(pictures=50, captions=20, bundles=8)
    assert code == 0
    assert sum(record["pictures"]["outcomes"].values()) == 50
    assert record["captions"]["outcomes"] == {"read": 20}
    assert set(record["bundles"]["outcomes"]) <= {"files refused", "manifest refused", "manifest read"}


def test_what_goes_wrong_is_a_failure_with_its_seed(run, monkeypatch):
    def attempt(seed, *_):
        if seed == 1:
            raise ZeroDivisionError("once")
        return TriedBundle("added", "limits.more", "silent" if seed == 2 else "refused", 2.0 * (seed == 3))

    monkeypatch.setattr(fuzz, "try_bundle", attempt)
    code, record = run(bundles=5)
    assert code == 1
    assert [(failure["case"], failure["error"]) for failure in record["failures"]] == [
        (["bundles", "1"], "ZeroDivisionError: once"),
        (["bundles", "2"], "limits.more: added in silence"),
        (["bundles", "3"], "took 2.00 s"),
    ]


def test_lost_answers_are_noticed(tmp_path):
    out = tmp_path / "answers.jsonl"
    assert _check_answers(out) == ""
    partial = tmp_path / "answers.jsonl.partial"
    partial.write_text('{"line": 1}\n{"line": 2}\n{"li')
    assert _check_answers(out) == ""
    partial.write_text('{"line": 1}\n{"line": 3}\n')
    assert _check_answers(out) == "answers are lost"
    out.write_text('{"line": 1}\n')
    assert _check_answers(out) == "1 answers to 60 pairs"


@pytest.mark.filterwarnings("ignore")
def test_a_hollow_bundle_answers_and_is_soaked(tmp_path):
    with Predictor(hollow_bundle(tmp_path / "hollow"), threads=1) as predictor:
        rows = soak.soak(predictor, 100)
    assert [row["calls"] for row in rows[-2:]] == [98, 100]
    assert rows[-1]["refused"] == 10
    assert {row["files"] for row in rows} == {rows[0]["files"]}
    assert soak.slope(
        [{"calls": n, "memory_mb": 50 + n / 20_000} for n in range(0, 100_000, 1000)]
    ) == pytest.approx(0.5)
