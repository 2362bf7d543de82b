"""`dgm4 list`: the networks, their sizes, and what of them ships."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from export.cli.arguments import Verbs
from export.output import Rows, align, open_output

_HEAD = ("name", "size", "parameters", "weights", "licence of the weights", "ready bundle")


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "list",
        help="the networks, and what of them ships",
        description="The networks at each size. Demo weights were trained on made images. Drawn ones, which "
        "dgm4 export makes where it gets no checkpoint, mean nothing. A ready bundle is opened by its name: "
        "dgm4 predict demo:asap IMAGE CAPTION.",
        epilog="examples:\n  dgm4 list\n  dgm4 list --json",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON array")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Print the list."""
    from dgm4.catalogue import list_models

    entries = list_models()
    rows: Rows = [_HEAD]
    for entry in entries:
        size = f"{entry.parameters / 1e6:.1f} M"
        weights = entry.weights or "your checkpoint"
        rows.append((entry.name, entry.size, size, weights, entry.licence, entry.bundle or "-"))
    table = "\n".join(align(rows, left=len(_HEAD)))
    with open_output(None) as out:
        out.write((json.dumps([*map(asdict, entries)], indent=1) if options.json else table) + "\n")
    return 0
