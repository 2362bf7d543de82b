"""The command line: exit codes, one line for an error, JSON that parses, and a clean end when stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dgm4.shipped import demo_checkpoint, demo_record
from dgm4.tokenizer import DEMO_VOCABULARY, VOCABULARY
from engine.errors import InputError
from export import cli, pipeline, source
from export.graph.parity import Tolerance
from export.trt.build import BuilderInfo
from export.trt.features import Features
from export.trt.options import EngineOptions

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "export" / "to_trt.py"


def export(out, *arguments):
    return ["export", "--model", "hammer", "--target", "none", "--out", str(out), *arguments]


def box_overlap(one, other):
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    left, top, right, bottom = (f(a, b) for f, a, b in zip((max, max, min, min), one, other, strict=True))
    shared = max(0, right - left) * max(0, bottom - top)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (one, other)]
    return shared / (sum(areas) - shared)


def failed(capsys, arguments, code):
    """Run, expect the exit code, one line on stderr and nothing on stdout; return the line."""
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("dgm4: error:")]
    assert len(lines) == 1
    assert err.splitlines()[-1] == lines[0]
    return lines[0]


def test_export_prints_the_answer_for_the_sample(bundle, capsys, monkeypatch):
    """Over the stages and the bundle of an export that was made before."""
    made = bundle("hammer", "fp32")

    def again(_options, report, begin):
        for stage in made.stages:
            begin(stage.name)
            report(stage)
        return made.manifest

    monkeypatch.setattr(pipeline, "export_bundle", again)
    assert cli.main(export(made.path)) == 0
    out, err = capsys.readouterr()
    assert out.startswith("astronaut.png: ")
    assert "\n  score " in out and "\n  timing" in out
    assert [line.split()[0] for line in err.splitlines()] == [s.name for s in made.stages for _ in range(2)]
    assert err.splitlines()[0] == f"{made.stages[0].name} ..."
    assert cli.main([*export(made.path), "-q"]) == 0
    assert capsys.readouterr().err == ""
    assert "from the trained network: max" in err


def test_a_failed_verification_exits_with_3(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(source, "EXACT", Tolerance("max", 0.0))
    line = failed(capsys, export(tmp_path / "bundle"), 3)
    assert "stage 'rewrite'" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["export", "--model", "resnet"],
        ["export", "--precision", "fp4"],
        ["export", "--size", "large"],
        ["export", "--max-batch", "many"],
        ["export", "--surprise"],
        ["inspect"],
    ],
)
def test_bad_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: dgm4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "turing"], "expected compute capabilities as 8.6,8.9 or none, got 'turing'"),
        (["--max-batch", "0"], "expected 1 to 4096 pairs, got '0'"),
        (["--max-tokens", "1000"], "expected 16 to 512 tokens, got '1000'"),
        (["--max-tokens", "2"], "expected 16 to 512 tokens, got '2'"),
        (["--profiles", "1x32,8"], "expected auto or pairs x tokens as 1x32,32x128, got '1x32,8'"),
        (["--profiles", "0x32"], "expected auto or pairs x tokens"),
        (["--profiles", "1x32,32x128"], "options say how the engine is built, and --target none builds none"),
        (["--strip-weights"], "options say how the engine is built, and --target none builds none"),
        (["--build-limit", "0"], "expected seconds above 0, a day at most, got '0'"),
        (["--workspace", "0"], "expected 1 to 1048576 MiB, got '0'"),
        (["--hardware-compatible", "hopper"], "invalid choice: 'hopper'"),
    ],
)
def test_values_that_do_not_fit_exit_with_2(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(export(tmp_path / "bundle", *arguments))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_not_there_exits_with_1(tmp_path, capsys):
    path = tmp_path / "absent.pth"
    assert f"{path}: no such file" in failed(capsys, export(tmp_path / "b", "--checkpoint", str(path)), 1)
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_of_another_size_exits_with_1(tmp_path, capsys):
    """Before anything is traced."""
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n", encoding="utf-8")
    arguments = export(tmp_path / "b", "--vocab", str(path))
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert "expected 2048 word pieces, got 1" in err
    assert [line.split()[0] for line in err.splitlines()] == ["load", "load", "tokenizer", "dgm4:"]
    assert [p.name for p in tmp_path.iterdir()] == ["vocab.txt"]


def test_an_unwritable_place_exits_with_1(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert str(tmp_path / "file") in failed(capsys, export(tmp_path / "file" / "bundle"), 1)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_something_else_in_the_place_is_kept(tmp_path, capsys):
    """A folder that is no bundle is not replaced."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"picture")
    failed(capsys, export(tmp_path / "photos"), 1)
    assert [p.name for p in tmp_path.rglob("*")] == ["photos", "holiday.jpg"]


def test_verbose_shows_the_traceback(tmp_path, capsys, caplog):
    assert cli.main(["--verbose", "inspect", str(tmp_path / "absent")]) == 1
    assert "Traceback" in caplog.text


def test_how_an_engine_is_built_reaches_the_export(tmp_path, monkeypatch):
    heard = []

    def stop(options, *_):
        heard.append(options.building)
        raise InputError("far enough")

    monkeypatch.setattr(pipeline, "export_bundle", stop)
    out = ["--drawn", "--out", str(tmp_path / "b")]
    flags = ["--profiles", "1x32, 32x128", "--timing-cache", "t.cache", "--build-limit", "90", "--workspace"]
    flags += ["512", "--strip-weights", "--hardware-compatible", "same"]
    monkeypatch.setattr(
        "export.options.build.find_builder", lambda: BuilderInfo("tensorrt", "11.4", True, "")
    )
    assert cli.main(["export", *out, *flags]) == 1
    assert cli.main(["export", *out, "--profiles", "auto", "--timing-cache", "none"]) == 1
    assert cli.main(["export", *out]) == 1
    features = Features(strip_weights=True, hardware="same")
    assert heard == [
        EngineOptions("auto", ((1, 32), (32, 128)), Path("t.cache"), 90.0, 512, features),
        EngineOptions(timing_cache=None),
        EngineOptions(),
    ]


def test_options_that_do_not_fit_exit_with_2_and_their_own_names(tmp_path, capsys):
    for flags, message in {
        ("--strip-weights", "--version-compatible"): "the lean runtime",
        ("--profiles", "64x128"): "--profiles: profile 1 (64x128): expected 1..32 pairs",
        ("--keep-layers", "3"): "--keep-layers: needs a precision below fp32",
        ("--precision", "int8", "--workspace", "64"): "--calibration: an engine in int8 or fp8 needs it",
    }.items():
        with pytest.raises(SystemExit) as stop:
            cli.main(["export", "--drawn", "--out", str(tmp_path / "b"), *flags])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_verbs_that_need_no_torch_do_not_import_it():
    code = (
        "import sys; sys.argv = ['dgm4', 'doctor', '--json']; from export.cli import app; app.make_parser(); "
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_the_script_works_from_another_folder(tmp_path):
    """With a relative output and nothing but data on stdout."""
    command = [sys.executable, str(SCRIPT), "--target", "none", "--out", "here", "--model", "asap", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["bundle"] == "here"
    assert record["manifest"] == json.loads((tmp_path / "here" / "manifest.json").read_text())
    assert record["manifest"]["model"]["name"] == "asap"
    assert [stage["stage"] for stage in record["stages"]][:2] == ["load", "tokenizer"]
    assert 0 <= record["sample"]["score"] <= 1
    assert {p.name for p in tmp_path.iterdir()} == {"here"}
    assert "Warning" not in done.stderr


def test_without_an_argument_the_trained_demo_finds_the_face_and_the_words(tmp_path, capsys, monkeypatch):
    """ASAP on the pair that ships: the box lies on the swapped face, the changed words alone are marked."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "--target", "none", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["bundle"] == "bundle-asap-tiny-fp32"
    assert record["manifest"]["weights"]["kind"] == "demo"
    sample, truth = record["sample"], demo_record()["sample"]
    assert [warning.split(":")[0] for warning in sample["warnings"]] == ["demo_weights"]
    assert sample["manipulated"]
    assert [word["text"].lower() for word in sample["words"] if word["manipulated"]] == truth["words"]
    assert box_overlap(sample["box"], truth["box"]) > 0.5
    known = demo_record()["networks"]["asap"]["metrics"]
    assert record["manifest"]["accuracy"][0]["reference"] == known
    assert f"{100 * known['AUC']:.2f}" in (tmp_path / record["bundle"] / "README.md").read_text()


def test_drawn_weights_on_request(tmp_path, capsys):
    out = tmp_path / "bundle"
    arguments = ["export", "--model", "asap", "--drawn", "--target", "none", "--out", str(out)]
    assert cli.main([*arguments, "--plot", str(tmp_path / "sample.png")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("astronaut.png: ")
    assert "untrained_weights: the scores mean" in printed
    assert "\n  drawn" in printed and str(tmp_path / "sample.png") in printed
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "sample.png"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model", "cscl"], True),
        (["--model", "asap", "--size", "base"], True),
        (["--model", "cscl", "--drawn"], False),
        (["--model", "cscl", "-q"], False),
        (["--model", "asap"], False),
    ],
)
def test_weights_that_nobody_asked_to_draw_are_told_before_the_work(
    tmp_path, capsys, monkeypatch, flags, told
):
    def export_bundle(*_):
        assert ("they are drawn" in capsys.readouterr().err) == told
        raise InputError("begun")

    monkeypatch.setattr("export.pipeline.export_bundle", export_bundle)
    assert cli.main(["export", *flags, "--out", str(tmp_path / "b")]) == 1
    assert "begun" in capsys.readouterr().err


def test_the_script_shows_its_help_from_another_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert "--precision" in done.stdout


def test_a_stopped_export_leaves_nothing(tmp_path):
    """SIGTERM while the graph is traced: exit 143, no bundle, no partial folder."""
    command = [
        sys.executable,
        str(SCRIPT),
        "--target",
        "none",
        "--out",
        str(tmp_path / "bundle"),
        "--model",
        "asap",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        heard = []
        for line in process.stderr:
            heard.append(line)
            if line.startswith("rewrite"):
                assert list(tmp_path.iterdir()), "the partial folder is there while it works"
                os.kill(process.pid, signal.SIGTERM)
                break
        out, err = process.communicate(timeout=60)
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
    assert process.returncode == 143, "".join(heard) + err
    assert out == ""
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_the_vocabulary_beside_a_checkpoint_is_its_own(tmp_path, capsys):
    """The demo's weights with two word pieces exchanged: its record does not apply to that tokenizer."""
    checkpoint = shutil.copy(demo_checkpoint("hammer"), tmp_path / "best.safetensors")
    pieces = DEMO_VOCABULARY.read_text().splitlines()
    vocabulary, out = tmp_path / VOCABULARY, tmp_path / "bundle"
    vocabulary.write_text("\n".join([*pieces[:-2], pieces[-1], pieces[-2]]) + "\n")
    arguments = ["export", "--checkpoint", str(checkpoint), "--target", "none", "--out", str(out), "--json"]
    assert cli.main([*arguments, "--vocab", str(vocabulary)]) == 0
    manifest = json.loads(capsys.readouterr().out)["manifest"]
    words = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    assert (words[pieces[-1]], words[pieces[-2]]) == (2046, 2047)
    assert manifest.get("accuracy", []) == []


def test_a_plot_that_cannot_be_is_found_before_the_export(tmp_path, capsys):
    for place, message in (("a.xyz", "ending in .png"), ("absent/a.png", "a folder that exists")):
        line = failed(capsys, export(tmp_path / "bundle", "--plot", str(tmp_path / place)), 1)
        assert message in line
    assert not list(tmp_path.iterdir())
