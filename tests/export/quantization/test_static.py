"""Static INT8: the scales are those of the pairs, the graph is portable, and only products are rounded."""

from __future__ import annotations

import functools
import importlib.util
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from engine.errors import InputError
from engine.layout import HALF_GRAPH
from engine.manifest import parse_manifest
from export import cli, pipeline
from export.engine_stage import no_engine
from export.evaluation.evaluate import EvaluateOptions, evaluate
from export.graph.parity import INT8, compare, onnx_outputs
from export.graph.rewrite import rewrite
from export.graph.trace import give_own_codes, outputs_of
from export.options import ExportOptions
from export.pipeline import export_bundle
from export.quantization.calibrate import calibrate
from export.quantization.dynamic_int8 import _as_products, quantize_dynamic
from export.quantization.pairs import BATCH, read_pairs
from export.quantization.qdq import QdqLinear, int8_layers, to_int8
from export.trt import build

PAIRS = 20  # of the reader in conftest.py


@pytest.fixture
def name():
    """The network with all there is: shared layers, gates, two passes through one attention."""
    return "cals"


@pytest.fixture(scope="module")
def data(training_data):
    return training_data


@pytest.fixture(scope="module")
def quantized(exported, static_graph):
    @functools.cache
    def make(name):
        path = static_graph(name, "int8")
        count = len(list(int8_layers(exported(name).model)))
        proto = onnx.load_model(path)
        return SimpleNamespace(path=path, count=count, proto=proto, products=products_of(proto.graph))

    return make


def scales_for(model, reader):
    """Scales of int8 activations, from the pairs of the reader."""
    return calibrate(model, int8_layers(model), batches_of(reader), torch.int8)


def batches_of(reader):
    return [{key: torch.from_numpy(x) for key, x in batch.items()} for batch in reader.batches()]


def products_of(graph):
    """What every quantised product reads, by the product's name."""
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    found = {}
    for node in graph.node:
        left, right = (
            (makers.get(name) for name in node.input[:2]) if node.op_type == "MatMul" else (None, None)
        )
        if right is not None and right.op_type == "DequantizeLinear":
            rounded = makers[left.input[0]]
            assert (left.op_type, rounded.op_type) == ("DequantizeLinear", "QuantizeLinear")
            assert list(left.input[1:]) == list(rounded.input[1:]), "one scale there and back"
            found[node.name] = SimpleNamespace(
                activation=rounded.input[0],
                scale=tensors[rounded.input[1]],
                zero=tensors[rounded.input[2]],
                weight=tensors[right.input[0]],
                weight_scale=tensors[right.input[1]],
                weight_zero=tensors[right.input[2]],
                axis=onnx.helper.get_node_attr_value(right, "axis"),
            )
    return found


def test_every_linear_but_the_box_heads_and_the_gates_is_quantised(name, exported, quantized, linear_calls):
    made = quantized(name)
    gates = 1 if name == "cals" else 0
    assert len(made.products) == linear_calls(exported(name).model)["other"] - gates
    assert made.count <= len(made.products), "a layer may run twice"


def test_only_products_read_rounded_values(name, quantized):
    """Norms, residual sums and heads read the floats."""
    graph = quantized(name).proto.graph
    rounded = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    readers = {node.name for node in graph.node if rounded & set(node.input)}
    assert readers == quantized(name).products.keys()


def test_the_graph_is_portable(name, exported, quantized):
    made = quantized(name)
    assert {node.domain for node in made.proto.graph.node} <= {"", "dgm4"}
    assert {opset.domain for opset in made.proto.opset_import} <= {"", "ai.onnx", "dgm4"}
    before = {f.name: f.SerializeToString() for f in exported(name).proto.functions}
    assert {f.name: f.SerializeToString() for f in made.proto.functions} == before
    onnx.checker.check_model(made.path, full_check=True)


def test_activation_scales_are_the_largest_magnitudes_that_onnx_runtime_sees(exported, reader, session_of):
    """At the inputs of the products of ASAP, each known by the bias that is added to it."""
    scales = scales_for(exported("asap").model, reader)
    graph = onnx.load_model(exported("asap").path)
    products = {node.output[0]: node.input[0] for node in graph.graph.node if node.op_type == "MatMul"}
    read = {n.input[2]: n.input[0] for n in graph.graph.node if n.op_type == "Gemm"}
    for node in graph.graph.node:
        if node.op_type == "Add" and products.keys() & {*node.input}:
            first, second = node.input
            read |= {second: products[first]} if first in products else {first: products[second]}
    names = {key: read[f"{key}.bias"] for key in scales}
    graph.graph.output.extend(
        onnx.helper.make_tensor_value_info(key, TensorProto.FLOAT, None) for key in sorted({*names.values()})
    )
    session = session_of(graph.SerializeToString())
    largest = dict.fromkeys(names.values(), 0.0)
    for feed in reader.batches():
        for key, value in zip(largest, session.run(list(largest), feed), strict=True):
            largest[key] = max(largest[key], float(np.abs(value).max()))
    for key, scale in scales.items():
        assert scale == pytest.approx(largest[names[key]] / 127, rel=1e-4)


def test_weights_are_int8_by_their_columns(name, exported, quantized):
    tensors = {t.name: numpy_helper.to_array(t) for t in quantized(name).proto.graph.initializer}
    for key, layer in int8_layers(exported(name).model):
        weight = layer.weight.numpy().T
        key = key if f"{key}.codes" in tensors else key.replace("pool", "refined_pool")  # two pools share it
        codes, scale = tensors[f"{key}.codes"], tensors[f"{key}.weight_scale"]
        np.testing.assert_allclose(scale, np.abs(weight).max(0) / 127, rtol=1e-5)
        assert codes.dtype == np.int8
        assert (np.abs(codes * scale - weight) <= 0.51 * scale).all()
    for product in quantized(name).products.values():
        assert (product.axis, product.zero, product.weight_zero.any()) == (1, 0, False)


def test_the_box_head_and_the_gate_are_floats(name, quantized):
    graph = quantized(name).proto.graph
    floats = [t for t in graph.initializer if "bbox_head" in t.name]
    assert len(floats) >= 6
    assert {t.data_type for t in floats} == {TensorProto.FLOAT}
    widths = {t.name: t.dims for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    gates = [n for n in graph.node if n.op_type == "MatMul" and list(widths.get(n.input[1], ())) == [128, 2]]
    assert len(gates) == (1 if name == "cals" else 0)


def test_codes_are_those_of_onnx_runtimes_quantiser(exported, tiny, tmp_path):
    """Its quantiser rounds the weights to the same integers but for a tie that its division breaks."""
    model = onnx.load_model(exported("hammer").path)
    _as_products(model.graph)
    floats = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if len(t.dims) == 2}
    quantize_dynamic(exported("hammer").path, tmp_path / "theirs.onnx")
    theirs = onnx.load_model(tmp_path / "theirs.onnx").graph
    tensors = {t.name.removesuffix("_quantized"): numpy_helper.to_array(t) for t in theirs.initializer}
    ours = [
        x.codes.numpy() for x in to_int8(rewrite(tiny("hammer")), None).modules() if isinstance(x, QdqLinear)
    ]
    checked = [tensors[key] for key in floats if key in tensors and tensors[key].dtype == np.int8]
    assert len(checked) == len(ours)
    for codes in checked:
        assert any(x.shape == codes.shape and np.abs(x.astype(int) - codes).max() <= 1 for x in ours)


def test_a_layer_is_its_formula_and_its_nodes(session_of, tmp_path):
    """y = [x / s] s ([W / t] t) + b, by hand in float64, in torch and in ONNX Runtime."""
    random = np.random.default_rng(3)
    x, weight, bias = (random.standard_normal(shape) for shape in ((2, 5, 16), (16, 8), 8))
    t, s = np.abs(weight).max(0) / 127, np.abs(x).max() / 200  # some values lie past the range
    codes = np.rint(weight / t)
    want = (np.clip(np.rint(x / s), -128, 127) * s) @ (codes * t) + bias
    t, bias, s, x = (torch.tensor(v, dtype=torch.float32) for v in (t, bias, s, x))
    layer = QdqLinear(torch.tensor(codes, dtype=torch.int8), t, bias, s)
    assert np.abs(layer(x).numpy() - want).max() <= 1e-5 * np.abs(want).max()
    torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=True, opset_version=20, verbose=False)
    (got,) = session_of(tmp_path / "layer.onnx").run(None, {"x": x.numpy()})
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_without_a_scale_a_layer_rounds_as_dynamic_int8(session_of):
    """The product as ONNX's DynamicQuantizeLinear and MatMulInteger give it."""
    make, random = onnx.helper, np.random.default_rng(4)
    x = random.standard_normal((3, 16)).astype(np.float32) + 0.5
    codes = random.integers(-127, 128, (16, 8)).astype(np.int8)
    nodes = [
        make.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        make.make_node("MatMulInteger", ["q", "w", "z"], ["sum"]),
        make.make_node("Cast", ["sum"], ["float"], to=TensorProto.FLOAT),
        make.make_node("Mul", ["float", "s"], ["y"]),
    ]
    values = [make.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    graph = make.make_graph(nodes, "g", values[:1], values[1:], [numpy_helper.from_array(codes, "w")])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)
    (want,) = session_of(model.SerializeToString()).run(None, {"x": x})
    layer = QdqLinear(torch.tensor(codes), torch.ones(8), None)
    assert np.abs(layer(torch.tensor(x)).numpy() - want).max() <= 1e-5 * np.abs(want).max()


def test_products_have_codes_of_their_own(session_of, tmp_path):
    """CALS's two pools share a layer; ONNX Runtime on a CPU without VNNI fails at codes that are shared."""
    random = np.random.default_rng(5)
    layer = QdqLinear(torch.tensor(random.integers(-127, 128, (8, 8)).astype(np.int8)), torch.ones(8), None)
    layer.scale = torch.tensor(0.02)
    twice = torch.nn.Sequential(layer, torch.nn.Tanh(), layer)
    x, path = torch.tensor(random.standard_normal((3, 8)).astype(np.float32)), tmp_path / "twice.onnx"
    torch.onnx.export(twice, (x,), path, dynamo=True, opset_version=20, input_names=["x"], verbose=False)
    model = onnx.load(path)
    give_own_codes(model.graph)
    read = [node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    codes = [tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2]
    assert len(codes) == 2 and all(read.count(name) == 1 for name in codes)
    onnx.checker.check_model(model, full_check=True)
    (got,) = session_of(model.SerializeToString()).run(None, {"x": x.numpy()})
    assert np.abs(got - twice(x).numpy()).max() <= 1e-5 * np.abs(got).max()


def test_answers_are_near_float_on_pairs(name, exported, quantized, reader):
    config = exported(name).model.config
    feeds = list(reader.batches())
    before, after = (onnx_outputs(x.path, config, feeds) for x in (exported(name), quantized(name)))
    difference = compare("int8", "onnx", before, after, INT8)
    assert difference.relative <= 0.1
    assert difference.max > 0, "nothing was quantised"


def test_batch_and_tokens_are_dynamic(name, exported, quantized, session_of):
    config = exported(name).model.config
    session = session_of(quantized(name).path)
    random = np.random.default_rng(0)
    for batch, tokens in ((1, 2), (3, 31)):
        feed = {
            "image": random.standard_normal((batch, 3, 256, 256), dtype=np.float32),
            "input_ids": random.integers(5, 2000, (batch, tokens)),
            "attention_mask": np.ones((batch, tokens), np.int64),
        }
        answers = dict(zip(outputs_of(config), session.run(list(outputs_of(config)), feed), strict=True))
        assert answers["box"].shape == (batch, 4)
        assert answers["logits_tok"].shape == (batch, tokens - 1, 2)
        assert all(np.isfinite(value).all() for value in answers.values())


def test_batches_are_those_of_the_data_set(reader):
    feeds = list(reader.batches())
    assert [len(feed["image"]) for feed in feeds] == [BATCH, BATCH, PAIRS - 2 * BATCH]
    assert len(reader) == 3
    assert any(not feed["attention_mask"].all() for feed in feeds), "padded as in serving"
    item = reader.dataset[BATCH + 3]
    assert np.array_equal(feeds[1]["image"][3], item.image.numpy())
    assert np.array_equal(feeds[1]["input_ids"][3][: len(item.input_ids)], item.input_ids.numpy())
    (second,) = reader.batches(1, 2)
    assert all(np.array_equal(value, feeds[1][key]) for key, value in second.items())


def test_pairs_are_drawn_alike_at_each_call(data, tokenizer, reader):
    def ids(count):
        return [sample.id for sample in read_pairs(data, count, tokenizer, 256).dataset.samples]

    assert ids(PAIRS) == [sample.id for sample in reader.dataset.samples]
    assert len(set(ids(PAIRS))) == PAIRS
    assert ids(5) != ids(PAIRS)[:5], "drawn, not the first ones"
    assert reader.record == {"pairs": PAIRS, "source": f"{data.name}, split train", "seed": 1}


def test_fewer_pairs_are_all_taken_and_said(data, tokenizer, caplog):
    found = read_pairs(data, 512, tokenizer, 256)
    assert found.record["pairs"] == len(found.dataset) == PAIRS + 4
    assert f"has {PAIRS + 4} usable pairs to calibrate on, not 512" in caplog.text


def test_folders_that_do_not_serve(annotated, tokenizer, tmp_path):
    with pytest.raises(InputError, match="expected the data folder"):
        read_pairs(tmp_path / "none", 8, tokenizer, 256)
    folder = annotated(1)
    with pytest.raises(InputError, match=r"train\.json"):
        read_pairs(folder, 8, tokenizer, 256)
    (folder / "metadata" / "train.json").write_text("[]")
    with pytest.raises(InputError, match="split train: expected annotated pairs, got none of 0 usable"):
        read_pairs(folder, 8, tokenizer, 256)


def static(out, **fields):
    common = {"out": out, "model": "hammer", "size": "tiny", "engine": False, "precision": "int8"}
    return ExportOptions(**{**common, **fields})


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A whole export, with an engine where one can be built: .path, .manifest and .stages."""
    rtx = importlib.util.find_spec("tensorrt_rtx") is not None
    engine = {"engine": True, "targets": ("8.6",) if rtx else (), "max_batch": 2, "max_tokens": 24}
    path, stages = tmp_path_factory.mktemp("whole") / "b", []
    made = export_bundle(static(path, calibration=data, calibration_pairs=6, **engine), stages.append)
    assert [entry["file"] for entry in made["engines"]] == (["model.rtx-sm86.engine"] if rtx else [])
    return SimpleNamespace(path=path, manifest=made, stages={stage.name: stage for stage in stages})


def test_a_whole_export_records_its_calibration(data, whole):
    record = {"method": "minmax", "pairs": 6, "source": f"{data.name}, split train", "seed": 1}
    assert whole.manifest["calibration"] == record
    assert whole.manifest["precision"] == "int8"
    assert "model.flat.onnx" in whole.manifest["files"]
    read = parse_manifest((whole.path / "manifest.json").read_bytes()).calibration
    assert vars(read) == record
    text = whole.stages["quantise"].text
    assert text.startswith("50 layers in int8")
    assert f"calibrated (minmax) on 6 pairs of {data.name}, split train" in text
    assert "fixed scales, calibrated (minmax) on 6 pairs" in (whole.path / "README.md").read_text()
    graph = onnx.load_model(whole.path / "model.onnx", load_external_data=False).graph
    assert "QuantizeLinear" in {node.op_type for node in graph.node}
    assert not list(whole.path.glob("float.*"))


def test_the_engine_is_built_from_the_same_products_in_float16(whole):
    """Codes to the bit, scales as float16 has them, float32 in the islands alone."""
    own, half = (onnx.load_model(whole.path / name).graph for name in ("model.onnx", HALF_GRAPH))
    codes, halved = (
        [numpy_helper.to_array(t) for t in graph.initializer if t.data_type == TensorProto.INT8 and t.dims]
        for graph in (own, half)
    )
    assert sorted(x.tobytes() for x in halved) == sorted(x.tobytes() for x in codes)
    wide = {
        t.name.rpartition(".")[0] for t in half.initializer if t.data_type == TensorProto.FLOAT and t.dims
    }
    assert wide - {""} <= set(whole.manifest["float32_layers"])
    assert "branch.bbox_head.0" in wide
    assert 0 < whole.stages["half"].differences[0].rms < 0.1
    for entry in whole.manifest["engines"]:
        assert entry["onnx_sha256"] == whole.manifest["files"][HALF_GRAPH]["sha256"]


def test_the_engines_graph_can_be_evaluated(whole, annotated):
    pairs = annotated(6)
    scores = [
        evaluate(whole.path, pairs, EvaluateOptions(graph=graph, repeats=2)).comparison.agreement
        for graph in (None, HALF_GRAPH)
    ]
    assert scores[0] != scores[1]
    assert max(score.score_change for score in scores) < 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "fp16"}, "calibration: expected precision int8 or fp8 with it, got fp16"),
        ({"calibration_pairs": 0}, "calibration_pairs: expected a whole number from 1, got 0"),
        ({"keep_layers": "auto"}, "keep_layers: needs data"),
    ],
)
def test_options_that_do_not_fit(fields, message, data, tmp_path):
    with pytest.raises(InputError, match=message):
        export_bundle(static(tmp_path / "b", calibration=data, **fields), [].append)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="expected the data folder"):
        export_bundle(static(tmp_path / "b", calibration=tmp_path / "none"), [].append)
    assert not list(tmp_path.iterdir())


def test_calibration_of_floats_is_a_usage_error(data, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", "--calibration", str(data), "--precision", "fp16"])
    assert ended.value.code == 2
    assert "--calibration: expected precision int8 or fp8 with it, got fp16" in capsys.readouterr().err


def test_the_command_line_passes_everything_on(data, tmp_path, monkeypatch):
    heard = []

    def stop(options, *_):
        heard.append(options)
        raise InputError("far enough")

    monkeypatch.setattr(pipeline, "export_bundle", stop)
    flags = ["--calibration-pairs", "9", "--out", str(tmp_path / "b")]
    assert cli.main(["export", "--precision", "int8", "--calibration", str(data), *flags]) == 1
    (options,) = heard
    assert (options.calibration, options.calibration_pairs) == (data, 9)


def test_static_int8_may_have_an_engine(data, tmp_path):
    builder = build.BuilderInfo("tensorrt_rtx", "1", True, "")
    assert no_engine(static(tmp_path, engine=True, calibration=data), builder) is None
    assert "(--calibration)" in no_engine(static(tmp_path, engine=True), builder)
