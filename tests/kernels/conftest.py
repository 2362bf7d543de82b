"""Running one operator's ONNX body alone, and the measures of the kernels' tests."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from kernels import onnx_ops
from kernels.bodies import bodies

TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16, np.int32: TensorProto.INT32}


def body_model(op, inputs, outputs, rank, attributes):
    """A graph of one node of our domain with its body; `inputs` are arrays by name, shapes are left open."""

    def value(name, array):
        shape = [f"{name}_{i}" for i in range(array.ndim)]
        return helper.make_tensor_value_info(name, TYPES[array.dtype.type], shape)

    node = helper.make_node(op, list(inputs), list(outputs), domain=onnx_ops.DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        op,
        [value(name, array) for name, array in inputs.items()],
        [
            helper.make_tensor_value_info(name, kind, [f"{name}_{i}" for i in range(rank)])
            for name, kind in outputs.items()
        ],
    )
    opsets = [helper.make_opsetid("", onnx_ops.OPSET), helper.make_opsetid(onnx_ops.DOMAIN, onnx_ops.VERSION)]
    return helper.make_model(graph, functions=list(bodies([op])), opset_imports=opsets, ir_version=10)


def run_body(op, inputs, outputs, rank=3, **attributes):
    model = body_model(op, inputs, outputs, rank, attributes)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)


@pytest.fixture(scope="session")
def onnx_body():
    """Check the body of an operator and run it on NumPy arrays; all its outputs have `rank` dimensions."""
    return run_body


@pytest.fixture(scope="session")
def normal():
    """Draw float64 tensors, the same for the same shape and seed."""

    def draw(*shape, seed=0, dtype=torch.float64):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
            dtype
        )

    return draw


@pytest.fixture(scope="session")
def rms():
    """RMS of the difference over the RMS of the reference."""

    def ratio(got, want):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        return float(np.sqrt(((got - want) ** 2).mean() / (want**2).mean()))

    return ratio
