"""The proof command, as far as it goes without a GPU: parts in their own processes, records that resume."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import checks, hotspots, networks, parts
from benchmarks.gpu.runner import CUT, DONE, FAILED, Part, Results, run_all, run_part, select
from benchmarks.gpu.worker import plain
from benchmarks.machine import describe_machine
from engine.registry import NETWORKS
from kernels.jit import triton

STUB = """
import os, subprocess, sys, time

def good(name):
    yield {"name": name, "error": float("nan")}

def bad():
    yield {"row": 1}
    raise ValueError("what went wrong")

def fault():
    yield {"row": 1}
    os.abort()

def hang(path):
    yield {"row": 1}
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(path, "w").write(str(child.pid))
    time.sleep(60)
"""
GOOD = Part("good", "stub:good", ("x",), limit_s=30, needs_s=1)
PLUGINS = "benchmarks.gpu.plugins"  # which compiles, so needs Triton
BAD = Part("bad", "stub:bad", limit_s=30, needs_s=1)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_rows_of_a_part_and_the_end_of_a_failed_one(stub):
    record = run_part(GOOD, 30)
    assert (record["state"], record["code"]) == (DONE, 0)
    assert record["rows"] == [{"name": "x", "error": None}]
    assert "tail" not in record
    record = run_part(BAD, 30)
    assert (record["state"], record["rows"]) == (FAILED, [{"row": 1}])
    assert "what went wrong" in record["tail"]
    record = run_part(Part("fault", "stub:fault"), 30)
    assert (record["state"], record["rows"]) == (FAILED, [{"row": 1}])
    assert record["code"] < 0
    assert "in fault" in record["tail"]  # the stack that faulthandler writes


def test_a_hanging_part_is_ended_with_all_it_started(stub):
    part = Part("hang", "stub:hang", (str(stub / "pid"),), limit_s=4.0)
    record = run_part(part, 100)
    assert (record["state"], record["code"], record["rows"]) == (FAILED, None, [{"row": 1}])
    assert "in hang" in record["tail"]
    pid = int((stub / "pid").read_text())
    for _ in range(20):
        if not alive(pid):
            break
        time.sleep(0.05)
    assert not alive(pid)
    assert run_part(part, 1.0)["state"] == CUT  # by the call's time, not by its own


def test_every_part_is_recorded_at_once_and_what_failed_comes_last(stub, capsys):
    results = Results(stub / "out" / "gpu.json", calls=[{"commit": "a"}])
    late = Part("late", "stub:good", ("x",), needs_s=10_000)
    assert run_all(results, [BAD, GOOD, late], time.monotonic() + 100) == ["late"]
    stored = json.loads(results.path.read_text())["parts"]
    assert {name: record["state"] for name, record in stored.items()} == {"bad": FAILED, "good": DONE}
    assert "what went wrong" in capsys.readouterr().err
    other = Results(stub / "other.json")
    other.load(results.path)
    assert other.calls == [{"commit": "a"}]
    assert [part.name for part in other.pending([BAD, GOOD, late])] == ["late", "bad"]
    assert [part.name for part in other.pending([BAD, GOOD], again=True)] == ["bad", "good"]
    other.parts["bad"] = {"state": DONE}
    other.load(results.path)
    assert other.parts["bad"] == {"state": DONE}


def test_the_command_resumes_from_a_file(stub, monkeypatch, capsys):
    monkeypatch.setattr(command, "parts", lambda: [BAD, GOOD])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "gpu_state", lambda: {"name": "none"})

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu", *map(str, arguments)])
        return command.main()

    assert run("--out", stub / "a", "--only", "goo") == 0
    first = stub / "a" / "gpu.json"
    assert run("--out", stub / "b", "--resume", first) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "done": 1,
        "of": 2,
        "failed": ["bad"],
        "no time for": [],
    }
    stored = json.loads((stub / "b" / "gpu.json").read_text())
    assert [record["call"] for record in stored["parts"].values()] == [0, 1]
    assert stored["parts"]["good"] == json.loads(first.read_text())["parts"]["good"]
    assert len(stored["calls"]) == 2
    assert run("--list", "--resume", stub / "b" / "gpu.json") == 0
    assert capsys.readouterr().out.splitlines() == ["bad: failed", "good: done"]
    first.write_text("{")
    assert run("--out", stub / "a", "--only", "good") == 0
    assert "not taken over" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        run("--out", stub / "a", "--resume", stub / "none.json")
    assert caught.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path / "out")])
    assert command.main() == 4
    assert "no CUDA device is visible" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parts_are_found_and_named_once():
    found = parts.parts()
    names = [part.name for part in found]
    assert len(set(names)) == len(names)
    assert names[:2] == ["machine", "smoke"]
    assert "compile" in names[-1]
    assert all(part.needs_s < part.limit_s <= 540 for part in found)
    paths = [x.removeprefix("--ignore=") for part in found for x in part.arguments if "tests/" in x]
    assert len(paths) > 15
    assert [path for path in paths if not (checks.ROOT / path).exists()] == []
    tools = [part.arguments[0] for part in found if part.call.endswith(":sanitize")]
    assert sorted(set(tools)) == sorted(checks.TOOLS)
    for part in found:
        module, _, function = part.call.partition(":")
        if triton is not None or module != PLUGINS:
            assert callable(getattr(importlib.import_module(module), function))
    assert [p.name for p in select(found, ["kernel-g"])] == ["kernel-gaussian_guidance", "kernel-gelu"]
    assert {p.arguments[1] for p in found if p.name.startswith("network")} <= set(networks.VARIANTS)


def test_every_network_is_measured_in_every_way():
    """As the record has them, so that a new one is measured without being named."""
    found = [part.name for part in parts.parts()]
    ways = ["ours-bf16", "ours-fp16", "ours-fp8", "published-fp32", "published-bf16"]
    wanted = [f"network-{name}-{way}" for name in NETWORKS for way in (*ways, "compile-max-autotune-64x50")]
    wanted += [f"engine-{name}-{precision}" for name in NETWORKS for precision in ("fp16", "bf16")]
    assert sorted(set(wanted) - set(found)) == []


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "asap"])
@pytest.mark.parametrize("variant", ["ours-fp16", "published-fp32"])
def test_every_network_gets_its_own_inputs(name, variant, monkeypatch):
    """A box where it judges one; and none gets a batch of more work than is allowed."""
    monkeypatch.setattr(networks, "time_ms", lambda run: run() and {"p50_ms": 2.0})
    monkeypatch.setattr(networks, "LARGEST_GFLOP", 100 * networks.gflop(name, 50))
    monkeypatch.setitem(networks.JUDGED, "batch", 2)
    error, *rows = networks.measure(name, variant, "2x12,1000x50", device="cpu", size="tiny")
    assert set(error["error"]) == {x.name for x in NETWORKS[name].outputs}
    assert all(0 <= e < 0.1 for e in error["error"].values())
    assert [(row["batch"], row["pairs_s"]) for row in rows] == [(2, 1000)]


def test_a_batch_with_too_much_work_is_left_out():
    shapes = {name: [s for s in networks.SHAPES if networks.fits(name, *s)] for name in NETWORKS}
    assert [name for name, own in shapes.items() if (64, 50) not in own] == []
    assert shapes["cals"] == list(networks.SHAPES)
    assert (256, 50) not in shapes["pmmd"]


@pytest.mark.parametrize("variant", ["ours-fp8", "published-bf16"])
def test_a_network_is_timed_beside_its_error(variant, monkeypatch):
    monkeypatch.setattr(networks, "time_ms", lambda run: run() and {"p50_ms": 2.0})
    monkeypatch.setitem(networks.JUDGED, "batch", 2)
    error, *rows = networks.measure("asap", variant, "2x7,1x5", device="cpu", size="tiny")
    assert set(error["error"]) == {x.name for x in NETWORKS["asap"].outputs}
    assert all(0 < e < 0.3 for e in error["error"].values())
    assert [(row["batch"], row["tokens"], row["pairs_s"]) for row in rows] == [(2, 7, 1000), (1, 5, 500)]


def test_a_shape_that_fails_leaves_the_others(monkeypatch):
    def run(image, input_ids, attention_mask):
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("no room")
        return (torch.zeros(1),)

    monkeypatch.setitem(networks.VARIANTS, "compile-none", (lambda model: run, False))
    monkeypatch.setattr(networks, "time_ms", lambda run: run() and {"p50_ms": 2.0})
    found = networks.measure("asap", "compile-none", "3x5,1x5", device="cpu", size="tiny")
    assert [row.get("too large", row.get("pairs_s")) for row in found] == ["no room", 500]


def test_a_shape_that_fails_otherwise_fails_its_part_at_the_end(monkeypatch):
    def run(image, input_ids, attention_mask):
        if len(input_ids) > 1:
            raise RuntimeError("odd")
        return (torch.zeros(1),)

    monkeypatch.setitem(networks.VARIANTS, "compile-none", (lambda model: run, False))
    monkeypatch.setattr(networks, "time_ms", lambda run: run() and {"p50_ms": 2.0})
    found = networks.measure("asap", "compile-none", "2x5,1x5", device="cpu", size="tiny")
    assert "odd" in next(found)["failed"]
    assert next(found)["pairs_s"] == 500
    with pytest.raises(RuntimeError, match="2x5: RuntimeError: odd"):
        next(found)


def test_photographs_to_logits(monkeypatch):
    monkeypatch.setattr(networks, "time_ms", lambda run: run() and {"p50_ms": 2.0})
    rows = list(networks.pictures("asap", "ours-bf16", [1], device="cpu", size="tiny"))
    assert [(row["from"], row["pairs_s"]) for row in rows] == [("device", 500), ("pinned memory", 500)]


def test_where_the_time_goes():
    total, *rows = hotspots.measure("asap", "ours-bf16", 1, 5, device="cpu", size="tiny")
    assert total["kernels"] > len(rows) == hotspots.LARGEST
    assert [row["us"] for row in rows] == sorted((row["us"] for row in rows), reverse=True)
    assert 0.5 < sum(row["share"] for row in rows) <= 1
    assert sum(row["us"] for row in rows) <= total["total_us"]


def test_smoke_tells_every_operator_and_ends_with_what_is_wrong(monkeypatch):
    rows = list(checks.smoke("cpu"))
    assert [row["operator"] for row in rows] == list(checks.OPERATORS)
    assert all(row["errors"] and row["failed"] is None for row in rows)
    monkeypatch.setattr(checks, "OPERATORS", ("gelu", "nothing"))
    monkeypatch.setattr(checks, "error", lambda bench, form: 1.0)
    found = checks.smoke("cpu")
    assert [next(found)["operator"], next(found)["failed"][:19]] == ["gelu", "ModuleNotFoundError"]
    with pytest.raises(RuntimeError, match="bias and gelu: error 1; .*nothing: ModuleNotFoundError"):
        next(found)


def test_tests_are_counted_and_their_failures_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "test_two.py").write_text("def test_a(): pass\ndef test_b(): assert 1 == 2\n")
    # A prefix keeps it from starting workers, whose plugin is not loaded here.
    found = checks.tests("--override-ini=addopts=", str(tmp_path), prefix=("env",))
    row = next(found)
    assert (row["code"], row["counts"]) == (1, {"failed": 1, "passed": 1})
    assert "test_b" in row["failed"][0]
    with pytest.raises(RuntimeError, match="test_b"):
        next(found)
    assert "assert 1 == 2" in capfd.readouterr().out  # what a killed part would leave


def test_a_machine_without_tools_is_described(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("DGM4_COMMIT", "0123abc")
    assert describe_machine()["commit"] == "0123abc"
    monkeypatch.delenv("DGM4_COMMIT")
    record = describe_machine()
    assert record["commit"] == "unknown"
    assert len(record["source"]) == 16
    assert "failed" in checks.gpu_state()
    monkeypatch.setattr(checks, "SANITIZERS", ("none",))
    missing = {"missing": "compute-sanitizer is not installed"}
    assert [list(checks.sanitize(tool, "a.py")) for tool in checks.TOOLS] == [[missing]] * 4


def test_a_sanitizer_runs_the_small_cases_of_its_files(tmp_path, monkeypatch):
    """A double that prints what it is given, and fails as the tool does."""
    program = tmp_path / "sanitizer"
    program.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@"\nexit 9\n')
    program.chmod(0o755)
    monkeypatch.setattr(checks, "SANITIZERS", ("none", str(program)))
    found = checks.sanitize("racecheck", "a.py", "b.py")
    row = next(found)
    assert row["code"] == 9
    assert row["tail"].startswith(f"1 --tool racecheck --error-exitcode 9 {sys.executable} -m pytest ")
    assert row["tail"].endswith(f"-k {checks.CHECKED} a.py b.py\n")
    with pytest.raises(RuntimeError, match="exit code 9"):
        next(found)


def test_numbers_that_json_lacks_are_none():
    assert plain({"a": [float("inf"), 1.5], "b": (2, "x")}) == {"a": [None, 1.5], "b": [2, "x"]}
