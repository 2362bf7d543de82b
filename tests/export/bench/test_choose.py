"""`dgm4 bench --choose`: which backends are compared, which one wins, and that auto then takes it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from engine import Bundle, Predictor
from engine.backends import choice
from engine.errors import BackendError
from export import cli
from export.bench import choose
from export.bench.measure import Bench, BenchOptions, Row

QUICK = ["--seconds", "0.02", "--threads", "1", "--tokens", "9", "-q"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def opened(bundle):
    return Bundle.open(bundle("asap", "fp32").path)


def measured(*rows):
    """Medians that are chosen: (backend, threads, batch, ms a call)."""
    made = [
        Row(name, "cpu", threads, batch, 5, *[dict.fromkeys(("p50", "p95", "p99"), ms)] * 4, 1.0, 1.0)
        for name, threads, batch, ms in rows
    ]
    model = {"name": "asap", "size": "base", "precision": "fp32"}
    return Bench("b", model, BenchOptions(), {}, made)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("ort", None, 1, 10.0), ("torch", None, 1, 9.0)], ("torch", None)),
        ([("ort", None, 1, 10.0), ("torch", None, 1, 9.8)], ("ort", None)),  # within the margin
        ([("torch", None, 1, 9.8), ("ort", None, 1, 10.0), ("ort", 4, 1, 9.9)], ("ort", 4)),
        # Over batches of 1 and 8: the square roots of 10 x 90 and of 12 x 60.
        (
            [
                (n, None, b, ms)
                for n, b, ms in (("ort", 1, 10), ("ort", 8, 90), ("torch", 1, 12), ("torch", 8, 60))
            ],
            ("torch", None),
        ),
        # It did not get through the batch of 8.
        ([("ort", None, 1, 10.0), ("torch", None, 1, 1.0), ("ort", None, 8, 90.0)], ("ort", None)),
    ],
)
def test_the_winner_by_hand(opened, rows, expected):
    found = choose.winner(opened, "ort", measured(*rows))
    assert (found.backend, found.threads) == expected
    assert found.situation == choice.current(opened, None)
    assert list(found.medians.values()) == sorted(found.medians.values())


def test_nobody_serves_every_batch(opened):
    with pytest.raises(BackendError, match="no backend served every batch; choose others with --batch"):
        choose.winner(opened, "ort", measured(("ort", None, 1, 10.0), ("torch", None, 8, 9.0)))


@pytest.fixture
def answers(monkeypatch):
    """Outputs of each backend, in place of its process."""
    given = {"ort": 1.0}

    def outputs(_bundle, name, _threads, feeds):
        if name not in given:
            raise BackendError("its process ended with SIGSEGV")
        return [{"logits": np.full(4, given[name])} for _ in feeds]

    monkeypatch.setattr(choose, "network_outputs", outputs)
    return given


def test_only_equal_answers_are_measured(opened, answers):
    """The bundle was verified to 1e-4."""
    answers |= {"near": 1 + 9e-5, "far": 1 + 2e-4, "nan": np.nan}
    names = ["ort", *sorted(answers.keys() - {"ort"}), "crashes"]
    found = dict(choose._disagreeing(opened, "ort", names, BenchOptions()))
    assert found == {
        "far": "its outputs differ from those of ort: max 0.0002, not 0.0001",
        "nan": "its outputs differ from those of ort: max nan, not 0.0001",
        "crashes": "its process ended with SIGSEGV",
    }


def test_low_precision_is_compared_by_its_own_measure(bundle):
    int8 = Bundle.open(bundle("asap", "int8").path).manifest
    assert choose._tolerance(int8) == ("rms / rms of the reference", 0.15)
    assert (
        choose._distance("rms / rms of the reference", [np.array([3.0, 4.0])], [np.array([3.0, 3.0])]) == 0.2
    )
    assert (
        choose._distance("max", [np.array([3.0]), np.array([4.0])], [np.array([3.0]), np.array([3.5])]) == 0.5
    )


def test_choose_measures_records_and_auto_follows(opened, capsys):
    """Whoever wins, on a machine that has other work to do."""
    arguments = ["bench", str(opened.path), "--choose", "--backend", "ort", "--backend", "torch", *QUICK]
    assert cli.main([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    chosen = record["choice"]
    assert sorted(chosen["medians"]) == ["ort, 1 thread", "torch, 1 thread"]
    assert (record["absent"], record["failed"]) == ({}, {})
    assert {row["batch"] for row in record["rows"]} == {1}
    assert json.loads(Path(chosen.pop("path")).read_text()) == chosen
    with Predictor(opened, device="cpu", threads=1) as predictor:
        assert predictor.model["backend"] == chosen["backend"]
        assert predictor.model["chosen"].startswith("measured by dgm4 bench --choose on 20")
    assert cli.main(["doctor"]) == 0
    figures = ", ".join(f"{name} {ms:.1f} ms" for name, ms in chosen["medians"].items())
    assert f"\nchosen     {chosen['backend']} for asap tiny fp32" in (text := capsys.readouterr().out)
    assert figures in text


def test_choose_says_where_it_recorded(opened, capsys, tmp_path):
    assert cli.main(["bench", str(opened.path), "--choose", "--backend", "ort", *QUICK]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"chosen: ort, 1 thread; recorded in {tmp_path / 'cache' / 'dgm4' / 'backends'}")


def test_choose_is_for_a_cpu(opened, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", str(opened.path), "--choose", "--device", "cuda"])
    assert caught.value.code == 2
    assert "--choose measures the CPU, not cuda: leave --device out" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux has it")
def test_physical_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "_SIBLINGS", str(tmp_path / "{}"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(choose, "usable_cores", lambda: 4)
    assert choose.physical_cores() is None
    assert choose.thread_counts() == (None,)
    for core, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        (tmp_path / str(core)).write_text(f"{siblings}\n")
    assert choose.physical_cores() == 2
    assert choose.thread_counts() == (None, 2)
    monkeypatch.setattr(choose, "usable_cores", lambda: 2)  # a container's quota
    assert choose.thread_counts() == (None,)
