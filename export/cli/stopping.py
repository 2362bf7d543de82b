"""What a command does when it is asked to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from engine.files import remove_unfinished

_REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """On SIGTERM or SIGHUP inside the block remove unfinished files and exit with 128 + number.

    Main thread only. The process ends in the handler itself: an exception raised there can strike
    inside a lock or a destructor, where it is lost or leaves a thread waiting for ever. A SIGHUP that
    is ignored, as under nohup, stays ignored.
    """
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    handled = [n for n, handler in before.items() if handler is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, _leave)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


@contextlib.contextmanager
def stop_first(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Let the first SIGINT, SIGTERM or SIGHUP inside the block call `stop`; the next acts as before it.

    Yields a list that holds the signal's number from then on. Main thread only.
    """
    before = {number: signal.getsignal(number) for number in _REQUESTS}
    received: list[int] = []

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        received.append(number)
        put_back()
        stop()

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, ask)
    try:
        yield received
    finally:
        put_back()


def _leave(number: int, frame: FrameType | None) -> None:
    try:
        remove_unfinished()
        for stream in (sys.stdout, sys.stderr):
            # The signal may have struck inside this very stream, or its reader may be gone.
            with contextlib.suppress(RuntimeError, OSError, ValueError):
                stream.flush()
    finally:
        os._exit(128 + number)
