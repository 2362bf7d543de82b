"""Every network in every precision as a real TensorRT-RTX engine, built from what an export writes."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from export.graph.trace import data_of
from export.trt import build
from export.trt.engine_file import build_into
from export.trt.options import EngineOptions
from export.trt.profiles import Shapes

PRECISIONS = ("fp32", "fp16", "bf16", "int8 in fp16", "fp8")
TARGETS = ("8.9", "12.0")  # those with E4M3
AT_ONCE = 2  # builders: each is a process with one busy thread
MEMORY_MB = 1500


@pytest.fixture(scope="module")
def engines(bundle, static_graph):
    """Build a network's engines by its name: what came of each precision, to be asked for by `result()`."""
    pytest.importorskip("tensorrt_rtx")

    @functools.cache
    def build(name):
        graphs = {precision: graph(name, precision) for precision in PRECISIONS}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return {p: pool.submit(build_one, path, p.partition(" ")[0]) for p, path in graphs.items()}

    def graph(name, precision):
        if precision.startswith(("int8", "fp8")):
            return static_graph(name, precision)
        return bundle(name, precision).path / "model.onnx"

    return build


def build_one(graph, precision, least=2):
    """The engine's entry, its bytes and those of the graph's weights; the file is gone."""
    rtx = next(info for info in build.describe_builders() if info.library == "tensorrt_rtx")
    shapes = Shapes(max_batch=2, min_tokens=least, typical_tokens=16, max_tokens=24, image_size=256)
    writer = SimpleNamespace(path=lambda name: graph.parent / name)
    entry, _ = build_into(writer, rtx, TARGETS, shapes, EngineOptions(), precision)
    engine = graph.parent / entry.file
    size = engine.stat().st_size
    engine.unlink()
    return entry, size, data_of(graph).stat().st_size


@pytest.mark.timeout(900)  # a network's first test exports and builds all of its engines
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_network_in_every_precision(engines, name, precision):
    entry, size, weights = engines(name)[precision].result()
    assert size > weights, "the weights are inside"
    assert entry.compute_capabilities == TARGETS
    assert [profile["input_ids"].max for profile in entry.profiles] == [(2, 24)]
    assert entry.build.peak_memory_mb < MEMORY_MB
    if "fp16" in precision:
        assert entry.fused_attention > 3
    if precision == "fp32":
        assert entry.fused_attention == 0


@pytest.mark.timeout(900)
def test_a_network_that_chooses_neighbours(bundle):
    """Eight TopK, four ScatterElements, masks of pairs: all of it parses and builds."""
    pytest.importorskip("tensorrt_rtx")
    entry, size, weights = build_one(bundle("cscl", "fp32").path / "model.onnx", "fp32", least=9)
    assert size > weights
    assert entry.profiles[0]["input_ids"].min == (1, 9)
