"""What a command does when it is asked to stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from export.cli.leaving import leave

_REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """On SIGTERM or SIGHUP inside the block remove unfinished files and exit with 128 + number.

    Main thread only. A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    handled = [n for n, handler in before.items() if handler is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, leave)
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
