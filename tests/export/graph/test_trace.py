"""The exported graph: same answers at every size, our nodes with bodies, and nothing of this machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch

from engine.layout import DATA_SUFFIX
from engine.manifest import INPUTS
from export.graph.trace import data_of, example_inputs, flatten, outputs_of
from kernels.onnx import ops as onnx_ops

ROOT = Path(__file__).resolve().parents[3]
TOLERANCE = 1e-4
OPERATORS = {
    "hammer": {"HeadAttention", "MaskedHeadAttention", "LatentQueryPool"},
    "asap": {"HeadAttention", "MaskedHeadAttention", "LatentQueryPool", "GuidedHeadAttention"},
    "cals": {
        "HeadAttention",
        "MaskedHeadAttention",
        "LatentQueryPool",
        "ConvTokenFusion",
        "GaussianGuidance",
    },
}


def answers_of(session, config, inputs):
    names = outputs_of(config)
    return dict(zip(names, session.run(list(names), {k: v.numpy() for k, v in inputs.items()}), strict=True))


def test_answers_are_torchs_at_every_size(name, exported, session_of):
    graph = exported(name)
    config = graph.model.config
    session = session_of(graph.path)
    for batch in (1, 3, 8):
        for tokens in (2, 12, 50, 128):
            inputs = example_inputs(config, batch, tokens, seed=tokens)
            got = answers_of(session, config, inputs)
            with torch.inference_mode():
                want = graph.model(**inputs)
            for key, value in got.items():
                reference = getattr(want, key).numpy()
                assert value.dtype == np.float32
                assert value.shape == reference.shape
                assert np.abs(value - reference).max() <= TOLERANCE, (key, batch, tokens)


def test_a_fully_masked_caption_gives_no_nan(name, exported, session_of):
    """And the same as torch's."""
    graph = exported(name)
    inputs = example_inputs(graph.model.config, 3, 7)
    inputs["attention_mask"][1] = 0
    got = answers_of(session_of(graph.path), graph.model.config, inputs)
    with torch.inference_mode():
        want = graph.model(**inputs)
    for key, value in got.items():
        assert np.isfinite(value).all()
        assert np.abs(value - getattr(want, key).numpy()).max() <= TOLERANCE


def test_our_nodes_are_there_with_their_bodies(name, exported):
    proto = exported(name).proto
    ours = [node for node in proto.graph.node if node.domain]
    assert {node.domain for node in ours} == {onnx_ops.DOMAIN}
    assert {node.op_type for node in ours} == OPERATORS[name]
    assert {(body.domain, body.name) for body in proto.functions} == {
        (onnx_ops.DOMAIN, op) for op in OPERATORS[name]
    }
    for node in ours:
        plugin = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert plugin["plugin_namespace"] == b"dgm4"
        assert plugin["plugin_version"] == b"1"


def test_every_attention_is_ours(name, exported):
    """No softmax is left outside the nodes."""
    assert not [node for node in exported(name).proto.graph.node if node.op_type == "Softmax"]


def test_dynamic_dimensions_are_named(name, exported):
    graph = exported(name)

    def dims(values):
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    assert dims(graph.proto.graph.input) == {
        "image": ["batch", 3, 256, 256],
        "input_ids": ["batch", "tokens"],
        "attention_mask": ["batch", "tokens"],
    }
    outputs = dims(graph.proto.graph.output)
    assert tuple(outputs) == outputs_of(graph.model.config)
    assert {shape[0] for shape in outputs.values()} == {"batch"}
    assert outputs["logits_real_fake"] == ["batch", 2]
    assert outputs["logits_multicls"] == ["batch", 4]
    assert outputs["box"] == ["batch", 4]
    assert "tokens" in outputs["logits_tok"][1]
    if name == "asap":
        assert outputs["attention_map"] == ["batch", "tokens", 257]


def test_checker_passes_and_versions_are_pinned(name, exported):
    graph = exported(name)
    onnx.checker.check_model(graph.path, full_check=True)
    assert {(o.domain, o.version) for o in graph.proto.opset_import} == {("", onnx_ops.OPSET), ("dgm4", 1)}
    assert graph.proto.ir_version == 10


def test_nothing_of_this_machine_is_inside(name, exported):
    """No doc string, stack trace, path or module name of the exporter."""
    graph = exported(name)
    content = graph.path.read_bytes()
    for trace in (
        str(ROOT),
        "site-packages",
        ".py",
        "Traceback",
        "stack_trace",
        "pkg.torch",
        "nn_module",
    ):
        assert trace.encode() not in content, trace
    whole = onnx.load_model(graph.path, load_external_data=False)
    held = [whole.graph, *whole.graph.node, *whole.graph.input, *whole.graph.output, *whole.graph.initializer]
    for part in [whole, *held, *whole.functions]:
        assert not part.doc_string
        assert not getattr(part, "metadata_props", None)
    assert not whole.graph.value_info
    assert (whole.producer_name, whole.producer_version) == ("dgm4", "")


def test_weights_lie_beside_the_graph(name, exported):
    graph = exported(name)
    assert data_of(graph.path).name == graph.path.name + DATA_SUFFIX
    external = [t for t in graph.proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    locations = {e.value for t in external for e in t.external_data if e.key == "location"}
    assert locations == {data_of(graph.path).name}
    assert graph.path.stat().st_size < 2e6


def test_no_weight_is_stored_twice(name, exported):
    """The data file holds the parameters of the inference network, and little else."""
    graph = exported(name)
    stored = data_of(graph.path).stat().st_size
    parameters = sum(4 * p.numel() for p in graph.model.parameters())
    assert 0.95 * parameters < stored < 1.05 * parameters


def test_flat_variant_is_standard_and_the_same(name, exported, session_of):
    graph = exported(name)
    flat = graph.path.with_name("flat.onnx")
    proto = flatten(graph.path, flat)
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    assert not proto.functions
    onnx.checker.check_model(flat)
    config = graph.model.config
    inputs = example_inputs(config, 3, 12)
    got = answers_of(session_of(flat), config, inputs)
    want = answers_of(session_of(graph.path), config, inputs)
    assert all(np.abs(got[key] - want[key]).max() <= 1e-5 for key in want)


def test_example_inputs_are_what_the_network_reads(name, tiny):
    config = tiny(name).config
    one, same = (example_inputs(config, 3, 24, seed=5) for _ in range(2))
    assert tuple(one) == INPUTS
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert one["image"].shape == (3, 3, 256, 256)
    mask = one["attention_mask"]
    assert mask[0].all()
    assert (mask[:, 1:] <= mask[:, :-1]).all(), "padding is on the right"
    assert mask.sum(1).unique().numel() == 3
    assert (one["input_ids"][:, 0] == 101).all()
    assert not one["input_ids"][mask == 0].any()


def test_exporting_twice_gives_the_same_graph(exported, trace, tmp_path, monkeypatch):
    from export.graph.trace import export_onnx

    monkeypatch.setattr(torch.onnx, "export", trace)
    graph = exported("hammer")
    export_onnx(graph.model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == graph.path.read_bytes()
    assert data_of(tmp_path / "model.onnx").read_bytes() == data_of(graph.path).read_bytes()
