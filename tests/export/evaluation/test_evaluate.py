from __future__ import annotations

import json
import shutil
import threading

import numpy as np
import pytest
import torch

from dgm4.data.annotations import read_split
from dgm4.data.dataset import PairDataset, collate
from dgm4.metrics import LabelledOutputs, summarise
from engine import Predictor
from engine.backends import create
from engine.bundle import Bundle
from engine.errors import BackendError, BundleError, InputError, NumericalError
from engine.inputs.text import CaptionTokenizer
from engine.manifest import manifest_digest
from engine.postprocess import sigmoid, softmax
from export.cli import main
from export.evaluation import running
from export.evaluation.agreement import visible_changes
from export.evaluation.evaluate import EvaluateOptions, evaluate
from export.evaluation.gate import GATED
from export.evaluation.scoring import WAITING, Pairs, score

QUICK = {"repeats": 50, "threads": 1}


@pytest.fixture(scope="module")
def data(annotated):
    return annotated(20)


@pytest.fixture(scope="module")
def fp32(bundle, data):
    return evaluate(bundle("asap", "fp32").path, data, EvaluateOptions(batch=3, **QUICK))


@pytest.fixture(scope="module")
def int8(bundle, data):
    return evaluate(bundle("asap", "int8").path, data, EvaluateOptions(**QUICK))


@pytest.fixture
def spoil(monkeypatch):
    """Let a function change the bundle's answers."""

    def install(change):
        def spoilt(*arguments):
            backend = create(*arguments)
            run = backend.run
            backend.run = lambda feeds: change(run(feeds))
            return backend

        monkeypatch.setattr(running, "create", spoilt)

    return install


def one_by_one(model, dataset):
    """The trained network's answers, a pair at a time, padded by hand."""
    rows = [collate([dataset[i]]) for i in range(len(dataset))]
    with torch.inference_mode():
        outputs = [model(row.image, row.input_ids, row.attention_mask) for row in rows]
    width = max(row.token_labels.shape[1] for row in rows)
    logits = np.full((len(rows), width, 2), np.nan)
    labels = np.full((len(rows), width), -100)
    for i, (row, output) in enumerate(zip(rows, outputs, strict=True)):
        logits[i, : output.logits_tok.shape[1]] = output.logits_tok[0]
        labels[i, : row.token_labels.shape[1]] = row.token_labels[0]
    return LabelledOutputs(
        labels=np.array([sample.fake_cls for sample in dataset.samples]),
        logits_real_fake=np.concatenate([x.logits_real_fake for x in outputs]),
        logits_multicls=np.concatenate([x.logits_multicls for x in outputs]),
        pred_box=np.concatenate([x.box for x in outputs]),
        true_box=np.concatenate([row.box for row in rows]),
        logits_tok=logits,
        token_labels=labels,
    )


def blank_answers(count):
    shapes = {"logits_real_fake": 2, "logits_multicls": 4, "box": 4}
    return {name: np.zeros((count, size)) for name, size in shapes.items()}


def dataset_of(bundle, data):
    tokenizer = CaptionTokenizer(bundle.path / "tokenizer.json")
    return PairDataset(read_split(data, "test").samples, tokenizer)


def pairs_of(bundle, data):
    tokenizer = CaptionTokenizer(bundle.path / "tokenizer.json")
    return Pairs(read_split(data, "test").samples, tokenizer, Bundle.open(bundle.path).manifest)


def test_metrics_are_those_of_the_networks_own_answers(fp32, bundle, data, tiny):
    expected = summarise(*one_by_one(tiny("asap"), dataset_of(bundle("asap", "fp32"), data)))
    assert fp32.pairs == 20
    assert fp32.comparison.scores.metrics == pytest.approx(expected, abs=1e-4)
    assert fp32.scores.metrics == pytest.approx(expected, abs=1e-4)


def test_float32_differs_by_rounding_alone(fp32):
    compared = fp32.comparison
    assert max(abs(change.value) for change in compared.changes.values()) < 1e-5
    assert max(abs(x) for change in compared.changes.values() for x in (change.low, change.high)) < 1e-5
    assert (compared.agreement.verdict, compared.agreement.types, compared.agreement.tokens) == (1, 1, 1)
    assert compared.agreement.box_iou_min > 0.999
    assert compared.worst == ()


def test_answers_are_those_that_production_gives(bundle, data):
    opened = Bundle.open(bundle("asap", "fp32").path)
    scored = score({"it": create("ort", opened, "cpu", 1)}, pairs_of(bundle("asap", "fp32"), data), 4)
    answers = scored.outputs["it"]
    tokenizer = CaptionTokenizer(opened.path / "tokenizer.json")
    with Predictor(opened, threads=1) as predictor:
        for row, sample in enumerate(scored.samples):
            found = predictor.predict(sample.picture, sample.text)
            assert softmax(answers.logits_real_fake[row])[1] == pytest.approx(found.score, abs=1e-5)
            types = list(found.types.values())
            assert sigmoid(answers.logits_multicls[row]) == pytest.approx(types, abs=1e-5)
            word_of = tokenizer(sample.text)[1].word_of[1:]
            tokens = softmax(answers.logits_tok[row, : len(word_of)])[:, 1]
            words = [tokens[word_of == i].max() for i in range(len(found.words))]
            assert words == pytest.approx([word.score for word in found.words], abs=1e-5)
            labels = answers.token_labels[row]
            assert (labels != -100).sum() == len(word_of)
            fake = set(word_of[labels[: len(word_of)] == 1].tolist())
            assert fake == set(sample.fake_words)


def test_a_lower_precision_is_measured_against_float32(int8):
    compared = int8.comparison
    for name, change in compared.changes.items():
        value = int8.scores.metrics[name] - compared.scores.metrics[name]
        assert change.value == pytest.approx(value)
        assert change.low <= change.high
    assert 0.5 < compared.agreement.tokens < 1
    worst = compared.worst
    assert 0 < len(worst) <= 8
    assert worst[0].total == pytest.approx(np.mean(list(worst[0].parts.values())))
    verdicts = ["verdict" in case.changes for case in worst]
    assert verdicts == sorted(verdicts, reverse=True)
    for case in worst:
        assert case.changes == visible_changes(case.ours, case.theirs, 1 - case.parts["box"]) != ()
    assert "rounded to float16" in " ".join(int8.notes)


def test_cases_tell_what_is_true(int8):
    for case in int8.comparison.worst:
        words = case.sample.text.rstrip(".").split()
        assert [word.text for word in case.ours.words] == words
        fake = tuple(i in case.sample.fake_words for i in range(len(words)))
        assert case.fake_words == fake
        assert case.ours.score != case.theirs.score


def test_the_record_is_json(int8):
    record = json.loads(json.dumps(int8.to_dict(), allow_nan=False))
    assert record["metrics"]["AUC"] == int8.scores.metrics["AUC"]
    assert record["reference"]["changes"]["mAP"]["value"] == int8.comparison.changes["mAP"].value
    assert len(record["reference"]["worst"]) == len(int8.comparison.worst)
    assert record["seconds"].keys() == {"bundle", "reference", WAITING}


def test_a_metric_without_meaning_is_null(bundle, annotated):
    found = evaluate(bundle("asap", "fp32").path, annotated(1), EvaluateOptions(**QUICK))
    record = found.to_dict()
    assert record["metrics"]["AUC"] is None and record["intervals"]["AUC"] == [None, None]
    json.dumps(record, allow_nan=False)


def test_limit_draws_pairs_of_the_whole_split(bundle, data):
    path = bundle("asap", "fp32").path
    options = {"limit": 6, "reference": "none", **QUICK}
    first, again, other = (evaluate(path, data, EvaluateOptions(seed=seed, **options)) for seed in (0, 0, 1))
    assert first.pairs == 6
    assert first.scores.metrics == again.scores.metrics
    assert first.scores.metrics != other.scores.metrics
    assert evaluate(path, data, EvaluateOptions(**{**options, "limit": 99})).pairs == 20


@pytest.mark.parametrize("limit", [1, 19])
def test_limit_takes_no_pair_twice_and_keeps_the_order(limit):
    drawn = running._draw(list(range(20)), EvaluateOptions(limit=limit))
    assert len(set(drawn)) == limit and drawn == sorted(drawn)


def test_what_a_network_says_of_padding_does_not_count(bundle, data):
    pairs = pairs_of(bundle("asap", "fp32"), data)

    class Careless:
        def run(self, feeds):
            mask = feeds["attention_mask"][:, 1:, None]
            tokens = np.where(mask == 1, [1.0, 2.0], np.nan)
            return {**blank_answers(len(mask)), "logits_tok": tokens}

    found = score({"it": Careless()}, pairs, 7).outputs["it"]
    valid = found.token_labels != -100
    assert 0 < valid.sum() < valid.size
    assert (found.logits_tok[valid] == [1, 2]).all() and not found.logits_tok[~valid].any()


def test_without_a_reference(bundle, data):
    found = evaluate(bundle("asap", "fp32").path, data, EvaluateOptions(reference="none", **QUICK))
    assert found.comparison is None
    assert found.to_dict()["reference"] is None
    assert set(found.seconds) == {"bundle", WAITING}


def test_the_bundles_own_normalisation_is_used(bundle, data, tmp_path):
    path = shutil.copytree(bundle("asap", "fp32").path, tmp_path / "bundle")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["preprocess"]["mean"] = [0.5, 0.5, 0.5]
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))
    opened = Bundle.open(path)
    pairs = pairs_of(opened, data)
    network = create("ort", opened, "cpu", 1)
    with Predictor(opened, threads=1) as predictor:
        for index, sample in enumerate(pairs.samples[:3]):
            answer = network.run(pairs.feeds([pairs.read(index)]))
            expected = predictor.predict(sample.picture, sample.text).score
            found = softmax(answer["logits_real_fake"][0].astype(float))[1]
            assert found == pytest.approx(expected, abs=1e-6)


def test_a_foreign_shape_in_the_manifest_is_a_bundle_error(bundle, data, tmp_path):
    path = shutil.copytree(bundle("asap", "fp32").path, tmp_path / "bundle")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["model"]["config"] = {"width": 3}
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))
    with pytest.raises(BundleError, match=r"model\.config"):
        evaluate(path, data, EvaluateOptions(**QUICK))


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"batch": 0}, {"repeats": 0}])
def test_numbers_that_cannot_be_are_refused(bundle, data, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        evaluate(bundle("asap", "fp32").path, data, EvaluateOptions(**{**QUICK, **wrong}))


@pytest.fixture
def damaged(annotated):
    """20 good pairs, one whose picture breaks off after its header, and three unusable records."""
    records = [
        {"id": "cut", "image": "DGM4/origin/cut.jpg", "text": "a b", "fake_cls": "orig"}
        | {"fake_image_box": [], "fake_text_pos": []},
        {"id": "no fields"},
        7,
        {"id": 5, "image": "DGM4/origin/gone.jpg", "text": "a", "fake_cls": "orig"}
        | {"fake_image_box": [], "fake_text_pos": []},
    ]
    data = annotated(20, records=records)
    whole = (data / "origin" / "0.jpg").read_bytes()
    (data / "origin" / "cut.jpg").write_bytes(whole[: len(whole) - len(whole) // 3])
    return data


def test_bad_records_are_left_out_and_counted(bundle, damaged, fp32, capsys):
    arguments = ["evaluate", str(bundle("asap", "fp32").path), "--data", str(damaged), "--json"]
    assert main([*arguments, "--batch", "4"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["pairs"] == 20
    assert sum(record["problems"].values()) == 4
    assert record["problems"]["picture_unreadable"] == 1
    assert record["metrics"] == pytest.approx(fp32.scores.metrics, abs=1e-4)
    assert "4 bad records were left out" in captured.err and "picture_unreadable 1" in captured.err
    assert main([*arguments, "--on-bad", "raise"]) == 1


def test_a_picture_that_breaks_off_stops_where_that_is_wanted(bundle, damaged):
    annotation = damaged / "metadata" / "test.json"
    annotation.write_text(json.dumps(json.loads(annotation.read_text())[:21]))
    options = EvaluateOptions(on_bad="raise", **QUICK)
    with pytest.raises(InputError, match="sample cut"):
        evaluate(bundle("asap", "fp32").path, damaged, options)


@pytest.mark.parametrize("records", [[], [{"id": 1}]])
def test_no_usable_pair_is_an_error(bundle, annotated, records):
    with pytest.raises(InputError, match=f"split test: .* got none of {len(records)} usable"):
        evaluate(bundle("asap", "fp32").path, annotated(0, records=records), EvaluateOptions(**QUICK))


def test_a_spoilt_bundle_fails_the_gate(bundle, data, spoil, capsys, tmp_path):
    spoil(lambda outputs: {**outputs, "logits_multicls": -outputs["logits_multicls"]})
    out, page = tmp_path / "report.json", tmp_path / "report.html"
    arguments = ["evaluate", str(bundle("asap", "fp32").path), "--data", str(data)]
    assert main([*arguments, "--gate", "--json", "--out", str(out), "--html", str(page)]) == 3
    captured = capsys.readouterr()
    assert "the accuracy gate failed: mAP" in captured.err and captured.out == ""
    record = json.loads(out.read_text())
    assert not record["gate"]["passed"] and len(record["gate"]["failures"]) == 1
    assert record["reference"]["agreement"]["verdict"] == 1
    assert record["reference"]["agreement"]["types"] < 0.1
    assert "failed" in page.read_text()
    assert main(arguments) == 0


def test_a_sound_bundle_passes_the_gate(bundle, data, capsys):
    assert main(["evaluate", str(bundle("asap", "fp32").path), "--data", str(data), "--gate"]) == 0
    out = capsys.readouterr().out
    assert "gate of fp32: passed" in out
    assert all(name in out for name in GATED)


@pytest.mark.parametrize(("extra", "code"), [([], 1), (["--gate"], 3)])
def test_a_bundle_that_answers_nan(bundle, data, spoil, extra, code, capsys):
    spoil(lambda outputs: {**outputs, "box": outputs["box"] * np.float32("nan")})
    assert main(["evaluate", str(bundle("asap", "fp32").path), "--data", str(data), *extra]) == code
    assert "bundle's pred_box: NaN or infinite in 20 of 20 rows" in capsys.readouterr().err


def test_a_backend_that_fails_stops_the_run(bundle, data, spoil):
    def fail(outputs):
        raise BackendError("out of memory")

    spoil(fail)
    with pytest.raises(BackendError, match="out of memory"):
        evaluate(bundle("asap", "fp32").path, data, EvaluateOptions(batch=2, **QUICK))
    assert not [t for t in threading.enumerate() if t.name.startswith("read")]


def test_pictures_are_read_while_the_network_runs(bundle, data):
    """The first run does not end before a picture of the next batch was asked for."""
    pairs = pairs_of(bundle("asap", "fp32"), data)
    asked, read = threading.Event(), pairs.read

    def watched(index):
        if index >= 4:
            asked.set()
        return read(index)

    pairs.read = watched

    class Waiting:
        def run(self, feeds):
            assert asked.wait(20)
            count, length = feeds["input_ids"].shape
            return {**blank_answers(count), "logits_tok": np.zeros((count, length - 1, 2))}

    scored = score({"it": Waiting()}, pairs, 4)
    assert scored.samples == tuple(pairs.samples)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--reference", "none", "--gate"],
        ["--reference", "none", "--checkpoint", "x.pth"],
        ["--out", "a", "--html", "a"],
        ["--limit", "0"],
        ["--split", "dev"],
    ],
)
def test_usage_errors(bundle, data, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(bundle("asap", "fp32").path), "--data", str(data), *arguments])
    assert stopped.value.code == 2


def test_the_numerical_error_names_the_network(bundle, data, spoil):
    spoil(lambda outputs: {**outputs, "logits_real_fake": np.full_like(outputs["logits_real_fake"], np.inf)})
    with pytest.raises(NumericalError, match="the bundle's logits_real_fake"):
        evaluate(bundle("asap", "fp32").path, data, EvaluateOptions(reference="none", **QUICK))
