"""INT8: weights int8 per channel; activations as they come (dynamic), or by calibrated scales (static).

Only Linear layers (products with a constant matrix) are quantised: never norms, softmax, residual sums
or the products inside attention. The box head stays float32: where there is no box, the metric asks for
values below 1e-4, which eight bits cannot promise.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import numpy_helper

from engine.errors import BuildError
from export.calibrate import METHODS, PairReader
from export.onnx import data_of
from kernels.attention import MASKED, PLAIN
from kernels.onnx_ops import DOMAIN

_GEMM = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}  # where an attribute is absent
_RUNTIME, _ATTENTION = "com.microsoft", "MultiHeadAttention"
_NO_BIAS = ""  # an input left out
_PRODUCTS = ("MatMul", "Gemm")
_FLOAT_WEIGHTS = "bbox_head"
_STATIC = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "MatMulConstBOnly": True,
    "QuantizeBias": False,
    "OpTypesToExcludeOutputQuantization": list(_PRODUCTS),
    # One batch at a time; CalibMaxIntermediateOutputs, which promises the same, drops what it clears.
    "CalibStridedMinMax": 1,
}


def linear_products(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Products with a constant matrix, by what becomes of them: "quantised" or "kept"."""
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in _PRODUCTS and node.input[1] in ranks]
    quantised = [
        node for node in products if ranks[node.input[1]] == 2 and _FLOAT_WEIGHTS not in node.input[1]
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


def quantize_dynamic(source: Path, target: Path) -> int:
    """Write the INT8 form of the graph at `source` to `target`; returns the number of products quantised.

    The graph is for ONNX Runtime alone: its attention is that runtime's own operator.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    model = onnx.load_model(source)
    _as_products(model.graph)
    products = linear_products(model.graph)
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


def quantize_static(source: Path, target: Path, reader: PairReader, method: str = METHODS[0]) -> int:
    """Write the calibrated INT8 form of the graph at `source` to `target`; returns the products quantised.

    Standard operators and our functions alone: a product reads its activation and its weight through
    QuantizeLinear and DequantizeLinear, both int8 and symmetric (zero point 0, which TensorRT asks for),
    one scale a tensor and one an output channel: s = a / 127, where a is the largest magnitude of a weight
    column, and of an activation what `method` makes of the pairs of `reader`. CALS's face gate stays float
    too, since it weighs every patch. Raises InputError where a pair is unusable.
    """
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization import quantize_static as quantize

    methods = (CalibrationMethod.MinMax, CalibrationMethod.Percentile, CalibrationMethod.Entropy)
    model = onnx.load_model(source)
    _as_products(model.graph)
    gates = _gates(model.graph)
    products = [node.name for node in linear_products(model.graph)["quantised"] if node.name not in gates]
    with _fresh(target):
        quantize(
            model,
            target,
            reader,
            per_channel=True,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=products,
            use_external_data_format=True,
            calibrate_method=dict(zip(METHODS, methods, strict=True))[method],
            extra_options=_STATIC,
        )
    _restore_floats(target)
    return len(products)


def _gates(graph: onnx.GraphProto) -> set[str]:
    """Names of the products that, with their bias, a sigmoid reads."""
    reads = {name for node in graph.node if node.op_type == "Sigmoid" for name in node.input}
    sums = {name for node in graph.node if node.output[0] in reads for name in node.input}
    return {node.name for node in graph.node if node.op_type == "MatMul" and node.output[0] in sums}


def _restore_floats(path: Path) -> None:
    """Let all but the quantised products read the floats again, in the graph at `path`, in place.

    The library points every reader of a quantised tensor, residual sums and norms too, to its rounded form.
    """
    model = onnx.load_model(path, load_external_data=False)
    graph = model.graph
    floats = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    dequantised = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in dequantised:
            sources = (dequantised[x].input[0] if x in dequantised else "" for x in node.input)
            node.input[:] = [floats.get(s, x) for s, x in zip(sources, list(node.input), strict=True)]
    del graph.value_info[:], model.metadata_props[:]
    path.write_bytes(model.SerializeToString())


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
    """Give the attention nodes of the graph at `path` to ONNX Runtime's own operator, in place.

    It spares the transposes of the standard-operator body: about a tenth of the int8 network's work.
    The map of MGCA is none of its outputs, so that node keeps its body.
    """
    model = onnx.load_model(path, load_external_data=False)
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type in (PLAIN, MASKED):
            fields = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            query, key, value, *mask = node.input
            inputs = [query, key, value, *([_NO_BIAS, *mask] if mask else [])]
            heads, scale = fields["heads"][0], fields["scale"]
            fused = onnx.helper.make_node(
                _ATTENTION, inputs, node.output, node.name, domain=_RUNTIME, num_heads=heads, scale=scale
            )
            node.CopyFrom(fused)
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    kept = [function for function in model.functions if function.name in used]
    del model.functions[:]
    model.functions.extend(kept)
    if _RUNTIME not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(_RUNTIME, 1))
    path.write_bytes(model.SerializeToString())


def _drop_advice(record: logging.LogRecord) -> bool:
    """The library advises its own pre-processing at each call, which the exported graph has had."""
    return "pre-processing before quantization" not in record.getMessage()
