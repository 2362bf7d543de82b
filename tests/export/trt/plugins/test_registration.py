"""Our plugins in TensorRT's genuine bindings: registered, validated, and taken through what a build asks.

Skipped where the bindings are not installed (the extra `plugins-test`, 46 MB) or there is no C compiler.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import attention, conv_fusion
from kernels.jit import triton

ROOT = Path(__file__).resolve().parents[4]
PROGRAM = Path(__file__).with_name("genuine.py")
SHARED_LIMIT = 48 * 1024
DTYPES = {"HALF": torch.float16, "FLOAT": torch.float32}


def reason():
    spec = importlib.util.spec_from_file_location("genuine", PROGRAM)
    genuine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(genuine)
    return genuine.unavailable() if triton is not None else "Triton is not installed"


pytestmark = pytest.mark.skipif(bool(reason()), reason=str(reason()))


@pytest.fixture(scope="module")
def found():
    """What the bindings gave, in a process of their own: they cannot be unloaded."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_both_are_in_the_genuine_registry(found):
    assert {("GuidedHeadAttention", "dgm4", "1"), ("ConvTokenFusion", "dgm4", "1")} <= set(
        map(tuple, found["creators"])
    )
    assert found["registered"]["dgm4::GuidedHeadAttention"] == {
        "inputs": ["query", "key", "value"],
        "outputs": 2,
        "attributes": ["heads"],
    }
    assert found["registered"]["dgm4::ConvTokenFusion"] == {
        "inputs": ["image", "tokens", "packed"],
        "outputs": 1,
        "attributes": [],
    }


def rows(found, operator):
    chosen = [row for row in found["rows"] if row["operator"] == operator]
    assert {row["dtype"] for row in chosen} == set(DTYPES)
    return chosen


def test_types_and_shapes_of_the_outputs(found):
    for row in rows(found, "GuidedHeadAttention"):
        batch, queries = row["shape"]
        assert row["types"] == [row["dtype"], "FLOAT"]
        assert row["offered"] == [row["dtype"]] * 4 + ["FLOAT"]
        assert row["shapes"] == [[batch, queries, 768], [batch, queries, 257]]
    for row in rows(found, "ConvTokenFusion"):
        assert (row["types"], row["offered"]) == ([row["dtype"]], [row["dtype"]] * 4)
        assert row["shapes"] == [[*row["shape"], 257, 768]]


def same(launch, row, parameters):
    """The build's numbers are those of the recorded launch."""
    assert [row[f"grid_{axis}"] for axis in "xyz"] == list(launch.grid)
    assert [row[f"block_{axis}"] for axis in "xyz"] == [32 * launch.arguments["num_warps"], 1, 1]
    assert row["parameters"] == parameters
    assert 0 < row["shared_mem"] <= SHARED_LIMIT


def test_launches_of_the_attention_are_the_launchers(found):
    from kernels.tools.aot import record

    for row in rows(found, "GuidedHeadAttention"):
        batch, queries = row["shape"]
        dtype = DTYPES[row["dtype"]]
        query, key = (torch.empty(batch, n, 768, dtype=dtype, device="meta") for n in (queries, 257))
        tactics = dict(enumerate(attention.schedules(50, 257, 64, dtype), start=1))
        assert {launch["tactic"] for launch in row["launches"]} <= set(tactics)
        assert row["launches"]
        for found_launch in row["launches"]:
            options = {"guided": True, "schedule": tactics[found_launch["tactic"]]}
            want = record(attention.launch, attention._attention_kernel, query, key, key, 12, **options)
            same(want, found_launch, parameters=7)
            assert found_launch["scalars"] == [want.arguments["n_queries"], want.arguments["query_batch"]]


def test_launches_of_the_fusion_are_the_launchers(found):
    from kernels.tools.aot import record

    for row in rows(found, "ConvTokenFusion"):
        dtype = DTYPES[row["dtype"]]
        shapes = ((*row["shape"], 3, 256, 256), (*row["shape"], 257, 768), (1, 768, 5, 16))
        tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
        tactics = dict(enumerate(conv_fusion.schedules(768, dtype), start=1))
        assert row["launches"]
        for found_launch in row["launches"]:
            tiles = tactics[found_launch["tactic"]]
            want = record(conv_fusion.launch, conv_fusion._fusion_kernel, *tensors, tiles)
            same(want, found_launch, parameters=4)
            assert found_launch["scalars"] == []
