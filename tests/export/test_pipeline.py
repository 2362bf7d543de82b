"""Whole exports of tiny networks: what the bundle holds, and that a failed check leaves nothing."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch

import dgm4
from engine import Predictor, backends
from engine.bundle import Bundle
from engine.errors import BackendError, CheckpointError, InputError, VerificationError
from engine.network import released
from export import lowering, sample, source
from export.engine_stage import no_engine
from export.graph.parity import Tolerance
from export.graph.trace import example_inputs, outputs_of
from export.options import ExportOptions
from export.pipeline import export_bundle
from export.trt import build

STAGES = {
    "fp32": ["load", "tokenizer", "weights", "rewrite", "onnx", "engine", "written", "bundle"],
    "fp16": ["load", "tokenizer", "weights", "rewrite", "cast", "onnx", "engine", "written", "bundle"],
    "bf16": ["load", "tokenizer", "weights", "rewrite", "cast", "onnx", "engine", "written", "bundle"],
    "int8": ["load", "tokenizer", "weights", "rewrite", "onnx", "quantise", "engine", "written", "bundle"],
    "fp8": ["load", "tokenizer", "weights", "rewrite", "cast", "engine", "written", "bundle"],
}
WRITTEN = ("written", "rewrite")
CHECKS = {
    "fp32": [("rewrite", "trained network"), ("onnx", "rewrite"), WRITTEN],
    "fp16": [("rewrite", "trained network"), ("cast", "rewrite"), ("onnx", "rewrite"), WRITTEN],
    "bf16": [("rewrite", "trained network"), ("cast", "rewrite"), ("onnx", "rewrite"), WRITTEN],
    "int8": [("rewrite", "trained network"), ("onnx", "rewrite"), ("int8", "onnx"), WRITTEN],
    "fp8": [("rewrite", "trained network"), ("cast", "rewrite"), WRITTEN],
}
# At most twice the error of the worst output of the worst network: 0.0029, 0.031, 0.13 and 0.245. The weights
# are drawn, which is hard on rounding; tests/export/test_demo_errors.py has the trained networks.
RATIOS = {"fp16": 6e-3, "bf16": 6.3e-2, "int8": 1.5e-1, "fp8": 4.9e-1}


@pytest.fixture(params=sorted(STAGES))
def precision(request):
    return request.param


def options(out, **fields):
    return ExportOptions(**{"out": out, "model": "hammer", "size": "tiny", "engine": False, **fields})


def quietly(stage):
    """Hear of a stage and say nothing."""


def test_stages_and_checks(name, precision, bundle):
    made = bundle(name, precision)
    assert [stage.name for stage in made.stages] == STAGES[precision]
    record = made.manifest["verification"]
    assert [(check["stage"], check["against"]) for check in record] == CHECKS[precision]
    assert all(np.isfinite([check["max"], check["rms"], check["relative"]]).all() for check in record)
    assert "not asked for" in next(stage.text for stage in made.stages if stage.name == "engine")


def test_files_are_whole_and_nothing_else_is_there(name, precision, bundle):
    made = bundle(name, precision)
    graph = {"model.onnx", "model.onnx.data"} if precision != "fp8" else set()  # without calibration
    if precision in ("fp32", "fp16"):  # dynamic int8 is for ONNX Runtime alone
        graph.add("model.flat.onnx")
    files = {*graph, "model.safetensors", "tokenizer.json", "README.md"}
    assert {path.name for path in made.path.iterdir()} == files | {"manifest.json"}
    assert made.manifest["files"].keys() == files
    for file, entry in made.manifest["files"].items():
        content = (made.path / file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    assert json.loads((made.path / "manifest.json").read_text()) == json.loads(json.dumps(made.manifest))


def test_manifest_says_what_it_is(name, precision, bundle):
    manifest = bundle(name, precision).manifest
    assert manifest["model"]["name"] == name
    assert dgm4.ModelConfig.from_dict(manifest["model"]["config"]) == dgm4.model_config(name, "tiny")
    assert manifest["precision"] == precision
    assert "calibration" not in manifest, "for static int8 alone"
    drawn = {"kind": "drawn", "source": "drawn from seed 1", "sha256": None, "licence": "Apache-2.0"}
    assert manifest["weights"] == drawn
    assert [x["name"] for x in manifest["outputs"]] == list(outputs_of(dgm4.model_config(name)))
    assert manifest["types"] == list(dgm4.TYPES)
    assert manifest["preprocess"]["max_words"] == 50


def test_answers_are_the_trained_networks(name, precision, bundle, tiny):
    """Through the first backend that serves it, with inputs that the export itself did not try."""
    model = tiny(name)
    inputs = example_inputs(model.config, 4, 17, seed=99)
    backend = backends.create("auto", Bundle.open(bundle(name, precision).path))
    got = backend.run({k: v.numpy() for k, v in inputs.items()})
    assert backend.name == ("torch" if precision in ("bf16", "fp8") else "ort")
    assert tuple(got) == outputs_of(model.config)
    with torch.inference_mode():
        want = model(**inputs)
    for key, value in got.items():
        reference = getattr(want, key).numpy()
        assert value.dtype == np.float32
        if precision == "fp32":
            assert np.abs(value - reference).max() <= 1e-4
        else:
            ratio = np.sqrt(((value - reference) ** 2).mean() / (reference**2).mean())
            assert 0 < ratio <= RATIOS[precision], key


def test_predictor_serves_it(name, precision, bundle):
    picture = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    with Predictor(bundle(name, precision).path) as predictor:
        answer = predictor.predict(picture, "A man speaks in front of the flag")
    assert 0 <= answer.score <= 1
    assert len(answer.words) == 8
    assert (answer.heatmap is not None) == (name == "asap")


def test_inner_precision(name, bundle):
    """float16 weights but for the islands; float32 inputs and outputs."""
    proto = onnx.load_model(bundle(name, "fp16").path / "model.onnx", load_external_data=False)
    kinds = {t.name: t.data_type for t in proto.graph.initializer}
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert {v.type.tensor_type.elem_type for v in proto.graph.output} == {full}
    assert any("bbox_head" in key for key in kinds)
    assert {kind for key, kind in kinds.items() if "bbox_head" in key} == {full}
    assert {kind for key, kind in kinds.items() if "words" in key} == {half}
    assert sum(kind == half for kind in kinds.values()) > 10


def test_a_bfloat16_graph_is_for_tensorrt(name, bundle):
    """bfloat16 weights but for the islands, which the manifest names; no CPU runtime is offered it."""
    made = bundle(name, "bf16")
    proto = onnx.load_model(made.path / "model.onnx", load_external_data=False)
    full, half = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    kinds = {t.name: t.data_type for t in proto.graph.initializer if t.data_type in (full, half)}
    named = {key: kind for key, kind in kinds.items() if key.endswith((".weight", ".bias"))}
    islands = made.manifest["float32_layers"]
    assert {"vision.norm", "branch.bbox_head.0", "branch.bbox_head.1"} <= set(islands)
    assert len(named) > 50
    whole = set(islands) - {"branch.pool"}  # of which the query alone is an island
    for key, kind in named.items():
        layer = key.rpartition(".")[0].replace("refined_pool", "pool")  # which share their norm
        assert (kind == full) == (layer in whole), key
    with pytest.raises(BackendError, match="'ort' has no products in bf16 on a CPU; use 'torch'"):
        backends.create("ort", Bundle.open(made.path))


def test_weights_for_torch(name, precision, bundle, tiny, tmp_path):
    """Under their released names, loadable by the checkpoint reader."""
    path = bundle(name, precision).path / "model.safetensors"
    loaded = dgm4.load_checkpoint(path)
    assert loaded.config.name == name
    want = tiny(name).state_dict()
    for key, value in loaded.state_dict().items():
        expected = (
            want[key].half().float() if precision != "fp32" and want[key].is_floating_point() else want[key]
        )
        assert torch.equal(value, expected), key


def test_checkpoint_is_exported_with_its_hash(tiny, tmp_path):
    model = tiny("hammer", seed=7)
    path = tmp_path / "checkpoint_best.pth"
    torch.save({"model": model.state_dict(), "epoch": 3}, path)
    stages = []
    manifest = export_bundle(
        options(tmp_path / "bundle", model=None, size=None, checkpoint=path), stages.append
    )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    trained = {"kind": "trained", "source": "checkpoint_best.pth", "sha256": digest, "licence": "not stated"}
    assert manifest["weights"] == trained
    state = safetensors.torch.load_file(tmp_path / "bundle" / "model.safetensors")
    assert torch.equal(state["itm_head.0.weight"], model.state_dict()["itm_head.0.weight"])


def test_a_bad_checkpoint_leaves_nothing(tmp_path):
    path = tmp_path / "bad.pth"
    path.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError):
        export_bundle(options(tmp_path / "bundle", checkpoint=path), quietly)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pth"]


ZERO = Tolerance("max", 0.0)


@pytest.mark.parametrize(
    ("precision", "bound", "stage"),
    [
        ("fp32", "EXACT", "rewrite"),
        ("fp16", "FP16", "cast"),
        ("fp8", "FP8", "cast"),
        ("int8", "INT8", "int8"),
    ],
)
def test_a_failed_check_leaves_nothing(precision, bound, stage, tmp_path, monkeypatch):
    monkeypatch.setattr(source if stage == "rewrite" else lowering, bound, ZERO)
    monkeypatch.setitem(lowering._CHECKS, precision, ((0, 1), ZERO))
    with pytest.raises(VerificationError, match=f"stage '{stage}' differs"):
        export_bundle(options(tmp_path / "bundle", precision=precision), quietly)
    assert not list(tmp_path.iterdir())


def test_a_wrong_rewrite_leaves_nothing(tmp_path, monkeypatch):
    """A query that is one percent off."""
    right = released.fold_latent_query

    def wrong(*arguments):
        folded = right(*arguments)
        return folded._replace(query=1.01 * folded.query)

    monkeypatch.setattr(released, "fold_latent_query", wrong)
    with pytest.raises(VerificationError, match="stage 'rewrite' differs from 'trained network'"):
        export_bundle(options(tmp_path / "bundle"), quietly)
    assert not list(tmp_path.iterdir())


def test_a_failed_check_keeps_the_bundle_of_before(bundle, tmp_path, monkeypatch):
    out = shutil.copytree(bundle("hammer", "fp32").path, tmp_path / "bundle")
    before = (out / "manifest.json").read_bytes()
    monkeypatch.setattr(source, "EXACT", ZERO)
    with pytest.raises(VerificationError):
        export_bundle(options(out), quietly)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (out / "manifest.json").read_bytes() == before
    Bundle.open(out).verify_all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "fp4"}, "precision: expected one of fp32, fp16, bf16, int8, fp8, got 'fp4'"),
        ({"max_batch": 0}, "max_batch: expected 1 to 4096 pairs, got 0"),
        ({"max_tokens": 1}, "max_tokens: expected 16 to 512 tokens, got 1"),
        ({"max_tokens": 513}, "max_tokens: expected 16 to 512 tokens, got 513"),
        ({"size": "large"}, "size: expected one of base, tiny, got 'large'"),
        (
            {"model": "resnet"},
            "model: expected one of hammer, asap, cals, cscl, pmmd_refine, pmmd, got 'resnet'",
        ),
    ],
)
def test_options_that_do_not_fit(fields, message, tmp_path):
    with pytest.raises(InputError, match=message):
        export_bundle(options(tmp_path / "bundle", **fields), quietly)
    assert not list(tmp_path.iterdir())


def test_targets_without_a_builder(tmp_path, monkeypatch):
    """Asked for, an engine is not left out in silence."""
    monkeypatch.setattr(build, "describe_builders", list)
    with pytest.raises(BackendError, match="an engine was asked for, and nothing here builds one"):
        no_engine(options(tmp_path, engine=True, targets=("8.6",)), None)
    assert "nothing here builds one" in no_engine(options(tmp_path, engine=True), None)


def test_int8_has_no_engine_and_says_why(tmp_path):
    reason = no_engine(options(tmp_path, engine=True, precision="int8"), None)
    assert "calibrated Q/DQ nodes" in reason


def test_a_real_engine(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    fields = {"engine": True, "targets": ("8.6",), "max_batch": 2, "max_tokens": 24}
    manifest = export_bundle(options(tmp_path / "bundle", **fields), quietly)
    (engine,) = manifest["engines"]
    assert engine["file"] == "model.rtx-sm86.engine"
    assert engine["compute_capabilities"] == ["8.6"]
    assert [profile["image"]["max"] for profile in engine["profiles"]] == [[2, 3, 256, 256]]
    assert engine["onnx_sha256"] == manifest["files"]["model.onnx"]["sha256"]
    assert (tmp_path / "bundle" / engine["file"]).stat().st_size > 1e6
    opened = Bundle.open(tmp_path / "bundle")
    opened.verify_all()


def test_the_sample_photograph_is_a_file():
    photograph = sample.sample_photograph()
    assert photograph is not None
    assert photograph.is_file()


def test_without_the_package_there_is_no_photograph(monkeypatch):
    monkeypatch.setattr(sample, "_SAMPLE_PACKAGE", "no-such-package-here")
    assert sample.sample_photograph() is None
