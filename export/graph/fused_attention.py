"""TensorRT's fused attention in the ONNX file that an engine is built from.

Every attention but MGCA's with its map leaves its products and softmax for one node `Attention` of opset 23,
which TensorRT (10.14 and later) and TensorRT-RTX make one kernel of in half precision; in float32 they refuse
it. Softmax stays in float32 inside that kernel. Mask and bias are added to the scores: a mask of truth values
made TensorRT-RTX 1.7.1 fail on CALS, and a row without any token, as padding of a batch is, would give NaN.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from kernels.onnx.attention import MASKED_SCORE, NODES, Operands
from kernels.onnx.bodies import body
from kernels.onnx.ops import DOMAIN

OPSET = 23  # the first with Attention
FUSED = tuple(name for name, form in NODES.items() if not form.guided)


def native_graph(graph: Path, out: Path) -> int:
    """Write `out`, beside `graph`, whose weights it shares; return the number of fused attentions.

    Nothing is written where there are none.
    """
    proto = onnx.load_model(graph, load_external_data=False)
    count = sum(node.domain == DOMAIN and node.op_type in FUSED for node in proto.graph.node)
    if not count:
        return 0
    for function in proto.functions:
        if function.domain == DOMAIN and function.name in FUSED:
            function.CopyFrom(_fused(function.name))
        _raise_opset(function.opset_import)
    _raise_opset(proto.opset_import)
    out.write_bytes(proto.SerializeToString())
    return count


def _raise_opset(imports: list[onnx.OperatorSetIdProto]) -> None:
    for opset in imports:
        if opset.domain == "":
            opset.version = OPSET


def _added(form: Operands) -> tuple[str, str]:
    """Write what is added to the scores: its nodes, and their last output; empty without mask and bias."""
    shared = """
        batch_axis = Constant <value_ints = [0]> ()
        shared = Unsqueeze (bias, batch_axis)"""
    if not form.mask:
        return (shared, "shared") if form.bias else ("", "")
    penalty = f"""
        keep = Cast <to = {onnx.TensorProto.FLOAT}> (mask)
        one = Constant <value_float = 1.0> ()
        ignored = Sub (one, keep)
        floor = Constant <value_float = {MASKED_SCORE}> ()
        penalty_float = Mul (ignored, floor)
        penalty_flat = CastLike (penalty_float, query)
        penalty_axes = Constant <value_ints = [{"1, 2" if form.mask == 2 else "1"}]> ()
        penalty = Unsqueeze (penalty_flat, penalty_axes)"""
    both = "\n        both = Add (penalty, shared)"
    return (penalty + shared + both, "both") if form.bias else (penalty, "penalty")


def _fused(name: str) -> onnx.FunctionProto:
    """The operator's body around one node."""
    form = NODES[name]
    adding, added = _added(form)
    operands = ", ".join(filter(None, ("query_rows", "key_rows", "value_rows", added)))
    # A mask of pairs may leave a query that is read without a key; one of keys leaves only padding so.
    some = """
        key_axis = Constant <value_ints = [-1]> ()
        some_float = ReduceMax (keep, key_axis)
        some = CastLike (some_float, query)
        out = Mul (merged, some)"""
    emptied = form.mask == 3
    return body(
        f"""
    {name} <heads, scale> ({", ".join(form.names)}) => (out)
    {{
        keep_two = Constant <value_ints = [0, 0]> ()
        rest = Constant <value_ints = [-1]> ()
        head_count = Constant <value_ints: ints = @heads> ()
        split = Concat <axis = 0> (keep_two, head_count, rest)
        merge = Concat <axis = 0> (keep_two, rest)
        query_heads = Reshape (query, split)
        query_rows = Transpose <perm = [0, 2, 1, 3]> (query_heads)
        key_heads = Reshape (key, split)
        key_rows = Transpose <perm = [0, 2, 1, 3]> (key_heads)
        value_heads = Reshape (value, split)
        value_rows = Transpose <perm = [0, 2, 1, 3]> (value_heads){adding}
        mixed = Attention <scale: float = @scale> ({operands})
        mixed_tokens = Transpose <perm = [0, 2, 1, 3]> (mixed)
        {"merged" if emptied else "out"} = Reshape (mixed_tokens, merge){some if emptied else ""}
    }}""",
        OPSET,
    )
