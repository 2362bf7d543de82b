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
        epilog="An engine that fits this machine is left as it is, unless options say how to build it.\n\n"
        "examples:\n  dgm4 rebuild my-bundle\n  dgm4 rebuild my-bundle --profiles 1x32,32x128",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--force", action="store_true", help="build again what fits, too")
    add_flags(parser.add_argument_group("how the engine is built"), EngineOptions)
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Rebuild, and say on stderr what was built, or that nothing had to be."""
    from export.rebuild import rebuild

    chosen = read_options(EngineOptions, options)
    keep_fitting = not options.force and chosen == EngineOptions()
    try:
        chosen.check_alone()
        line = rebuild(options.bundle, chosen, keep_fitting)
    except InputError as error:  # what else fails has another kind
        options.parser.error(as_option(str(error), EngineOptions))
    sys.stderr.write(f"{line}\n")
    return 0
