"""`dgm4 rebuild`: put an engine for this machine into a bundle that exists."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.errors import InputError
from export.cli.arguments import Verbs
from export.flags import add_flags, as_option, read_options
from export.trt.options import EngineOptions


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the sub-parsers of `dgm4`."""
    parser = verbs.add_parser(
        "rebuild",
        help="put an engine for this machine into a bundle",
        description="Build the bundle's engine for this machine's GPU and TensorRT. Engines for others stay.",
    )
    parser.add_argument("bundle", type=Path)
    add_flags(parser.add_argument_group("how the engine is built"), EngineOptions)
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Rebuild, and say on stderr what was built."""
    from export.rebuild import rebuild

    chosen = read_options(EngineOptions, options)
    try:
        chosen.check_alone()
    except InputError as error:
        options.parser.error(as_option(str(error), EngineOptions))
    sys.stderr.write(rebuild(options.bundle, chosen) + "\n")
    return 0
