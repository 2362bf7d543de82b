"""The `dgm4` command: its verbs, errors and exit codes.

stdout carries the results, stderr the log and the progress. Exit codes: 0 done, 1 bad input, 2 usage, 3 a
verification failed, 4 the machine lacks something, 130 interrupted, 143 stopped (129 by a lost terminal).
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from engine import __version__
from engine.backends.cores import keep_to_quota
from engine.errors import Dgm4Error
from engine.logs import level_of_environment
from engine.packages import lacking
from export.cli import (
    bench,
    calibrate,
    convert,
    data,
    demo,
    doctor,
    evaluate,
    export,
    inspect,
    models,
    predict,
    pretrain,
    rebuild,
    repository,
    score,
    serve,
    sign,
    train,
)
from export.cli.arguments import check_device
from export.cli.parser import Parser, usage_errors
from export.cli.stopping import exit_on_sigterm
from export.output import ERRORS, escaped
from export.writing import FULL, cannot_write

# By purpose. Each has `add_parser(verbs)` and `run(options)`, and imports torch and the like only then.
PURPOSES = {
    "answer": (demo, predict, score, serve, models),
    "make a bundle": (export, convert, calibrate, rebuild, sign, repository),
    "judge it": (evaluate, bench, inspect, doctor),
    "train": (train, pretrain, data),
}
VERBS = tuple(verb for verbs in PURPOSES.values() for verb in verbs)
_STDERR = 2
_BAD_INPUT, _USAGE = 1, 2
_PACKAGES = ("dgm4", "engine", "export", "kernels")  # whose log -v shows; not Pillow's
_EXAMPLES = """\
examples:
  dgm4 demo
  dgm4 export --checkpoint best.pth --out my-bundle
  dgm4 predict my-bundle photo.jpg "What the caption says"
"""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; a user's error shows one line, an interrupt passes."""
    _open_streams()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options, unknown = make_parser().parse_known_args(given)
    if unknown:
        options.parser.unrecognized(unknown)
    options.arguments = given
    verbose = getattr(options, "verbose", 0)
    options.quiet = getattr(options, "quiet", False)
    with usage_errors(options.parser):
        _set_up_log(verbose, options.quiet)
    if "run" not in options:
        options.parser.print_help(sys.stderr)
        return _USAGE
    check_device(options)
    try:
        with exit_on_sigterm():
            keep_to_quota()
            code: int = options.run(options)
            sys.stdout.flush()
            return code
    except Dgm4Error as error:
        return _fail(error, error.exit_code, verbose)
    except ModuleNotFoundError as error:
        return _fail(wanted := lacking(options.parser.prog, error), wanted.exit_code, verbose)
    except BrokenPipeError:
        _drop_stdout()  # its reader went away
        return 0
    except OSError as error:
        if error.filename is None and error.errno in FULL:  # a file that is full is named by its option
            _drop_stdout()
            error = OSError(cannot_write("stdout", error, "choose another place"))
        return _fail(error, _BAD_INPUT, verbose)


def _open_streams() -> None:
    """Give each standard stream that is closed the null device, and the others UTF-8 whatever the locale.

    A file opened later would take the number of a closed stream, and get what libraries write there.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=ERRORS)


def _drop_stdout() -> None:
    """Send what is left for stdout nowhere; Python would report its failure once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _set_up_log(verbose: int, quiet: bool) -> None:
    """Log to stderr, how much as -v and -q say, else the environment; raises InputError for its value."""
    logging.basicConfig(
        level=logging.ERROR if quiet else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    level = {0: logging.NOTSET, 1: logging.INFO}.get(verbose, logging.DEBUG)
    if not verbose and not quiet:
        level = level_of_environment() or level
    for name in _PACKAGES:
        logging.getLogger(name).setLevel(level)
    warnings.showwarning = _log_warning


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    """A library's warning in one line; Python shows each once.

    But Pillow's of large images, which are refused by a lower limit in words of our own.
    """
    if category.__name__ == "DecompressionBombWarning":
        return
    text = (str(message).strip().splitlines() or [""])[0]
    logging.getLogger(__name__).warning("%s: %s (%s, line %d)", category.__name__, text, filename, lineno)


def _fail(error: BaseException, code: int, verbose: int) -> int:
    if verbose:
        logging.getLogger(__name__).error("traceback", exc_info=error)
    sys.stderr.write(f"dgm4: error: {escaped(str(error))}\n")
    return code


def make_parser() -> Parser:
    """The parser of `dgm4` with all its verbs; a verb's parser sets `run` and `parser`."""
    parser = Parser(
        prog="dgm4",
        usage="%(prog)s [options] verb ...",
        description="Export multimodal deepfake detectors to verified bundles, and serve them.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(parser=parser)
    verbs = parser.add_subparsers(prog="dgm4", metavar="verb", help=argparse.SUPPRESS)
    for verb in VERBS:
        verb.add_parser(verbs)
    parser.epilog = f"{_verbs_by_purpose(verbs)}\n\n{_EXAMPLES}"
    return parser


def _verbs_by_purpose(verbs: argparse._SubParsersAction[Parser]) -> str:
    """The verbs under their purposes, a line each."""
    helps = {action.dest: action.help for action in verbs._choices_actions}
    width = max(map(len, helps))
    groups, names = [], iter(helps)
    for purpose, modules in PURPOSES.items():
        lines = [f"  {name:<{width}}  {helps[name]}" for _, name in zip(modules, names, strict=False)]
        groups.append("\n".join([f"{purpose}:", *lines]))
    return "\n\n".join(groups)
