"""What an export takes from a checkpoint and its neighbours, and that it publishes what it verified."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import draw_feeds
from safetensors import safe_open

import dgm4
from dgm4.model import build
from dgm4.tokenizer import DEMO_VOCABULARY, vocabulary_digest
from engine import Predictor
from engine.errors import CheckpointError, InputError, NumericalError, VerificationError
from engine.layout import FLAT_GRAPH, GRAPH, GRAPH_DATA, WEIGHTS
from export import pipeline, source
from export.bundle.card import model_card
from export.bundle.writer import BundleWriter
from export.manifest_fields import describe_export
from export.options import ExportOptions, check_options
from export.pipeline import export_bundle
from export.source import load_source
from export.stages import Job, Lowered


@pytest.fixture
def load(tmp_path):
    """Run an export up to the network that it would lower: .manifest, .card, .stages and .weights by name."""

    def run(**fields):
        options, stages = ExportOptions(out=tmp_path / "bundle", engine=False, **fields), []
        with BundleWriter(options.out) as writer:
            loaded = load_source(Job(options, writer, stages.append))
            with safe_open(writer.path(WEIGHTS), "pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        manifest = describe_export(options, loaded, None, Lowered(loaded.network, (), (), ()))
        texts = {stage.name: stage.text for stage in stages}
        return SimpleNamespace(manifest=manifest, card=model_card(manifest), stages=texts, weights=weights)

    return run


def saved(path, network, **beside):
    torch.save({"model": network.state_dict(), **beside}, path)
    return path


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """A checkpoint of its own folder."""
    (tmp_path / "run").mkdir()
    return saved(tmp_path / "run" / "checkpoint_best.pth", tiny("hammer"))


def at_128(name):
    torch.manual_seed(3)
    return build(replace(dgm4.model_config(name, "tiny"), image_size=128)).eval()


def test_another_network_than_asked_for(tmp_path):
    path = saved(tmp_path / "c.pth", at_128("asap"))
    with pytest.raises(CheckpointError, match="expected CALS, got the keys of ASAP; leave --model out"):
        export_bundle(ExportOptions(tmp_path / "b", model="cals", checkpoint=path, engine=False), [].append)


def test_a_checkpoint_of_another_resolution_is_served_at_it(tmp_path, session_of):
    network, bundle = at_128("asap"), tmp_path / "bundle"
    path = saved(tmp_path / "c.pth", network, config={"image_res": 128})
    manifest = export_bundle(ExportOptions(out=bundle, checkpoint=path, engine=False), [].append)
    assert manifest["preprocess"]["image_size"] == manifest["model"]["config"]["image_size"] == 128
    feeds = draw_feeds(2, 9, size=128)
    answers = session_of(bundle / GRAPH).run(None, feeds)
    with torch.inference_mode():
        wanted = network(**{key: torch.from_numpy(x) for key, x in feeds.items()})
    for got, want in zip(answers, [x for x in wanted if x is not None], strict=True):
        assert np.abs(got - want.numpy()).max() <= 1e-4
    for backend in ("ort", "torch"):
        with Predictor(bundle, backend) as predictor:
            prediction = predictor.predict(np.full((300, 200, 3), 90, np.uint8), "A minister smiles")
        assert prediction.heatmap.shape == (8, 8)


def test_a_resampled_initialisation_says_so(load, tmp_path):
    """In manifest and card: what its answers are worth is not what the file's network was."""
    state = at_128("hammer").state_dict()
    encoders = {k: v for k, v in state.items() if k.startswith(("visual_encoder.", "text_encoder.bert."))}
    torch.save({"model": encoders}, tmp_path / "ALBEF.pth")
    loaded = load(checkpoint=tmp_path / "ALBEF.pth", model="hammer")
    note = "ALBEF initialisation, heads untrained; positions of a 8 x 8 grid resampled to 16 x 16"
    assert loaded.manifest.weights.kind == "drawn"
    assert loaded.manifest.weights.source == f"ALBEF.pth ({note})"
    assert note in loaded.card


def test_the_checkpoints_hash_is_shown_and_may_be_expected(load, checkpoint):
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    loaded = load(checkpoint=checkpoint, sha256=digest)
    assert f"SHA-256 {digest}" in loaded.stages["load"]
    assert loaded.manifest.weights.sha256 == digest
    with pytest.raises(
        CheckpointError, match=rf"expected SHA-256 {'0' * 64}, got {digest}; .* fetch it again"
    ):
        load(checkpoint=checkpoint, sha256="0" * 64)
    with pytest.raises(InputError, match="sha256: is that of a checkpoint; give one"):
        check_options(ExportOptions(out=checkpoint.parent, sha256=digest))


def test_another_size_than_the_checkpoints_is_refused(load, checkpoint):
    with pytest.raises(CheckpointError, match="expected a network of size base, got tiny"):
        load(checkpoint=checkpoint, size="base")


def test_captions_fit_the_text_positions(load, tmp_path):
    config = replace(dgm4.model_config("hammer", "tiny"), positions=64)
    path = saved(tmp_path / "c.pth", build(config))
    with pytest.raises(InputError, match="max_tokens: expected at most 64, .*got 128; give --max-tokens 64"):
        load(checkpoint=path)
    assert load(checkpoint=path, max_tokens=64).manifest.preprocess.max_tokens == 64


def test_the_state_that_was_taken_stands_in_manifest_and_card(load, tiny, tmp_path):
    path = saved(tmp_path / "c.pth", tiny("hammer"), model_ema=tiny("hammer", seed=2).state_dict())
    loaded = load(checkpoint=path)
    assert loaded.manifest.weights.source == "c.pth (the state model, beside model_ema)"
    assert "the state model, beside model_ema" in loaded.card


def test_the_vocabulary_stands_in_manifest_and_card(load, checkpoint):
    text = DEMO_VOCABULARY.read_text(encoding="utf-8")
    (checkpoint.parent / "vocab.txt").write_bytes(text.replace("\n", "\r\n").encode())
    loaded, digest = load(checkpoint=checkpoint), vocabulary_digest(DEMO_VOCABULARY)
    assert vars(loaded.manifest.vocabulary) == {"source": "vocab.txt", "pieces": 2048, "sha256": digest}
    assert f"2048 word pieces of vocab.txt, SHA-256 `{digest}`" in loaded.card


def test_a_vocabulary_of_another_project_is_refused(load, checkpoint):
    """As many pieces, another order: every check would pass, and every caption be another one."""
    pieces = DEMO_VOCABULARY.read_text(encoding="utf-8").splitlines(keepends=True)
    (checkpoint.parent / "vocab.txt").write_text("".join(reversed(pieces)), encoding="utf-8")
    with pytest.raises(InputError, match=r"expected the demo's 2048 word pieces, got others; give --vocab"):
        load(checkpoint=checkpoint)


def test_weights_beyond_float16_are_written_as_they_are(load, tiny, tmp_path):
    """Before a LayerNorm they are no fault of the network; the file keeps them in float32."""
    network = tiny("hammer")
    with torch.no_grad():
        network.bbox_head[0].weight.mul_(2.0**24)
    loaded = load(checkpoint=saved(tmp_path / "c.pth", network), precision="bf16")
    assert torch.equal(loaded.weights["bbox_head.0.weight"], network.bbox_head[0].weight)
    whole = {name for name, x in loaded.weights.items() if x.dtype == torch.float32}
    assert whole == {"bbox_head.0.weight"}
    text = loaded.stages["weights"]
    assert text.endswith("float16, but bbox_head.0.weight, beyond its range, in float32")


@pytest.fixture
def traced_before(bundle, monkeypatch):
    """Let exports of the drawn HAMMER take its graph from one that was made before."""

    made = bundle("hammer", "fp32").path

    def lower(job, loaded, _calibrated, keep=()):
        for name in (GRAPH, GRAPH_DATA, FLAT_GRAPH):
            shutil.copyfile(made / name, job.writer.path(name))
        return Lowered(loaded.network, keep, (), ())

    monkeypatch.setattr(pipeline, "lower_network", lower)


def spoil_file(monkeypatch):
    """Write one weight that is not the network's."""
    save = source.save_safetensors

    def wrong(state, path, metadata):
        save({**state, "itm_head.0.weight": 2 * state["itm_head.0.weight"]}, path, metadata)

    monkeypatch.setattr(source, "save_safetensors", wrong)


def spoil_answer(monkeypatch):
    def wrong(*_):
        raise NumericalError("the pair: logits_real_fake is NaN")

    monkeypatch.setattr(pipeline.Predictor, "predict", wrong)


@pytest.mark.parametrize("spoil", [spoil_file, spoil_answer])
def test_files_that_answer_otherwise_are_not_published(spoil, traced_before, tmp_path, monkeypatch):
    spoil(monkeypatch)
    options = ExportOptions(out=tmp_path / "bundle", model="hammer", size="tiny", engine=False)
    with pytest.raises(VerificationError, match="stage 'written'") as caught:
        export_bundle(options, [].append)
    assert caught.value.exit_code == 3
    assert not list(tmp_path.iterdir())


def test_the_check_of_the_written_files_is_on_record(bundle):
    record = json.loads((bundle("hammer", "fp32").path / "manifest.json").read_text())["verification"][-1]
    assert (record["stage"], record["against"], record["max"]) == ("written", "rewrite", 0.0)
