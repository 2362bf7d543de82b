"""The graph for plugins: bodies gone, kernels packed, all else as it was."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch.nn import functional as F

from engine.errors import BuildError
from export.trt.plugins.graph import plugin_graph
from kernels.conv_fusion import NAME, pack

COUNTS = {"hammer": {}, "asap": {"GuidedHeadAttention": 1}, "cals": {NAME: 1}}


@pytest.fixture
def rewritten(name, exported):
    source = exported(name).path
    out = source.with_name("plugins.onnx")
    out.unlink(missing_ok=True)
    return plugin_graph(source, out), out


def test_plugins_are_counted_and_lose_their_bodies(name, exported, rewritten):
    counts, out = rewritten
    assert set(counts) == set(COUNTS[name])
    assert out.exists() == bool(counts)
    if counts:
        proto, before = onnx.load_model(out, load_external_data=False), exported(name).proto
        assert {f.name for f in before.functions} - {f.name for f in proto.functions} == set(counts)
        assert [n.op_type for n in proto.graph.node] == [n.op_type for n in before.graph.node]
        assert {i.name for i in proto.graph.initializer} >= {
            x for n in proto.graph.node for x in n.input if x in {i.name for i in before.graph.initializer}
        }
        assert sum(n.op_type in counts for n in proto.graph.node) == sum(counts.values())


def fusion(exported):
    graph = exported("cals")
    return graph, next(module for module in graph.model.modules() if hasattr(module, "packed"))


def test_kernels_are_packed_as_torch_packs_them(exported, tmp_path):
    graph, module = fusion(exported)
    out = graph.path.with_name("plugins.onnx")
    plugin_graph(graph.path, out)
    proto = onnx.load_model(out, load_external_data=False)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == NAME:
            assert len(node.input) == 3
            got = numpy_helper.to_array(constants[node.input[2]])
            assert got.dtype == np.float32
            packs = [m.packed for m in graph.model.modules() if hasattr(m, "packed")]
            assert any(np.array_equal(got, x.detach().numpy()) for x in packs)
    assert np.array_equal(
        pack(module.weight, module.bias, 128).detach().numpy(), module.packed.detach().numpy()
    )


def test_half_precision_is_packed_bit_for_bit(tmp_path):
    kernel = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0)).half()
    weight = torch.cat([F.pad(kernel, (x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1)])
    bias = torch.arange(8.0).half().repeat(4)
    source = made(tmp_path, weight, bias, width=8)
    assert plugin_graph(source, tmp_path / "plugins.onnx") == {NAME: 1}
    (packed,) = onnx.load_model(tmp_path / "plugins.onnx").graph.initializer
    assert np.array_equal(numpy_helper.to_array(packed), pack(weight, bias, 8).numpy())


def made(folder, weight, bias, **attributes):
    """A graph of one fusion; a weight of None is an input."""
    named = {"weight": weight, "bias": bias}
    fixed = {name: tensor for name, tensor in named.items() if tensor is not None}
    kind = onnx.TensorProto.FLOAT16
    node = onnx.helper.make_node(NAME, ["image", "tokens", *named], ["out"], domain="dgm4")
    for name, value in attributes.items():
        node.attribute.append(onnx.helper.make_attribute(name, [value]))
    inputs = [name for name in node.input if name not in fixed]
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info(name, kind, None) for name in inputs],
        [onnx.helper.make_tensor_value_info("out", kind, None)],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in fixed.items()],
    )
    path = folder / "model.onnx"
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return path


@pytest.mark.parametrize("case", ["no width", "no constant"])
def test_a_fusion_that_cannot_be_packed_is_refused(tmp_path, case):
    weight, bias = torch.zeros(32, 3, 6, 6).half(), torch.zeros(32).half()
    options = {} if case == "no width" else {"width": 8}
    source = made(tmp_path, weight if case == "no width" else None, bias, **options)
    with pytest.raises(BuildError, match="expected constant weights and its width; export it again"):
        plugin_graph(source, tmp_path / "plugins.onnx")
    assert not (tmp_path / "plugins.onnx").exists()
