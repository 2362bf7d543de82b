"""The ONNX file that an engine with plugins is built from.

Nodes that are plugins lose their body of standard operators, so that no parser can take it in the plugin's
place; and the fusion's kernels are packed as the Triton kernel reads them. The other weights stay in the
file of the graph it is made from, beside which it has to lie.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from engine.errors import BuildError
from kernels.conv_fusion import NAME, WIDTH, pack
from kernels.onnx.attention import GUIDED
from kernels.onnx.ops import DOMAIN

PLUGINS = (GUIDED, NAME)
_BITS = {2: np.int16, 4: np.int32}  # by bytes: packing moves numbers of any type


def plugin_graph(graph: Path, out: Path) -> dict[str, int]:
    """Write `out`, beside `graph`, for plugins: how many nodes each has; nothing is written without any.

    Raises BuildError for a fusion without constant weights, OSError where `out` cannot be written.
    """
    proto = onnx.load_model(graph, load_external_data=False)
    nodes = [node for node in proto.graph.node if node.domain == DOMAIN and node.op_type in PLUGINS]
    if not nodes:
        return {}
    for node in nodes:
        if node.op_type == NAME:
            _pack(proto.graph, node, graph.parent)
    for function in [f for f in proto.functions if f.domain == DOMAIN and f.name in PLUGINS]:
        proto.functions.remove(function)
    _drop_unread(proto.graph)
    out.write_bytes(proto.SerializeToString())
    return dict(Counter(node.op_type for node in nodes))


def _pack(graph: onnx.GraphProto, node: onnx.NodeProto, folder: Path) -> None:
    """Put one packed tensor in the place of a fusion's weight and bias."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    widths = [attribute.ints[0] for attribute in node.attribute if attribute.name == WIDTH]
    image, tokens, *names = node.input
    if not widths or len(names) != 2 or any(name not in constants for name in names):
        raise BuildError(f"{NAME} {node.name!r}: expected constant weights and its width; export it again")
    weight, bias = (_bits(constants[name], folder) for name in names)
    packed = pack(weight, bias, widths[0])
    name, kind = f"{node.output[0]}.packed", constants[names[0]].data_type
    graph.initializer.append(
        onnx.TensorProto(name=name, data_type=kind, dims=packed.shape, raw_data=packed.numpy().tobytes())
    )
    node.input[:] = [image, tokens, name]


def _bits(tensor: onnx.TensorProto, folder: Path) -> torch.Tensor:
    """A constant as integers of its size."""
    values = numpy_helper.to_array(tensor, str(folder))
    return torch.from_numpy(values.view(_BITS[values.itemsize]).copy())


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove the constants that nothing reads any more."""
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)
