"""OpenTelemetry spans around the stages of a prediction, in a process that uses OpenTelemetry.

A program that traces has imported `opentelemetry.trace`, be it by `opentelemetry-instrument`. Elsewhere
nothing is imported, and a span costs a look into a dictionary. Attributes are names and numbers of shapes: no
captions, images or paths.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType

Note = Callable[..., None]  # takes more attributes by name


def _ignore(**_: str | int) -> None:
    pass


_NONE: AbstractContextManager[Note] = nullcontext(_ignore)


def span(name: str, /, **attributes: str | int) -> AbstractContextManager[Note]:
    """A context manager that is the span `dgm4.<name>` within the current one; yields what adds attributes.

    An exception gives it the status of an error and its class, without its text, which may repeat what a user
    gave.
    """
    trace = sys.modules.get("opentelemetry.trace")
    return _NONE if trace is None else _span(trace, name, attributes)


@contextmanager
def _span(trace: ModuleType, name: str, attributes: dict[str, str | int]) -> Iterator[Note]:
    quiet = {"record_exception": False, "set_status_on_exception": False}
    with trace.get_tracer("dgm4").start_as_current_span(f"dgm4.{name}", **quiet) as current:

        def note(**more: str | int) -> None:
            current.set_attributes({f"dgm4.{key}": value for key, value in more.items()})

        note(**attributes)
        try:
            yield note
        except BaseException as error:
            current.set_attribute("error.type", type(error).__name__)
            current.set_status(trace.StatusCode.ERROR)
            raise
