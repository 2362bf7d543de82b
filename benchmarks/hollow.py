"""A bundle whose network costs nothing, for what is about everything around it: long runs and fuzzing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from engine.bundle import Bundle
from engine.layout import GRAPH, GRAPH_DATA
from export.bundle.writer import BundleWriter

SOURCE = "demo:asap"


def hollow_bundle(out: Path) -> Path:
    """Write the demo's bundle to `out` with a graph that averages its inputs; return `out`."""
    bundle = Bundle.open(SOURCE)
    with BundleWriter(out) as writer:
        for name in bundle.manifest.files:
            if name not in (GRAPH, GRAPH_DATA):
                shutil.copyfile(bundle.path / name, writer.path(name))
        onnx.save(_graph(bundle), writer.path(GRAPH))
        writer.commit(bundle.manifest.to_dict())
    return out


def _graph(bundle: Bundle) -> onnx.ModelProto:
    manifest = bundle.manifest
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    inputs, outputs = (
        [helper.make_tensor_value_info(spec.name, kinds[spec.dtype], list(spec.shape)) for spec in specs]
        for specs in (manifest.inputs, manifest.outputs)
    )
    places = int(manifest.outputs[-1].shape[-1])
    constants = {
        "sides": np.array([2, 3]),
        "first": np.array([1]),
        "last": np.array([2]),
        "end": np.array([2**31]),
        "scale": np.array(1e-3, np.float32),
        "ramp": np.linspace(-2, 2, places, dtype=np.float32)[None, None],
    }
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(_nodes(), "hollow", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _nodes() -> list[NodeProto]:
    """Means of the pixels in place of logits and box; the tokens' numbers in place of words and map."""
    node = helper.make_node
    return [
        node("ReduceMean", ["image", "sides"], ["channels"], keepdims=0),
        node("ReduceMean", ["channels", "first"], ["mean"], keepdims=1),
        node("Neg", ["mean"], ["other"]),
        node("Concat", ["other", "mean"], ["logits_real_fake"], axis=1),
        node("Concat", ["channels", "mean"], ["logits_multicls"], axis=1),
        node("Sigmoid", ["logits_multicls"], ["box"]),
        node("Mul", ["input_ids", "attention_mask"], ["masked"]),
        node("Cast", ["masked"], ["numbers"], to=TensorProto.FLOAT),
        node("Mul", ["numbers", "scale"], ["tokens_"]),
        node("Unsqueeze", ["tokens_", "last"], ["rows"]),
        node("Slice", ["rows", "first", "end", "first"], ["words"]),
        node("Neg", ["words"], ["real"]),
        node("Concat", ["real", "words"], ["logits_tok"], axis=2),
        node("Add", ["rows", "ramp"], ["attention_map"]),
    ]
