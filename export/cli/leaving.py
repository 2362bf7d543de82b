"""How a command ends on a signal. Imports nothing slow, so that Ctrl-C is handled from the start."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

_PID = os.getpid()
_CLEAR = "\r\x1b[K"  # of a terminal's line, where a bar may stand


def leave(number: int, frame: FrameType | None) -> None:
    """Handle a signal: remove unfinished files, and end the process with 128 + `number`.

    The process ends in the handler itself. An exception raised there can strike inside a lock, a destructor
    or the import of a library, where it is lost, becomes another one or leaves a thread waiting for ever.
    """
    try:
        if os.getpid() == _PID:  # a child that was forked has nothing of its own to remove or to tell
            _clean_up()
            if number == signal.SIGINT:
                _tell("dgm4: error: interrupted\n")
    finally:
        os._exit(128 + number)


def _clean_up() -> None:
    # Not imported here: where it is not yet loaded, or only in part, nothing is unfinished.
    remove = getattr(sys.modules.get("engine.files"), "remove_unfinished", None)
    if remove is not None:
        remove()
    for stream in (sys.stdout, sys.stderr):
        # The signal may have struck inside this very stream, or its reader may be gone.
        with contextlib.suppress(RuntimeError, OSError, ValueError, AttributeError):
            stream.flush()


def _tell(message: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{_CLEAR if os.isatty(2) else ''}{message}".encode())


def leave_on_interrupt() -> None:
    """Let SIGINT end the process by `leave`; one that is ignored, as in a shell's background, stays so.

    Main thread only.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, leave)
