"""The proof command, as far as it goes without a GPU: right contenders, parts that resume."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import kernels
from benchmarks.gpu.timing import quantile


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return list(kernels.benches("cpu", batch=2, small=True))


def test_every_kernel_has_a_bench(small):
    assert len({bench.name for bench in small}) == len(small) == 8
    assert all(next(iter(bench.forms)) == "ours" and bench.bytes > 0 and bench.flops > 0 for bench in small)


def test_all_contenders_give_the_same_answer(small):
    """torch.compile and the backends that a CPU lacks apart."""
    tried = 0
    for bench in small:
        for name, form in bench.forms.items():
            if "compile" in name or any(part in name for part in ("memory-efficient", "cudnn")):
                continue
            assert kernels.error(bench, form) <= kernels.RIGHT / 2, (bench.name, name)
            tried += 1
    assert tried == 23


def test_a_wrong_contender_is_not_timed(small, monkeypatch):
    bench = small[0]
    bench.forms["wrong"] = lambda query, key, value: 2 * query
    monkeypatch.setattr(kernels, "capture", lambda run: run)
    monkeypatch.setattr(kernels, "time_ms", lambda run: {"p50_ms": 1.0})
    rows = {row["form"]: row for row in kernels.measure(bench, 4.0, 800.0)["forms"]}
    assert "p50_ms" in rows["ours"]
    assert "p50_ms" not in rows["wrong"]
    assert rows["wrong"]["error"] > kernels.RIGHT
    assert "failed" in rows["sdpa cudnn"]


def test_finished_parts_are_kept_and_late_ones_wait(tmp_path, capsys):
    parts = command.Parts(tmp_path, minutes=1.0)
    assert parts.run("one", lambda: {"x": 1}, needs_s=5) == {"x": 1}
    assert parts.run("one", lambda: {"x": 2}, needs_s=5) == {"x": 1}
    assert parts.run("two", lambda: {"x": 3}, needs_s=600) is None
    assert not (tmp_path / "two.json").exists()
    assert json.loads((tmp_path / "one.json").read_text()) == {"x": 1}
    assert "two: not run" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path / "out")])
    assert command.main() == 4
    assert "no CUDA device is visible" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quantile():
    assert quantile([3.0, 1.0, 2.0], 0.95) == 3.0
    assert quantile([5.0], 0.95) == 5.0
