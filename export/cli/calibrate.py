"""`dgm4 calibrate`: scores that are probabilities, and thresholds for a wanted rate of false alarms."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dgm4.places import check_data
from engine.bundle import Bundle
from engine.packages import require
from export.cli.arguments import Verbs, add_annotated, check_batch
from export.flags import WHOLE, Number, read_options

_RATE = Number("a rate above 0 and below 1, as 0.01", float, 1e-9, 1 - 1e-9)


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "calibrate",
        help="fit a bundle's scores and thresholds to your own pairs",
        description="Write a new bundle whose scores are probabilities on annotated pairs, and whose "
        "thresholds keep to a rate of false alarms: the share of pairs, types and words that are flagged "
        "though they are not manipulated. Half of the split fits them, the other half measures what they "
        "reach. The bundle itself stays as it is.",
        epilog="examples:\n  dgm4 calibrate my-bundle --data DGM4 --false-alarms 0.01",
    )
    add = parser.add_argument
    add_annotated(parser, "val")
    add("--false-alarms", type=_RATE, required=True, metavar="RATE", help="the wanted rate, as 0.01")
    add("--out", type=Path, metavar="DIR", help="the new bundle; BUNDLE-calibrated")
    add("--seed", type=WHOLE, default=0, metavar="N", help="draws the halves (%(default)s)")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Calibrate, write the new bundle and print what was reached."""
    check_batch(options)
    require("dgm4 calibrate", "sklearn")
    check_data(options.data)
    Bundle.open(options.bundle)
    from export.evaluation.calibrate import CalibrateOptions, calibrate
    from export.evaluation.report import write_calibration

    out = options.out or Path(f"{options.bundle.resolve()}-calibrated")
    settings = read_options(CalibrateOptions, options)
    result = calibrate(options.bundle, options.data, out, settings, progress=not options.quiet)
    sys.stdout.write(
        json.dumps(result.to_dict(), allow_nan=False) + "\n" if options.json else write_calibration(result)
    )
    return 0
