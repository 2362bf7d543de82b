"""Where a command writes: never over its inputs, never into a bundle."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from engine.errors import InputError
from export import cli
from export.output import check_output, open_output


@pytest.fixture
def served(bundle):
    return bundle("asap", "fp32").path


def test_an_input_is_not_overwritten(tmp_path):
    source, folder = tmp_path / "a.jpg", tmp_path / "data"
    source.write_bytes(b"image")
    (folder / "metadata").mkdir(parents=True)
    (folder / "metadata" / "test.json").write_text("[]")
    for path in (source, folder / "metadata" / "test.json", folder / ".." / "a.jpg"):
        with pytest.raises(InputError, match="--out .*: would overwrite an input; choose another name"):
            check_output(path, "--out", [source, None, folder])
    check_output(tmp_path / "new.json", "--out", [source, folder])
    assert source.read_bytes() == b"image"


def test_a_bundle_is_not_written_into(tmp_path, served):
    for name in ("answer.png", "manifest.json", "model.onnx"):
        with pytest.raises(InputError, match="lies in a bundle, which it would damage"):
            check_output(served / name, "--plot")
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "a web page's"}))
    with open_output(tmp_path / "answer.json") as out:
        out.write("{}")
    assert (tmp_path / "answer.json").read_text() == "{}"


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_predict_keeps_its_image(option, tmp_path, served, capsys):
    image = tmp_path / "mine.png"
    Image.new("RGB", (60, 40), "teal").save(image)
    before = image.read_bytes()
    assert cli.main(["predict", str(served), str(image), "a caption", option, str(image)]) == 1
    assert "would overwrite an input" in capsys.readouterr().err
    assert image.read_bytes() == before
