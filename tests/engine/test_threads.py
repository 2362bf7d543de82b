"""Threads at once get what one thread gets, bit for bit."""

from __future__ import annotations

import json

import pytest

from benchmarks import threads
from engine import Batcher, Predictor


@pytest.mark.parametrize("way", ["Predictor", "Batcher"])
def test_eight_threads_answer_as_one(bundle_dir, way):
    with (
        Predictor(bundle_dir, threads=1, thumbnail=0) as predictor,
        Batcher(predictor, max_batch=1) as batcher,
    ):
        predict = (predictor if way == "Predictor" else batcher).predict
        assert threads.count_differing(predict, threads.draw_pairs(8), threads=8, calls=100) == 0


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_sixteen_threads_answer_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["threads", "--out", str(tmp_path / "threads.json")])
    assert threads.main() == 0
    rows = json.loads((tmp_path / "threads.json").read_text())["rows"]
    assert [(row["threads"], row["calls_each"], row["differing"]) for row in rows] == [(16, 1000, 0)] * 4
