"""The `dgm4` command. Importing it costs nothing, so that Ctrl-C is handled from the start."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_INTERRUPTED = 130  # 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; a user's error shows one line, no trace."""
    try:
        from export.cli.app import run

        return run(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("dgm4: error: interrupted\n")
        return _INTERRUPTED
