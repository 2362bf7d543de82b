"""The `dgm4` command: its verbs, errors and exit codes.

stdout carries the results, stderr the log and the progress. Exit codes: 0 done, 1 bad input, 2 usage, 3 a
verification failed, 4 the machine lacks something, 130 interrupted, 143 stopped (129 by a lost terminal).
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence

from engine import __version__
from engine.errors import Dgm4Error
from engine.packages import lacking
from export.cli import (
    bench,
    data,
    doctor,
    evaluate,
    export,
    inspect,
    predict,
    pretrain,
    rebuild,
    repository,
    train,
)
from export.cli.stopping import exit_on_sigterm

# Each has `add_parser(verbs)` and `run(options)`, and imports torch and the like only when it runs.
VERBS = (export, rebuild, predict, evaluate, train, pretrain, bench, repository, inspect, doctor, data)
_BAD_INPUT, _INTERRUPTED = 1, 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; a user's error shows one line, no trace."""
    options = make_parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # whatever the locale
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        with exit_on_sigterm():
            code: int = options.run(options)
            sys.stdout.flush()
            return code
    except Dgm4Error as error:
        return _fail(error, error.exit_code, options.verbose)
    except ModuleNotFoundError as error:
        return _fail(wanted := lacking(options.parser.prog, error), wanted.exit_code, options.verbose)
    except BrokenPipeError:
        # The reader of stdout went away; Python would report it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(error, _BAD_INPUT, options.verbose)
    except KeyboardInterrupt:
        return _fail(KeyboardInterrupt("interrupted"), _INTERRUPTED, False)


def _fail(error: BaseException, code: int, verbose: bool) -> int:
    if verbose:
        logging.getLogger(__name__).error("traceback", exc_info=error)
    sys.stderr.write(f"dgm4: error: {error}\n")
    return code


def make_parser() -> argparse.ArgumentParser:
    """The parser of `dgm4` with all its verbs; a verb's parser sets `run` and `parser`."""
    parser = argparse.ArgumentParser(
        prog="dgm4", description="Export multimodal deepfake detectors to verified bundles, and serve them."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log more, and show the traceback of an error")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="verb")
    for verb in VERBS:
        verb.add_parser(verbs)
    return parser
