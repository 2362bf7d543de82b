"""The latency benchmark of a bundle: what is counted, whose turn it is, and what a failure leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine import Bundle
from engine.errors import BackendError, BundleError, InputError
from engine.inputs.text import CaptionTokenizer
from export import cli
from export.bench import measure as bench
from export.bench.measure import BenchOptions, make_caption, percentiles
from export.bench.process import Call, Server, take_turn
from export.cli import bench as cli_bench

QUICK = ["--seconds", "0.02", "--threads", "1"]


def test_percentiles_by_hand():
    assert percentiles([float(n) for n in range(100, 0, -1)]) == {"p50": 50, "p95": 95, "p99": 99}
    assert percentiles([7.0]) == {"p50": 7, "p95": 7, "p99": 7}
    assert percentiles([1.0, 2.0]) == {"p50": 1, "p95": 2, "p99": 2}


@pytest.mark.parametrize("count", [3, 17, 240])
def test_percentiles_are_those_of_numpy(count):
    values = np.random.default_rng(count).exponential(size=count).tolist()
    expected = np.percentile(values, (50, 95, 99), method="inverted_cdf")
    assert list(percentiles(values).values()) == pytest.approx(expected.tolist(), abs=5e-4)


@pytest.mark.parametrize("tokens", [2, 3, 24, 51, 52, 75, 101, 127])
def test_a_caption_of_any_length(bundle, tokens):
    opened = Bundle.open(bundle("hammer", "fp32").path)
    caption = make_caption(opened, tokens)
    assert len(CaptionTokenizer(opened.verified("tokenizer.json"))(caption)[1].ids) == tokens


@pytest.mark.parametrize("tokens", [1, 128])
def test_tokens_outside_the_limits(bundle, tokens):
    with pytest.raises(InputError, match=f"expected 2 to 127, the bundle's limits, got {tokens}"):
        bench.check_options(Bundle.open(bundle("hammer", "fp32").path), BenchOptions(tokens=tokens))


class Double:
    """A process of a backend that answers at once, and notes what it is asked."""

    def __init__(self, log, name, fails_at=None):
        self.log, self.name, self.fails_at = log, name, fails_at
        self.model = {"backend": name, "device": "cpu"}

    def close(self):
        self.log.append(("close", self.name))

    def warm_up(self, batch, tokens):
        self.log.append(("warm", self.name, batch, tokens))

    def turn(self, batch, caption, seconds):
        if batch == self.fails_at:
            raise BackendError("out of memory")
        self.log.append((self.name, batch, len(caption.split()), seconds))
        return [Call(4.0, 1.0, 2.0, 1.0)] * 3


@pytest.fixture
def doubles(monkeypatch):
    """Let `bench` meet doubles called a and b in place of backends; b fails at batch 4. The calls' log."""
    log = []

    def make(_bundle, name, *_, **__):
        if name == "c":
            raise BackendError("needs c, which is not installed")
        return Double(log, name, fails_at=4 if name == "b" else None)

    monkeypatch.setattr(bench, "Server", make)
    monkeypatch.setattr(bench, "known", lambda: ["a", "b", "c"])
    return log


def test_backends_take_turns(doubles, bundle):
    options = BenchOptions(batches=(2,), tokens=5, seconds=1.0)
    found = bench.bench(Bundle.open(bundle("hammer", "fp32").path), options)
    turns = [entry for entry in doubles if entry[0] in "ab"]
    assert "".join(entry[0] for entry in turns) == "abbaabbaab"  # the first one alternates
    assert {entry[1:] for entry in turns} == {(2, 4, 0.2)}
    assert [entry for entry in doubles if entry[0] == "warm"] == [("warm", n, 2, 5) for n in "ab"]
    assert [(row.backend, row.calls) for row in found.rows] == [("a", 15), ("b", 15)]
    assert found.rows[0].inference == dict.fromkeys(("p50", "p95", "p99"), 2.0)
    assert (found.rows[0].pairs_per_s, found.rows[0].model_pairs_per_s) == (500, 1000)
    assert doubles[-2:] == [("close", "b"), ("close", "a")]


class Counted:
    """A predictor whose inference takes a known time by its own account, and which counts its calls."""

    calls = 0

    def predict(self, image, caption):
        self.calls += 1
        return SimpleNamespace(timing={"inference": 1e-5, "postprocess": 2e-5})

    def predict_batch(self, pairs):
        return [self.predict(*pair) for pair in pairs]


def test_the_first_call_of_a_turn_is_not_counted_and_parts_add_up():
    predictor = Counted()
    (call,) = take_turn(predictor, [(None, "")] * 3, 1e-9)
    assert predictor.calls == 2 * 3
    assert call.inference == pytest.approx(3e-5)
    assert call.postprocess == pytest.approx(6e-5)
    assert call.preprocess + call.inference + call.postprocess == pytest.approx(call.total)
    (single,) = take_turn(predictor, [(None, "")], 1e-9)
    assert single.inference == pytest.approx(1e-5)


def test_a_process_that_crashes_is_the_error_of_its_backend(bundle):
    server = Server(bundle("hammer", "fp32").path, "ort", "cpu", 1)
    assert server.model["backend"] == "ort"
    assert len(server.turn(1, "q q", 1e-9)) == 1
    os.kill(server._process.pid, signal.SIGSEGV)
    with pytest.raises(BackendError, match="its process ended with SIGSEGV; run it alone"):
        server.turn(1, "q q", 1e-9)
    server.close()
    with pytest.raises(BundleError, match="not a bundle"):
        Server(bundle("hammer", "fp32").path / "nothing", "ort", "cpu", 1)


def test_a_backend_that_fails_leaves_the_others(doubles, bundle):
    options = BenchOptions(batches=(1, 4), tokens=5, seconds=1e-9)
    found = bench.bench(Bundle.open(bundle("hammer", "fp32").path), options)
    assert [(row.backend, row.batch) for row in found.rows] == [("a", 1), ("b", 1), ("a", 4)]
    assert str(found.failed["b"]) == "batch 4: out of memory"
    assert found.absent == {"c": "needs c, which is not installed"}


def test_nothing_to_measure(doubles, bundle):
    options = BenchOptions(backends=("c",), tokens=5)
    with pytest.raises(BackendError, match="no backend here serves this bundle; c: needs c"):
        bench.bench(Bundle.open(bundle("hammer", "fp32").path), options)
    options = BenchOptions(backends=("b",), batches=(4,), tokens=5)
    with pytest.raises(BackendError, match="nothing was measured; b: batch 4: out of memory"):
        bench.bench(Bundle.open(bundle("hammer", "fp32").path), options)


def test_the_failure_of_one_backend_is_told_and_sets_the_exit_code(doubles, bundle, capsys):
    arguments = ["bench", str(bundle("hammer", "fp32").path), "--batch", "4,1", *QUICK]
    assert cli.main(arguments) == BackendError.exit_code
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "dgm4: b was not measured: batch 4: out of memory"
    assert "\nc: not measured: needs c, which is not installed\n" in out
    assert cli.main([*arguments[:-4], "--backend", "ort", *QUICK, "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_real_backends(bundle, capfd):
    path, named = bundle("asap", "fp32").path, ["--backend", "ort", "--backend", "torch"]
    arguments = ["bench", str(path), "--batch", "2,1", "--tokens", "9", *named, *QUICK]
    assert cli.main([*arguments, "--json"]) == 0
    printed = capfd.readouterr()
    assert "weights" not in printed.err  # of drawn weights, whose answers nobody reads
    record = json.loads(printed.out)
    cells = [(row["backend"], row["batch"]) for row in record["rows"]]
    assert cells == [("ort", 1), ("torch", 1), ("ort", 2), ("torch", 2)]
    assert (record["absent"], record["failed"]) == ({}, {})
    assert record["model"] == {"name": "asap", "size": "tiny", "precision": "fp32"}
    assert record["machine"]["cores"] >= 1
    for row in record["rows"]:
        assert row["calls"] >= bench.TURNS
        assert 0 < row["total"]["p50"] <= row["total"]["p95"] <= row["total"]["p99"]
        assert 0 < row["inference"]["p50"] < row["total"]["p50"]
        assert row["pairs_per_s"] < row["model_pairs_per_s"]


def found_of(*rows):
    """Measurements whose numbers are chosen: (backend, batch, ms a call)."""
    made = [
        bench.Row(
            backend,
            "cpu",
            None,
            batch,
            5,
            *[dict.fromkeys(("p50", "p95", "p99"), ms)] * 4,
            1e3 * batch / ms,
            1.0,
        )
        for backend, batch, ms in rows
    ]
    machine = {"processor": {}, "system": "Linux", "cores": 2, "load": 0.5, "gpus": ["H200, 580.1"]}
    model = {"name": "asap", "size": "base", "precision": "fp16"}
    return bench.Bench("b", model, BenchOptions(), machine, made)


def test_the_table_by_hand():
    lines = cli_bench.table(found_of(("ort", 1, 20.0), ("torch", 32, 400.0))).splitlines()
    assert lines[0] == "asap base fp16: 24 tokens, images of 640 x 480"
    assert lines[1:3] == ["Linux, 2 cores, load 0.5 at the start", "H200, 580.1"]
    assert lines[4].split()[:4] == ["backend", "device", "threads", "batch"]
    assert lines[5].split()[:9] == ["ort", "cpu", "2", "1", "5", "20.0", "20.0", "20.0", "50.0"]
    assert lines[6].split()[:9] == ["torch", "cpu", "2", "32", "5", "400.0", "400.0", "400.0", "80.0"]


def test_bad_input_exits_with_1(bundle, capsys):
    assert cli.main(["bench", str(bundle("hammer", "fp32").path), "--out", "absent/table.txt"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "a folder that exists" in err


def test_a_damaged_bundle_exits_with_1(bundle, tmp_path, capsys):
    """As in every verb, whatever backends make of it."""
    path = Path(shutil.copytree(bundle("hammer", "fp32").path, tmp_path / "bundle"))
    with (path / "model.onnx.data").open("r+b") as file:
        file.write(b"altered")
    assert cli.main(["bench", str(path), "--backend", "ort", "--batch", "1", *QUICK]) == 1
    assert "model.onnx.data: expected SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "64"], "--batch: expected at most 32, the bundle's limit, got 64"),
        (["--tokens", "1000"], "--tokens: expected 2 to 127, the bundle's limits, got 1000"),
        (["--backend", "magic"], "argument --backend: expected one of ort, torch"),
    ],
)
def test_what_the_bundle_does_not_take_exits_with_2(bundle, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", str(bundle("hammer", "fp32").path), *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--batch", "0"], ["--batch", "1,x"], ["--seconds", "0"], ["--seconds", "nan"]]
)
def test_values_that_do_not_fit_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "bundle", *arguments])
    assert caught.value.code == 2
    assert "got '" in capsys.readouterr().err


def test_an_absent_backend_that_was_asked_for(bundle, capsys):
    arguments = ["bench", str(bundle("hammer", "fp32").path), "--backend", "ort", "--backend", "tensorrt"]
    assert cli.main([*arguments, "--batch", "1", *QUICK]) == BackendError.exit_code
    out, err = capsys.readouterr()
    assert "\nort " in out
    assert "dgm4: tensorrt was not measured: the backend 'tensorrt' needs" in err
