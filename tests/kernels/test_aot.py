"""What the compiler says of every kernel, for every target, on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.jit import triton

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ("attention-50x257-map", "attention-257x50-mask", "conv-fusion")
PLUGIN_SHARED = 48 * 1024
REGISTERS = 255

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is not installed")


@pytest.mark.parametrize("target", [80, 90, 120])
def test_every_kernel_compiles_without_spills(target):
    """In a process of its own, since the interpreter and the compiler exclude each other.

    All targets and types: `python -m kernels.aot --json`, kept in benchmarks/results/kernels-aot.jsonl.
    """
    command = [sys.executable, "-m", "kernels.aot", "--json", "--dtypes", "fp16", "--targets", str(target)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({one["name"] for one in built}) == len(built) > 0
    assert not [(one["name"], one["stack"]) for one in built if one["stack"]]
    assert all(0 < one["registers"] <= REGISTERS for one in built)
    for one in built:
        if one["name"].startswith(PLUGINS):
            assert one["shared"] <= PLUGIN_SHARED, one["name"]
