"""Attention traced for ONNX: a node for each set of operands, which ONNX Runtime inlines."""

from __future__ import annotations

import warnings

import numpy as np
import onnxruntime
import torch

from kernels.attention import attention
from kernels.onnx.attention import NODES
from kernels.onnx.bodies import bodies
from kernels.onnx.ops import DOMAIN, OPSET

HEADS, TOKENS, WIDTH = 3, 5, 24


class Forms(torch.nn.Module):
    """Every form of attention over the same tokens."""

    def __init__(self):
        super().__init__()
        bias = torch.randn(HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(3))
        self.bias = torch.nn.Parameter(bias)

    def forward(self, x, mask, pairs):
        operands = [{"mask": m, "bias": b} for b in (None, self.bias) for m in (None, mask, pairs)]
        return tuple(attention(x, x, x, HEADS, **some) for some in operands)


def inputs_of(batch):
    x = torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(batch))
    mask = (torch.arange(TOKENS) < TOKENS - torch.arange(batch)[:, None]).long()
    pairs = torch.arange(batch * TOKENS**2).view(batch, TOKENS, TOKENS) % 3 == 0
    pairs[:, 1] = False
    return {"x": x, "mask": mask, "pairs": pairs}


def test_every_form_is_a_node_with_its_operands():
    model, batch = Forms().eval(), torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch's own deprecations while tracing
        program = torch.onnx.export(
            model,
            kwargs=inputs_of(2),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dict.fromkeys(("x", "mask", "pairs"), {0: batch}),
            verbose=False,
        )
    proto = program.model_proto
    nodes = {node.op_type: len(node.input) for node in proto.graph.node if node.domain == DOMAIN}
    assert nodes == {name: len(form.names) for name, form in NODES.items() if not form.guided}
    del proto.functions[:]
    proto.functions.extend(bodies(list(nodes)))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = inputs_of(4)
    found = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    with torch.inference_mode():
        want = model(**inputs)
    for got, expected in zip(found, want, strict=True):
        assert np.abs(got - expected.numpy()).max() <= 1e-5
    assert not found[2][:, 1].any(), "a query without a key"
