"""INT8: every Linear but the box head's, and answers within the tolerance of the export."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from engine.errors import BuildError
from export.graph.parity import EXACT, INT8, compare, onnx_outputs
from export.graph.trace import data_of, example_inputs, flatten
from export.quantization.dynamic_int8 import (
    _as_products,
    _use_runtime_attention,
    linear_products,
    quantize_dynamic,
)


@pytest.fixture(scope="module")
def quantized(exported, tmp_path_factory):
    @functools.cache
    def make(name):
        path = tmp_path_factory.mktemp(f"int8-{name}") / "model.onnx"
        count = quantize_dynamic(exported(name).path, path)
        return SimpleNamespace(path=path, count=count, proto=onnx.load_model(path, load_external_data=False))

    return make


def test_every_linear_but_the_box_heads_is_quantised(name, exported, quantized, linear_calls):
    graph = exported(name)
    calls = linear_calls(graph.model)
    assert quantized(name).count == calls["other"]
    kept = linear_products(graph.proto.graph)["kept"]
    assert sum("bbox_head" in node.input[1] for node in kept) == calls["box"] == (6 if name == "cals" else 3)


def test_the_graph_holds_as_many_integer_products(name, quantized):
    made = quantized(name)
    kinds = Counter(node.op_type for node in made.proto.graph.node)
    assert kinds["MatMulInteger"] == made.count
    assert kinds["DynamicQuantizeLinear"] > 0


def test_weights_are_int8_per_channel(name, quantized):
    graph = quantized(name).proto.graph
    tensors = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            assert tensors[node.input[1]].data_type == onnx.TensorProto.INT8
    scales = [t for key, t in tensors.items() if key.endswith("_scale") and "weight" in key]
    assert scales
    assert all(np.prod(t.dims) > 1 for t in scales), "one scale a channel"


def floats_of(path, part):
    """Float initialisers whose name holds `part`."""
    graph = onnx.load_model(path).graph
    found = {t.name: numpy_helper.to_array(t) for t in graph.initializer if part in t.name}
    return {key: value for key, value in found.items() if value.dtype == np.float32}


def same_or_turned(one, other):
    return np.array_equal(one, other) or np.array_equal(one.T, other)


def test_the_box_head_is_untouched(name, exported, quantized):
    before = floats_of(exported(name).path, "bbox_head")
    after = floats_of(quantized(name).path, "bbox_head")
    assert before.keys() == after.keys()
    assert len(before) >= 6
    assert all(same_or_turned(value, after[key]) for key, value in before.items())


def test_attention_is_the_runtimes_own_and_our_other_nodes_stay(name, exported, quantized):
    def nodes(proto):
        return Counter(node.op_type for node in proto.graph.node if node.domain)

    before, after = nodes(exported(name).proto), nodes(quantized(name).proto)
    fused = before.pop("HeadAttention") + before.pop("MaskedHeadAttention")
    assert after.pop("MultiHeadAttention") == fused > 0
    assert before == after
    bodies = {f.name: f.SerializeToString() for f in exported(name).proto.functions}
    kept = {f.name: f.SerializeToString() for f in quantized(name).proto.functions}
    assert kept.keys() == after.keys()
    assert all(bodies[key] == value for key, value in kept.items())


def test_the_runtimes_attention_gives_what_our_body_gives(name, exported, session_of, tmp_path):
    source = exported(name).path
    path = tmp_path / source.name
    path.write_bytes(source.read_bytes())
    data_of(path).write_bytes(data_of(source).read_bytes())
    _use_runtime_attention(path)
    inputs = {k: v.numpy() for k, v in example_inputs(exported(name).model.config, 3, 12).items()}
    for want, got in zip(
        session_of(source).run(None, inputs), session_of(path).run(None, inputs), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("operator", "runtimes"),
    [
        ("BiasedHeadAttention", True),
        ("BiasedMaskedHeadAttention", True),
        ("PairMaskedHeadAttention", False),  # whose queries without a key it would not answer with zeros
    ],
)
def test_the_runtimes_attention_has_bias_and_mask(operator, runtimes, attention_graph, session_of, tmp_path):
    feeds, exact = attention_graph(operator, tmp_path / "a.onnx")
    _use_runtime_attention(tmp_path / "a.onnx")
    kinds = {node.op_type for node in onnx.load_model(tmp_path / "a.onnx").graph.node}
    assert ("MultiHeadAttention" in kinds) is runtimes
    (found,) = session_of(tmp_path / "a.onnx").run(None, feeds)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5)


def test_answers_stay_within_the_tolerance(name, exported, quantized):
    config = exported(name).model.config
    before, after = (onnx_outputs(path, config) for path in (exported(name).path, quantized(name).path))
    difference = compare("int8", "onnx", before, after, INT8)
    assert difference.passed, difference
    assert difference.max > 0, "nothing was quantised"


def test_the_file_is_smaller(name, exported, quantized):
    """Embeddings stay float32: half of a tiny network."""
    config = exported(name).model.config
    embeddings = 4 * (config.vocabulary + config.positions) * config.width
    before, after = (data_of(x.path).stat().st_size - embeddings for x in (exported(name), quantized(name)))
    assert after < 0.45 * before


def test_the_source_and_the_log_stay_as_they_are(exported, tmp_path):
    source = exported("hammer").path
    before, filters = source.read_bytes(), list(logging.getLogger().filters)
    quantize_dynamic(source, tmp_path / "model.onnx")
    assert source.read_bytes() == before
    assert logging.getLogger().filters == filters


def linear_graph(*nodes, shape=(4, 4)):
    """A graph over one square weight `w`, so that turning it the wrong way shows in numbers alone."""
    make = onnx.helper
    weight = numpy_helper.from_array(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), "w")
    bias = numpy_helper.from_array(np.ones(4, np.float32), "b")
    values = [make.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 4]) for n in ("x", "y")]
    return make.make_graph(list(nodes), "g", values[:1], values[1:], [weight, bias])


def gemm(x, y, **attributes):
    return onnx.helper.make_node("Gemm", [x, "w", "b"], [y], name=f"gemm_{y}", **attributes)


def answer(graph, x):
    opsets = [onnx.helper.make_opsetid("", 20)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_a_weight_that_two_linears_share_is_turned_once():
    """ONNX Runtime's own conversion turns it twice: wrong numbers in silence, since it is square."""
    shared = gemm("x", "m", transB=1), gemm("m", "y", transB=1)
    graph = linear_graph(*shared)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    want = answer(graph, x)
    _as_products(graph)
    assert [node.op_type for node in graph.node] == ["MatMul", "Add"] * 2
    assert [node.name for node in graph.node][::2] == ["gemm_m", "gemm_y"], "products are excluded by name"
    assert np.allclose(answer(graph, x), want, rtol=1e-5)


def test_a_weight_behind_a_transpose_is_turned_itself():
    """As the exporter leaves a Linear that is called twice, once of which may be a Gemm."""
    turn = onnx.helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0])
    product = onnx.helper.make_node("MatMul", ["x", "wt"], ["m"])
    graph = linear_graph(turn, product, gemm("m", "y", transB=1))
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    want = answer(graph, x)
    _as_products(graph)
    assert [node.op_type for node in graph.node] == ["MatMul", "MatMul", "Add"]
    assert np.allclose(answer(graph, x), want, rtol=1e-5)


@pytest.mark.parametrize("attributes", [{}, {"transB": 1, "alpha": 2.0}, {"transB": 1, "transA": 1}])
def test_a_gemm_that_is_no_linear_is_refused(attributes):
    with pytest.raises(BuildError, match="expected a Gemm as torch's Linear leaves it"):
        _as_products(linear_graph(gemm("x", "y", **attributes)))


def test_a_weight_that_something_else_reads_is_refused():
    other = onnx.helper.make_node("Add", ["x", "w"], ["m"])
    with pytest.raises(BuildError, match="w: expected a weight of Linears alone, but Add reads it too"):
        _as_products(linear_graph(other, gemm("m", "y", transB=1)))


def test_the_quantised_form_before_quantising_is_exact(name, exported, tmp_path):
    graph = exported(name)
    model = onnx.load_model(graph.path)
    _as_products(model.graph)
    onnx.save_model(model, tmp_path / "model.onnx")
    got = onnx_outputs(tmp_path / "model.onnx", graph.model.config)
    want = onnx_outputs(graph.path, graph.model.config)
    assert compare("products", "onnx", want, got, EXACT).max <= 1e-5


def test_the_flat_graph_quantises_no_more(exported, tmp_path):
    """The products inside attention have no constant matrix."""
    graph = exported("hammer")
    flat = flatten(graph.path, graph.path.with_name("flat-for-int8.onnx"))
    assert len(linear_products(flat.graph)["quantised"]) == len(
        linear_products(graph.proto.graph)["quantised"]
    )
