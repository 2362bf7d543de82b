"""A bfloat16 graph in float32 with a rounding after every node: how a CPU without such kernels checks it.

ONNX Runtime's CPU provider has no bfloat16 products. A device is at least as exact: it sums in float32
too, and a fused kernel may pass values on unrounded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper

from export.graph.trace import data_of
from kernels.onnx.ops import OPSET

_WIDE, _NARROW = TensorProto.FLOAT, TensorProto.BFLOAT16


def emulate(source: Path, target: Path) -> None:
    """Write the graph at `source` in float32 rounded to bfloat16 to `target`, with a copy of the weights."""
    model = onnx.inliner.inline_local_functions(onnx.load_model(source))
    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    narrow = {v.name for v in inferred.value_info if v.type.tensor_type.elem_type == _NARROW}
    nodes = [made for node in graph.node for made in _rounded(node, narrow)]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    for tensor in graph.initializer:
        _widen(tensor)
    next(opset for opset in model.opset_import if opset.domain == "").version = OPSET
    data_of(target).unlink(missing_ok=True)
    onnx.save_model(model, target, save_as_external_data=True, location=data_of(target).name)


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == _NARROW:
        wide = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


def _rounded(node: onnx.NodeProto, narrow: set[str]) -> list[onnx.NodeProto]:
    """The node in float32, and the roundings of its outputs to bfloat16 and back."""
    wide = onnx.NodeProto()
    wide.CopyFrom(node)
    for attribute in wide.attribute:
        if attribute.HasField("t"):
            _widen(attribute.t)
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _NARROW:
            attribute.i = _WIDE
    after = []
    for i, name in enumerate(node.output):
        if name in narrow:
            exact, code = f"{name}__exact", f"{name}__rounded"
            wide.output[i] = exact
            after.append(helper.make_node("Cast", [exact], [code], to=_NARROW))
            after.append(helper.make_node("Cast", [code], [name], to=_WIDE))
    return [wide, *after]
