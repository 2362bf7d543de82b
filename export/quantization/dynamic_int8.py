"""Dynamic INT8 for ONNX Runtime: weights int8 per channel, activations as they come.

Only Linear layers (products with a constant matrix) are quantised: never norms, softmax, residual sums
or the products inside attention. The box head stays float32: where there is no box, the metric asks for
values below 1e-4, which eight bits cannot promise. Static int8 is traced as such: export/quantization/qdq.py.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Collection, Iterator
from pathlib import Path

import onnx
from onnx import numpy_helper
from torch import nn

from engine.errors import BuildError
from export.graph.trace import data_of, give_own_codes
from kernels.onnx.attention import NODES, Operands
from kernels.onnx.ops import DOMAIN

_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}  # where an attribute is absent
_RUNTIME, _ATTENTION = "com.microsoft", "MultiHeadAttention"
_ABSENT = ""  # an input left out
_PRODUCTS = ("MatMul", "Gemm")
_FLOAT_WEIGHTS = "bbox_head"


def dynamic_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The Linear layers that dynamic int8 rounds; one that is shared comes by each of its names."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and _FLOAT_WEIGHTS not in name:
            yield name, module


def linear_products(graph: onnx.GraphProto, keep: Collection[str] = ()) -> dict[str, list[onnx.NodeProto]]:
    """Products with a constant matrix, as "quantised" and "kept" ones.

    `keep` names Linear layers, which the graph identifies by the bias that is added to their product.
    """
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in _PRODUCTS and node.input[1] in ranks]
    biases = {f"{name}.bias" for name in keep}
    held = {x for node in graph.node if node.op_type == "Add" and biases & {*node.input} for x in node.input}
    quantised = [
        node
        for node in products
        if ranks[node.input[1]] == 2 and _FLOAT_WEIGHTS not in node.input[1] and node.output[0] not in held
    ]
    return {"quantised": quantised, "kept": [node for node in products if node not in quantised]}


def _as_products(graph: onnx.GraphProto) -> None:
    """Bring every Linear to the form MatMul with a constant matrix, then Add, in place.

    A Gemm is split, its product keeping its name, and a weight that several products read through a
    Transpose is turned itself. ONNX Runtime's quantiser splits too, but it turns a weight that two
    nodes share twice, renames the product, which is then not excluded any more, and passes over a
    Transpose. Raises BuildError for a Gemm that is no Linear.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    turned: dict[str, str] = {}  # what a product reads, by the weight that was turned for it
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights:
            turned[node.output[0]] = node.input[0]
        elif node.op_type == "Gemm" and node.input[1] in weights:
            turned[node.input[1]] = node.input[1]
            nodes += _split_gemm(node)
        else:
            nodes.append(node)
    for node in nodes:
        node.input[:] = [turned.get(name, name) for name in node.input]
    for name in set(turned.values()):
        if strangers := {node.op_type for node in nodes if name in node.input} - {"MatMul"}:
            raise BuildError(
                f"{name}: expected a weight of Linears alone, but {', '.join(strangers)} reads it too"
            )
        matrix = numpy_helper.to_array(weights[name]).T.copy()
        weights[name].CopyFrom(numpy_helper.from_array(matrix, name))
    del graph.node[:]
    graph.node.extend(nodes)


def _split_gemm(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    fields = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if {**_GEMM, **fields} != {**_GEMM, "transB": 1} or len(node.input) != 3:
        raise BuildError(f"{node.name}: expected a Gemm as torch's Linear leaves it, got {fields}")
    product = f"{node.output[0]}_product"
    return [
        onnx.helper.make_node("MatMul", node.input[:2], [product], name=node.name),
        onnx.helper.make_node("Add", [product, node.input[2]], node.output, name=f"{node.name}_bias"),
    ]


def quantize_dynamic(source: Path, target: Path, keep: Collection[str] = ()) -> int:
    """Write the INT8 form of the graph at `source` to `target`; returns the number of products quantised.

    The Linear layers named in `keep` stay float.

    The graph is for ONNX Runtime alone: its attention is that runtime's operator.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    model = onnx.load_model(source)
    _as_products(model.graph)
    products = linear_products(model.graph, keep)
    with _fresh(target):
        quantize(
            model,
            target,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(_PRODUCTS),
            nodes_to_exclude=[node.name for node in products["kept"]],
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )
    _use_runtime_attention(target)
    return len(products["quantised"])


@contextlib.contextmanager
def _fresh(target: Path) -> Iterator[None]:
    """Remove what is at `target`, and let the quantiser neither print nor advise."""
    for path in (target, data_of(target)):
        path.unlink(missing_ok=True)
    logging.getLogger().addFilter(_drop_advice)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.getLogger().removeFilter(_drop_advice)


def _use_runtime_attention(path: Path) -> None:
    """Replace attention nodes of the graph at `path` by ONNX Runtime's operator, and share no codes.

    It saves the transposes of the standard-operator body, about a tenth of the int8 network's work. It does
    not output the map of MGCA, nor zeros for a query that a mask of pairs leaves without a key: those nodes
    keep their bodies.
    """
    model = onnx.load_model(path, load_external_data=False)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        form = NODES.get(node.op_type) if node.domain == DOMAIN else None
        nodes += [node] if form is None or form.guided or form.mask == 3 else _runtime_attention(node, form)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    functions = [function for function in model.functions if function.name in used]
    del model.functions[:]
    model.functions.extend(functions)
    if _RUNTIME not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(_RUNTIME, 1))
    give_own_codes(model.graph)
    path.write_bytes(model.SerializeToString())


def _runtime_attention(node: onnx.NodeProto, form: Operands) -> list[onnx.NodeProto]:
    """ONNX Runtime's operator in the place of ours, whose bias it reads as [1, H, N, M]."""
    fields = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    given, nodes = dict(zip(form.names, node.input, strict=True)), []
    if form.bias:
        axes, bias = (f"{node.output[0]}_{name}" for name in ("axes", "bias"))
        nodes = [
            onnx.helper.make_node("Constant", [], [axes], value_ints=[0]),
            onnx.helper.make_node("Unsqueeze", [given["bias"], axes], [bias]),
        ]
        given["bias"] = bias
    projected = (given["query"], given["key"], given["value"], _ABSENT)  # absent: biases of projections
    inputs = [*projected, given.get("mask", _ABSENT), given.get("bias", _ABSENT)]
    while inputs[-1] == _ABSENT:
        inputs.pop()
    heads, scale = fields["heads"][0], fields["scale"]
    fused = onnx.helper.make_node(
        _ATTENTION, inputs, node.output, node.name, domain=_RUNTIME, num_heads=heads, scale=scale
    )
    return [*nodes, fused]


def _drop_advice(record: logging.LogRecord) -> bool:
    """Drop the quantiser's advice to pre-process, which the exported graph has been."""
    return "pre-processing before quantization" not in record.getMessage()
