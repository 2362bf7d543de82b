"""What the compiler says of every kernel, for every target, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.jit import triton

ROOT = Path(__file__).resolve().parents[3]
PLUGINS = ("attention-50x257-map", "attention-257x50-mask", "conv-fusion")
KINDS = (
    *PLUGINS,
    "attention-50x257",
    "attention-257x257-bias",
    "attention-256x256-pairs-d192",
    "gaussian",
    "latent",
    "norm-768-post",
    "gelu-3072-e4m3-own",
    "quantize-768-i8-own",
)
TARGETS = (80, 86, 89, 90, 100, 120)
PLUGIN_SHARED = 48 * 1024
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
REGISTERS = 255

REPORT = ROOT / "benchmarks" / "results" / "kernels-aot.jsonl"


def records(text):
    built = [json.loads(line) for line in text.splitlines()]
    assert len({(one["name"], one["capability"]) for one in built}) == len(built) > 0
    assert not [(one["name"], one["stack"]) for one in built if one["stack"]]
    assert all(0 < one["registers"] <= REGISTERS for one in built)
    assert not [one for one in built if one["shared"] > SHARED[one["capability"]]]
    return built


def test_the_committed_report_has_no_spills_on_any_target():
    built = records(REPORT.read_text())
    names = [{one["name"] for one in built if one["capability"] == target} for target in TARGETS]
    assert all(some == names[0] for some in names)
    assert {one["name"].rpartition("-")[2] for one in built} == {"fp32", "fp16", "bf16"}


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_kernels_compile_without_spills():
    """One of each kind, in a process of its own, since the interpreter and the compiler exclude each other.

    All of them: `python -m kernels.tools.aot --json`, kept in benchmarks/results/kernels-aot.jsonl.
    """
    command = [
        sys.executable,
        "-m",
        "kernels.tools.aot",
        "--json",
        "--dtypes",
        "fp16",
        "--targets",
        "80",
        "90",
        "120",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [*command, "--only", *KINDS], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    built = records(done.stdout)
    kept = {one["name"] for one in records(REPORT.read_text())}
    assert {one["name"] for one in built} <= kept
    for one in built:
        if one["name"].startswith(PLUGINS):
            assert one["shared"] <= PLUGIN_SHARED, one["name"]
