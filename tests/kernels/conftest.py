"""Running one operator's ONNX body alone, and the measures of the kernels' tests."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from kernels.onnx import ops as onnx_ops
from kernels.onnx.bodies import bodies

GUARD, SENTINEL, BYTE_SENTINEL, E4M3_NAN = 64, -77.0, 0xA5, 0x7F
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
def no_worse():
    """Check an output against the exact one: at most twice the error that torch makes in the same type.

    Beside that half a step of the type is allowed, its rounding of the largest output (or of the RMS), since
    torch's own error may be zero.
    """

    def check(got, plain, exact, dtype):
        got, plain, exact = (torch.as_tensor(x).double() for x in (got, plain, exact))
        assert got.shape == exact.shape
        half_step = torch.finfo(dtype).eps / 2
        for name, size in (("largest", lambda x: x.abs().max()), ("RMS", lambda x: x.square().mean().sqrt())):
            error, allowed = size(got - exact), 2 * size(plain - exact) + half_step * size(exact)
            assert error <= allowed, f"{name} error {error:.2e}, allowed {allowed:.2e}"

    return check


@pytest.fixture
def fenced(monkeypatch):
    """Every output is born as NaN, bytes as E4M3's, between two fences; returns what checks them."""
    fences = []

    plain_empty, plain_like = torch.Tensor.new_empty, torch.empty_like

    def new_empty(tensor, *shape, dtype=None, **options):
        if options:  # the interpreter's own copies
            return plain_empty(tensor, *shape, dtype=dtype, **options)
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = torch.Size(shape).numel()
        dtype = dtype or tensor.dtype
        sentinel, poison = (SENTINEL, float("nan")) if dtype.is_floating_point else (BYTE_SENTINEL, E4M3_NAN)
        whole = torch.full((count + 2 * GUARD,), sentinel, dtype=dtype, device=tensor.device)
        whole[GUARD : GUARD + count] = poison
        fences.append(whole)
        return whole[GUARD : GUARD + count].view(shape)

    def empty_like(tensor, **options):
        return plain_like(tensor, **options) if options else new_empty(tensor, tensor.shape)

    def check():
        assert fences
        for whole in fences:
            sentinel = SENTINEL if whole.is_floating_point() else BYTE_SENTINEL
            assert (whole[:GUARD] == sentinel).all()
            assert (whole[-GUARD:] == sentinel).all()
            assert whole.isfinite().all(), "an output was left unwritten"

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    return check
