"""The tables of a made-up record."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.gpu import report
from benchmarks.gpu.record import Measured
from benchmarks.gpu.targets import FIGURES


def form(name, ms=None):
    return {"form": name} | ({} if ms is None else {"p50_ms": ms})


def bench(name, moved, flops, *forms, unit="bf16"):
    return {"name": name, "bytes": moved, "flops": flops, "unit": unit, "forms": list(forms)}


def timed(network, variant, batch, tokens, ms, **more):
    times = {"p50_ms": ms, "p95_ms": ms, "pairs_s": 1e3 * batch / ms, "tflop_s": 400.0, "peak_gb": 2.5}
    return {"network": network, "variant": variant, "batch": batch, "tokens": tokens, **times, **more}


def part(*rows, state="done"):
    return {"state": state, "rows": list(rows)}


MGCA = bench(
    "attention, mgca", 43_000_000, 4, form("ours", 0.02), form("sdpa flash", 0.03), form("sdpa cudnn")
)
GUIDED = bench(
    "attention with map, mgca",
    43_000_000,
    4,
    form("ours", 0.025),
    form("published", 0.2),
    form("published, torch.compile", 0.09),
    form("sdpa flash + product", 0.02),
)
FUSION = bench("conv-attention fusion", 43_000_000, 4, form("ours", 0.02), form("published", 5.0))
LINEAR = bench("linear, qkv", 4, 1_600_000_000, form("ours"), form("bf16", 0.1), unit="fp8")
RECORD = {
    "calls": [{"gpu": {"name": "NVIDIA H200"}, "commit": "0123abc"}, {"gpu": {}, "commit": "0123abc"}],
    "parts": {
        "machine": part(
            {"gpu": "NVIDIA H200"},
            {"rate": "copy_tb_s", "value": 4.3},
            {"rate": "bf16_tflop_s", "value": 800.0},
            {"rate": "fp8_tflop_s", "value": 1600.0},
        ),
        "kernel-attention": part(MGCA, GUIDED),
        "kernel-conv_fusion": part(FUSION),
        "kernel-linear": part(LINEAR, state="failed"),
        "network-asap-ours-bf16": part(
            {"network": "asap", "variant": "ours-bf16", "error": {"box": 0.004, "logits_tok": 0.03}},
            timed("asap", "ours-bf16", 64, 50, 8.0),
            timed("asap", "ours-bf16", 1, 50, 1.0),
        ),
        "network-asap-published-fp32": part(
            timed("asap", "published-fp32", 64, 50, 120.0),
            timed("asap", "published-fp32", 1, 50, 12.0),
            {"network": "asap", "variant": "published-fp32", "batch": 256, "tokens": 50, "failed": "memory"},
        ),
        "pictures-asap-ours-bf16": part(
            timed("asap", "ours-bf16", 1, 50, 1.3, **{"from": "device"}),
            timed("asap", "ours-bf16", 1, 50, 1.1, **{"from": "pinned memory"}),
        ),
        "pictures-asap-ours-fp8": part(timed("asap", "ours-fp8", 1, 50, 1.0, **{"from": "device"})),
        "profile-asap-ours-bf16": part({"total_us": 5}, {"kernel": "gemm", "us": 123.4, "share": 0.5}),
        "tests-launch": part(
            {"arguments": ["a.py"], "counts": {"passed": 3, "failed": 1}, "failed": ["a.py::t"]},
            state="failed",
        ),
        "memcheck-test_launch": part({"missing": "no tool"}),
        # Whose answers follow a choice that rounding may decide.
        "network-cscl-ours-bf16": part(
            {"network": "cscl", "variant": "ours-bf16", "error": {"logits_multicls": 0.2}}
        ),
        "engine-cals": part({"missing": "tensorrt: not installed"}),
        "engine-asap": part(
            {
                **{"network": "asap", "precision": "bf16", "plugins": 25, "fused_attention": 31},
                **{
                    "build_s": 61.0,
                    "build_peak_mb": 3000,
                    "engine_mb": 490.0,
                    "weights_mb": 465.0,
                    "size_ratio": 1.054,
                },
                "latency": {"64": {"p50": 0.5, "pairs_per_s": 128.0}},
            }
        ),
    },
}


@pytest.fixture
def found():
    return Measured(RECORD)


def test_figures_asked_and_measured(found):
    values = {figure.what: (figure.measured(found), figure.met(figure.measured(found))) for figure in FIGURES}
    assert values == {
        "MGCA, 64 pairs: times the fastest SDPA": (pytest.approx(1.5), True),
        "MGCA with map: times the published form": (pytest.approx(3.6), False),
        "MGCA with map: times SDPA and a product": (pytest.approx(0.8), False),
        "CAFormer fusion, 64 pairs": (pytest.approx(20), True),
        "CAFormer fusion: times the published form": (pytest.approx(250), True),
        "ASAP, 64 x 50, bf16": (pytest.approx(8000), True),
        "ASAP, 64 x 50, FP8": (None, None),
        "ASAP bf16: times published eager fp32": (pytest.approx(15), True),
        "ASAP bf16: times torch.compile of it in bf16": (None, None),
        "ASAP, one picture to logits": (1.0, True),
        "ASAP, one picture: times published eager fp32": (pytest.approx(12), False),
        "CALS, 64 x 50, bf16": (None, None),
        "fp16 and bf16: worst RMS error of an output": (0.03, False),
    }
    lines = report.asked(found).splitlines()
    assert "| CAFormer fusion, 64 pairs | at most 25 us | 20 us | 13 | yes |" in lines
    assert "| ASAP, 64 x 50, FP8 | at least 10,500 pairs/s | - | - | not measured |" in lines


def test_an_answer_that_is_not_finite_is_the_worst(found):
    rows = RECORD["parts"]["network-asap-ours-bf16"]["rows"]
    broken = part({**rows[0], "error": {"box": None}})
    worst = next(figure for figure in FIGURES if "worst" in figure.what)
    assert worst.measured(Measured({"calls": [], "parts": {"network-x": broken}})) == float("inf")


def test_tables_of_kernels_and_networks(found):
    """Floors by hand: 43 MB at 4.3 TB/s are 10 us; 1.6 GFLOP at 1600 TFLOP/s are 1 us."""
    lines = report.kernels(found).splitlines()
    assert "| attention, mgca | 10 | 20 | 50 % | 1.5 (sdpa flash) | - |" in lines
    assert "| attention with map, mgca | 10 | 25 | 40 % | 0.8 (sdpa flash + product) | 3.6 |" in lines
    assert "| linear, qkv | 1 | - | - | - (bf16) | - |" in lines
    lines = report.networks(found).splitlines()
    assert "| asap | 64 | 50 | 533 | - | - | - | 8,000 | - | 50 % |" in lines


def test_the_whole_report(tmp_path, monkeypatch, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(RECORD))
    monkeypatch.setattr(sys, "argv", ["report", str(path), "--full"])
    assert report.main() == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "NVIDIA H200, unknown; commit 0123abc. Not done: kernel-linear (failed), tests-launch (failed).\n"
    )
    assert "| asap | 64 | 50 | ours-bf16 | 8 | 8 | 8,000 | 2.5 | 400 | 50 % |" in text
    assert "| profile-asap-ours-bf16 | gemm | 123 | 50 % |" in text
    assert "| tests-launch | a.py | 3 passed, 1 failed | a.py::t |" in text
    assert "| ASAP | bf16 | 25 | 31 | 61.0 | 3,000 | 490 | 465 | 1.054 | 0.50 |" in text


def test_a_record_with_nothing_in_it():
    empty = Measured({"calls": [], "parts": {}})
    assert "not measured" in report.report(empty, full=True)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"parts": {}}', "\xff"])
def test_another_file_is_refused_in_a_sentence(text, tmp_path, capsys, monkeypatch):
    path = tmp_path / "other.json"
    path.write_text(text, encoding="latin-1")
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    with pytest.raises(SystemExit) as caught:
        report.main()
    assert caught.value.code == 2
    assert "other.json: no record of benchmarks.gpu" in capsys.readouterr().err
