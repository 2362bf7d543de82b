"""Progress of long work on stderr: one line that is updated on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

_EVERY_S = 15.0  # between plain lines
_PLAIN = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} so far{left}{postfix}"
_PLAIN_UNCOUNTED = "{desc}: {n_fmt} {unit}, {elapsed} so far{postfix}"


class _Lines:
    """A stream for tqdm that writes each state of the bar as a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


def on_terminal() -> bool:
    """Whether stderr is a terminal; standard streams may be None or closed."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


@contextlib.contextmanager
def progress_bar(
    label: str, total: int | None, unit: str, shown: bool = True, initial: int = 0
) -> Iterator[tqdm[Any]]:
    """Yield a bar to `update`: label, how many `unit` (a plural) of `total` are done, time so far and left.

    It appears at once, so that the work has a name while its first part runs. On a terminal it goes when the
    block ends; elsewhere a line is written at the start, at the end and now and then between them.
    """
    from tqdm import tqdm

    class Bar(tqdm):
        @property
        def format_dict(self) -> dict[str, Any]:
            """See tqdm; `left` is the time that remains, where it is known and there is some."""
            values = super().format_dict
            rate = values["rate"] or (self.n - self.initial) / (values["elapsed"] or 1)
            rest = (self.total or 0) - self.n
            values["left"] = f", {self.format_interval(rest / rate)} left" if rate and rest > 0 else ""
            return values

    terminal = on_terminal()
    format_ = {} if terminal else {"bar_format": _PLAIN if total is not None else _PLAIN_UNCOUNTED}
    with Bar(
        total=total,
        desc=label,
        unit=unit if not terminal else f" {unit}",
        initial=initial,
        leave=not terminal,
        file=sys.stderr if terminal or sys.stderr is None else _Lines(sys.stderr),
        disable=not shown or sys.stderr is None,
        mininterval=0.1 if terminal else _EVERY_S,
        maxinterval=_EVERY_S,
        dynamic_ncols=terminal,
        **format_,
    ) as bar:
        yield bar
