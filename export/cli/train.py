"""`dgm4 train`: train a network on a data folder."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dgm4.places import check_checkpoint, check_data
from engine.errors import InputError
from engine.registry import SIZES, TRAINABLE
from export.cli.arguments import Verbs, add_device
from export.cli.stopping import stop_first
from export.flags import WHOLE, read_options
from export.output import write_whole
from export.writing import writing

if TYPE_CHECKING:
    from dgm4.training.trainer import Place, Progress


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "train",
        help="train a network on a data folder",
        description="Train HAMMER, ASAP or CALS on a folder in the published layout; several processes "
        "through torchrun. Checkpoints have the released layout.",
        epilog="Ctrl-C and SIGTERM end the run after the update under way; --resume goes on there. Images "
        "that cannot be read are counted and named; another takes their place, and too many end the run."
        "\n\n"
        "examples:\n"
        "  dgm4 train --data DGM4 --out run --model asap --init ALBEF_4M.pth\n"
        "  dgm4 train --data sample-set --out run --size tiny --set epochs=2\n"
        "  dgm4 train --data DGM4 --out run --model asap --resume",
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder with metadata/")
    add("--out", type=Path, required=True, metavar="DIR", help="checkpoints and log")
    add("--recipe", type=Path, metavar="FILE", help="TOML file of settings; HAMMER's published")
    add("--model", choices=TRAINABLE)
    add("--size", choices=SIZES)
    add("--set", action="append", metavar="NAME=VALUE", help="a setting over the recipe's")
    add("--init", type=Path, metavar="FILE", help="start from a checkpoint, or from ALBEF's")
    add("--init-vision", metavar="FILE", help="DeiT for the visual encoder: a file or timm:NAME")
    add("--resume", action="store_true", help="go on where the run in --out ended")
    add_device(parser)
    add("--workers", type=WHOLE, default=0, metavar="N", help="processes that read images")
    add("--cache", action="store_true", help="keep decoded images in memory, 0.2 MB each")
    add("--save-every", type=WHOLE, default=0, metavar="N", help="save every N updates too")
    add("--stop-after", type=WHOLE, default=0, metavar="N", help="end after N updates in all")
    add("--vocab", type=Path, metavar="FILE", help="vocabulary, one word piece a line")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Train; progress and log go to stderr, stdout gets one line of JSON with the result."""
    from dgm4.config import model_config
    from dgm4.tokenizer import VOCABULARY, find_vocabulary
    from export.cli.recipe import recipe_of, tokenizer_of

    check_data(options.data)
    if options.init is not None:
        check_checkpoint(options.init)
    recipe = recipe_of(options, options.model)
    vocabulary = options.vocab or find_vocabulary(model_config(recipe.model, recipe.size).vocabulary)
    tokenizer, pieces = tokenizer_of(vocabulary)
    copy = options.out / VOCABULARY
    if options.resume and copy.is_file() and copy.read_bytes() != vocabulary.read_bytes():
        raise InputError(f"{copy}: the run was begun with it, not with {vocabulary}; give the same --vocab")
    from dgm4.training.initialise import Initialisation
    from dgm4.training.processes import leave
    from dgm4.training.trainer import LAST, Place, Trainer

    initialisation = None
    if options.init or options.init_vision:
        initialisation = Initialisation(options.init, options.init_vision)
    place = read_options(Place, options, progress=not options.quiet)
    with writing(options.out, "--out"):
        trainer = Trainer(recipe, place, tokenizer, pieces, initialisation)
        if trainer.rank == 0:
            write_whole(copy, vocabulary.read_bytes(), "--out")
        with stop_first(trainer.stop) as signals:
            progress = trainer.run()
    finished = progress.epoch >= recipe.epochs
    if trainer.rank == 0:
        sys.stdout.write(_summary(place, progress, finished) + "\n")
        if signals and not finished:
            sys.stderr.write(
                f"dgm4: stopped after update {progress.update}, which {place.out / LAST} holds; go on with: "
                f"{_resuming(options.arguments)}\n"
            )
    leave()
    return 128 + signals[0] if signals and not finished else 0


def _resuming(arguments: list[str]) -> str:
    """The command that goes on with the run of these arguments."""
    given = [*arguments, *([] if "--resume" in arguments else ["--resume"])]
    return shlex.join(["dgm4", *given])


def _summary(place: Place, progress: Progress, finished: bool) -> str:
    from dgm4.training.trainer import BEST, LAST

    record = {name: getattr(progress, name) for name in ("epoch", "update", "seconds")}
    best = progress.best if progress.epoch else None
    written = [str(place.out / name) for name in (BEST, LAST) if (place.out / name).is_file()]
    return json.dumps({"finished": finished, **record, "best": best, "checkpoints": written})
