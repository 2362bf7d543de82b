"""The names of a bundle's files stand in engine/layout.py alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import engine
from engine import layout

ROOT = Path(engine.__file__).parents[1]
SOURCES = sorted(path for room in ("engine", "export") for path in (ROOT / room).rglob("*.py"))
NAMES = {value for name, value in vars(layout).items() if name.isupper()}
ALLOWED = {  # the inference server's name for a graph, the README of a repository, a temporary file
    ("export/inference_server/config.py", layout.GRAPH),
    ("export/inference_server/repository.py", layout.CARD),
    ("export/cli/recipe.py", layout.TOKENIZER),
}


def test_every_name_is_known():
    assert {"manifest.json", "README.md", "model.onnx", "model.onnx.data", "tokenizer.json"} <= NAMES
    assert layout.engine_name("trt-sm90") == "model.trt-sm90.engine"


@pytest.mark.parametrize("room", ["engine", "export"])
def test_no_other_module_spells_one(room):
    spelled = set()
    for path in SOURCES:
        place = path.relative_to(ROOT).as_posix()
        if not place.startswith(f"{room}/") or place == "engine/layout.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in NAMES:
                spelled.add((place, node.value))
    assert spelled <= ALLOWED
