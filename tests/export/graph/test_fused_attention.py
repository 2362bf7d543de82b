"""TensorRT's own attention in the graph: one node for each attention without a map, of the same answers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import onnx.inliner
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from engine.errors import BuildError
from export.graph.fused_attention import FUSED, OPSET, native_graph
from export.trt import build
from export.trt.engine_file import build_into
from export.trt.features import Features
from export.trt.options import EngineOptions
from export.trt.process import BuildLimitError
from export.trt.profiles import Shapes
from kernels.onnx.ops import DOMAIN

RTX = build.BuilderInfo("tensorrt_rtx", "1.7.1", True, "builds without a GPU")


def test_every_attention_without_a_map_is_one_node(name, exported):
    made = exported(name)
    out = made.path.with_name("native.model.onnx")
    count = native_graph(made.path, out)
    nodes = [node.op_type for node in made.proto.graph.node if node.domain == DOMAIN]
    assert count == sum(nodes.count(operator) for operator in FUSED) > 3
    onnx.checker.check_model(out, full_check=True)
    proto = onnx.load_model(out, load_external_data=False)
    flat = onnx.inliner.inline_local_functions(proto)
    assert sum(node.op_type == "Attention" for node in flat.graph.node) == count
    after = {f.name: f for f in proto.functions}
    for before in made.proto.functions:
        for field in ("input", "output", "attribute"):
            assert getattr(after[before.name], field) == getattr(before, field)


@pytest.mark.parametrize("operator", FUSED)
def test_its_answers_are_those_of_the_formula(operator, attention_graph, tmp_path):
    feeds, exact = attention_graph(operator, tmp_path / "a.onnx")
    assert native_graph(tmp_path / "a.onnx", tmp_path / "b.onnx") == 1
    proto = onnx.load_model(tmp_path / "b.onnx")
    assert proto.opset_import[0].version == OPSET
    (found,) = ReferenceEvaluator(proto).run(None, feeds)
    assert np.abs(found - exact).max() < 1e-6


@pytest.fixture
def building(exported, monkeypatch):
    """Build from the float32 graph as if it were of `precision`: the record, the files, the line."""
    graph, given = exported("asap").path, []
    writer = SimpleNamespace(path=lambda name: graph.parent / name)

    def build_engine(precision, builder=RTX, refused=(), error=BuildError, **options):
        def native(spec, out):
            given.append(spec.onnx.name)
            if spec.onnx.name in refused:
                raise error("no kernel for it")
            out.write_bytes(b"engine")
            return build.EngineReport(spec.library, builder.version, 1.0, 1.0, 6, ("8.9",), (), (), ())

        monkeypatch.setattr(build, "build_engine", native)
        shapes = Shapes(4, 2, 50, 64, 256)
        chosen = EngineOptions("off", **options)
        entry, line = build_into(writer, builder, ("8.9",), shapes, chosen, precision)
        (graph.parent / entry.file).unlink()
        assert not list(graph.parent.glob("fused.*"))
        return entry.fused_attention, given, line

    return build_engine


def test_an_engine_in_half_precision_has_it(building):
    count, given, line = building("fp16")
    assert count > 3
    assert given == ["fused.model.onnx"]
    assert f", {count} fused attentions, " in line


def test_where_the_library_refuses_it_attention_is_composed(building, caplog):
    count, given, line = building("bf16", refused=("fused.model.onnx",))
    assert (count, given) == (0, ["fused.model.onnx", "model.onnx"])
    assert "fused" not in line
    assert "tensorrt_rtx cannot fuse attention, building without: no kernel for it" in caplog.text
    with pytest.raises(BuildError, match="no kernel for it"):
        building("bf16", refused=("fused.model.onnx", "model.onnx"))


def test_a_build_that_took_too_long_is_not_tried_again(building):
    with pytest.raises(BuildLimitError):
        building("fp16", refused=("fused.model.onnx",), error=BuildLimitError)


@pytest.mark.parametrize(
    ("precision", "version", "features"),
    [
        ("fp32", "11.4", Features()),
        ("fp16", "10.13.2.6", Features()),  # before it read such a node
        ("fp16", "11.4", Features(strip_weights=True)),  # refitted from the graph as it is
    ],
)
def test_where_it_is_not_tried(building, precision, version, features):
    full = build.BuilderInfo("tensorrt", version, True, "", "8.9")
    assert building(precision, full, features=features)[:2] == (0, ["model.onnx"])


def test_without_onnx_a_serving_machine_builds_without_it(building, libraries, caplog):
    libraries(onnx=False)
    assert building("fp16")[:2] == (0, ["model.onnx"])
    assert "pip install onnx" in caplog.text


def test_a_graph_without_attention_is_left(tmp_path):
    onnx.save(helper.make_model(helper.make_graph([], "none", [], [])), tmp_path / "a.onnx")
    assert native_graph(tmp_path / "a.onnx", tmp_path / "b.onnx") == 0
    assert not (tmp_path / "b.onnx").exists()
