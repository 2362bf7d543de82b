"""`dgm4 demo` and `dgm4 list`: a first answer without torch, and what there is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

import dgm4
from dgm4.data.make import make_sample_set
from dgm4.shipped import demo_record, demo_sample
from engine import Predictor
from export import cli

WARNING = "demo_weights: trained on made images"


def test_the_demo_answers_its_pair_right(tmp_path, capsys):
    out = tmp_path / "card.png"
    assert cli.main(["demo", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("sample.jpg: manipulated\n")
    assert "face_swap" in printed.out and "text_attribute" in printed.out
    for word in demo_record()["sample"]["words"]:
        assert f"[{word}]" in printed.out
    assert str(out) in printed.out
    with Image.open(out) as card:
        assert min(card.size) > 200
    # Said with the answer, and as one line of the log, which `main` sets up for a process of its own.
    assert WARNING in printed.out


def test_the_demo_needs_no_torch_and_warns_in_one_line(tmp_path):
    """As on a base install: in a process that cannot import what the extras bring."""
    code = (
        "import sys\n"
        "absent = ('torch', 'safetensors', 'onnx', 'onnxscript', 'skimage', 'scipy')\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "from export.cli import main\n"
        "sys.exit(main(['demo']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert "sample.jpg: manipulated" in done.stdout
    assert [line for line in done.stderr.splitlines() if WARNING in line] == done.stderr.splitlines()
    assert (tmp_path / "dgm4-demo.png").is_file()


@pytest.mark.parametrize("out", ["card.txt", "nowhere/card.png"])
def test_a_place_where_no_card_can_be_drawn(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--out", out]) == 1
    assert out in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_shipped_bundle_by_its_name(capsys):
    image, caption = demo_sample()
    assert cli.main(["predict", "demo:asap", str(image), caption, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["model"]["weights"] == "demo"
    assert record["warnings"][0].startswith(WARNING)
    assert cli.main(["inspect", "demo:asap"]) == 0
    assert "demo: trained on made images, no detector" in capsys.readouterr().out


def test_evaluate_warns_of_demo_weights(tmp_path, caplog, capsys):
    make_sample_set(tmp_path / "set", 6)
    command = ["evaluate", "demo:asap", "--data", str(tmp_path / "set"), "--reference", "none"]
    assert cli.main(command) == 0
    assert [x.getMessage() for x in caplog.records if WARNING in x.getMessage()]


def test_list(capsys):
    assert cli.main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [vars(entry) for entry in dgm4.list_models()]
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(dgm4.list_models())
    weights = {tuple(line.split()[:2]): line for line in lines}
    assert "your checkpoint" in weights["cscl", "base"] and " drawn " in weights["cscl", "tiny"]
    assert [line for line in lines if "demo:asap" in line][0].split()[:2] == ["asap", "tiny"]


def test_a_listed_bundle_opens():
    for entry in dgm4.list_models():
        if entry.bundle:
            with Predictor(entry.bundle) as predictor:
                assert predictor.model["name"] == entry.name
