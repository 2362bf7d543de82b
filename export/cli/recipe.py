"""What `dgm4 train` and `dgm4 pretrain` share: settings of a recipe, and a tokenizer of a vocabulary."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from dgm4.tokenizer import build_tokenizer, count_pieces
from dgm4.training.options import TrainOptions, check_fields, read_recipe
from engine.errors import InputError, did_you_mean, quoted, shorten
from engine.inputs.text import CaptionTokenizer
from export.cli.parser import usage_errors


def recipe_of(options: argparse.Namespace, model: str | None = None) -> TrainOptions:
    """The recipe's settings, with what the command line says over them.

    Raises InputError for a recipe that cannot be used; a setting on the command line is an error of usage.
    """
    settings = read_recipe(options.recipe) if options.recipe else {}
    if model:
        settings["model"] = model
    if options.size:
        settings["size"] = options.size
    types = {field.name: type(field.default) for field in fields(TrainOptions)}
    given = {}
    with usage_errors(options.parser):
        for setting in options.set or []:
            name, equals, text = setting.partition("=")
            if not equals or name not in types:
                raise InputError(
                    f"--set {shorten(setting)}: expected NAME=VALUE with one of {', '.join(types)}"
                    f"{did_you_mean(name, types)}"
                )
            given[name] = _parse(name, text, types[name])
        given = check_fields(given, "--set")
    try:
        return TrainOptions(**(settings | given))
    except InputError as error:
        name = str(error).partition(":")[0]
        if name in given:
            options.parser.error(f"--set {error}")
        raise


def _parse(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise InputError(f"--set {name}: expected true or false, got {quoted(text)}")
        return text == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise InputError(f"--set {name}: expected {kind.__name__}, got {quoted(text)}") from error


def tokenizer_of(vocabulary: Path) -> tuple[CaptionTokenizer, int]:
    """The tokenizer of a vocabulary, and its number of pieces."""
    pieces = count_pieces(vocabulary)
    content = build_tokenizer(vocabulary, pieces).to_str().encode()
    return CaptionTokenizer(vocabulary, content=content), pieces
