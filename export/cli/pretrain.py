"""`dgm4 pretrain`: pretrain a small visual encoder on patch labels."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from dgm4.places import check_data
from export.cli.arguments import Verbs
from export.writing import writing


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "pretrain",
        help="pretrain a small visual encoder",
        description="Teach a ViT which patches lie in a manipulated face; what it writes is for dgm4 train "
        "--init-vision, where there is no DeiT of that size.",
        epilog="examples:\n  dgm4 pretrain --data sample-set --size tiny --out vision.pth",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with metadata/")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--size", choices=("base", "tiny"), help="over the recipe's; base without one")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="TOML file of settings")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="a setting over the recipe's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cache", action="store_true", help="keep decoded images in memory, 0.2 MB each")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Pretrain a visual encoder; stdout gets one line of JSON."""
    from dgm4.config import model_config
    from dgm4.tokenizer import find_vocabulary
    from export.cli.recipe import recipe_of, tokenizer_of

    check_data(options.data)
    recipe = recipe_of(options)
    tokenizer, _ = tokenizer_of(find_vocabulary(model_config(recipe.model, recipe.size).vocabulary))
    from dgm4.training.vision import pretrain

    start = time.perf_counter()
    place = (options.data, options.out)
    with writing(options.out, "--out"):
        loss = pretrain(recipe, *place, tokenizer, options.device, options.cache, progress=not options.quiet)
    seconds = round(time.perf_counter() - start, 1)
    sys.stdout.write(json.dumps({"out": str(options.out), "loss": loss, "seconds": seconds}) + "\n")
    return 0
