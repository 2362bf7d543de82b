"""The code blocks of the documentation: Python runs, commands parse, data is what its language says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from PIL import Image

from engine import registry
from engine.registry.config import NetworkConfig
from export.cli.app import make_parser

ROOT = Path(__file__).resolve().parents[2]
OTHER_COMMANDS = (".", "mkdocs", "pytest", "ray", "serve")  # of other projects
LANGUAGES = {"json", "python", "sh", "text", "toml", "yaml"}


@pytest.fixture
def place(tmp_path, monkeypatch, bundle):
    """The folder that the pages speak of: a bundle and a few images."""
    shutil.copytree(bundle("asap", "fp32").path, tmp_path / "bundle")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    for name in ("photo", "a", "b"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(code):
    """Run the blocks in turn, each on a copy of the names that those before it left; return all these."""
    spaces = [{}]
    for number, block in enumerate(code):
        spaces.append(dict(spaces[-1]))
        exec(compile(block, f"block {number}", "exec"), spaces[-1])
    return spaces


def find(spaces, name):
    """The names of the first block that defined `name`."""
    return next(space for space in spaces if name in space)


def test_readme_runs(place, blocks):
    spaces = run(blocks("python")["README"])
    assert 0 <= spaces[-1]["p"].score <= 1
    assert (place / "answer.png").is_file()


def test_serving_runs(place, blocks, capsys):
    pytest.importorskip("prometheus_client")
    testclient = pytest.importorskip("fastapi.testclient")
    pytest.importorskip("celery")
    spaces = run(blocks("python")["serving"])
    assert "no such file" in capsys.readouterr().out
    assert spaces[-1]["strict"].manifest.thresholds.words == 0.7
    with testclient.TestClient(find(spaces, "create_app")["app"]) as client:
        for image, code in (((place / "photo.jpg").read_bytes(), None), (b"no image", "invalid_input")):
            answer = client.post("/v1/predict", data={"caption": "A man"}, files={"image": image})
            while answer.status_code == 503:  # it warms up
                answer = client.post("/v1/predict", data={"caption": "A man"}, files={"image": image})
            assert answer.json().get("code") == code
    celery = find(spaces, "load")
    celery["load"]()
    assert 0 <= celery["judge"]("photo.jpg", "A man")["score"] <= 1
    rows = [{"image": name, "caption": "A man"} for name in ("photo.jpg", "missing.jpg")]
    assert [set(row) == {"error"} for row in spaces[-1]["judge"](rows)] == [False, True]


def test_concurrency_runs(place, blocks, capsys):
    spaces = run(blocks("python")["concurrency"])
    assert len(capsys.readouterr().out.split()) == 2
    assert spaces[-1]["batcher"].statistics().answered == 3


def test_add_a_network_runs(place, blocks, capsys):
    with patch.dict(registry.NETWORKS), patch.dict(NetworkConfig.known):
        run(blocks("python")["add-a-network"])
    assert "glance tiny" in capsys.readouterr().err


def test_only_tested_languages(pages):
    kinds = {kind for text in pages.values() for kind in re.findall(r"^ *```(\w+)$", text, re.M)}
    assert kinds <= LANGUAGES
    assert not [name for name, code in pages.items() if code.count("```") % 2]


def test_data_blocks_parse(blocks):
    for parse, language in ((json.loads, "json"), (tomllib.loads, "toml"), (yaml.safe_load, "yaml")):
        for block in sum(blocks(language).values(), []):
            parse(block)


def commands(blocks):
    """Every command of the shell blocks, as words, redirections left out."""
    for block in sum(blocks("sh").values(), []):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&", line):
                if words := shlex.split(part, comments=True):
                    yield words[: words.index(">")] if ">" in words else words


def parse(words):
    try:
        make_parser().parse_args(words)
    except SystemExit as end:
        assert end.code == 0  # --help


def check(words):
    """Raise, or exit, where a command has no such module, verb, option or extra."""
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    head = " ".join(words[:3])
    if words[0] == "dgm4":
        parse(words[1:])
    elif head.startswith("python -m export.cli"):
        parse(words[3:])
    elif head.startswith("python export/to_trt.py"):
        parse(["export", *words[2:]])
    elif head.startswith("python -m "):  # test_commands runs each of these modules
        path = ROOT / words[2].replace(".", "/")
        source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
        assert not [word for word in words if word.startswith("--") and f'"{word}"' not in source]
    elif head.startswith("python "):
        assert (ROOT / words[1]).is_file()
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = re.findall(r"\[(.*)\]", " ".join(words))
        assert set(",".join(asked).split(",")) - {""} <= extras.keys()
    else:
        assert words[:3] == ["python3", "-m", "venv"] or words[0] in OTHER_COMMANDS, words


def test_commands_parse(blocks):
    found = list(commands(blocks))
    assert len(found) > 20
    for words in found:
        check(words)


@pytest.mark.parametrize("page", ["README", "CONTRIBUTING"])
def test_links_of_the_front_pages(page, pages):
    """Those of docs/ are mkdocs's to check."""
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", pages[page])
    assert [link for link in links if "://" not in link and not (ROOT / link).is_file()] == []
