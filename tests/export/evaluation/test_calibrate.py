from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dgm4.config import TYPES
from engine import Predictor
from engine.bundle import Bundle
from engine.errors import BundleError, InputError, NumericalError
from engine.manifest import parse_manifest
from engine.postprocess import softmax
from engine.scores import DECISIONS, Temperatures
from export.cli import main
from export.evaluation import calibrate as library
from export.evaluation import running
from export.evaluation.calibrate import CalibrateOptions, calibrate
from export.evaluation.evaluate import EvaluateOptions, evaluate
from export.evaluation.gate import find_failures

RATE = 0.05
KINDS = ("orig", "orig", "face_swap", "face_attribute&text_swap", "text_attribute")
OPTIONS = CalibrateOptions(split="test", false_alarms=RATE, threads=1)


def write_data(folder, kinds, seed=0):
    """Pairs of these classes in DGM4's layout; of a manipulated text the first word is fake."""
    for name in ("metadata", "origin"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (32, 32), (90, 120, 60)).save(folder / "origin" / "0.png")
    records = [
        {
            "id": seed * 10_000 + number,
            "image": "DGM4/origin/0.png",
            "text": f"a man smiles in the house of {number}",
            "fake_cls": kind,
            "fake_image_box": [4, 4, 20, 20] if "face" in kind else [],
            "fake_text_pos": [0] if "text" in kind else [],
        }
        for number, kind in enumerate(kinds)
    ]
    (folder / "metadata" / "test.json").write_text(json.dumps(records))
    return folder


class Scripted:
    """Answers pairs in order with logits that are twice too sure of themselves."""

    name, device = "scripted", "cpu"

    def __init__(self, data, seed=0, spoil=None):
        self.random = np.random.default_rng(seed)
        self.records = iter(json.loads((data / "metadata" / "test.json").read_text()))
        self.spoil = spoil

    def logits(self, truth):
        return 2 * self.random.normal(np.where(truth, 1.5, -1.5), 1.7).astype(np.float32)

    def run(self, feeds):
        count, length = feeds["input_ids"].shape
        rows = [next(self.records) for _ in range(count)]
        types = np.array([[name in row["fake_cls"] for name in TYPES] for row in rows])
        words = np.zeros((count, length - 1), bool)
        words[:, 0] = types[:, 2:].any(axis=1)
        pair, token = self.logits(types.any(axis=1)), self.logits(words)
        outputs = {
            "logits_real_fake": np.stack([-pair / 2, pair / 2], axis=-1),
            "logits_multicls": self.logits(types),
            "box": np.full((count, 4), 0.3, np.float32),
            "logits_tok": np.stack([np.zeros_like(token), token], axis=-1),
        }
        return outputs if self.spoil is None else self.spoil(outputs)

    def close(self):
        pass


@pytest.fixture
def scripted(monkeypatch):
    """Let a scripted network answer for the bundle."""

    def install(data, seed=0, spoil=None):
        monkeypatch.setattr(running, "create", lambda *_: Scripted(data, seed, spoil))
        return data

    return install


@pytest.fixture(scope="module")
def source(bundle):
    return bundle("asap", "fp32").path


@pytest.fixture
def pairs(scripted, tmp_path):
    """As few as the rate allows."""
    return scripted(write_data(tmp_path / "val", KINDS * 20))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "val", KINDS * 80)


@pytest.fixture(scope="module")
def calibrated(source, many, tmp_path_factory):
    """What was calibrated on `many`; tests leave it as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "create", lambda *_: Scripted(many))
        return calibrate(source, many, tmp_path_factory.mktemp("bundle") / "new", OPTIONS)


def test_what_is_written_is_what_was_fitted(calibrated, source):
    made, old = Bundle.open(calibrated.out), Bundle.open(source)
    made.verify_all()
    manifest = made.manifest
    for name, outcome in calibrated.outcomes.items():
        assert outcome.fitted
        assert getattr(manifest.thresholds, name) == outcome.threshold
        assert getattr(manifest.temperatures, name) == outcome.temperature
        assert 1.2 < outcome.temperature < 3.5, "the logits are twice too large"
        assert outcome.calibrated.brier < outcome.raw.brier
    assert manifest.score_calibration == calibrated.calibration
    record = calibrated.calibration
    assert (record.fitted, record.checked, record.source, record.split) == (200, 200, "val", "test")
    same = {"thresholds", "score_calibration", "files"}
    fields = [{k: v for k, v in m.to_dict().items() if k not in same} for m in (manifest, old.manifest)]
    assert fields[0] == fields[1]
    assert made.manifest.weights.kind == old.manifest.weights.kind == "drawn"
    assert "drawn" in " ".join(calibrated.notes)


def test_the_source_stays_as_it_is_and_lends_its_files(source, pairs, tmp_path):
    before = {path.name: (path.stat().st_mode, path.read_bytes()) for path in source.iterdir()}
    calibrate(source, pairs, tmp_path / "new", OPTIONS)
    assert {path.name: (path.stat().st_mode, path.read_bytes()) for path in source.iterdir()} == before
    assert {path.name for path in (tmp_path / "new").iterdir()} == before.keys()
    assert (tmp_path / "new" / "model.onnx").read_bytes() == before["model.onnx"][1]


@pytest.mark.parametrize("mode", [0o600, 0o444])
def test_files_of_another_mode_are_copied(source, pairs, tmp_path, mode):
    path = shutil.copytree(source, tmp_path / "source")
    for file in path.iterdir():
        file.chmod(mode)
    calibrate(path, pairs, tmp_path / "new", OPTIONS)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {mode}


def test_false_alarms_of_new_pairs_are_as_promised(calibrated, scripted, tmp_path):
    fresh = scripted(write_data(tmp_path / "fresh", KINDS * 200, seed=1), seed=5)
    found = evaluate(calibrated.out, fresh, EvaluateOptions(reference="none", threads=1, repeats=1))
    for name, judgement in found.decisions.items():
        promised, measured = calibrated.calibration.reached[name], judgement.in_use.false_alarm_rate
        assert promised.low <= measured.high and measured.low <= promised.high
        assert measured.value < 2 * RATE
        assert judgement.calibrated.brier < judgement.raw.brier
    verdict = found.decisions["manipulated"]
    assert verdict.calibrated.ece < verdict.raw.ece
    assert found.notes == ("no reference was asked for",)
    assert find_failures(found) == []


def test_the_gate_holds_a_bundle_to_its_false_alarms(calibrated, scripted, tmp_path, capsys):
    def shift(outputs):
        return {**outputs, "logits_real_fake": outputs["logits_real_fake"] + np.float32([0, 4])}

    fresh = scripted(write_data(tmp_path / "fresh", KINDS * 20, seed=1), spoil=shift)
    arguments = ["evaluate", str(calibrated.out), "--data", str(fresh), "--reference", "none"]
    assert main([*arguments, "--json"]) == 0
    (failure,) = json.loads(capsys.readouterr().out)["gate"]["failures"]
    assert failure.startswith("false alarms of manipulated: expected at most ")
    scripted(fresh, spoil=shift)
    assert main([*arguments, "--json", "--threshold", "0.99"]) == 0
    assert json.loads(capsys.readouterr().out)["gate"] is None, "these are not the calibrated thresholds"


def test_pairs_that_calibrated_are_told_when_they_judge(calibrated, many, scripted):
    scripted(many)
    found = evaluate(calibrated.out, many, EvaluateOptions(reference="none", threads=1, repeats=1))
    assert "calibrated on half of these pairs" in found.notes[-1]


def test_the_predictor_divides_logits_by_the_temperature(calibrated, source, many):
    image, caption = many / "origin" / "0.png", "A man smiles in the house."
    with Predictor(source, threads=1) as before, Predictor(calibrated.out, threads=1) as after:
        first, second = (x.predict(image, caption) for x in (before, after))
        temperatures = after.manifest.temperatures
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    assert logit(second.score) == pytest.approx(logit(first.score) / temperatures.manipulated)
    for name in TYPES:
        expected = logit(first.types[name]) / getattr(temperatures, name)
        assert logit(second.types[name]) == pytest.approx(expected, abs=1e-9)
    for one, other in zip(first.words, second.words, strict=True):
        assert logit(other.score) == pytest.approx(logit(one.score) / temperatures.words, abs=1e-9)
    assert second.thresholds == {name: x.threshold for name, x in calibrated.outcomes.items()}
    assert second.manipulated == (second.score >= second.thresholds["manipulated"])


def test_the_card_and_inspect_tell_of_it(calibrated, capsys):
    assert main(["inspect", str(calibrated.out)]) == 0
    text = capsys.readouterr().out
    assert "calibrated on 200 pairs of val, split test, for 5 % false alarms; 200 other pairs gave" in text
    card = Path(calibrated.out, "README.md").read_text()
    assert "Calibrated on 200 pairs of val, split test" in card
    for outcome in calibrated.outcomes.values():
        assert f"{outcome.threshold:.4g} | {outcome.temperature:.4g}" in card


def test_calibrating_again_starts_from_the_logits(calibrated, many, scripted, tmp_path):
    scripted(many)
    again = calibrate(calibrated.out, many, tmp_path / "newer", OPTIONS)
    assert again.calibration == calibrated.calibration
    assert [x.threshold for x in again.outcomes.values()] == [x.before for x in again.outcomes.values()], (
        "what was in use is what is found again"
    )


def test_a_failing_network_leaves_nothing(source, pairs, scripted, tmp_path):
    scripted(
        pairs, spoil=lambda outputs: {**outputs, "logits_tok": outputs["logits_tok"] * np.float32("nan")}
    )
    with pytest.raises(NumericalError, match="words: the network's logits hold NaN or infinity"):
        calibrate(source, pairs, tmp_path / "new", OPTIONS)
    assert not [path for path in tmp_path.iterdir() if "new" in path.name]


def test_too_few_pairs_for_the_rate(source, pairs, tmp_path, capsys):
    arguments = ["calibrate", str(source), "--data", str(pairs), "--split", "test", "--false-alarms", "0.01"]
    assert main([*arguments, "--out", str(tmp_path / "new")]) == 1
    assert (
        "a rate of 0.01 false alarms takes 198 pairs that are not manipulated, half of them to choose the "
        "thresholds and half to check them; the split test has 40: give more pairs or --false-alarms 0.048"
    ) in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("kinds", "kept"),
    [
        (["orig"] * 60, dict.fromkeys(DECISIONS, "none of")),
        (["orig"] * 60 + ["face_swap"] * 20, {"face_attribute": "none of 40 are manipulated"}),
    ],
    ids=["nothing manipulated", "a type missing"],
)
def test_a_class_that_is_missing_keeps_its_temperature(source, scripted, tmp_path, kinds, kept):
    data = scripted(write_data(tmp_path / "val", kinds))
    found = calibrate(source, data, tmp_path / "new", OPTIONS)
    for name, reason in kept.items():
        assert found.outcomes[name].temperature == 1 and found.outcomes[name].fitted
        (note,) = [note for note in found.notes if note.startswith(f"{name} has the temperature 1: ")]
        assert reason in note


def test_a_temperature_that_does_not_help_is_not_taken(source, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "fit_temperature", lambda half: 0.2)
    found = calibrate(source, pairs, tmp_path / "new", OPTIONS)
    assert {outcome.temperature for outcome in found.outcomes.values()} == {1.0}
    note = "the 0.200 fitted does not lower the log loss on the pairs held out; use more pairs"
    assert f"manipulated has the temperature 1: {note}" in found.notes


def test_a_threshold_that_finds_little_is_told(source, many, scripted, tmp_path):
    random = np.random.default_rng(5)
    scripted(
        many,
        spoil=lambda outputs: {**outputs, "logits_real_fake": random.normal(size=(len(outputs["box"]), 2))},
    )
    found = calibrate(source, many, tmp_path / "new", OPTIONS)
    assert found.outcomes["manipulated"].reached.found_rate.value < 0.1
    (note,) = [note for note in found.notes if note.startswith("manipulated finds only ")]
    assert note.endswith("allow more false alarms, or train on more such pairs")
    assert not [note for note in found.notes if note.startswith("face_swap finds only ")]


def test_pairs_that_are_all_manipulated_are_refused(source, scripted, tmp_path):
    data = scripted(write_data(tmp_path / "val", ["face_swap"] * 80))
    with pytest.raises(InputError, match="takes 38 pairs that are not manipulated.*has 0: give more pairs$"):
        calibrate(source, data, tmp_path / "new", OPTIONS)


def test_scores_of_one_cannot_be_calibrated(source, pairs, scripted, tmp_path):
    sure = np.float32([0, 300])
    scripted(
        pairs, spoil=lambda outputs: {**outputs, "logits_real_fake": np.tile(sure, (len(outputs["box"]), 1))}
    )
    with pytest.raises(InputError, match="no threshold of the verdict: more than 0.05 of those"):
        calibrate(source, pairs, tmp_path / "new", OPTIONS)


def test_the_bundle_itself_is_no_place_for_the_new_one(source, pairs):
    with pytest.raises(BundleError, match="is the bundle itself"):
        calibrate(source, pairs, source.parent / "." / source.name, OPTIONS)


def test_items_are_not_parted(source, scripted, tmp_path):
    data = write_data(tmp_path / "val", KINDS * 40)
    records = json.loads((data / "metadata" / "test.json").read_text())
    for record in records:
        record["id"] //= 5  # five pairs of one news item
    (data / "metadata" / "test.json").write_text(json.dumps(records))
    found = calibrate(source, scripted(data), tmp_path / "new", replace(OPTIONS, false_alarms=0.2))
    assert (found.calibration.fitted, found.calibration.checked) == (100, 100)


def test_the_command(source, pairs, tmp_path, capsys):
    arguments = ["calibrate", str(source), "--data", str(pairs), "--split", "test", "--false-alarms", "0.05"]
    assert main([*arguments, "--out", str(tmp_path / "new"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["outcomes"].keys() == set(DECISIONS)
    assert record["calibration"]["reached"]["manipulated"]["count"] == 20
    assert record["out"] == str(tmp_path / "new")


@pytest.mark.parametrize("rate", ["0", "1", "-0.1", "nan", "five"])
def test_a_rate_that_cannot_be_is_a_usage_error(rate, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", "b", "--data", "d", "--false-alarms", rate])
    assert stopped.value.code == 2
    assert "a rate above 0 and below 1" in capsys.readouterr().err


def test_a_calibrated_manifest_keeps_to_its_schema(calibrated):
    fields = json.loads(Path(calibrated.out, "manifest.json").read_text())
    for change, message in (
        ({"temperatures": {"words": 0}}, r"score_calibration\.temperatures\.words"),
        ({"reached": {}}, r"score_calibration\.reached: expected manipulated"),
    ):
        record = {**fields["score_calibration"], **change}
        with pytest.raises(BundleError, match=message):
            parse_manifest(json.dumps({**fields, "score_calibration": record}).encode())
    del fields["score_calibration"]
    assert parse_manifest(json.dumps(fields).encode()).temperatures == Temperatures()


def test_without_a_temperature_scores_are_what_they_were():
    logits = np.random.default_rng(0).normal(size=(500, 2)) * 20
    assert np.array_equal(softmax(logits / Temperatures().manipulated), softmax(logits))
