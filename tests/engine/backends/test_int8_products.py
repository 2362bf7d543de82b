"""An x86 CPU without VNNI adds pairs of int8 products in 16 bits; no backend may let them saturate."""

import importlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


@pytest.fixture
def graph(tmp_path):
    """y = x W, calibrated, whose products of neighbours reach 2 * 127 * 127 of either sign."""
    codes = np.full((64, 4), 127, np.int8) * np.array([1, -1, 1, -1], np.int8)
    constants = {
        "codes": codes,
        "scales": np.full(4, 0.01, np.float32),
        "zeros": np.zeros(4, np.int8),
        "scale": np.float32(0.1),
        "zero": np.int8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x8"]),
        helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["w"], axis=1),
        helper.make_node("MatMul", ["x8", "w"], ["y"]),
    ]
    shapes = ("x", ["n", 64]), ("y", ["n", 4])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:], tensors),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def run_ort(path, x):
    from engine.backends.ort import load_session

    return load_session(path, 1).run(None, {"x": x})[0]


def run_openvino(path, x):
    from engine.backends.openvino import load_model

    return load_model(path, 1)(x)[0]


@pytest.mark.parametrize(("library", "run"), [("onnxruntime", run_ort), ("openvino", run_openvino)])
def test_products_do_not_saturate(library, run, graph):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    x = np.full((3, 64), 12.7, np.float32)
    want = np.full((3, 4), 12.7 * 1.27 * 64) * [1, -1, 1, -1]
    assert np.abs(run(graph, x) - want).max() <= 1e-4 * want.max()
