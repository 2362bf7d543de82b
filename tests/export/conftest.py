"""Tiny networks exported once a session, and their inputs."""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest

from engine.backends import usable_cores
from engine.backends.ort import session_options


@pytest.fixture(scope="session")
def exported(tiny, bundle, tmp_path_factory):
    """A tiny float32 graph by name: .model (in torch), .path of a copy to write beside, and .proto."""

    @functools.cache
    def export(name):
        import onnx

        from export.graph.rewrite import rewrite
        from export.graph.trace import data_of

        path = tmp_path_factory.mktemp(f"graph-{name}") / "model.onnx"
        written = bundle(name, "fp32").path / path.name
        for source, copy in ((written, path), (data_of(written), data_of(path))):
            shutil.copyfile(source, copy)
        proto = onnx.load_model(path, load_external_data=False)
        return SimpleNamespace(name=name, model=rewrite(tiny(name)), path=path, proto=proto)

    return export


@pytest.fixture(scope="session")
def linear_calls():
    """Count how often Linear layers run in one answer of a network: of the box head, and of all others."""

    def count(model):
        import torch

        from export.graph.trace import example_inputs

        box = set(model.branch.bbox_head.modules())
        calls = Counter()
        hooks = [
            module.register_forward_hook(lambda m, _x, _y: calls.update(["box" if m in box else "other"]))
            for module in model.modules()
            if isinstance(module, torch.nn.Linear)
        ]
        with torch.inference_mode():
            model(**example_inputs(model.config, 2, 5))
        for hook in hooks:
            hook.remove()
        return calls

    return count


PAIRS = 20  # two whole batches and a part of one


@pytest.fixture(scope="session")
def training_data(annotated):
    """A folder with a training split."""
    folder = annotated(PAIRS + 4)
    (folder / "metadata" / "test.json").rename(folder / "metadata" / "train.json")
    return folder


@pytest.fixture(scope="session")
def tokenizer(bundle):
    from engine.inputs.text import CaptionTokenizer

    return CaptionTokenizer(bundle("hammer", "fp32").path / "tokenizer.json")


@pytest.fixture(scope="session")
def reader(training_data, tokenizer):
    """Pairs to calibrate on."""
    from export.quantization.pairs import read_pairs

    return read_pairs(training_data, PAIRS, tokenizer, 256)


@pytest.fixture(scope="session")
def static_graph(tiny, reader, made_once):
    """Export a calibrated tiny network by name and precision; the path of its graph.

    "int8", the same "in fp16", as engines have it, or "fp8".
    """

    def write(folder, name, precision, around):
        import torch

        from engine.layout import GRAPH, HALF_GRAPH
        from engine.network.linear import E4M3
        from engine.network.precision import to_precision
        from export.graph.rewrite import rewrite
        from export.graph.trace import export_onnx
        from export.quantization.calibrate import calibrate
        from export.quantization.qdq import fp8_as_nodes, lower, lowered_layers

        model = rewrite(tiny(name))
        batches = [{key: torch.from_numpy(x) for key, x in batch.items()} for batch in reader.batches()]
        codes = E4M3 if precision == "fp8" else torch.int8
        scales = calibrate(model, lowered_layers(model, precision), batches, codes)
        lower(model, precision, scales)
        if around:
            to_precision(model, torch.float16)
        path = folder / (HALF_GRAPH if around else GRAPH)
        export_onnx(fp8_as_nodes(model), path)
        return path

    @functools.cache
    def export(name, precision):
        precision, _, around = precision.partition(" in ")
        place = f"static-{name}-{precision}-{around}"
        return made_once(place, lambda folder: write(folder, name, precision, around))

    return export


@pytest.fixture(scope="session")
def session_of():
    """Open a graph in ONNX Runtime on the CPU."""

    def load(path):
        import onnxruntime

        options = session_options(usable_cores())
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    return load


def draw_attention(form):
    """Inputs of a node by name, float32: 5 queries, 7 keys, 3 heads of 8; masks leave 4 keys, or none."""
    import numpy as np

    random = np.random.default_rng(0)
    shapes = {"query": (2, 5, 24), "mask": (2, 5, 7) if form.mask == 3 else (2, 7), "bias": (3, 5, 7)}
    shapes = {name: shapes.get(name, (2, 7, 24)) for name in form.names}
    feeds = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    if form.mask:
        feeds["mask"] = np.ones(shapes["mask"], np.int32)
        feeds["mask"][1, ..., 4:] = 0
    if form.mask == 3:
        feeds["mask"][0, 2] = 0
    return feeds


@pytest.fixture(scope="session")
def attention_graph():
    """Write a graph of one attention with its body; returns the inputs by name and the exact answer."""

    def write(operator, path):
        import onnx
        import torch
        from onnx import helper

        from kernels.attention import attention_ref
        from kernels.onnx.attention import NODES
        from kernels.onnx.bodies import bodies
        from kernels.onnx.ops import DOMAIN, OPSET, VERSION

        feeds = draw_attention(NODES[operator])
        given = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for name, x in feeds.items()
        ]
        node = helper.make_node(operator, list(feeds), ["out"], domain=DOMAIN, heads=[3], scale=8**-0.5)
        out = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, feeds["query"].shape)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
        graph = helper.make_graph([node], "one", given, [out])
        functions = list(bodies([operator]))
        onnx.save(helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10), path)
        tensors = {name: torch.from_numpy(x) for name, x in feeds.items()}
        exact = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
        return feeds, attention_ref(**exact, heads=3)[0].numpy()

    return write
