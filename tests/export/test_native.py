"""TensorRT's own attention in the graph: one node for each attention without a map, of the same answers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from export.native import FUSED, OPSET, native_graph
from kernels.attention import MASKED, attention_ref
from kernels.bodies import bodies
from kernels.onnx_ops import DOMAIN

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 5, 7, 3, 24


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


def of_one_node(operator, path):
    """A graph of one node of ours, with its body of standard operators."""
    names = ["query", "key", "value", *(["mask"] if operator == MASKED else [])]
    shapes = {"query": [BATCH, QUERIES, WIDTH], "mask": [BATCH, KEYS]}
    given = [
        helper.make_tensor_value_info(
            name,
            TensorProto.INT64 if name == "mask" else TensorProto.FLOAT,
            shapes.get(name, [BATCH, KEYS, WIDTH]),
        )
        for name in names
    ]
    heads = {"heads": [HEADS], "scale": (WIDTH // HEADS) ** -0.5}
    node = helper.make_node(operator, names, ["out"], domain=DOMAIN, **heads)
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, shapes["query"])
    model = helper.make_model(
        helper.make_graph([node], "one", given, [out]),
        functions=list(bodies([operator])),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)],
    )
    onnx.save(model, path)


@pytest.mark.parametrize("operator", FUSED)
def test_its_answers_are_those_of_the_formula(operator, tmp_path):
    of_one_node(operator, tmp_path / "a.onnx")
    assert native_graph(tmp_path / "a.onnx", tmp_path / "b.onnx") == 1
    random = np.random.default_rng(0)
    shapes = {"query": (BATCH, QUERIES, WIDTH), "key": (BATCH, KEYS, WIDTH), "value": (BATCH, KEYS, WIDTH)}
    feeds = {key: random.standard_normal(shape, dtype=np.float32) for key, shape in shapes.items()}
    mask = np.ones((BATCH, KEYS), np.int64)
    mask[1, 4:] = 0
    if operator == MASKED:
        feeds["mask"] = mask
    proto = onnx.load_model(tmp_path / "b.onnx")
    assert proto.opset_import[0].version == OPSET
    (found,) = ReferenceEvaluator(proto).run(None, feeds)
    given = [torch.from_numpy(feeds[key]).double() for key in shapes]
    exact, _ = attention_ref(*given, HEADS, torch.from_numpy(mask) if operator == MASKED else None)
    assert np.abs(found - exact.numpy()).max() < 1e-6


def test_a_graph_without_attention_is_left(tmp_path):
    onnx.save(helper.make_model(helper.make_graph([], "none", [], [])), tmp_path / "a.onnx")
    assert native_graph(tmp_path / "a.onnx", tmp_path / "b.onnx") == 0
    assert not (tmp_path / "b.onnx").exists()
