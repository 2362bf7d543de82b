"""Dynamic INT8 for ONNX Runtime: weights int8 per channel, activations quantised as they come.

Only Linear layers (products with a constant matrix) are quantised: never norms, softmax, residual sums
or the products inside attention. The box head stays float32: where there is no box, the metric asks for
values below 1e-4, which eight bits cannot promise.
"""

from __future__ import annotations

import logging
from pathlib import Path

import onnx

from export.onnx import data_of

_PRODUCTS = ("MatMul", "Gemm")
_FLOAT_WEIGHTS = "bbox_head"


def linear_products(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Products with a constant matrix, by what becomes of them: "quantised" or "kept"."""
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in _PRODUCTS and node.input[1] in ranks]
    quantised = [
        node for node in products if ranks[node.input[1]] == 2 and _FLOAT_WEIGHTS not in node.input[1]
    ]
    return {"quantised": quantised, "kept": [node for node in products if node not in quantised]}


def quantize_dynamic(source: Path, target: Path) -> int:
    """Write the INT8 form of the graph at `source` to `target`; returns the number of products quantised.

    Custom nodes and their bodies pass through unchanged.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    products = linear_products(onnx.load_model(source, load_external_data=False).graph)
    for path in (target, data_of(target)):
        path.unlink(missing_ok=True)
    logging.getLogger().addFilter(_drop_advice)
    try:
        quantize(
            source,
            target,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(_PRODUCTS),
            nodes_to_exclude=[node.name for node in products["kept"]],
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logging.getLogger().removeFilter(_drop_advice)
    return len(products["quantised"])


def _drop_advice(record: logging.LogRecord) -> bool:
    """The library advises its own pre-processing at each call, which the exported graph has had."""
    return "pre-processing before quantization" not in record.getMessage()
