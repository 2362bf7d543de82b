"""`dgm4 data make`: write a sample set in the format of DGM4."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from engine.progress import progress_bar
from export.cli.arguments import Verbs
from export.flags import WHOLE, Number
from export.writing import writing


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4 data`."""
    parser = verbs.add_parser(
        "make",
        help="write a small data set in the format of DGM4",
        description="Write a sample set in the format of DGM4, from images that ship with scikit-image.",
        epilog="examples:\n"
        "  dgm4 data make --out sample-set\n"
        "  dgm4 data make --out small --pairs 400 --seed 2",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new folder, or an old sample set"
    )
    parser.add_argument("--pairs", type=_pairs, default=5200, metavar="N", help="in all (%(default)s)")
    parser.add_argument("--seed", type=WHOLE, default=1, metavar="S", help="(%(default)s)")
    parser.set_defaults(run=run, parser=parser)


def _pairs(text: str) -> int:
    """A number of pairs that fills every split."""
    from dgm4.data.make import FEWEST

    return int(Number(f"a whole number from {FEWEST}", int, FEWEST)(text))


def run(options: argparse.Namespace) -> int:
    """Write the sample set; stdout tells how many pairs of each class there are."""
    from dgm4.data.make import make_sample_set

    with (
        writing(options.out, "--out"),
        progress_bar("make", options.pairs, "pairs", not options.quiet) as bar,
    ):
        counts = make_sample_set(options.out, options.pairs, options.seed, bar.update)
    sys.stdout.write(json.dumps({"out": str(options.out), "counts": counts}) + "\n")
    return 0
