"""`dgm4 data`: make the sample set, ASAP's side-cars, vocabularies."""

from __future__ import annotations

from export.cli.arguments import Verbs
from export.cli.data import describe, make, vocabulary


def add_parser(verbs: Verbs) -> None:
    """Add the verb and its own verbs to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "data",
        help="make the sample set, or a folder's side-cars",
        description="Make the sample set, or write what ASAP and a small network need beside a data folder.",
        epilog="examples:\n  dgm4 data make --out sample-set\n  dgm4 data make --help",
    )
    parser.set_defaults(parser=parser)
    below = parser.add_subparsers(title="verbs", metavar="verb")
    for verb in (make, describe, vocabulary):
        verb.add_parser(below)
