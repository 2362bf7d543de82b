"""Benchmarks of the kernels without a GPU: right contenders, a gate before the clock, rates and times."""

from __future__ import annotations

import importlib

import pytest
import torch

from benchmarks import timing
from benchmarks.gpu import checks
from benchmarks.kernels import bench as module
from benchmarks.kernels.bench import Bench, candidates, decoded, error, grid, measure, sweep
from kernels.jit import Tiles

GPU_ALONE = ("compile", "memory-efficient", "cudnn")


@pytest.fixture(scope="module")
def small():
    return {op: list(checks.benches(op, device="cpu", batch=2, small=True)) for op in checks.OPERATORS}


def all_of(small):
    return [bench for benches in small.values() for bench in benches]


def test_every_kernel_has_a_benchmark_of_its_name(small):
    shared = {"attention_tiles", "jit", "resize_tables", "rows"}
    kernels = {path.stem for path in (checks.ROOT / "kernels").glob("*.py")} - shared
    assert set(checks.OPERATORS) == kernels | {"linear"}
    benches = all_of(small)
    assert len({bench.name for bench in benches}) == len(benches) == 25
    assert all(next(iter(bench.forms)) == "ours" and bench.bytes > 0 for bench in benches)


def test_all_contenders_give_the_same_answer(small):
    tried = 0
    for bench in all_of(small):
        for name, form in bench.forms.items():
            if not any(part in name for part in GPU_ALONE):
                assert error(bench, form) <= bench.right * 0.6, (bench.name, name)
                tried += 1
    assert tried == 69


def test_bytes_and_flops_at_the_shapes_of_the_docstrings():
    """Query, key, value and answer in bf16 and the map in float32, once each; two products, and the map's."""
    found = {b.name: b for b in checks.benches("attention", device="cpu", batch=2)}
    plain, guided = found["attention, mgca"], found["attention with map, mgca"]
    assert plain.bytes == 2 * 2 * 2 * 768 * (50 + 257)
    assert guided.bytes - plain.bytes == 4 * 2 * 50 * 257
    assert plain.flops == 2 * 2 * 2 * 50 * 257 * 768
    assert guided.flops == plain.flops * 3 // 2


def test_a_wrong_or_failing_contender_is_not_timed(small, monkeypatch):
    monkeypatch.setattr(module, "time_rotating", lambda *_: {"p50_ms": 1.0})
    (bench,) = small["latent_pool"]

    def broken(*inputs):
        raise ValueError("no such tile")

    forms = {
        "ours": bench.forms["ours"],
        "wrong": lambda *inputs: 1.1 * bench.forms["ours"](*inputs),
        "nan": lambda *inputs: bench.forms["ours"](*inputs) * float("nan"),
        "broken": broken,
    }
    (row,) = measure([Bench("b", bench.inputs, bench.reference, forms, 1, 1)])
    rows = {form["form"]: form for form in row["forms"]}
    assert [name for name, form in rows.items() if "p50_ms" in form] == ["ours"]
    assert rows["wrong"]["error"] == pytest.approx(0.1, rel=0.1)
    assert rows["broken"]["failed"] == "ValueError: no such tile"
    found = measure([Bench("b", bench.inputs, bench.reference, {"ours": broken}, 1, 1)])
    assert "failed" in next(found)["forms"][0]
    with pytest.raises(RuntimeError, match="b: .*no such tile"):
        next(found)


def test_a_sweep_keeps_what_compiles(monkeypatch):
    monkeypatch.setattr(module, "time_rotating", lambda *_: {"p50_ms": 1.0})
    x = torch.ones(4)

    def schedule(tiles):
        if tiles.warps == 8:
            raise RuntimeError("out of resources")
        return lambda x: x * tiles.block_m / 16

    chosen = Bench(
        "b", (x,), lambda x: x, {}, 1, 1, schedule=schedule, candidates=grid((16, 32), (16,), stages=(2,))
    )
    rows = list(sweep([chosen, Bench("none", (x,), lambda x: x, {}, 1, 1)]))
    assert [(r["tiles"]["block_m"], r["tiles"]["warps"], r.get("p50_ms")) for r in rows] == [
        (16, 4, 1.0),
        (16, 8, None),
        (32, 4, None),
        (32, 8, None),
    ]
    assert rows[1]["failed"] == "RuntimeError: out of resources"
    assert rows[2]["error"] == 1


def test_a_kernels_schedules_come_first():
    assert candidates([Tiles(5, 7, 4, 2)], [Tiles(8, 8, 4, 2), Tiles(5, 7, 4, 2)]) == [
        Tiles(5, 7, 4, 2),
        Tiles(8, 8, 4, 2),
    ]


@pytest.mark.parametrize(
    ("module", "shape"),
    [("attention", (50, 257, 64, torch.bfloat16)), ("conv_fusion", (768, torch.bfloat16))],
)
def test_every_schedule_of_a_kernel_is_timed(module, shape):
    offered = importlib.import_module(f"kernels.{module}").schedules(*shape)
    given = importlib.import_module(f"benchmarks.kernels.{module}").benches(device="cpu", batch=1)
    timed = [bench.candidates for bench in given if bench.candidates]
    assert any(set(offered) <= set(candidates) for candidates in timed)


def test_codes_mean_their_values():
    codes = torch.tensor([[1.0, 2.0], [4.0, -8.0]]).to(torch.float8_e4m3fn)
    assert decoded((codes, torch.tensor([2.0, 0.5]))).tolist() == [[2, 4], [2, -4]]
    assert decoded((codes, torch.tensor([3.0]))).tolist() == [[3, 6], [12, -24]]


def test_times_are_of_one_call(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "time_ms", lambda run, budget: run() and {"p50_ms": 6.0, "p95_ms": 9.0})
    sets = [(torch.zeros(1),)] * 3
    found = timing.time_rotating(lambda x: calls.append(x) or 1, sets)
    assert (found, len(calls)) == ({"p50_ms": 2.0, "p95_ms": 3.0, "calls_a_graph": 3}, 3)

    def refuse(run):
        raise RuntimeError("not while capturing")

    monkeypatch.setattr(timing, "capture", refuse)
    found = timing.time_rotating(lambda x: 1, sets)
    assert found == {"p50_ms": 6.0, "p95_ms": 9.0, "calls_a_graph": 0}
    assert timing.quantile([3.0, 1.0, 2.0], 0.95) == 3.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts calls on the host")
def test_timing_warms_up_and_stops(monkeypatch):
    calls = []
    found = timing.time_ms(lambda: calls.append(1), budget_s=10.0)
    assert found["runs"] == timing.LARGEST_RUNS
    assert len(calls) == timing.LARGEST_RUNS + timing.WARM_UP
    assert found["p50_ms"] <= found["p95_ms"]


def test_rates_are_bytes_and_operations_over_time(monkeypatch):
    monkeypatch.setattr(timing, "time_ms", lambda run: {"p50_ms": 0.5} if run() is not None else {})
    found = dict(timing.rates("cpu", count=1024, side=32))
    assert found["copy_tb_s"] == pytest.approx(4 * 1024 / 0.5e-3 / 1e12)
    assert found["host_gb_s"] == pytest.approx(2 * 256 / 0.5e-3 / 1e9)
    assert found["fp8_tflop_s"] == found["bf16_tflop_s"] == pytest.approx(2 * 32**3 / 0.5e-3 / 1e12)
