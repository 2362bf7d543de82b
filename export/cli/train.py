"""`dgm4 train`: train a network on a data folder."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from dgm4.config import model_config
from dgm4.tokenizer import VOCABULARY, build_tokenizer, count_pieces, find_vocabulary
from dgm4.training.options import TrainOptions, check_fields, read_recipe
from engine.errors import InputError
from engine.inputs.text import CaptionTokenizer


def run(options: argparse.Namespace) -> int:
    """Train; progress and log go to stderr, stdout gets one line of JSON with what came out."""
    from dgm4.training.initialise import Initialisation
    from dgm4.training.processes import leave
    from dgm4.training.trainer import BEST, LAST, Place, Trainer

    recipe = TrainOptions(**_fields(options))
    vocabulary = options.vocab or find_vocabulary(model_config(recipe.model, recipe.size).vocabulary)
    tokenizer, pieces = _tokenizer(vocabulary)
    kept = options.out / VOCABULARY
    if options.resume and kept.is_file() and kept.read_bytes() != vocabulary.read_bytes():
        raise InputError(f"{kept}: the run was begun with it, not with {vocabulary}; give the same --vocab")
    place = Place(
        data=options.data,
        out=options.out,
        device=options.device,
        workers=options.workers,
        cache=options.cache,
        resume=options.resume,
        save_every=options.save_every,
        stop_after=options.stop_after,
    )
    initialisation = None
    if options.init or options.init_vision:
        initialisation = Initialisation(options.init, options.init_vision)
    trainer = Trainer(recipe, place, tokenizer, pieces, initialisation)
    if trainer.rank == 0:
        kept.write_bytes(vocabulary.read_bytes())
    progress = trainer.run()
    if trainer.rank == 0:
        known = {name: getattr(progress, name) for name in ("epoch", "update", "seconds")}
        best = progress.best if progress.epoch else None
        written = [str(place.out / name) for name in (BEST, LAST) if (place.out / name).is_file()]
        found = {"finished": progress.epoch >= recipe.epochs, **known, "best": best, "checkpoints": written}
        sys.stdout.write(json.dumps(found) + "\n")
    leave()
    return 0


def pretrain(options: argparse.Namespace) -> int:
    """Pretrain a visual encoder on patch labels; stdout gets one line of JSON."""
    from dgm4.training.vision import pretrain as train_vision

    recipe = TrainOptions(**_fields(options))
    tokenizer, _ = _tokenizer(find_vocabulary(model_config(recipe.model, recipe.size).vocabulary))
    start = time.perf_counter()
    loss = train_vision(recipe, options.data, options.out, tokenizer, options.device, options.cache)
    seconds = round(time.perf_counter() - start, 1)
    sys.stdout.write(json.dumps({"out": str(options.out), "loss": loss, "seconds": seconds}) + "\n")
    return 0


def _tokenizer(vocabulary: Path) -> tuple[CaptionTokenizer, int]:
    """The tokenizer of a vocabulary, and its number of pieces."""
    pieces = count_pieces(vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_text(build_tokenizer(vocabulary, pieces).to_str(), encoding="utf-8")
        return CaptionTokenizer(file), pieces


def _fields(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe's fields, with what the command line says over it."""
    values = read_recipe(options.recipe) if options.recipe else {}
    if options.model:
        values["model"] = options.model
    if options.size:
        values["size"] = options.size
    types = {field.name: type(field.default) for field in fields(TrainOptions)}
    given = {}
    for setting in options.set or []:
        name, equals, text = setting.partition("=")
        if not equals or name not in types:
            raise InputError(f"--set {setting}: expected NAME=VALUE with one of {', '.join(types)}")
        given[name] = _parse(name, text, types[name])
    return values | check_fields(given, "--set")


def _parse(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise InputError(f"--set {name}: expected true or false, got {text!r}")
        return text == "true"
    try:
        return kind(text)
    except ValueError as error:
        raise InputError(f"--set {name}: expected {kind.__name__}, got {text!r}") from error
