"""OpenTelemetry spans around the stages of a prediction, in a process that uses OpenTelemetry.

A program that traces has imported `opentelemetry.trace`, be it by `opentelemetry-instrument`. Elsewhere
nothing is imported, and a span costs a look into a dictionary. Attributes are names and numbers of shapes: no
captions, images or paths.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType

Note = Callable[..., None]  # takes more attributes by name


def _ignore(**_: str | int) -> None:
    pass


_NONE: AbstractContextManager[Note] = nullcontext(_ignore)


def caller() -> object:
    """The context of whoever calls, for `within` in another thread; None without OpenTelemetry."""
    return None if "opentelemetry.trace" not in sys.modules else _contexts().get_current()


@contextmanager
def within(context: object) -> Iterator[None]:
    """Let the spans of the block lie in a context of `caller`."""
    if context is None:
        yield
        return
    token = _contexts().attach(context)
    try:
        yield
    finally:
        _contexts().detach(token)


def _contexts() -> ModuleType:
    return importlib.import_module("opentelemetry.context")


def span(
    name: str, /, *, callers: Sequence[object] = (), **attributes: str | int
) -> AbstractContextManager[Note]:
    """A context manager that is the span `dgm4.<name>` within the current one; yields what adds attributes.

    Work for several `callers` lies in the context of the first, and has links to the spans of the others. An
    exception gives it the status of an error and its class, without its text, which may repeat what a user
    gave.
    """
    trace = sys.modules.get("opentelemetry.trace")
    return _NONE if trace is None else _span(trace, name, callers, attributes)


@contextmanager
def _span(
    trace: ModuleType, name: str, callers: Sequence[object], attributes: dict[str, str | int]
) -> Iterator[Note]:
    quiet = {"record_exception": False, "set_status_on_exception": False}
    parents = [trace.get_current_span(context).get_span_context() for context in callers if context]
    links = [trace.Link(parent) for parent in parents[1:] if parent.is_valid and parent != parents[0]]
    context = callers[0] if callers else None  # None: the current one
    tracer = trace.get_tracer("dgm4")
    with tracer.start_as_current_span(f"dgm4.{name}", context, links=links, **quiet) as current:

        def note(**more: str | int) -> None:
            current.set_attributes({f"dgm4.{key}": value for key, value in more.items()})

        note(**attributes)
        try:
            yield note
        except BaseException as error:
            current.set_attribute("error.type", type(error).__name__)
            current.set_status(trace.StatusCode.ERROR)
            raise
