"""Every network in every precision as a real TensorRT-RTX engine, built from what an export writes."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest

from dgm4.config import model_config
from export.onnx import data_of, outputs_of
from export.profiles import Shapes, profiles_of
from export.trt import EngineSpec, build_engine

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
TARGETS = ("8.9", "12.0")  # those with E4M3
AT_ONCE = 2  # builders: each is a process with one busy thread


@pytest.fixture(scope="module")
def engines(bundle, static_graph, tmp_path_factory):
    """Build a network's engines by its name: what came of each precision, to be asked for by `result()`."""
    pytest.importorskip("tensorrt_rtx")

    @functools.cache
    def build(name):
        folder = tmp_path_factory.mktemp(f"engines-{name}")
        graphs = {
            precision: graph(name, precision) for precision in PRECISIONS
        }  # traced in this thread alone
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return {
                precision: pool.submit(build_one, path, folder / f"{precision}.engine")
                for precision, path in graphs.items()
            }

    def graph(name, precision):
        if precision in ("int8", "fp8"):
            return static_graph(name, precision)
        return bundle(name, precision).path / "model.onnx"

    return build


def build_one(graph, engine):
    shapes = Shapes(max_batch=2, min_tokens=2, typical_tokens=16, max_tokens=24, image_size=256)
    spec = EngineSpec(graph, profiles_of([(2, 24)], shapes), TARGETS, library="tensorrt_rtx")
    report = build_engine(spec, engine, progress=lambda *_: None)
    return report, engine.stat().st_size, data_of(graph).stat().st_size


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_network_in_every_precision(engines, name, precision):
    report, size, weights = engines(name)[precision].result()
    assert size == report.engine_bytes
    assert size > weights, "the weights are inside"
    assert report.compute_capabilities == TARGETS
    assert [(x.name, x.dtype, x.shape) for x in report.inputs] == [
        ("image", "float32", (-1, 3, 256, 256)),
        ("input_ids", "int64", (-1, -1)),
        ("attention_mask", "int64", (-1, -1)),
    ]
    assert tuple(x.name for x in report.outputs) == outputs_of(model_config(name, "tiny"))
    assert {x.dtype for x in report.outputs} == {"float32"}
    assert report.peak_memory_mb < 1500
