"""What `dgm4 train` and `dgm4 pretrain` share: settings of a recipe, and a tokenizer of a vocabulary."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from dgm4.tokenizer import build_tokenizer, count_pieces
from dgm4.training.options import TrainOptions, check_fields, read_recipe
from engine.errors import InputError
from engine.inputs.text import CaptionTokenizer


def recipe_of(options: argparse.Namespace, model: str | None = None) -> TrainOptions:
    """The recipe's settings, with what the command line says over them; raises InputError."""
    settings = read_recipe(options.recipe) if options.recipe else {}
    if model:
        settings["model"] = model
    if options.size:
        settings["size"] = options.size
    types = {field.name: type(field.default) for field in fields(TrainOptions)}
    given = {}
    for setting in options.set or []:
        name, equals, text = setting.partition("=")
        if not equals or name not in types:
            raise InputError(f"--set {setting}: expected NAME=VALUE with one of {', '.join(types)}")
        given[name] = _parse(name, text, types[name])
    return TrainOptions(**(settings | check_fields(given, "--set")))


def _parse(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise InputError(f"--set {name}: expected true or false, got {text!r}")
        return text == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise InputError(f"--set {name}: expected {kind.__name__}, got {text!r}") from error


def tokenizer_of(vocabulary: Path) -> tuple[CaptionTokenizer, int]:
    """The tokenizer of a vocabulary, and its number of pieces."""
    pieces = count_pieces(vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_text(build_tokenizer(vocabulary, pieces).to_str(), encoding="utf-8")
        return CaptionTokenizer(file), pieces
