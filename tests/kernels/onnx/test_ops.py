"""How operators leave for ONNX: their bodies are valid, standard and complete."""

from __future__ import annotations

import onnx
import pytest
import torch

from kernels import conv_fusion, gaussian_guidance, latent_pool
from kernels.onnx import ops as onnx_ops
from kernels.onnx.attention import NODES
from kernels.onnx.bodies import BODIES, bodies

OPERATORS = (*NODES, conv_fusion.NAME, gaussian_guidance.NAME, latent_pool.NAME, latent_pool.MASKED)


@pytest.mark.parametrize("op", OPERATORS)
def test_body_is_valid_and_standard(op):
    (body,) = bodies([op])
    assert (body.name, body.domain) == (op, onnx_ops.DOMAIN)
    assert {node.domain for node in body.node} == {""}
    assert [(o.domain, o.version) for o in body.opset_import] == [("", onnx_ops.OPSET)]
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = 10, {"": onnx_ops.OPSET, onnx_ops.DOMAIN: onnx_ops.VERSION}
    onnx.checker.check_function(body, context)
    written = [name for node in body.node for name in node.output]
    assert len(set(written)) == len(written)
    read = {name for node in body.node for name in node.input}
    assert set(body.input) <= read
    unused = set(written) - read - set(body.output)
    assert unused == set(), "a value that nobody reads"


def test_every_operator_is_declared():
    assert set(BODIES) == set(OPERATORS)


def test_an_undeclared_operator_is_an_error():
    with pytest.raises(KeyError, match="Unheard"):
        list(bodies(["Unheard"]))


def test_nothing_is_exporting_in_ordinary_use():
    assert not onnx_ops.exporting()
    assert not torch.onnx.is_in_onnx_export()
