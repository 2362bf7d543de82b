"""The configuration for Triton Inference Server, parsed by the server's own compiled model_config.proto."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from engine import Bundle
from engine.errors import InputError
from engine.manifest import EngineEntry
from export.inference_server.answers import ANSWER
from export.inference_server.config import ServerOptions, write_configs

PLAN = EngineEntry(
    file="model.trt-sm90.engine",
    library="tensorrt",
    version="10.13.0",
    compute_capabilities=("9.0",),
    onnx_sha256="0" * 64,
    profiles=({"input_ids": {}}, {"input_ids": {}}),
)


@pytest.fixture(scope="session")
def proto():
    """The messages of tritonclient, without gRPC, which its package would import."""
    pytest.importorskip("tritonclient")
    package = importlib.util.find_spec("tritonclient").submodule_search_locations[0]
    path = Path(package, "grpc", "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parse(proto):
    """Parse a configuration; an unknown field, a wrong type or an unknown value of an enum is an error."""
    from google.protobuf import text_format

    return lambda text: text_format.Parse(text, proto.ModelConfig())


def write_config(name, manifest, engine, options):
    """The configuration of the only model that a bare network is."""
    (config,) = write_configs(name, manifest, engine, options).values()
    return config


@pytest.fixture
def manifest(name, bundle):
    return Bundle.open(bundle(name, "fp32").path).manifest


def test_the_parser_refuses_what_the_server_would(parse):
    from google.protobuf.text_format import ParseError

    for wrong in (
        'nam: "x"',
        "max_batch_size: true",
        "instance_group { kind: KIND_TPU }",
        "input { dims: 1.5 }",
    ):
        with pytest.raises(ParseError):
            parse(wrong)


def test_every_field_of_the_default(parse, proto, manifest):
    config = parse(write_config("detector", manifest, None, ServerOptions()))
    assert (config.name, config.platform, config.backend) == ("detector", "onnxruntime_onnx", "")
    assert config.default_model_filename == "model.onnx"
    assert config.max_batch_size == manifest.limits.max_batch == 32
    types = {"float32": proto.TYPE_FP32, "int64": proto.TYPE_INT64}
    for fields, specs in ((config.input, manifest.inputs), (config.output, manifest.outputs)):
        assert [field.name for field in fields] == [spec.name for spec in specs]
        assert [field.data_type for field in fields] == [types[spec.dtype] for spec in specs]
    dims = {field.name: list(field.dims) for field in (*config.input, *config.output)}
    expected = {"image": [3, 256, 256], "input_ids": [-1], "attention_mask": [-1], "logits_real_fake": [2]}
    expected |= {"logits_multicls": [4], "box": [4], "logits_tok": [-1, 2]}
    assert dims == expected | ({"attention_map": [-1, 257]} if "attention_map" in dims else {})
    (group,) = config.instance_group
    assert (group.count, group.kind, list(group.profile)) == (1, proto.ModelInstanceGroup.KIND_AUTO, [])
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 32]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert not config.HasField("optimization")
    assert not config.parameters
    assert {field.name for field, _ in config.ListFields()} == {
        *("name", "platform", "max_batch_size", "input", "output", "instance_group", "dynamic_batching"),
        *("default_model_filename", "model_warmup"),
    }


def test_the_tensors_are_those_of_the_graph(parse, name, bundle, manifest):
    """What the server compares: names, types, and shapes behind the batch."""
    config = parse(write_config("detector", manifest, None, ServerOptions()))
    session = onnxruntime.InferenceSession(bundle(name, "fp32").path / "model.flat.onnx")
    for fields, nodes in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        shapes = {node.name: [n if isinstance(n, int) else -1 for n in node.shape] for node in nodes}
        assert {field.name: [-1, *field.dims] for field in fields} == shapes


def test_warm_up_requests_run(parse, bundle):
    made = bundle("asap", "fp32").path
    config = parse(write_config("detector", Bundle.open(made).manifest, None, ServerOptions()))
    assert [(warm.name, warm.batch_size) for warm in config.model_warmup] == [
        ("batch 1", 1),
        ("batch 32", 32),
    ]
    session = onnxruntime.InferenceSession(made / "model.flat.onnx")
    warm, types = config.model_warmup[0], {11: np.float32, 9: np.int64}
    assert all(tensor.WhichOneof("input_data_type") == "zero_data" for tensor in warm.inputs.values())
    feeds = {n: np.zeros((1, *t.dims), types[t.data_type]) for n, t in warm.inputs.items()}
    assert feeds["input_ids"].shape == (1, 24)
    outputs = dict(zip([node.name for node in session.get_outputs()], session.run(None, feeds), strict=True))
    assert outputs["logits_tok"].shape == (1, 23, 2)


def test_every_option(parse, proto, bundle):
    manifest = replace(Bundle.open(bundle("asap", "fp32").path).manifest, precision="fp16")
    options = ServerOptions(
        kind="gpu", instances=2, queue_delay_us=0, preferred=(16, 4), accelerate=True, threads=3
    )
    config = parse(write_config('odd "name"', manifest, None, options))
    assert config.name == 'odd "name"'
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, proto.ModelInstanceGroup.KIND_GPU)
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert dict(accelerator.parameters) == {
        "precision_mode": "FP16",
        "trt_layer_norm_fp32_fallback": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "/tmp/dgm4-tensorrt",
    }
    assert {k: v.string_value for k, v in config.parameters.items()} == {"intra_op_thread_count": "3"}


def test_a_plan(parse, proto, manifest):
    config = parse(write_config("detector", manifest, PLAN, ServerOptions(plan=True)))
    assert (config.platform, config.default_model_filename) == ("tensorrt_plan", "model.plan")
    (group,) = config.instance_group
    assert (group.kind, list(group.profile)) == (proto.ModelInstanceGroup.KIND_GPU, ["0", "1"])


def test_a_predictor(parse, proto, manifest):
    options = ServerOptions(form="python", kind="gpu", instances=2, queue_size=7, preferred=(4,), threads=3)
    (text,) = write_configs("detector", manifest, None, options).values()
    config = parse(text)
    assert (config.backend, config.platform, config.max_batch_size) == ("python", "", 32)
    assert [(x.name, x.data_type, list(x.dims), x.optional) for x in config.input] == [
        ("image", proto.TYPE_STRING, [1], True),
        ("caption", proto.TYPE_STRING, [1], True),
    ]
    assert [x.name for x in config.output] == [name for name, *_ in ANSWER]
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, proto.ModelInstanceGroup.KIND_GPU)
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 7
    assert {k: v.string_value for k, v in config.parameters.items()} == {"threads": "3"}


@pytest.mark.parametrize("plan", [None, PLAN])
def test_an_ensemble_hands_on_what_its_models_take_and_give(parse, manifest, plan):
    options = ServerOptions(form="ensemble", plan=plan is not None)
    configs = {k: parse(v) for k, v in write_configs("m", manifest, plan, options).items()}
    assert list(configs) == ["m", "m-pre", "m-network", "m-post"]
    assert {name: config.name for name, config in configs.items()} == {name: name for name in configs}
    ensemble = configs.pop("m")
    known = {x.name: (x.data_type, list(x.dims)) for x in ensemble.input}
    for step, (name, config) in zip(ensemble.ensemble_scheduling.step, configs.items(), strict=True):
        assert step.model_name == name
        given = {x.name: (x.data_type, list(x.dims)) for x in config.input}
        assert {key: known[value] for key, value in step.input_map.items()} == given
        made = {x.name: (x.data_type, list(x.dims)) for x in config.output}
        assert dict(step.output_map).keys() == made.keys()
        for key, value in step.output_map.items():
            assert value not in known  # the server takes a tensor from one step alone
            known[value] = made[key]
    assert {x.name: (x.data_type, list(x.dims)) for x in ensemble.output}.items() <= known.items()


def test_a_bundle_of_single_pairs_is_not_batched(parse, manifest):
    single = replace(manifest, limits=replace(manifest.limits, max_batch=1))
    config = parse(write_config("detector", single, None, ServerOptions()))
    assert config.max_batch_size == 1
    assert config.WhichOneof("scheduling_choice") is None
    assert [warm.batch_size for warm in config.model_warmup] == [1]


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        (None, {"kind": "tpu"}, "kind: expected one of auto, cpu, gpu, got 'tpu'"),
        (PLAN, {"kind": "cpu"}, "a TensorRT plan runs on a GPU"),
        (None, {"preferred": (8, 64)}, "expected batches up to 32, the bundle's limit, got 64"),
        (None, {"accelerate": True, "kind": "cpu"}, "for ONNX Runtime on a GPU"),
        (PLAN, {"accelerate": True}, "for ONNX Runtime on a GPU"),
        (PLAN, {"threads": 2}, "those of a network on a CPU"),
        (None, {"form": "julia"}, "with: expected one of network, python, ensemble, got 'julia'"),
        (PLAN, {"form": "python"}, "plan is for the server's own runtimes: leave it out with python"),
        (None, {"form": "python", "accelerate": True}, "accelerate is for the server's own runtimes"),
    ],
)
def test_options_that_do_not_fit(bundle, engine, options, message):
    manifest = Bundle.open(bundle("asap", "fp32").path).manifest
    with pytest.raises(InputError, match=message):
        write_config("detector", manifest, engine, ServerOptions(**options))


def test_dynamic_int8_is_not_for_tensorrt(bundle):
    manifest = replace(Bundle.open(bundle("asap", "fp32").path).manifest, precision="int8")
    with pytest.raises(InputError, match="from a calibrated graph"):
        write_config("detector", manifest, None, ServerOptions(accelerate=True))


def test_strings_are_escaped(parse, bundle):
    manifest = Bundle.open(bundle("asap", "fp32").path).manifest
    for text in ('a"b', "a\\b", "a\nb", json.dumps({"a": "b"})):
        assert parse(write_config(text, manifest, None, ServerOptions())).name == text
