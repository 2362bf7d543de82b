"""`dgm4 data`: make the sample set, ASAP's side-cars, vocabularies."""

from __future__ import annotations

from export.cli.arguments import Verbs
from export.cli.data import describe, make, vocabulary


def add_parser(verbs: Verbs) -> None:
    """Add the verb and its own verbs to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser("data", help="make the sample set, or a folder's side-cars")
    below = parser.add_subparsers(title="verbs", required=True, metavar="verb")
    for verb in (make, describe, vocabulary):
        verb.add_parser(below)
