"""The `dgm4` command. Importing it costs nothing, so that Ctrl-C is handled from the start."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_INTERRUPTED = 130  # 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; a user's error shows one line, no trace.

    Without `arguments`, those of the process, Ctrl-C ends the process at once, be it during an import.
    """
    try:
        if arguments is None:
            from export.cli.leaving import leave_on_interrupt

            leave_on_interrupt()
        from export.cli.app import run

        return run(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("dgm4: error: interrupted\n")
        return _INTERRUPTED
